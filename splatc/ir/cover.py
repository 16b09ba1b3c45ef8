"""Covering a region with tiles: which column tiles every row tile needs, and what each partly filled one holds.

All of it is arithmetic on whole arrays of strips; nothing of size S x S is formed, and full tiles side by side are one
entry, so that a dense row of a million keys costs one entry too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from splatc.errors import VerifyError
from splatc.formats.remainder import BLOCK, BlockBits, unpack
from splatc.formats.strips import COL, COUNT, DCOL, DCOUNT, DWIDTH, ROW, ROWS, STRIDE, WIDTH, Ints, ramp
from splatc.ir.patches import cover_patches
from splatc.ir.program import Cover, Region, Shapes
from splatc.ir.see import Seen, see
from splatc.ir.views import View


@dataclass(frozen=True)
class Grid:
    """How (line, u) coordinates fall into tiles along one axis: a tile is b1 of u by b2 lines."""

    b1: int
    b2: int
    across: int  # tiles along u

    @staticmethod
    def of(view: View) -> Grid:
        b1, b2, _ = view.box
        if view.kind == "blocks":  # one line, block after block
            return Grid(b1 * b2, 1, -(-view.extents[1] // b2))
        return Grid(b1, b2, -(-view.extents[0] // b1))

    @property
    def lanes(self) -> int:
        return self.b1 * self.b2


def origins(view: View, tile: Ints) -> Ints:
    """The origin (x1, x2, x3) of tiles by number: int64 (n, 3)."""
    grid = Grid.of(view)
    along, line = tile % grid.across, tile // grid.across
    if view.kind == "blocks":
        x1, x2 = np.full_like(tile, view.offset), along * view.box[1]
    else:
        x1, x2 = along * grid.b1, line * grid.b2
    return np.stack([x1, x2, np.zeros_like(tile)], axis=1)


def tile_count(view: View) -> int:
    """Tiles of the whole axis."""
    grid = Grid.of(view)
    lines = 1 if view.kind == "blocks" else view.extents[1]
    return grid.across * -(-lines // grid.b2)


def cover(q_len: int, kv_len: int, regions: tuple[Region, ...], every_row: bool) -> Cover:
    """The tiles of regions that share a row view; with ``every_row`` also row tiles that have nothing to attend to."""
    rows = regions[0].rows
    if rows.kind == "patches":
        return cover_patches(q_len, kv_len, regions[0], every_row)
    cols = tuple(dict.fromkeys(region.cols for region in regions))
    lanes_valid = _valid_lanes(rows)
    runs, partial = [], []
    for region in regions:
        seen = see(region.pieces, rows, region.cols)
        if seen is None:
            raise AssertionError(f"view {region.cols} does not show the region's pieces")
        full, spans = _fragments(seen, Grid.of(rows), Grid.of(region.cols), lanes_valid)
        view = cols.index(region.cols)
        runs.append(np.insert(full, 1, view, axis=1))
        partial.append(np.insert(spans, 1, view, axis=1))
    full, spans = np.concatenate(runs), np.concatenate(partial)
    shared = [(region.remainder, cols.index(region.cols)) for region in regions if len(region.remainder.rows)]
    tiles, shapes = _shapes(spans, shared, rows, cols)
    entries = np.concatenate([full, tiles])  # (row tile, view, column tile, repeat, shape)
    entries = entries[np.lexsort((entries[:, 2], entries[:, 1], entries[:, 0]))]
    numbers = np.arange(tile_count(rows)) if every_row else np.unique(entries[:, 0])
    first = np.searchsorted(entries[:, 0], numbers)
    count = np.searchsorted(entries[:, 0], numbers, "right") - first
    items = np.concatenate([origins(rows, numbers), first[:, None], count[:, None]], axis=1)
    at = np.zeros((len(entries), 3), np.int64)
    for v, one in enumerate(cols):
        mine = entries[:, 1] == v
        at[mine] = origins(one, entries[mine, 2])
    table = np.concatenate([at, entries[:, [1, 3, 4]]], axis=1)
    return Cover(q_len, kv_len, rows, cols, items, table, shapes)


def tiles_of(q_len: int, kv_len: int, regions: tuple[Region, ...]) -> int:
    """Tiles that regions need in all, row view by row view."""
    views = tuple(dict.fromkeys(region.rows for region in regions))
    parts = (tuple(region for region in regions if region.rows == view) for view in views)
    return sum(cover(q_len, kv_len, part, every_row=False).tiles for part in parts)


def _valid_lanes(view: View) -> Ints:
    """Positions that exist in each tile of an axis."""
    position = np.arange(view.length)
    line, u = (position % view.step, position // view.step) if view.kind == "residue" else (position * 0, position)
    grid = Grid.of(view)
    return np.bincount(u // grid.b1 + grid.across * (line // grid.b2), minlength=tile_count(view))


def _fragments(seen: Seen, rows: Grid, cols: Grid, lanes_valid: Ints) -> tuple[Ints, Ints]:
    """Strips cut at row tiles: (full, spans).

    full: (row tile, column tile, repeat, 0), runs of full tiles that one strip fills by itself.
    spans: (row tile, column tile, lane, lanes, col, dcol, width, dwidth, stride, count, dcount), relative to the tile.
    """
    s = seen.strips
    k0, k1 = s[:, ROW] // rows.b1, (s[:, ROW] + s[:, ROWS] - 1) // rows.b1
    owner, i = ramp(k1 - k0 + 1)
    s, k = s[owner].copy(), k0[owner] + i
    t0 = np.maximum(k * rows.b1 - s[:, ROW], 0)
    s[:, ROWS] = np.minimum((k + 1) * rows.b1 - s[:, ROW], s[:, ROWS]) - t0
    for field, slope in ((COL, DCOL), (WIDTH, DWIDTH), (COUNT, DCOUNT)):
        s[:, field] += s[:, slope] * t0
    s[:, ROW] += t0
    s, source = _spread(s, cols.b1)
    owner, k = owner[source], k[source]
    row_line, col_line = seen.row_line[owner], seen.col_line[owner]
    lane = s[:, ROW] - k * rows.b1 + rows.b1 * (row_line % rows.b2)
    row_tile = k + rows.across * (row_line // rows.b2)
    lanes, col, dcol, width, dwidth, stride, count, dcount = (
        s[:, f] for f in (ROWS, COL, DCOL, WIDTH, DWIDTH, STRIDE, COUNT, DCOUNT))  # fmt: skip

    last = lanes - 1
    end = col + stride * (count - 1) + width
    end_last = col + dcol * last + stride * (count + dcount * last - 1) + width + dwidth * last
    low, high = np.minimum(col, col + dcol * last), np.maximum(end, end_last)  # touched by some lane
    solid = (count == 1) & (dcount == 0)
    all_low, all_high = np.maximum(col, col + dcol * last), np.minimum(end, end_last)  # touched by every lane
    alone = solid & (lanes == lanes_valid[row_tile]) & (cols.b2 == 1)
    j0, j1 = low // cols.b1, -(-high // cols.b1)
    f0 = np.where(alone, -(-all_low // cols.b1), j1)
    f1 = np.where(alone, all_high // cols.b1, j1)
    none = f1 <= f0
    f0, f1 = np.where(none, j1, f0), np.where(none, j1, f1)
    base = cols.across * (col_line // cols.b2)
    some = f1 > f0
    full = np.stack([row_tile, base + f0, f1 - f0, np.zeros_like(f0)], axis=1)[some]

    before, after = f0 - j0, j1 - f1
    owner, i = ramp(before + after)
    j = np.where(i < before[owner], j0[owner] + i, f1[owner] + i - before[owner])
    inside = cols.b1 * (col_line % cols.b2)  # where this line lies in a tile of several lines
    begin, dbegin, w, dw = _clip(col[owner] - j * cols.b1, dcol[owner], width[owner], dwidth[owner], last[owner],
                                 solid[owner], cols.b1)  # fmt: skip
    columns = [row_tile[owner], base[owner] + j, lane[owner], lanes[owner], begin + inside[owner], dbegin, w, dw,
               stride[owner], count[owner], dcount[owner]]  # fmt: skip
    spans = np.stack(columns, axis=1)
    return full, _clip_combs(spans, cols.b1) if cols.b2 == 1 else _clip_lines(spans, inside[owner], cols.b1)


def _spread(strips: Ints, size: int) -> tuple[Ints, Ints]:
    """Runs a tile or more apart become strips of their own, so that the tiles between them stay empty: (strips,
    source).
    """
    most = np.maximum(strips[:, COUNT], strips[:, COUNT] + strips[:, DCOUNT] * (strips[:, ROWS] - 1))
    source, k = ramp(np.where(strips[:, STRIDE] >= size, most, 1))
    s = strips[source].copy()
    apart = s[:, STRIDE] >= size
    # run k exists in the rows t with count + dcount*t > k: a range of rows, as count is affine
    count, slope, rows = s[:, COUNT], s[:, DCOUNT], s[:, ROWS]
    step = np.maximum(np.abs(slope), 1)
    first = np.where(slope > 0, np.maximum(-(-(k + 1 - count) // step), 0), 0)
    stop = np.where(slope < 0, np.minimum((count - k - 1) // step + 1, rows), rows)
    first, stop = np.where(apart, first, 0), np.where(apart, stop, rows)
    s[:, ROW] += first
    s[:, COL] += s[:, DCOL] * first + np.where(apart, s[:, STRIDE] * k, 0)
    s[:, WIDTH] += s[:, DWIDTH] * first
    s[:, ROWS] = stop - first
    s[apart, COUNT], s[apart, DCOUNT], s[apart, STRIDE] = 1, 0, 0
    some = s[:, ROWS] > 0
    return s[some], source[some]


def _clip(col: Ints, dcol: Ints, width: Ints, dwidth: Ints, last: Ints, solid: NDArray[np.bool_],
          size: int) -> tuple[Ints, Ints, Ints, Ints]:  # fmt: skip
    """Bounds of solid spans outside the tile in every lane move to its edge, so that equal tiles look equal."""
    end, dend = col + width, dcol + dwidth
    left = solid & (np.maximum(col, col + dcol * last) <= 0)
    right = solid & (np.minimum(end, end + dend * last) >= size)
    col, dcol = np.where(left, 0, col), np.where(left, 0, dcol)
    end, dend = np.where(right, size, end), np.where(right, 0, dend)
    return col, dcol, end - col, dend - dcol


def _clip_combs(spans: Ints, size: int) -> Ints:
    """Leave out the runs of a strided span that lie before or behind the tile in every lane."""
    comb = spans[:, 9] > 1
    if not comb.any():
        return spans
    s = spans[comb].copy()
    last = s[:, 3] - 1
    low = np.minimum(s[:, 4], s[:, 4] + s[:, 5] * last)
    high = np.maximum(s[:, 4] + s[:, 6], s[:, 4] + s[:, 5] * last + s[:, 6] + s[:, 7] * last)
    before = np.maximum(-high // s[:, 8] + 1, 0)  # runs whose end is at most 0
    within = (size - 1 - low) // s[:, 8] + 1 - before
    s[:, 4] += s[:, 8] * before
    s[:, 9] -= before
    longer = np.minimum(s[:, 9], s[:, 9] + s[:, 10] * last) >= within
    s[longer, 9], s[longer, 10] = within[longer], 0
    clipped: Ints = spans.copy()
    clipped[comb] = s
    return clipped


def _clip_lines(spans: Ints, inside: Ints, size: int) -> Ints:
    """In a tile of several lines a span must not reach into its neighbour's lanes: cut it lane by lane."""
    owner, t = ramp(spans[:, 3])
    s = spans[owner]
    out = s.copy()
    count = s[:, 9] + s[:, 10] * t
    width = s[:, 6] + s[:, 7] * t
    start = s[:, 4] + s[:, 5] * t
    single, k = ramp(count)
    out, t, inside = out[single], t[single], inside[owner][single]
    begin = start[single] + s[single, 8] * k
    end = np.minimum(begin + width[single], inside + size)
    begin = np.maximum(begin, inside)
    out[:, 2] += t
    out[:, 3], out[:, 4], out[:, 5], out[:, 6], out[:, 7] = 1, begin, 0, end - begin, 0
    out[:, 8], out[:, 9], out[:, 10] = 0, 1, 0
    return np.asarray(out[end > begin])


def _shapes(
    spans: Ints, shared: list[tuple[BlockBits, int]], rows: View, cols: tuple[View, ...]
) -> tuple[Ints, Shapes]:
    """Group spans and remainder blocks by tile, and tiles by what they hold: (entries, distinct shapes)."""
    blocks, bits = [np.zeros((0, 6), np.int64)], [np.zeros((0, BLOCK), np.uint64)]
    for remainder, view in shared:
        lanes_q, lanes_k = rows.lanes, cols[view].lanes
        if lanes_q % BLOCK or lanes_k % BLOCK:
            raise VerifyError(f"blocks of 64 x 64 bits do not fit tiles of {lanes_q} x {lanes_k}; use multiples of 64")
        q, k = remainder.rows * BLOCK, remainder.cols * BLOCK
        number = np.arange(len(q)) + sum(len(b) for b in bits)
        blocks.append(
            np.stack([q // lanes_q, np.full_like(q, view), k // lanes_k, number, q % lanes_q, k % lanes_k], axis=1)
        )
        bits.append(remainder.bits)
    block = np.concatenate(blocks)
    across = max((tile_count(view) for view in cols), default=1)
    key = np.concatenate([(t[:, 0] * len(cols) + t[:, 1]) * across + t[:, 2] for t in (spans, block)])
    tiles, which = np.unique(key, return_inverse=True)
    where, block_where = which[: len(spans)], which[len(spans) :]
    content = spans[:, 3:]
    # equal contents get equal shapes: a 64-bit hash of each span, summed over the tile
    mixed = _hash(content)
    total = np.zeros(len(tiles), np.uint64)
    np.add.at(total, where, mixed)
    np.add.at(total, block_where, _hash(block[:, 3:]))
    _, representative, shape = np.unique(total, return_index=True, return_inverse=True)
    _check_equal(content, where, mixed, representative[shape])
    chosen = np.zeros(len(tiles), bool)
    chosen[representative] = True
    mine, block_mine = chosen[where], chosen[block_where]
    shape_spans = np.concatenate([shape[where[mine], None], content[mine]], axis=1)
    shape_blocks = np.concatenate([shape[block_where[block_mine], None], block[block_mine][:, 3:]], axis=1)
    order = np.argsort(shape_spans[:, 0], kind="stable")
    outer = tiles // across
    entries = np.stack([outer // len(cols), outer % len(cols), tiles % across, np.ones_like(shape), 1 + shape], axis=1)
    return entries, Shapes(len(representative), shape_spans[order], shape_blocks, np.concatenate(bits))


def _check_equal(content: Ints, where: Ints, mixed: NDArray[np.uint64], model: Ints) -> None:
    """Raise VerifyError unless the spans of every tile are those of its model: hashes alone prove nothing."""
    order = np.lexsort((mixed, where))
    count = np.bincount(where, minlength=len(model))
    first = np.cumsum(count) - count
    tile, i = ramp(count)
    same = (count == count[model]).all()
    if not same or not np.array_equal(content[order[first[tile] + i]], content[order[first[model[tile]] + i]]):
        raise VerifyError("two different tiles have one hash; please report this mask")


def _hash(rows: Ints) -> NDArray[np.uint64]:
    """A 64-bit hash of every row of integers."""
    mixed = np.zeros(len(rows), np.uint64)
    for column in rows.T:
        mixed ^= (
            column.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15) + (mixed << np.uint64(6)) + (mixed >> np.uint64(2))
        )
        mixed *= np.uint64(0xFF51AFD7ED558CCD)
        mixed ^= mixed >> np.uint64(32)
    return mixed


def paint(shapes: Shapes, chosen: slice, lanes_q: int, lanes_k: int) -> NDArray[np.bool_]:
    """The elements of a range of shapes: bool (n, lanes_q, lanes_k)."""
    first = chosen.start
    n = chosen.stop - first
    lo, hi = np.searchsorted(shapes.spans[:, 0], [first, chosen.stop])
    s = shapes.spans[lo:hi]
    owner, t = ramp(s[:, 2])
    lane = s[owner, 1] + t
    shape = s[owner, 0] - first
    start, width, count = (s[owner, f] + s[owner, f + 1] * t for f in (3, 5, 8))
    stride = s[owner, 7]
    again, k = ramp(np.maximum(count, 0))
    begin = start[again] + stride[again] * k
    end = np.clip(begin + width[again], 0, lanes_k)
    begin = np.clip(begin, 0, lanes_k)
    keep = end > begin
    shape, lane, begin, end = shape[again][keep], lane[again][keep], begin[keep], end[keep]
    steps = np.zeros((n, lanes_q, lanes_k + 1), np.int8)
    np.add.at(steps, (shape, lane, begin), 1)
    np.add.at(steps, (shape, lane, end), -1)
    painted = np.cumsum(steps, axis=2, dtype=np.int8)[:, :, :lanes_k] > 0
    blocks = shapes.blocks[(shapes.blocks[:, 0] >= first) & (shapes.blocks[:, 0] < chosen.stop)]
    if len(blocks):  # tiles are whole blocks then, see _shapes
        number, index, lane0, col0 = blocks.T
        grid = painted.reshape(n, lanes_q // BLOCK, BLOCK, lanes_k // BLOCK, BLOCK).transpose(0, 1, 3, 2, 4)
        grid[number - first, lane0 // BLOCK, col0 // BLOCK] |= unpack(shapes.bits[index])
    return painted
