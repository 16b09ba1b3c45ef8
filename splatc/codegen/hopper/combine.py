"""The second kernel of a split plan: partial results of one row tile, from scratch memory, into one.

A row is a warp's work: O = sum of w_p O_p with w_p = exp(LSE_p - LSE), in a fixed order. With ``merge`` what an earlier
pass left in place is one more part; else the head's sink is one, without O. There may be dozens of parts: lanes read an
LSE each, and rows of O are fetched some at a time, so that few loads wait for others.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as I

from splatc.codegen.constants import LOG2E, NEG_INF, ceil_div
from splatc.codegen.hopper.emit import (
    Cell,
    Expr,
    do,
    follow_kernels_before,
    kernel_function,
    let,
    loop,
    named,
    registers,
    store,
    when,
)
from splatc.codegen.hopper.epilogue import finite
from splatc.codegen.hopper.shape import Shape

NAME = "splatc_combine"
THREADS = 256
ROWS = THREADS // 32  # of one block
LOADS = 8  # of each lane, of O, that need not wait for each other


def combine_parts(s: Shape):
    """The function, not lowered; a grid of (row tiles * m / ROWS) blocks.

    combine: int32 (tiles, 8) batch, head, item, first scratch tile, parts, 0, 0, 0.
    """
    with kernel_function(NAME) as made:
        out, lse = array("o", s.dtype), array("lse", "float32")
        part_out, part_lse = array("part_o", s.dtype), array("part_lse", "float32")
        table, positions = array("combine", "int32", 8), array("positions", "int32", s.m)
        o_batch, o_head, o_seq = (I.arg(f"o_{axis}", I.int64()) for axis in ("batch", "head", "seq"))
        sinks = array("sinks", "float32") if s.score.sinks else None
        blocks, heads, q_len, merge = (I.arg(name, I.int32()) for name in ("blocks", "heads", "q_len", "merge"))
        I.device_entry()
        block = I.cta_id([blocks])
        thread = I.thread_id([THREADS])
        follow_kernels_before()
        lane = let("lane", thread % 32)
        tile = let("tile", T.truncdiv(block, s.m // ROWS))
        row = let("row", T.truncmod(block, s.m // ROWS) * ROWS + thread // 32)
        words = ("batch", "head", "item", "first", "parts")
        batch, head, item, first, parts = (let(name, table[tile, i]) for i, name in enumerate(words))
        position = let("position", positions[item, row])
        with when(position >= 0):
            at_lse = let("at_lse", wide(batch * heads + head) * wide(q_len) + wide(position))
            at_out = let("at_out", wide(batch) * o_batch + wide(head) * o_head + wide(position) * o_seq)
            old = Cell("old", T.float32(NEG_INF), "float32")  # LSE of the earlier pass
            if sinks is not None:
                old.set(sinks[head])
            with when(merge != 0):
                old.set(lse[at_lse])
            do(T.cuda.warp_sync())  # every lane has read it before one writes it
            weights = Weights(part_lse, first * s.m + row, s.m, parts, old(), lane)
            sums = Sums(s, lane)
            with when(merge != 0):
                sums.add(out, at_out, weights.of(old()))
            at_once = max(LOADS // ceil_div(s.dv, 32), 1)  # parts
            with loop(T.truncdiv(parts + (at_once - 1), at_once)) as group:
                for i in range(at_once):
                    part = let("part", group * at_once + i)
                    at = let("at", weights.row(T.min(part, parts - 1)))
                    weight = weights.of(part_lse[at])
                    sums.add(part_out, at * s.dv, T.if_then_else(part < parts, weight, T.float32(0.0)))
            sums.write(out, at_out)
            with when(T.EQ(lane, 0)):
                store(lse, at_lse, weights.lse)
    return made()


def array(name: str, dtype: str, width: int = 1) -> Expr:
    """A global array of rows ``width`` wide (flat for 1)."""
    shape = (I.int64(),) if width == 1 else (I.int32(), width)
    return named(name, I.match_buffer(I.arg(f"{name}_arg", I.handle()), shape, dtype, align=2))


def wide(x: Expr) -> Expr:
    """x as int64."""
    return T.cast(x, "int64")


class Weights:
    """The weights of a row's parts: part p's LSE is part_lse[first + p * step]; ``old`` is one more."""

    def __init__(self, part_lse: Expr, first: Expr, step: int, parts: Expr, old: Expr, lane: Expr) -> None:
        self._first, self._step = let("first_row", first), step
        top, total = Cell("top", old, "float32"), Cell("total", T.float32(0.0), "float32")
        rounds = T.truncdiv(parts + 31, 32)
        with loop(rounds) as i, when(i * 32 + lane < parts):
            top.set(T.max(top(), part_lse[self.row(i * 32 + lane)]))
        top.set(T.cuda.warp_max(top()))
        self._top = let("safe_top", finite(top()))
        with loop(rounds) as i, when(i * 32 + lane < parts):
            total.set(total() + self._share(part_lse[self.row(i * 32 + lane)]))
        total.set(T.cuda.warp_sum(total()) + self._share(old))
        zero = T.float32(0.0)
        self._inverse = let("inverse", T.if_then_else(T.EQ(total(), zero), zero, T.float32(1.0) / total()))
        self.lse = let("row_lse", self._top + T.log(total()))

    def row(self, part: Expr) -> Expr:
        """The row of scratch memory of a part."""
        return wide(self._first + part * self._step)

    def of(self, lse: Expr) -> Expr:
        """The weight of a part with this LSE."""
        return let("weight", self._share(lse) * self._inverse)

    def _share(self, lse: Expr) -> Expr:
        return T.exp2((lse - self._top) * T.float32(LOG2E))


class Sums:
    """A row of O in a warp's registers: each lane has every 32nd column."""

    def __init__(self, s: Shape, lane: Expr) -> None:
        self._s, self._lane = s, lane
        self._acc = registers("acc", ceil_div(s.dv, 32))
        for c in range(ceil_div(s.dv, 32)):
            store(self._acc, c, T.float32(0.0))

    def add(self, source: Expr, at: Expr, weight: Expr) -> None:
        """Add weight * source[at:]."""
        for c, column, inside in self._columns():
            with inside:
                store(self._acc, c, self._acc[c] + weight * T.cast(source[at + column], "float32"))

    def write(self, target: Expr, at: Expr) -> None:
        """target[at:] = the sums, rounded."""
        for c, column, inside in self._columns():
            with inside:
                store(target, at + column, T.cast(self._acc[c], self._s.dtype))

    def _columns(self) -> Iterator[tuple[int, Expr, AbstractContextManager[Any]]]:
        """Number and column of each, and the condition that it exists: none where all do."""
        for c in range(ceil_div(self._s.dv, 32)):
            column = wide(c * 32 + self._lane)
            yield c, column, when(column < T.int64(self._s.dv)) if (c + 1) * 32 > self._s.dv else nullcontext()
