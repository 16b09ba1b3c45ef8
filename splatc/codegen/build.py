"""From a kernel's identity to a loadable binary and its readable source. Needs no GPU."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from splatc.codegen.emitted import Emitted, functions_apart, parse_signatures
from splatc.codegen.kernel import (
    BACKWARD,
    COMPRESSED,
    FORWARD,
    PRODUCTS,
    ROWS,
    SDDMM,
    SOFTMAX,
    SPMM,
    KernelSpec,
)
from splatc.codegen.no_torch import import_tvm, import_tvm_ffi
from splatc.codegen.ptxas import check_report, read_report
from splatc.codegen.target import NATIVE, Target
from splatc.codegen.toolchain import find_compiler
from splatc.codegen.variables import arrays_to_variables
from splatc.errors import CompileError, Unsupported

FUNCTION = "splatc_attention"  # of a CPU kernel
GRADIENTS = "splatc_attention_dq", "splatc_attention_dkv"  # of one for gradients
LIBRARY = "kernel.so"  # of a CPU kernel
CUBIN, PTX = ".cubin", ".ptx"  # of an image
REPORT = "report.json"
COMMON = "tirx.CommonSubexprElim"  # slow, and the compilers behind TVM do it anyway
SIMPLIFY = "tirx.StmtSimplify"  # slow, and computes quotients of a producer's anew wherever they are used
COMPACT = "s_tir.CompactBufferAllocation"  # slow, and our buffers are as large as they have to be: it finds nothing


def source_name(spec: KernelSpec) -> str:
    """The file in a built folder that holds the generated source."""
    return "kernel.cu" if spec.target.kind == "cuda" else "kernel.ll"


def build(spec: KernelSpec, folder: Path) -> None:
    """Emit, compile and export a kernel into ``folder``.

    Writes kernel.tir.py (the TIRx) and report.json; for a CPU kernel.ll and kernel.so (loadable by tvm_ffi); for CUDA
    kernel.cu (device code) and, where a CUDA compiler is installed, kernel.log (ptxas's) and images, a .cubin and
    a .ptx each: of every function, called as it is, or of all, called "kernel".
    Raises CompileError if a compiler refuses or the kernel spills, Unsupported if the target cannot run such a kernel.
    """
    report = _build_cpu(spec, folder) if spec.target.kind == "cpu" else _build_cuda(spec, folder)
    (folder / REPORT).write_text(json.dumps({"name": spec.name, **report}, indent=2) + "\n")


@lru_cache(maxsize=1024)
def load(folder: Path, name: str = FUNCTION) -> Callable[..., None]:
    """A function of a CPU kernel's built folder as a callable, in the argument order of the kernel ABI."""
    tvm_ffi = import_tvm_ffi()  # before the thread pool, which is linked with its library
    _load_thread_pool()
    function: Callable[..., None] = tvm_ffi.load_module(str(folder / LIBRARY))[name]
    return function


@cache
def _load_thread_pool() -> None:
    """Make TVM's run-time library (parallel loops on a CPU) visible to kernels; importing TVM would take 2 seconds."""
    spec = importlib.util.find_spec("tvm")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    os.environ.setdefault("TVM_NUM_THREADS", str(len(os.sched_getaffinity(0))))  # its own guess halves the cores
    os.environ.setdefault("TVM_BIND_THREADS", "0")  # a bound pool pins the caller's thread too
    os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "1000")  # 300000 would keep torch's next operation waiting
    for library in (path for folder in folders for path in sorted(folder.rglob("libtvm_runtime.so"))):
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
        return
    import tvm  # noqa: F401  (an unusual layout: TVM knows where its library is)


def _build_cpu(spec: KernelSpec, folder: Path) -> dict[str, object]:
    import_tvm()
    from tvm.target.codegen import llvm_get_system_cpu

    from splatc.codegen.cpu import attention_cpu
    from splatc.codegen.cpu_backward import attention_backward_cpu
    from splatc.codegen.cpu_products import sddmm_cpu, spmm_cpu
    from splatc.codegen.cpu_softmax import softmax_cpu

    if shutil.which("cc") is None and shutil.which("gcc") is None and shutil.which("clang") is None:
        raise Unsupported("no C compiler found to link the kernel: install one (cc, gcc or clang)")
    if spec.target.arch == NATIVE:
        spec = replace(spec, target=Target("cpu", str(llvm_get_system_cpu())))
    emitters = {FORWARD: attention_cpu, BACKWARD: attention_backward_cpu, SDDMM: sddmm_cpu, SOFTMAX: softmax_cpu,
                SPMM: spmm_cpu}  # fmt: skip
    module = emitters[spec.role](spec)
    (folder / "kernel.tir.py").write_text(module.script())
    built = compile_cpu(module, spec.target.arch)
    (folder / source_name(spec)).write_text(built.mod.inspect_source("ll"))
    _export(built, folder)
    return {"target": str(spec.target)}


def compile_cpu(module: Any, arch: str) -> Any:
    """TVM's executable of a generated module, for an LLVM CPU name."""
    import tvm

    from splatc.codegen.cpu import llvm_target

    with tvm.transform.PassContext(disabled_pass=[COMMON, COMPACT]):
        return tvm.compile(module, target=llvm_target(arch))


def _export(built: object, folder: Path) -> None:
    try:
        built.export_library(str(folder / LIBRARY))  # type: ignore[attr-defined]
    except RuntimeError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise CompileError(f"linking the kernel failed: {lines[-1] if lines else error}") from error


def _build_cuda(spec: KernelSpec, folder: Path) -> dict[str, object]:
    from concurrent.futures import ThreadPoolExecutor  # slow to import

    emitted = emit(spec)
    text = source_of(emitted, spec)
    declared = {one.name: one for one in parse_signatures(text)}
    compiler = find_compiler()
    units = functions_apart(text) if compiler and compiler.apart else {"kernel": text}
    functions = [{"name": f.name, "threads": f.threads, "smem_bytes": f.smem_bytes,
                  "parameters": declared[f.name].parameters, "image": f.name if f.name in units else "kernel"}
                 for f in emitted.functions]  # fmt: skip
    report = {"target": str(spec.target), "functions": functions}
    with ThreadPoolExecutor(len(units)) as beside:  # compilers leave Python free, and printing TIRx takes a while
        compiling = [beside.submit(compiler.compile, unit, spec.target.arch) for unit in units.values() if compiler]
        (folder / source_name(spec)).write_text(text)
        (folder / "kernel.tir.py").write_text(emitted.module.script())
    if compiler is None:
        return {**report, "compiler": None}
    images = {name: one.result() for name, one in zip(units, compiling, strict=True)}
    log = "\n".join(image.log for image in images.values())
    (folder / "kernel.log").write_text(log)
    check_report(log, spec.target.arch)
    for name, image in images.items():
        (folder / f"{name}{CUBIN}").write_bytes(image.cubin)
        (folder / f"{name}{PTX}").write_text(image.ptx)
    usage = read_report(log)
    for function in functions:
        function.update(asdict(usage[str(function["name"])]))
    return {**report, "compiler": compiler.name}


def emit(spec: KernelSpec) -> Emitted:
    """The generated module of a CUDA kernel. Raises Unsupported for what there is none for."""
    import_tvm()
    if spec.role in PRODUCTS:
        from splatc.codegen.hopper.unfused.kernels import product_hopper

        return product_hopper(spec)
    if spec.role in COMPRESSED:
        from splatc.codegen.hopper.compressed.kernels import compressed_hopper

        return compressed_hopper(spec)
    if spec.role != FORWARD:
        if spec.kernel == "portable":
            from splatc.codegen.cuda_backward import gradients_cuda

            return gradients_cuda(spec)
        from splatc.codegen.hopper.backward.kernels import gradients_hopper

        return gradients_hopper(spec)
    if spec.kernel == "hopper":
        from splatc.codegen.hopper.forward import attention_hopper

        return attention_hopper(spec)
    from splatc.codegen.cuda import attention_cuda

    return attention_cuda(spec)


def source_of(emitted: Emitted, spec: KernelSpec) -> str:
    """The CUDA that a kernel is built from; some as written (docs/decisions/39-not-simplified.md)."""
    as_written = spec.kernel == "hopper" and spec.role in (FORWARD, ROWS) and not spec.gather
    return device_source(emitted, spec.target.arch, simplified=not as_written)


def device_source(emitted: Emitted, arch: str, simplified: bool = True) -> str:
    """The CUDA of a generated module, without a host side; needs neither a compiler nor a GPU."""
    import tvm

    from splatc.codegen.source_only import source_only

    target = tvm.target.Target({"kind": "cuda", "arch": arch}, host="cuda_host")
    with tvm.transform.PassContext(disabled_pass=[COMMON] if simplified else [COMMON, SIMPLIFY]), source_only():
        built = tvm.compile(emitted.module, target=target, tir_pipeline="tirx").mod
    return arrays_to_variables(built.imports[0].inspect_source())


def cuda_source(spec: KernelSpec) -> tuple[str, str]:
    """(scheduled TIRx, device CUDA) of a kernel; needs neither a compiler nor a GPU."""
    emitted = emit(spec)
    return emitted.module.script(), source_of(emitted, spec)
