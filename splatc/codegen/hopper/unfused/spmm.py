"""out[q] = factor * sum over k of values[q, k] y[k], of values in ACSR order; transposed: out[k], over q of y[q].

Two warpgroups of a block have half of a row tile's column tiles each. For every tile one copies 64 rows of y, and the
lines of the tile as they lie in memory, from the 16 bytes on in which each begins. Threads pick the tile's values out
of the lines, where the bits say that they are, into the registers that are operand A of wgmma. Transposed, lines are of
the columns: the same copies, read across.

A value that is not finite reaches those rows of out that share a tile with it.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Callable, Iterator

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as I

from splatc.codegen.hopper.combine import wide
from splatc.codegen.hopper.emit import (
    MIN_BLOCKS,
    Expr,
    do,
    from_lane,
    kept,
    kernel_function,
    let,
    registers,
    store,
    when,
)
from splatc.codegen.hopper.products import Output, TurnedOutput, at_stage, descriptor, score_of, wait_products
from splatc.codegen.hopper.shared_memory import SharedMemory
from splatc.codegen.hopper.stored import words_of
from splatc.codegen.hopper.unfused.tiles import (
    LANES,
    THREADS,
    WARP_LINES,
    WORDS,
    OwnLine,
    Rows,
    Sizes,
    TurnedRows,
    Walk,
    copy_unit,
    ones,
    ranks,
    sizes_of,
    value_array,
)
from splatc.codegen.kernel import SPMM_FUNCTION, SPMM_TRANSPOSED_FUNCTION, KernelSpec

TEAMS = 2  # warpgroups that share the column tiles of a row tile, where they fit
WARPGROUPS = 4  # of a multiprocessor, that registers should allow
BARRIER_BYTES = 8  # of the barrier by which one of them hands its sums over


def spmm(spec: KernelSpec):
    """(the function, not lowered, threads of a block, its bytes of dynamic shared memory)."""
    return _spmm(spec, SPMM_FUNCTION, queries_are_rows=True)


def spmm_transposed(spec: KernelSpec):
    """The same for the function "splatc_spmm_transposed"."""
    return _spmm(spec, SPMM_TRANSPOSED_FUNCTION, queries_are_rows=False)


def _spmm(spec: KernelSpec, name: str, queries_are_rows: bool):
    s = sizes_of(spec)
    with kernel_function(name) as made:
        y = (TurnedRows if s.rounds else Rows)("y", s)
        values, out = value_array("values", s), value_array("out", s)
        heads, rows = (I.arg(word, I.int32()) for word in ("heads", "rows"))  # of out
        walk = Walk(align=s.unit)
        factor = I.arg("factor", I.float32())
        I.device_entry()
        block = _Block(s, y, values, walk, queries_are_rows)
        blocks = WARPGROUPS // block.teams if s.dim <= 64 else 1
        with I.attr({MIN_BLOCKS: blocks}):
            smem_bytes = block.run()
            block.add_up()
            with when(T.EQ(walk.team, 0)):
                block.write(out, heads, rows, factor)
    return made(), block.teams * THREADS, smem_bytes


class _Block:
    def __init__(self, s: Sizes, y: Rows, values: Expr, walk: Walk, queries_are_rows: bool) -> None:
        self.s, self.y, self.values, self.walk = s, y, values, walk
        self.queries_are_rows = queries_are_rows
        self.pitch = LANES + s.unit  # of lines in shared memory: room for one that begins inside a unit
        self.stage_bytes = s.tile_bytes + LANES * (self.pitch * s.item_bytes + 4 * (1 + WORDS)) + 4
        self.teams = TEAMS if s.fits(BARRIER_BYTES, TEAMS * self.stage_bytes) else 1

    def run(self) -> int:
        """Sum up."""
        s, w = self.s, self.walk
        w.start(self.teams)
        self.stages = s.stages(BARRIER_BYTES, self.teams * self.stage_bytes)
        places = self.teams * self.stages
        pool = SharedMemory()
        self.y_tiles = pool.alloc((places * s.tile_items,), s.stored, align=1024)
        self.lines = pool.alloc((places * LANES * self.pitch,), s.stored, align=16)
        self.places = pool.alloc((places * LANES,), "int32", align=16)  # where the values of each line begin
        self.words = pool.alloc((places * LANES * WORDS,), "uint32", align=16)
        self.kinds = pool.alloc((places,), "int32", align=4)
        self.handed = pool.alloc((1,), "uint64", align=8)  # a barrier: the second warpgroup's sums are there
        pool.commit()
        with when(T.And(T.EQ(w.team, 0), T.EQ(w.thread, 0))):
            do(T.ptx.mbarrier.init.shared.b64(self.handed.ptr_to([0]), T.uint32(THREADS)))
        self.out = TurnedOutput(s.dim, LANES) if s.rounds else Output(s.dtype, s.dim, LANES)
        self.y_desc = descriptor("y_desc", self.y_tiles, 0, self.out.leading)
        self.out.clear()
        with w.if_entries():
            self.y_base = self.y.base(w.batch, w.shared_head)
            self.own = OwnLine(w)
            # Neighbouring lanes copy a unit of a line each: this lane's, in memory and in shared memory.
            self.unit = kept("unit", w.lane % s.units)
            self.unit_base = kept("unit_base", w.base + wide(self.unit * s.unit), "int64")
            line = w.warp * WARP_LINES + w.lane // s.units
            self.unit_place = kept("unit_place", line * self.pitch + self.unit * s.unit)
            w.pipeline(self.stages, self.y, self.own, lambda: None, self.copy, self.arrived, self.tile)
        return pool.size

    def copy(self, entry: Expr, stage: Expr) -> None:
        """The rows of y, the lines, and what says where their values are."""
        w = self.walk
        self.y.copy(self.y_base, self.y_tiles, stage * self.s.tile_items, w.thread)
        first, kind = self.own.first(), self.own.kind()
        with when(T.EQ(w.thread, 0)):
            store(self.kinds, stage, kind)
        with I.If(T.EQ(kind, 0)):
            with I.Then():
                self.copy_lines(first, stage)
            with I.Else():
                self.copy_lines(first, stage, self.own.count())
                with when(w.lane < WARP_LINES):
                    for i, word in enumerate(self.own.words):
                        store(self.words, (stage * LANES + w.own_line) * WORDS + i, word())

    def copy_lines(self, first: Expr, stage: Expr, count: Expr = None) -> None:
        """The warp's lines of a tile, as many units of each as its values touch. count: values of the lane's own line,
        default: all keys of whole lines."""
        s, w = self.s, self.walk
        lines = kept("lines_at", stage * (LANES * self.pitch))
        for i in range(0, WARP_LINES, 32 // s.units):
            line = i + w.lane // s.units
            begins = kept("begins", from_lane(first, line))
            spot, wanted = w.spot(begins), begins >= 0
            if count is not None:
                mine = kept("line_count", from_lane(count, line))
                wanted = T.And(wanted, self.unit * s.unit < spot.skip + mine)
            self.copy_unit(lines + self.unit_place + i * self.pitch, self.unit_base + wide(spot.at), wanted)
        with when(w.lane < WARP_LINES):
            spot = w.spot(first)
            place = kept("own_place", lines + w.own_line * self.pitch)
            count = T.Select(first >= 0, LANES, 0) if count is None else count
            wanted = spot.skip + count > LANES
            self.copy_unit(place + LANES, w.base + wide(spot.at + LANES), wanted)  # what is left of it
            store(self.places, stage * LANES + w.own_line, place + spot.skip)

    def copy_unit(self, place: Expr, source: Expr, wanted: Expr) -> None:
        """Sixteen bytes of a line; zeros if they are not wanted."""
        copy_unit(self.lines.ptr_to([place]), self.values.ptr_to([source]), wanted)

    def arrived(self, number: Expr, stage: Expr) -> None:
        """Round what this thread has copied of y, where tensor cores would not."""
        if self.s.rounds:
            self.y.round(self.y_tiles, stage * self.s.tile_items, self.walk.thread)

    def tile(self, entry: Expr, stage: Expr, meanwhile: Callable[[], None]) -> None:
        """Add a tile's product."""
        meanwhile()  # first of all: what it begins to read has the time of a tile to come
        with I.If(T.EQ(self.kinds[stage], 0)):
            with I.Then():
                self.take(stage, whole=True)
            with I.Else():
                self.take(stage, whole=False)
        self.out.issue(at_stage("y_now", self.y_desc, stage, self.s.tile_bytes))
        wait_products(0)
        self.out.fence()

    def take(self, stage: Expr, whole: bool) -> None:
        """A tile's values to the registers of A. whole: every line has all keys."""
        picked = self.rows_of(stage, whole) if self.queries_are_rows else self.columns_of(stage, whole)
        for pair, (low, high) in picked:
            if self.s.rounds:
                for c, value in enumerate((low, high)):
                    place = self.out.p[score_of(2 * pair + c)]  # where a register goes, the one there comes from
                    do(T.ptx["cvt.rn.tf32.f32"](place, T.reinterpret("float32", value)))
            else:
                low, high = (T.cast(value, "uint32") for value in (low, high))
                store(self.out.p, pair, T.bitwise_or(low, T.shift_left(high, T.uint32(16))))

    def rows_of(self, stage: Expr, whole: bool) -> Iterator[tuple[int, tuple[Expr, Expr]]]:
        """(pair, the values of a thread's accumulators 2 pair and 2 pair + 1): lines are rows."""
        w = self.walk
        for r in range(2):
            line = _Held(self, stage * LANES + w.warp * WARP_LINES + w.lane // 4 + 8 * r, whole)
            for i in range(LANES // 8):
                yield 2 * i + r, line.pair(8 * i + w.lane % 4 * 2)

    def columns_of(self, stage: Expr, whole: bool) -> Iterator[tuple[int, tuple[Expr, Expr]]]:
        """The same where lines are columns."""
        w = self.walk
        row = w.warp * WARP_LINES + w.lane // 4
        for i in range(LANES // 8):
            column = stage * LANES + 8 * i + w.lane % 4 * 2
            lines = [_Held(self, column + c, whole) for c in range(2)]
            for r in range(2):
                yield 2 * i + r, (lines[0].value(row + 8 * r), lines[1].value(row + 8 * r))

    def add_up(self) -> None:
        """The first warpgroup's sums become those of both, by way of the places of the other's rows of y."""
        if self.teams == 1:
            return
        w, pair = self.walk, registers("pair", 2)
        do(T.cuda.cta_sync())  # tensor cores read there no more, and the barrier is set up
        with I.If(T.EQ(w.team, 1)):
            with I.Then():
                for i in range(0, self.out.count, 2):
                    do(T.ptx["st.shared.v2.f32"](self.pair_at(i), self.out.o[i], self.out.o[i + 1]))
                do(T.ptx.mbarrier.arrive.shared.b64(self.handed.ptr_to([0])))
            with I.Else():
                do(T.cuda.mbarrier_wait(self.handed.ptr_to([0]), 0))
                for i in range(0, self.out.count, 2):
                    do(T.ptx["ld.shared.v2.f32"](pair[0], pair[1], self.pair_at(i)))
                    for c in range(2):
                        store(self.out.o, i + c, self.out.o[i + c] + pair[c])

    def pair_at(self, i: int) -> Expr:
        """Where the second warpgroup leaves a thread's accumulators i and i + 1."""
        s = self.s
        number = i * THREADS + self.walk.thread * 2
        return self.y_tiles.ptr_to([self.stages * s.tile_items + number * (4 // s.item_bytes)])

    def write(self, out: Expr, heads: Expr, rows: Expr, factor: Expr) -> None:
        """The rows of out, (batch, heads, rows, dim), that exist."""
        s, w = self.s, self.walk
        for r in range(2):
            position = let("position", w.positions[w.item, w.warp * 16 + w.lane // 4 + 8 * r])
            with when(position >= 0):
                row = let("out_row", wide(w.batch * heads + w.head) * wide(rows) + wide(position))
                for i in range(s.dim // 8):
                    words = words_of([self.out.o[4 * i + 2 * r + c] * factor for c in range(2)], s.dtype)
                    kind = "b32" if len(words) == 1 else "v2.b32"
                    at = row * s.dim + wide(8 * i + w.lane % 4 * 2)
                    do(T.ptx[f"st.global.{kind}"](out.ptr_to([at]), *words))


class _Held:
    """A line in shared memory, and where its values are. whole: it has all keys."""

    def __init__(self, block: _Block, line: Expr, whole: bool) -> None:
        self._block = block
        self._place = kept("line_place", block.places[line])
        self._words = [] if whole else [kept("held", block.words[line * WORDS + i], "uint32") for i in range(WORDS)]
        self._before = None if whole else kept("before", ones(self._words[0]))

    def pair(self, key: Expr) -> tuple[Expr, Expr]:
        """The values of an even key and the next one; 0 for what the mask does not hold."""
        if not self._words:
            return self._at(key), self._at(key + 1)
        (first, low), (second, high) = self._ranks(key)
        return self._if(first, low), self._if(second, high)

    def value(self, key: Expr) -> Expr:
        """The value of a key; 0 if the mask does not hold it."""
        return self._if(*self._ranks(key)[0]) if self._words else self._at(key)

    def _ranks(self, key: Expr) -> list[tuple[Expr, Expr]]:
        high = key >= 32
        word = T.Select(high, self._words[1], self._words[0])
        return ranks(word, T.cast(key % 32, "uint32"), T.Select(high, self._before, 0))

    def _at(self, number: Expr) -> Expr:
        return self._block.lines[self._place + number]

    def _if(self, held: Expr, number: Expr) -> Expr:
        return T.Select(held, self._at(number), T.cast(0, self._block.s.stored))
