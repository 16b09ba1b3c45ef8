"""values[q, k] = factor * <q_q, k_k> for the elements of a mask, in ACSR order.

A block multiplies 64 queries by 64 keys at a time; several may share the column tiles of a row tile. The products leave
through shared memory, each warp's 16 lines by itself: there a line lies as it will in memory, without what the mask
does not hold, and in the same place among 16 bytes. Threads then store 16 bytes of a line each; its ends, whose 16
bytes it shares with others, value by value.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Callable, Iterator

from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as I

from splatc.codegen.hopper.block import int_arg
from splatc.codegen.hopper.combine import wide
from splatc.codegen.hopper.emit import Expr, do, registers, store, when
from splatc.codegen.hopper.products import Scores, at_stage, descriptor, wait_products
from splatc.codegen.hopper.unfused.stored import split, words_of
from splatc.codegen.hopper.unfused.tiles import (
    LANES,
    WARP_LINES,
    OwnLine,
    Rows,
    Sizes,
    Spot,
    Walk,
    from_lane,
    kept,
    ones,
    ranks,
    sizes_of,
    value_array,
)
from splatc.codegen.kernel import SDDMM_FUNCTION as NAME
from splatc.codegen.kernel import KernelSpec

BLOCKS = 5  # of a multiprocessor, that registers should allow


def sddmm(spec: KernelSpec):
    """(the function, not lowered, its bytes of dynamic shared memory)."""
    s = sizes_of(spec)
    with IRBuilder() as builder:
        with I.prim_func():
            I.func_name(NAME)
            q, k = Rows("q", s), Rows("k", s)
            values, walk = value_array("values", s), Walk(s)
            factor, parts = I.arg("factor", I.float32()), int_arg("parts")
            I.device_entry()
            with I.attr({"tirx.launch_bounds_min_blocks_per_sm": BLOCKS if s.dim <= 64 else 1}):
                smem_bytes = _Block(s, q, k, values, walk, factor).run(parts)
    return builder.get().with_attr("global_symbol", NAME), smem_bytes


class _Block:
    def __init__(self, s: Sizes, q: Rows, k: Rows, values: Expr, walk: Walk, factor: Expr) -> None:
        self.s, self.q, self.k, self.values, self.walk, self.factor = s, q, k, values, walk, factor

    def run(self, parts: Expr) -> int:
        s, w = self.s, self.walk
        w.start(parts)
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
        with when(w.count > 0):
            self.q.ask(w.positions, w.item, w.thread)
            self.q.copy(self.q.base(w.batch, w.head), self.q_tile, 0, w.thread)
            self.k_base = self.k.base(w.batch, w.shared_head)
            self.own = OwnLine(w)
            first_row = w.warp * WARP_LINES + w.lane // 4  # of the thread's two
            self.row_place = kept("row_place", first_row * s.pitch)
            w.pipeline(stages, self.k, lambda entry: None, self.copy, self.arrived, self.tile)
        return int(pool.max_offset)

    def copy(self, entry: Expr, stage: Expr) -> None:
        """The keys of a column tile."""
        self.k.copy(self.k_base, self.k_tiles, stage * self.s.tile_items, self.walk.thread)

    def arrived(self, number: Expr, stage: Expr) -> None:
        """Round what this thread has copied, where tensor cores would not."""
        if self.s.rounds:
            with when(T.EQ(number, 0)):
                self.q.round(self.q_tile, 0, self.walk.thread)
            self.k.round(self.k_tiles, stage * self.s.tile_items, self.walk.thread)

    def tile(self, entry: Expr, stage: Expr, meanwhile: Callable[[], None]) -> None:
        """The values of a tile."""
        w, s = self.walk, self.s
        self.scores.issue(self.q_desc, at_stage("k_now", self.k_desc, stage, s.tile_bytes))
        own = self.own
        first, kind, count = kept("first", own.first()), kept("kind_now", own.kind()), own.count()
        words = [kept("word_now", word(), "uint32") for word in own.words]
        own.read(w.known(entry + 1))
        meanwhile()
        wait_products(0)
        self.scores.fence()
        do(T.cuda.warp_sync())  # the lines of the tile before have been read
        with I.If(T.EQ(kind, 0)):
            with I.Then():
                self.stage_whole(first)
                do(T.cuda.warp_sync())
                self.store_whole(first)
            with I.Else():
                self.stage_some(first, words, count)
                do(T.cuda.warp_sync())
                self.store_some(first, count)

    # -- scores to lines in shared memory ------------------------------------------------------------------------------

    def stage_whole(self, first: Expr) -> None:
        """The scores of the thread's two rows to their lines."""
        for r in range(2):
            _, place = self.row(first, r)
            for i in range(LANES // 8):
                for c, value in enumerate(self.stored(r, i)):
                    store(self.lines, place + 8 * i + self.column + c, value)

    def stage_some(self, first: Expr, words: list[Expr], count: Expr) -> None:
        """The same of what the mask holds. The rest goes behind a line's values: there is room where some are not."""
        for r in range(2):
            own, place = self.row(first, r)
            held = [kept("held", from_lane(word, own), "uint32") for word in words]
            last, before = kept("line_count", from_lane(count, own)), kept("before", ones(held[0]))
            for i in range(LANES // 8):
                bit = T.cast(8 * (i % 4) + self.column, "uint32")
                places = ranks(held[i // 4], bit, before if i >= 4 else 0)
                for (mine, number), value in zip(places, self.stored(r, i), strict=True):
                    store(self.lines, place + T.Select(mine, number, last), value)

    @property
    def column(self) -> Expr:
        """The first of a thread's columns in every eight."""
        return self.walk.lane % 4 * 2

    def row(self, first: Expr, r: int) -> tuple[Expr, Expr]:
        """(which of the warp's lines the thread's row r is, where in shared memory its values begin)."""
        own = self.walk.lane // 4 + 8 * r
        spot = self.walk.spot(from_lane(first, own))
        return own, kept("place", self.row_place + 8 * r * self.s.pitch + spot.skip)

    def stored(self, r: int, i: int) -> list[Expr]:
        """The thread's two scores of its row r and the i-th eight columns, times the factor, as values are stored."""
        values = [self.scores.s[4 * i + 2 * r + c] * self.factor for c in range(2)]
        return split(words_of(values, self.s.dtype), self.s.dtype)

    # -- lines to memory -----------------------------------------------------------------------------------------------

    def store_whole(self, first: Expr) -> None:
        """Lines of all keys: whole units at once; of a line that begins inside a unit, its ends by value."""
        s, unit = self.s, self.walk.unit
        for _, begins, spot, place in self.parts(first):
            with when(T.And(begins >= 0, T.Or(unit > 0, T.EQ(spot.skip, 0)))):
                self.store_unit(spot, place)
            with when(T.And(begins >= 0, T.And(spot.skip > 0, unit < s.unit))):
                self.store_value(spot, place, kept("end_at", T.Select(unit >= spot.skip, unit, unit + LANES)))

    def store_some(self, first: Expr, count: Expr) -> None:
        """Lines of ``count`` values."""
        s, unit = self.s, self.walk.unit
        for line, begins, spot, place in self.parts(first):
            mine = kept("line_count", from_lane(count, line))
            end = kept("end", spot.skip + T.if_then_else(begins >= 0, mine, 0))
            with when(T.And(unit * s.unit >= spot.skip, (unit + 1) * s.unit <= end)):
                self.store_unit(spot, place)
            partial = T.Or(spot.skip > 0, end < s.unit)  # the first unit
            with when(T.And(partial, T.And(unit >= spot.skip, unit < T.min(end, s.unit)))):
                self.store_value(spot, place, unit)
            last = T.bitwise_and(end, -s.unit)
            with when(T.And(last > 0, last + unit < end)):
                self.store_value(spot, place, last + unit)

    def parts(self, first: Expr) -> Iterator[tuple[Expr, Expr, Spot, Expr]]:
        """For each unit that the thread stores: (which of the warp's lines, the number of its first value, where it
        lies, the unit's place in shared memory)."""
        w, s = self.walk, self.s
        for i in range(0, WARP_LINES, 32 // s.units):
            line = i + w.lane // s.units
            begins = kept("begins", from_lane(first, line))
            yield line, begins, w.spot(begins), w.unit_place + i * s.pitch

    def store_unit(self, spot: Spot, place: Expr) -> None:
        """Sixteen bytes of a line."""
        unit = registers("unit_words", 4, "uint32")
        words = [unit[i] for i in range(4)]
        do(T.ptx["ld.shared.v4.b32"](*words, self.lines.ptr_to([place])))
        do(T.ptx["st.global.v4.b32"](self.values.ptr_to([self.walk.unit_base + wide(spot.at)]), *words))

    def store_value(self, spot: Spot, place: Expr, at: Expr) -> None:
        """One value, number ``at`` of a line, of whose units the thread has one at ``place``."""
        value = self.lines[place - self.walk.unit * self.s.unit + at]
        store(self.values, self.walk.base + wide(spot.at + at), value)
