"""out[q] = factor * sum over k of values[q, k] y[k], of values in ACSR order; transposed: out[k], over q of y[q].

For every tile a block copies 64 rows of y, and the lines of the tile as they lie in memory, from the 16 bytes on in
which each begins. Threads pick the tile's values out of the lines, where the bits say that they are, into the registers
that are operand A of wgmma. Transposed, lines are of the columns: the same copies, read across.

A value that is not finite reaches those rows of out that share a tile with it.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Callable

from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as I

from splatc.codegen.hopper.combine import wide
from splatc.codegen.hopper.emit import Expr, do, let, registers, store, when
from splatc.codegen.hopper.products import PTX_TYPE, Output, at_stage, descriptor, wait_products
from splatc.codegen.hopper.unfused.tiles import (
    LANES,
    THREADS,
    UNIT_BYTES,
    WORDS,
    Rows,
    Sizes,
    Walk,
    below,
    copy_unit,
    has,
    ones,
    pair,
    sizes_of,
    value_array,
)
from splatc.codegen.kernel import SPMM_FUNCTION, SPMM_TRANSPOSED_FUNCTION, KernelSpec

BLOCKS = 4  # of a multiprocessor, that registers should allow


def spmm(spec: KernelSpec):
    """(the function, not lowered, its bytes of dynamic shared memory)."""
    return _spmm(spec, SPMM_FUNCTION, queries_are_rows=True)


def spmm_transposed(spec: KernelSpec):
    """The same for the function "splatc_spmm_transposed"."""
    return _spmm(spec, SPMM_TRANSPOSED_FUNCTION, queries_are_rows=False)


def _spmm(spec: KernelSpec, name: str, queries_are_rows: bool):
    s = sizes_of(spec)
    with IRBuilder() as builder:
        with I.prim_func():
            I.func_name(name)
            y = Rows("y", s)
            values, out = value_array("values", s), value_array("out", s)
            end = I.arg("end", I.int64())  # of all values
            heads, rows = (I.arg(word, I.int32()) for word in ("heads", "rows"))  # of out
            walk = Walk()
            factor = I.arg("factor", I.float32())
            I.device_entry()
            with I.attr({"tirx.launch_bounds_min_blocks_per_sm": BLOCKS if s.dim <= 64 else 1}):
                block = _Block(s, y, values, end, walk, queries_are_rows)
                smem_bytes = block.run()
                block.write(out, heads, rows, factor)
    return builder.get().with_attr("global_symbol", name), smem_bytes


class _Block:
    def __init__(self, s: Sizes, y: Rows, values: Expr, end: Expr, walk: Walk, queries_are_rows: bool) -> None:
        self.s, self.y, self.values, self.end, self.walk = s, y, values, end, walk
        self.queries_are_rows = queries_are_rows

    def run(self) -> int:
        """Sum up."""
        s, w = self.s, self.walk
        w.start()
        line_bytes = LANES * (s.pitch * s.item_bytes + 4 * (1 + WORDS))
        stages = s.stages(0, s.tile_bytes + line_bytes)
        pool = T.SMEMPool()
        self.y_tiles = pool.alloc((stages * s.tile_items,), s.stored, align=1024)
        self.lines = pool.alloc((stages * LANES * s.pitch,), s.stored, align=UNIT_BYTES)
        self.places = pool.alloc((stages * LANES,), "int32", align=16)  # where the values of each line begin
        self.words = pool.alloc((stages * LANES * WORDS,), "uint32", align=16)
        pool.commit()
        self.out = Output(s.dtype, s.dim, LANES)
        self.y_desc = descriptor("y_desc", self.y_tiles, 0, self.out.leading)
        self.y_base = self.y.base(w.batch, w.shared_head)
        self.out.clear()
        w.pipeline(stages, self.copy, self.tile)
        return int(pool.max_offset)

    def copy(self, entry: Expr, stage: Expr) -> None:
        """The rows of y, the lines, and what says where their values are."""
        s, w = self.s, self.walk
        self.y.copy(self.y_base, w.columns, w.entries[entry, 0], self.y_tiles, stage * s.tile_items, w.thread)
        units = LANES // s.unit  # a line that begins inside one takes another
        lines_at_once = THREADS // units
        for step in range(units * LANES // THREADS):
            self.copy_unit(entry, stage, step * lines_at_once + w.thread // units, w.thread % units)
        with when(w.thread < LANES):
            line = w.thread
            first = self.copy_unit(entry, stage, line, units)
            at = let("at_line", stage * LANES + line)
            store(self.places, at, at * s.pitch + self.inside(first))
            for i, word in enumerate(w.line_bits(entry, line)):
                store(self.words, at * WORDS + i, word)

    def inside(self, first: Expr) -> Expr:
        """How far in a unit the values of a line begin."""
        return T.cast((self.walk.origin + wide(T.max(first, 0))) % self.s.unit, "int32")

    def copy_unit(self, entry: Expr, stage: Expr, line: Expr, unit: Expr) -> Expr:
        """A unit of a line, whose first number is returned."""
        s, w = self.s, self.walk
        line = let("line", line)
        first = let("first", w.first[entry, line])
        source = let("value", w.origin + wide(first - self.inside(first) + unit * s.unit))
        with when(T.And(first >= 0, source < self.end)):
            target = (stage * LANES + line) * s.pitch + unit * s.unit
            copy_unit(self.lines.ptr_to([target]), self.values.ptr_to([source]), T.uint32(UNIT_BYTES))
        return first

    def tile(self, entry: Expr, stage: Expr, meanwhile: Callable[[], None]) -> None:
        """Add a tile's product."""
        w = self.walk
        with I.If(T.EQ(w.entries[entry, 1], 0)):
            with I.Then():
                self.take(stage, whole=True)
            with I.Else():
                self.take(stage, whole=False)
        self.out.issue(at_stage("y_now", self.y_desc, stage, self.s.tile_bytes))
        meanwhile()
        wait_products(0)
        self.out.fence()

    def take(self, stage: Expr, whole: bool) -> None:
        """A tile's values to the registers of A. whole: every line has all keys."""
        for j, (i, r) in enumerate((i, r) for i in range(LANES // 8) for r in range(2)):
            store(self.out.p, j, pair(*(self.value(stage, i, r, c, whole) for c in range(2))))

    def value(self, stage: Expr, i: int, r: int, c: int, whole: bool) -> Expr:
        """Of the row and the column that accumulator 4i + 2r + c would be of (products.py)."""
        w = self.walk
        row = w.warp * 16 + w.lane // 4 + 8 * r
        column = 8 * i + w.lane % 4 * 2 + c
        line, key = (row, column) if self.queries_are_rows else (column, row)
        at = stage * LANES + line
        place = self.places[at]
        if whole:
            return self.lines[place + key]
        bit = T.cast(key % 32, "uint32")
        word = self.words[at * WORDS + key // 32]
        before = T.if_then_else(key >= 32, ones(self.words[at * WORDS]), 0)
        number = before + ones(T.bitwise_and(word, below(bit)))
        return T.if_then_else(has(word, bit), self.lines[place + number], T.cast(0, self.s.stored))

    def write(self, out: Expr, heads: Expr, rows: Expr, factor: Expr) -> None:
        """The rows of out, (batch, heads, rows, dim), that exist."""
        s, w = self.s, self.walk
        word = registers("rounded", 1, "uint32")
        for r in range(2):
            position = let("position", w.positions[w.item, w.warp * 16 + w.lane // 4 + 8 * r])
            with when(position >= 0):
                row = let("out_row", wide(w.batch * heads + w.head) * wide(rows) + wide(position))
                for i in range(s.dim // 8):
                    low, high = (self.out.o[4 * i + 2 * r + c] * factor for c in range(2))
                    do(T.ptx[f"cvt.rn.{PTX_TYPE[s.dtype]}x2.f32"](word[0], high, low))
                    do(T.ptx["st.global.b32"](out.ptr_to([row * s.dim + wide(8 * i + w.lane % 4 * 2)]), word[0]))
