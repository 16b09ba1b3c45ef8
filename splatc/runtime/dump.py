"""SPLATC_DUMP: the compiler's intermediate results as numbered files."""

from __future__ import annotations

import hashlib
import itertools
import logging
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from splatc.codegen.tables import Tables
from splatc.config import Config
from splatc.ir.printer import to_text
from splatc.ir.program import Program
from splatc.patterns.base import Pattern
from splatc.runtime.kernel import Kernel

_log = logging.getLogger("splatc")
_SUFFIXES = {"cuda": ".cu", "ptx": ".ptx", "llvm": ".ll"}


def ir_dump(pattern: Pattern, q_len: int, kv_len: int) -> Callable[[str, Program], None] | None:
    """What writes 00_lower.txt, 01_choose_views.txt, ... for this mask; None unless SPLATC_DUMP asks for ir."""
    config = Config.from_env()
    if "ir" not in config.dump:
        return None
    number = itertools.count()

    def write(name: str, program: Program) -> None:
        _write(_folder(config, pattern, q_len, kv_len) / f"{next(number):02d}_{name}.txt", to_text(program))

    return write


def dump_tables(pattern: Pattern, q_len: int, kv_len: int, tables: tuple[Tables, ...]) -> None:
    """The tables of every pass as pass<i>.npz, if SPLATC_DUMP asks for tables."""
    config = Config.from_env()
    if "tables" in config.dump:
        folder = _folder(config, pattern, q_len, kv_len)
        folder.mkdir(parents=True, exist_ok=True)
        for i, t in enumerate(tables):
            np.savez(folder / f"pass{i}.npz", **t.arrays())


def _folder(config: Config, pattern: Pattern, q_len: int, kv_len: int) -> Path:
    """A folder named after the mask: what is readable of its text, and a digest of all of it."""
    text = f"{pattern} {q_len}x{kv_len}"
    return (
        config.dump_dir / f"{re.sub('[^A-Za-z0-9]+', '-', text)[:60]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    )


def dump_sources(kernel: Kernel) -> None:
    """The kernel's CUDA, PTX or LLVM, as far as SPLATC_DUMP asks for them and the target has them."""
    config = Config.from_env()
    for kind, suffix in _SUFFIXES.items():
        for path in sorted(kernel.folder.glob(f"*{suffix}")) if kind in config.dump else ():
            _write(config.dump_dir / kernel.spec.name / path.name, path.read_text())


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    _log.debug("wrote %s", path)
