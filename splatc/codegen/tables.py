"""Tables: a cover as the int32 arrays that a kernel reads. This is where spans become bits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from splatc.errors import VerifyError
from splatc.ir.cover import paint
from splatc.ir.program import Cover

CHUNK = 2048  # shapes painted at a time


@dataclass(frozen=True, eq=False)
class Tables:
    """One pass of a kernel, as data.

    views: int32 (n, 12) extents n1 n2 n3, strides s1 s2 s3, box b1 b2 b3, and how far x1 x2 x3 move from one tile of a
    repeated entry to the next; view 0 is the rows', the others the columns'.
    items: int32 (n, 8) q x1 x2 x3, first entry, entries, view 0, tiles, 0.
    entries: int32 (m, 8) k x1 x2 x3, repeat, bits (0: full, else 1 + index), view, 0, 0.
    bits: uint32 (b, tile_n, tile_m / 32): bit i % 32 of word [b, j, i // 32]: row lane i attends to column lane j.
    """

    views: NDArray[np.int32]
    items: NDArray[np.int32]
    entries: NDArray[np.int32]
    bits: NDArray[np.uint32]
    nnz: int
    full_tiles: int
    bit_tiles: int

    @property
    def tiles(self) -> int:
        return self.full_tiles + self.bit_tiles

    @property
    def nbytes(self) -> int:
        return sum(int(x.nbytes) for x in (self.views, self.items, self.entries, self.bits))


def build_tables(cover: Cover) -> Tables:
    """The tables of a cover. Tiles that turn out empty are dropped, those that turn out full lose their bits."""
    lanes_q = cover.rows.lanes
    lanes_k = cover.cols[0].lanes
    bits, which, counts = _paint_all(cover, lanes_q, lanes_k)
    entries, items = cover.entries, cover.items
    shape = entries[:, 5]
    kind = np.concatenate([[0], which])[shape]  # -1 empty, 0 full, else 1 + index of the bits
    filled = np.concatenate([[lanes_q * lanes_k], counts])[shape]
    keep = kind >= 0
    ends = np.concatenate([[0], np.cumsum(keep)])
    items = items.copy()
    items[:, 4] = ends[items[:, 3] + items[:, 4]] - ends[items[:, 3]]
    items[:, 3] = ends[items[:, 3]]
    entries, kind, filled = entries[keep], kind[keep], filled[keep]
    table = np.zeros((len(entries), 8), np.int32)
    table[:, :3], table[:, 3], table[:, 4], table[:, 5] = entries[:, :3], entries[:, 4], kind, entries[:, 3] + 1
    full = kind == 0
    return Tables(
        views=np.array([[*v.extents, *v.strides, *v.box, *v.advance] for v in (cover.rows, *cover.cols)], np.int32),
        items=_items(items, entries),
        entries=table if len(table) else np.zeros((1, 8), np.int32),
        bits=bits,
        nnz=_valid_nnz(cover, items, entries, filled, full),
        full_tiles=int(entries[full, 4].sum()),
        bit_tiles=int((~full).sum()),
    )


def _items(items: NDArray[np.int64], entries: NDArray[np.int64]) -> NDArray[np.int32]:
    out = np.zeros((len(items), 8), np.int32)
    out[:, :5] = items
    ends = np.concatenate([[0], np.cumsum(entries[:, 4])])
    out[:, 6] = ends[items[:, 3] + items[:, 4]] - ends[items[:, 3]]
    return out


def _paint_all(
    cover: Cover, lanes_q: int, lanes_k: int
) -> tuple[NDArray[np.uint32], NDArray[np.int64], NDArray[np.int64]]:
    """(distinct bits, for each shape -1 empty / 0 full / 1 + index, elements of each shape)."""
    packed, counts = [np.zeros((0, lanes_k, lanes_q // 8), np.uint8)], [np.zeros(0, np.int64)]
    for first in range(0, cover.shapes.count, CHUNK):
        chosen = slice(first, min(first + CHUNK, cover.shapes.count))
        painted = paint(cover.shapes, chosen, lanes_q, lanes_k)
        counts.append(painted.sum((1, 2)))
        packed.append(np.packbits(painted.transpose(0, 2, 1), axis=2, bitorder="little"))
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


def _valid_nnz(cover: Cover, items: NDArray[np.int64], entries: NDArray[np.int64], filled: NDArray[np.int64],
               full: NDArray[np.bool_]) -> int:  # fmt: skip
    """Elements that the tables attend to: full tiles count their rows that exist."""
    existing = (cover.rows.positions(items[:, :3]) >= 0).sum(1)
    in_order = np.argsort(items[:, 3], kind="stable")  # entries lie item after item
    rows = np.repeat(existing[in_order], items[in_order, 4])
    lanes_k = cover.cols[0].lanes
    return int((np.where(full, rows * lanes_k, filled) * entries[:, 4]).sum())


def check_nnz(tables: tuple[Tables, ...], nnz: int) -> None:
    """The tables of all passes attend to as many elements as the mask has: raise VerifyError if not."""
    total = sum(t.nnz for t in tables)
    if total != nnz:
        raise VerifyError(f"the tile tables attend to {total} elements but the mask has {nnz}; please report this mask")
