"""The second kernel of a split plan: partial results of one row tile, from scratch memory, into one.

A row is a warp's work: O = sum of w_p O_p with w_p = exp(LSE_p - LSE), in a fixed order. With ``merge`` what an earlier
pass left in place is one more part; else the head's sink is one, without O. There may be dozens of parts, and time is
spent waiting for memory: lanes read an LSE each, rows of O are fetched many at a time.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as I

from splatc.codegen.constants import LOG2E, NEG_INF, ceil_div
from splatc.codegen.cuda_parts import from_lane
from splatc.codegen.hopper.emit import (
    MIN_BLOCKS,
    Cell,
    Expr,
    do,
    follow_kernels_before,
    kernel_function,
    let,
    loop,
    named,
    registers,
    store,
    when,
)
from splatc.codegen.hopper.epilogue import finite
from splatc.codegen.hopper.shape import Shape
from splatc.codegen.hopper.stored import values_of, words_of

NAME = "splatc_combine"
THREADS = 256
ROWS = THREADS // 32  # of one block
LOADS = 8  # of each lane, of O, that are under way together
LOAD_BYTES = 16
RESIDENT = 2  # blocks on a multiprocessor: unless told, ptxas saves registers for more, and loads wait for each other
WORDS = LOAD_BYTES // 4


def combine_parts(s: Shape):
    """The function, not lowered; a grid of (row tiles * m / ROWS) blocks.

    combine: int32 (tiles, 8) batch, head, item, first scratch tile, parts, 0, 0, 0.
    """
    with kernel_function(NAME) as made:
        out, lse = array("o", s.dtype), array("lse", "float32")
        part_out, part_lse = array("part_o", s.dtype), array("part_lse", "float32")
        table, positions = array("combine", "int32", 8), array("positions", "int32", s.m)
        o_batch, o_head, o_seq = (I.arg(f"o_{axis}", I.int64()) for axis in ("batch", "head", "seq"))
        sinks = array("sinks", "float32") if s.score.sinks else None
        blocks, heads, q_len, merge = (I.arg(name, I.int32()) for name in ("blocks", "heads", "q_len", "merge"))
        I.device_entry()
        with I.attr({MIN_BLOCKS: RESIDENT}):
            block = I.cta_id([blocks])
            thread = I.thread_id([THREADS])
            follow_kernels_before()
            lane = let("lane", thread % 32)
            tile = let("tile", T.truncdiv(block, s.m // ROWS))
            row = let("row", T.truncmod(block, s.m // ROWS) * ROWS + thread // 32)
            words = ("batch", "head", "item", "first", "parts")
            batch, head, item, first, parts = (let(name, table[tile, i]) for i, name in enumerate(words))
            position = let("position", positions[item, row])
            with when(position >= 0):
                at_lse = let("at_lse", wide(batch * heads + head) * wide(q_len) + wide(position))
                at_out = let("at_out", wide(batch) * o_batch + wide(head) * o_head + wide(position) * o_seq)
                old = Cell("old", T.float32(NEG_INF), "float32")  # LSE of the earlier pass
                if sinks is not None:
                    old.set(sinks[head])
                with when(merge != 0):
                    old.set(lse[at_lse])
                do(T.cuda.warp_sync())  # every lane has read it before one writes it
                weights = Weights(part_lse, first * s.m + row, s.m, parts, old(), lane)
                sums = Sums(s, lane)
                with when(T.And(merge != 0, T.EQ(sums.group, 0))):
                    sums.add(sums.read(out, at_out), weights.of(old()))
                sums.add_parts(part_out, weights, parts)
                sums.add_groups()
                sums.write(out, at_out)
                with when(T.EQ(lane, 0)):
                    store(lse, at_lse, weights.lse)
    return made()


def array(name: str, dtype: str, width: int = 1) -> Expr:
    """A global array of rows ``width`` wide (flat for 1)."""
    shape = (I.int64(),) if width == 1 else (I.int32(), width)
    return named(name, I.match_buffer(I.arg(f"{name}_arg", I.handle()), shape, dtype, align=2))


def wide(x: Expr) -> Expr:
    """x as int64."""
    return T.cast(x, "int64")


class Weights:
    """The weights of a row's parts: part p's LSE is part_lse[first + p * step]; ``old`` is one more."""

    def __init__(self, part_lse: Expr, first: Expr, step: int, parts: Expr, old: Expr, lane: Expr) -> None:
        self._part_lse, self._first, self._step = part_lse, let("first_row", first), step
        top, total = Cell("top", old, "float32"), Cell("total", T.float32(0.0), "float32")
        part = Cell("my_part", lane)
        with I.While(part() < parts):  # a for loop would be unrolled, for hundreds of parts
            top.set(T.max(top(), part_lse[self.row(part())]))
            part.set(part() + 32)
        top.set(T.cuda.warp_max(top()))
        self._top = let("safe_top", finite(top()))
        part.set(lane)
        with I.While(part() < parts):
            total.set(total() + self._share(part_lse[self.row(part())]))
            part.set(part() + 32)
        total.set(T.cuda.warp_sum(total()) + self._share(old))
        zero = T.float32(0.0)
        self._inverse = let("inverse", T.if_then_else(T.EQ(total(), zero), zero, T.float32(1.0) / total()))
        self.lse = let("row_lse", self._top + T.log(total()))

    def row(self, part: Expr) -> Expr:
        """The row of scratch memory of a part."""
        return wide(self._first + part * self._step)

    def of(self, lse: Expr) -> Expr:
        """The weight of a part with this LSE."""
        return let("weight", self._share(lse) * self._inverse)

    def of_row(self, row: Expr) -> Expr:
        """The weight of the part in this row of scratch memory."""
        return self.of(self._part_lse[row])

    def _share(self, lse: Expr) -> Expr:
        return T.exp2((lse - self._top) * T.float32(LOG2E))


class Sums:
    """A row of O in a warp's registers, read 16 bytes a lane. Where that takes less than a warp, groups of lanes have
    parts in turn, and ``add_groups`` adds up their sums."""

    def __init__(self, s: Shape, lane: Expr) -> None:
        self._s = s
        self._unit = LOAD_BYTES // s.item_bytes
        units = s.dv // self._unit
        across = min(1 << (units - 1).bit_length(), 32)  # lanes of a row
        self._each = ceil_div(units, across)  # loads of a lane, for a row
        self._groups = 32 // across
        self.group = let("group", lane // across)
        self._columns = [let("column", (lane % across + across * i) * self._unit) for i in range(self._each)]
        self._acc = registers("acc", self._each * self._unit)
        for i in range(self._each * self._unit):
            store(self._acc, i, T.float32(0.0))

    def read(self, source: Expr, at: Expr) -> list[Expr]:
        """Words of this lane, of a row of O that begins at source[at]."""
        words = registers("words", self._each * WORDS, "uint32")
        for i, column in enumerate(self._columns):
            inside = T.min(column, self._s.dv - self._unit)  # what is read of other columns is not written
            mine = (words[i * WORDS + j] for j in range(WORDS))
            do(T.ptx["ld.global.v4.b32"](*mine, source.ptr_to([at + wide(inside)])))
        return [words[i] for i in range(self._each * WORDS)]

    def add(self, words: list[Expr], weight: Expr) -> None:
        """Add a row that was read, weighted."""
        for i, value in enumerate(values_of(words, self._s.dtype)):
            store(self._acc, i, self._acc[i] + weight * value)

    def add_parts(self, source: Expr, weights: Weights, parts: Expr) -> None:
        """Add all parts, a group's every so many: rows of source, at the places that their weights have too."""
        rows = LOADS // self._each  # of a lane, under way together
        with loop(T.truncdiv(parts + (rows * self._groups - 1), rows * self._groups)) as turn:
            mine = [let("part", (turn * rows + i) * self._groups + self.group) for i in range(rows)]
            places = [let("part_row", weights.row(T.min(part, parts - 1))) for part in mine]
            read = [self.read(source, at * self._s.dv) for at in places]
            for part, at, words in zip(mine, places, read, strict=True):
                self.add(words, T.if_then_else(part < parts, weights.of_row(at), T.float32(0.0)))

    def add_groups(self) -> None:
        """The sum over all groups, in each of them."""
        for i in range(self._each * self._unit):
            for step in range(1, self._groups.bit_length()):
                store(self._acc, i, self._acc[i] + from_lane(self._acc[i], 32 >> step))

    def write(self, target: Expr, at: Expr) -> None:
        """target[at:] = the sums, rounded: by the first group."""
        for i, column in enumerate(self._columns):
            values = [self._acc[i * self._unit + j] for j in range(self._unit)]
            with when(T.And(T.EQ(self.group, 0), column < self._s.dv)):
                do(T.ptx["st.global.v4.b32"](target.ptr_to([at + wide(column)]), *words_of(values, self._s.dtype)))
