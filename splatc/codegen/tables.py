"""Tables: a cover as the int32 arrays that a kernel reads. This is where spans become bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from splatc.errors import VerifyError
from splatc.formats.strips import Ints
from splatc.ir.cover import paint
from splatc.ir.program import GATHERED, Cover
from splatc.ir.views import View

PAINTED = 1 << 25  # elements painted at a time
Int32 = NDArray[np.int32]
Words = NDArray[np.uint32]


@dataclass(frozen=True, eq=False)
class Tables:
    """One pass of a kernel, as data: int32 unless said.

    row_views (r, 12), col_views (c, 12): extents n1 n2 n3, strides s1 s2 s3, box b1 b2 b3, and how far x1 x2 x3 move
    from one tile of a repeated entry to the next. Position x1 s1 + x2 s2 + x3 s3 exists for every x in the extents.
    items (n, 8): q x1 x2 x3, first entry, entries, row view, tiles, tiles with bits.
    entries (m, 8): k x1 x2 x3, repeat, bits (0: full, else 1 + index), column view (-1: x1 is a row of gather), and how
    far x1 and x2 move on from one repetition to the next. Those of an item that have bits come first.
    bits: uint32 (b, tile_n, tile_m / 32): bit i % 32 of word [b, j, i // 32]: row lane i attends to column lane j.
    gather (g, tile_n): key positions, -1 for none. positions (n, tile_m): the query of each lane, -1 for none.
    """

    row_views: Int32
    col_views: Int32
    items: Int32
    entries: Int32
    bits: Words
    gather: Int32
    positions: Int32
    nnz: int
    full_tiles: int
    bit_tiles: int

    @property
    def tiles(self) -> int:
        return self.full_tiles + self.bit_tiles

    @property
    def views(self) -> Int32:
        """The row views and then the column views, as kernels that do not tell them apart read them."""
        return np.concatenate([self.row_views, self.col_views])

    def arrays(self) -> dict[str, Any]:
        """The arrays by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}

    @property
    def nbytes(self) -> int:
        return sum(int(x.nbytes) for x in self.arrays().values())


def build_tables(cover: Cover, fill_empty: bool = False) -> Tables:
    """The tables of a cover. Tiles that turn out empty are dropped, those that turn out full lose their bits.

    fill_empty: a row tile with nothing to attend to gets one tile of no bits, for kernels that take no empty item.
    """
    lanes_q, lanes_k = cover.rows.lanes, cover.cols[0].lanes
    bits, which, counts = _paint_all(cover, lanes_q, lanes_k)
    shape = cover.entries[:, 5]
    kind = np.concatenate([[0], which])[shape]  # -1 empty, 0 full, else 1 + index of the bits
    filled = np.concatenate([[lanes_q * lanes_k], counts])[shape]
    keep = kind >= 0
    ends = np.concatenate([[0], np.cumsum(keep)])
    items = cover.items.copy()
    items[:, 4] = ends[items[:, 3] + items[:, 4]] - ends[items[:, 3]]
    items[:, 3] = ends[items[:, 3]]
    entries = np.column_stack([cover.entries[keep, :5], kind[keep]])
    filled = filled[keep]
    positions = cover.rows.positions(items[:, :3])
    full = entries[:, 5] == 0
    nnz = _nnz(positions, items, entries, np.where(full, -1, filled), lanes_k)
    full_tiles, bit_tiles = int(entries[full, 4].sum()), int((~full).sum())
    if fill_empty and not items[:, 4].all():
        bits = np.concatenate([bits[: entries[:, 5].max(initial=0)], np.zeros((1, lanes_k, lanes_q // 32), np.uint32)])
        items, entries = _fill_empty(items, entries, cover.cols[0], len(bits))
    col_views, entries = _column_views(cover.cols, entries)
    part, row_views = _table_views((cover.rows,), np.zeros(len(items), np.int64), items[:, :3])
    entries = _bits_first(items, entries)
    sums = np.concatenate([np.zeros((1, 2), np.int64), np.cumsum(np.stack([entries[:, 3], entries[:, 4] > 0], 1), 0)])
    tiles = sums[items[:, 3] + items[:, 4]] - sums[items[:, 3]]
    return Tables(
        row_views=row_views,
        col_views=col_views,
        items=np.column_stack([items, part, tiles]).astype(np.int32),
        entries=entries.astype(np.int32) if len(entries) else np.zeros((1, 8), np.int32),
        bits=bits,
        gather=cover.gather.astype(np.int32),
        positions=positions.astype(np.int32),
        nnz=nnz,
        full_tiles=full_tiles,
        bit_tiles=bit_tiles,
    )


def _bits_first(items: Ints, entries: Ints) -> Ints:
    """The entries with those that have bits first in each item: a kernel then looks for bits in a loop of its own."""
    in_order = np.argsort(items[:, 3], kind="stable")  # entries lie item after item
    item = np.repeat(np.arange(len(items)), items[in_order, 4])
    return entries[np.lexsort((entries[:, 4] == 0, item))]


def _fill_empty(items: Ints, entries: Ints, cols: View, bits: int) -> tuple[Ints, Ints]:
    """Items without entries get one over the first column tile, with tile ``bits`` (counted from 1)."""
    items = items.copy()
    empty = items[:, 4] == 0
    items[empty, 3] = len(entries) + np.arange(empty.sum())
    items[empty, 4] = 1
    one = [cols.offset, 0, 0, 0, 1, bits]
    return items, np.concatenate([entries, np.tile(np.array(one, np.int64), (int(empty.sum()), 1))])


def _column_views(cols: tuple[View, ...], entries: Ints) -> tuple[Int32, Ints]:
    """(table views, entries as in the tables) of entries (x1 x2 x3, view, repeat, bits)."""
    view = entries[:, 3]
    seen = view != GATHERED
    out = np.zeros((len(entries), 8), np.int64)
    out[:, :3], out[:, 3:5] = entries[:, :3], entries[:, 4:6]
    out[:, 5] = GATHERED
    out[seen, 5], table = _table_views(cols, view[seen], entries[seen, :3])
    out[seen, 6:8] = table[out[seen, 5], 9:11]
    return table, out


def table_rows(view: View) -> list[tuple[int, ...]]:
    """A view as rows of row_views or col_views: one, or two where classes have two lengths (View.shown)."""
    return [(*extents, *view.strides, *view.box, *view.advance) for extents in view.shown]


def _table_views(views: tuple[View, ...], view: Ints, origin: Ints) -> tuple[Ints, Int32]:
    """(table view of each tile, the views of tables in use): one or two for each view, see View.shown."""
    rows = [row for v in views for row in table_rows(v)]
    first = np.cumsum([0] + [len(v.shown) for v in views])
    number = np.zeros(len(view), np.int64)
    for i, one in enumerate(views):
        mine = view == i
        number[mine] = first[i] + one.part(origin[mine])
    used = np.unique(number) if len(number) else np.zeros(1, np.int64)
    return np.searchsorted(used, number), np.array(rows, np.int32)[used]


def _paint_all(cover: Cover, lanes_q: int, lanes_k: int) -> tuple[Words, Ints, Ints]:
    """(distinct bits, for each shape -1 empty / 0 full / 1 + index, elements of each shape)."""
    packed, counts = [np.zeros((0, lanes_k, lanes_q // 8), np.uint8)], [np.zeros(0, np.int64)]
    chunk = max(PAINTED // (lanes_q * lanes_k), 1)
    for first in range(0, cover.shapes.count, chunk):
        chosen = slice(first, min(first + chunk, cover.shapes.count))
        painted = paint(cover.shapes, chosen, lanes_q, lanes_k)
        counts.append(painted.sum((1, 2)))
        packed.append(np.packbits(np.ascontiguousarray(painted.transpose(0, 2, 1)), axis=2, bitorder="little"))
    count, octets = np.concatenate(counts), np.concatenate(packed)
    some = (count > 0) & (count < lanes_q * lanes_k)
    tile_bytes = lanes_k * lanes_q // 8
    rows = octets[some].reshape(-1, tile_bytes).view(np.dtype((np.void, tile_bytes)))
    distinct, index = np.unique(rows.ravel(), return_inverse=True)
    which = np.where(count == 0, -1, 0)
    which[some] = 1 + index
    words = distinct.view(np.uint8).reshape(len(distinct), lanes_k, lanes_q // 8).view(np.uint32)
    if not len(words):
        words = np.zeros((1, lanes_k, lanes_q // 32), np.uint32)
    return np.ascontiguousarray(words), which, count


def _nnz(positions: Ints, items: Ints, entries: Ints, filled: Ints, lanes_k: int) -> int:
    """Elements that the tables attend to: full tiles (filled -1) count their rows that exist."""
    in_order = np.argsort(items[:, 3], kind="stable")  # entries lie item after item
    existing = (positions >= 0).sum(1)[in_order]
    rows = np.repeat(existing, items[in_order, 4])
    return int((np.where(filled < 0, rows * lanes_k, filled) * entries[:, 4]).sum())


def accumulator_bits(bits: Words, tile_m: int, tile_n: int) -> Words:
    """Bits in the order of the accumulators of tensor cores (wgmma, m64nNk16), so that each thread loads its own.

    bits: uint32 (b, tile_n, tile_m / 32) -> uint32 (b, tile_m / 64, 128, ceil(tile_n / 64)). Row r and column c belong
    to warpgroup r // 64 and its thread 32 (r % 64 // 16) + 4 (r % 8) + c % 8 // 2, register i = 4 (c // 8) +
    2 (r % 16 // 8) + c % 2: bit i % 32 of word i // 32. Bits without a column are 0.
    """
    number, words = len(bits), -(-tile_n // 64)
    octets = np.ascontiguousarray(bits).view(np.uint8).reshape(number, tile_n // 8, 4, 2, tile_m // 64, 4, 2)
    # an octet: 8 rows, of 8 threads, of one column -> (tile, warpgroup, warp, pair of columns, registers)
    octets = octets.transpose(0, 4, 5, 2, 1, 6, 3).reshape(number, tile_m // 64, 4, 4, tile_n // 2)
    out = np.zeros((number, tile_m // 64, 4, 8, 4, words * 4), np.uint8)
    for row in range(8):
        own = np.packbits(octets & np.uint8(1 << row), axis=-1, bitorder="little")
        out[:, :, :, row, :, : own.shape[-1]] = own
    return out.view(np.uint32).reshape(number, tile_m // 64, 128, words)


def check_nnz(tables: tuple[Tables, ...], nnz: int) -> None:
    """The tables of all passes attend to as many elements as the mask has: raise VerifyError if not."""
    total = sum(t.nnz for t in tables)
    if total != nnz:
        raise VerifyError(f"the tile tables attend to {total} elements but the mask has {nnz}; please report this mask")
