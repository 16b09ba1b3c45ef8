"""The producer: one thread that takes row tiles from the queue and feeds the rings."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as I

from splatc.codegen.hopper.block import (
    BATCH,
    ENTRIES,
    FIRST,
    HEAD,
    MESSAGE,
    ORIGIN,
    PLACE,
    ROW_OF_COLUMNS,
    TILES,
    VIEW,
    X1,
    X2,
    X3,
    Block,
)
from splatc.codegen.hopper.copies import Point, load_bytes, load_tile
from splatc.codegen.hopper.emit import Cell, Expr, let, loop, registers, store, when
from splatc.codegen.hopper.queue import Queue
from splatc.codegen.hopper.shape import MAX_VIEWS

AHEAD = 2  # column tiles of a row tile that are asked for before Q of the next one is


class Producer:
    """Q of a row tile, then K, mask bits and V of every one of its column tiles, as fast as the rings take them."""

    def __init__(self, block: Block) -> None:
        self.block, self.s, self.a = block, block.s, block.a

    def run(self) -> None:
        """To be emitted for the producer's warpgroup."""
        with when(T.EQ(self.block.warp, 0)), when(T.cuda.elect_sync()):
            self.start()
            self.fetch_next()
            self.announce_next()
            with I.While(self.queue.number() < self.a.total):
                self.row_tile()
            self.tell_end()

    def start(self) -> None:
        self.q_at = self.block.q_ring.producer("q")
        self.kv_at = self.block.k_ring.producer("kv")  # K and V of a tile have the same place in their rings
        self.queue = Queue(self.a.counter, self.block.index, self.a.blocks)
        self.told = Cell("told", 0)  # where the words about the announced row tile begin
        self.row = registers("row_words", MESSAGE, "int32")  # of the row tile to announce
        self.done = Cell("done", 0)  # column tiles of the announced row tile that were asked for

    def leads(self) -> Expr:
        """Whether this thread talks to the queue and to consumers."""
        return T.bool(True)

    def take(self) -> None:
        """Ask for the number of the next row tile."""
        self.queue.take()

    def fetch_next(self) -> None:
        """Ask for the words of the row tile with the queue's number, if there is one."""
        with when(self.queue.number() < self.a.total):
            for i in range(MESSAGE):
                store(self.row, i, self.a.work[self.queue.number(), i])

    def announce_next(self) -> None:
        """Tell consumers of that row tile, and load its Q."""
        b, s, row = self.block, self.s, self.row
        with when(self.queue.number() < self.a.total):
            b.q_ring.wait_empty(self.q_at)
            stage = let("stage", self.q_at.stage())
            full = b.q_ring.full(stage)
            self.told.set(stage * MESSAGE)
            with when(self.leads()):
                for i in range(MESSAGE):
                    store(b.messages, self.told() + i, row[i])
                b.q_ring.expect(stage, T.uint32(s.q_bytes))
                at = Point(row[X1], row[X2], row[X3], row[BATCH], row[HEAD])
                load_tile(self.a.q, row[VIEW], at, b.q, stage * (s.q_slot // s.item_bytes), s.d_chunks, s.m, full)
            self.q_at.advance()

    def row_tile(self) -> None:
        """All column tiles of the announced row tile, entry by entry; on the way the next is announced."""
        words = {"batch": BATCH, "head": HEAD, "first": FIRST, "entries": ENTRIES, "tiles": TILES}
        batch, head, first, entries, tiles = (
            let(name, self.block.messages[self.told() + word]) for name, word in words.items())  # fmt: skip
        self.take()
        kv_head = let("kv_head", T.truncdiv(head, self.a.group))
        early = self.s.q_stages > 1  # with one stage the next Q has to wait until this one has served all tiles
        if early:
            self.done.set(0)
            last = let("last_before_next", T.min(tiles, AHEAD))
        with loop(entries) as e:
            x1, x2, x3, repeat, bits, view, d1, d2 = (
                let(name, self.a.entries[first + e, i])
                for i, name in enumerate(("k1", "k2", "k3", "repeat", "bits", "k_view", "d1", "d2")))  # fmt: skip
            with loop(repeat) as r:
                self.column_tile(view, Point(x1 + r * d1, x2 + r * d2, x3, batch, kv_head), bits)
                if early:
                    self.done.set(self.done() + 1)
                    with when(T.EQ(self.done(), 1)):
                        self.fetch_next()
                    with when(T.EQ(self.done(), last)):
                        self.announce_next()
        if not early:
            self.fetch_next()
            self.announce_next()

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
        if s.positional:
            self.tell_place(stage, view, at)
        with I.If(bits > 0):
            with I.Then():
                b.k_ring.expect(stage, T.cast(size + s.bits_bytes, "uint32"))
                words = s.bits_bytes // 4
                load_bytes(b.bits.ptr_to([stage * words]), self.a.bits.ptr_to([bits - 1, 0]), s.bits_bytes, full)
            with I.Else():
                b.k_ring.expect(stage, T.cast(size, "uint32"))
        load_tile(self.a.k, view, at, b.k, stage * (s.k_bytes // s.item_bytes), s.d_chunks, s.n, full)

    def tell_place(self, stage: Expr, view: Expr, at: Point) -> None:
        """Say where the lanes of a tile of K are: their row in the table of columns, and the origin's position."""
        columns, places = self.a.columns, self.block.places
        row = let("row_of_columns", T.if_then_else(view >= 0, view, MAX_VIEWS[1] + at.x1))
        origin = at.x1 * columns[row, 0] + at.x2 * columns[row, 1] + at.x3 * columns[row, 2]
        store(places, stage * PLACE + ROW_OF_COLUMNS, row)
        store(places, stage * PLACE + ORIGIN, origin)

    def v_box(self, view: Expr, at: Point, size: Expr | int) -> None:
        """A box of V, of so many bytes."""
        b, s, stage = self.block, self.s, self.kv_at.stage()
        b.v_ring.expect(stage, T.cast(size, "uint32"))
        load_tile(self.a.v, view, at, b.v, stage * (s.v_bytes // s.item_bytes), s.dv_chunks, s.n, b.v_ring.full(stage))

    def tell_end(self) -> None:
        """A row tile of no tiles: consumers stop."""
        b = self.block
        b.q_ring.wait_empty(self.q_at)
        with when(self.leads()):
            store(b.messages, self.q_at.stage() * MESSAGE + TILES, 0)
            b.q_ring.fill(self.q_at.stage())
            self.queue.close()
