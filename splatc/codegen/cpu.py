"""The fused tile-sparse attention forward kernel for CPUs, as TIRx for TVM's LLVM target.

Lanes are queries: scores S^T = K Q^T and outputs O^T = V^T P^T are kept transposed. So the softmax needs no
horizontal reduction, and both products are one register tile: a scalar of K or V, broadcast, times vectors
of queries. Q is packed once an item, K and V once a tile, to fp32 buffers that stay in L1 and L2; packing
does the views, the strides, the zero fill and the dtype: the arithmetic (cpu_tile.py) sees none of them.

Build: tvm.compile(attention_cpu(spec), target=llvm_target(arch)).
"""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.target.codegen import target_has_features
from tvm.tirx.script.builder import ir as I

from splatc.codegen.constants import NEG_INF
from splatc.codegen.cpu_tile import Bits, Scratch, Shape, emit_tile
from splatc.codegen.cpu_vector import (
    LN2,
    LOG2E,
    Expr,
    constant,
    lane_range,
    load,
    pieces,
    store,
    transpose,
    vector_type,
)
from splatc.codegen.kernel import KernelSpec

NAME = "splatc_attention"
ALIGN = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}  # bytes of an element


def attention_cpu(spec: KernelSpec) -> tvm.IRModule:
    """The module with the one function "splatc_attention", not lowered; its arguments are the kernel ABI's.

    Any head_dim, v_head_dim and tile_n; tile_m a multiple of 32.
    """
    s = shape_of(spec)
    with IRBuilder() as builder:
        with I.prim_func(s_tir=True):  # tirx functions have layouts, and those disregard strides
            I.func_name(NAME)
            t = match_tensors(s)
            scale = I.arg("scale", s.scalar(None))
            cap = I.arg("cap", s.scalar(None))
            merge = I.arg("merge", I.int32())
            with I.parallel(0, t.chunks.shape[0] - 1) as worker:
                emit_worker(t, s, worker, scale * s.scalar(LOG2E), cap * s.scalar(LOG2E), merge)
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
    return Shape(spec.head_dim, spec.v_head_dim, spec.tile_m, spec.tile_n, spec.dtype, spec.softcap, lanes, vecs, rows)


@dataclass(frozen=True)
class Tensors:
    """The buffers that the function is called with (see the kernel ABI)."""

    q: Expr
    k: Expr
    v: Expr
    o: Expr
    lse: Expr
    work: Expr
    items: Expr
    entries: Expr
    views: Expr
    bits: Expr
    chunks: Expr


def match_tensors(s: Shape) -> Tensors:
    """Declare the tensor arguments, in the order of the ABI; lengths and strides are symbolic."""
    batch, heads, kv_heads, q_len, kv_len = (I.int64() for _ in range(5))
    d, dv = T.int64(s.d), T.int64(s.dv)

    def strided(name: str, *shape: Expr) -> Expr:
        strides = [*(I.int64() for _ in shape[1:]), T.int64(1)]
        return I.match_buffer(I.arg(name, I.handle()), shape, s.dtype, strides=strides, align=ALIGN[s.dtype])

    def table(name: str, *shape: Expr, dtype: str = "int32") -> Expr:
        return I.match_buffer(I.arg(name, I.handle()), shape, dtype, align=ALIGN.get(dtype, 4))

    return Tensors(
        q=strided("q", batch, heads, q_len, d),
        k=strided("k", batch, kv_heads, kv_len, d),
        v=strided("v", batch, kv_heads, kv_len, dv),
        o=strided("o", batch, heads, q_len, dv),
        lse=table("lse", batch, heads, q_len, dtype=s.acc),
        work=table("work", I.int32(), 2),
        items=table("items", I.int32(), 8),
        entries=table("entries", I.int32(), 8),
        views=table("views", I.int32(), 12),
        bits=table("bits", I.int32(), s.n, s.m // 32, dtype="uint32"),
        chunks=table("chunks", I.int32()),
    )


def emit_worker(t: Tensors, s: Shape, worker: Expr, factor: Expr, cap: Expr, merge: Expr) -> None:
    """All items of one worker, one after the other; factor and cap are in the log2 domain."""
    b = Scratch(s, cap)
    works = t.work.shape[0]
    group = I.Bind(T.cast(T.truncdiv(t.q.shape[1], t.k.shape[1]), "int32"))
    with I.serial(t.chunks[worker], t.chunks[worker + 1]) as w:
        slot = I.Bind(T.truncmod(w, works))
        batch = I.Bind(T.truncdiv(w, works))
        head = I.Bind(t.work[slot, 0])
        kv_head = I.Bind(T.truncdiv(head, group))
        item = I.Bind(t.work[slot, 1])
        origin = [t.items[item, i] for i in range(3)]
        emit_positions(b.row_pos, t.views, t.items[item, 5], origin, t.q.shape[2])
        emit_pack_q(t, b, s, (batch, head), factor)
        emit_start(t, b, s, (batch, head), merge)
        first = I.Bind(t.items[item, 3])
        with I.serial(first, first + t.items[item, 4]) as e:
            emit_entry(t, b, s, (batch, kv_head), e)
        emit_finish(t, b, s, (batch, head))


def emit_entry(t: Tensors, b: Scratch, s: Shape, at: tuple[Expr, Expr], e: Expr) -> None:
    """The `repeat` tiles of an entry."""
    view = I.Bind(t.entries[e, 5])
    bits = I.Bind(t.entries[e, 4])
    with I.serial(0, t.entries[e, 3]) as r:
        origin = [I.Bind(t.entries[e, i] + r * t.views[view, 9 + i]) for i in range(3)]
        emit_positions(b.col_pos, t.views, view, origin, t.k.shape[2])
        emit_pack_rows(b.k, s.d, t.k, at, b.col_pos, s.n, s.d, s)
        emit_pack_rows(b.v, s.dv, t.v, at, b.col_pos, s.n, s.dv, s)
        with I.If(T.EQ(bits, 0)):
            with I.Then():
                emit_tile(b, s, None)
            with I.Else():
                emit_tile(b, s, Bits(t.bits, bits - 1))


def emit_positions(pos: Expr, views: Expr, view: Expr, origin: list[Expr], length: Expr) -> None:
    """pos[lane] = the position of each lane of the view's box at `origin`, -1 if it is invalid."""
    n, stride, box = ([I.Bind(views[view, 3 * g + i]) for i in range(3)] for g in range(3))
    length = I.Bind(T.cast(length, "int32"))
    with I.serial(0, box[2]) as i3, I.serial(0, box[1]) as i2:
        x2, x3 = I.Bind(origin[1] + i2), I.Bind(origin[2] + i3)
        inside = I.Bind(T.And(T.And(x2 >= 0, x2 < n[1]), T.And(x3 >= 0, x3 < n[2])))
        base = I.Bind(x2 * stride[1] + x3 * stride[2])
        lane = I.Bind((i3 * box[1] + i2) * box[0])
        with I.serial(0, box[0]) as i1:
            x1 = I.Bind(origin[0] + i1)
            p = I.Bind(x1 * stride[0] + base)
            valid = T.And(T.And(inside, T.And(x1 >= 0, x1 < n[0])), p < length)
            I.buffer_store(pos, T.Select(valid, p, T.int32(-1)), [lane + i1])


def emit_pack_rows(
    dst: Expr, pitch: int, src: Expr, at: tuple[Expr, Expr], pos: Expr, count: int, dim: int, s: Shape
) -> None:
    """dst[j * pitch + d] = src[*at, pos[j], d] for j < count and d < dim; 0 where pos[j] < 0."""
    with I.serial(0, count) as j:
        p = I.Bind(pos[j])
        with I.If(p >= 0):
            with I.Then():
                for d, width in pieces(dim, s.lanes):
                    value = src[at[0], at[1], p, lane_range(d, width)].astype(vector_type(width, s.acc))
                    store(dst, j * pitch + d, value, width)
            with I.Else():
                for d, width in pieces(dim, s.lanes):
                    store(dst, j * pitch + d, constant(0.0, width, s.acc), width)


def emit_pack_q(t: Tensors, b: Scratch, s: Shape, at: tuple[Expr, Expr], factor: Expr) -> None:
    """qt = the item's rows of Q, transposed, times factor (0 for invalid rows)."""
    emit_pack_rows(b.rows, s.d_pitch, t.q, at, b.row_pos, s.m, s.d, s)
    emit_transpose_in(b.qt, b.rows, s, s.d_pitch, factor)


def emit_transpose_in(dst: Expr, rows: Expr, s: Shape, pitch: int, factor: Expr) -> None:
    """dst[block, d, i] = rows[block * width + i, d] * factor."""
    n = s.lanes
    scale = I.Bind(T.Broadcast(factor, n))
    with I.serial(0, s.blocks) as block, I.serial(0, s.vecs) as v, I.serial(0, pitch // n) as c:
        row = block * s.width + v * n
        square = transpose([I.Bind(load(rows, (row + i) * pitch + c * n, n)) for i in range(n)])
        for d in range(n):
            store(dst, (block * pitch + c * n + d) * s.width + v * n, square[d] * scale, n)


def emit_start(t: Tensors, b: Scratch, s: Shape, at: tuple[Expr, Expr], merge: Expr) -> None:
    """The empty state; with merge the state in the outputs: m = LSE * log2(e), l = 1, acc = O."""
    with I.serial(0, s.m // s.lanes) as x:
        store(b.m, x * s.lanes, s.constant(NEG_INF), s.lanes)
        store(b.l, x * s.lanes, s.constant(0.0), s.lanes)
    with I.If(T.EQ(merge, 0)):
        with I.Then(), I.serial(0, s.m * s.dv_pitch // s.lanes) as x:
            store(b.ot, x * s.lanes, s.constant(0.0), s.lanes)
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


def emit_finish(t: Tensors, b: Scratch, s: Shape, at: tuple[Expr, Expr]) -> None:
    """O = acc / l (0 where l is 0) and LSE = (m + log2 l) * ln 2 (-inf where l is 0), for the valid rows."""
    emit_transpose_out(b, s)
    with I.serial(0, s.m) as i:
        p = I.Bind(b.row_pos[i])
        with I.If(p >= 0), I.Then():
            for d, width in pieces(s.dv, s.lanes):
                value = load(b.rows, i * s.dv_pitch + d, width).astype(vector_type(width, s.dtype))
                I.buffer_store(t.o, value, [at[0], at[1], p, lane_range(d, width)])
            I.buffer_store(t.lse, (b.m[i] + T.log2(b.l[i])) * s.scalar(LN2), [at[0], at[1], p])


def emit_transpose_out(b: Scratch, s: Shape) -> None:
    """rows[block * width + i, d] = ot[block, d, i] / l[i], 0 where l is 0."""
    n = s.lanes
    with I.serial(0, s.blocks) as block, I.serial(0, s.vecs) as v:
        row = block * s.width + v * n
        l = I.Bind(load(b.l, row, n))
        inverse = I.Bind(T.Select(T.EQ(l, s.constant(0.0)), s.constant(0.0), s.constant(1.0) / l))
        with I.serial(0, s.dv_pitch // n) as c:
            first = block * s.dv_pitch + c * n
            square = [load(b.ot, (first + d) * s.width + v * n, n) * inverse for d in range(n)]
            for i, vector in enumerate(transpose([I.Bind(x) for x in square])):
                store(b.rows, (row + i) * s.dv_pitch + c * n, vector, n)
