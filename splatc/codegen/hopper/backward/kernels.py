"""The gradients: dq, dk, dv of o, lse = attention(q, k, v), for any mask.

    P = exp(S - LSE)    dP = dO V^T    delta = rowsum(dO * O) - dLSE    dS = P * (dP - delta) * slope of the softcap
    dQ = scale * dS K   dK = scale * dS^T Q   dV = P^T dO

The column kernel walks over the tables of the *transposed* mask: rows are keys, columns are queries. A block holds the
warpgroup of the producer and the sender, and two consumer warpgroups of 64 keys each, which keep their dK and dV in
registers. dQ of each tile is added to integers in global memory: that is as fast as adding floats and gives the same
bits each time (rows.py). What goes before and after: rows.py, combine.py. Tables and parameters: docs/architecture.md.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import tvm
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as I

from splatc.codegen.emitted import DeviceFunction, Emitted
from splatc.codegen.hopper.backward import combine, rows
from splatc.codegen.hopper.backward.block import Arguments, Block
from splatc.codegen.hopper.backward.consumer import Consumer
from splatc.codegen.hopper.backward.producer import Producer, Sender
from splatc.codegen.hopper.backward.shape import THREADS, Shape, shape_of
from splatc.codegen.hopper.emit import do, when
from splatc.codegen.kernel import KernelSpec

NAME = "splatc_gradient_columns"


def gradients_hopper(spec: KernelSpec) -> Emitted:
    """The functions of a spec with kernel "hopper" and role "backward", in the order of their launches, not lowered.

    Raises Unsupported if there is no kernel for it.
    """
    s = shape_of(spec)
    columns, smem_bytes = column_kernel(s)
    modules = {
        rows.BOUNDS: rows.find_bounds(s), rows.PREPARE: rows.prepare_rows(s), NAME: columns,
        combine.NAME: combine.combine_parts(s), rows.FINISH: rows.finish_rows(s),
    }  # fmt: skip
    functions = tuple(
        DeviceFunction(f"{name}_kernel", *((s.threads, smem_bytes) if name == NAME else (THREADS, 0)))
        for name in modules
    )
    return Emitted(tvm.IRModule(modules), functions)


def column_kernel(s: Shape):
    """(dK and dV of column tiles, and sums of dQ; bytes of dynamic shared memory)."""
    with IRBuilder() as builder:
        with I.prim_func():
            I.func_name(NAME)
            a = Arguments(s)
            I.device_entry()
            with I.attr({"tirx.launch_bounds_min_blocks_per_sm": 1}):
                block = Block(s, a)
                block.start()
                with I.If(T.EQ(block.warpgroup, 0)):
                    with I.Then():
                        do(T.ptx["setmaxnreg.dec.sync.aligned.u32"](s.registers[0]))
                        with when(T.EQ(block.warp, 0)), when(T.cuda.elect_sync()):
                            Producer(block).run()
                        with when(T.EQ(block.warp, 1)), when(T.cuda.elect_sync()):
                            Sender(block).run()
                    with I.Else():
                        Consumer(block).run()
    return builder.get().with_attr("global_symbol", NAME), block.smem_bytes
