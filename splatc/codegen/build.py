"""From a kernel's identity to a loadable binary and its readable source. Needs no GPU."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path

from splatc.codegen.kernel import KernelSpec
from splatc.codegen.nvcc import compile_library, find_nvcc
from splatc.codegen.target import NATIVE, Target
from splatc.errors import CompileError, Unsupported

FUNCTION = "splatc_attention"
LIBRARY = "kernel.so"
REPORT = "report.json"


def source_name(spec: KernelSpec) -> str:
    """The file in a built folder that holds the generated source."""
    return "kernel.cu" if spec.target.kind == "cuda" else "kernel.ll"


def build(spec: KernelSpec, folder: Path) -> None:
    """Emit, compile and export a kernel into ``folder``.

    Writes kernel.tir.py (the TIRx), kernel.ll or kernel.cu and kernel.ptx, kernel.so (loadable by tvm_ffi; for CUDA
    only where nvcc is installed) and report.json.
    Raises CompileError if a compiler refuses or the kernel spills, Unsupported if the target cannot run such a kernel.
    """
    report = _build_cpu(spec, folder) if spec.target.kind == "cpu" else _build_cuda(spec, folder)
    (folder / REPORT).write_text(json.dumps({"name": spec.name, **report}, indent=2) + "\n")


@lru_cache(maxsize=1024)
def load(folder: Path) -> Callable[..., None]:
    """The kernel of a built folder as a callable, in the argument order of the kernel ABI."""
    import tvm_ffi

    if not (folder / LIBRARY).exists():
        raise CompileError(
            f"{folder} holds source only: install the CUDA toolkit (nvcc) to compile it, then compile again"
        )
    _load_thread_pool()
    function: Callable[..., None] = tvm_ffi.load_module(str(folder / LIBRARY))[FUNCTION]
    return function


@cache
def _load_thread_pool() -> None:
    """Make TVM's run-time library (parallel loops on a CPU) visible to kernels; importing TVM would take 2 seconds."""
    spec = importlib.util.find_spec("tvm")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    os.environ.setdefault("TVM_NUM_THREADS", str(len(os.sched_getaffinity(0))))  # its own guess halves the cores
    os.environ.setdefault("TVM_BIND_THREADS", "0")  # a bound pool pins the caller's thread too
    for library in (path for folder in folders for path in sorted(folder.rglob("libtvm_runtime.so"))):
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
        return
    import tvm  # noqa: F401  (an unusual layout: TVM knows where its library is)


def _build_cpu(spec: KernelSpec, folder: Path) -> dict[str, object]:
    import tvm
    from tvm.target.codegen import llvm_get_system_cpu

    from splatc.codegen.cpu import attention_cpu, llvm_target

    if shutil.which("cc") is None and shutil.which("gcc") is None and shutil.which("clang") is None:
        raise Unsupported("no C compiler found to link the kernel: install one (cc, gcc or clang)")
    if spec.target.arch == NATIVE:
        spec = replace(spec, target=Target("cpu", str(llvm_get_system_cpu())))
    module = attention_cpu(spec)
    (folder / "kernel.tir.py").write_text(module.script())
    built = tvm.compile(module, target=llvm_target(spec.target.arch))
    (folder / source_name(spec)).write_text(built.mod.inspect_source("ll"))
    _export(built, folder)
    return {"target": str(spec.target)}


def _export(built: object, folder: Path) -> None:
    try:
        built.export_library(str(folder / LIBRARY))  # type: ignore[attr-defined]
    except RuntimeError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise CompileError(f"linking the kernel failed: {lines[-1] if lines else error}") from error


def _build_cuda(spec: KernelSpec, folder: Path) -> dict[str, object]:
    source = folder / source_name(spec)
    module, text = cuda_source(spec)
    (folder / "kernel.tir.py").write_text(module)
    source.write_text(text)
    if find_nvcc() is None:
        return {"target": str(spec.target), "compiled": False}
    report = compile_library(source, folder / LIBRARY, spec.target.arch)
    return {"target": str(spec.target), "compiled": True, **report}


def cuda_source(spec: KernelSpec) -> tuple[str, str]:
    """(scheduled TIRx, complete CUDA with its host wrapper) of a kernel; needs neither nvcc nor a GPU."""
    import tvm
    from tvm.backend.cuda.host import export_cuda_host

    from splatc.codegen.cuda import attention_cuda

    module = attention_cuda(spec)
    target = tvm.target.Target({"kind": "cuda", "arch": spec.target.arch}, host="cuda_host")
    return module.script(), str(export_cuda_host(tvm.compile(module, target=target, tir_pipeline="tirx").mod))
