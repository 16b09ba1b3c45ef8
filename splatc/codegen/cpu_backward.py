"""The gradients of tile-sparse attention for CPUs, as TIRx for TVM's LLVM target.

    P = exp(S - LSE)    dP = dO V^T    delta = rowsum(dO * O) - dLSE    dS = P * (dP - delta) * slope of the softcap
    dQ = scale * dS K   dK = scale * dS^T Q   dV = P^T dO

With dropout dP and the P of dV are 0 where a probability is dropped, elsewhere divided by 1 - p.

Two functions, each the sole writer of its results, so that no run differs from another: dQ walks over the tables of
the mask, lanes being queries; dK and dV over those of the transposed mask, lanes being keys. Both are one kernel: the
rows of a tile bring two packed and transposed tensors x1, x2 and the columns two packed ones y1, y2,

    function   x1   x2    y1   y2    statistics of   sums over columns
    dq         Q    dO    K    V     rows            dS * y1
    dkv        K    V     Q    dO    columns         dS * y1, P * y2

with scores <y1, x1> and dP = <y2, x2>. dq also sums the gradients of biases, P * (dP - delta): those of slopes by rows,
those of tables, one number after the other, into a table for each worker. These are the same for any number of threads
if the number of workers is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import tvm
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as I

from splatc.codegen.constants import NEG_INF
from splatc.codegen.cpu import shape_of
from splatc.codegen.cpu_bias import BiasGradients, BiasSums, match_bias_gradients
from splatc.codegen.cpu_pack import (
    At,
    emit_fill,
    emit_pack_rows,
    emit_pack_transposed,
    emit_transpose_out,
    emit_unpack_rows,
)
from splatc.codegen.cpu_prune import Kept, kept_of
from splatc.codegen.cpu_score import TermArguments, TermEmitter, match_terms
from splatc.codegen.cpu_tile import Bits, Shape, emit_dots, emit_guard, emit_weighted_sum
from splatc.codegen.cpu_vector import LOG2E, Expr, exp2, load, scratch, store
from splatc.codegen.cpu_walk import (
    Walk,
    emit_items,
    emit_row_positions,
    emit_tiles,
    group_size,
    match_array,
    match_qkv,
    match_strided,
    match_walk,
)
from splatc.codegen.kernel import KernelSpec
from splatc.ir.score import Softcap

DQ, DKV = "splatc_attention_dq", "splatc_attention_dkv"


def attention_backward_cpu(spec: KernelSpec) -> tvm.IRModule:
    """The module with the functions "splatc_attention_dq" and "splatc_attention_dkv", not lowered. Arguments:

    dq   q, k, v, do, lse, delta; dq; the tables of the mask; scale, cap, merge; terms; of biases
    dkv  q, k, v, do, lse, delta; dk, dv; the tables of the transposed mask; scale, cap, merge, member; terms

    q, k, v, do: of the spec's dtype, (batch, heads, seq, dim), any strides with a contiguous last axis; dq, dk, dv the
    same, in the type of computations, as are lse (natural log) and delta: (batch, heads, q_len), contiguous. merge:
    whether to add to the results in memory. dkv works for key heads h, which its table `work` names, and of each for
    query head h * group + member: a launch for each member sums them in a fixed order. terms: cpu_score.match_terms; of
    biases: match_bias_gradients, of what the Score has.
    """
    s = shape_of(spec)
    return tvm.IRModule({DQ: _query_gradient(s), DKV: _key_gradients(s)})


@dataclass(frozen=True)
class Tensors:
    """What both functions read."""

    q: Expr
    k: Expr
    v: Expr
    do: Expr
    lse: Expr
    delta: Expr


def match_tensors(s: Shape) -> Tensors:
    """Declare the tensors that both functions read."""
    q, k, v = match_qkv(s)
    rows = tuple(q.shape[:3])
    return Tensors(
        q, k, v, do=match_strided("do", (*rows, T.int64(s.dv)), s.dtype), lse=match_array("lse", rows, s.acc),
        delta=match_array("delta", rows, s.acc),
    )  # fmt: skip


class Statistics(Protocol):
    """LSE in the log2 domain (0 where it is -inf) and delta, for column j and the rows from ``row`` on."""

    def lse(self, j: Expr, row: Expr) -> Expr: ...

    def delta(self, j: Expr, row: Expr) -> Expr: ...


class StatisticsOfRows:
    """Queries are the rows of the tile."""

    def __init__(self, s: Shape) -> None:
        self.s, self.lses, self.deltas = s, s.scratch(s.m), s.scratch(s.m)

    def lse(self, j: Expr, row: Expr) -> Expr:
        return load(self.lses, row, self.s.lanes)

    def delta(self, j: Expr, row: Expr) -> Expr:
        return load(self.deltas, row, self.s.lanes)


class StatisticsOfColumns:
    """Queries are the columns of the tile."""

    def __init__(self, s: Shape) -> None:
        self.s, self.lses, self.deltas = s, s.scratch(s.n), s.scratch(s.n)

    def lse(self, j: Expr, row: Expr) -> Expr:
        return T.Broadcast(self.lses[j], self.s.lanes)

    def delta(self, j: Expr, row: Expr) -> Expr:
        return T.Broadcast(self.deltas[j], self.s.lanes)


class Scratch:
    """A worker's own buffers; those named *t are transposed as in the forward kernel."""

    def __init__(self, s: Shape, factor: Expr, cap: Expr, terms: TermArguments, queries_are_rows: bool) -> None:
        """factor: scale * log2(e). cap: of scores times log2(e)."""
        cap = I.Bind(T.Broadcast(cap, s.lanes))
        self.x1t, self.x2t = s.scratch(s.m * s.d_pitch), s.scratch(s.m * s.dv_pitch)  # x1: times s.of_rows(factor)
        self.y1, self.y2 = s.scratch(s.n * s.d), s.scratch(s.n * s.dv)
        self.p = s.scratch(s.n * s.width)  # of one block, as the next two
        self.ds = s.scratch(s.n * s.width)
        self.slope = s.scratch(s.n * s.width) if s.score.has(Softcap) else None
        self.sum1t = s.scratch(s.m * s.d_pitch)  # over columns: dS * y1
        self.rows = s.scratch(s.m * max(s.d_pitch, s.dv_pitch))
        self.row_pos, self.col_pos = scratch(s.m, "int32"), scratch(s.n, "int32")
        self.terms = TermEmitter(s, terms, factor, cap, self.row_pos, self.col_pos, queries_are_rows)
        self.kept = kept_of(s, self.row_pos, keys_are_rows=not queries_are_rows)


def _query_gradient(s: Shape) -> Expr:
    with IRBuilder() as builder:
        with I.prim_func(s_tir=True):
            I.func_name(DQ)
            t = match_tensors(s)
            dq = match_strided("dq", tuple(t.q.shape), s.acc)
            walk, scale, cap, merge = match_walk(s), *_scalars(s)
            terms, biases = match_terms(s), match_bias_gradients(s, tuple(t.q.shape[:3]))
            with I.parallel(0, walk.chunks.shape[0] - 1) as worker:
                _dq_worker(t, dq, walk, s, worker, scale, cap, merge, terms, biases)
    return builder.get().with_attr("global_symbol", DQ)


def _key_gradients(s: Shape) -> Expr:
    with IRBuilder() as builder:
        with I.prim_func(s_tir=True):
            I.func_name(DKV)
            t = match_tensors(s)
            dk, dv = match_strided("dk", tuple(t.k.shape), s.acc), match_strided("dv", tuple(t.v.shape), s.acc)
            walk, scale, cap, merge = match_walk(s), *_scalars(s)
            member, terms = I.arg("member", I.int32()), match_terms(s)
            with I.parallel(0, walk.chunks.shape[0] - 1) as worker:
                _dkv_worker(t, dk, dv, walk, s, worker, scale, cap, merge, member, terms)
    return builder.get().with_attr("global_symbol", DKV)


def _scalars(s: Shape) -> tuple[Expr, Expr, Expr]:
    return I.arg("scale", s.scalar(None)), I.arg("cap", s.scalar(None)), I.arg("merge", I.int32())


def _dq_worker(
    t: Tensors, dq: Expr, walk: Walk, s: Shape, worker: Expr, scale: Expr, cap: Expr, merge: Expr,
    arguments: TermArguments, outputs: BiasGradients,
) -> None:  # fmt: skip
    factor, group = scale * s.scalar(LOG2E), group_size(t.q, t.k)
    b = Scratch(s, factor, cap * s.scalar(LOG2E), arguments, queries_are_rows=True)
    stats, biases = StatisticsOfRows(s), BiasSums(s, outputs, b.terms, worker) if s.score.biases else None

    def one(batch: Expr, head: Expr, item: Expr) -> None:
        at, at_kv = (batch, head), (batch, I.Bind(T.truncdiv(head, group)))
        emit_row_positions(walk, item, b.row_pos, t.q.shape[2])
        b.terms.emit_begin_rows(*at)
        emit_pack_transposed(b.x1t, b.rows, t.q, at, b.row_pos, s.d, s.d_pitch, s, s.of_rows(factor))
        emit_pack_transposed(b.x2t, b.rows, t.do, at, b.row_pos, s.dv, s.dv_pitch, s, s.scalar(1.0))
        emit_pack_statistics(stats.lses, stats.deltas, t, at, b.row_pos, s.m, s)
        emit_fill(b.sum1t, s.m * s.d_pitch, 0.0, s)
        if biases is not None:
            biases.emit_begin()

        def pack() -> None:
            b.terms.emit_begin_columns()
            emit_pack_rows(b.y1, s.d, t.k, at_kv, b.col_pos, s.n, s.d, s)
            emit_pack_rows(b.y2, s.dv, t.v, at_kv, b.col_pos, s.n, s.dv, s)

        emit_tiles(walk, item, b.col_pos, t.k.shape[2], pack, lambda bits: emit_tile(b, s, stats, bits, None, biases))
        emit_gradient(dq, at, b, b.sum1t, s.d_pitch, s.d, s, scale, merge)
        if biases is not None:
            biases.emit_end(at, merge)

    emit_items(walk, worker, one)


def _dkv_worker(
    t: Tensors, dk: Expr, dv: Expr, walk: Walk, s: Shape, worker: Expr, scale: Expr, cap: Expr, merge: Expr,
    member: Expr, arguments: TermArguments,
) -> None:  # fmt: skip
    factor, group = scale * s.scalar(LOG2E), group_size(t.q, t.k)
    b = Scratch(s, factor, cap * s.scalar(LOG2E), arguments, queries_are_rows=False)
    stats, sum2t = StatisticsOfColumns(s), s.scratch(s.m * s.dv_pitch)

    def one(batch: Expr, head: Expr, item: Expr) -> None:
        at, at_q = (batch, head), (batch, I.Bind(head * group + member))
        emit_row_positions(walk, item, b.row_pos, t.k.shape[2])
        b.terms.emit_begin_rows(*at_q)
        emit_pack_transposed(b.x1t, b.rows, t.k, at, b.row_pos, s.d, s.d_pitch, s, s.of_rows(factor))
        emit_pack_transposed(b.x2t, b.rows, t.v, at, b.row_pos, s.dv, s.dv_pitch, s, s.scalar(1.0))
        emit_fill(b.sum1t, s.m * s.d_pitch, 0.0, s)
        emit_fill(sum2t, s.m * s.dv_pitch, 0.0, s)

        def pack() -> None:
            b.terms.emit_begin_columns()
            emit_pack_rows(b.y1, s.d, t.q, at_q, b.col_pos, s.n, s.d, s)
            emit_pack_rows(b.y2, s.dv, t.do, at_q, b.col_pos, s.n, s.dv, s)
            emit_pack_statistics(stats.lses, stats.deltas, t, at_q, b.col_pos, s.n, s)

        emit_tiles(walk, item, b.col_pos, t.q.shape[2], pack, lambda bits: emit_tile(b, s, stats, bits, sum2t))
        emit_gradient(dk, at, b, b.sum1t, s.d_pitch, s.d, s, scale, merge)
        emit_gradient(dv, at, b, sum2t, s.dv_pitch, s.dv, s, s.scalar(1.0), merge)

    emit_items(walk, worker, one)


def emit_pack_statistics(lses: Expr, deltas: Expr, t: Tensors, at: At, pos: Expr, count: int, s: Shape) -> None:
    """The statistics of the queries of one side of a tile; 0 for invalid lanes.

    A query that attends to nothing has LSE -inf; what meets it is masked, and 0 keeps its scores numbers.
    """
    with I.serial(0, count) as i:
        I.buffer_store(lses, s.scalar(0.0), [i])
        I.buffer_store(deltas, s.scalar(0.0), [i])
        p = I.Bind(pos[i])
        with I.If(p >= 0), I.Then():
            lse = I.Bind(t.lse[at[0], at[1], p])
            # (== is false for a NaN, and so is TVM's !=)
            base = T.Select(T.EQ(lse, s.scalar(NEG_INF)), s.scalar(0.0), lse * s.scalar(LOG2E))
            I.buffer_store(lses, base, [i])
            I.buffer_store(deltas, t.delta[at[0], at[1], p], [i])


def emit_tile(
    b: Scratch, s: Shape, stats: Statistics, bits: Bits | None, sum2t: Expr | None, biases: BiasSums | None = None
) -> None:
    """One packed tile: sum1t += dS * y1 and, where there are, sum2t += P * y2 and sums for biases. bits: None for a
    full tile."""
    held = b.kept or bits
    guard1 = None if held is None else emit_guard(held, b.y1, s.n * s.d, s)
    guard2 = None if held is None or sum2t is None else emit_guard(held, b.y2, s.n * s.dv, s)
    with I.serial(0, s.blocks) as block:
        emit_probabilities(b, s, block, stats, bits)
        emit_score_gradients(b, s, block, stats, held, sum2t is not None, biases)
        if biases is not None:
            biases.emit_add(block)
        emit_weighted_sum(b.sum1t, s.d_pitch, b.y1, s.d, b.ds, s, block, guard1)
        if sum2t is not None:
            emit_weighted_sum(sum2t, s.dv_pitch, b.y2, s.dv, b.p, s, block, guard2)


def emit_probabilities(b: Scratch, s: Shape, block: Expr, stats: Statistics, bits: Bits | None) -> None:
    """p[j, i] = exp2(<y1_j, x1_i> - LSE), 0 where a bit is off or what is pruned; with a softcap also its slope at the
    score."""

    def one(j: Expr, v: int, score: Expr) -> None:
        at, row = j * s.width + v * s.lanes, block * s.width + v * s.lanes
        score, slope = b.terms.apply(score, j, row)
        if slope is not None:
            store(b.slope, at, slope, s.lanes)
        if b.kept is not None:
            score = score if bits is None else T.Select(bits.on(s, j, row), score, s.constant(NEG_INF))
            store(b.p, at, score, s.lanes)
            return
        p = exp2(score - stats.lse(j, row), s.lanes, s.acc, flush=s.flush)
        store(b.p, at, p if bits is None else T.Select(bits.on(s, j, row), p, s.constant(0.0)), s.lanes)

    emit_dots(s, b.y1, b.x1t, s.d, s.d_pitch, block, one)
    if b.kept is None:
        return
    b.kept.emit(b.p, block)
    with I.serial(0, s.n) as j, I.serial(0, s.vecs) as v:
        at, row = j * s.width + v * s.lanes, block * s.width + v * s.lanes
        p = exp2(load(b.p, at, s.lanes) - stats.lse(j, row), s.lanes, s.acc, flush=s.flush)
        store(b.p, at, T.Select(b.kept.on(s, j, row), p, s.constant(0.0)), s.lanes)


def emit_score_gradients(
    b: Scratch, s: Shape, block: Expr, stats: Statistics, held: Bits | Kept | None, drop: bool, biases: BiasSums | None
) -> None:
    """ds[j, i] = p[j, i] * (<y2_j, x2_i> - delta) * slope, 0 where it is off: delta may not be a number there.

    drop: then drop from p what dropout drops. biases: are told ds without the slope.
    """

    def one(j: Expr, v: int, dp: Expr) -> None:
        at, row = j * s.width + v * s.lanes, block * s.width + v * s.lanes
        def masked(x: Expr) -> Expr:
            return x if held is None else T.Select(held.on(s, j, row), x, s.constant(0.0))

        ds = load(b.p, at, s.lanes) * (b.terms.emit_dropped(dp, j, row) - stats.delta(j, row))
        if biases is not None:
            ds = I.Bind(ds)
            biases.emit_store(at, row, masked(ds))
        if s.score.has(Softcap):
            ds = ds * load(b.slope, at, s.lanes)
        store(b.ds, at, masked(ds), s.lanes)
        if drop and s.score.dropout:
            store(b.p, at, b.terms.emit_dropped(load(b.p, at, s.lanes), j, row), s.lanes)

    emit_dots(s, b.y2, b.x2t, s.dv, s.dv_pitch, block, one)


def emit_gradient(
    out: Expr, at: At, b: Scratch, sum_t: Expr, pitch: int, dim: int, s: Shape, factor: Expr, merge: Expr
) -> None:
    """The valid rows of out = sum_t * factor, added to what is there with merge."""
    emit_transpose_out(b.rows, sum_t, s, pitch, lambda row: T.Broadcast(factor, s.lanes))
    emit_unpack_rows(out, at, b.row_pos, b.rows, pitch, dim, s, add=T.NE(merge, 0))
