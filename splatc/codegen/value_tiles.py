"""Tiles of values as GPUs read them: lists of positions in place of views, and bits line by line.

A line of a tile is what it has of one query (codegen/values.py). Threads that copy rows and lines want to know where
each begins, not how a view computes it: lists that tiles share cost little, and no kernel depends on views.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from splatc.codegen.tables import Int32, Words
from splatc.codegen.values import ValueTables, column_positions
from splatc.formats.strips import Ints

NONE = -1  # a line without elements, a lane without a position


@dataclass(frozen=True, eq=False)
class ValueTiles:
    """One walk over tiles of m rows and n columns; int32 unless said.

    items (i, 2): first entry, entries. positions (i, m): of the rows, -1 for none.
    entries (e, 2): the column list, bits (0: every line is whole, else 1 + index).
    columns (c, n): of the columns, -1 for none. first (e, lines): the number of each line's first element in ACSR
    order, -1 where a line has none. bits: uint32 (b, lines, keys / 32): bit k % 32 of word [b, line, k // 32] says that
    the line has key lane k. Of a whole line, elements are those of all key lanes.
    """

    items: Int32
    positions: Int32
    entries: Int32
    columns: Int32
    first: Int32
    bits: Words

    def arrays(self) -> Mapping[str, NDArray[np.generic]]:
        """The arrays by name."""
        return vars(self)

    @property
    def nbytes(self) -> int:
        return sum(int(x.nbytes) for x in self.arrays().values())


def value_tiles(values: ValueTables, queries_are_rows: bool) -> ValueTiles:
    """The tiles of a walk over a mask or, where queries are columns, over the transposed mask, an item's in order."""
    t = values.tables
    entries = t.entries[: t.items[:, 4].sum()].astype(np.int64)  # without the one that stands for none
    item = np.empty(len(entries), np.int64)
    for i, (begin, count) in enumerate(t.items[:, 3:5].tolist()):
        item[begin : begin + count] = i
    origins, column = np.unique(entries[:, [0, 1, 2, 5]], axis=0, return_inverse=True)
    column = column.ravel()
    columns = column_positions(t.col_views, origins[:, :3], origins[:, 3], t.gather.shape[1])
    lowest = np.where(columns < 0, columns.max(initial=0) + 1, columns).min(1)
    by_key = np.lexsort((lowest[column], t.items[item, 3]))  # of each item: a line's tiles follow each other
    entries, item, column = entries[by_key], item[by_key], column[by_key]
    held = _by_line(t.bits, queries_are_rows)
    kind, held = _incomplete_lines(entries[:, 4], held, t.positions[item] >= 0, queries_are_rows)
    lanes = t.positions[item] if queries_are_rows else columns[column]
    some = np.concatenate([np.ones((1, held.shape[1]), bool), held.any(2)])[kind]  # which lines have elements
    return ValueTiles(
        items=np.ascontiguousarray(t.items[:, 3:5]),
        positions=t.positions,
        entries=np.stack([column, kind], 1).astype(np.int32),
        columns=columns.astype(np.int32),
        first=np.where(some & (lanes >= 0), values.first[by_key], NONE).astype(np.int32),
        bits=np.packbits(held, axis=2, bitorder="little").view(np.uint32),
    )


def joined(tiles: Sequence[ValueTiles]) -> tuple[ValueTiles, Ints]:
    """(the tiles of several walks in one, the first item of each and their end)."""
    sizes = {name: np.cumsum([0, *(len(one.arrays()[name]) for one in tiles)]) for name in tiles[0].arrays()}
    parts: dict[str, list[NDArray[np.generic]]] = {name: [] for name in sizes}
    for i, one in enumerate(tiles):
        items, entries = one.items.copy(), one.entries.copy()
        items[:, 0] += sizes["entries"][i]
        entries[:, 0] += sizes["columns"][i]
        entries[:, 1] += np.where(entries[:, 1] > 0, sizes["bits"][i], 0).astype(np.int32)
        for name, array in {**one.arrays(), "items": items, "entries": entries}.items():
            parts[name].append(array)
    return ValueTiles(**{name: np.concatenate(part) for name, part in parts.items()}), sizes["items"]


def _by_line(bits: Words, queries_are_rows: bool) -> NDArray[np.bool_]:
    """bool (b, lines, keys) of bits as in ``Tables``."""
    octets = np.ascontiguousarray(bits).view(np.uint8)
    held = np.unpackbits(octets, axis=-1, bitorder="little").astype(bool)  # tile, column, row
    return np.ascontiguousarray(held.transpose(0, 2, 1)) if queries_are_rows else held


def _incomplete_lines(kind: Ints, held: NDArray[np.bool_], rows: NDArray[np.bool_],
                      queries_are_rows: bool) -> tuple[Ints, NDArray[np.bool_]]:  # fmt: skip
    """(kind, held) in which full tiles with rows that do not exist have bits, where rows are keys: their lines have
    fewer elements than key lanes."""
    short = (kind == 0) & ~rows.all(1)
    if queries_are_rows or not short.any():
        return kind, held
    masks, which = np.unique(rows[short], axis=0, return_inverse=True)
    kind = kind.copy()
    kind[short] = 1 + len(held) + which.ravel()
    return kind, np.concatenate([held, np.repeat(masks[:, None, :], held.shape[1], axis=1)])
