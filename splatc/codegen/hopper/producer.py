"""The producer: one thread that takes row tiles from the queue and feeds the rings."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as I

from splatc.codegen.hopper.block import BATCH, ENTRIES, FIRST, HEAD, MESSAGE, TILES, VIEW, X1, X2, X3, Block
from splatc.codegen.hopper.copies import Point, load_bytes, load_tile
from splatc.codegen.hopper.emit import Expr, let, loop, store, when
from splatc.codegen.hopper.queue import Queue


class Producer:
    """Q of a row tile, then K, mask bits and V of every one of its column tiles, as fast as the rings take them."""

    def __init__(self, block: Block) -> None:
        self.block, self.s, self.a = block, block.s, block.a

    def run(self) -> None:
        """To be emitted for the producer's warpgroup."""
        with when(T.EQ(self.block.warp, 0)), when(T.cuda.elect_sync()):
            self.start()
            queue = Queue(self.a.counter, self.block.index, self.a.blocks)
            with I.While(queue.number() < self.a.total):
                self.row_tile(queue)
            self.block.q_ring.wait_empty(self.q_at)
            self.tell_end(queue)

    def start(self) -> None:
        self.q_at = self.block.q_ring.producer("q")
        self.kv_at = self.block.k_ring.producer("kv")  # K and V of a tile have the same place in their rings

    def row_tile(self, queue: Queue) -> None:
        """The queue's row tile."""
        row = [let(f"word{i}", self.a.work[queue.number(), i]) for i in range(MESSAGE)]
        self.block.q_ring.wait_empty(self.q_at)
        self.rows(queue, row)
        self.q_at.advance()
        self.columns(row)

    def rows(self, queue: Queue, row: list[Expr]) -> None:
        """What consumers need to know, the next number from the queue, and Q."""
        b, s = self.block, self.s
        stage = let("stage", self.q_at.stage())
        for i, word in enumerate(row):
            if i not in (FIRST, ENTRIES):
                store(b.messages, stage * MESSAGE + i, word)
        queue.take()
        b.q_ring.expect(stage, T.uint32(s.q_bytes))
        at = Point(row[X1], row[X2], row[X3], row[BATCH], row[HEAD])
        load_tile(self.a.q, row[VIEW], at, b.q, stage * (s.q_slot // s.item_bytes), s.d_chunks, s.m,
                  b.q_ring.full(stage))  # fmt: skip

    def columns(self, row: list[Expr]) -> None:
        """All column tiles of a row tile, entry by entry."""
        kv_head = let("kv_head", T.truncdiv(row[HEAD], self.a.group))
        with loop(row[ENTRIES]) as e:
            x1, x2, x3, repeat, bits, view, d1, d2 = (
                let(name, self.a.entries[row[FIRST] + e, i])
                for i, name in enumerate(("k1", "k2", "k3", "repeat", "bits", "k_view", "d1", "d2")))  # fmt: skip
            with loop(repeat) as r:
                self.column_tile(view, Point(x1 + r * d1, x2 + r * d2, x3, row[BATCH], kv_head), bits)

    def column_tile(self, view: Expr, at: Point, bits: Expr) -> None:
        """K with its mask bits, then V."""
        b = self.block
        b.k_ring.wait_empty(self.kv_at)
        self.k_box(view, at, bits, self.s.k_bytes)
        b.v_ring.wait_empty(self.kv_at)
        self.v_box(view, at, self.s.v_bytes)
        self.kv_at.advance()

    def k_box(self, view: Expr, at: Point, bits: Expr, size: Expr | int) -> None:
        """A box of K, of so many bytes, and the tile's mask bits."""
        b, s, stage = self.block, self.s, self.kv_at.stage()
        full = b.k_ring.full(stage)
        with I.If(bits > 0):
            with I.Then():
                b.k_ring.expect(stage, T.cast(size + s.bits_bytes, "uint32"))
                words = s.bits_bytes // 4
                load_bytes(b.bits.ptr_to([stage * words]), self.a.bits.ptr_to([bits - 1, 0]), s.bits_bytes, full)
            with I.Else():
                b.k_ring.expect(stage, T.cast(size, "uint32"))
        load_tile(self.a.k, view, at, b.k, stage * (s.k_bytes // s.item_bytes), s.d_chunks, s.n, full)

    def v_box(self, view: Expr, at: Point, size: Expr | int) -> None:
        """A box of V, of so many bytes."""
        b, s, stage = self.block, self.s, self.kv_at.stage()
        b.v_ring.expect(stage, T.cast(size, "uint32"))
        load_tile(self.a.v, view, at, b.v, stage * (s.v_bytes // s.item_bytes), s.dv_chunks, s.n, b.v_ring.full(stage))

    def tell_end(self, queue: Queue) -> None:
        """A row tile of no tiles: consumers stop."""
        b = self.block
        store(b.messages, self.q_at.stage() * MESSAGE + TILES, 0)
        b.q_ring.fill(self.q_at.stage())
        queue.close()
