"""What consumers that walk over row tiles do alike: find their rows, and send results away through the Q slot.

A result takes the place of the warpgroup's own rows of Q, and leaves by the tensor memory accelerator.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as I

from splatc.codegen.hopper.block import (
    BATCH,
    HEAD,
    MESSAGE,
    ORIGIN,
    PART,
    PLACE,
    ROW_OF_COLUMNS,
    TILES,
    VIEW,
    X1,
    X2,
    X3,
)
from splatc.codegen.hopper.copies import Point, commit_stores, load_tile, store_tile, wait_stores, wait_stores_read
from splatc.codegen.hopper.emit import Cell, Expr, do, let, registers, store, when
from splatc.codegen.hopper.shape import ROW_BYTES, STRIDES, WARPGROUP_ROWS
from splatc.codegen.hopper.terms import Key, TermEmitter
from splatc.codegen.hopper.warpgroup import Warpgroup


class RowTiles(Warpgroup):
    """A warpgroup that computes 64 rows of every row tile that its block takes."""

    words: Expr  # registers for a thread's mask bits

    def enter_rings(self) -> None:
        """Stand at the beginning of the rings."""
        b = self.block
        self.q_at, self.k_at, self.v_at = (
            ring.consumer(name) for ring, name in ((b.q_ring, "q"), (b.k_ring, "k"), (b.v_ring, "v")))  # fmt: skip
        self.old_phase = Cell("old_phase", 0)
        if self.s.q_stages > 1:
            self.unreleased = Cell("unreleased", 0)  # whether the last row tile's Q stage is still being stored from
        if self.s.positional:
            self.terms = TermEmitter(self.a.terms)
            self.place = registers("place", PLACE, "int32")

    def walk(self) -> None:
        """Compute row tiles, until one has no tiles."""
        b = self.block
        b.q_ring.wait_full(self.q_at)
        with I.While(b.messages[self.q_at.stage() * MESSAGE + TILES] > 0):
            self.message = let("message", self.q_at.stage() * MESSAGE)
            self.row_tile()
            self.q_at.advance()
            b.q_ring.wait_full(self.q_at)
        wait_stores()

    def row_tile(self) -> None:
        """The work of one row tile, until its result is on its way."""
        raise NotImplementedError

    def read_bits(self) -> None:
        """Fetch this thread's mask bits of the K stage's tile."""
        self.read_bits_of(self.k_at.stage(), self.words)
        do(T.cuda.warp_sync())  # before lane 0 says for all that the stage is read

    def find_columns(self) -> None:
        """Where the lanes of the K stage's tile are."""
        if self.s.positional:
            for word in (ROW_OF_COLUMNS, ORIGIN):
                store(self.place, word, self.block.places[self.k_at.stage() * PLACE + word])
            do(T.cuda.warp_sync())  # before lane 0 says for all that the stage is read

    def key_of(self, register: int) -> Key:
        """The key of a score register."""
        lane = 8 * (register // 4) + register % 2 + self.block.lane % 4 * 2
        offset = self.a.columns[self.place[ROW_OF_COLUMNS], STRIDES + lane]
        return self.terms.key_side(let("key_position", self.place[ORIGIN] + offset))

    def read_message(self) -> None:
        """Whose rows these are, and where: read late, to spare registers."""
        words = (("batch", BATCH), ("head", HEAD), ("part", PART), ("view", VIEW), ("x1", X1), ("x2", X2), ("x3", X3))
        self.batch, self.head, self.part, self.view, *self.x = (
            let(name, self.block.messages[self.message + word]) for name, word in words)  # fmt: skip

    def box(self) -> Point:
        """The warpgroup's 64 rows in the row view."""
        first, second = self.a.out_steps
        x1, x2, x3 = (x + self.me * T.if_then_else(T.EQ(self.view, 0), a, b)
                      for x, a, b in zip(self.x, first, second, strict=True))  # fmt: skip
        return Point(x1, x2, x3, self.batch, self.head)

    def slot_base(self) -> Expr:
        """Where the warpgroup's rows of the Q slot begin, in elements."""
        return self.q_at.stage() * (self.s.q_slot // self.s.item_bytes) + self.me * (WARPGROUP_ROWS * self.s.chunk)

    def merging(self) -> Expr:
        return T.And(self.a.merge != 0, T.EQ(self.part, 0))

    def fetch_earlier(self) -> None:
        """Ask for what an earlier pass left of these rows, into the Q slot: all products with Q must be done."""
        b, s = self.block, self.s
        self.own_barrier()
        with when(self.leader):
            b.old_ring.expect(self.me, T.uint32(WARPGROUP_ROWS * ROW_BYTES * s.out_chunks))
            load_tile(self.a.out, self.view, self.box(), b.q, self.slot_base(), s.out_chunks, s.m,
                      b.old_ring.full(self.me))  # fmt: skip

    def wait_earlier(self) -> None:
        """Until that is there."""
        do(T.cuda.mbarrier_wait(self.block.old_ring.full(self.me), self.old_phase()))
        self.old_phase.set(T.bitwise_xor(self.old_phase(), 1))

    def send_output(self) -> None:
        """The result in the Q slot to where it belongs: the leader starts it, when all have written their share."""
        do(T.ptx.fence.proxy.async_.shared__cta())
        self.own_barrier()
        with when(self.leader):
            self._store_output()
        with when(self.speaker):
            if self.s.q_stages == 1:
                wait_stores_read()
                self.block.q_ring.release(0)
            else:
                self.unreleased.set(1)

    def _store_output(self) -> None:
        b, s, a = self.block, self.s, self.a
        with I.If(T.EQ(self.part, 0)):
            with I.Then():
                store_tile(a.out, self.view, self.box(), b.q, self.slot_base(), s.out_chunks, s.m)
            with I.Else():
                row = (self.part - 1) * s.m + self.me * WARPGROUP_ROWS
                at = Point(row, 0, 0, 0, 0)
                store_tile(a.part, T.int32(0), at, b.q, self.slot_base(), s.out_chunks, s.m)
        commit_stores()

    def release_last_slot(self) -> None:
        """Give the row tile before's Q stage back as soon as its result has left."""
        if self.s.q_stages > 1:
            with when(T.And(self.speaker, self.unreleased() != 0)):
                wait_stores_read()
                self.block.q_ring.release(T.bitwise_xor(self.q_at.stage(), 1))
