"""Softmax over values in ACSR order, and its gradient: a row's values are neighbours in memory, and a warp's work.

    softmax            values, p, lse               p = exp(values - lse) of each row
    softmax_backward   p, dp, dlse, ds              ds = p * (dp - sum of p * dp over the row + dlse)

A row is read in the 16 bytes ("units") that memory is divided into; of the first and the last one, some are others'.
It is read twice: for its maximum and sum, and for what becomes of it.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as I

from splatc.codegen.constants import LN2, LOG2E, NEG_INF
from splatc.codegen.cuda_parts import from_lane as across
from splatc.codegen.hopper.block import int_arg, table
from splatc.codegen.hopper.combine import wide
from splatc.codegen.hopper.emit import (
    Cell,
    Expr,
    do,
    follow_kernels_before,
    kernel_function,
    let,
    registers,
    store,
    when,
)
from splatc.codegen.hopper.epilogue import finite
from splatc.codegen.hopper.stored import split, values_of, words_of
from splatc.codegen.hopper.unfused.tiles import Sizes, sizes_of, value_array
from splatc.codegen.kernel import SOFTMAX_BACKWARD_FUNCTION as BACKWARD
from splatc.codegen.kernel import SOFTMAX_FUNCTION as FORWARD
from splatc.codegen.kernel import KernelSpec

THREADS = 256
ROWS = THREADS // 32  # of a block


def softmax(spec: KernelSpec):
    """(the function, not lowered, threads of a block, its bytes of dynamic shared memory)."""
    s = sizes_of(spec)
    with kernel_function(FORWARD) as made:
        values, p, lse = value_array("values", s), value_array("p", s), table("lse", "float32", 1)
        with _row(s) as row:
            _forward(row, values, p, lse)
    return made(), THREADS, 0


def softmax_backward(spec: KernelSpec):
    """(the function, not lowered, threads of a block, its bytes of dynamic shared memory)."""
    s = sizes_of(spec)
    with kernel_function(BACKWARD) as made:
        p, dp, dlse = value_array("p", s), value_array("dp", s), table("dlse", "float32", 1)
        ds = value_array("ds", s)
        with _row(s) as row:
            _backward(row, p, dp, dlse, ds)
    return made(), THREADS, 0


class Row:
    """A warp's row: ``number`` counts those of all batch entries and heads; its values lie from ``first`` on."""

    def __init__(self, s: Sizes, number: Expr, first: Expr, count: Expr, lane: Expr) -> None:
        self.s, self.number, self.count, self.lane = s, number, count, lane
        self.skip = let("skip", T.cast(first % s.unit, "int32"))  # others' values in the first unit
        self.start = let("start", first - wide(self.skip))
        self.units = let("units", T.if_then_else(count > 0, T.truncdiv(self.skip + count + (s.unit - 1), s.unit), 0))

    def each(self, body: Callable[[Expr], None]) -> None:
        """body(unit) for this lane's units."""
        unit = Cell("unit", self.lane)
        with I.While(unit() < self.units):
            body(unit())
            unit.set(unit() + 32)

    def read(self, array: Expr, unit: Expr, name: str) -> list[Expr]:
        """The values of a unit, others' among them."""
        words = registers(name, 4, "uint32")
        do(T.ptx["ld.global.v4.b32"](*(words[i] for i in range(4)), array.ptr_to([self.at(unit)])))
        return values_of([words[i] for i in range(4)], self.s.dtype)

    def write(self, array: Expr, unit: Expr, values: list[Expr]) -> None:
        """The row's own values of a unit."""
        words = words_of(values, self.s.dtype)
        with I.If(T.And(self.own(unit, 0), self.own(unit, self.s.unit - 1))):
            with I.Then():
                do(T.ptx["st.global.v4.b32"](array.ptr_to([self.at(unit)]), *words))
            with I.Else():
                for i, value in enumerate(split(words, self.s.dtype)):
                    with when(self.own(unit, i)):
                        store(array, self.at(unit) + i, value)

    def own(self, unit: Expr, i: int) -> Expr:
        """Whether the i-th value of a unit is the row's."""
        number = unit * self.s.unit + i
        return T.And(number >= self.skip, number < self.skip + self.count)

    def at(self, unit: Expr) -> Expr:
        return self.start + wide(unit * self.s.unit)


@contextmanager
def _row(s: Sizes) -> Iterator[Row]:
    """What follows of a kernel's parameters, and its shell: a warp for each row.

    indptr: int32 (patterns, q_len + 1); pattern: int32 (heads,), of each head; bases: int64 (heads,), where each head's
    values begin; total: int64, values of a batch entry; rows: of all batch entries and heads.
    """
    indptr, pattern = table("indptr", "int32", 1), table("pattern", "int32", 1)
    bases, total = table("bases", "int64", 1), I.arg("total", I.int64())
    blocks, rows, heads, q_len = map(int_arg, ("blocks", "rows", "heads", "q_len"))
    I.device_entry()
    block, thread = I.cta_id([blocks]), I.thread_id([THREADS])
    follow_kernels_before()
    number = let("number", block * ROWS + thread // 32)
    with when(number < rows):
        group, query = let("pair", T.truncdiv(number, q_len)), let("query", T.truncmod(number, q_len))
        head = let("head", T.truncmod(group, heads))
        at = let("at", pattern[head] * (q_len + 1) + query)
        begin = let("begin", indptr[at])
        first = wide(T.truncdiv(group, heads)) * total + bases[head] + wide(begin)
        yield Row(s, number, first, let("count", indptr[at + 1] - begin), let("lane", thread % 32))


def _forward(row: Row, values: Expr, p: Expr, lse: Expr) -> None:
    top, total = Cell("top", T.float32(NEG_INF), "float32"), Cell("total", T.float32(0.0), "float32")

    def add(unit: Expr) -> None:
        read = row.read(values, unit, "read")
        own = [let("own", T.if_then_else(row.own(unit, i), x, T.float32(NEG_INF))) for i, x in enumerate(read)]
        new = top()
        for x in own:
            new = T.max(new, x)
        new = let("new_top", new)
        base = let("new_base", finite(new))
        total.set(total() * exp(top() - base))
        for x in own:
            total.set(total() + exp(x - base))
        top.set(new)

    row.each(add)
    mine, mine_base = let("mine", top()), let("mine_base", finite(top()))
    over_warp(top, T.max)
    base = let("base", finite(top()))
    total.set(T.if_then_else(T.EQ(mine, T.float32(NEG_INF)), total(), total() * exp(mine_base - base)))
    over_warp(total, lambda a, b: a + b)
    empty = T.EQ(total(), T.float32(0.0))
    inverse = let("inverse", T.if_then_else(empty, T.float32(0.0), T.float32(1.0) / total()))
    row.each(lambda unit: row.write(p, unit, [exp(x - base) * inverse for x in row.read(values, unit, "again")]))
    with when(T.EQ(row.lane, 0)):
        store(lse, row.number, base + T.log2(total()) * T.float32(LN2))


def _backward(row: Row, p: Expr, dp: Expr, dlse: Expr, ds: Expr) -> None:
    delta = Cell("delta", T.float32(0.0), "float32")

    def add(unit: Expr) -> None:
        for i, (x, dx) in enumerate(zip(row.read(p, unit, "p_read"), row.read(dp, unit, "dp_read"), strict=True)):
            delta.set(delta() + T.if_then_else(row.own(unit, i), x * dx, T.float32(0.0)))

    def put(unit: Expr) -> None:
        both = zip(row.read(p, unit, "p_again"), row.read(dp, unit, "dp_again"), strict=True)
        row.write(ds, unit, [x * (dx - delta()) for x, dx in both])

    row.each(add)
    over_warp(delta, lambda a, b: a + b)
    delta.set(delta() - dlse[row.number])
    row.each(put)


def exp(x: Expr) -> Expr:
    """e to the power of x."""
    return T.exp2(x * T.float32(LOG2E))


def over_warp(cell: Cell, combine: Callable[[Expr, Expr], Expr]) -> None:
    """The cells of all lanes combined, in each of them."""
    for step in range(5):
        cell.set(combine(cell(), across(cell(), T.int32(1 << step))))
