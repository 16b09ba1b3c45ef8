"""Run the generated kernels of sddmm, softmax and spmm for Hopper on the CPU, as the GPU of tests/fake_gpu.py."""

from __future__ import annotations

import ctypes
import re
import subprocess
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from splatc.codegen.build import device_source, emit
from splatc.codegen.emitted import parse_signatures
from splatc.codegen.kernel import KernelSpec
from splatc.runtime.arguments import Function
from splatc.runtime.gpu import Gpu
from splatc.runtime.products_gpu import GpuProducts
from tests.fake_gpu import FakeDriver, FakeTorch, fake_gpu

HEADER = Path(__file__).with_name("warpgroup_on_cpu.h")
PRODUCT = re.compile(r"void (splatc_wgmma_m64n(\d+)k16_f32_(\w+?)_\w+?_x(\d+)(\w*))\(([^)]*)\)")
TYPES = {"pointer": ctypes.c_void_p, **{f"int{n}": getattr(ctypes, f"c_int{n}") for n in (32, 64)},
         "float32": ctypes.c_float}  # fmt: skip
NAMES = {"f16": "half", "bf16": "nv_bfloat16"}


class EmulatedProducts(GpuProducts):
    """The kernels on tensors in this computer's memory."""

    def __init__(self) -> None:
        self.driver = FakeDriver({}, {})
        super().__init__(fake_gpu(self.driver, FakeTorch()), self._functions_of)

    def _functions_of(self, spec: KernelSpec, on: Gpu) -> tuple[Function, ...]:
        functions = []
        for name, threads, smem, parameters, run in _compiled(spec):
            self.driver.kernels[name], self.driver.parameters[name] = run, parameters
            functions.append(Function(name, self.driver.kernel(0, name, 0, smem), threads, smem, tuple(parameters)))
        return tuple(functions)


@cache
def _compiled(spec: KernelSpec) -> list[tuple[str, int, int, list[tuple[str, str]], Any]]:
    emitted = emit(spec)
    source = device_source(emitted, "sm_90a")
    signatures = {one.name: one for one in parse_signatures(source)}
    folder = Path(mkdtemp(prefix="splatc-emulated-"))
    (folder / "kernel.cpp").write_text(cpp(source))
    command = ["g++", "-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-pthread", "kernel.cpp", "-o", "kernel.so"]
    subprocess.run(command, check=True, cwd=folder)
    library = ctypes.CDLL(str(folder / "kernel.so"))
    out = []
    for one in emitted.functions:
        parameters = list(signatures[one.name].parameters)
        out.append((one.name, one.threads, one.smem_bytes, parameters, _launcher(library, one.name, parameters)))
    return out


def _launcher(library: ctypes.CDLL, name: str, parameters: list[tuple[str, str]]) -> Any:
    def run(grid: tuple[int, int, int], **arguments: Any) -> None:
        values = [TYPES[kind](arguments[parameter]) for kind, parameter in parameters]
        getattr(library, f"launch_{name}")(ctypes.c_int(grid[0]), *values)

    return run


def cpp(source: str) -> str:
    """C++ of generated CUDA: its kernels, the matrix products that they use, and for each kernel a function that runs
    a grid."""
    out = [f'#include "{HEADER}"', "#define _ptr pool_buf_ptr", "#define uint unsigned int",
           "#define uchar unsigned char", "#define ushort unsigned short"]  # fmt: skip
    for name, n, kind, steps, features, parameters in dict.fromkeys(PRODUCT.findall(source)):
        names = [one.split()[-1] for one in parameters.split(",")]
        d, a, b = ([x for x in names if x[0] == letter] for letter in "dab")
        a_type = "uint32_t" if "a_registers" in features else "uint64_t"
        out.append(
            f"void {name}({parameters}) {{\n  float* d_[] = {{{', '.join('&' + x for x in d)}}};\n"
            f"  {a_type} a_[] = {{{', '.join(a)}}};\n  uint64_t b_[] = {{{', '.join(b)}}};\n"
            f"  wgmma<{NAMES[kind]}>(d_, {n}, a_, b_, {steps}, {int('b_transposed' in features)}, "
            f"{int('fresh' in features)});\n}}"
        )
    definitions = re.findall(r'extern "C" __global__ [^;{]*\{.*?\n\}\n', source, re.DOTALL)
    for text in definitions:
        ((name, inside),) = re.findall(r"(splatc_\w+_kernel)\(([^)]*)\)", text)
        declared = inside.replace("__restrict__", "")
        given = ", ".join(one.split()[-1] for one in declared.split(","))
        (threads,) = re.findall(r"__launch_bounds__\((\d+)", text)
        out.append(f'{text}\nextern "C" void launch_{name}(int grid, {declared}) {{\n'
                   f"  run_grid(grid, {threads}, [=] {{ {name}({given}); }});\n}}")  # fmt: skip
    return "\n".join(out)
