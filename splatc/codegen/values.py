"""Where a tile's elements lie in ACSR order: tables of kernels that read or write a value for each element.

A line of a tile is what it has of one query. Its elements follow each other in ACSR order, so the number of the first
one and the bits say where all lie.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from splatc.codegen.tables import Int32, Tables
from splatc.errors import Unsupported
from splatc.formats.order import Order
from splatc.formats.strips import Ints, ramp

AT_ONCE = 1 << 14  # tiles


@dataclass(frozen=True, eq=False)
class ValueTables:
    """Tables whose entries are one tile each (repeat is 1), and for each entry: first, int32 (entries, lines), the
    number of the first element of each line, 0 where it has none."""

    tables: Tables
    first: Int32

    @property
    def nbytes(self) -> int:
        return self.tables.nbytes + self.first.nbytes


def value_tables(tables: Tables, order: Order, queries_are_rows: bool) -> ValueTables | None:
    """The tables of a pass over a mask or, where queries are columns, over the transposed mask.

    None where the elements of some line do not follow each other: views may show a row in another order.
    """
    if order.nnz >= 1 << 31:
        raise Unsupported(f"the mask has {order.nnz} elements: kernels over values number less than 2^31 for each head")
    tables, item = _unrolled(tables)
    first = np.zeros((len(tables.entries), tables.positions.shape[1] if queries_are_rows else tables.gather.shape[1]),
                     np.int32)  # fmt: skip
    spans = _spans(tables.bits, queries_are_rows)
    for begin in range(0, len(item), AT_ONCE):
        some = slice(begin, min(begin + AT_ONCE, len(item)))
        entries = tables.entries[some].astype(np.int64)
        rows = tables.positions[item[some]].astype(np.int64)
        cols = column_positions(tables.col_views, entries[:, :3], entries[:, 5], tables.gather.shape[1])
        queries, keys = (rows, cols) if queries_are_rows else (cols, rows)
        found = _first(queries, keys, entries[:, 4], spans, order)
        if found is None:
            return None
        first[some] = found
    return ValueTables(tables, first)


def _unrolled(tables: Tables) -> tuple[Tables, Ints]:
    """(tables with an entry for each tile, the item of each)."""
    items, entries = tables.items.astype(np.int64), tables.entries.astype(np.int64)
    if not items[:, 4].any():
        return tables, np.zeros(0, np.int64)
    owner, turn = ramp(entries[:, 3])
    ends = np.concatenate([[0], np.cumsum(entries[:, 3])])
    items[:, 4] = ends[items[:, 3] + items[:, 4]] - ends[items[:, 3]]
    items[:, 3] = ends[items[:, 3]]
    entries = entries[owner]
    entries[:, :2] += turn[:, None] * entries[:, 6:8]
    entries[:, 3] = 1
    item = np.zeros(len(entries), np.int64)
    for_item, at = ramp(items[:, 4])
    item[items[for_item, 3] + at] = for_item
    return replace(tables, items=items.astype(np.int32), entries=entries.astype(np.int32)), item


def column_positions(col_views: Int32, origins: Ints, view: Ints, lanes: int) -> Ints:
    """Positions of lanes of column tiles at origins (tiles, 3) in these views, -1 for none: int64 (tiles, lanes)."""
    n, stride, box = (col_views[view, 3 * g : 3 * g + 3].astype(np.int64) for g in range(3))
    lane = np.arange(lanes)[None, :]
    b1, b2 = box[:, 0, None], box[:, 1, None]
    offsets = lane % b1, lane // b1 % b2, lane // (b1 * b2)
    x = [origins[:, d, None] + offset for d, offset in enumerate(offsets)]
    inside = np.logical_and.reduce([(x[d] >= 0) & (x[d] < n[:, d, None]) for d in range(3)])
    return np.where(inside, sum(x[d] * stride[:, d, None] for d in range(3)), -1)


def _spans(bits: NDArray[np.uint32], queries_are_rows: bool) -> tuple[Ints, Ints, Ints]:
    """Of each tile of bits and each line: its first and last key lane and its number of elements."""
    held = np.unpackbits(np.ascontiguousarray(bits).view(np.uint8), axis=-1, bitorder="little").astype(bool)
    held = held.reshape(len(bits), bits.shape[1], -1)  # tile, column, row
    lines = held.transpose(0, 2, 1) if queries_are_rows else held
    return lines.argmax(2), lines.shape[2] - 1 - lines[:, :, ::-1].argmax(2), lines.sum(2)


def _first(queries: Ints, keys: Ints, bits: Ints, spans: tuple[Ints, Ints, Ints], order: Order) -> Ints | None:
    """The first numbers of lines of tiles: queries (tiles, lines), keys (tiles, lanes), bits as in entries."""
    exists = keys >= 0
    lanes = keys.shape[1]
    full = exists.argmax(1), lanes - 1 - exists[:, ::-1].argmax(1), exists.sum(1)
    shape = np.maximum(bits - 1, 0)
    begin, end, count = (np.where(bits[:, None] > 0, of_bits[shape], of_full[:, None])
                         for of_bits, of_full in zip(spans, full, strict=True))  # fmt: skip
    held = (queries >= 0) & (count > 0)
    safe = np.where(held, queries, 0)
    first = order.ranks(safe, np.take_along_axis(keys, begin, 1))
    last = order.ranks(safe, np.take_along_axis(keys, end, 1))
    # a lane whose key comes before that of the lane before it, of those that exist
    before = np.take_along_axis(keys, np.maximum.accumulate(np.where(exists, np.arange(lanes), 0), axis=1), 1)
    turns = np.cumsum(np.diff(before, axis=1, prepend=before[:, :1]) < 0, axis=1)
    turned = np.take_along_axis(turns, end, 1) != np.take_along_axis(turns, begin, 1)
    if (held & ((last - first + 1 != count) | turned)).any():
        return None
    return np.where(held, first, 0)
