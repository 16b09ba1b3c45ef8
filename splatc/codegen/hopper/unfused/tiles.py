"""What the products share: tables of tiles, copies of the rows that a table lists, tiles in shared memory.

A block has a row tile of one head; its warpgroups, one or more, walk over the column tiles. Copies of the next tiles
are under way while a warpgroup works at one: cp.async, whose places in shared memory are a ring of ``stages``.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as I

from splatc.codegen.constants import ceil_div
from splatc.codegen.hopper.block import int_arg, table
from splatc.codegen.hopper.combine import wide
from splatc.codegen.hopper.copies import commit_copies
from splatc.codegen.hopper.emit import (
    Cell,
    Expr,
    do,
    kept,
    let,
    let_next_kernel_start,
    loop,
    registers,
    store,
    wait_for_kernels_before,
    when,
)
from splatc.codegen.hopper.shape import ITEM_BYTES, ROW_BYTES, SMEM_BYTES, WARPGROUP, chunk
from splatc.codegen.hopper.stored import type_of
from splatc.codegen.kernel import KernelSpec
from splatc.errors import Unsupported

THREADS = WARPGROUP
LANES = 64  # rows and columns of a tile
WARP_LINES = LANES // (THREADS // 32)
WORDS = LANES // 32  # of a line's bits
WORK = 10  # words of a block's work
ALL = 0xFFFFFFFF
UNIT_BYTES, SECTOR_BYTES = 16, 32  # of one copy; of what memory is written by
MOST_STAGES = 3
RESERVED = 1024  # bytes of shared memory for alignment


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
    def packed(self) -> int:
        """Values of a word."""
        return 4 // self.item_bytes

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
    def sector(self) -> int:
        """Values of what memory is written by at least."""
        return SECTOR_BYTES // self.item_bytes

    def stages(self, fixed: int, each: int) -> int:
        """How many stages of ``each`` bytes to have beside ``fixed`` others. Raises Unsupported if two do not fit."""
        if not self.fits(fixed, each):
            raise Unsupported(f"rows of {self.dim} {self.dtype} do not fit the shared memory of sm_90a twice")
        return min((SMEM_BYTES - RESERVED - fixed) // each, MOST_STAGES)

    def fits(self, fixed: int, each: int) -> bool:
        """Whether there is room for two stages."""
        return fixed + 2 * each <= SMEM_BYTES - RESERVED


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

    def ask(self, positions: Expr, tile: Expr, thread: Expr) -> None:
        """Begin to read which rows positions[tile] lists: a copy of them begins later."""
        self._listed = self._read(positions, tile, thread)

    def ask_ahead(self, positions: Expr, tile: Expr, thread: Expr) -> None:
        """The same for the tile after that, which ``go_on`` turns to."""
        self._ahead = self._read(positions, tile, thread)

    def go_on(self) -> None:
        """To the tile asked for ahead, after a copy of the one before."""
        for cell, ahead in zip(self._listed, self._ahead, strict=True):
            cell.set(ahead())

    def ask_again(self, positions: Expr, tile: Expr, thread: Expr) -> None:
        """The same for another tile, after a copy of those before."""
        for cell, (row, _, _) in zip(self._listed, self._units(thread), strict=True):
            cell.set(positions[tile, row])

    def _read(self, positions: Expr, tile: Expr, thread: Expr) -> list[Cell]:
        return [read_now("position", positions, tile, row) for row, _, _ in self._units(thread)]

    def copy(self, base: Expr, target: Expr, offset: Expr, thread: Expr) -> None:
        """Start copies of the rows asked for to target[offset:], swizzled as wgmma reads them; zeros for -1.

        Eight threads copy 128 bytes of a row.
        """
        s, width = self.s, chunk(self.s.dtype)
        for cell, (_, column, place) in zip(self._listed, self._units(thread), strict=True):
            source = kept("source", base + wide(cell()) * wide(self._seq) + wide(column), "int64")
            for c in range(s.chunks):
                inside = cell() >= 0
                if (c + 1) * width > s.dim:
                    inside = T.And(inside, c * width + column < s.dim)
                copy_unit(target.ptr_to([offset + place + c * LANES * width]),
                          self._data.ptr_to([source + c * width]), inside)  # fmt: skip

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

    def ask(self, positions: Expr, tile: Expr, thread: Expr) -> None:
        self._positions, self._tile = positions, Cell("tile", tile)

    def ask_ahead(self, positions: Expr, tile: Expr, thread: Expr) -> None:
        self._next_tile = tile

    def go_on(self) -> None:
        self._tile.set(self._next_tile)

    def ask_again(self, positions: Expr, tile: Expr, thread: Expr) -> None:
        self._tile.set(tile)

    def copy(self, base: Expr, target: Expr, offset: Expr, thread: Expr) -> None:
        s = self.s
        with loop(LANES * 32 // THREADS) as step:
            row = kept("row", step * (THREADS // 32) + thread // 32)
            position = kept("position", self._positions[self._tile(), row])
            source = kept("source", base + wide(position) * wide(self._seq), "int64")
            for c in range(s.chunks):
                column = c * 32 + thread % 32
                inside = T.And(position >= 0, column < s.dim)
                do(T.ptx["cp.async.ca.shared.global"](
                    target.ptr_to([offset + self._place(row, column)]), self._data.ptr_to([source + wide(column)]),
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


def copy_unit(target: Expr, source: Expr, wanted: Expr) -> None:
    """Start copying 16 bytes; zeros where they are not wanted, and the source, which may be none, is not read."""
    size = T.if_then_else(wanted, T.uint32(UNIT_BYTES), T.uint32(0))
    do(T.ptx["cp.async.cg.shared.global"](target, source, UNIT_BYTES, size))


class Walk:
    """The tables of tiles (codegen/value_tiles.py), and which of them a block has.

    work: int32 (works, warpgroups, WORK): a row tile of a head, or a piece of one, and what of it each warpgroup of the
    block has: head, item, first entry, entries; where the head's values begin, in two halves; the first two entries
    (the last one again if there is no second). Blocks that begin have nothing to do but to wait for tables: all that
    reads of other tables depend on is in one. The grid is ``blocks`` = batch * works. total: int64, values of a batch
    entry. group: heads that share one of the rows copied for column tiles.

    Each warpgroup has ``stages`` places of its own in shared memory. A warp has 16 lines of every tile. Two lanes know
    each of them: what they read of the tables, others have from them.
    """

    def __init__(self, align: int) -> None:
        """align: places in memory are told from multiples of so many values on."""
        self._align = align
        self.blocks, self.works, self.group = map(int_arg, ("blocks", "works", "group"))
        self.total = I.arg("total", I.int64())
        self.work, self.entries = table("work", "int32", WORK), table("entries", "int32", 2)
        self.positions, self.columns, self.first = (
            table(name, "int32", LANES) for name in ("positions", "columns", "first"))  # fmt: skip
        self.bits = table("bits", "uint32", WORDS * LANES)

    def start(self, teams: int = 1) -> None:
        """Find the block's row tile, or piece of one, and this warpgroup's part of it, where ``teams`` share it."""
        index, thread = I.cta_id([self.blocks]), I.thread_id([teams * THREADS])
        self.teams, self.team, self.thread = teams, T.int32(0), thread
        if teams > 1:
            self.team, self.thread = kept("team", thread // THREADS), kept("team_thread", thread % THREADS)
        self.warp, self.lane = let("warp", self.thread // 32), let("lane", self.thread % 32)
        self.own_line = let("own_line", self.warp * WARP_LINES + self.lane % WARP_LINES)
        self.batch = kept("batch", T.truncdiv(index, self.works))
        row = kept("work_row", (index - self.batch * self.works) * teams + self.team)
        words = registers("work_words", WORK, "int32")
        for i in range(0, WORK, 2):
            do(T.ptx["ld.global.v2.b32"](words[i], words[i + 1], self.work.ptr_to([row, i])))
        self.head, self.item, self.begin, self.count = (words[i] for i in range(4))
        self.first_entries = [(words[i], words[i + 1]) for i in (6, 8)]
        head_base = T.bitwise_or(T.shift_left(wide(words[5]), T.int64(32)), wide(T.cast(words[4], "uint32")))
        origin = kept("origin", wide(self.batch) * self.total + head_base, "int64")
        self._shift = kept("shift", T.bitwise_and(T.cast(origin, "int32"), self._align - 1))
        self.base = kept("base", origin - wide(self._shift), "int64")

    @property
    def shared_head(self) -> Expr:
        """The head of the rows that heads share."""
        return T.truncdiv(self.head, self.group)

    def known(self, entry: Expr) -> Expr:
        """The entry, or the row tile's last one: what is read ahead has to exist."""
        return T.min(entry, self.begin + self.count - 1)

    def sync(self) -> None:
        """All threads of the warpgroup."""
        if self.teams > 1:
            do(T.ptx.bar.sync(T.cast(self.team + 1, "uint32"), T.uint32(THREADS)))
        else:
            do(T.cuda.cta_sync())

    def spot(self, first: Expr) -> Spot:
        """Where the values of a line lie that has any."""
        number = kept("number", first + self._shift)
        return Spot(kept("skip", T.bitwise_and(number, self._align - 1)),
                    kept("spot_at", T.bitwise_and(number, -self._align)))  # fmt: skip

    @contextmanager
    def if_entries(self) -> Iterator[None]:
        """What blocks with entries do, a ``pipeline`` among it. Others wait for the kernels before in the stream as
        well: what comes next follows those too, and they may still read what is out now."""
        with I.If(self.count > 0):
            with I.Then():
                yield
            with I.Else():
                wait_for_kernels_before()

    def pipeline(self, stages: int, rows: Rows, line: OwnLine | None, begin: Callable[[], None],
                 copy: Callable[[Expr, Expr], None], arrived: Callable[[Expr, Expr], None],
                 use: Callable[[Expr, Expr, Callable[[], None]], None]) -> None:  # fmt: skip
        """When the kernels before in the stream have ended, begin(), to start copies that are there before the first
        entry is used; until then only tables are read. For every entry, in this order: copy(entry, stage), ``stages``
        - 1 entries ahead, when ``rows`` and ``line`` have read what the tables say of it; arrived(number of the entry,
        stage), by each thread when its copies are there; and use(entry, stage, meanwhile), which calls meanwhile() once
        to start later copies, and is done with shared memory when it ends. Then the next kernel may start: any sooner
        its longest blocks, which come first, would crowd on the multiprocessors that are done first.

        Tables are read without branches, also beyond the last entry: at its end a branch waits for what it reads. What
        says where to read comes last of all, when no register is wanted for anything else, for the same reason."""
        (first, _), (second, _) = self.first_entries
        rows.ask(self.columns, first, self.thread)
        rows.ask_ahead(self.columns, second, self.thread)
        column = read_now("column", self.entries, self.known(self.begin + 2), 0)  # of the entry to ask for next

        wait_for_kernels_before()
        begin()

        def ask_again() -> None:
            rows.ask_again(self.columns, column(), self.thread)

        def start(number: Expr, stage: Expr, go_on: Callable[[], None] = ask_again) -> None:
            with when(number < self.count):
                copy(kept("next", self.begin + number), self.team * stages + stage)
            commit_copies()
            go_on()
            if line is not None:
                line.read(self.known(self.begin + number + 1))

        def look_ahead(number: Expr) -> None:
            entry = self.known(self.begin + number + 2)
            column.set(self.entries[entry, 0])
            if line is not None:
                line.look_ahead(entry)

        for ahead in range(stages - 1):
            start(ahead, ahead, ask_again if ahead else rows.go_on)
            look_ahead(ahead)
        with loop(self.count) as number:
            stage = kept("stage", self.team * stages + number % stages)
            do(T.ptx.cp.async_.wait_group(stages - 2))
            arrived(number, stage)
            do(T.ptx.fence.proxy.async_.shared__cta())  # tensor cores may read them
            self.sync()  # all copies of this entry are there; all threads are done with the one before
            later = number + (stages - 1)
            use(kept("entry", self.begin + number), stage, lambda: start(later, later % stages))
            look_ahead(later)
        let_next_kernel_start()


class OwnLine:
    """What the tables say of the lane's own line in a tile, read ahead: the number of its ``first`` value, and that of
    the next tile; the tile's ``kind`` (0: whole lines); the ``words`` of its bits, all of them set in a whole line."""

    def __init__(self, walk: Walk) -> None:
        self._walk = walk
        begin = walk.begin
        self.kind, self._next_kind = (Cell("kind", kind) for _, kind in walk.first_entries)
        self.first, self.next_first = (
            read_now("own_first", walk.first, walk.known(begin + i), walk.own_line) for i in range(2))  # fmt: skip
        self.words = [Cell("own_word", self._word(w), "uint32") for w in range(WORDS)]

    def read(self, entry: Expr) -> None:
        """Go on to the next entry of the row tile, which is this one."""
        walk = self._walk
        self.kind.set(self._next_kind())
        self.first.set(self.next_first())
        self.next_first.set(walk.first[walk.known(entry + 1), walk.own_line])
        for w, cell in enumerate(self.words):
            cell.set(self._word(w))

    def look_ahead(self, entry: Expr) -> None:
        """Begin to read what kind of tile this entry is, the one after that which was read last."""
        self._next_kind.set(self._walk.entries[entry, 1])

    def count(self) -> Expr:
        """How many values it has."""
        bits = ones(self.words[0]()) + ones(self.words[1]())
        return kept("own_count", T.Select(self.first() >= 0, bits, 0))

    def _word(self, w: int) -> Expr:
        kind = self.kind()
        word = self._walk.bits[T.max(kind - 1, 0), self._walk.own_line * WORDS + w]
        return T.if_then_else(kind > 0, word, T.uint32(ALL))


@dataclass(frozen=True)
class Spot:
    """Where a line's values lie in memory: from number ``skip`` on of what begins ``at`` values behind Walk.base, both
    of them aligned."""

    skip: Expr
    at: Expr


def read_now(name: str, table: Expr, *place: Expr) -> Cell:
    """A cell with an int32 of a table, which is read here: what only names it, the compiler moves to its use."""
    cell = Cell(name, 0)
    do(T.ptx["ld.global.b32"](cell(), table.ptr_to(list(place))))
    return cell


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


def ranks(word: Expr, bit: Expr, before: Expr) -> list[tuple[Expr, Expr]]:
    """For a bit and the next one: (whether the word has it, ``before`` and how many of its bits are below)."""
    rank = kept("rank", before + ones(T.bitwise_and(word, below(bit))))
    held = kept("has", T.bitwise_and(T.shift_right(word, bit), T.uint32(1)), "uint32")
    return [(T.NE(held, T.uint32(0)), rank), (has(word, bit + T.uint32(1)), rank + T.cast(held, "int32"))]
