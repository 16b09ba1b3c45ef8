"""The kernel for tiles of keys or queries that were cut into parts: their sum, from scratch memory, into dK, dV or dQ.

A row is a warp's work, and parts are added in their order. With ``merge`` what an earlier pass left in place is one
more.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Mapping

from tvm.script import tirx as T

from splatc.codegen.constants import ceil_div
from splatc.codegen.hopper.backward.rows import Rows, ints, kernel
from splatc.codegen.hopper.backward.shape import WARPS
from splatc.codegen.hopper.combine import RESIDENT, array, wide
from splatc.codegen.hopper.emit import Expr, let, loop, registers, store, when

NAME = "splatc_gradient_combine"


def combine_parts(dtype: str, dims: Mapping[str, int], height: int):
    """The function, not lowered; a grid of (tiles * height / WARPS) blocks. dims: of the results, such as "dk";
    height: of a tile.

    combine: int32 (tiles, 8) batch, head, item, first scratch tile, parts, 0, 0, 0. positions: of each item's rows.
    """

    def declare() -> dict[str, Expr]:
        tensors = {name: Rows(name, dtype, dim) for name, dim in dims.items()}
        parts = {name: array(name, dtype) for name in (f"part_{name[1:]}" for name in dims)}
        tables = {"combine": array("combine", "int32", 8), "positions": array("positions", "int32", height)}
        return {**tensors, **parts, **tables, **ints("merge")}

    def body(block, thread, combine, positions, merge, **tensors):
        lane = let("lane", thread % 32)
        tile = let("tile", T.truncdiv(block, height // WARPS))
        row = let("row", T.truncmod(block, height // WARPS) * WARPS + thread // 32)
        batch, head, item, first, parts = (
            let(name, combine[tile, i])
            for i, name in enumerate(("batch", "head", "item", "first", "parts")))  # fmt: skip
        position = let("position", positions[item, row])
        with when(position >= 0):
            for name in dims:
                first_row = wide(first) * height + wide(row)
                rows = first_row, height
                add_parts(tensors[name], tensors[f"part_{name[1:]}"], (batch, head, position), rows, parts, lane,
                          merge)  # fmt: skip

    return kernel(NAME, declare, body, RESIDENT)


def add_parts(out: Rows, scratch: Expr, at: tuple[Expr, Expr, Expr], rows: tuple[Expr, int], parts: Expr,
              lane: Expr, merge: Expr) -> None:  # fmt: skip
    """A row of ``out`` = the sum of its parts, rows of scratch memory: (the first one, how far they are apart)."""
    columns = ceil_div(out.dim, 32)
    sums = registers("sums", columns)
    for c in range(columns):
        store(sums, c, T.float32(0.0))
        with when(T.And(merge != 0, c * 32 + lane < out.dim)):
            store(sums, c, T.cast(out.element(*at, c * 32 + lane), "float32"))
    with loop(parts) as p:
        first = let("at_part", (rows[0] + wide(p) * rows[1]) * out.dim)
        for c in range(columns):
            with when(c * 32 + lane < out.dim):
                store(sums, c, sums[c] + T.cast(scratch[first + wide(c * 32 + lane)], "float32"))
    for c in range(columns):
        with when(c * 32 + lane < out.dim):
            out.write(*at, c * 32 + lane, sums[c])
