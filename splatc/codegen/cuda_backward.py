"""Portable CUDA kernels for gradients (sm_80 and later): fp32 multiply-adds, no tensor cores, any alignment.

    P = exp(S - LSE)    dP = dO V^T    delta = rowsum(dO * O) - dLSE    dS = P * (dP - delta) * slope of the softcap
    dQ = scale * dS K   dK = scale * dS^T Q   dV = P^T dO

Two functions, as on a CPU (cpu_backward.py): dQ over the tables of the mask, rows being queries; dK and dV over those
of the transposed mask, rows being keys. Each result has one writer, so that no run differs from another. Both are one
kernel: the rows of a tile bring two tensors x1, x2 that stay, and its columns two that come by, y1, y2,

    function   x1   x2    y1   y2    LSE, delta of   sums over columns
    dq         Q    dO    K    V     rows            dS * y1
    dkv        K    V     Q    dO    columns         dS * y1, P * y2

with scores <x1, y1> and dP = <x2, y2>. The block of threads, its tiles in shared memory and its parts are those of the
forward kernel (cuda.py). Results are float32, whatever the inputs are: passes and query heads that share a key head add
to what is there.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import tvm
from tvm.script import tirx as T

from splatc.codegen.constants import LOG2E, NEG_INF
from splatc.codegen.cuda import MAX_ACCUMULATORS, PAD, Blocking, choose_blocking, smem_limit
from splatc.codegen.cuda_parts import (
    SIDE,
    THREADS,
    add_all_scores,
    add_all_values,
    cap_scores,
    flat_offset,
    locate_lanes,
    scale_scores,
    stage_q,
    zero_masked,
)
from splatc.codegen.emitted import DeviceFunction, Emitted
from splatc.codegen.kernel import DKV_FUNCTION as DKV
from splatc.codegen.kernel import DQ_FUNCTION as DQ
from splatc.codegen.kernel import KernelSpec
from splatc.errors import Unsupported


@dataclass(frozen=True)
class GradientBlocking:
    """Compile-time sizes of both functions: of <x1, y1> and sums of y1 (first), of <x2, y2> and sums of y2 (second)."""

    first: Blocking
    second: Blocking

    @property
    def smem_bytes(self) -> int:
        """Dynamic shared memory of one block: x1, x2, a chunk of y1 or y2, a tile of dS or P, and of every row and
        column its position, LSE and delta."""
        g = self.first
        rows = g.m * (g.q_stride + self.second.q_stride)
        return 4 * (rows + g.n * (g.chunk + PAD) + g.m * (g.n + PAD) + 3 * (g.m + g.n))

    @property
    def accumulators(self) -> int:
        """fp32 results of one thread of the function that has more."""
        return self.first.accumulators + self.second.accumulators


def gradient_blocking(spec: KernelSpec) -> GradientBlocking:
    """The widest chunk that fits the target's shared memory; raises Unsupported if none does."""
    g = choose_blocking(spec)
    limit = smem_limit(spec.target.arch)
    for chunk in (64, 32):
        first = replace(g, dv=g.d, chunk=chunk)
        both = GradientBlocking(first, replace(first, d=g.dv, dv=g.dv))
        if both.smem_bytes <= limit and both.accumulators <= MAX_ACCUMULATORS:
            return both
    raise Unsupported(
        f"gradients with head_dim {spec.head_dim} (v: {spec.v_head_dim}) need {both.smem_bytes} bytes of shared memory "
        f"and {spec.target.arch} has {limit}: use a smaller head_dim"
    )


def gradients_cuda(spec: KernelSpec) -> Emitted:
    """Both functions for spec.target; raises Unsupported where its limits do not allow them.

    To be launched with one block for each (batch, work row); there must be at least one.
    """
    g = gradient_blocking(spec)
    functions = {name: gradient_function(spec, g, name) for name in (DQ, DKV)}
    kernels = tuple(DeviceFunction(f"{name}_kernel", THREADS, g.smem_bytes) for name in functions)
    return Emitted(tvm.IRModule(functions), kernels)


def gradient_function(spec: KernelSpec, both: GradientBlocking, name: str) -> Any:
    """One of the functions: of keys (DKV), or of queries."""
    g, g2, dtype, of_keys = both.first, both.second, spec.dtype, name == DKV
    sums2 = g2.accumulators if of_keys else 1

    @T.prim_func
    def gradients(
        x1_arg: T.handle, x2_arg: T.handle, y1_arg: T.handle, y2_arg: T.handle, lse_arg: T.handle,
        delta_arg: T.handle, out1_arg: T.handle, out2_arg: T.handle, work_arg: T.handle, items_arg: T.handle,
        entries_arg: T.handle, views_arg: T.handle, bits_arg: T.handle, scale: T.float32, cap: T.float32,
        merge: T.int32, member: T.int32,
    ):  # fmt: skip
        batch = T.int64()
        x_heads = T.int64()
        y_heads = T.int64()
        x_len = T.int64()
        y_len = T.int64()
        n_work = T.int64()
        n_items = T.int64()
        n_entries = T.int64()
        n_views = T.int64()
        n_bits = T.int64()
        # element strides of batch, head, position
        xa0, xa1, xa2 = T.int64(), T.int64(), T.int64()
        xb0, xb1, xb2 = T.int64(), T.int64(), T.int64()
        ya0, ya1, ya2 = T.int64(), T.int64(), T.int64()
        yb0, yb1, yb2 = T.int64(), T.int64(), T.int64()
        oa0, oa1, oa2 = T.int64(), T.int64(), T.int64()
        ob0, ob1, ob2 = T.int64(), T.int64(), T.int64()
        x1 = T.match_buffer(x1_arg, (batch, x_heads, x_len, g.d), dtype, strides=(xa0, xa1, xa2, 1), layout=None)
        x2 = T.match_buffer(x2_arg, (batch, x_heads, x_len, g2.d), dtype, strides=(xb0, xb1, xb2, 1), layout=None)
        y1 = T.match_buffer(y1_arg, (batch, y_heads, y_len, g.d), dtype, strides=(ya0, ya1, ya2, 1), layout=None)
        y2 = T.match_buffer(y2_arg, (batch, y_heads, y_len, g2.d), dtype, strides=(yb0, yb1, yb2, 1), layout=None)
        out1 = T.match_buffer(
            out1_arg, (batch, x_heads, x_len, g.d), "float32", strides=(oa0, oa1, oa2, 1), layout=None
        )
        out2 = T.match_buffer(
            out2_arg, (batch, x_heads, x_len, g2.d), "float32", strides=(ob0, ob1, ob2, 1), layout=None
        )
        # of queries, whose heads and positions are those of the columns or of the rows
        lse = T.match_buffer(lse_arg, (batch * (y_heads if of_keys else x_heads) * (y_len if of_keys else x_len),))
        delta = T.match_buffer(delta_arg, (batch * (y_heads if of_keys else x_heads) * (y_len if of_keys else x_len),))
        work = T.match_buffer(work_arg, (n_work, 2), "int32")
        items = T.match_buffer(items_arg, (n_items, 8), "int32")
        entries = T.match_buffer(entries_arg, (n_entries, 8), "int32")
        views = T.match_buffer(views_arg, (n_views, 12), "int32")
        bits = T.match_buffer(bits_arg, (n_bits, g.n, g.m // 32), "uint32")
        # Flat aliases: this TVM ignores symbolic strides in device code, so offsets are written out in int64.
        x1_flat = T.decl_buffer((batch * xa0,), dtype, data=x1.data)
        x2_flat = T.decl_buffer((batch * xb0,), dtype, data=x2.data)
        y1_flat = T.decl_buffer((batch * ya0,), dtype, data=y1.data)
        y2_flat = T.decl_buffer((batch * yb0,), dtype, data=y2.data)
        out1_flat = T.decl_buffer((batch * oa0,), "float32", data=out1.data)
        out2_flat = T.decl_buffer((batch * ob0,), "float32", data=out2.data)

        T.device_entry()
        block = T.cta_id([T.cast(batch * n_work, "int32")])
        tid = T.thread_id([THREADS])
        pool = T.SMEMPool()
        x1_tile = pool.alloc((g.m, g.q_stride), "float32", align=16)
        x2_tile = pool.alloc((g.m, g2.q_stride), "float32", align=16)
        y_tile = pool.alloc((g.n, g.chunk + PAD), "float32", align=16)
        p_tile = pool.alloc((g.m, g.n + PAD), "float32", align=16)
        row_pos = pool.alloc((g.m,), "int32", align=16)
        col_pos = pool.alloc((g.n,), "int32", align=16)
        lse_tile = pool.alloc((g.n if of_keys else g.m,), "float32", align=16)  # log2 domain
        delta_tile = pool.alloc((g.n if of_keys else g.m,), "float32", align=16)
        pool.commit()
        scores = T.alloc_local((g.rows * g.cols,), "float32")
        dp = T.alloc_local((g.rows * g.cols,), "float32")
        acc1 = T.alloc_local((g.accumulators,), "float32")
        acc2 = T.alloc_local((sums2,), "float32")

        ty: T.let = tid // SIDE
        tx: T.let = tid % SIDE
        b: T.let = T.truncdiv(block, T.cast(n_work, "int32"))
        head: T.let = work[T.truncmod(block, T.cast(n_work, "int32")), 0]
        item: T.let = work[T.truncmod(block, T.cast(n_work, "int32")), 1]
        # query heads a key head: those of the columns, or of the rows
        y_head: T.let = (
            head * T.truncdiv(T.cast(y_heads, "int32"), T.cast(x_heads, "int32")) + member
            if of_keys
            else T.truncdiv(head, T.truncdiv(T.cast(x_heads, "int32"), T.cast(y_heads, "int32")))
        )
        x1_base: T.let = T.cast(b, "int64") * xa0 + T.cast(head, "int64") * xa1
        x2_base: T.let = T.cast(b, "int64") * xb0 + T.cast(head, "int64") * xb1
        y1_base: T.let = T.cast(b, "int64") * ya0 + T.cast(y_head, "int64") * ya1
        y2_base: T.let = T.cast(b, "int64") * yb0 + T.cast(y_head, "int64") * yb1
        out1_base: T.let = T.cast(b, "int64") * oa0 + T.cast(head, "int64") * oa1
        out2_base: T.let = T.cast(b, "int64") * ob0 + T.cast(head, "int64") * ob1
        query_base: T.let = (
            (T.cast(b, "int64") * y_heads + T.cast(y_head, "int64")) * y_len
            if of_keys
            else (T.cast(b, "int64") * x_heads + T.cast(head, "int64")) * x_len
        )

        first_entry: T.let = items[item, 3]
        with T.attr({"tirx.launch_bounds_min_blocks_per_sm": 1}):  # of the whole kernel: else ptxas may spill for 2
            locate_lanes(row_pos, views, items[item, 5], items[item, 0], items[item, 1], items[item, 2], g.m, x_len,
                         tid)  # fmt: skip
        T.cuda.cta_sync()
        stage_q(g, x1_tile, x1_flat, x1_base, xa2, row_pos, tid)
        stage_q(g2, x2_tile, x2_flat, x2_base, xb2, row_pos, tid)
        if not of_keys:
            stage_statistics(lse_tile, delta_tile, lse, delta, query_base, row_pos, g.m, tid)
        for i in T.unroll(g.accumulators):
            acc1[i] = T.float32(0)
        for i in T.unroll(sums2):
            acc2[i] = T.float32(0)

        for e in range(items[item, 4]):
            k1_origin: T.let = entries[first_entry + e, 0]
            k2_origin: T.let = entries[first_entry + e, 1]
            k3_origin: T.let = entries[first_entry + e, 2]
            bit_tile: T.let = entries[first_entry + e, 4]
            view: T.let = entries[first_entry + e, 5]
            for r in range(entries[first_entry + e, 3]):
                locate_lanes(col_pos, views, view, k1_origin + r * views[view, 9], k2_origin + r * views[view, 10],
                             k3_origin + r * views[view, 11], g.n, y_len, tid)  # fmt: skip
                add_all_scores(g, scores, x1_tile, y_tile, y1_flat, y1_base, ya2, col_pos, tid, ty, tx)
                if of_keys:  # positions are there: the threads have met since
                    stage_statistics(lse_tile, delta_tile, lse, delta, query_base, col_pos, g.n, tid)
                add_all_scores(g2, dp, x2_tile, y_tile, y2_flat, y2_base, yb2, col_pos, tid, ty, tx)
                if spec.softcap:
                    cap_scores(g, scores, scale, cap)
                score_gradients(g, scores, dp, delta_tile, spec.softcap, of_keys, ty, tx)
                scale_scores(g, scores, (cap if spec.softcap else scale) * T.float32(LOG2E))
                probabilities(g, scores, lse_tile, of_keys, ty, tx)
                if bit_tile > 0:
                    zero_masked(g, scores, dp, bits, bit_tile - 1, ty, tx)
                if of_keys:
                    share_tile(g, p_tile, scores, ty, tx)
                    add_all_values(g2, acc2, p_tile, y_tile, y2_flat, y2_base, yb2, col_pos, tid, ty, tx)
                    T.cuda.cta_sync()  # P has been read
                multiply(g, dp, scores)
                share_tile(g, p_tile, dp, ty, tx)
                add_all_values(g, acc1, p_tile, y_tile, y1_flat, y1_base, ya2, col_pos, tid, ty, tx)

        store_rows(g, acc1, out1_flat, out1_base, oa2, row_pos, scale, merge, ty, tx)
        if of_keys:
            store_rows(g2, acc2, out2_flat, out2_base, ob2, row_pos, T.float32(1), merge, ty, tx)

    return gradients.with_attr("global_symbol", name)


@T.inline
def stage_statistics(lse_tile, delta_tile, lse, delta, base, positions, count, tid):
    """LSE (log2 domain) and delta of the queries at `positions`; 0 where there is none, and for an LSE of a query that
    attends to nothing: what meets it is masked, and 0 keeps its scores numbers."""
    if tid < count:
        position: T.int32 = positions[tid]
        lse_tile[tid] = T.float32(0)
        delta_tile[tid] = T.float32(0)
        if position >= 0:
            at: T.let = base + T.cast(position, "int64")
            if lse[at] != T.float32(NEG_INF):
                lse_tile[tid] = lse[at] * T.float32(LOG2E)
            delta_tile[tid] = delta[at]


@T.inline
def score_gradients(g, scores, dp, delta_tile, softcap, of_keys, ty, tx):
    """dp = (dp - delta) * slope of the softcap, whose tanh the scores are."""
    for i in T.unroll(g.rows):
        for j in T.unroll(g.cols):
            query: T.let = j * SIDE + tx if of_keys else ty * g.rows + i
            dp[i * g.cols + j] = dp[i * g.cols + j] - delta_tile[query]
            if softcap:
                dp[i * g.cols + j] = dp[i * g.cols + j] * (
                    T.float32(1) - scores[i * g.cols + j] * scores[i * g.cols + j]
                )


@T.inline
def probabilities(g, scores, lse_tile, of_keys, ty, tx):
    """scores (log2 domain) become P."""
    for i in T.unroll(g.rows):
        for j in T.unroll(g.cols):
            query: T.let = j * SIDE + tx if of_keys else ty * g.rows + i
            scores[i * g.cols + j] = T.exp2(scores[i * g.cols + j] - lse_tile[query])


@T.inline
def multiply(g, values, factors):
    """values *= factors."""
    for i in T.unroll(g.rows * g.cols):
        values[i] = values[i] * factors[i]


@T.inline
def share_tile(g, tile, values, ty, tx):
    """The threads' values to shared memory."""
    for i in T.unroll(g.rows):
        for j in T.unroll(g.cols):
            tile[ty * g.rows + i, j * SIDE + tx] = values[i * g.cols + j]


@T.inline
def store_rows(g, acc, output, base, stride, row_pos, factor, merge, ty, tx):
    """The valid rows of output = acc * factor, added to what is there with merge."""
    for i in T.unroll(g.rows):
        position: T.int32 = row_pos[ty * g.rows + i]
        if position >= 0:
            for c in T.unroll(len(g.dv_chunks)):
                for u in T.unroll(g.vec):
                    column: T.let = c * g.chunk + tx * g.vec + u
                    if column < g.dv:
                        offset: T.let = flat_offset(base, position, stride, column)
                        value: T.float32 = acc[(c * g.rows + i) * g.vec + u] * factor
                        if merge != 0:
                            value = value + output[offset]
                        output[offset] = value
