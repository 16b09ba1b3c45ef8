"""values[q, k] = factor * <q_q, k_k> for the elements of a mask, in ACSR order.

A block multiplies 64 queries by 64 keys at a time. The products leave through shared memory, each warp's 16 lines by
itself: neighbouring lanes then store neighbouring values. A whole line that begins at an odd number is stored in pairs
all the same, but for its ends.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Callable

from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as I

from splatc.codegen.hopper.combine import wide
from splatc.codegen.hopper.emit import Expr, do, let, registers, store, when
from splatc.codegen.hopper.products import PTX_TYPE, Scores, at_stage, descriptor, wait_products
from splatc.codegen.hopper.unfused.tiles import (
    ALL,
    LANES,
    THREADS,
    Rows,
    Sizes,
    Walk,
    below,
    from_lane,
    has,
    ones,
    pair,
    sizes_of,
    value_array,
)
from splatc.codegen.kernel import SDDMM_FUNCTION as NAME
from splatc.codegen.kernel import KernelSpec

WARP_LINES = 16
BLOCKS = 5  # of a multiprocessor, that registers should allow


def sddmm(spec: KernelSpec):
    """(the function, not lowered, its bytes of dynamic shared memory)."""
    s = sizes_of(spec)
    with IRBuilder() as builder:
        with I.prim_func():
            I.func_name(NAME)
            q, k = Rows("q", s), Rows("k", s)
            values, walk = value_array("values", s), Walk()
            factor = I.arg("factor", I.float32())
            I.device_entry()
            with I.attr({"tirx.launch_bounds_min_blocks_per_sm": BLOCKS if s.dim <= 64 else 1}):
                smem_bytes = _Block(s, q, k, values, walk, factor).run()
    return builder.get().with_attr("global_symbol", NAME), smem_bytes


class _Block:
    def __init__(self, s: Sizes, q: Rows, k: Rows, values: Expr, walk: Walk, factor: Expr) -> None:
        self.s, self.q, self.k, self.values, self.walk, self.factor = s, q, k, values, walk, factor

    def run(self) -> int:
        s, w = self.s, self.walk
        w.start()
        line_bytes = LANES * s.pitch * s.item_bytes
        stages = s.stages(s.tile_bytes + line_bytes, s.tile_bytes)
        pool = T.SMEMPool()
        self.q_tile = pool.alloc((s.tile_items,), s.stored, align=1024)
        self.k_tiles = pool.alloc((stages * s.tile_items,), s.stored, align=1024)
        self.lines = pool.alloc((LANES * s.pitch,), s.stored, align=16)
        pool.commit()
        self.scores = Scores(s.dtype, s.dim, LANES, LANES)
        self.q_desc = descriptor("q_desc", self.q_tile, 0, 1)
        self.k_desc = descriptor("k_desc", self.k_tiles, 0, 1)
        self.k_base = self.k.base(w.batch, w.shared_head)
        with when(w.count > 0):
            self.q.copy(self.q.base(w.batch, w.head), w.positions, w.item, self.q_tile, 0, w.thread)
            w.pipeline(stages, self.copy, self.tile)
        return int(pool.max_offset)

    def copy(self, entry: Expr, stage: Expr) -> None:
        """The keys of a column tile."""
        w, s = self.walk, self.s
        self.k.copy(self.k_base, w.columns, w.entries[entry, 0], self.k_tiles, stage * s.tile_items, w.thread)

    def tile(self, entry: Expr, stage: Expr, meanwhile: Callable[[], None]) -> None:
        """The values of a tile."""
        w, s = self.walk, self.s
        self.scores.issue(self.q_desc, at_stage("k_now", self.k_desc, stage, s.tile_bytes))
        meanwhile()
        line = let("own_line", w.warp * WARP_LINES + w.lane % WARP_LINES)
        self.first = let("first_of_line", w.first[entry, line])
        self.words = [let("word", word) for word in w.line_bits(entry, line)]
        wait_products(0)
        self.scores.fence()
        do(T.cuda.warp_sync())  # the lines of the tile before have been read
        self.stage_lines()
        do(T.cuda.warp_sync())
        for i in range(WARP_LINES):
            self.store_line(i)

    def stage_lines(self) -> None:
        """Scores of the warp, times the factor and rounded, to its lines."""
        w, s, scores = self.walk, self.s, self.scores.s
        words = registers("staged", 1, "uint32")
        for i in range(LANES // 8):
            for r in range(2):
                at = 4 * i + 2 * r
                low, high = scores[at] * self.factor, scores[at + 1] * self.factor
                do(T.ptx[f"cvt.rn.{PTX_TYPE[s.dtype]}x2.f32"](words[0], high, low))
                row = w.warp * WARP_LINES + w.lane // 4 + 8 * r
                do(T.ptx["st.shared.b32"](self.lines.ptr_to([row * s.pitch + 8 * i + w.lane % 4 * 2]), words[0]))

    def store_line(self, i: int) -> None:
        """The values of the warp's i-th line to where they belong."""
        w = self.walk
        first = let("first", from_lane(self.first, i))
        low, high = (let(name, from_lane(word, i)) for name, word in zip(("low", "high"), self.words, strict=True))
        line = let("line", (w.warp * WARP_LINES + i) * self.s.pitch)
        with when(first >= 0):
            target = let("target", self.walk.origin + wide(first))
            with I.If(T.EQ(T.bitwise_and(low, high), T.uint32(ALL))):
                with I.Then():
                    self.store_whole(line, target)
                with I.Else():
                    self.store_some(line, target, low, high)

    def store_whole(self, line: Expr, target: Expr) -> None:
        """All 64 values, in pairs that begin at even numbers; what is left of an odd line are its ends."""
        lines, values = self.lines, self.values
        column = let("column", 2 * self.walk.lane + T.cast(target % 2, "int32"))
        with I.If(column < LANES - 1):
            with I.Then():
                word = pair(lines[line + column], lines[line + column + 1])
                do(T.ptx["st.global.b32"](values.ptr_to([target + wide(column)]), word))
            with I.Else():
                store(values, target, lines[line])
                store(values, target + wide(column), lines[line + column])

    def store_some(self, line: Expr, target: Expr, low: Expr, high: Expr) -> None:
        """The values of the key lanes that the bits name."""
        lane = self.walk.lane
        bit = T.cast(lane, "uint32")
        for half, word, before in ((0, low, T.int32(0)), (1, high, ones(low))):
            with when(has(word, bit)):
                number = before + ones(T.bitwise_and(word, below(bit)))
                store(self.values, target + wide(number), self.lines[line + 32 * half + lane])


assert THREADS // 32 * WARP_LINES == LANES
