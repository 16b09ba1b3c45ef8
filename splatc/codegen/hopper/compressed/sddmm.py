"""values, metadata = 2:4 or 1:2 of scale * Q K^T: scores stay in registers until half of them is pruned.

Each warp stores its own 16 rows of a tile, two tiles in turn, so that selection, products of other warpgroups and
stores overlap.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as I

from splatc.codegen.hopper.block import int_arg, start_block
from splatc.codegen.hopper.combine import array, wide
from splatc.codegen.hopper.compressed.selection import Selection
from splatc.codegen.hopper.compressed.sizes import WARP_ROWS, Item, Sizes, Walk
from splatc.codegen.hopper.copies import (
    GroupedMaps,
    Maps,
    Point,
    commit_stores,
    load_tile,
    store_tile,
    wait_stores_read,
)
from splatc.codegen.hopper.emit import Cell, Expr, do, let, loop, store, when
from splatc.codegen.hopper.products import Scores, at_stage, descriptor, wait_products
from splatc.codegen.hopper.ring import Cursor, Ring, of_warps
from splatc.codegen.hopper.shape import WARPGROUP_ROWS
from splatc.codegen.hopper.shared_memory import SharedMemory
from splatc.codegen.kernel import COMPRESSED_SDDMM
from splatc.formats.nm import TILE_KEYS, TILE_WORDS

BUFFERS = 2  # of a warp's values on their way out


class Sddmm:
    """Its parameters, and by ``run`` its body."""

    name = f"splatc_{COMPRESSED_SDDMM}"

    def __init__(self, s: Sizes) -> None:
        self.s = s
        self.q, self.k, self.values = Maps("q", 1), GroupedMaps("k", 1), Maps("values", 1)
        self.walk = Walk(s)
        self.kv_len = int_arg("kv_len")
        self.scale = I.arg("scale", I.float32())
        self.metadata = array("metadata", "uint32")
        for maps in (self.q, self.k, self.values):
            maps.declare()

    def run(self) -> int:
        """Gives the bytes of dynamic shared memory."""
        s, w = self.s, self.walk
        w.start()
        sent = s.value_bytes * BUFFERS
        q_stages = 2 if s.chunks == 1 else 1
        stages = s.stages(sent + q_stages * s.row_bytes, s.key_bytes)
        pool = SharedMemory()
        self.q_tiles = pool.alloc((q_stages * s.row_bytes // s.item_bytes,), s.dtype, align=1024)
        self.k_tiles = pool.alloc((stages * s.key_bytes // s.item_bytes,), s.dtype, align=1024)
        self.out = pool.alloc((sent // s.item_bytes,), s.dtype, align=1024)
        self.q_ring, self.k_ring = (Ring(pool, count, readers=of_warps(s.warps)) for count in (q_stages, stages))
        pool.commit()
        start_block(w.thread, (self.q, self.k, self.values), (self.q_ring, self.k_ring))
        w.split(self.copy, self.compute)
        return pool.size

    # -- the warp that copies ------------------------------------------------------------------------------------------

    def copy(self) -> None:
        s, w = self.s, self.walk
        q_at, k_at = self.q_ring.producer("q"), self.k_ring.producer("k")
        with w.each() as item:
            self.load(self.q, self.q_ring, q_at, Point(item.row, 0, 0, item.batch, item.head), self.q_tiles,
                      s.row_bytes, s.rows)  # fmt: skip
            with loop(w.key_tiles) as j:
                self.load(self.k, self.k_ring, k_at, Point(j * TILE_KEYS, 0, 0, item.batch, item.kv_head), self.k_tiles,
                          s.key_bytes, TILE_KEYS)  # fmt: skip

    def load(self, maps: Maps, ring: Ring, at: Cursor, point: Point, target: Expr, size: int, rows: int) -> None:
        """A tile to the ring's next stage."""
        ring.wait_empty(at)
        stage = let("stage", at.stage())
        ring.expect(stage, T.uint32(size))
        load_tile(maps, T.int32(0), point, target, stage * (size // self.s.item_bytes), self.s.chunks, rows,
                  ring.full(stage))  # fmt: skip
        at.advance()

    # -- a warpgroup that computes -------------------------------------------------------------------------------------

    def compute(self) -> None:
        s, w = self.s, self.walk
        q_at, k_at = self.q_ring.consumer("q"), self.k_ring.consumer("k")
        assert s.pruning is not None
        scores = Scores(s.dtype, s.dim, TILE_KEYS, s.rows)
        self.selection = Selection(TILE_KEYS, s.dtype, w.lane, s.pruning)
        q_base = descriptor("q_desc", self.q_tiles, w.me * (WARPGROUP_ROWS * s.chunk), 1)
        k_base = descriptor("k_desc", self.k_tiles, 0, 1)
        self.buffer = Cell("buffer", 0)
        with w.each() as item:
            self.q_ring.wait_full(q_at)
            q = at_stage("q_now", q_base, q_at.stage(), s.row_bytes)
            with loop(w.key_tiles) as j:
                self.k_ring.wait_full(k_at)
                scores.issue(q, at_stage("k_now", k_base, k_at.stage(), s.key_bytes))
                wait_products(0)
                scores.fence()
                self.leave(self.k_ring, k_at)
                count = let("count", self.kv_len - j * TILE_KEYS)
                with when(count < TILE_KEYS):
                    self.selection.mask(scores.s, count)
                self.selection.select(scores.s, self.scale)
                self.send_values(item, j)
                self.selection.encode()
                self.store_words(item, j)
            self.leave(self.q_ring, q_at)
        with when(T.EQ(w.lane, 0)):
            wait_stores_read()

    def leave(self, ring: Ring, at: Cursor) -> None:
        """Release a stage, one arrival a warp, and go on."""
        ring.release_by_warp(at.stage(), self.walk.lane)
        at.advance()

    def send_values(self, item: Item, j: Expr) -> None:
        """The warp's rows of the tile, through shared memory."""
        s, w = self.s, self.walk
        with when(T.EQ(w.lane, 0)):
            wait_stores_read(BUFFERS - 1)
        do(T.cuda.warp_sync())
        base = let("base", (w.warp * BUFFERS + self.buffer()) * (WARP_ROWS * s.chunk))
        for i in range(s.chunk // 16):
            column16 = T.bitwise_xor(i * 2 + w.lane // 16, w.lane % 8)  # the swizzle, in 16 bytes
            at = self.out.ptr_to([base + w.lane % 16 * s.chunk + column16 * 8])
            words = [self.selection.kept[4 * i + word] for word in range(4)]
            do(T.ptx["stmatrix.sync.aligned.m8n8.x4.shared.b16"](at, *words))
        do(T.ptx.fence.proxy.async_.shared__cta())
        do(T.cuda.warp_sync())
        with when(T.EQ(w.lane, 0)):
            at = Point(item.row + w.warp * WARP_ROWS, 0, 0, item.batch, item.head)
            store_tile(self.values, T.int32(0), at, self.out, base, 1, WARP_ROWS, j * s.chunk)
            commit_stores()
        self.buffer.set(T.bitwise_xor(self.buffer(), BUFFERS - 1))

    def store_words(self, item: Item, j: Expr) -> None:
        """The metadata, as it lies in registers."""
        w = self.walk
        row_block = let("row_block", T.truncdiv(item.row, WARPGROUP_ROWS) + w.me)
        with when(row_block < w.row_blocks):
            first = let("first_word", w.first_word(item, j, row_block) + wide(w.thread % 128))
            for i in range(TILE_WORDS // 128):
                store(self.metadata, first + 128 * i, self.selection.words[i])
