"""values[q, k] = factor * <q_q, k_k> for the elements of a mask, in ACSR order.

A block multiplies 64 queries by 64 keys at a time. The products leave through shared memory, each warp's 16 lines by
itself: there a line lies as it will in memory, without what the mask does not hold, and in the same place among 16
bytes. Threads then store 16 bytes of a line each; its ends, whose 16 bytes it shares with others, value by value.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Callable

from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as I

from splatc.codegen.hopper.combine import wide
from splatc.codegen.hopper.emit import Expr, do, let, registers, store, when
from splatc.codegen.hopper.products import Scores, at_stage, descriptor, hidden, wait_products
from splatc.codegen.hopper.unfused.stored import split, words_of
from splatc.codegen.hopper.unfused.tiles import (
    LANES,
    THREADS,
    Line,
    Rows,
    Sizes,
    Walk,
    below,
    has,
    kept,
    ones,
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
            w.pipeline(stages, self.copy, self.arrived, self.tile)
        return int(pool.max_offset)

    def copy(self, entry: Expr, stage: Expr) -> None:
        """The keys of a column tile."""
        w, s = self.walk, self.s
        self.k.copy(self.k_base, w.columns, w.entries[entry, 0], self.k_tiles, stage * s.tile_items, w.thread)

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
        meanwhile()
        rows = [self.line(entry, w.lane // 4 + 8 * r) for r in range(2)]  # of the thread's scores
        lines = [self.line(entry, w.lane // s.units + i) for i in range(0, WARP_LINES, 32 // s.units)]
        wait_products(0)
        self.scores.fence()
        do(T.cuda.warp_sync())  # the lines of the tile before have been read
        with I.If(T.EQ(w.entries[entry, 1], 0)):
            with I.Then():
                self.stage(rows, whole=True)
            with I.Else():
                self.stage(rows, whole=False)
        do(T.cuda.warp_sync())
        for line in lines:
            self.store(line)

    def line(self, entry: Expr, number: Expr) -> Line:
        """Of the warp's lines in a tile, this one."""
        line = self.walk.warp * WARP_LINES + number
        return self.walk.line(entry, line, line * self.s.pitch, self.s)

    def stage(self, lines: list[Line], whole: bool) -> None:
        """The thread's scores, times the factor and rounded, to where they belong in their lines.

        What the mask does not hold goes behind the line's values: there is room where it is not whole.
        """
        s, scores, column = self.s, self.scores.s, self.walk.lane % 4 * 2
        for r, line in enumerate(lines):
            place = hidden(line.place + line.skip, "int32")
            before = ones(line.words[0])
            for i in range(LANES // 8):
                words = words_of([scores[4 * i + 2 * r + c] * self.factor for c in range(2)], s.dtype)
                for c, value in enumerate(split(words, s.dtype)):
                    number = 8 * i + column + c
                    if not whole:
                        word, bit = line.words[i // 4], T.cast(8 * (i % 4) + column + c, "uint32")
                        rank = ones(T.bitwise_and(word, below(bit))) + (before if i >= 4 else 0)
                        number = T.Select(has(word, bit), rank, line.count)
                    store(self.lines, place + number, value)

    def store(self, line: Line) -> None:
        """A line's values to memory: the units that are all its own at once, the others' by value."""
        s, lines, values = self.s, self.lines, self.values
        at = let("at", self.walk.lane % s.units)
        end = kept("end", line.skip + line.count)
        with when(T.And(at * s.unit >= line.skip, (at + 1) * s.unit <= end)):
            unit = registers("unit", 4, "uint32")
            words = [unit[i] for i in range(4)]
            do(T.ptx["ld.shared.v4.b32"](*words, lines.ptr_to([line.place + at * s.unit])))
            do(T.ptx["st.global.v4.b32"](values.ptr_to([line.target + wide(at * s.unit)]), *words))
        partial = T.Or(line.skip > 0, line.count < s.unit)  # the first unit
        with when(T.And(partial, T.And(at >= line.skip, at < T.min(end, s.unit)))):
            store(values, line.target + wide(at), lines[line.place + at])
        last = let("last", T.bitwise_and(end, -s.unit))
        with when(T.And(last > 0, last + at < end)):
            store(values, line.target + wide(last + at), lines[line.place + last + at])


assert THREADS // 32 * WARP_LINES == LANES
