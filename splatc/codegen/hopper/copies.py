"""Copies by the tensor memory accelerator: tiles through tensor maps, mask bits as plain bytes.

A tensor map has five dimensions (head_dim, x1, x2, x3, last): the view's three sequence coordinates, and batch and
head as one. One instruction moves 128 bytes of each row of a box, a "chunk" of its columns, into rows of shared memory
that are swizzled as wgmma reads them.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from dataclasses import dataclass

from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as I

from splatc.codegen.constants import ceil_div
from splatc.codegen.hopper.emit import Cell, Expr, do, from_lane, kept, let, named, when
from splatc.codegen.hopper.shape import ROW_BYTES, TEAM, chunk

LOAD = "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
STORE = "cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group"
ADD = "cp.reduce.async.bulk.tensor.5d.global.shared::cta.add.tile.bulk_group"
LOAD_BYTES = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"


@dataclass(frozen=True)
class Point:
    """Coordinates of a box: x1, x2, x3 in the view, and which batch entry and head."""

    x1: Expr
    x2: Expr
    x3: Expr
    batch: Expr
    head: Expr


class Maps:
    """The tensor maps of one tensor, one a view, and how its batch and heads become coordinates.

    Kernel parameters: ``{name}_map0`` ..., and int32 ``{name}_step``: the last coordinate is batch * step + head.
    """

    def __init__(self, name: str, count: int) -> None:
        self.step = I.arg(f"{name}_step", I.int32())
        self._name, self._count = name, count
        self._maps: list[Expr] = []

    def declare(self) -> None:
        """Declare the maps: in the host part, after all arguments."""
        self._maps = [tensor_map(f"{self._name}_map{i}") for i in range(self._count)]

    def prefetch(self) -> None:
        """Fetch the first map's description, so that the first copy need not."""
        do(T.ptx["prefetch.tensormap"](T.address_of(self._maps[0])))

    def place(self, at: Point) -> tuple[Expr, ...]:
        """The coordinates 1 to 4 of a point."""
        return at.x1, at.x2, at.x3, at.batch * self.step + at.head

    def each(self, view: Expr):
        """(condition, map) for every view: emit the copy of each under its condition."""
        for number, one in enumerate(self._maps):
            yield T.EQ(view, number), one


class GroupedMaps(Maps):
    """Those of keys in groups of four, (head_dim, 2, groups, 2, last): the halves of each group lie in different halves
    of a box. x1 of a point is a multiple of four."""

    def place(self, at: Point) -> tuple[Expr, ...]:
        return T.int32(0), T.shift_right(at.x1, 2), T.int32(0), at.batch * self.step + at.head


def tensor_map(name: str) -> Expr:
    """A parameter that is a CUtensorMap, passed by value."""
    pointer = I.Bind(T.tvm_stack_alloca("tensormap", 1), I.handle("tensormap").ty)
    IRBuilder.name(name, pointer)
    return pointer


def load_tile(maps: Maps, view: Expr, at: Point, target: Expr, offset: Expr, chunks: int, rows: int,
              barrier: Expr, first: Expr | int = 0) -> None:  # fmt: skip
    """Load so many chunks of a box of ``rows`` rows, from column ``first`` on, to target[offset:], one after the other,
    reporting at ``barrier``."""
    width = chunk(target.dtype)
    place = [let(f"c{i}", c) for i, c in enumerate(maps.place(at))]
    for condition, one in maps.each(view):
        with when(condition):
            for c in range(chunks):
                to = target.ptr_to([offset + c * rows * width])
                do(T.ptx[LOAD](to, T.address_of(one), first + c * width, *place, barrier))


class Rows:
    """A tensor as rows in memory, for copies that follow a list.

    Kernel parameters: its address, and in elements int64 ``{name}_last`` (of the last coordinate, batch and head) and
    ``{name}_row`` (of the position).
    """

    def __init__(self, name: str, dtype: str, dim: int, maps: Maps) -> None:
        """maps: those of the same tensor."""
        self.dim, self.chunks = dim, ceil_div(dim, chunk(dtype))
        self._step = maps.step
        self._last, self._row = (I.arg(f"{name}_{what}", I.int64()) for what in ("last", "row"))
        self.data = named(name, I.match_buffer(I.arg(f"{name}_arg", I.handle()), (I.int64(),), dtype, align=16))

    def base(self, at: Point) -> Expr:
        """Where the rows of a batch entry and head begin."""
        return T.cast(at.batch * self._step + at.head, "int64") * self._last

    def offset(self, base: Expr, position: Expr) -> Expr:
        return base + T.cast(position, "int64") * self._row


def gather_rows(rows: Rows, keys: Expr, at: Point, target: Expr, offset: Expr, count: int, thread: Expr,
                ahead: bool) -> None:  # fmt: skip
    """Start copies of the rows at the positions keys[at.x1, 0..count), count <= 128, by TEAM threads; -1 gives zeros.

    They go where a tile of K or V goes, swizzled alike: 8 threads copy 128 bytes of a row. ahead: each lane first reads
    the position of one of its warp's rows, so that memory is waited for once and not before every copy; this takes
    a register.
    """
    base = let("row_base", rows.base(at))
    column, lane = let("column16", thread % 8), thread % 32
    if ahead:  # of each four lanes those rows that the warp copies in one step
        own_row = lane // 4 * (TEAM // 8) + thread // 32 * 4 + lane % 4
        own_key = kept("own_key", keys[at.x1, T.min(own_row, count - 1)])
    width = chunk(target.dtype)
    step = Cell("row_step", 0)
    with I.While(step() < count * 8 // TEAM):  # a for loop would be unrolled: the producer has few registers
        row = let("list_row", step() * (TEAM // 8) + thread // 8)
        key = let("key", from_lane(own_key, step() * 4 + lane // 8) if ahead else keys[at.x1, row])
        source = let("source", rows.offset(base, T.max(key, 0)))
        swizzled = let("swizzled", offset + row * width + T.bitwise_xor(column, row % 8) * 8)
        for c in range(rows.chunks):
            first = c * width + column * 8
            inside = T.And(key >= 0, first < rows.dim)
            at_source = rows.data.ptr_to([source + T.cast(T.if_then_else(inside, first, 0), "int64")])
            size = T.if_then_else(inside, T.uint32(16), T.uint32(0))  # what is not read is filled with zeros
            do(T.ptx["cp.async.cg.shared.global"](target.ptr_to([swizzled + c * count * width]), at_source, 16, size))
        step.set(step() + 1)


def commit_copies() -> None:
    """The copies of this thread since the last commit are a group."""
    do(T.ptx.cp.async_.commit_group())


def wait_copies(pending: int) -> None:
    """Until at most ``pending`` groups are unfinished, and what they wrote may be read by tensor cores."""
    do(T.ptx.cp.async_.wait_group(pending))
    do(T.ptx.fence.proxy.async_.shared__cta())


def store_tile(maps: Maps, view: Expr, at: Point, source: Expr, offset: Expr, chunks: int, rows: int,
               first: Expr | int = 0) -> None:  # fmt: skip
    """Store a box of rows from source[offset:], whose chunks of columns lie ``rows`` rows apart, from column ``first``
    on."""
    width = chunk(source.dtype)
    place = [let(f"c{i}", c) for i, c in enumerate(maps.place(at))]
    for condition, one in maps.each(view):
        with when(condition):
            for c in range(chunks):
                at_chunk = source.ptr_to([offset + c * rows * width])
                do(T.ptx[STORE](T.address_of(one), first + c * width, *place, at_chunk))


def add_tile(maps: Maps, view: Expr, at: Point, source: Expr, offset: Expr, chunks: int, rows: int,
             first: Expr | int = 0) -> None:  # fmt: skip
    """Add a box of ``rows`` rows of int32 from source[offset:], from column ``first`` on, to what is there."""
    width = ROW_BYTES // 4
    place = [let(f"c{i}", c) for i, c in enumerate(maps.place(at))]
    for condition, one in maps.each(view):
        with when(condition):
            for c in range(chunks):
                at_chunk = source.ptr_to([offset + c * rows * width])
                do(T.ptx[ADD](T.address_of(one), first + c * width, *place, at_chunk))


def load_bytes(target: Expr, source: Expr, size: int, barrier: Expr) -> None:
    """Copy ``size`` bytes (a multiple of 16) from global to shared memory, reporting at ``barrier``."""
    do(T.ptx[LOAD_BYTES](target, source, T.uint32(size), barrier))


def commit_stores() -> None:
    """The stores of this thread since the last commit are a group."""
    do(T.ptx.cp.async_.bulk.commit_group())


def wait_stores_read(pending: int = 0) -> None:
    """Until all but the last ``pending`` groups of this thread's stores have read their shared memory."""
    do(T.ptx.cp.async_.bulk.wait_group.read(pending))


def wait_stores() -> None:
    """Until this thread's stores are done."""
    do(T.ptx.cp.async_.bulk.wait_group(0))
