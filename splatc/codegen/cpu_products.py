"""The products over a mask for CPUs, as TIRx for TVM's LLVM target: values in ACSR order, one for each element.

    function          rows of a tile    columns    values     computes
    sddmm             keys              queries    written    values[q, k] = factor * <q_q, k_k>
    spmm              queries           keys       read       out[q] = factor * sum over k of values[q, k] y[k]
    spmm_transposed   keys              queries    read       out[k] = factor * sum over q of values[q, k] y[q]

The first and the last one walk over the tables of the transposed mask. sddmm's lanes are keys, so that a full tile's
line of one query leaves in whole vectors; those of the others run along the head dim. A tile with bits goes element by
element through its bits: in spmm that is no more work than its elements are, and what is not finite in y meets those
that attend to it alone. Each value and each row of out has one writer.

Arguments: sddmm q, k, values; spmm and spmm_transposed values, y, out; then for all the tables (codegen/values.py),
first, bases, factor. values: (batch, all heads' elements), contiguous, those of head h from bases[h] (int64) on. q, k,
y, out: (batch, heads, seq, dim), any strides with a contiguous last axis; k, and y of spmm, may have fewer heads. All
in the spec's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

import tvm
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as I

from splatc.codegen.cpu import shape_of
from splatc.codegen.cpu_pack import emit_fill, emit_pack_rows, emit_pack_transposed, emit_unpack_rows
from splatc.codegen.cpu_tile import Shape, emit_dots, emit_product, row_groups
from splatc.codegen.cpu_vector import Expr, converted, lane_range, load, pieces, scratch, store, vector_type
from splatc.codegen.cpu_walk import (
    Walk,
    emit_items,
    emit_positions,
    emit_row_positions,
    match_array,
    match_strided,
    match_walk,
)
from splatc.codegen.kernel import SDDMM_FUNCTION, SPMM_FUNCTION, SPMM_TRANSPOSED_FUNCTION, KernelSpec

ALL = 0xFFFFFFFF


def sddmm_cpu(spec: KernelSpec) -> tvm.IRModule:
    """The module with the function "splatc_sddmm", not lowered; any head_dim."""
    return tvm.IRModule({SDDMM_FUNCTION: _sddmm(shape_of(spec))})


def spmm_cpu(spec: KernelSpec) -> tvm.IRModule:
    """The module with the functions "splatc_spmm" and "splatc_spmm_transposed", not lowered; any v_head_dim."""
    s = shape_of(spec)
    plain = _spmm(s, SPMM_FUNCTION, queries_are_rows=True)
    transposed = _spmm(s, SPMM_TRANSPOSED_FUNCTION, queries_are_rows=False)
    return tvm.IRModule({SPMM_FUNCTION: plain, SPMM_TRANSPOSED_FUNCTION: transposed})


@dataclass(frozen=True)
class Values:
    """The values, and what says where those of a tile lie."""

    array: Expr
    walk: Walk
    first: Expr
    bases: Expr
    queries_are_rows: bool
    s: Shape

    @property
    def lines(self) -> int:
        return self.s.m if self.queries_are_rows else self.s.n

    def line(self, j: Expr, i: Expr) -> Expr:
        """The line of column lane j and row lane i."""
        return i if self.queries_are_rows else j

    def start(self, head: Expr, entry: Expr, line: Expr) -> Expr:
        """Where the values of a line of a tile begin."""
        return self.bases[head] + T.cast(self.first[entry, line], "int64")


class Scratch:
    """A worker's own buffers."""

    def __init__(self, s: Shape, lines: int) -> None:
        self.row_pos, self.col_pos = scratch(s.m, "int32"), scratch(s.n, "int32")
        self.exists = scratch(s.m // 32, "uint32")  # bits of the row lanes that exist
        self.whole = scratch(1, "int32")  # whether all do
        self.word = scratch(1, "uint32")
        self.cursor = scratch(lines, "int64")  # of each line: where its next value lies


def match_values(s: Shape, array: Expr, queries_are_rows: bool) -> Values:
    """Declare the tables, ``first`` and ``bases``."""
    walk = match_walk(s)
    first = match_array("first", (walk.entries.shape[0], s.m if queries_are_rows else s.n), "int32")
    return Values(array, walk, first, match_array("bases", (I.int64(),), "int64"), queries_are_rows, s)


def match_value_array(s: Shape) -> Expr:
    """Declare the values."""
    return match_array("values", (I.int64(), I.int64()), s.dtype)


def _sddmm(s: Shape) -> Expr:
    with IRBuilder() as builder:
        with I.prim_func(s_tir=True):
            I.func_name(SDDMM_FUNCTION)
            batch, heads, kv_heads, q_len, kv_len = (I.int64() for _ in range(5))
            q = match_strided("q", (batch, heads, q_len, T.int64(s.d)), s.dtype)
            k = match_strided("k", (batch, kv_heads, kv_len, T.int64(s.d)), s.dtype)
            t = match_values(s, match_value_array(s), queries_are_rows=False)
            factor = I.arg("factor", s.scalar(None))
            with I.parallel(0, t.walk.chunks.shape[0] - 1) as worker:
                _sddmm_worker(q, k, t, s, worker, factor)
    return builder.get().with_attr("global_symbol", SDDMM_FUNCTION)


def _sddmm_worker(q: Expr, k: Expr, t: Values, s: Shape, worker: Expr, factor: Expr) -> None:
    b = Scratch(s, t.lines)
    kt, rows = s.scratch(s.m * s.d_pitch), s.scratch(s.m * s.d_pitch)
    y, scores = s.scratch(s.n * s.d), s.scratch(s.n * s.m)  # scores: [query, key]
    group = I.Bind(T.cast(T.truncdiv(q.shape[1], k.shape[1]), "int32"))

    def one(batch: Expr, head: Expr, item: Expr) -> None:
        emit_rows(t, b, item, k.shape[2])
        at = batch, I.Bind(T.truncdiv(head, group))
        emit_pack_transposed(kt, rows, k, at, b.row_pos, s.d, s.d_pitch, s, factor)

        def tile(entry: Expr, bits: Expr) -> None:
            emit_pack_rows(y, s.d, q, (batch, head), b.col_pos, s.n, s.d, s)

            def keep(block: Expr) -> Callable[[Expr, int, Expr], None]:
                return lambda j, v, x: store(scores, j * s.m + block * s.width + v * s.lanes, x, s.lanes)

            with I.serial(0, s.blocks) as block:
                emit_dots(s, y, kt, s.d, s.d_pitch, block, keep(block))

            def copy() -> None:
                with I.serial(0, s.n) as j:
                    start = I.Bind(t.start(head, entry, j))
                    for i, width in pieces(s.m, s.lanes):
                        value = load(scores, j * s.m + i, width).astype(vector_type(width, s.dtype))
                        I.buffer_store(t.array, value, [batch, lane_range(start + i, width)])

            def put(j: Expr, i: Expr, at: Expr) -> None:
                I.buffer_store(t.array, scores[j * s.m + i].astype(s.dtype), [batch, at])

            emit_either(t, b, head, entry, bits, copy, put)

        emit_entries(t, b, item, q.shape[2], tile)

    emit_items(t.walk, worker, one)


def _spmm(s: Shape, name: str, queries_are_rows: bool) -> Expr:
    with IRBuilder() as builder:
        with I.prim_func(s_tir=True):
            I.func_name(name)
            batch, heads, y_heads, rows, cols = (I.int64() for _ in range(5))
            array = match_value_array(s)
            y = match_strided("y", (batch, y_heads, cols, T.int64(s.dv)), s.dtype)
            out = match_strided("out", (batch, heads, rows, T.int64(s.dv)), s.dtype)
            t = match_values(s, array, queries_are_rows)
            factor = I.arg("factor", s.scalar(None))
            with I.parallel(0, t.walk.chunks.shape[0] - 1) as worker:
                _spmm_worker(y, out, t, s, worker, factor)
    return builder.get().with_attr("global_symbol", name)


def _spmm_worker(y: Expr, out: Expr, t: Values, s: Shape, worker: Expr, factor: Expr) -> None:
    b = Scratch(s, t.lines)
    ys, sums = s.scratch(s.n * s.dv_pitch), s.scratch(s.m * s.dv_pitch)
    weights = s.scratch(s.m * s.n)  # [query, key]
    keys = s.n if t.queries_are_rows else s.m
    group = I.Bind(T.cast(T.truncdiv(out.shape[1], y.shape[1]), "int32"))
    emit_fill(ys, s.n * s.dv_pitch, 0.0, s)  # lanes beyond the head dim

    def one(batch: Expr, head: Expr, item: Expr) -> None:
        emit_rows(t, b, item, out.shape[2])
        emit_fill(sums, s.m * s.dv_pitch, 0.0, s)
        at = batch, I.Bind(T.truncdiv(head, group))

        def tile(entry: Expr, bits: Expr) -> None:
            emit_pack_rows(ys, s.dv_pitch, y, at, b.col_pos, s.n, s.dv, s)

            def whole() -> None:
                with I.serial(0, t.lines) as line:
                    start = I.Bind(t.start(head, entry, line))
                    for i, width in pieces(keys, s.lanes):
                        value = t.array[batch, lane_range(start + i, width)].astype(vector_type(width, s.acc))
                        store(weights, line * keys + i, value, width)
                emit_weighted_rows(sums, ys, weights, t, keys, s)

            def add(j: Expr, i: Expr, at: Expr) -> None:
                weight = I.Bind(T.Broadcast(converted(t.array[batch, at], 1, s.acc), s.lanes))
                for d in range(0, s.dv_pitch, s.lanes):
                    total = load(sums, i * s.dv_pitch + d, s.lanes) + weight * load(ys, j * s.dv_pitch + d, s.lanes)
                    store(sums, i * s.dv_pitch + d, total, s.lanes)

            emit_either(t, b, head, entry, bits, whole, add)

        emit_entries(t, b, item, y.shape[2], tile)
        scale = I.Bind(T.Broadcast(factor, s.lanes))
        with I.serial(0, s.m * s.dv_pitch // s.lanes) as x:
            store(sums, x * s.lanes, load(sums, x * s.lanes, s.lanes) * scale, s.lanes)
        emit_unpack_rows(out, (batch, head), b.row_pos, sums, s.dv_pitch, s.dv, s)

    emit_items(t.walk, worker, one)


def emit_weighted_rows(sums: Expr, ys: Expr, weights: Expr, t: Values, keys: int, s: Shape) -> None:
    """sums[i, d] += sum over j of weights[i, j] * ys[j, d] of a full tile; weights: [query, key]."""
    vectors = s.dv_pitch // s.lanes
    for begin in range(0, vectors, s.vecs):
        part = replace(s, vecs=min(s.vecs, vectors - begin))

        def group(i0: Expr, rows: int, part: Shape = part, begin: int = begin) -> None:
            def at(row: Expr, v: int) -> Expr:
                return row * s.dv_pitch + (begin + v) * s.lanes

            def weight(j: Expr, r: int) -> Expr:
                query, key = (i0 + r, j) if t.queries_are_rows else (j, i0 + r)
                return weights[query * keys + key]

            acc = part.registers(rows)
            for r, v in product(range(rows), range(part.vecs)):
                acc[r][v].set(load(sums, at(i0 + r, v), s.lanes))
            emit_product(acc, part, s.n, weight, lambda j, v: load(ys, at(j, v), s.lanes))
            for r, v in product(range(rows), range(part.vecs)):
                store(sums, at(i0 + r, v), acc[r][v].get(), s.lanes)

        row_groups(s.m, s.rows, group)


# -- the walk ----------------------------------------------------------------------------------------------------------


def emit_rows(t: Values, b: Scratch, item: Expr, length: Expr) -> None:
    """The positions of the rows of an item, and which of them exist."""
    s = t.s
    emit_row_positions(t.walk, item, b.row_pos, length)
    I.buffer_store(b.whole, T.int32(1), [0])
    with I.serial(0, s.m // 32) as w:
        I.buffer_store(b.exists, T.uint32(0), [w])
        with I.serial(0, 32) as x:
            with I.If(b.row_pos[w * 32 + x] >= 0):
                with I.Then():
                    one = T.uint32(1) << T.cast(x, "uint32")
                    I.buffer_store(b.exists, T.bitwise_or(b.exists[w], one), [w])
                with I.Else():
                    I.buffer_store(b.whole, T.int32(0), [0])


def emit_entries(t: Values, b: Scratch, item: Expr, length: Expr, tile: Callable[[Expr, Expr], None]) -> None:
    """tile(entry, its bits, 0 for a full tile) for every column tile of an item, whose positions are set."""
    walk = t.walk
    first = I.Bind(walk.items[item, 3])
    with I.serial(first, first + walk.items[item, 4]) as entry:
        origin = [I.Bind(walk.entries[entry, d]) for d in range(3)]
        emit_positions(b.col_pos, walk.views, I.Bind(walk.entries[entry, 5]), origin, length)
        tile(entry, I.Bind(walk.entries[entry, 4]))


def emit_either(
    t: Values, b: Scratch, head: Expr, entry: Expr, bits: Expr, whole: Callable[[], None],
    one: Callable[[Expr, Expr, Expr], None],
) -> None:  # fmt: skip
    """whole() for a full tile of rows that all exist; else one(column lane, row lane, where its value lies) for each
    element, a line's in ACSR order."""
    s = t.s
    with I.If(T.And(T.EQ(bits, 0), T.EQ(b.whole[0], 1))):
        with I.Then():
            whole()
        with I.Else():
            with I.serial(0, t.lines) as line:
                I.buffer_store(b.cursor, t.start(head, entry, line), [line])
            with I.serial(0, s.n) as j, I.serial(0, s.m // 32) as w:
                held = T.Select(T.EQ(bits, 0), T.uint32(ALL), t.walk.bits[T.max(bits - 1, 0), j, w])
                I.buffer_store(b.word, T.bitwise_and(held, b.exists[w]), [0])
                with I.serial(0, T.cast(T.popcount(b.word[0]), "int32")):
                    below = I.Bind(T.bitwise_and(b.word[0] - T.uint32(1), T.bitwise_not(b.word[0])))
                    i = I.Bind(w * 32 + T.cast(T.popcount(below), "int32"))  # the lowest bit
                    I.buffer_store(b.word, T.bitwise_and(b.word[0], b.word[0] - T.uint32(1)), [0])
                    line = t.line(j, i)
                    at = I.Bind(b.cursor[line])
                    I.buffer_store(b.cursor, at + T.int64(1), [line])
                    one(j, i, at)


