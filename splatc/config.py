"""What the environment says: every SPLATC_* variable, read when asked and never at import.

SPLATC_CACHE_DIR      folder of compiled kernels (default: the user's cache folder / splatc)
SPLATC_DISABLE_CACHE  1: compile afresh in every process (default: 0)
SPLATC_CACHE_SIZE     limit on that folder: bytes, or 500MB, 2GiB (default: 2GiB)
SPLATC_DUMP           what to write while compiling: any of ir,cuda,ptx,llvm,tables (default: nothing)
SPLATC_DUMP_DIR       where to write it (default: ./splatc-dump)
SPLATC_LOG_LEVEL      debug, info, warning, error, critical: log to stderr (default: the application decides)
SPLATC_ARCH           compile for this (sm_90a, x86-64-v4, ...), not for what is here (default: detected)
SPLATC_CUDA_COMPILER  what compiles CUDA: nvrtc or nvcc (default: the first of them that is installed)
SPLATC_LINE_INFO      1: kernels tell profilers and compute-sanitizer which line of kernel.cu an instruction is of, and
                      take an eighth longer to compile (default: 0)
SPLATC_GRADIENT_WALKS how a Hopper GPU computes gradients: in one walk over tiles or two (default: the faster by the
                      cost model)
SPLATC_COSTS          a file of `splatc tune --calibrate -o FILE`: what the cost model's kernels for Hopper cost on your
                      GPU (default: on the one that splatc was made with; `splatc doctor` says which)

An empty variable counts as unset.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from splatc.errors import InvalidInput

DUMPS = ("ir", "cuda", "ptx", "llvm", "tables")
CUDA_COMPILERS = ("nvrtc", "nvcc")  # the faster one first
GRADIENT_WALKS = ("one", "two")
LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
DEFAULT_CACHE_SIZE = 2 << 30

_DECIMAL = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}
_UNITS = {"": 1, **_DECIMAL, **_BINARY}
_YES = ("1", "true", "yes", "on")
_NO = ("0", "false", "no", "off")


@dataclass(frozen=True)
class Config:
    """The settings of one moment: `Config.from_env()` reads them, `dataclasses.replace` overrides some.

    cache_dir, dump_dir: absolute, need not exist. cache_size: bytes. dump: a subset of DUMPS.
    log_level: a `logging` level, or None to leave logging to the application. arch: None means "detect".
    cuda_compiler: one of CUDA_COMPILERS, or None for the first that is installed. gradient_walks: one of
    GRADIENT_WALKS, or None for the one that is predicted to be faster. line_info: whether CUDA kernels have it. costs:
    None for splatc's own.
    """

    cache_dir: Path
    dump_dir: Path
    disable_cache: bool = False
    cache_size: int = DEFAULT_CACHE_SIZE
    dump: frozenset[str] = frozenset()
    log_level: int | None = None
    arch: str | None = None
    cuda_compiler: str | None = None
    gradient_walks: str | None = None
    line_info: bool = False
    costs: Path | None = None

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Config:
        """Read them from `environ` (default: os.environ). Raises InvalidInput, naming the variable."""
        env = os.environ if environ is None else environ

        def get(name: str) -> str:
            return env.get(f"SPLATC_{name}", "").strip()

        return cls(
            cache_dir=_folder("SPLATC_CACHE_DIR", get("CACHE_DIR")) or default_cache_dir(),
            dump_dir=_folder("SPLATC_DUMP_DIR", get("DUMP_DIR")) or Path.cwd() / "splatc-dump",
            disable_cache=_flag("SPLATC_DISABLE_CACHE", get("DISABLE_CACHE")),
            cache_size=parse_size(get("CACHE_SIZE") or str(DEFAULT_CACHE_SIZE), name="SPLATC_CACHE_SIZE"),
            dump=_subset("SPLATC_DUMP", get("DUMP"), DUMPS),
            log_level=_level("SPLATC_LOG_LEVEL", get("LOG_LEVEL")),
            arch=_arch("SPLATC_ARCH", get("ARCH")),
            cuda_compiler=_one("SPLATC_CUDA_COMPILER", get("CUDA_COMPILER"), CUDA_COMPILERS),
            gradient_walks=_one("SPLATC_GRADIENT_WALKS", get("GRADIENT_WALKS"), GRADIENT_WALKS),
            line_info=_flag("SPLATC_LINE_INFO", get("LINE_INFO")),
            costs=costs_file(env),
        )


def costs_file(environ: Mapping[str, str] | None = None) -> Path | None:
    """Config.costs by itself, which is asked for many times while a mask is planned."""
    env = os.environ if environ is None else environ
    return _file("SPLATC_COSTS", env.get("SPLATC_COSTS", "").strip())


def default_cache_dir() -> Path:
    """The user's cache folder for splatc, by the platform's convention (XDG_CACHE_HOME on Linux)."""
    import platformdirs

    return Path(platformdirs.user_cache_dir("splatc", appauthor=False))


def parse_size(text: str, *, name: str = "size") -> int:
    """Bytes in "1048576", "500MB" (10**6) or "2 GiB" (2**30). Raises InvalidInput that starts with `name`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", text.strip(), re.IGNORECASE | re.ASCII)
    if match is None:
        raise InvalidInput(f"{name}={text!r} is not a size: write bytes, or a number with MB, GB, MiB or GiB")
    number, unit = match.groups(default="")
    factor = _UNITS[unit.lower()]
    return int(number) * factor if number.isdigit() else int(float(number) * factor)


def start_logging(level: int | None) -> None:
    """Send the log of "splatc" to stderr from `level` up (None: do nothing). Calling it again is harmless.

    Never called at import. The CLI calls it, and so does the first compile when SPLATC_LOG_LEVEL is set.
    """
    if level is None:
        return
    logger = logging.getLogger("splatc")
    logger.setLevel(level)
    if not any(handler.get_name() == "splatc" for handler in logger.handlers):
        handler = logging.StreamHandler()
        handler.set_name("splatc")
        handler.setFormatter(logging.Formatter("splatc %(levelname)s: %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False


def _flag(name: str, text: str) -> bool:
    if text.lower() in _YES:
        return True
    if not text or text.lower() in _NO:
        return False
    raise InvalidInput(f"{name}={text!r} is neither yes nor no: write 1 or 0")


def _folder(name: str, text: str) -> Path | None:
    path = _path(name, text)
    if path is not None and path.exists() and not path.is_dir():
        raise InvalidInput(f"{name}={text!r} is not a folder: name a folder, existing or not")
    return path


def _file(name: str, text: str) -> Path | None:
    path = _path(name, text)
    if path is not None and not path.is_file():
        raise InvalidInput(f"{name}={text!r} is no file: name one that exists, or unset it")
    return path


def _path(name: str, text: str) -> Path | None:
    if not text:
        return None
    try:
        path = Path(text).expanduser()
    except RuntimeError:  # "~nobody-of-that-name"
        raise InvalidInput(f"{name}={text!r} names no user's home: write an absolute path") from None
    return Path(os.path.abspath(path))


def _subset(name: str, text: str, allowed: tuple[str, ...]) -> frozenset[str]:
    words = [word.strip().lower() for word in text.split(",") if word.strip()]
    for word in words:
        if word not in allowed:
            raise InvalidInput(f"{name}={text!r}: {word!r} is not one of {','.join(allowed)}")
    return frozenset(words)


def _one(name: str, text: str, allowed: tuple[str, ...]) -> str | None:
    if text and text.lower() not in allowed:
        raise InvalidInput(f"{name}={text!r} is not one of {', '.join(allowed)}")
    return text.lower() or None


def _level(name: str, text: str) -> int | None:
    word = _one(name, text, LOG_LEVELS)
    return None if word is None else int(getattr(logging, word.upper()))


def _arch(name: str, text: str) -> str | None:
    # It goes into a compiler's options and a folder's name, so only what LLVM's and nvcc's names hold.
    if text and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", text):
        raise InvalidInput(f"{name}={text!r} is no architecture: write one like sm_90a")
    return text or None
