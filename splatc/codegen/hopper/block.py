"""What all threads of a block share: parameters, tables, places, shared memory, rings."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as I

from splatc.codegen.hopper.copies import GroupedMaps, Maps, Point, Rows, load_tile
from splatc.codegen.hopper.emit import (
    Expr,
    do,
    follow_kernels_before,
    let_next_kernel_start,
    named,
    wait_for_kernels_before,
    when,
)
from splatc.codegen.hopper.ring import Ring, of_warpgroups, of_warps
from splatc.codegen.hopper.shape import MAX_VIEWS, STRIDES, TURNERS, Shape
from splatc.codegen.hopper.shared_memory import SharedMemory
from splatc.codegen.hopper.terms import TermArguments

# A row tile in the work table, and in the message that the producer leaves beside its Q stage: int32 words.
BATCH, HEAD, ITEM, PART, X1, X2, X3, FIRST, ENTRIES, VIEW, TILES, MASKED = range(12)
MESSAGE = 12
ROW_OF_COLUMNS, ORIGIN = 0, 1  # of a K stage's tile, left beside it: its row in the table of columns, its position
PLACE = 2


class Arguments:
    """The kernel's parameters (docs/architecture.md says what each holds)."""

    def __init__(self, s: Shape) -> None:
        rows, cols = MAX_VIEWS
        self.q, self.out = Maps("q", rows), Maps("o", rows)
        self.k, self.v = (GroupedMaps if s.pruned else Maps)("k", cols), Maps("v", cols)
        self.part = Maps("part", 1)
        self.out_steps = [[int_arg(f"o_step{view}_{axis}") for axis in (1, 2, 3)] for view in range(rows)]
        names = ("total", "blocks", "heads", "group", "q_len", "merge")
        self.total, self.blocks, self.heads, self.group, self.q_len, self.merge = map(int_arg, names)
        self.scale = I.arg("scale", I.float32())
        self.cap = I.arg("cap", I.float32())
        self.lse = table("lse", "float32", 1)
        self.part_lse = table("part_lse", "float32", 1)
        self.work = table("work", "int32", MESSAGE)
        self.entries = table("entries", "int32", 8)
        self.positions = table("positions", "int32", s.m)
        self.bits = table("bits", "uint32", s.bits_bytes // 4)
        if s.gather:
            self.gather = table("gather", "int32", s.n)
            self.k_rows, self.v_rows = Rows("k", s.dtype, s.d, self.k), Rows("v", s.dtype, s.dv, self.v)
        self.counter = table("queue", "int32", 1)
        self.terms = TermArguments(s.score, table)
        if s.positional:
            self.columns = table("columns", "int32", STRIDES + s.n)
        for maps in (self.q, self.out, self.k, self.v, self.part):
            maps.declare()


def int_arg(name: str) -> Expr:
    """An int32 parameter."""
    return I.arg(name, I.int32())


def table(name: str, dtype: str, width: int) -> Expr:
    """A global array of rows ``width`` wide (flat for 1); its length is of no interest here."""
    shape = (I.int32(),) if width == 1 else (I.int32(), width)
    return named(name, I.match_buffer(I.arg(f"{name}_arg", I.handle()), shape, dtype, align=16 if width > 2 else 4))


class Block:
    """What all threads of a block share: their places, shared memory, rings."""

    def __init__(self, s: Shape, a: Any) -> None:
        """a: Arguments, or of a kernel with a block like this one what it has instead."""
        self.s, self.a = s, a
        self.index = I.cta_id([a.blocks])
        self.warpgroup = I.warpgroup_id([s.warpgroups + 1])
        self.warp = I.warp_id_in_wg([4])
        self.lane = I.lane_id([32])
        self.thread = I.thread_id([s.threads])
        pool = SharedMemory()
        self.allocate_rows(pool)
        self.k = pool.alloc((s.stages * s.k_bytes // s.item_bytes,), s.dtype, align=1024)
        self.v = pool.alloc((s.stages * s.v_bytes // s.item_bytes,), s.dtype, align=1024)
        if s.turned:
            self.staged = pool.alloc((s.staged * s.staged_bytes // s.item_bytes,), s.dtype, align=1024)
        self.bits = pool.alloc((s.stages * s.bits_bytes // 4,), "uint32", align=128)
        if s.positional:
            self.places = pool.alloc((s.stages * PLACE,), "int32", align=8)  # of a K stage's tile
        self.next_row = pool.alloc((1,), "int32", align=16)  # between the producer's threads
        self.messages = pool.alloc((s.q_stages * MESSAGE,), "int32", align=16)
        warps = of_warps(4 * s.warpgroups)
        self.q_ring = Ring(pool, s.q_stages, readers=of_warpgroups(s.warpgroups))
        self.k_ring = Ring(pool, s.stages, readers=warps, writers=s.writers)
        self.v_ring = Ring(pool, s.stages, readers=warps, writers=of_warps(TURNERS) if s.turned else s.writers)
        self.old_ring = Ring(pool, s.warpgroups, readers=1)  # the earlier pass's output, one stage a warpgroup
        self.rings = [self.q_ring, self.k_ring, self.v_ring, self.old_ring]
        if s.turned:
            self.staged_ring = Ring(pool, s.staged, readers=of_warps(TURNERS))
            self.staged_values = pool.alloc((s.staged,), "int32", align=4)  # whether a stage has any, or is the end
            self.rings.append(self.staged_ring)
        pool.commit()
        self.smem_bytes = pool.size

    def allocate_rows(self, pool: SharedMemory) -> None:
        """Room for what stays while the column tiles of a row tile come by."""
        s = self.s
        self.q = pool.alloc((s.q_stages * s.q_slot // s.item_bytes,), s.dtype, align=1024)

    def load_rows(self, stage: Expr, view: Expr, at: Point) -> None:
        """One thread: fetch it for a row tile."""
        s, full = self.s, self.q_ring.full(stage)
        self.q_ring.expect(stage, T.uint32(s.q_bytes))
        load_tile(self.a.q, view, at, self.q, stage * (s.q_slot // s.item_bytes), s.d_chunks, s.m, full)

    def start(self) -> None:
        """Set up what the block shares."""
        start_block(self.thread, (self.a.q, self.a.k, self.a.v, self.a.out), self.rings)


def start_block(thread: Expr, maps: Sequence[Maps], rings: Sequence[Ring], follow: Expr = None) -> None:
    """All threads: set up the barriers and fetch descriptions of maps; then wait for the kernels before, whose end this
    launch need not have waited for. follow: an int32, 0 to wait for none of them."""
    with when(T.EQ(thread, 0)):
        for one in maps:
            one.prefetch()
        for ring in rings:
            ring.init()
        do(T.ptx.fence.mbarrier_init.release.cluster())
    do(T.cuda.cta_sync())
    if follow is None:
        follow_kernels_before()
    else:
        with when(follow != 0):
            wait_for_kernels_before()
        let_next_kernel_start()
