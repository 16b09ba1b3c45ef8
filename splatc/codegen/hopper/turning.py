"""The producer of kernels in tf32: V is turned over on its way, because tensor cores read tf32 operands along the keys.

One thread loads K and, chunk by chunk, V as it lies in memory into a ring of staged chunks; the other warps of its
warpgroup write V^T where wgmma reads it. Rounding to tf32 is done by the loads (the type of their tensor maps).

    staged chunk   a row for each key, 32 columns of V: 128 bytes, eight units of 16
    V^T            a row for each column of V, 32 keys; tiles of more keys: one such block after the other

Rows of both are swizzled: unit u of row r is at u ^ r % 8. Within each eight, keys are in the order 0 2 4 6 1 3 5 7
("slots"): P is the A operand as the scores' registers hold it (products.py). A lane moves 4 slots of 4 columns at a
time, 16 bytes an access; which ones is chosen so that eight lanes meet all banks, reading and writing.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as I

from splatc.codegen.hopper.block import Block
from splatc.codegen.hopper.copies import Point, load_tile
from splatc.codegen.hopper.emit import Cell, Expr, do, let, registers, store, when
from splatc.codegen.hopper.producer import Producer
from splatc.codegen.hopper.shape import TURNERS, chunk

CHUNK = chunk("float32")  # columns of a staged chunk, and keys of a row of V^T
UNIT = 4  # values in 16 bytes: columns or slots
SQUARES = CHUNK // UNIT * (CHUNK // UNIT) // 32  # rounds in which a warp moves 32 keys of a chunk


def key_of(slot: Expr) -> Expr:
    """The key, of a tile's, in a slot."""
    return slot // 8 * 8 + slot % 4 * 2 + slot % 8 // 4


def square_of(lane: Expr, turn: Expr) -> tuple[Expr, Expr]:
    """(unit of slots, unit of columns) that a lane moves in one of a warp's turns at 32 keys of a chunk.

    Over a turn's eight neighbouring lanes, the units of slots differ, and so do the units of columns, even where one
    is changed by a bit of the other as the swizzle does.
    """
    eighth = lane % 8
    rotated = eighth // 2 + eighth % 2 * 4
    return eighth, rotated ^ (turn * 4 + lane // 8)


def staged_at(slots: Expr, columns: Expr, i: int) -> Expr:
    """Where the i-th slot of a unit of slots has a unit of columns, in a staged chunk."""
    key = key_of(slots * UNIT) + 2 * i
    return key * CHUNK + (columns ^ key % 8) * UNIT


def turned_at(slots: Expr, columns: Expr, i: int) -> Expr:
    """Where the i-th column of a unit of columns has a unit of slots, in the rows of V^T of a chunk."""
    column = columns * UNIT + i
    return column * CHUNK + (slots ^ column % 8) * UNIT


class TurningProducer(Producer):
    """One thread feeds Q, K and the staged chunks of V, three warps turn these over into the ring of V."""

    def run(self) -> None:
        super().run()
        with when(self.block.warp > 0):
            Turner(self.block).run()

    def start(self) -> None:
        super().start()
        b = self.block
        self.staged_at = b.staged_ring.producer("staged")
        for stage in range(self.s.staged):
            store(b.staged_values, stage, 1)

    def column_tile(self, view: Expr, at: Point, bits: Expr) -> None:
        """K with its mask bits, then V by chunks."""
        b, s = self.block, self.s
        b.k_ring.wait_empty(self.kv_at)
        self.k_box(view, at, bits, s.k_bytes)
        column = Cell("column", 0)
        with I.While(column() < s.dv_chunks * CHUNK):
            b.staged_ring.wait_empty(self.staged_at)
            stage = let("staged_stage", self.staged_at.stage())
            b.staged_ring.expect(stage, T.uint32(s.staged_bytes))
            load_tile(self.a.v, view, at, b.staged, stage * (s.staged_bytes // s.item_bytes), 1, s.n,
                      b.staged_ring.full(stage), first=column())  # fmt: skip
            self.staged_at.advance()
            column.set(column() + CHUNK)
        self.kv_at.advance()

    def tell_end(self) -> None:
        """To consumers and to the warps that turn V over."""
        super().tell_end()
        b = self.block
        b.staged_ring.wait_empty(self.staged_at)
        store(b.staged_values, self.staged_at.stage(), 0)
        b.staged_ring.fill(self.staged_at.stage())


class Turner:
    """One of the warps that turn V over: tile after tile, until a staged chunk says that there are no more."""

    def __init__(self, block: Block) -> None:
        self.block, self.s = block, block.s

    def run(self) -> None:
        b = self.block
        self.staged_at = b.staged_ring.consumer("staged")
        self.v_at = b.v_ring.producer("turned")
        self.turn = Cell("turn", b.warp - 1)  # of all warps' turns at a chunk, the next that is this warp's
        b.staged_ring.wait_full(self.staged_at)
        with I.While(b.staged_values[self.staged_at.stage()] != 0):
            self.tile()
            b.staged_ring.wait_full(self.staged_at)

    def tile(self) -> None:
        """The warp's share of a tile."""
        b, s = self.block, self.s
        b.v_ring.wait_empty(self.v_at)
        target = let("target", self.v_at.stage() * (s.v_bytes // s.item_bytes))
        rows = Cell("rows", 0)
        with I.While(rows() < s.dv_chunks * CHUNK):
            b.staged_ring.wait_full(self.staged_at)
            source = let("source", self.staged_at.stage() * (s.staged_bytes // s.item_bytes))
            with I.While(self.turn() < s.n // CHUNK * SQUARES):
                self.move(source, target + rows() * CHUNK)
                self.turn.set(self.turn() + TURNERS)
            self.turn.set(self.turn() - s.n // CHUNK * SQUARES)
            do(T.cuda.warp_sync())  # before lane 0 says for all that the chunk is read
            b.staged_ring.release_by_warp(self.staged_at.stage(), b.lane)
            self.staged_at.advance()
            rows.set(rows() + CHUNK)
        do(T.ptx.fence.proxy.async_.shared__cta())
        do(T.cuda.warp_sync())
        b.v_ring.fill_by_warp(self.v_at.stage(), b.lane)
        self.v_at.advance()

    def move(self, source: Expr, target: Expr) -> None:
        """A turn: 4 x 4 values a lane."""
        b, s = self.block, self.s
        keys = let("keys", self.turn() // SQUARES)  # which 32 of the tile's
        slots, columns = (let(name, x) for name, x in zip(("slots", "columns"),
                          square_of(b.lane, self.turn() % SQUARES), strict=True))  # fmt: skip
        read = let("read", source + keys * (CHUNK * CHUNK))
        written = let("written", target + keys * (s.dv_chunks * CHUNK * CHUNK))
        values = registers("values", UNIT * UNIT)
        for i in range(UNIT):
            at = b.staged.ptr_to([read + staged_at(slots, columns, i)])
            do(T.ptx["ld.shared.v4.f32"](*(values[UNIT * i + j] for j in range(UNIT)), at))
        for j in range(UNIT):
            at = b.v.ptr_to([written + turned_at(slots, columns, j)])
            do(T.ptx["st.shared.v4.f32"](at, *(values[UNIT * i + j] for i in range(UNIT))))
