"""The modules of the three kernels, a function for each way they are used."""

from __future__ import annotations

import tvm

from splatc.codegen.emitted import DeviceFunction, Emitted
from splatc.codegen.hopper.unfused import softmax as rows
from splatc.codegen.hopper.unfused.sddmm import sddmm
from splatc.codegen.hopper.unfused.spmm import spmm, spmm_transposed
from splatc.codegen.hopper.unfused.tiles import THREADS
from splatc.codegen.kernel import SDDMM, SOFTMAX, SPMM, KernelSpec


def product_hopper(spec: KernelSpec) -> Emitted:
    """The kernel of one of PRODUCTS, not lowered. Raises Unsupported for what it is not made for."""
    if spec.role == SOFTMAX:
        functions = [(one(spec), rows.THREADS, 0) for one in (rows.softmax, rows.softmax_backward)]
    else:
        emitters = {SDDMM: (sddmm,), SPMM: (spmm, spmm_transposed)}[spec.role]
        functions = [(function, THREADS, smem) for function, smem in (one(spec) for one in emitters)]
    names = [str(function.attrs["global_symbol"]) for function, *_ in functions]
    module = tvm.IRModule(dict(zip(names, (function for function, *_ in functions), strict=True)))
    return Emitted(module, tuple(DeviceFunction(f"{name}_kernel", threads, smem)
                                 for name, (_, threads, smem) in zip(names, functions, strict=True)))  # fmt: skip
