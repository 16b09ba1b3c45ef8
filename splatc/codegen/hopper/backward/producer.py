"""The two threads of a gradient block's first warpgroup that copy: tiles in, sums of dQ out."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as I

from splatc.codegen.hopper.backward.block import Block, Tile
from splatc.codegen.hopper.block import BATCH, HEAD, MESSAGE, TILES, VIEW, X1, X2, X3
from splatc.codegen.hopper.copies import (
    Point,
    add_tile,
    commit_stores,
    load_bytes,
    load_tile,
    wait_stores,
    wait_stores_read,
)
from splatc.codegen.hopper.emit import Cell, Expr, do, let, store, wait_for_kernels_before, when
from splatc.codegen.hopper.queue import Queue
from splatc.codegen.hopper.shape import WARPGROUP_ROWS


class Producer:
    """K and V of a column tile, then Q with statistics and mask bits, and dO, of every one of its tiles of queries."""

    def __init__(self, block: Block) -> None:
        self.block, self.s, self.a = block, block.s, block.a

    def run(self) -> None:
        """To be emitted for one thread."""
        b = self.block
        self.keys_at, self.at = b.k_ring.producer("keys"), b.q_ring.producer("queries")
        self.queue = Queue(self.a.counter, b.index, self.a.blocks)
        with I.While(self.queue.number() < self.a.total):
            self.column_tile()
        b.k_ring.wait_empty(self.keys_at)
        store(b.messages, b.slot(self.keys_at) * MESSAGE + TILES, 0)
        b.k_ring.fill(b.slot(self.keys_at))
        self.queue.close()
        if not self.s.makes("dq"):
            wait_for_kernels_before()  # what follows this kernel follows them too

    def column_tile(self) -> None:
        b, s, a = self.block, self.s, self.a
        number = let("number_now", self.queue.number())
        b.k_ring.wait_empty(self.keys_at)
        slot = b.slot(self.keys_at)
        for i in range(MESSAGE):
            store(b.messages, slot * MESSAGE + i, a.work[number, i])
        self.queue.take()
        batch, head, view, x1, x2, x3 = b.message(
            self.keys_at, ("k_batch", BATCH), ("k_head", HEAD), ("k_view", VIEW), ("k1", X1), ("k2", X2),
            ("k3", X3))  # fmt: skip
        at = Point(x1, x2, x3, batch, head)
        self.keys("k", view, at, s.k_bytes, s.d_chunks)
        late = s.makes("dk")  # V is asked for after the first Q: its place is free later than K's
        if late:
            self.values_due = Cell("values_due", 1)
        for tile in b.tiles(self.keys_at):
            self.queries(tile)
            if late:
                with when(self.values_due() != 0):
                    b.v_ring.wait_empty(self.keys_at)
                    self.keys("v", view, at, s.v_bytes, s.dv_chunks)
                    self.values_due.set(0)
            self.output_gradients(tile)
            self.at.advance()
        self.keys_at.advance()

    def keys(self, name: str, view: Expr, at: Point, size: int, chunks: int) -> None:
        """Their K or V, of so many bytes."""
        b, s = self.block, self.s
        slot, ring, place = b.slot(self.keys_at), b.key_rings[name], b.keys[name]
        base = slot * (b.stage_bytes[name] // s.item_bytes)
        ring.expect(slot, T.uint32(size))
        load_tile(self.a.keys[name], view, at, place, base, chunks, s.keys, ring.full(slot))

    def queries(self, tile: Tile) -> None:
        """Q with what each query needs to know, and the mask bits of the tile."""
        b, s, a, stage = self.block, self.s, self.a, self.at.stage()
        b.q_ring.wait_empty(self.at)
        full = b.q_ring.full(stage)
        store(b.masked, stage, tile.bits)
        if s.positional:
            store(b.heads, stage, tile.at.head)
        size = s.q_bytes + s.statistics_bytes
        with I.If(tile.bits > 0):
            with I.Then():
                b.q_ring.expect(stage, T.uint32(size + s.bits_bytes))
                words = s.bits_bytes // 4
                load_bytes(b.bits.ptr_to([stage * words]), a.bits.ptr_to([tile.bits - 1, 0]), s.bits_bytes, full)
            with I.Else():
                b.q_ring.expect(stage, T.uint32(size))
        load_tile(a.q, tile.view, tile.at, b.q, stage * (s.q_bytes // s.item_bytes), s.d_chunks, s.n, full)
        load_tile(a.statistics, tile.view, tile.at, b.statistics, stage * (s.statistics_bytes // 4), 1, s.n, full)

    def output_gradients(self, tile: Tile) -> None:
        b, s, a, stage = self.block, self.s, self.a, self.at.stage()
        b.do_ring.wait_empty(self.at)
        b.do_ring.expect(stage, T.uint32(s.do_bytes))
        load_tile(a.do, tile.view, tile.at, b.do, stage * (s.do_bytes // s.item_bytes), s.dv_chunks, s.n,
                  b.do_ring.full(stage))  # fmt: skip


class Sender:
    """Adds the integers that consumers leave in shared memory to those of their queries in global memory."""

    def __init__(self, block: Block) -> None:
        self.block, self.s, self.a = block, block.s, block.a

    def run(self) -> None:
        """To be emitted for one thread."""
        b = self.block
        self.keys_at = b.k_ring.consumer("sent_keys")
        self.phase = Cell("sums_phase", 0)
        b.k_ring.wait_full(self.keys_at)
        with I.While(b.messages[TILES] > 0):
            for tile in b.tiles(self.keys_at):
                self.send(tile)
            b.k_ring.release(0)
            self.keys_at.advance()
            b.k_ring.wait_full(self.keys_at)
        wait_stores()

    def send(self, tile: Tile) -> None:
        b, s, a = self.block, self.s, self.a
        for w in range(s.warpgroups):
            do(T.cuda.mbarrier_wait(b.sums_ring.full(w), self.phase()))
            at, first = tile.at, 0
            if s.halves_queries:
                at = self.half(tile, w)
            else:
                first = w * s.sum_width
            add_tile(a.sums, tile.view, at, b.sums, w * (s.sum_bytes // 4), s.sum_chunks, WARPGROUP_ROWS, first)
            commit_stores()
        for w in range(s.warpgroups):
            wait_stores_read(s.warpgroups - 1 - w)
            b.sums_ring.release(w)
        self.phase.set(T.bitwise_xor(self.phase(), 1))

    def half(self, tile: Tile, w: int) -> Point:
        """Where a half of the tile's queries begin."""
        at = tile.at
        if w == 0:
            return at
        steps = []
        for axis in range(3):
            step = self.a.sum_steps[0][axis]
            for view in range(1, len(self.a.sum_steps)):
                step = T.if_then_else(T.EQ(tile.view, view), self.a.sum_steps[view][axis], step)
            steps.append(let(f"half{axis}", step))
        return Point(at.x1 + steps[0], at.x2 + steps[1], at.x3 + steps[2], at.batch, at.head)

