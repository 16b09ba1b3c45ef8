"""From a kernel's identity to a loadable binary and its readable source. Needs no GPU."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from splatc.codegen.kernel import KernelSpec
from splatc.errors import CompileError, Unsupported

FUNCTION = "splatc_attention"
LIBRARY = "kernel.so"
REPORT = "report.json"


def source_name(spec: KernelSpec) -> str:
    """The file in a built folder that holds the generated source."""
    return "kernel.cu" if spec.target.kind == "cuda" else "kernel.ll"


def build(spec: KernelSpec, folder: Path) -> None:
    """Emit, compile and export a kernel into ``folder``.

    Writes kernel.tir.py (the scheduled TIRx), kernel.ll or kernel.cu, kernel.so (loadable by tvm_ffi) and report.json.
    Raises CompileError if a compiler refuses or the kernel spills, Unsupported if the target cannot run such a kernel.
    """
    report = _build_cpu(spec, folder) if spec.target.kind == "cpu" else _build_cuda(spec, folder)
    (folder / REPORT).write_text(json.dumps({"name": spec.name, **report}, indent=2) + "\n")


@lru_cache(maxsize=1024)
def load(folder: Path) -> Callable[..., None]:
    """The kernel of a built folder as a callable, in the argument order of the kernel ABI."""
    import tvm  # noqa: F401  (its run-time library holds the thread pool and the CUDA loader)
    import tvm_ffi

    function: Callable[..., None] = tvm_ffi.load_module(str(folder / LIBRARY))[FUNCTION]
    return function


def _build_cpu(spec: KernelSpec, folder: Path) -> dict[str, object]:
    import tvm

    from splatc.codegen.cpu import attention_cpu, llvm_target

    if shutil.which("cc") is None and shutil.which("gcc") is None and shutil.which("clang") is None:
        raise Unsupported("no C compiler found to link the kernel: install one (cc, gcc or clang)")
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
    raise Unsupported("cuda: soon")
