"""o = P V of P compressed 2:4: both come by bulk copies, metadata too, and nothing is left to do but the products."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from tvm.script import tirx as T

from splatc.codegen.hopper.block import start_block
from splatc.codegen.hopper.combine import array
from splatc.codegen.hopper.compressed.sizes import WARP_ROWS, Item, Sizes, Walk
from splatc.codegen.hopper.copies import (
    LOAD_BYTES,
    Maps,
    Point,
    commit_stores,
    load_tile,
    store_tile,
    wait_stores_read,
)
from splatc.codegen.hopper.emit import Expr, do, let, loop, store, when
from splatc.codegen.hopper.epilogue import stage_output
from splatc.codegen.hopper.products import SparseOutput, along_row, at_stage, descriptor, wait_products
from splatc.codegen.hopper.ring import Ring, of_warps
from splatc.codegen.hopper.shape import WARPGROUP_ROWS
from splatc.codegen.hopper.shared_memory import SharedMemory
from splatc.codegen.hopper.wgmma import issue_product
from splatc.codegen.kernel import COMPRESSED_SPMM
from splatc.formats.nm import TILE_KEYS, TILE_WORDS


class StoredSparse(SparseOutput):
    """The same with P, 64 kept columns, in shared memory."""

    def issue_stored(self, p: Expr, v: Expr) -> None:
        """Start adding the tile at descriptor p times the one at v."""
        b = [v + T.uint64(at) for at in self._offsets]
        a = [p + T.uint64(along_row(kk, WARPGROUP_ROWS)) for kk in range(len(b))]
        words = [self.words[i] for i in range(TILE_WORDS // 128)]
        issue_product(self._instruction, [self.o[i] for i in range(self.count)], a, b, fresh=False, b_transposed=True,
                      metadata=words)  # fmt: skip


class Spmm:
    """Its parameters, and by ``run`` its body."""

    name = f"splatc_{COMPRESSED_SPMM}"

    def __init__(self, s: Sizes) -> None:
        self.s = s
        self.values, self.v, self.out = Maps("values", 1), Maps("v", 1), Maps("out", 1)
        self.walk = Walk(s)
        self.metadata = array("metadata", "uint32")
        for maps in (self.values, self.v, self.out):
            maps.declare()

    def run(self) -> int:
        """Gives the bytes of dynamic shared memory."""
        s, w = self.s, self.walk
        w.start()
        self.words_bytes = s.warpgroups * TILE_WORDS * 4
        stages = s.stages(s.row_bytes, s.value_bytes + s.key_bytes + self.words_bytes)
        pool = SharedMemory()
        self.staged = pool.alloc((s.row_bytes // s.item_bytes,), s.dtype, align=1024)
        self.p_tiles = pool.alloc((stages * s.value_bytes // s.item_bytes,), s.dtype, align=1024)
        self.v_tiles = pool.alloc((stages * s.key_bytes // s.item_bytes,), s.dtype, align=1024)
        self.words = pool.alloc((stages * self.words_bytes // 4,), "uint32", align=128)
        self.ring = Ring(pool, stages, readers=of_warps(s.warps))
        pool.commit()
        start_block(w.thread, (self.values, self.v, self.out), (self.ring,))
        w.split(self.copy, self.compute)
        return pool.size

    def copy(self) -> None:
        """Tiles of P and V, and the metadata of as many rows as there are."""
        s, w, ring = self.s, self.walk, self.ring
        at = ring.producer("p")
        with w.each() as item, loop(w.key_tiles) as j:
            block = let("row_block", T.truncdiv(item.row, WARPGROUP_ROWS))
            words = let("words_size", T.min(w.row_blocks - block, s.warpgroups) * (TILE_WORDS * 4))
            ring.wait_empty(at)
            stage = let("stage", at.stage())
            full = ring.full(stage)
            ring.expect(stage, T.cast(words + (s.value_bytes + s.key_bytes), "uint32"))
            load_tile(self.values, T.int32(0), Point(item.row, 0, 0, item.batch, item.head), self.p_tiles,
                      stage * (s.value_bytes // s.item_bytes), 1, s.rows, full, j * s.chunk)  # fmt: skip
            source = self.metadata.ptr_to([w.first_word(item, j, block)])
            target = self.words.ptr_to([stage * (self.words_bytes // 4)])
            do(T.ptx[LOAD_BYTES](target, source, T.cast(words, "uint32"), full))
            load_tile(self.v, T.int32(0), Point(j * TILE_KEYS, 0, 0, item.batch, item.kv_head), self.v_tiles,
                      stage * (s.key_bytes // s.item_bytes), s.chunks, TILE_KEYS, full)  # fmt: skip
            at.advance()

    def compute(self) -> None:
        s, w, ring = self.s, self.walk, self.ring
        at = ring.consumer("p")
        out = StoredSparse(s.dtype, s.dim, TILE_KEYS)
        p_base = descriptor("p_desc", self.p_tiles, w.me * (WARPGROUP_ROWS * s.chunk), 1)
        v_base = descriptor("v_desc", self.v_tiles, 0, out.leading)
        with w.each() as item:
            out.clear()
            with loop(w.key_tiles):
                ring.wait_full(at)
                first = let("words_at", (at.stage() * s.warpgroups + w.me) * TILE_WORDS + w.thread % 128)
                for i in range(TILE_WORDS // 128):
                    store(out.words, i, self.words[first + 128 * i])
                out.issue_stored(at_stage("p_now", p_base, at.stage(), s.value_bytes),
                                 at_stage("v_now", v_base, at.stage(), s.key_bytes))  # fmt: skip
                wait_products(0)
                out.fence()
                do(T.cuda.warp_sync())
                ring.release_by_warp(at.stage(), w.lane)
                at.advance()
            self.send(item, out)
        with when(T.EQ(w.lane, 0)):
            wait_stores_read()

    def send(self, item: Item, out: StoredSparse) -> None:
        """The warp's rows of o, through shared memory."""
        s, w = self.s, self.walk
        with when(T.EQ(w.lane, 0)):
            wait_stores_read()
        do(T.cuda.warp_sync())
        ones = [T.float32(1.0)] * 2
        stage_output(out.o, s.dim, ones, self.staged, T.int32(0), s.rows, w.warp, w.lane)
        do(T.ptx.fence.proxy.async_.shared__cta())
        do(T.cuda.warp_sync())
        with when(T.EQ(w.lane, 0)):
            at = Point(item.row + w.warp * WARP_ROWS, 0, 0, item.batch, item.head)
            store_tile(self.out, T.int32(0), at, self.staged, w.warp * (WARP_ROWS * s.chunk), s.chunks, s.rows)
            commit_stores()
