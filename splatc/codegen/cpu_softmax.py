"""Softmax over values in ACSR order for CPUs, and its gradient, as TIRx: a row's values are neighbours in memory.

    softmax            values, p, lse               p = exp(values - lse) of each row
    softmax_backward   p, dp, dlse, ds              ds = p * (dp - sum of p * dp over the row + dlse)

Then for both: indptr, pattern, bases, chunks. values, p, dp, ds: (batch, all heads' elements), contiguous, of the
spec's dtype; lse, dlse: (batch, heads, q_len), contiguous, in the type of computations. int64: indptr (patterns,
q_len + 1) as in formats/order.py, pattern (heads,) which of them, bases (heads,) where each head's values begin,
chunks: bounds of the shares of all rows. An empty row has no values and lse -inf.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import tvm
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as I

from splatc.codegen.constants import NEG_INF
from splatc.codegen.cpu import shape_of
from splatc.codegen.cpu_tile import Shape
from splatc.codegen.cpu_vector import LN2, LOG2E, Expr, Register, constant, converted, exp2, lane_range, vector_type
from splatc.codegen.cpu_walk import match_array
from splatc.codegen.kernel import SOFTMAX_BACKWARD_FUNCTION as BACKWARD
from splatc.codegen.kernel import SOFTMAX_FUNCTION as FORWARD
from splatc.codegen.kernel import KernelSpec

VECTORS = 4  # sums side by side


def softmax_cpu(spec: KernelSpec) -> tvm.IRModule:
    """The module with the functions "splatc_softmax" and "splatc_softmax_backward", not lowered; for any head dim."""
    s = shape_of(spec)
    return tvm.IRModule({FORWARD: _forward(s), BACKWARD: _backward(s)})


@dataclass(frozen=True)
class Rows:
    """Where the rows of each head lie."""

    indptr: Expr
    pattern: Expr
    bases: Expr
    chunks: Expr


@dataclass(frozen=True)
class Row:
    """One row: batch, head, query, and its ``count`` values from ``start`` on."""

    batch: Expr
    head: Expr
    query: Expr
    start: Expr
    count: Expr

    def get(self, array: Expr, at: Expr, lanes: int, s: Shape) -> Expr:
        """`lanes` values from number `at` of the row on, in the type of computations."""
        return converted(array[self.batch, lane_range(self.start + at, lanes)], lanes, s.acc)

    def put(self, array: Expr, at: Expr, value: Expr, lanes: int, s: Shape) -> None:
        value = value.astype(vector_type(lanes, s.dtype))
        I.buffer_store(array, value, [self.batch, lane_range(self.start + at, lanes)])


def _forward(s: Shape) -> Expr:
    with IRBuilder() as builder:
        with I.prim_func(s_tir=True):
            I.func_name(FORWARD)
            values, p = _match_values("values", s), _match_values("p", s)
            lse = match_array("lse", tuple(I.int64() for _ in range(3)), s.acc)
            rows = _match_rows(lse)
            with I.parallel(0, rows.chunks.shape[0] - 1) as worker:
                emit_rows(rows, lse, worker, lambda row: _softmax(row, values, p, lse, s))
    return builder.get().with_attr("global_symbol", FORWARD)


def _backward(s: Shape) -> Expr:
    with IRBuilder() as builder:
        with I.prim_func(s_tir=True):
            I.func_name(BACKWARD)
            p, dp = _match_values("p", s), _match_values("dp", s)
            dlse = match_array("dlse", tuple(I.int64() for _ in range(3)), s.acc)
            ds = _match_values("ds", s)
            rows = _match_rows(dlse)
            with I.parallel(0, rows.chunks.shape[0] - 1) as worker:
                emit_rows(rows, dlse, worker, lambda row: _softmax_gradient(row, p, dp, dlse, ds, s))
    return builder.get().with_attr("global_symbol", BACKWARD)


def _match_values(name: str, s: Shape) -> Expr:
    return match_array(name, (I.int64(), I.int64()), s.dtype)


def _match_rows(lse: Expr) -> Rows:
    heads, q_len = lse.shape[1:]
    return Rows(
        indptr=match_array("indptr", (I.int64(), q_len + 1), "int64"),
        pattern=match_array("pattern", (heads,), "int64"),
        bases=match_array("bases", (heads,), "int64"),
        chunks=match_array("chunks", (I.int64(),), "int64"),
    )


def emit_rows(rows: Rows, lse: Expr, worker: Expr, body: Callable[[Row], None]) -> None:
    """body(row) for the rows of one worker."""
    _, heads, q_len = lse.shape
    with I.serial(rows.chunks[worker], rows.chunks[worker + 1]) as r:
        batch, rest = I.Bind(T.truncdiv(r, heads * q_len)), I.Bind(T.truncmod(r, heads * q_len))
        head, query = I.Bind(T.truncdiv(rest, q_len)), I.Bind(T.truncmod(rest, q_len))
        begin = I.Bind(rows.indptr[rows.pattern[head], query])
        end = I.Bind(rows.indptr[rows.pattern[head], query + 1])
        body(Row(batch, head, query, I.Bind(rows.bases[head] + begin), I.Bind(end - begin)))


def _softmax(row: Row, values: Expr, p: Expr, lse: Expr, s: Shape) -> None:
    top = emit_reduce(row, s, NEG_INF, lambda at, lanes: row.get(values, at, lanes, s), T.max)
    # A row of -inf alone: subtract 0 instead, exp2(-inf) is 0.
    base = I.Bind(T.Select(T.EQ(top, s.scalar(NEG_INF)), s.scalar(0.0), top))

    def weight(at: Expr, lanes: int) -> Expr:
        return exp2((row.get(values, at, lanes, s) - _all(base, lanes)) * constant(LOG2E, lanes, s.acc), lanes, s.acc)

    total = emit_reduce(row, s, 0.0, weight, lambda a, b: a + b)
    inverse = I.Bind(T.Select(T.EQ(total, s.scalar(0.0)), s.scalar(0.0), s.scalar(1.0) / total))
    emit_each(row, s, lambda at, lanes: row.put(p, at, weight(at, lanes) * _all(inverse, lanes), lanes, s))
    I.buffer_store(lse, base + T.log2(total) * s.scalar(LN2), [row.batch, row.head, row.query])


def _softmax_gradient(row: Row, p: Expr, dp: Expr, dlse: Expr, ds: Expr, s: Shape) -> None:
    def weighted(at: Expr, lanes: int) -> Expr:
        return row.get(p, at, lanes, s) * row.get(dp, at, lanes, s)

    delta = emit_reduce(row, s, 0.0, weighted, lambda a, b: a + b)
    delta = I.Bind(delta - dlse[row.batch, row.head, row.query])

    def put(at: Expr, lanes: int) -> None:
        row.put(ds, at, row.get(p, at, lanes, s) * (row.get(dp, at, lanes, s) - _all(delta, lanes)), lanes, s)

    emit_each(row, s, put)


def emit_reduce(
    row: Row, s: Shape, empty: float, get: Callable[[Expr, int], Expr], combine: Callable[[Expr, Expr], Expr]
) -> Expr:
    """get(at, lanes) of all of a row combined into one number, ``empty`` for an empty row."""
    sums = [s.register(s.constant(empty)) for _ in range(VECTORS)]
    last = Register(1, s.scalar(empty), s.acc)
    together = VECTORS * s.lanes

    def one(at: Expr, lanes: int) -> None:
        last.set(combine(last.get(), get(at, 1)))

    with I.serial(0, T.truncdiv(row.count, together)) as x:
        for v, part in enumerate(sums):
            part.set(combine(part.get(), get(x * together + v * s.lanes, s.lanes)))
    with I.serial(T.truncdiv(row.count, together) * together, row.count) as at:
        one(at, 1)
    for part in sums:
        for lane in range(s.lanes):
            last.set(combine(last.get(), part.slot[lane]))
    return I.Bind(last.get())


def emit_each(row: Row, s: Shape, body: Callable[[Expr, int], None]) -> None:
    """body(at, lanes) for all of a row."""
    with I.serial(0, T.truncdiv(row.count, s.lanes)) as x:
        body(x * s.lanes, s.lanes)
    with I.serial(T.truncdiv(row.count, s.lanes) * s.lanes, row.count) as at:
        body(at, 1)


def _all(x: Expr, lanes: int) -> Expr:
    return x if lanes == 1 else T.Broadcast(x, lanes)
