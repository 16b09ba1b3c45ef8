"""Gathering columns: the sparse tiles of a row tile become fewer tiles of exactly the keys that they touch.

Random graphs and learned masks put a few elements into every tile. The keys of a row tile's sparsest tiles, listed one
after the other and cut into lists of a tile's width, are as good a column tile as any once keys are loaded one by one.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from splatc.formats.remainder import BLOCK, BlockBits, unpack
from splatc.formats.strips import Ints, Runs, ramp
from splatc.ir.cover import ShapeRuns, runs_of
from splatc.ir.program import GATHERED, Cover, Shapes

GATHER_COST = 2.75  # of a gathered tile, in full ones: its keys arrive row by row (measured on an H200)
BITS_COST = 0.03  # of the bits of a tile, in full ones
MANY = 4  # tiles of a row tile that are worth gathering: the two ends of a window are not
WORTHWHILE = 0.05  # of all tiles: a kernel that can gather must be worth its place


def gather_tiles(cover: Cover) -> Cover:
    """Partly filled tiles of the contiguous view replaced by gathered ones, in row tiles where that costs less."""
    lanes_q, lanes_k = cover.rows.lanes, cover.cols[0].lanes
    plain = [i for i, view in enumerate(cover.cols) if view.kind == "contiguous"]
    if cover.rows.kind != "contiguous" or not plain or lanes_q % BLOCK or lanes_k % BLOCK:
        return cover
    item = _items_of_entries(cover)
    entry = np.flatnonzero((cover.entries[:, 3] == plain[0]) & (cover.entries[:, 5] > 0))
    if np.bincount(item[entry]).max(initial=0) < MANY:
        return cover
    entry = entry[np.argsort(item[entry], kind="stable")]
    runs = runs_of(cover.shapes.spans, lanes_k)
    touched = _touched(cover.shapes, runs, lanes_k)
    chosen, saved = _sparsest(item[entry], touched.sum(1)[cover.entries[entry, 5] - 1], lanes_k)
    if saved <= WORTHWHILE * cover.tiles:
        return cover
    entry = entry[chosen]
    shape = cover.entries[entry, 5] - 1
    owners, which = np.unique(item[entry], return_inverse=True)
    rank, count = _ranks(which, touched[shape])
    lists, first = _lists(which, rank, count, cover.entries[entry, 0])
    bits = BlockBits.from_runs(_moved(cover.shapes, runs, shape, which * lanes_q, rank))
    shapes = _with_blocks(cover.shapes, bits, first, lanes_q // BLOCK, lanes_k // BLOCK, len(lists))
    new = np.arange(len(lists))
    gathered = np.column_stack([new, 0 * new, 0 * new, 0 * new + GATHERED, 0 * new + 1, 1 + cover.shapes.count + new])
    kept = np.delete(np.arange(len(item)), entry)
    entries = np.concatenate([cover.entries[kept], gathered])
    of_item = np.concatenate([item[kept], np.repeat(owners, np.diff(first))])
    order = np.argsort(of_item, kind="stable")
    items = cover.items.copy()
    items[:, 4] = np.bincount(of_item, minlength=len(items))
    items[:, 3] = np.cumsum(items[:, 4]) - items[:, 4]
    entries, shapes = _used(entries[order], shapes)
    return replace(cover, items=items, entries=entries, shapes=shapes, gather=lists)


def _items_of_entries(cover: Cover) -> Ints:
    owner, i = ramp(cover.items[:, 4])
    out = np.zeros(len(cover.entries), np.int64)
    out[cover.items[owner, 3] + i] = owner
    return out


def _touched(shapes: Shapes, runs: ShapeRuns, lanes_k: int) -> NDArray[np.bool_]:
    """The columns in which each shape has elements: bool (shapes, lanes_k)."""
    shape, _, begin, end = runs
    steps = np.zeros((shapes.count, lanes_k + 1), np.int32)
    np.add.at(steps, (shape, begin), 1)
    np.add.at(steps, (shape, end), -1)
    words = np.zeros((shapes.count, lanes_k // BLOCK), np.uint64)
    number, index, _, col = shapes.blocks.T
    np.bitwise_or.at(words, (number, col // BLOCK), np.bitwise_or.reduce(shapes.bits[index], axis=1))
    return (np.cumsum(steps, axis=1)[:, :lanes_k] > 0) | unpack(words).reshape(shapes.count, lanes_k)


def _sparsest(item: Ints, columns: Ints, lanes_k: int) -> tuple[NDArray[np.bool_], float]:
    """(which tiles to gather, tiles saved): of each item (sorted) the n tiles of fewest columns, MANY or more, with the
    best n."""
    if not len(item):
        return np.zeros(0, bool), 0.0
    order = np.lexsort((columns, item))
    first = np.flatnonzero(np.diff(item, prepend=-1))
    size = np.diff(np.append(first, len(item)))
    owner, rank = ramp(size)
    ends = np.cumsum(columns[order])
    held = ends - (ends - columns[order])[first][owner]
    saved = (rank + 1) * (1 + BITS_COST) - -(-held // lanes_k) * (GATHER_COST + BITS_COST)
    saved[rank + 1 < MANY] = 0
    best = np.maximum.reduceat(saved, first)
    enough = np.minimum.reduceat(np.where(saved == best[owner], rank + 1, len(item)), first)
    chosen = np.zeros(len(item), bool)
    chosen[order] = rank < np.where(best > 0, enough, 0)[owner]
    return chosen, float(np.maximum(best, 0).sum())


def _ranks(which: Ints, touched: NDArray[np.bool_]) -> tuple[Ints, Ints]:
    """(rank of each touched column of tiles among all those of their row tile, -1 elsewhere: int64 (n, tile_n); how
    many columns each row tile has): ``which`` numbers the row tiles and is sorted."""
    tile, col = np.nonzero(touched)
    count = np.bincount(which[tile])
    rank = np.full(touched.shape, -1)
    rank[tile, col] = ramp(count)[1]
    return rank, count


def _lists(which: Ints, rank: Ints, count: Ints, origin: Ints) -> tuple[Ints, Ints]:
    """(lists of keys (g, tile_n), first list of each row tile and one past the last) of tiles at ``origin``."""
    lanes_k = rank.shape[1]
    first = np.cumsum(np.append(0, -(-count // lanes_k)))
    tile, col = np.nonzero(rank >= 0)
    keys = np.full(int(first[-1]) * lanes_k, -1)
    keys[first[which[tile]] * lanes_k + rank[tile, col]] = origin[tile] + col
    return keys.reshape(-1, lanes_k), first


def _moved(shapes: Shapes, runs: ShapeRuns, shape: Ints, row: Ints, rank: Ints) -> Runs:
    """The runs of tiles (their shapes, first rows and ranks), each column moved to its rank: neighbours stay such."""
    chosen = np.zeros(shapes.count, bool)
    chosen[shape] = True
    number, lane, begin, end = _all_runs(shapes, runs, chosen)
    order = np.argsort(number, kind="stable")
    count = np.bincount(number, minlength=shapes.count)
    tile, i = ramp(count[shape])
    run = order[(np.cumsum(count) - count)[shape[tile]] + i]
    start = rank[tile, begin[run]]
    return Runs(row[tile] + lane[run], start, start + (end - begin)[run])


def _all_runs(shapes: Shapes, runs: ShapeRuns, chosen: NDArray[np.bool_]) -> ShapeRuns:
    """The runs of spans and of blocks of bits that make up the chosen shapes; they are disjoint."""
    number, index, lane0, col0 = shapes.blocks[chosen[shapes.blocks[:, 0]]].T
    block, row = np.nonzero(shapes.bits[index])
    word, bit = np.nonzero(unpack(shapes.bits[index[block], row]))
    block, col = block[word], col0[block[word]] + bit
    single = number[block], lane0[block] + row[word], col, col + 1
    some = chosen[runs[0]]
    shape, lane, begin, end = (np.concatenate([mine[some], other]) for mine, other in zip(runs, single, strict=True))
    return shape, lane, begin, end


def _with_blocks(old: Shapes, bits: BlockBits, first: Ints, down: int, across: int, lists: int) -> Shapes:
    """The shapes, and one more for each list: ranks of a row tile are the lanes of its lists, one after the other."""
    number = old.count + first[bits.rows // down] + bits.cols // across
    blocks = np.stack([number, len(old.bits) + np.arange(len(number)), bits.rows % down * BLOCK,
                       bits.cols % across * BLOCK], axis=1)  # fmt: skip
    return Shapes(old.count + lists, old.spans, np.concatenate([old.blocks, blocks]),
                  np.concatenate([old.bits, bits.bits]))  # fmt: skip


def _used(entries: Ints, shapes: Shapes) -> tuple[Ints, Shapes]:
    """The same entries and shapes without those shapes that no entry has."""
    some = entries[:, 5] > 0
    used, number = np.unique(entries[some, 5] - 1, return_inverse=True)
    entries = entries.copy()
    entries[some, 5] = 1 + number
    new = np.full(shapes.count, -1)
    new[used] = np.arange(len(used))
    spans, blocks = (table[new[table[:, 0]] >= 0].copy() for table in (shapes.spans, shapes.blocks))
    for table in (spans, blocks):
        table[:, 0] = new[table[:, 0]]
    return entries, replace(shapes, count=len(used), spans=spans, blocks=blocks)
