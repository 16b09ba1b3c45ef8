"""The modules of the three kernels, a function for each way they are used."""

from __future__ import annotations

import tvm

from splatc.codegen.emitted import DeviceFunction, Emitted
from splatc.codegen.hopper.unfused.sddmm import sddmm
from splatc.codegen.hopper.unfused.softmax import softmax, softmax_backward
from splatc.codegen.hopper.unfused.spmm import spmm, spmm_transposed
from splatc.codegen.kernel import SDDMM, SOFTMAX, SPMM, KernelSpec


def product_hopper(spec: KernelSpec) -> Emitted:
    """The kernel of one of PRODUCTS, not lowered. Raises Unsupported for what it is not made for."""
    emitters = {SDDMM: (sddmm,), SPMM: (spmm, spmm_transposed), SOFTMAX: (softmax, softmax_backward)}[spec.role]
    functions = [one(spec) for one in emitters]
    names = [str(function.attrs["global_symbol"]) for function, *_ in functions]
    module = tvm.IRModule(dict(zip(names, (function for function, *_ in functions), strict=True)))
    return Emitted(module, tuple(DeviceFunction(f"{name}_kernel", threads, smem)
                                 for name, (_, threads, smem) in zip(names, functions, strict=True)))  # fmt: skip
