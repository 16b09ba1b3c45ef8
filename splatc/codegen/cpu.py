"""The fused tile-sparse attention forward kernel for CPUs, as TIRx for TVM's LLVM target.

Lanes are queries: scores S^T = K Q^T and outputs O^T = V^T P^T are kept transposed. So the softmax needs no
horizontal reduction, and both products are one register tile: a scalar of K or V, broadcast, times vectors
of queries. Q is packed once an item, K and V once a tile (cpu_pack.py).

Build: compile_cpu(attention_cpu(spec), arch) of build.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.target.codegen import target_has_features
from tvm.tirx.script.builder import ir as I

from splatc.codegen.constants import NEG_INF
from splatc.codegen.cpu_pack import (
    At,
    emit_fill,
    emit_pack_rows,
    emit_pack_transposed,
    emit_transpose_in,
    emit_transpose_out,
    emit_unpack_rows,
)
from splatc.codegen.cpu_prune import kept_of
from splatc.codegen.cpu_score import TermArguments, TermEmitter, match_terms
from splatc.codegen.cpu_tile import Scratch, Shape, emit_tile
from splatc.codegen.cpu_vector import LN2, LOG2E, Expr, load
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

NAME = "splatc_attention"


def attention_cpu(spec: KernelSpec) -> tvm.IRModule:
    """The module with the one function "splatc_attention", not lowered; its arguments are the kernel ABI's.

    Any head_dim, v_head_dim and tile_n; tile_m a multiple of 32.
    """
    s = shape_of(spec)
    with IRBuilder() as builder:
        with I.prim_func(s_tir=True):  # tirx functions have layouts, and those disregard strides
            I.func_name(NAME)
            t = match_tensors(s)
            walk = match_walk(s)
            scale = I.arg("scale", s.scalar(None))
            cap = I.arg("cap", s.scalar(None))
            merge = I.arg("merge", I.int32())
            terms = match_terms(s)
            with I.parallel(0, walk.chunks.shape[0] - 1) as worker:
                emit_worker(t, walk, s, worker, scale * s.scalar(LOG2E), cap * s.scalar(LOG2E), merge, terms)
    return tvm.IRModule({NAME: builder.get().with_attr("global_symbol", NAME)})


def llvm_target(arch: str) -> dict[str, object]:
    """TVM's target for an LLVM CPU name such as "znver4", "x86-64-v3" or "generic"."""
    return {"kind": "llvm", "mcpu": arch, "opt-level": 3}


def shape_of(spec: KernelSpec) -> Shape:
    """Fit the register tile to the vector registers of spec.target.arch (half of them hold accumulators)."""
    target = tvm.target.Target(llvm_target(spec.target.arch))
    if target_has_features("avx512f", target):
        lanes, vecs, rows = 16, 4, 4
    elif target_has_features("avx2", target):
        lanes, vecs, rows = 8, 2, 4
    elif target_has_features("neon", target):
        lanes, vecs, rows = 4, 4, 4
    else:
        lanes, vecs, rows = 4, 2, 4
    if spec.dtype == "float64":
        lanes //= 2
    while spec.tile_m % (lanes * vecs):
        vecs //= 2
    return Shape(spec.head_dim, spec.v_head_dim, spec.tile_m, spec.tile_n, spec.dtype, spec.score, lanes, vecs, rows)


@dataclass(frozen=True)
class Tensors:
    """The tensors that the function is called with, in the order of the ABI."""

    q: Expr
    k: Expr
    v: Expr
    o: Expr
    lse: Expr


def match_tensors(s: Shape) -> Tensors:
    """Declare the tensor arguments."""
    q, k, v = match_qkv(s)
    rows = tuple(q.shape[:3])
    return Tensors(q, k, v, o=match_strided("o", (*rows, T.int64(s.dv)), s.dtype), lse=match_array("lse", rows, s.acc))


def emit_worker(
    t: Tensors, walk: Walk, s: Shape, worker: Expr, factor: Expr, cap: Expr, merge: Expr, arguments: TermArguments
) -> None:
    """All items of one worker, one after the other; factor and cap are in the log2 domain."""
    cap = I.Bind(T.Broadcast(cap, s.lanes))
    b = Scratch(s)
    terms = TermEmitter(s, arguments, factor, cap, b.row_pos, b.col_pos)
    kept = kept_of(s, b.row_pos)
    group = group_size(t.q, t.k)

    def one(batch: Expr, head: Expr, item: Expr) -> None:
        at, at_kv = (batch, head), (batch, I.Bind(T.truncdiv(head, group)))
        emit_row_positions(walk, item, b.row_pos, t.q.shape[2])
        terms.emit_begin_rows(batch, head)
        emit_pack_transposed(b.qt, b.rows, t.q, at, b.row_pos, s.d, s.d_pitch, s, s.of_rows(factor))
        emit_start(t, b, s, at, merge, arguments.sinks)

        def pack() -> None:
            terms.emit_begin_columns()
            emit_pack_rows(b.k, s.d, t.k, at_kv, b.col_pos, s.n, s.d, s)
            emit_pack_rows(b.v, s.dv, t.v, at_kv, b.col_pos, s.n, s.dv, s)

        emit_tiles(walk, item, b.col_pos, t.k.shape[2], pack, lambda bits: emit_tile(b, s, terms, bits, kept))
        emit_finish(t, b, s, at)

    emit_items(walk, worker, one)


def emit_start(t: Tensors, b: Scratch, s: Shape, at: At, merge: Expr, sinks: Expr | None) -> None:
    """The empty state, with sinks m = sink * log2(e), l = 1; with merge the state in the outputs: m = LSE * log2(e),
    l = 1, acc = O."""
    emit_fill(b.m, s.m, NEG_INF, s)
    emit_fill(b.l, s.m, 0.0, s)
    with I.If(T.EQ(merge, 0)):
        with I.Then():
            emit_fill(b.ot, s.m * s.dv_pitch, 0.0, s)
            if sinks is not None:
                emit_fill(b.m, s.m, sinks[at[1]] * s.scalar(LOG2E), s)
                emit_fill(b.l, s.m, 1.0, s)
        with I.Else():
            with I.serial(0, s.m) as i:
                I.buffer_store(b.live_pos, T.int32(-1), [i])
                with I.If(b.row_pos[i] >= 0), I.Then():
                    lse = I.Bind(t.lse[at[0], at[1], b.row_pos[i]])
                    with I.If(lse > s.scalar(NEG_INF)), I.Then():
                        I.buffer_store(b.live_pos, b.row_pos[i], [i])
                        I.buffer_store(b.m, lse * s.scalar(LOG2E), [i])
                        I.buffer_store(b.l, s.scalar(1.0), [i])
            emit_pack_rows(b.rows, s.dv_pitch, t.o, at, b.live_pos, s.m, s.dv, s)
            emit_transpose_in(b.ot, b.rows, s, s.dv_pitch, s.scalar(1.0))


def emit_finish(t: Tensors, b: Scratch, s: Shape, at: At) -> None:
    """O = acc / l (0 where l is 0) and LSE = (m + log2 l) * ln 2 (-inf where l is 0), for the valid rows."""

    def inverse(row: Expr) -> Expr:
        l = I.Bind(load(b.l, row, s.lanes))
        return T.Select(T.EQ(l, s.constant(0.0)), s.constant(0.0), s.constant(1.0) / l)

    emit_transpose_out(b.rows, b.ot, s, s.dv_pitch, inverse)
    emit_unpack_rows(t.o, at, b.row_pos, b.rows, s.dv_pitch, s.dv, s)
    with I.serial(0, s.m) as i:
        p = I.Bind(b.row_pos[i])
        with I.If(p >= 0), I.Then():
            I.buffer_store(t.lse, (b.m[i] + T.log2(b.l[i])) * s.scalar(LN2), [at[0], at[1], p])
