"""N:M pruning in CPU kernels: which scores of a tile stay. Tiles hold whole groups of keys (ir/verify.py).

A score stays if fewer than n of its group beat it: an earlier key by a score that is no less, a later one by a greater
one. That needs no sort, and is the same where keys are columns of a tile (a vector each) and where they are its rows
(the lanes of a vector).
"""

from __future__ import annotations

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as I

from splatc.codegen.constants import NEG_INF
from splatc.codegen.cpu_tile import Shape
from splatc.codegen.cpu_vector import Expr, constant, load, store

INF = float("inf")


def kept_of(s: Shape, row_pos: Expr, keys_are_rows: bool = False) -> Kept | None:
    """What keeps the scores of a worker's tiles; None where nothing is pruned."""
    return None if s.score.pruning is None else Kept(s, row_pos, keys_are_rows)


class Kept:
    """Which elements of the last tile stayed, 1 or 0; element (j, i) at j * m + i. Takes the place of Bits."""

    def __init__(self, s: Shape, row_pos: Expr, keys_are_rows: bool) -> None:
        """row_pos: positions of the rows of a tile, -1 if invalid."""
        assert s.score.pruning is not None
        self.s, self.n, self.m = s, s.score.pruning.n, s.score.pruning.m
        self.row_pos, self.keys_are_rows = row_pos, keys_are_rows
        self.table = s.scratch(s.n * s.m)
        self.line = s.scratch(s.width + 2 * s.lanes) if keys_are_rows else None

    def on(self, s: Shape, j: Expr, i: Expr) -> Expr:
        """Lane mask: did the elements of row lanes i, i + 1, ... and column lane j stay?"""
        return load(self.table, j * s.m + i, s.lanes) > s.constant(0.0)

    def emit(self, scores: Expr, block: Expr) -> None:
        """Prune the scores (column, row of the block) of a block in place: -inf for what goes. Those that are off are
        -inf already."""
        if self.keys_are_rows:
            with I.serial(0, self.s.n) as j:
                self._emit_row_groups(scores, block, j)
        else:
            with I.serial(0, self.s.n // self.m) as group, I.serial(0, self.s.vecs) as v:
                self._emit_column_group(scores, block, group * self.m, v)

    def _emit_column_group(self, scores: Expr, block: Expr, j0: Expr, v: Expr) -> None:
        s = self.s
        values = [I.Bind(load(scores, (j0 + r) * s.width + v * s.lanes, s.lanes)) for r in range(self.m)]
        ranks = [I.Bind(_rank(x, s)) for x in values]
        for r, mine in enumerate(ranks):
            beaten = s.constant(0.0)
            for other, rank in enumerate(ranks):
                if other != r:
                    beaten = beaten + self._one_if(rank >= mine if other < r else rank > mine)
            self._emit_store(scores, block, j0 + r, v, values[r], mine, I.Bind(beaten))

    def _emit_row_groups(self, scores: Expr, block: Expr, j: Expr) -> None:
        """Of one column: neighbours are lanes, read at an offset from a line with room at both ends."""
        s = self.s
        with I.serial(0, s.vecs) as v:
            at = v * s.lanes
            there = load(self.row_pos, block * s.width + at, s.lanes) >= constant(0, s.lanes, "int32")
            x = T.Select(there, load(scores, j * s.width + at, s.lanes), s.constant(NEG_INF))
            store(self.line, s.lanes + at, _rank(I.Bind(x), s), s.lanes)
        with I.serial(0, s.vecs) as v:
            at = v * s.lanes
            mine = I.Bind(load(self.line, s.lanes + at, s.lanes))
            first = at if s.lanes % self.m else T.int32(0)
            place = I.Bind(T.truncmod(T.Ramp(first, T.int32(1), s.lanes), constant(self.m, s.lanes, "int32")))
            beaten = s.constant(0.0)
            for away in (*range(1 - self.m, 0), *range(1, self.m)):
                rank = load(self.line, s.lanes + at + away, s.lanes)
                lost = self._one_if(rank >= mine if away < 0 else rank > mine)
                limit = constant(-away if away < 0 else self.m - away, s.lanes, "int32")
                inside = place >= limit if away < 0 else place < limit
                beaten = beaten + T.Select(inside, lost, s.constant(0.0))
            self._emit_store(scores, block, j, v, load(scores, j * s.width + at, s.lanes), mine, I.Bind(beaten))

    def _emit_store(self, scores: Expr, block: Expr, j: Expr, v: Expr, value: Expr, rank: Expr, beaten: Expr) -> None:
        s = self.s
        some = T.Select(rank > s.constant(NEG_INF), s.constant(1.0), s.constant(0.0))
        kept = I.Bind(T.Select(beaten < s.constant(self.n), some, s.constant(0.0)))
        store(self.table, j * s.m + block * s.width + v * s.lanes, kept, s.lanes)
        pruned = T.Select(kept > s.constant(0.0), value, s.constant(NEG_INF))
        store(scores, j * s.width + v * s.lanes, pruned, s.lanes)

    def _one_if(self, condition: Expr) -> Expr:
        return T.Select(condition, self.s.constant(1.0), self.s.constant(0.0))


def _rank(score: Expr, s: Shape) -> Expr:
    """What scores are compared by: NaN is the largest (min(a, b) is a < b ? a : b)."""
    return T.min(score, s.constant(INF))
