"""Importing TVM without torch: TVM imports it wherever it is installed, for conveniences that splatc does not use."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import get_ident
from typing import Any


class _Refuse:
    """A finder of modules: of no torch, for the thread that made it."""

    def __init__(self) -> None:
        self._thread = get_ident()

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        if fullname == "torch" and get_ident() == self._thread:
            raise ModuleNotFoundError("No module named 'torch'", name="torch")


@contextmanager
def without_torch() -> Iterator[None]:
    """Imports inside find no torch, unless it is loaded already: that would take three seconds, and JAX programs want
    none of it."""
    refuse = _Refuse()
    sys.meta_path.insert(0, refuse)
    try:
        yield
    finally:
        sys.meta_path.remove(refuse)


@cache
def import_tvm_ffi() -> Any:
    """The module tvm_ffi."""
    with without_torch():
        import tvm_ffi

    return tvm_ffi


@cache
def import_tvm() -> None:
    """Load all of TVM: whoever generates code asks for this first, before a module that imports it."""
    with without_torch():
        import tvm  # noqa: F401
