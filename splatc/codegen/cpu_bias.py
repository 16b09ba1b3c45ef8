"""The gradients of biases in CPU kernels: sums of the gradients of scores by position.

Slopes have one sum a row; a table has a copy for each worker, into which its lanes are added one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as I

from splatc.codegen.cpu_pack import At, emit_fill
from splatc.codegen.cpu_score import TermEmitter
from splatc.codegen.cpu_tile import Shape
from splatc.codegen.cpu_vector import Expr, load, scratch, store
from splatc.codegen.cpu_walk import match_array
from splatc.ir.score import Alibi, BlockBias, RelativeBias


@dataclass(frozen=True)
class BiasGradients:
    """Arguments, None where the Score does not ask.

    slopes: of each row (batch, heads, q_len), in the type of computations. relative, block: float64 (workers, heads,
    numbers of the table), zero before the first launch.
    """

    slopes: Expr
    relative: Expr
    block: Expr


def match_bias_gradients(s: Shape, rows: tuple[Expr, ...]) -> BiasGradients:
    """Declare them, after all other arguments."""

    def table(name: str, there: bool) -> Expr:
        return match_array(name, (I.int32(), I.int32(), I.int32()), "float64") if there else None

    return BiasGradients(
        slopes=match_array("dslopes", rows, s.acc) if s.score.has(Alibi) else None,
        relative=table("drelative", s.score.has(RelativeBias)),
        block=table("dblock", s.score.has(BlockBias)),
    )


class BiasSums:
    """A worker's sums; lanes are queries."""

    def __init__(self, s: Shape, outputs: BiasGradients, terms: TermEmitter, worker: Expr) -> None:
        self.s, self.outputs, self.terms, self.worker = s, outputs, terms, worker
        self.ds = s.scratch(s.n * s.width)  # of one block, 0 where there is no query
        self.slopes = s.scratch(s.m) if outputs.slopes is not None else None
        self.places = scratch(s.width, "int32")

    def emit_begin(self) -> None:
        """For an item."""
        if self.slopes is not None:
            emit_fill(self.slopes, self.s.m, 0.0, self.s)

    def emit_store(self, at: Expr, row: Expr, ds: Expr) -> None:
        """Keep the gradients of scores of the rows from ``row`` on."""
        there = load(self.terms.rows.pos, row, self.s.lanes) >= T.Broadcast(T.int32(0), self.s.lanes)
        store(self.ds, at, T.Select(there, ds, self.s.constant(0.0)), self.s.lanes)

    def emit_add(self, block: Expr) -> None:
        """Sum what was kept of a block of rows."""
        if self.slopes is not None:
            self._add_to_slopes(block)
        if self.outputs.relative is not None:
            self._add_to_table(self.outputs.relative, self.terms.emit_offset, block)
        if self.outputs.block is not None:
            self._add_to_table(self.outputs.block, self.terms.emit_block, block)

    def emit_end(self, at: At, merge: Expr) -> None:
        """The sums of slopes of an item's rows, added to what is there with merge."""
        if self.slopes is None:
            return
        with I.serial(0, self.s.m) as i:
            p = I.Bind(self.terms.rows.pos[i])
            with I.If(p >= 0), I.Then():
                before = T.if_then_else(T.NE(merge, 0), self.outputs.slopes[at[0], at[1], p], self.s.scalar(0.0))
                I.buffer_store(self.outputs.slopes, before - self.slopes[i], [at[0], at[1], p])

    def _add_to_slopes(self, block: Expr) -> None:
        s = self.s
        rows = [block * s.width + v * s.lanes for v in range(s.vecs)]
        sums = [s.register(load(self.slopes, row, s.lanes)) for row in rows]
        with I.serial(0, s.n) as j:
            for v, (total, row) in enumerate(zip(sums, rows, strict=True)):
                ds = load(self.ds, j * s.width + v * s.lanes, s.lanes)
                total.set(total.get() + ds * self.terms.emit_distance(j, row))
        for total, row in zip(sums, rows, strict=True):
            store(self.slopes, row, total.get(), s.lanes)

    def _add_to_table(self, table: Expr, emit_place: Callable[[Expr, Expr], Expr], block: Expr) -> None:
        s = self.s
        with I.serial(0, s.n) as j:
            for v in range(s.vecs):
                store(self.places, v * s.lanes, emit_place(j, block * s.width + v * s.lanes), s.lanes)
            with I.serial(0, s.width) as i:
                where = [self.worker, self.terms.head, I.Bind(self.places[i])]
                I.buffer_store(table, table[tuple(where)] + T.cast(self.ds[j * s.width + i], "float64"), where)
