"""values[q, k] = factor * <q_q, k_k> for the elements of a mask, in ACSR order.

A block multiplies 64 queries by 64 keys at a time; several may share the column tiles of a row tile. The products leave
through shared memory, each warp's 16 lines by itself: there a line's values are neighbours, and before them stand the
last 32 bytes of the tile before. 16 bytes a lane go from there to memory, read from wherever they begin: what is whole
32 bytes there. Memory is slow at writing parts of these, less than half as fast where no line is aligned. So a line
that goes on in the next tile leaves the rest to that; only the ends of what a block has of a row are stored value by
value.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as I

from splatc.codegen.constants import FULL_WARP
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
    UNIT_BYTES,
    WARP_LINES,
    OwnLine,
    Rows,
    Sizes,
    Walk,
    ones,
    ranks,
    sizes_of,
    value_array,
)
from splatc.codegen.kernel import SDDMM_FUNCTION as NAME
from splatc.codegen.kernel import KernelSpec

UNIT_BITS = {8: 3, 4: 2}  # the logarithm of a unit's values
UNIT_WORDS = UNIT_BYTES // 4
BLOCKS = 5  # of a multiprocessor, that registers should allow


def sddmm(spec: KernelSpec):
    """(the function, not lowered, threads of a block, its bytes of dynamic shared memory)."""
    s = sizes_of(spec)
    with kernel_function(NAME) as made:
        q, k = Rows("q", s), Rows("k", s)
        values, walk = value_array("values", s), Walk(align=s.sector)
        factor = I.arg("factor", I.float32())
        I.device_entry()
        with I.attr({MIN_BLOCKS: BLOCKS if s.dim <= 64 else 1}):
            smem_bytes = _Block(s, q, k, values, walk, factor).run()
    return made(), THREADS, smem_bytes


class _Block:
    def __init__(self, s: Sizes, q: Rows, k: Rows, values: Expr, walk: Walk, factor: Expr) -> None:
        self.s, self.q, self.k, self.values, self.walk, self.factor = s, q, k, values, walk, factor

    def run(self) -> int:
        s, w = self.s, self.walk
        w.start()
        self.pitch = s.sector + LANES + s.packed  # of lines in shared memory: an odd number of words, for its banks
        line_bytes = LANES * self.pitch * s.item_bytes
        stages = s.stages(s.tile_bytes + line_bytes, s.tile_bytes)
        pool = SharedMemory()
        self.q_tile = pool.alloc((s.tile_items,), s.stored, align=1024)
        self.k_tiles = pool.alloc((stages * s.tile_items,), s.stored, align=1024)
        self.lines = pool.alloc((LANES * self.pitch,), s.stored, align=4)
        pool.commit()
        self.scores = Scores(s.dtype, s.dim, LANES, LANES)
        self.q_desc = descriptor("q_desc", self.q_tile, 0, 1)
        self.k_desc = descriptor("k_desc", self.k_tiles, 0, 1)
        with w.if_entries():
            self.q.ask(w.positions, w.item, w.thread)
            self.q_base, self.k_base = self.q.base(w.batch, w.head), self.k.base(w.batch, w.shared_head)
            self.own = OwnLine(w)
            self.open_at = Cell("open_at", -1)  # where values of the own line begin that wait for more, -1 for none
            self.unit = kept("unit", w.lane % s.units)  # that the lane stores of a line; its neighbours have others
            w.pipeline(stages, self.k, None, self.begin, self.copy, self.arrived, self.tile)
        return pool.size

    def begin(self) -> None:
        """The queries of the row tile."""
        self.q.copy(self.q_base, self.q_tile, 0, self.walk.thread)

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
        words = [kept("word_now", word(), "uint32") for word in own.words]
        line, as_rows = self.line(words)
        own.read(w.known(entry + 1))
        meanwhile()
        wait_products(0)
        self.scores.fence()
        do(T.cuda.warp_sync())  # the lines of the tile before have been read
        with I.If(as_rows):
            with I.Then():
                self.stage_rows()
            with I.Else():
                self.stage_held(words)
        do(T.cuda.warp_sync())
        self.store_units(line)
        self.store_ends(line)
        self.keep_open(line)
        own.look_ahead(w.known(entry + 2))

    def line(self, words: list[Expr]) -> tuple[_Line, Expr]:
        """(the lane's own line of a tile, whether the warp's lines may lie as rows of scores do: each one's keys are
        neighbours, and nothing waits before a line that does not begin with the first key lane)."""
        s, own = self.s, self.own
        count, spot = own.count(), self.walk.spot(own.first())
        opened = kept("opened", self.open_at())
        begin = kept("begin_at", T.Select(opened >= 0, opened, spot.skip))
        end = kept("end_at", spot.skip + count)
        last = kept("last", T.bitwise_and(end, -s.sector))
        goes_on = kept("goes_on", T.cast(T.And(count > 0, T.EQ(own.next_first(), own.first() + count)), "int32"))
        self.open_at.set(T.Select(goes_on > 0, T.Select(last > 0, 0, begin), -1))
        limit = kept("limit", T.Select(goes_on > 0, last, end))
        lowest, neighbours = first_of(words)
        unfit = T.And(count > 0, T.Or(T.Not(neighbours), T.And(opened >= 0, lowest > 0)))
        scattered = kept("scattered", T.cuda.any_sync(T.uint32(FULL_WARP), T.cast(unfit, "int32")))
        as_rows = T.EQ(scattered, 0)
        place = kept("begins", s.sector + T.Select(T.And(as_rows, count > 0), lowest, 0))
        return _Line(spot.at, count, begin, limit, goes_on, place, kept("shift", place - spot.skip)), as_rows

    # -- scores to lines in shared memory ------------------------------------------------------------------------------

    def stage_rows(self) -> None:
        """The scores of the thread's two rows, all keys, as they are."""
        for r in range(2):
            row = kept("row_place", self.row_place(self.walk.lane // 4 + 8 * r) + self.s.sector + self.column)
            for i in range(LANES // 8):
                for c, word in enumerate(self.stored(r, i)):
                    do(T.ptx["st.shared.b32"](self.lines.ptr_to([row + 8 * i + c]), word))

    def stage_held(self, words: list[Expr]) -> None:
        """The same without what the mask does not hold: the others are neighbours then."""
        for r in range(2):
            own = self.walk.lane // 4 + 8 * r
            row = kept("row_place", self.row_place(own) + self.s.sector)
            held = [kept("held", from_lane(word, own), "uint32") for word in words]
            before = kept("before", ones(held[0]))
            for i in range(LANES // 8):
                bit = T.cast(8 * (i % 4) + self.column, "uint32")
                places = ranks(held[i // 4], bit, before if i >= 4 else 0)
                for (mine, number), value in zip(places, split(self.stored(r, i), self.s.dtype), strict=True):
                    with when(mine):
                        store(self.lines, row + number, value)

    @property
    def column(self) -> Expr:
        """The first of a thread's columns in every eight."""
        return self.walk.lane % 4 * 2

    def row_place(self, own: Expr) -> Expr:
        """Where in shared memory one of the warp's lines is."""
        return (self.walk.warp * WARP_LINES + own) * self.pitch

    def stored(self, r: int, i: int) -> list[Expr]:
        """The words of the thread's two scores of its row r and the i-th eight columns, times the factor."""
        return words_of([self.scores.s[4 * i + 2 * r + c] * self.factor for c in range(2)], self.s.dtype)

    # -- lines to memory -----------------------------------------------------------------------------------------------

    def store_units(self, line: _Line) -> None:
        """What is complete, 16 bytes a lane: neighbouring lanes have the other half of 32 bytes.

        One step for all that the lane has, then the next: they do not wait for each other."""
        s, w = self.s, self.walk
        first = T.shift_right(line.begin + (s.unit - 1), UNIT_BITS[s.unit])
        limit = T.shift_right(line.limit, UNIT_BITS[s.unit])
        packed = kept("packed", T.bitwise_or(T.bitwise_or(first, T.shift_left(limit, 8)), T.shift_left(line.shift, 16)))
        theirs = [(i + w.lane // s.units, self.unit) for i in range(0, WARP_LINES, 32 // s.units)]
        theirs.append((w.lane // 2, s.units + w.lane % 2))  # of lines that begin inside 32 bytes
        known = [(kept("of_line", from_lane(packed, own)), kept("unit_at", from_lane(line.at, own)))
                 for own, _ in theirs]  # fmt: skip
        units = [self.read_unit(own, T.shift_right(mine, 16) + unit * s.unit)
                 for (own, unit), (mine, _) in zip(theirs, known, strict=True)]  # fmt: skip
        for (_, unit), (mine, at), words in zip(theirs, known, units, strict=True):
            end = T.bitwise_and(T.shift_right(mine, 8), 255)
            with when(T.And(unit >= T.bitwise_and(mine, 255), unit < end)):
                target = self.values.ptr_to([w.base + wide(at + unit * s.unit)])
                do(T.ptx["st.global.v4.b32"](target, *words))

    def store_ends(self, line: _Line) -> None:
        """The first and the last values of lines, if 16 bytes are not theirs alone, one by one."""
        s, w = self.s, self.walk
        partial = T.Or(T.NE(line.begin % s.unit, 0), T.NE(line.limit % s.unit, 0))
        with when(T.NE(T.cuda.any_sync(T.uint32(FULL_WARP), T.cast(partial, "int32")), 0)):
            for i in range(0, WARP_LINES, 32 // s.unit):
                own = i + w.lane // s.unit
                begin, limit = (kept("end_of", from_lane(x, own)) for x in (line.begin, line.limit))
                at, shift = (kept("ends_at", from_lane(x, own)) for x in (line.at, line.shift))
                for inside in (begin, limit):
                    number = kept("number", T.bitwise_and(inside, -s.unit) + w.lane % s.unit)
                    with when(T.And(T.NE(inside % s.unit, 0), T.And(number >= begin, number < limit))):
                        store(self.values, w.base + wide(at + number), self.lines[self.row_place(own) + shift + number])

    def keep_open(self, line: _Line) -> None:
        """The last 32 bytes of lines that go on in the next tile to where they stand before that one's."""
        s, own, half = self.s, self.walk.lane // 2, self.walk.lane % 2 * self.s.unit
        end = kept("kept_end", from_lane(T.Select(line.goes_on > 0, line.place + line.count, 0), own))
        words = self.read_unit(own, T.max(end - s.sector, 0) + half)
        do(T.cuda.warp_sync())
        with when(end > 0):
            target = self.row_place(own) + half
            for i, word in enumerate(words):
                do(T.ptx["st.shared.b32"](self.lines.ptr_to([target + i * s.packed]), word))

    def read_unit(self, own: Expr, number: Expr) -> list[Expr]:
        """The words of 16 bytes of a line, from any value on. Beyond a line's values: any words of it."""
        s = self.s
        count = UNIT_WORDS + (s.packed > 1)
        word = T.min(number // s.packed, self.pitch // s.packed - count)
        place = kept("unit_place", self.row_place(own) + word * s.packed)
        read = registers("read", count, "uint32")
        for i in range(count):
            do(T.ptx["ld.shared.b32"](read[i], self.lines.ptr_to([place + i * s.packed])))
        if s.packed == 1:
            return [read[i] for i in range(count)]
        moved, by = registers("moved", UNIT_WORDS, "uint32"), T.cast(number % 2 * 16, "uint32")
        for i in range(UNIT_WORDS):
            do(T.ptx["shf.r.wrap.b32"](moved[i], read[i], read[i + 1], by))
        return [moved[i] for i in range(UNIT_WORDS)]


@dataclass(frozen=True)
class _Line:
    """A lane's own line of a tile. Values are numbered from where 32 bytes begin in memory, ``at``.

    count: how many there are. begin, limit: the first of those to store now, which may be of the tile before, and the
    end of them. goes_on: whether the next tile has the line's next values. place: where in shared memory the line's
    values of this tile begin. shift: a number's place there less the number.
    """

    at: Expr
    count: Expr
    begin: Expr
    limit: Expr
    goes_on: Expr
    place: Expr
    shift: Expr


def first_of(words: list[Expr]) -> tuple[Expr, Expr]:
    """(which is the lowest bit of a line that has any, whether its bits are all neighbours)."""
    low, high = (T.cast(word, "uint64") for word in words)
    bits = kept("bits", T.bitwise_or(low, T.shift_left(high, T.uint64(32))), "uint64")
    below = kept("below", T.bitwise_and(bits - T.uint64(1), ~bits), "uint64")
    carried = T.bitwise_and(bits + below + T.uint64(1), bits)  # adding the lowest bit: all ones above it that follow go
    return kept("lowest", T.cast(T.popcount(below), "int32")), T.EQ(carried, T.uint64(0))
