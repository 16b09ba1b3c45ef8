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
    WORDS,
    Line,
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
            heads, rows = (I.arg(word, I.int32()) for word in ("heads", "rows"))  # of out
            walk = Walk()
            factor = I.arg("factor", I.float32())
            I.device_entry()
            with I.attr({"tirx.launch_bounds_min_blocks_per_sm": BLOCKS if s.dim <= 64 else 1}):
                block = _Block(s, y, values, walk, queries_are_rows)
                smem_bytes = block.run()
                block.write(out, heads, rows, factor)
    return builder.get().with_attr("global_symbol", name), smem_bytes


class _Block:
    def __init__(self, s: Sizes, y: Rows, values: Expr, walk: Walk, queries_are_rows: bool) -> None:
        self.s, self.y, self.values, self.walk = s, y, values, walk
        self.queries_are_rows = queries_are_rows

    def run(self) -> int:
        """Sum up."""
        s, w = self.s, self.walk
        w.start()
        line_bytes = LANES * (s.pitch * s.item_bytes + 4 * (1 + WORDS))
        stages = s.stages(0, s.tile_bytes + line_bytes)
        pool = T.SMEMPool()
        self.y_tiles = pool.alloc((stages * s.tile_items,), s.stored, align=1024)
        self.lines = pool.alloc((stages * LANES * s.pitch,), s.stored, align=16)
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
        with I.If(T.EQ(w.entries[entry, 1], 0)):
            with I.Then():
                self.copy_lines(entry, stage, whole=True)
            with I.Else():
                self.copy_lines(entry, stage, whole=False)

    def copy_lines(self, entry: Expr, stage: Expr, whole: bool) -> None:
        """The lines of a tile, as many units of each as its values touch."""
        s, w = self.s, self.walk
        units = LANES // s.unit  # a line that begins inside one touches another
        at_once = THREADS // units
        for step in range(0, LANES, at_once):
            line = self.line(entry, stage, step + w.thread // units, whole)
            self.copy_unit(line, w.thread % units, line.count > 0 if whole else None)
        with when(w.thread < LANES):
            line = self.line(entry, stage, w.thread, whole)
            self.copy_unit(line, units)
            at = stage * LANES + w.thread
            store(self.places, at, line.place + line.skip)
            if not whole:
                for i, word in enumerate(line.words):
                    store(self.words, at * WORDS + i, word)

    def line(self, entry: Expr, stage: Expr, number: Expr, whole: bool) -> Line:
        return self.walk.line(entry, number, (stage * LANES + number) * self.s.pitch, self.s, whole)

    def copy_unit(self, line: Line, unit: Expr, touched: Expr = None) -> None:
        """A unit of a line; zeros where that has no values. touched: whether it has."""
        first = unit * self.s.unit
        if touched is None:
            touched = T.And(line.count > 0, first < line.skip + line.count)
        source = line.target + wide(T.if_then_else(touched, first, 0))
        copy_unit(self.lines.ptr_to([line.place + first]), self.values.ptr_to([source]), touched)

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
        before = T.Select(key >= 32, ones(self.words[at * WORDS]), 0)
        number = before + ones(T.bitwise_and(word, below(bit)))
        return T.Select(has(word, bit), self.lines[place + number], T.cast(0, self.s.stored))

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
