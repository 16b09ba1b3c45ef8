"""The kernel for column tiles that were cut into parts: their sum, from scratch memory, into dK and dV.

A row is a warp's work, and parts are added in their order. With ``merge`` what an earlier pass left in place is one
more.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from tvm.script import tirx as T

from splatc.codegen.constants import ceil_div
from splatc.codegen.hopper.backward.rows import Rows, ints, kernel
from splatc.codegen.hopper.backward.shape import KEYS, WARPS, Shape
from splatc.codegen.hopper.combine import array, wide
from splatc.codegen.hopper.emit import Expr, let, loop, registers, store, when

NAME = "splatc_gradient_combine"


def combine_parts(s: Shape):
    """The function, not lowered; a grid of (column tiles * KEYS / WARPS) blocks.

    combine: int32 (tiles, 8) batch, key head, item, first scratch tile, parts, 0, 0, 0. positions: of each item's keys.
    """

    def declare() -> dict[str, Expr]:
        tensors = {name: Rows(name, s.dtype, dim) for name, dim in (("dk", s.d), ("dv", s.dv))}
        parts = {name: array(name, s.dtype) for name in ("part_k", "part_v")}
        tables = {"combine": array("combine", "int32", 8), "positions": array("positions", "int32", KEYS)}
        return {**tensors, **parts, **tables, **ints("merge")}

    def body(block, thread, dk, dv, part_k, part_v, combine, positions, merge):
        lane = let("lane", thread % 32)
        tile = let("tile", T.truncdiv(block, KEYS // WARPS))
        row = let("row", T.truncmod(block, KEYS // WARPS) * WARPS + thread // 32)
        batch, head, item, first, parts = (
            let(name, combine[tile, i])
            for i, name in enumerate(("batch", "head", "item", "first", "parts")))  # fmt: skip
        position = let("position", positions[item, row])
        with when(position >= 0):
            for out, scratch in ((dk, part_k), (dv, part_v)):
                add_parts(out, scratch, (batch, head, position), wide(first) * KEYS + wide(row), parts, lane, merge)

    return kernel(NAME, declare, body)


def add_parts(out: Rows, scratch: Expr, at: tuple[Expr, Expr, Expr], row: Expr, parts: Expr, lane: Expr,
              merge: Expr) -> None:  # fmt: skip
    """A row of ``out`` = the sum of its parts, rows of scratch memory KEYS apart from ``row`` on."""
    columns = ceil_div(out.dim, 32)
    sums = registers("sums", columns)
    for c in range(columns):
        store(sums, c, T.float32(0.0))
        with when(T.And(merge != 0, c * 32 + lane < out.dim)):
            store(sums, c, T.cast(out.element(*at, c * 32 + lane), "float32"))
    with loop(parts) as p:
        first = let("at_part", (row + wide(p) * KEYS) * out.dim)
        for c in range(columns):
            with when(c * 32 + lane < out.dim):
                store(sums, c, sums[c] + T.cast(scratch[first + wide(c * 32 + lane)], "float32"))
    for c in range(columns):
        with when(c * 32 + lane < out.dim):
            out.write(*at, c * 32 + lane, sums[c])
