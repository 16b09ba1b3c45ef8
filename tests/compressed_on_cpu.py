"""Run the generated kernels of compressed scores on the CPU, as the GPU of tests/fake_gpu.py."""

from __future__ import annotations

import ctypes
import re
from functools import cache
from pathlib import Path
from typing import Any

from splatc.codegen.build import device_source, emit
from splatc.codegen.emitted import parse_signatures
from splatc.codegen.kernel import KernelSpec
from splatc.runtime.arguments import Function
from splatc.runtime.compressed_gpu import CompressedKernels
from splatc.runtime.gpu import Gpu
from tests.cuda_on_cpu import load_cpp
from tests.fake_gpu import FakeDriver, FakeTorch, TensorMap, fake_gpu
from tests.test_hopper_pruning import INTRINSICS, without_assembly

HEADER = Path(__file__).with_name("compressed_on_cpu.h")
PRODUCT = re.compile(r"void (splatc_wgmma_m64n(\d+)k\d+_f32_(\w+?)_\w+?_x(\d+)(\w*))\(([^)]*)\)")
OWN = re.compile(
    r"__forceinline__ __device__ void ((?:splatc_(?:select|exchange|finish)|tvm_builtin_ptx_cvt)\w*)\(.*?\}$",
    re.DOTALL | re.MULTILINE,
)
TYPES: dict[str, Any] = {"f16": "half", "bf16": "nv_bfloat16", "pointer": ctypes.c_void_p, "int32": ctypes.c_int32,
                         "float32": ctypes.c_float}  # fmt: skip


class Map(ctypes.Structure):
    """A CUtensorMap of compressed_on_cpu.h."""

    _fields_ = (("base", ctypes.c_void_p), *((name, ctypes.c_int64 * 5) for name in ("dims", "strides", "box")))


class Emulated(CompressedKernels):
    """The kernels on tensors in this computer's memory."""

    def __init__(self) -> None:
        self.driver = FakeDriver({}, {})
        super().__init__(fake_gpu(self.driver, FakeTorch()), self._make)

    def _make(self, spec: KernelSpec, on: Gpu) -> tuple[Function, ...]:
        made = []
        for name, parameters, run in compiled(spec):
            unique = f"{spec.name} {name}"
            self.driver.kernels[unique], self.driver.parameters[unique] = run, parameters
            made.append(Function(unique, self.driver.kernel(0, unique, 0, 0), 0, 0, tuple(parameters)))
        return tuple(made)


@cache
def compiled(spec: KernelSpec) -> list[tuple[str, list[tuple[str, str]], Any]]:
    """(name, parameters, launch) of each function of a kernel."""
    emitted = emit(spec)
    source = device_source(emitted, "sm_90a")
    library = load_cpp(cpp(source))
    signatures = {one.name: list(one.parameters) for one in parse_signatures(source)}
    return [(one.name, signatures[one.name], launcher(library, one.name, signatures[one.name]))
            for one in emitted.functions]  # fmt: skip


def launcher(library: ctypes.CDLL, name: str, parameters: list[tuple[str, str]]) -> Any:
    """What runs a grid of a function, given its arguments by name."""

    def run(grid: tuple[int, int, int], **given: Any) -> None:
        values = [as_map(given[name]) if kind == "map" else TYPES[kind](given[name]) for kind, name in parameters]
        getattr(library, f"launch_{name}")(ctypes.c_int(grid[0]), *values)

    return run


def as_map(one: TensorMap) -> Map:
    five = ctypes.c_int64 * 5
    return Map(one.address, five(*one.dims), five(0, *one.strides), five(*one.box))


def cpp(source: str) -> str:
    """C++ of generated CUDA: its kernels, their own device functions and the matrix products that they use, and for
    each kernel a function that runs a grid."""
    own = dict.fromkeys(match[0] for match in OWN.finditer(source))
    out = [f'#include "{HEADER}"', INTRINSICS, without_assembly("\n".join(own))]
    for name, n, kind, steps, features, parameters in dict.fromkeys(PRODUCT.findall(source)):
        names = [one.split()[-1].lstrip("&") for one in parameters.split(",")]
        d, a, b, e = (", ".join("&" * (letter == "d") + x for x in names if x[0] == letter) for letter in "dabe")
        flags = ", ".join(str(int(word in features)) for word in ("sparse", "b_transposed", "fresh"))
        out.append(
            f"void {name}({parameters}) {{\n  float* d_[] = {{{d}}};\n  uint64_t a_[] = {{{a}}}, b_[] = {{{b}}};\n"
            f"  uint32_t e_[] = {{{e or 0}}};\n  wgmma<{TYPES[kind]}>(d_, {n}, a_, b_, e_, {steps}, {flags});\n}}"
        )
    for text in re.findall(r'extern "C" __global__ [^;{]*\{.*?\n\}\n', source, re.DOTALL):
        ((name, inside),) = re.findall(r"(splatc_\w+_kernel)\(([^)]*)\)", text)
        (threads,) = re.findall(r"__launch_bounds__\((\d+)", text)
        declared = re.sub("const __grid_constant__ |__restrict__", "", inside)
        given = ", ".join(one.split()[-1] for one in declared.split(","))
        out.append(f'{text}\nextern "C" void launch_{name}(int grid, {declared}) {{\n'
                   f"  run_grid(grid, {threads}, [=] {{ {name}({given}); }});\n}}")  # fmt: skip
    return "\n".join(out)
