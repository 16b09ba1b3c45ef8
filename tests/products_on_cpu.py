"""Run the generated kernels of sddmm, softmax and spmm for Hopper on the CPU, as the GPU of tests/fake_gpu.py."""

from __future__ import annotations

import ctypes
import re
from functools import cache
from pathlib import Path
from typing import Any

from splatc.codegen.build import device_source, emit
from splatc.codegen.emitted import parse_signatures
from splatc.codegen.kernel import PRODUCTS, SOFTMAX, KernelSpec, product_spec
from splatc.runtime.arguments import Function
from splatc.runtime.gpu import Gpu
from splatc.runtime.products_gpu import GpuProducts
from tests.cuda_on_cpu import load_cpp
from tests.fake_gpu import FakeDriver, FakeTorch, fake_gpu

HEADER = Path(__file__).with_name("warpgroup_on_cpu.h")
PRODUCT = re.compile(r"void (splatc_wgmma_m64n(\d+)k\d+_f32_(\w+?)_\w+?_x(\d+)(\w*))\(([^)]*)\)")
KERNEL = re.compile(r'extern "C" __global__ void __launch_bounds__\((\d+)[^)]*\) (\w+)\(([^)]*)\) \{.*?\n\}\n',
                    re.DOTALL)  # fmt: skip
TYPES = {"pointer": ctypes.c_void_p, "int32": ctypes.c_int32, "int64": ctypes.c_int64, "float32": ctypes.c_float}
KINDS = {"f16": "half", "bf16": "nv_bfloat16", "tf32": "tf32"}


class EmulatedProducts(GpuProducts):
    """The kernels for one head dim and dtype, on tensors in this computer's memory."""

    def __init__(self, dim: int, dtype: str) -> None:
        self._dim, self._dtype = dim, dtype
        self.driver = FakeDriver({}, {})
        super().__init__(fake_gpu(self.driver, FakeTorch()), self._functions_of)

    def _functions_of(self, spec: KernelSpec, on: Gpu) -> tuple[Function, ...]:
        library, signatures = _compiled(self._dim, self._dtype, spec.target)
        functions = []
        for one in emit_once(spec).functions:
            parameters = signatures[one.name]
            self.driver.kernels[one.name] = launcher(getattr(library, f"launch_{one.name}"), parameters)
            self.driver.parameters[one.name] = list(parameters)
            handle = self.driver.kernel(0, one.name, 0, one.smem_bytes)
            functions.append(Function(one.name, handle, one.threads, one.smem_bytes, parameters))
        return tuple(functions)


emit_once = cache(emit)


@cache
def _compiled(dim: int, dtype: str, target: Any) -> tuple[ctypes.CDLL, dict[str, tuple[tuple[str, str], ...]]]:
    """All kernels in one library, and their parameters."""
    specs = [product_spec(role, 1 if role == SOFTMAX else dim, dtype, target) for role in PRODUCTS]
    sources = [device_source(emit_once(spec), target.arch) for spec in specs]
    signatures = {one.name: one.parameters for source in sources for one in parse_signatures(source)}
    return load_cpp(cpp("\n".join(sources))), signatures


def launcher(entry: Any, parameters: tuple[tuple[str, str], ...]) -> Any:
    """What runs a grid of a kernel, given its arguments by name."""

    def run(grid: tuple[int, int, int], **arguments: Any) -> None:
        entry(ctypes.c_int(grid[0]), *(TYPES[kind](arguments[name]) for kind, name in parameters))

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
            f"  wgmma<{KINDS[kind]}>(d_, {n}, a_, b_, {steps}, {int('b_transposed' in features)}, "
            f"{int('fresh' in features)});\n}}"
        )
    for match in KERNEL.finditer(source):
        threads, name, declared = match[1], match[2], match[3].replace("__restrict__", "")
        given = ", ".join(one.split()[-1] for one in declared.split(","))
        out.append(f'{match[0]}\nextern "C" void launch_{name}(int grid, {declared}) {{\n'
                   f"  run_grid(grid, {threads}, [=] {{ {name}({given}); }});\n}}")  # fmt: skip
    return "\n".join(out)
