"""CUDA source from TVM without its binary: where there is a GPU, TVM compiles what it generates, through packages of
its own choice. splatc compiles the source itself, with the options and reports it wants, so that is a second lost for
nothing, or a failure where those packages are missing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from splatc.codegen.no_torch import import_tvm_ffi

COMPILE = "tvm_callback_cuda_compile"  # what TVM calls with its source

_inside = threading.local()
_asked: Any = None  # what stands before TVM's own, which TVM calls now


@contextmanager
def source_only() -> Iterator[None]:
    """CUDA modules that this thread builds inside have their source and an empty binary."""
    _stand_before()
    _inside.here = True
    try:
        yield
    finally:
        _inside.here = False


def _stand_before() -> None:
    """See to it that TVM asks here first. Other threads and other code get what they would have got."""
    global _asked
    tvm_ffi = import_tvm_ffi()
    former = tvm_ffi.get_global_func(COMPILE, allow_missing=True)
    if former is None or (_asked is not None and former.same_as(_asked)):
        return

    def asked(code: str) -> Any:
        return b"" if getattr(_inside, "here", False) else former(code)

    tvm_ffi.register_global_func(COMPILE, asked, override=True)
    _asked = tvm_ffi.get_global_func(COMPILE)
