"""What ``splatc tune`` found: the fastest tile of a mask at its lengths, kept in a file beside the compiled kernels.

One JSON file, ``tuned.json`` in the cache folder, replaced whole under a lock. It is a hint and no more: what is
damaged, from another version or no tile of the kernel is left aside, and the cost model chooses.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

from splatc.codegen.hopper.shape import shape_of
from splatc.codegen.kernel import KernelSpec, all_tiles
from splatc.config import Config
from splatc.errors import InvalidInput, Unsupported
from splatc.patterns.base import Pattern
from splatc.runtime.cache import key_of
from splatc.runtime.guard import check_ancestors, check_folder, make_folder

NAME = "tuned.json"
FORMAT = 1  # of the file
KEPT = 1000  # tunings: the oldest are dropped
LARGEST = 1 << 24  # bytes of a file that is read at all
SHOWN = 200  # characters of a pattern's text; the key has all of it

Tile = tuple[int, int]
Entries = dict[str, Any]  # by key, the oldest first: what _entry makes, if nobody has been at it
_Version = tuple[str, int, int, int]  # of the file: path, inode, time of its last change in ns, size

_log = logging.getLogger("splatc.tuned")
_read: tuple[_Version, Entries] | None = None  # the file as this process last saw it


@dataclass(frozen=True)
class Found:
    """The outcome of a tuning: the fastest tile, where it was measured, and how long a call took."""

    tile: Tile
    device: str
    microseconds: float


def tuned_tiles(pattern: Pattern, q_len: int, kv_len: int, spec: KernelSpec) -> tuple[Tile, ...] | None:
    """The tile that was the fastest for this mask, head dims and dtype on a GPU of spec's arch; None if not tuned.

    Never raises for what the file holds. Without a change to the file it is not read again.
    """
    if spec.kernel != "hopper":
        return None
    path = tuned_file(Config.from_env())
    entries = {} if path is None else _entries(path)
    if not entries:
        return None
    entry = entries.get(_key(pattern, q_len, kv_len, spec))
    tile = _usable(entry, spec)
    if entry is not None and tile is None:
        _log.debug("%s: not used for %s: %s", path, spec.name, entry)
    return None if tile is None else (tile,)


def remember_tile(pattern: Pattern, q_len: int, kv_len: int, spec: KernelSpec, found: Found) -> Path:
    """Keep what a tuning found, in place of an earlier one, and return the file.

    Raises InvalidInput if there is no cache on disk, CacheError if others may write to its folder, OSError if the file
    cannot be written.
    """
    path = tuned_file(Config.from_env())
    if path is None:
        raise InvalidInput("SPLATC_DISABLE_CACHE is set, so nothing can be remembered: unset it")
    key = _key(pattern, q_len, kv_len, spec)
    with _locked(path):
        entries = dict(_entries(path))
        entries.pop(key, None)
        entries[key] = _entry(pattern, q_len, kv_len, spec, found)
        _write(path, dict(list(entries.items())[-KEPT:]))
    return path


def tuned_file(config: Config) -> Path | None:
    """The file, whether it exists or not; None where there is no cache on disk."""
    return None if config.disable_cache else Path(os.path.realpath(config.cache_dir)) / NAME


def _key(pattern: Pattern, q_len: int, kv_len: int, spec: KernelSpec) -> str:
    """All that a tuning is for, but the GPU: what compiles may have none."""
    return key_of({"pattern": str(pattern), "q_len": q_len, "kv_len": kv_len, **_dims(spec)})


def _dims(spec: KernelSpec) -> dict[str, Any]:
    return {"head_dim": spec.head_dim, "v_head_dim": spec.v_head_dim, "dtype": spec.dtype,
            "score": list(spec.score.names), "arch": spec.target.arch}  # fmt: skip


def _entry(pattern: Pattern, q_len: int, kv_len: int, spec: KernelSpec, found: Found) -> dict[str, Any]:
    text = str(pattern)
    return {
        "pattern": text if len(text) <= SHOWN else text[: SHOWN - 3] + "...", "q_len": q_len, "kv_len": kv_len,
        **_dims(spec), "tile": list(found.tile), "device": found.device, "microseconds": round(found.microseconds, 3),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "splatc": _splatc_version(),
    }  # fmt: skip


def _usable(entry: Any, spec: KernelSpec) -> Tile | None:
    """The tile of an entry, if this version of the kernel has it."""
    match entry:
        case {"tile": [int(m), int(n)], "splatc": str(version)}:
            if (m, n) in all_tiles("hopper", spec.dtype) and version == _splatc_version():
                with suppress(Unsupported):
                    shape_of(replace(spec, tile_m=m, tile_n=n, gather=False))
                    return m, n
    return None


# -- the file ----------------------------------------------------------------------------------------------------------


def _entries(path: Path) -> Entries:
    """What the file holds; nothing if it is absent or damaged."""
    global _read
    try:
        found = os.stat(path)
    except OSError:
        return {}
    version = str(path), found.st_ino, found.st_mtime_ns, found.st_size
    seen = _read
    if seen is None or seen[0] != version:
        entries, fault = _parse(path, found)
        if fault is not None:
            _log.warning("%s is ignored: %s; `splatc tune` writes it anew", path, fault)
        _read = seen = version, entries
    return seen[1]


def _parse(path: Path, found: os.stat_result) -> tuple[Entries, str | None]:
    """(entries, what is wrong with the file)."""
    if not stat.S_ISREG(found.st_mode) or found.st_size > LARGEST:
        return {}, "it is no file of this program"
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        return {}, str(error)
    match values:
        case {"format": int(number), "tiles": dict(entries)} if number == FORMAT:
            return entries, None
    return {}, "it has another format"


def _write(path: Path, entries: Entries) -> None:
    """Replace the file in one step. Lock held."""
    new = path.with_name(f".{NAME}.{secrets.token_hex(4)}")
    try:
        handle = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump({"format": FORMAT, "tiles": entries}, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    finally:
        with suppress(FileNotFoundError):
            new.unlink()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the file's lock in a folder that only we can write to, as the kernel cache does."""
    from filelock import FileLock

    locks = path.parent / ".locks"
    make_folder(locks)
    check_ancestors(path.parent)
    for folder in (path.parent, locks):
        check_folder(folder)
    with FileLock(locks / "tuned.lock", mode=0o600):
        yield


@cache
def _splatc_version() -> str:
    from importlib import metadata  # slow to import

    try:
        return metadata.version("splatc")
    except metadata.PackageNotFoundError:
        return "unknown"
