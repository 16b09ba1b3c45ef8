"""The modules of the three kernels."""

from __future__ import annotations

import tvm
from tvm.tirx.script.builder import ir as I

from splatc.codegen.emitted import DeviceFunction, Emitted
from splatc.codegen.hopper.compressed.sddmm import Sddmm
from splatc.codegen.hopper.compressed.sizes import sizes_of
from splatc.codegen.hopper.compressed.softmax import softmax
from splatc.codegen.hopper.compressed.spmm import Spmm
from splatc.codegen.hopper.emit import kernel_function
from splatc.codegen.kernel import (
    COMPRESSED_SDDMM,
    COMPRESSED_SOFTMAX,
    SOFTMAX_LANES,
    SOFTMAX_THREADS,
    KernelSpec,
)


def compressed_hopper(spec: KernelSpec) -> Emitted:
    """The kernel of one of COMPRESSED, not lowered. Raises Unsupported for what it is not made for."""
    if spec.role == COMPRESSED_SOFTMAX:
        made = [(softmax(spec.dtype, *one), SOFTMAX_THREADS, 0) for one in SOFTMAX_LANES]
    else:
        s = sizes_of(spec)
        kernel_of = Sddmm if spec.role == COMPRESSED_SDDMM else Spmm
        with kernel_function(kernel_of.name) as function:
            kernel = kernel_of(s)
            I.device_entry()
            smem_bytes = kernel.run()
        made = [(function(), s.threads, smem_bytes)]
    named = [(str(function.attrs["global_symbol"]), function, threads, smem) for function, threads, smem in made]
    functions = tuple(DeviceFunction(f"{name}_kernel", threads, smem) for name, _, threads, smem in named)
    return Emitted(tvm.IRModule({name: function for name, function, *_ in named}), functions)
