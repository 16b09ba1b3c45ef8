"""The parts of the portable CUDA kernel: each emits one step of a block; codegen/cuda.py puts them together.

Here g is the kernel's Blocking, (ty, tx) the thread's place in the SIDE x SIDE grid; tiles are fp32 in shared
memory. Loops whose counts depend on g alone are unrolled, so that thread-local arrays live in registers.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from splatc.codegen.constants import FULL_WARP, LN2, LOG2E, NEG_INF, ceil_div

THREADS = 256
SIDE = 16  # the threads form a SIDE x SIDE grid
WARPS = THREADS // 32


def flat_offset(base: Any, position: Any, stride: Any, column: Any) -> Any:
    """The int64 element offset of a column of a sequence position."""
    return base + T.cast(position, "int64") * stride + T.cast(column, "int64")


def from_lane(value: Any, distance: Any) -> Any:
    """The value of the lane whose number differs by xor `distance`; below SIDE it stays inside a row."""
    return T.tvm_warp_shuffle_xor(T.uint32(FULL_WARP), value, distance, 32, 32)


@T.inline
def locate_lanes(positions, views, view, x1, x2, x3, lanes, length, tid):
    """Set positions[i] to the sequence position of tile lane i, -1 outside the view or the sequence."""
    if tid < lanes:
        b1: T.let = views[view, 6]
        b2: T.let = views[view, 7]
        y1: T.let = x1 + T.truncmod(tid, b1)
        y2: T.let = x2 + T.truncmod(T.truncdiv(tid, b1), b2)
        y3: T.let = x3 + T.truncdiv(tid, b1 * b2)
        n1: T.let = views[view, 0]
        n2: T.let = views[view, 1]
        n3: T.let = views[view, 2]
        position: T.int32 = y1 * views[view, 3] + y2 * views[view, 4] + y3 * views[view, 5]
        if y1 < 0 or y1 >= n1 or y2 < 0 or y2 >= n2 or y3 < 0 or y3 >= n3:
            position = -1
        if position >= T.cast(length, "int32"):
            position = -1
        positions[tid] = position


@T.inline
def stage_rows(tile, column, source, base, row_stride, positions, count, first, width, tid):
    """Copy dims first .. first+width-1 of the rows at `positions` to tile[:, column:]; zero where none."""
    warp: T.let = tid // 32
    lane: T.let = tid % 32
    hold = T.alloc_local((count // WARPS * ceil_div(width, 32),), "float32")  # every load before any store
    for r in T.unroll(count // WARPS):
        position: T.int32 = positions[r * WARPS + warp]
        for c in T.unroll(ceil_div(width, 32)):
            hold[r * ceil_div(width, 32) + c] = T.float32(0)
            if position >= 0 and c * 32 + lane < width:
                offset: T.let = flat_offset(base, position, row_stride, first + c * 32 + lane)
                hold[r * ceil_div(width, 32) + c] = T.cast(source[offset], "float32")
    for r in T.unroll(count // WARPS):
        for c in T.unroll(ceil_div(width, 32)):
            tile[r * WARPS + warp, column + c * 32 + lane] = hold[r * ceil_div(width, 32) + c]


@T.inline
def add_scores(g, scores, q_tile, kv_tile, first, width, ty, tx):
    """Add Q K^T to the scores over the dimensions first .. first+width-1, whose K is staged."""
    q = T.alloc_local((g.rows * 4,), "float32")
    k = T.alloc_local((g.cols * 4,), "float32")
    for d in range(ceil_div(width, 4)):
        for i in T.unroll(g.rows):
            for u in T.vectorized(4):
                q[i * 4 + u] = q_tile[ty * g.rows + i, first + d * 4 + u]
        for j in T.unroll(g.cols):
            for u in T.vectorized(4):
                k[j * 4 + u] = kv_tile[j * SIDE + tx, d * 4 + u]
        for i in T.unroll(g.rows):
            for j in T.unroll(g.cols):
                for u in T.unroll(4):
                    scores[i * g.cols + j] = scores[i * g.cols + j] + q[i * 4 + u] * k[j * 4 + u]


@T.inline
def scale_scores(g, scores, factor):
    """Multiply the scores by factor."""
    for i in T.unroll(g.rows * g.cols):
        scores[i] = scores[i] * factor


@T.inline
def cap_scores(g, scores, scale, cap):
    """scores = tanh(scores * scale / cap), as 1 - 2 / (1 + exp(2x)); the cap itself is the caller's factor then."""
    for i in T.unroll(g.rows * g.cols):
        power = T.exp2(scores[i] * (scale / cap * T.float32(2 * LOG2E)))
        scores[i] = T.float32(1) - T.float32(2) / (T.float32(1) + power)


@T.inline
def mask_scores(g, scores, bits, tile, ty, tx):
    """Put -inf where the bit is clear; the rows of one thread lie in one word of a column."""
    for j in T.unroll(g.cols):
        shift: T.let = T.cast(ty * g.rows % 32, "uint32")
        word: T.uint32 = T.shift_right(bits[tile, j * SIDE + tx, ty * g.rows // 32], shift)
        for i in T.unroll(g.rows):
            if T.bitwise_and(T.shift_right(word, T.cast(i, "uint32")), T.uint32(1)) == T.uint32(0):
                scores[i * g.cols + j] = T.float32(NEG_INF)


@T.inline
def zero_masked(g, first, second, bits, tile, ty, tx):
    """Put 0 into both where the bit is clear, whatever was there."""
    for j in T.unroll(g.cols):
        shift: T.let = T.cast(ty * g.rows % 32, "uint32")
        word: T.uint32 = T.shift_right(bits[tile, j * SIDE + tx, ty * g.rows // 32], shift)
        for i in T.unroll(g.rows):
            if T.bitwise_and(T.shift_right(word, T.cast(i, "uint32")), T.uint32(1)) == T.uint32(0):
                first[i * g.cols + j] = T.float32(0)
                second[i * g.cols + j] = T.float32(0)


@T.inline
def update_softmax(g, scores, row_max, row_sum, acc, p_tile, ty, tx):
    """One online softmax step: scores become P, in shared memory; the state moves to the new maximum."""
    top = T.alloc_local((1,), "float32")
    for i in T.unroll(g.rows):
        top[0] = row_max[i]
        for j in T.unroll(g.cols):
            top[0] = T.max(top[0], scores[i * g.cols + j])
        for step in T.unroll(4):
            top[0] = T.max(top[0], from_lane(top[0], T.shift_left(1, step)))
        shift: T.float32 = T.if_then_else(top[0] == T.float32(NEG_INF), T.float32(0), top[0])
        decay: T.float32 = T.exp2(row_max[i] - shift)
        row_max[i] = top[0]
        row_sum[i] = row_sum[i] * decay
        for j in T.unroll(g.cols):
            scores[i * g.cols + j] = T.exp2(scores[i * g.cols + j] - shift)
            row_sum[i] = row_sum[i] + scores[i * g.cols + j]
            p_tile[ty * g.rows + i, j * SIDE + tx] = scores[i * g.cols + j]
        for c in T.unroll(len(g.dv_chunks)):
            for u in T.unroll(g.vec):
                acc[(c * g.rows + i) * g.vec + u] = acc[(c * g.rows + i) * g.vec + u] * decay


@T.inline
def add_values(g, acc, p_tile, kv_tile, chunk, ty, tx):
    """Add P V to acc for one chunk of the value dimension, whose V is staged."""
    p = T.alloc_local((g.rows * 4,), "float32")
    value = T.alloc_local((g.vec,), "float32")
    for j in range(g.n // 4):
        for i in T.unroll(g.rows):
            for u in T.vectorized(4):
                p[i * 4 + u] = p_tile[ty * g.rows + i, j * 4 + u]
        for u in T.unroll(4):
            for x in T.vectorized(g.vec):
                value[x] = kv_tile[j * 4 + u, tx * g.vec + x]
            for i in T.unroll(g.rows):
                for x in T.unroll(g.vec):
                    acc[(chunk * g.rows + i) * g.vec + x] = (
                        acc[(chunk * g.rows + i) * g.vec + x] + p[i * 4 + u] * value[x]
                    )


@T.inline
def start_state(g, row_max, row_sum, acc, output, o_base, o_stride, lse, b, head, row_pos, merge, ty, tx):
    """An empty state; with merge, that of the passes before: maximum LSE, sum 1 (held by tx = 0), acc = O."""
    for i in T.unroll(g.accumulators):
        acc[i] = T.float32(0)
    for i in T.unroll(g.rows):
        row_max[i] = T.float32(NEG_INF)
        row_sum[i] = T.float32(0)
        position: T.int32 = row_pos[ty * g.rows + i]
        if merge != 0 and position >= 0:
            before: T.float32 = lse[b, head, position]
            if before != T.float32(NEG_INF):
                row_max[i] = before * T.float32(LOG2E)
                if tx == 0:
                    row_sum[i] = T.float32(1)
                for c in T.unroll(len(g.dv_chunks)):
                    for u in T.unroll(g.vec):
                        column: T.let = c * g.chunk + tx * g.vec + u
                        if column < g.dv:
                            offset: T.let = flat_offset(o_base, position, o_stride, column)
                            acc[(c * g.rows + i) * g.vec + u] = T.cast(output[offset], "float32")


@T.inline
def store_state(g, row_max, row_sum, acc, output, o_base, o_stride, lse, b, head, row_pos, ty, tx):
    """Store O = acc / sum and LSE of the valid rows; 0 and -inf for a row that attended to nothing."""
    total = T.alloc_local((1,), "float32")
    for i in T.unroll(g.rows):
        total[0] = row_sum[i]
        for step in T.unroll(4):
            total[0] = total[0] + from_lane(total[0], T.shift_left(1, step))
        position: T.int32 = row_pos[ty * g.rows + i]
        empty: T.let = total[0] == T.float32(0)  # NaN is not empty: it reaches the output
        inverse: T.float32 = T.if_then_else(empty, T.float32(0), T.float32(1) / total[0])
        if position >= 0:
            if tx == 0:
                natural: T.let = (row_max[i] + T.log2(total[0])) * T.float32(LN2)
                lse[b, head, position] = T.if_then_else(empty, T.float32(NEG_INF), natural)
            for c in T.unroll(len(g.dv_chunks)):
                for u in T.unroll(g.vec):
                    column: T.let = c * g.chunk + tx * g.vec + u
                    if column < g.dv:
                        offset: T.let = flat_offset(o_base, position, o_stride, column)
                        output[offset] = T.cast(acc[(c * g.rows + i) * g.vec + u] * inverse, output.dtype)


def stage_q(g: Any, q_tile: Any, source: Any, base: Any, stride: Any, row_pos: Any, tid: Any) -> None:
    """The whole Q tile, chunk by chunk."""
    for first, width in g.d_chunks:
        stage_rows(q_tile, first, source, base, stride, row_pos, g.m, first, width, tid)


def add_all_scores(
    g: Any, scores: Any, q_tile: Any, kv_tile: Any, source: Any, base: Any, stride: Any, col_pos: Any,
    tid: Any, ty: Any, tx: Any,
) -> None:  # fmt: skip
    """Scores = Q K^T: stage a chunk of K, add its part, until the score dimension is done."""
    for i in range(g.rows * g.cols):
        T.buffer_store(scores, T.float32(0), [i])
    for first, width in g.d_chunks:
        T.evaluate(T.cuda.cta_sync())
        stage_rows(kv_tile, 0, source, base, stride, col_pos, g.n, first, width, tid)
        T.evaluate(T.cuda.cta_sync())
        add_scores(g, scores, q_tile, kv_tile, first, width, ty, tx)


def add_all_values(
    g: Any, acc: Any, p_tile: Any, kv_tile: Any, source: Any, base: Any, stride: Any, col_pos: Any,
    tid: Any, ty: Any, tx: Any,
) -> None:  # fmt: skip
    """Add P V to acc: stage a chunk of V, add its product, until the value dimension is done."""
    for chunk, (first, width) in enumerate(g.dv_chunks):
        T.evaluate(T.cuda.cta_sync())
        stage_rows(kv_tile, 0, source, base, stride, col_pos, g.n, first, width, tid)
        T.evaluate(T.cuda.cta_sync())
        add_values(g, acc, p_tile, kv_tile, chunk, ty, tx)
