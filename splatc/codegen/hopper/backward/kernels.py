"""The gradients: dq, dk, dv of o, lse = attention(q, k, v), for any mask.

    P = exp(S - LSE)    dP = dO V^T    delta = rowsum(dO * O) - dLSE    dS = P * (dP - delta) * slope of the softcap
    dQ = scale * dS K   dK = scale * dS^T Q   dV = P^T dO

The column kernel walks over the tables of the *transposed* mask: rows are keys, columns are queries. A block holds the
warpgroup of the producer and the sender, and one or two consumer warpgroups of 64 keys each, which keep their dK and dV
in registers. With the role "backward" dQ of each tile is added to integers in global memory: that is as fast as adding
floats and gives the same bits each time (rows.py). Else the row kernel (queries.py) computes dQ before. What goes
before and after: rows.py, combine.py. Tables and parameters: docs/architecture.md.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Any

import tvm
from tvm.script import tirx as T

from splatc.codegen.emitted import DeviceFunction, Emitted
from splatc.codegen.hopper.backward import combine, queries, rows
from splatc.codegen.hopper.backward.block import Arguments, Block
from splatc.codegen.hopper.backward.consumer import consumer_of
from splatc.codegen.hopper.backward.producer import Producer, Sender
from splatc.codegen.hopper.backward.shape import THREADS, Shape, row_shape_of, shape_of
from splatc.codegen.hopper.emit import when
from splatc.codegen.hopper.walk import walking_kernel
from splatc.codegen.kernel import ROWS, KernelSpec

NAME = "splatc_gradient_columns"


def gradients_hopper(spec: KernelSpec) -> Emitted:
    """The functions of a spec with kernel "hopper" and one of the roles of gradients, in the order of their launches,
    not lowered.

    Raises Unsupported if there is no kernel for it.
    """
    if spec.role == ROWS:
        r = row_shape_of(spec)
        kernel, smem_bytes = queries.row_kernel(r)
        modules = {rows.PREPARE: rows.prepare_statistics(r), queries.NAME: kernel,
                   combine.NAME: combine.combine_parts(r.dtype, {"dq": r.d}, r.m)}  # fmt: skip
        return emitted(modules, queries.NAME, r.threads, smem_bytes)
    s = shape_of(spec)
    kernel, smem_bytes = column_kernel(s)
    modules = {NAME: kernel, combine.NAME: combine.combine_parts(s.dtype, s.ends, s.keys)}
    if s.makes("dq"):
        before = {rows.BOUNDS: rows.find_bounds(s), rows.PREPARE: rows.prepare_rows(s)}
        modules = {**before, **modules, rows.FINISH: rows.finish_rows(s)}
    return emitted(modules, NAME, s.threads, smem_bytes)


def emitted(modules: dict[str, Any], walk: str, threads: int, smem_bytes: int) -> Emitted:
    """Functions by name, of which ``walk`` has so many threads and so much shared memory."""
    functions = tuple(
        DeviceFunction(f"{name}_kernel", *((threads, smem_bytes) if name == walk else (THREADS, 0)))
        for name in modules
    )
    return Emitted(tvm.IRModule(modules), functions)


def column_kernel(s: Shape):
    """(dK and dV of column tiles, and sums of dQ; bytes of dynamic shared memory)."""

    def produce(block: Block) -> None:
        with when(T.EQ(block.warp, 0)), when(T.cuda.elect_sync()):
            Producer(block).run()
        if s.makes("dq"):
            with when(T.EQ(block.warp, 1)), when(T.cuda.elect_sync()):
                Sender(block).run()

    return walking_kernel(NAME, s, Arguments, Block, produce, lambda block: consumer_of(block).run())
