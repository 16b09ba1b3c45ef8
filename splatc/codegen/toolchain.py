"""Which CUDA compiler compiles our kernels: NVRTC (the faster one) or nvcc, or the one that the user names."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from splatc.codegen.nvcc import compile_nvcc, find_nvcc
from splatc.codegen.nvrtc import compile_nvrtc, find_nvrtc
from splatc.codegen.ptxas import Compiled
from splatc.config import CUDA_COMPILERS, Config
from splatc.errors import Unsupported

LINE_INFO = "-lineinfo"
INSTALL = "install the CUDA toolkit, or pip install 'splatc[cuda]'"


@dataclass(frozen=True)
class CudaCompiler:
    """A compiler of device source. compile(source, arch) raises CompileError.

    identity: what tells this installation from another without starting it, path, size and time of the file, and the
    options that Config adds. apart: whether it compiles the functions of a source one by one, side by side, in less
    time than all at once.
    """

    name: str
    identity: str
    compile: Callable[[str, str], Compiled]
    apart: bool = False


def find_compiler() -> CudaCompiler | None:
    """The compiler that SPLATC_CUDA_COMPILER names, else NVRTC, else nvcc; None if there is none.

    Raises Unsupported if the one that was named is not installed.
    """
    config = Config.from_env()
    wanted, more = config.cuda_compiler, (LINE_INFO,) * config.line_info
    paths = {name: _path(name) for name in CUDA_COMPILERS if wanted in (None, name)}
    name, path = next(((n, p) for n, p in paths.items() if p), (None, None))
    if name is None or path is None:
        if wanted is not None:
            raise Unsupported(f"SPLATC_CUDA_COMPILER={wanted}, but {wanted} is not installed: {INSTALL}")
        return None
    stat = os.stat(path)
    identity = ":".join([name, os.path.realpath(path), str(stat.st_size), str(stat.st_mtime_ns), *more])
    if name == "nvcc":  # a process reads half a second of headers
        return CudaCompiler(name, identity, partial(compile_nvcc, more=more))
    return CudaCompiler(name, identity, partial(compile_nvrtc, more=more), apart=True)


def _path(name: str) -> str | None:
    if name == "nvcc":
        return find_nvcc()
    nvrtc = find_nvrtc()
    return None if nvrtc is None else str(nvrtc.library)
