"""Softmax of rows of kept scores, where they lie or elsewhere: one read and one write of 16 bytes a thread at a time.

A row of up to lanes * units * 8 values stays in the registers of so many lanes; what is wider is read twice.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Callable

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as I

from splatc.codegen.constants import LOG2E, NEG_INF
from splatc.codegen.cuda_parts import from_lane
from splatc.codegen.hopper.block import int_arg
from splatc.codegen.hopper.combine import array, wide
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
from splatc.codegen.hopper.products import PTX_TYPE
from splatc.codegen.hopper.stored import unpack
from splatc.codegen.kernel import COMPRESSED_SOFTMAX, SOFTMAX_THREADS, SOFTMAX_UNIT

NAME = f"splatc_{COMPRESSED_SOFTMAX}"
NEG_INF_PAIR = {"float16": 0xFC00FC00, "bfloat16": 0xFF80FF80}


def softmax(dtype: str, lanes: int, units: int | None):
    """The function, not lowered, for rows of up to lanes * units units, with None of any width. x, p: (rows, width)."""
    name = softmax_name(lanes, units)
    with kernel_function(name) as made:
        x, p = array("x", "uint16"), array("p", "uint16")
        blocks, rows, width = map(int_arg, ("blocks", "rows", "width"))
        I.device_entry()
        block, thread = I.cta_id([blocks]), I.thread_id([SOFTMAX_THREADS])
        follow_kernels_before()
        row = _Row(dtype, lanes, block * (SOFTMAX_THREADS // lanes) + thread // lanes, rows, width, thread % lanes)
        _wide(row, x, p) if units is None else _in_registers(row, units, x, p)
    return made()


def softmax_name(lanes: int, units: int | None) -> str:
    """Of the function for rows of so many units in each of so many lanes."""
    return f"{NAME}_{lanes}x{units or 'any'}"


class _Row:
    """A row, the work of ``lanes`` lanes of a warp: lane i has units i, i + lanes ..."""

    def __init__(self, dtype: str, lanes: int, number: Expr, rows: Expr, width: Expr, lane: Expr) -> None:
        self.dtype, self.lanes = dtype, lanes
        self.lane = let("lane", lane)
        self._first = let("first", wide(number) * wide(width))
        self.units = let("units", T.if_then_else(number < rows, T.truncdiv(width, SOFTMAX_UNIT), 0))

    def read(self, array: Expr, units: list[Expr], values: Expr) -> None:
        """values = these units, -inf behind the row's end; all are asked for before the first is waited for."""
        words = registers("words", 4 * len(units), "uint32")
        for u, unit in enumerate(units):
            four = range(4 * u, 4 * u + 4)
            for i in four:
                store(words, i, T.uint32(NEG_INF_PAIR[self.dtype]))
            with when(unit < self.units):
                do(T.ptx["ld.global.v4.b32"](*(words[i] for i in four), array.ptr_to([self._at(unit)])))
        for i in range(4 * len(units)):
            for c, one in enumerate(unpack(words[i], self.dtype)):
                store(values, 2 * i + c, one)

    def write(self, array: Expr, unit: Expr, values: list[Expr]) -> None:
        words = registers("rounded", 4, "uint32")
        with when(unit < self.units):
            for i in range(4):
                do(T.ptx[f"cvt.rn.{PTX_TYPE[self.dtype]}x2.f32"](words[i], values[2 * i + 1], values[2 * i]))
            do(T.ptx["st.global.v4.b32"](array.ptr_to([self._at(unit)]), *(words[i] for i in range(4))))

    def over_lanes(self, cell: Cell, combine: Callable[[Expr, Expr], Expr]) -> None:
        """The cells of a row's lanes combined, in each of them."""
        distance = 1
        while distance < self.lanes:
            cell.set(combine(cell(), from_lane(cell(), T.int32(distance))))
            distance *= 2

    def _at(self, unit: Expr) -> Expr:
        return self._first + wide(unit * SOFTMAX_UNIT)


def _in_registers(row: _Row, units: int, x: Expr, p: Expr) -> None:
    count = SOFTMAX_UNIT * units
    values = registers("values", count)
    mine = [row.lane + row.lanes * u for u in range(units)]
    row.read(x, mine, values)
    top, total = Cell("top", values[0], "float32"), Cell("total", T.float32(0.0), "float32")
    for i in range(1, count):
        top.set(T.max(top(), values[i]))
    row.over_lanes(top, T.max)
    base = let("base", finite(top()) * T.float32(LOG2E))
    for i in range(count):
        store(values, i, T.exp2(values[i] * T.float32(LOG2E) - base))
        total.set(total() + values[i])
    row.over_lanes(total, lambda a, b: a + b)
    inverse = let("inverse", _inverse(total()))
    for u, unit in enumerate(mine):
        row.write(p, unit, [values[SOFTMAX_UNIT * u + i] * inverse for i in range(SOFTMAX_UNIT)])


def _wide(row: _Row, x: Expr, p: Expr) -> None:
    values = registers("values", SOFTMAX_UNIT)
    top, total = Cell("top", T.float32(NEG_INF), "float32"), Cell("total", T.float32(0.0), "float32")

    def each(body: Callable[[Expr], None]) -> None:
        unit = Cell("unit", row.lane)
        with I.While(unit() < row.units):
            row.read(x, [unit()], values)
            body(unit())
            unit.set(unit() + row.lanes)

    def add(_: Expr) -> None:
        new = top()
        for i in range(SOFTMAX_UNIT):
            new = T.max(new, values[i])
        new = let("new_top", new)
        base = let("new_base", finite(new) * T.float32(LOG2E))
        total.set(total() * T.exp2(top() * T.float32(LOG2E) - base))
        for i in range(SOFTMAX_UNIT):
            total.set(total() + T.exp2(values[i] * T.float32(LOG2E) - base))
        top.set(new)

    each(add)
    mine = let("mine", top())
    row.over_lanes(top, T.max)
    base = let("base", finite(top()) * T.float32(LOG2E))
    total.set(total() * T.exp2(finite(mine) * T.float32(LOG2E) - base))
    row.over_lanes(total, lambda a, b: a + b)
    inverse = let("inverse", _inverse(total()))
    each(lambda unit: row.write(p, unit, [T.exp2(values[i] * T.float32(LOG2E) - base) * inverse
                                          for i in range(SOFTMAX_UNIT)]))  # fmt: skip


def _inverse(total: Expr) -> Expr:
    return T.if_then_else(T.EQ(total, T.float32(0.0)), T.float32(0.0), T.float32(1.0) / total)
