"""Portable CUDA attention kernel (sm_80 and later): fp32 multiply-adds, no tensor cores, any alignment.

One block of 256 threads computes one work index: a row tile of M queries against its list of N-column tiles.
The threads form a 16 x 16 grid (ty, tx). A thread owns score rows ty*R .. ty*R+R-1 (R = M/16) at the columns
tx, tx+16, tx+32, ..., and of those rows chunk/16 adjacent output columns of each chunk of the value dims.
The 16 threads of a row are neighbours in one warp, so row maxima and sums are shuffles.

Shared memory holds, in fp32: the whole Q tile, one chunk (64 or 32 dims wide) of the K or V tile, and the
tile P of probabilities. Rows are padded by 4 floats: 16-byte loads stay aligned and free of bank conflicts.
The softmax is online, in the log2 domain; a row that has seen nothing has maximum -inf, sum 0 and output 0.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm.script import tirx as T

from splatc.codegen.constants import LOG2E, ceil_div
from splatc.codegen.cuda_parts import (
    SIDE,
    THREADS,
    add_all_scores,
    add_all_values,
    cap_scores,
    locate_lanes,
    mask_scores,
    scale_scores,
    stage_q,
    start_state,
    store_state,
    update_softmax,
)
from splatc.codegen.emitted import DeviceFunction, Emitted
from splatc.codegen.kernel import DTYPES, KernelSpec
from splatc.errors import Unsupported

PAD = 4
MAX_ACCUMULATORS = 128  # fp32 output values of one thread; more would spill
# Largest dynamic shared memory of one block in KiB, by the number in sm_NN; DEFAULT_SMEM_KIB for the others.
SMEM_KIB = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227}
DEFAULT_SMEM_KIB = 99


@dataclass(frozen=True)
class Blocking:
    """Compile-time sizes of one kernel. m, n: tile; d, dv: head dims; chunk: dimensions staged at a time."""

    m: int
    n: int
    d: int
    dv: int
    chunk: int

    @property
    def rows(self) -> int:
        """Score rows of one thread."""
        return self.m // SIDE

    @property
    def cols(self) -> int:
        """Score columns of one thread."""
        return self.n // SIDE

    @property
    def vec(self) -> int:
        """Adjacent output columns of one thread in a chunk."""
        return self.chunk // SIDE

    @property
    def d_chunks(self) -> tuple[tuple[int, int], ...]:
        """(first, width) of the chunks of the score dimension."""
        return chunks_of(self.d, self.chunk)

    @property
    def dv_chunks(self) -> tuple[tuple[int, int], ...]:
        """(first, width) of the chunks of the value dimension."""
        return chunks_of(self.dv, self.chunk)

    @property
    def accumulators(self) -> int:
        """fp32 output values of one thread."""
        return len(self.dv_chunks) * self.rows * self.vec

    @property
    def q_stride(self) -> int:
        """Floats from one row of the Q tile to the next."""
        return ceil_div(self.d, 32) * 32 + PAD

    @property
    def smem_bytes(self) -> int:
        """Dynamic shared memory of one block."""
        floats = self.m * self.q_stride + self.n * (self.chunk + PAD) + self.m * (self.n + PAD)
        return 4 * (floats + self.m + self.n)


def chunks_of(total: int, chunk: int) -> tuple[tuple[int, int], ...]:
    """(first, width) pieces of at most `chunk` that cover 0 .. total-1."""
    return tuple((first, min(chunk, total - first)) for first in range(0, total, chunk))


def smem_limit(arch: str) -> int:
    """Bytes of dynamic shared memory that one block may use on `arch` ("sm_90a", ...)."""
    number = arch.removeprefix("sm_").rstrip("af")
    if not number.isdigit() or int(number) < 80:
        raise Unsupported(f"the CUDA kernel needs an architecture of sm_80 or later, not {arch!r}")
    return SMEM_KIB.get(int(number), DEFAULT_SMEM_KIB) * 1024


def choose_blocking(spec: KernelSpec) -> Blocking:
    """The widest chunk that fits the target's shared memory; raises Unsupported if none does."""
    if spec.dtype not in DTYPES:
        raise Unsupported(f"the CUDA kernel has no dtype {spec.dtype!r}: use one of {', '.join(DTYPES)}")
    if spec.tile_m not in (32, 64, 128) or spec.tile_n % SIDE or not 16 <= spec.tile_n <= 128:
        raise Unsupported(
            f"the CUDA kernel has no tile of {spec.tile_m} x {spec.tile_n}: "
            "rows must be 32, 64 or 128 and columns a multiple of 16 up to 128"
        )
    if (others := [name for name in spec.score.names if name != "softcap"]):
        raise Unsupported(f"the portable CUDA kernel has no {', '.join(others)}: use the target cpu, or sm_90a")
    if min(spec.head_dim, spec.v_head_dim) < 1:
        raise Unsupported(f"head dims must be at least 1, got {spec.head_dim} and {spec.v_head_dim}")
    limit = smem_limit(spec.target.arch)
    wide, narrow = (Blocking(spec.tile_m, spec.tile_n, spec.head_dim, spec.v_head_dim, c) for c in (64, 32))
    blocking = wide if wide.smem_bytes <= limit else narrow
    if blocking.smem_bytes > limit:
        raise Unsupported(
            f"head_dim {spec.head_dim} with tile {spec.tile_m} x {spec.tile_n} needs {blocking.smem_bytes} "
            f"bytes of shared memory and {spec.target.arch} has {limit}: use smaller tiles or head_dim"
        )
    if blocking.accumulators > MAX_ACCUMULATORS:
        raise Unsupported(
            f"v_head_dim {spec.v_head_dim} with {spec.tile_m} rows needs {blocking.accumulators} "
            f"accumulators a thread and the limit is {MAX_ACCUMULATORS}: use smaller tiles or v_head_dim"
        )
    return blocking


def attention_cuda(spec: KernelSpec) -> Emitted:
    """The fused tile-sparse attention forward "splatc_attention" for spec.target.

    To be launched with one block for each (batch, work row); there must be at least one. Raises Unsupported where the
    limits of the target (shared memory, registers) or the tile shape do not allow the kernel.
    """
    g = choose_blocking(spec)
    dtype = spec.dtype

    @T.prim_func
    def splatc_attention(
        q_arg: T.handle, k_arg: T.handle, v_arg: T.handle, o_arg: T.handle, lse_arg: T.handle,
        work_arg: T.handle, items_arg: T.handle, entries_arg: T.handle, views_arg: T.handle,
        bits_arg: T.handle, scale: T.float32, cap: T.float32, merge: T.int32,
    ):  # fmt: skip
        batch = T.int64()
        q_heads = T.int64()
        kv_heads = T.int64()
        q_len = T.int64()
        kv_len = T.int64()
        n_work = T.int64()
        n_items = T.int64()
        n_entries = T.int64()
        n_views = T.int64()
        n_bits = T.int64()
        q0, q1, q2 = T.int64(), T.int64(), T.int64()  # element strides of batch, head, position
        k0, k1, k2 = T.int64(), T.int64(), T.int64()
        v0, v1, v2 = T.int64(), T.int64(), T.int64()
        o0, o1, o2 = T.int64(), T.int64(), T.int64()
        q = T.match_buffer(q_arg, (batch, q_heads, q_len, g.d), dtype, strides=(q0, q1, q2, 1), layout=None)
        k = T.match_buffer(k_arg, (batch, kv_heads, kv_len, g.d), dtype, strides=(k0, k1, k2, 1), layout=None)
        v = T.match_buffer(v_arg, (batch, kv_heads, kv_len, g.dv), dtype, strides=(v0, v1, v2, 1), layout=None)
        o = T.match_buffer(o_arg, (batch, q_heads, q_len, g.dv), dtype, strides=(o0, o1, o2, 1), layout=None)
        lse = T.match_buffer(lse_arg, (batch, q_heads, q_len), "float32")
        work = T.match_buffer(work_arg, (n_work, 2), "int32")
        items = T.match_buffer(items_arg, (n_items, 8), "int32")
        entries = T.match_buffer(entries_arg, (n_entries, 8), "int32")
        views = T.match_buffer(views_arg, (n_views, 12), "int32")
        bits = T.match_buffer(bits_arg, (n_bits, g.n, g.m // 32), "uint32")
        # Flat aliases: this TVM ignores symbolic strides in device code, so offsets are written out in int64.
        q_flat = T.decl_buffer((batch * q0,), dtype, data=q.data)
        k_flat = T.decl_buffer((batch * k0,), dtype, data=k.data)
        v_flat = T.decl_buffer((batch * v0,), dtype, data=v.data)
        o_flat = T.decl_buffer((batch * o0,), dtype, data=o.data)

        T.device_entry()
        block = T.cta_id([T.cast(batch * n_work, "int32")])
        tid = T.thread_id([THREADS])
        pool = T.SMEMPool()
        q_tile = pool.alloc((g.m, g.q_stride), "float32", align=16)
        kv_tile = pool.alloc((g.n, g.chunk + PAD), "float32", align=16)
        p_tile = pool.alloc((g.m, g.n + PAD), "float32", align=16)
        row_pos = pool.alloc((g.m,), "int32", align=16)
        col_pos = pool.alloc((g.n,), "int32", align=16)
        pool.commit()
        scores = T.alloc_local((g.rows * g.cols,), "float32")
        acc = T.alloc_local((g.accumulators,), "float32")
        row_max = T.alloc_local((g.rows,), "float32")  # log2 domain
        row_sum = T.alloc_local((g.rows,), "float32")  # this thread's part of the row

        ty: T.let = tid // SIDE
        tx: T.let = tid % SIDE
        b: T.let = T.truncdiv(block, T.cast(n_work, "int32"))
        head: T.let = work[T.truncmod(block, T.cast(n_work, "int32")), 0]
        item: T.let = work[T.truncmod(block, T.cast(n_work, "int32")), 1]
        kv_head: T.let = T.truncdiv(head, T.truncdiv(T.cast(q_heads, "int32"), T.cast(kv_heads, "int32")))
        q_base: T.let = T.cast(b, "int64") * q0 + T.cast(head, "int64") * q1
        k_base: T.let = T.cast(b, "int64") * k0 + T.cast(kv_head, "int64") * k1
        v_base: T.let = T.cast(b, "int64") * v0 + T.cast(kv_head, "int64") * v1
        o_base: T.let = T.cast(b, "int64") * o0 + T.cast(head, "int64") * o1

        q1_origin: T.let = items[item, 0]
        q2_origin: T.let = items[item, 1]
        q3_origin: T.let = items[item, 2]
        first_entry: T.let = items[item, 3]
        entry_count: T.let = items[item, 4]
        q_view: T.let = items[item, 5]
        with T.attr({"tirx.launch_bounds_min_blocks_per_sm": 1}):  # of the whole kernel: else ptxas may spill for 2
            locate_lanes(row_pos, views, q_view, q1_origin, q2_origin, q3_origin, g.m, q_len, tid)
        T.cuda.cta_sync()
        stage_q(g, q_tile, q_flat, q_base, q2, row_pos, tid)
        start_state(g, row_max, row_sum, acc, o_flat, o_base, o2, lse, b, head, row_pos, merge, ty, tx)

        for e in range(entry_count):
            k1_origin: T.let = entries[first_entry + e, 0]
            k2_origin: T.let = entries[first_entry + e, 1]
            k3_origin: T.let = entries[first_entry + e, 2]
            repeat: T.let = entries[first_entry + e, 3]
            bit_tile: T.let = entries[first_entry + e, 4]
            k_view: T.let = entries[first_entry + e, 5]
            k1_step: T.let = views[k_view, 9]
            k2_step: T.let = views[k_view, 10]
            k3_step: T.let = views[k_view, 11]
            for r in range(repeat):
                k1_now: T.let = k1_origin + r * k1_step
                k2_now: T.let = k2_origin + r * k2_step
                k3_now: T.let = k3_origin + r * k3_step
                locate_lanes(col_pos, views, k_view, k1_now, k2_now, k3_now, g.n, kv_len, tid)
                add_all_scores(g, scores, q_tile, kv_tile, k_flat, k_base, k2, col_pos, tid, ty, tx)
                if spec.softcap:
                    cap_scores(g, scores, scale, cap)
                scale_scores(g, scores, (cap if spec.softcap else scale) * T.float32(LOG2E))
                if bit_tile > 0:
                    mask_scores(g, scores, bits, bit_tile - 1, ty, tx)
                update_softmax(g, scores, row_max, row_sum, acc, p_tile, ty, tx)
                add_all_values(g, acc, p_tile, kv_tile, v_flat, v_base, v2, col_pos, tid, ty, tx)

        store_state(g, row_max, row_sum, acc, o_flat, o_base, o2, lse, b, head, row_pos, ty, tx)

    module = tvm.IRModule({"splatc_attention": splatc_attention.with_attr("global_symbol", "splatc_attention")})
    return Emitted(module, (DeviceFunction("splatc_attention_kernel", THREADS, g.smem_bytes),))
