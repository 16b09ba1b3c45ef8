"""What the products share: tables of tiles, copies of the rows that a table lists, tiles in shared memory.

A block is a warpgroup with one row tile of one head; it walks over the column tiles. Copies of the next tiles are under
way while it works at one: cp.async, whose places in shared memory are a ring of ``stages``.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as I

from splatc.codegen.constants import ceil_div
from splatc.codegen.hopper.block import int_arg, table
from splatc.codegen.hopper.combine import wide
from splatc.codegen.hopper.copies import commit_copies
from splatc.codegen.hopper.emit import Cell, Expr, do, let, loop, registers, store, when
from splatc.codegen.hopper.shape import ITEM_BYTES, ROW_BYTES, SMEM_BYTES, chunk
from splatc.codegen.hopper.unfused.stored import type_of
from splatc.codegen.kernel import KernelSpec
from splatc.errors import Unsupported

THREADS = 128  # a warpgroup
LANES = 64  # rows and columns of a tile
WORDS = LANES // 32  # of a line's bits
ALL = 0xFFFFFFFF
UNIT_BYTES = 16  # of one copy
MOST_STAGES = 3


@dataclass(frozen=True)
class Sizes:
    """Of one kernel. dim: of the rows that are copied for each column tile."""

    dim: int
    dtype: str

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]

    @property
    def stored(self) -> str:
        """The type that values are moved as."""
        return type_of(self.dtype)

    @property
    def rounds(self) -> bool:
        """Whether tensor cores would cut off the last bits of factors, which threads therefore round."""
        return self.dtype == "float32"

    @property
    def unit(self) -> int:
        """Values of one copy."""
        return UNIT_BYTES // self.item_bytes

    @property
    def units(self) -> int:
        """Copies that a line takes which begins where one does."""
        return LANES // self.unit

    @property
    def chunks(self) -> int:
        """Columns of 128 bytes that rows take."""
        return ceil_div(self.dim, chunk(self.dtype))

    @property
    def tile_bytes(self) -> int:
        """Of 64 rows as tensor cores read them."""
        return LANES * ROW_BYTES * self.chunks

    @property
    def tile_items(self) -> int:
        return self.tile_bytes // self.item_bytes

    @property
    def pitch(self) -> int:
        """Values from one line to the next in shared memory: room for one that begins inside a copy."""
        return LANES + self.unit

    def stages(self, fixed: int, each: int) -> int:
        """How many stages of ``each`` bytes fit beside ``fixed`` others. Raises Unsupported for less than two."""
        most = (SMEM_BYTES - 1024 - fixed) // each
        if most < 2:
            raise Unsupported(f"rows of {self.dim} {self.dtype} do not fit the shared memory of sm_90a twice")
        return min(most, MOST_STAGES)


def sizes_of(spec: KernelSpec) -> Sizes:
    """The sizes of a product."""
    return Sizes(spec.v_head_dim, spec.dtype)


class Rows:
    """A tensor (batch, heads, seq, dim) as rows in memory.

    Kernel parameters: its address and, in elements, int64 ``{name}_batch``, ``{name}_head`` and int32 ``{name}_seq``.
    """

    def __init__(self, name: str, s: Sizes) -> None:
        self.s = s
        self._strides = [I.arg(f"{name}_{axis}", I.int64()) for axis in ("batch", "head")]
        self._seq = int_arg(f"{name}_seq")
        self._data = table(name, s.stored, 1)

    def base(self, batch: Expr, head: Expr) -> Expr:
        """Where the rows of a batch entry and head begin."""
        return kept("rows_base", wide(batch) * self._strides[0] + wide(head) * self._strides[1], "int64")

    def copy(self, base: Expr, positions: Expr, tile: Expr, target: Expr, offset: Expr, thread: Expr) -> None:
        """Start copies of the rows at positions[tile] to target[offset:], swizzled as wgmma reads them; zeros for -1.

        Eight threads copy 128 bytes of a row.
        """
        s = self.s
        for row, column, place in self._units(thread):
            position = kept("position", positions[tile, row])
            source = kept("source", base + wide(T.max(position, 0)) * wide(self._seq), "int64")
            for c in range(s.chunks):
                first = c * chunk(s.dtype) + column
                inside = T.And(position >= 0, first < s.dim)
                copy_unit(target.ptr_to([offset + place + c * LANES * chunk(s.dtype)]),
                          self._data.ptr_to([source + wide(T.if_then_else(inside, first, 0))]), inside)  # fmt: skip

    def round(self, tile: Expr, offset: Expr, thread: Expr) -> None:
        """Round what this thread has copied to tile[offset:], and has arrived, to tf32."""
        for _, _, place in self._units(thread):
            for c in range(self.s.chunks):
                at = tile.ptr_to([offset + place + c * LANES * chunk(self.s.dtype)])
                values, words = registers("unrounded", 4), registers("rounded", 4, "uint32")
                do(T.ptx["ld.shared.v4.f32"](*(values[i] for i in range(4)), at))
                for i in range(4):
                    do(T.ptx["cvt.rn.tf32.f32"](words[i], values[i]))
                do(T.ptx["st.shared.v4.b32"](at, *(words[i] for i in range(4))))

    def _units(self, thread: Expr) -> Iterator[tuple[Expr, Expr, Expr]]:
        """(row, column, place in the first chunk of a tile) of what a thread copies."""
        width, column = chunk(self.s.dtype), let("unit", thread % 8)
        for step in range(LANES * 8 // THREADS):
            row = let("row", step * (THREADS // 8) + thread // 8)
            yield row, column * self.s.unit, row * width + T.bitwise_xor(column, row % 8) * self.s.unit


class TurnedRows(Rows):
    """Rows of float32 as operand B of products in tf32 along the rows: columns become rows (hopper/turning.py).

    A warp copies 32 columns of a row at a time, 4 bytes a thread.
    """

    def copy(self, base: Expr, positions: Expr, tile: Expr, target: Expr, offset: Expr, thread: Expr) -> None:
        s = self.s
        with loop(LANES * 32 // THREADS) as step:
            row = kept("row", step * (THREADS // 32) + thread // 32)
            position = kept("position", positions[tile, row])
            source = kept("source", base + wide(T.max(position, 0)) * wide(self._seq), "int64")
            for c in range(s.chunks):
                column = c * 32 + thread % 32
                inside = T.And(position >= 0, column < s.dim)
                do(T.ptx["cp.async.ca.shared.global"](
                    target.ptr_to([offset + self._place(row, column)]),
                    self._data.ptr_to([source + wide(T.if_then_else(inside, column, 0))]),
                    4, T.if_then_else(inside, T.uint32(4), T.uint32(0))))  # fmt: skip

    def round(self, tile: Expr, offset: Expr, thread: Expr) -> None:
        with loop(LANES * 32 // THREADS) as step:
            row = kept("row", step * (THREADS // 32) + thread // 32)
            word = registers("rounded", 1, "uint32")
            for c in range(self.s.chunks):
                at = offset + self._place(row, c * 32 + thread % 32)
                do(T.ptx["cvt.rn.tf32.f32"](word[0], T.reinterpret("float32", tile[at])))
                store(tile, at, word[0])

    def _place(self, row: Expr, column: Expr) -> Expr:
        """Where a value goes: in a block for every 32 rows, and there in slots (turning.key_of)."""
        slot = row % 32 // 8 * 8 + row % 2 * 4 + row % 8 // 2
        return (row // 32 * (self.s.chunks * 32 * 32) + column * 32
                + T.bitwise_xor(slot // 4, column % 8) * 4 + slot % 4)  # fmt: skip


def kept(name: str, value: Expr, dtype: str = "int32") -> Expr:
    """A value in a register. (What TVM knows to be constant it computes anew wherever it is used.)"""
    return Cell(name, value, dtype)()


def copy_unit(target: Expr, source: Expr, wanted: Expr) -> None:
    """Start copying 16 bytes, zeros where they are not wanted."""
    size = T.if_then_else(wanted, T.uint32(UNIT_BYTES), T.uint32(0))
    do(T.ptx["cp.async.cg.shared.global"](target, source, UNIT_BYTES, size))


class Walk:
    """The tables of tiles (codegen/value_tiles.py), and which of them a block has.

    work: int32 (works, 2) head, item; the grid is ``blocks`` = batch * works. bases: int64, where each head's values
    begin; total: int64, values of a batch entry. group: heads that share one of the rows copied for column tiles.
    """

    def __init__(self) -> None:
        self.blocks, self.works, self.group = map(int_arg, ("blocks", "works", "group"))
        self.total = I.arg("total", I.int64())
        self.work, self.items, self.entries = (table(name, "int32", 2) for name in ("work", "items", "entries"))
        self.positions, self.columns, self.first = (
            table(name, "int32", LANES) for name in ("positions", "columns", "first"))  # fmt: skip
        self.bits = table("bits", "uint32", WORDS * LANES)
        self.bases = table("bases", "int64", 1)

    def start(self) -> None:
        """Find the block's row tile."""
        index = I.cta_id([self.blocks])
        self.thread = I.thread_id([THREADS])
        self.warp, self.lane = let("warp", self.thread // 32), let("lane", self.thread % 32)
        self.batch = kept("batch", T.truncdiv(index, self.works))
        row = kept("work_row", index - self.batch * self.works)
        self.head, self.item = (kept(name, self.work[row, i]) for i, name in enumerate(("head", "item")))
        self.begin, self.count = (kept(name, self.items[self.item, i]) for i, name in enumerate(("begin", "count")))
        self.origin = kept("origin", wide(self.batch) * self.total + self.bases[self.head], "int64")

    @property
    def shared_head(self) -> Expr:
        """The head of the rows that heads share."""
        return T.truncdiv(self.head, self.group)

    def line(self, entry: Expr, number: Expr, place: Expr, s: Sizes, whole: bool = False) -> Line:
        """A line of a tile, at ``place`` in shared memory. whole: the tile has no bits."""
        first = kept("first", self.first[entry, number])
        start = kept("start", self.origin + wide(T.max(first, 0)), "int64")
        skip = kept("skip", T.bitwise_and(T.cast(start, "int32"), s.unit - 1))
        words: list[Expr] = [T.uint32(ALL)] * WORDS
        count: Expr = LANES
        if not whole:
            kind = let("kind", self.entries[entry, 1])
            words = [kept("word", T.if_then_else(kind > 0, self.bits[T.max(kind - 1, 0), number * WORDS + w],
                                                 T.uint32(ALL)), "uint32") for w in range(WORDS)]  # fmt: skip
            count = ones(words[0]) + ones(words[1])
        count = kept("line_count", T.if_then_else(first >= 0, count, 0))
        target = kept("target", T.bitwise_and(start, T.int64(-s.unit)), "int64")
        return Line(kept("place", place), skip, words, count, target)

    def pipeline(self, stages: int, copy: Callable[[Expr, Expr], None], arrived: Callable[[Expr, Expr], None],
                 use: Callable[[Expr, Expr, Callable[[], None]], None]) -> None:  # fmt: skip
        """For every entry copy(entry, stage), ``stages`` - 1 ahead; arrived(number of the entry, stage), by each thread
        when its copies are there; and use(entry, stage, meanwhile), which calls meanwhile() once to start the next
        copies, and is done with shared memory when it ends."""
        for ahead in range(stages - 1):
            with when(ahead < self.count):
                copy(kept("next", self.begin + ahead), T.int32(ahead))
            commit_copies()
        with loop(self.count) as number:
            stage = kept("stage", number % stages)
            do(T.ptx.cp.async_.wait_group(stages - 2))
            arrived(number, stage)
            do(T.ptx.fence.proxy.async_.shared__cta())  # tensor cores may read them
            do(T.cuda.cta_sync())  # all copies of this entry are there; all threads are done with the one before

            def meanwhile() -> None:
                later = number + (stages - 1)
                with when(later < self.count):
                    copy(kept("next", self.begin + later), kept("next_stage", later % stages))
                commit_copies()

            use(kept("entry", self.begin + number), stage, meanwhile)


@dataclass(frozen=True)
class Line:
    """A line of a tile, in shared memory from ``place`` on as in memory from ``target`` on, where 16 bytes begin: the
    first ``skip`` values are another line's, then come ``count``. words: its bits."""

    place: Expr
    skip: Expr
    words: list[Expr]
    count: Expr
    target: Expr


def value_array(name: str, s: Sizes) -> Expr:
    """The parameter of values."""
    return table(name, s.stored, 1)


def below(bit: Expr) -> Expr:
    """A word of the bits below one."""
    return T.shift_left(T.uint32(1), bit) - T.uint32(1)


def has(word: Expr, bit: Expr) -> Expr:
    """Whether a word has a bit."""
    return T.NE(T.bitwise_and(T.shift_right(word, bit), T.uint32(1)), T.uint32(0))


def ones(word: Expr) -> Expr:
    """How many bits a word has, as int32."""
    return T.cast(T.popcount(word), "int32")
