"""values[q, k] = factor * <q_q, k_k> for the elements of a mask, in ACSR order.

A block multiplies 64 queries by 64 keys at a time; several may share the column tiles of a row tile. The products leave
through shared memory, each warp's 16 lines by itself: there a line lies as it will in memory, without what the mask
does not hold, and in the same place among 32 bytes. Memory is slow at writing parts of these: less than half as fast
where no line is aligned. So a line that goes on in the next tile keeps what is not complete until then; only the ends
of what a block has of a row are stored value by value.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as I

from splatc.codegen.constants import FULL_WARP
from splatc.codegen.hopper.block import int_arg
from splatc.codegen.hopper.combine import wide
from splatc.codegen.hopper.emit import (
    MIN_BLOCKS,
    Cell,
    Expr,
    do,
    from_lane,
    kept,
    kernel_function,
    registers,
    store,
    when,
)
from splatc.codegen.hopper.products import Scores, at_stage, descriptor, wait_products
from splatc.codegen.hopper.shared_memory import SharedMemory
from splatc.codegen.hopper.stored import split, words_of
from splatc.codegen.hopper.unfused.tiles import (
    LANES,
    THREADS,
    WARP_LINES,
    OwnLine,
    Rows,
    Sizes,
    Spot,
    Walk,
    ones,
    ranks,
    sizes_of,
    value_array,
)
from splatc.codegen.kernel import SDDMM_FUNCTION as NAME
from splatc.codegen.kernel import KernelSpec

UNIT_BITS = {8: 3, 4: 2}  # the logarithm of a unit's values
BLOCKS = 5  # of a multiprocessor, that registers should allow


def sddmm(spec: KernelSpec):
    """(the function, not lowered, threads of a block, its bytes of dynamic shared memory)."""
    s = sizes_of(spec)
    with kernel_function(NAME) as made:
        q, k = Rows("q", s), Rows("k", s)
        values, walk = value_array("values", s), Walk(align=s.sector)
        factor, parts = I.arg("factor", I.float32()), int_arg("parts")
        I.device_entry()
        with I.attr({MIN_BLOCKS: BLOCKS if s.dim <= 64 else 1}):
            smem_bytes = _Block(s, q, k, values, walk, factor).run(parts)
    return made(), THREADS, smem_bytes


class _Block:
    def __init__(self, s: Sizes, q: Rows, k: Rows, values: Expr, walk: Walk, factor: Expr) -> None:
        self.s, self.q, self.k, self.values, self.walk, self.factor = s, q, k, values, walk, factor

    def run(self, parts: Expr) -> int:
        s, w = self.s, self.walk
        w.start(parts)
        self.pitch = LANES + s.sector + s.unit  # of lines in shared memory: the last unit spreads rows over its banks
        line_bytes = LANES * self.pitch * s.item_bytes
        stages = s.stages(s.tile_bytes + line_bytes, s.tile_bytes)
        pool = SharedMemory()
        self.q_tile = pool.alloc((s.tile_items,), s.stored, align=1024)
        self.k_tiles = pool.alloc((stages * s.tile_items,), s.stored, align=1024)
        self.lines = pool.alloc((LANES * self.pitch,), s.stored, align=16)
        pool.commit()
        self.scores = Scores(s.dtype, s.dim, LANES, LANES)
        self.q_desc = descriptor("q_desc", self.q_tile, 0, 1)
        self.k_desc = descriptor("k_desc", self.k_tiles, 0, 1)
        with when(w.count > 0):
            self.q.ask(w.positions, w.item, w.thread)
            self.q.copy(self.q.base(w.batch, w.head), self.q_tile, 0, w.thread)
            self.k_base = self.k.base(w.batch, w.shared_head)
            self.own = OwnLine(w)
            self.open_at = Cell("open_at", -1)  # where values of the own line begin that wait for more, -1 for none
            # In shared memory: the thread's first row; the unit that it stores of a line, neighbouring lanes storing
            # others; and of the two units that a line begins with, those of 32 bytes, one.
            own = w.warp * WARP_LINES
            self.row_place = kept("row_place", (own + w.lane // 4) * self.pitch)
            self.unit = kept("unit", w.lane % s.units)
            self.unit_place = kept("unit_place", (own + w.lane // s.units) * self.pitch + self.unit * s.unit)
            self.half_place = kept("half_place", (own + w.lane // 2) * self.pitch + w.lane % 2 * s.unit)
            w.pipeline(stages, self.k, None, self.copy, self.arrived, self.tile)
        return pool.size

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
        kind, words = kept("kind_now", own.kind()), [kept("word_now", word(), "uint32") for word in own.words]
        line = self.line()
        own.read(w.known(entry + 1))
        meanwhile()
        wait_products(0)
        self.scores.fence()
        do(T.cuda.warp_sync())  # the lines of the tile before have been read
        with I.If(T.EQ(kind, 0)):
            with I.Then():
                self.stage_whole(line)
            with I.Else():
                self.stage_some(line, words)
        do(T.cuda.warp_sync())
        self.store_units(line)
        self.store_ends(line)
        do(T.cuda.warp_sync())
        self.keep_open(line)
        own.look_ahead(w.known(entry + 2))

    def line(self) -> _Line:
        """The lane's own line of a tile."""
        s, own = self.s, self.own
        count, spot = own.count(), self.walk.spot(own.first())
        begin = kept("begin_at", T.Select(self.open_at() >= 0, self.open_at(), spot.skip))
        end = kept("end_at", spot.skip + count)
        last = kept("last", T.bitwise_and(end, -s.sector))
        goes_on = kept("goes_on", T.cast(T.And(count > 0, T.EQ(own.next_first(), own.first() + count)), "int32"))
        self.open_at.set(T.Select(goes_on > 0, T.Select(last > 0, 0, begin), -1))
        limit = kept("limit", T.Select(goes_on > 0, last, end))
        return _Line(spot, count, begin, limit, kept("kept_from", goes_on * last))

    # -- scores to lines in shared memory ------------------------------------------------------------------------------

    def stage_whole(self, line: _Line) -> None:
        """The scores of the thread's two rows to their lines."""
        for r in range(2):
            _, place = self.row(line, r)
            for i in range(LANES // 8):
                for c, value in enumerate(self.stored(r, i)):
                    store(self.lines, place + 8 * i + self.column + c, value)

    def stage_some(self, line: _Line, words: list[Expr]) -> None:
        """The same of what the mask holds. The rest goes behind a line's values, where there is room then: every lane
        has a place of its own."""
        for r in range(2):
            own, place = self.row(line, r)
            held = [kept("held", from_lane(word, own), "uint32") for word in words]
            before = kept("before", ones(held[0]))
            unheld = kept("unheld", from_lane(line.count, own) + self.walk.lane % 4)
            for i in range(LANES // 8):
                bit = T.cast(8 * (i % 4) + self.column, "uint32")
                places = ranks(held[i // 4], bit, before if i >= 4 else 0)
                for (mine, number), value in zip(places, self.stored(r, i), strict=True):
                    store(self.lines, place + T.Select(mine, number, unheld), value)

    @property
    def column(self) -> Expr:
        """The first of a thread's columns in every eight."""
        return self.walk.lane % 4 * 2

    def row(self, line: _Line, r: int) -> tuple[Expr, Expr]:
        """(which of the warp's lines the thread's row r is, where in shared memory its values begin)."""
        own = self.walk.lane // 4 + 8 * r
        return own, kept("place", self.row_place + 8 * r * self.pitch + from_lane(line.spot.skip, own))

    def stored(self, r: int, i: int) -> list[Expr]:
        """The thread's two scores of its row r and the i-th eight columns, times the factor, as values are stored."""
        values = [self.scores.s[4 * i + 2 * r + c] * self.factor for c in range(2)]
        return split(words_of(values, self.s.dtype), self.s.dtype)

    # -- lines to memory -----------------------------------------------------------------------------------------------

    def store_units(self, line: _Line) -> None:
        """What is complete, 16 bytes a lane: neighbouring lanes have the other half of 32 bytes."""
        s, w = self.s, self.walk
        first = T.shift_right(line.begin + (s.unit - 1), UNIT_BITS[s.unit])
        bounds = kept("bounds", T.bitwise_or(first, T.shift_left(T.shift_right(line.limit, UNIT_BITS[s.unit]), 8)))

        def store_unit(own: Expr, unit: Expr, place: Expr) -> None:
            mine = kept("unit_bounds", from_lane(bounds, own))
            at = kept("unit_at", from_lane(line.spot.at, own))
            with when(T.And(unit >= T.bitwise_and(mine, 255), unit < T.shift_right(mine, 8))):
                words = self.read_unit(place)
                target = self.values.ptr_to([w.base + wide(at + unit * s.unit)])
                do(T.ptx["st.global.v4.b32"](target, *words))

        for i in range(0, WARP_LINES, 32 // s.units):
            store_unit(i + w.lane // s.units, self.unit, self.unit_place + i * self.pitch)
        store_unit(w.lane // 2, s.units + w.lane % 2, self.half_place + LANES)  # of lines that begin inside 32 bytes

    def store_ends(self, line: _Line) -> None:
        """The first and the last values of lines, if 16 bytes are not theirs alone, one by one."""
        s, w = self.s, self.walk
        partial = T.Or(T.NE(line.begin % s.unit, 0), T.NE(line.limit % s.unit, 0))
        with when(T.NE(T.cuda.any_sync(T.uint32(FULL_WARP), T.cast(partial, "int32")), 0)):
            for i in range(0, WARP_LINES, 32 // s.unit):
                own = i + w.lane // s.unit
                begin, limit = (kept("end_of", from_lane(x, own)) for x in (line.begin, line.limit))
                at = kept("ends_at", from_lane(line.spot.at, own))
                for inside in (begin, limit):
                    number = kept("number", T.bitwise_and(inside, -s.unit) + w.lane % s.unit)
                    with when(T.And(T.NE(inside % s.unit, 0), T.And(number >= begin, number < limit))):
                        value = self.lines[(w.warp * WARP_LINES + own) * self.pitch + number]
                        store(self.values, w.base + wide(at + number), value)

    def keep_open(self, line: _Line) -> None:
        """What is left of lines that go on in the next tile to where they will begin."""
        w = self.walk
        source = kept("source", from_lane(line.kept_from, w.lane // 2))
        with when(source > 0):
            words = self.read_unit(self.half_place + source)
            do(T.ptx["st.shared.v4.b32"](self.lines.ptr_to([self.half_place]), *words))

    def read_unit(self, place: Expr) -> list[Expr]:
        """The words of 16 bytes in shared memory."""
        unit = registers("unit_words", 4, "uint32")
        words = [unit[i] for i in range(4)]
        do(T.ptx["ld.shared.v4.b32"](*words, self.lines.ptr_to([place])))
        return words


@dataclass(frozen=True)
class _Line:
    """A lane's own line of a tile. In shared memory it lies as in memory, from where 32 bytes begin.

    spot: of its ``count`` values. begin, limit: the first of those to store now, which may be of the tile before, and
    the end of them. kept_from: where the others begin, which are stored with the next tile's; 0 if there are none.
    """

    spot: Spot
    count: Expr
    begin: Expr
    limit: Expr
    kept_from: Expr
