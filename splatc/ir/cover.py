"""Covering a region with tiles: which column tiles every row tile needs, and what each partly filled one holds.

All of it is arithmetic on whole arrays of strips; nothing of size S x S is formed, and full tiles side by side are one
entry, so that a dense row of a million keys costs one entry too.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from splatc.errors import Unsupported, VerifyError
from splatc.formats.remainder import BLOCK, BlockBits, unpack
from splatc.formats.strips import COL, COUNT, DCOL, DCOUNT, DWIDTH, ROW, ROWS, STRIDE, WIDTH, Ints, ramp
from splatc.ir.patches import cover_patches
from splatc.ir.program import Cover, Region, Shapes
from splatc.ir.see import Seen, see
from splatc.ir.views import View


@dataclass(frozen=True)
class Grid:
    """How (line, u) coordinates fall into tiles along one axis: a tile is b1 of u by b2 lines.

    Lines are grouped from 0, and again from ``seam``: a tile never reaches across it.
    """

    b1: int
    b2: int
    across: int  # tiles along u
    seam: int = 0

    @staticmethod
    def of(view: View) -> Grid:
        b1, b2, _ = view.box
        if view.kind == "blocks":  # one line, block after block
            return Grid(b1 * b2, 1, max(-(-view.extents[1] // b2), 1))
        return Grid(b1, b2, -(-view.extents[0] // b1), view.seam)

    @property
    def lanes(self) -> int:
        return self.b1 * self.b2

    @property
    def _before(self) -> int:
        """Groups of lines before the seam."""
        return -(-self.seam // self.b2)

    def groups(self, lines: int) -> int:
        """Groups of the first ``lines`` lines."""
        return -(-lines // self.b2) if lines <= self.seam else self._before - (-(lines - self.seam) // self.b2)

    def place(self, line: Ints) -> tuple[Ints, Ints]:
        """(group, line within the group) of lines."""
        if self.b2 == 1 or not self.seam:
            return line // self.b2, line % self.b2
        before = line < self.seam
        rest = np.where(before, line, line - self.seam)
        return rest // self.b2 + np.where(before, 0, self._before), rest % self.b2

    def first_line(self, group: Ints) -> Ints:
        """The first line of groups."""
        again = group - self._before
        return np.where(again < 0, group * self.b2, self.seam + again * self.b2)


def origins(view: View, tile: Ints) -> Ints:
    """The origin (x1, x2, x3) of tiles by number: int64 (n, 3)."""
    grid = Grid.of(view)
    along, group = tile % grid.across, tile // grid.across
    out = np.zeros((len(tile), 3), np.int64)
    if view.kind == "blocks":
        out[:, 0], out[:, 1] = view.offset, along * view.box[1]
    else:
        out[:, 0], out[:, 1] = along * grid.b1, grid.first_line(group)
    return out


def tile_count(view: View) -> int:
    """Tiles of the whole axis, by number; a few at the end of the shorter lines may hold no position."""
    grid = Grid.of(view)
    return grid.across * (1 if view.kind == "blocks" else grid.groups(min(view.extents[1], view.length)))


def _valid_lanes(view: View) -> Ints:
    """Positions that exist in each tile of an axis; not of patches."""
    grid = Grid.of(view)
    if view.kind == "blocks":
        whole = np.clip(view.extents[1] - np.arange(grid.across) * view.box[1], 0, view.box[1])
        return np.asarray(whole * (view.extents[0] - view.offset))
    first = grid.first_line(np.arange(tile_count(view) // grid.across))
    along = np.arange(grid.across) * grid.b1
    counts = np.zeros((len(first), grid.across), np.int64)
    begin = 0
    for extents in view.shown:
        here = (first >= begin) & (first < extents[1])
        lines = np.clip(extents[1] - first[here], 0, grid.b2)
        counts[here] = lines[:, None] * np.clip(extents[0] - along, 0, grid.b1)
        begin = extents[1]
    return counts.ravel()


@lru_cache(maxsize=4)  # choosing views counts the tiles of what is covered right after
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
        full, spans = _filled_together(full, spans, lanes_valid, region.cols.lanes)
        view = cols.index(region.cols)
        runs.append(np.insert(full, 1, view, axis=1))
        partial.append(np.insert(spans, 1, view, axis=1))
    full, spans = np.concatenate(runs), np.concatenate(partial)
    shared = [(region.remainder, cols.index(region.cols)) for region in regions if len(region.remainder.rows)]
    tiles, shapes = _shapes(spans, shared, rows, cols)
    entries = np.concatenate([full, tiles])  # (row tile, view, column tile, repeat, shape)
    entries = entries[np.lexsort((entries[:, 2], entries[:, 1], entries[:, 0]))]
    numbers = np.flatnonzero(lanes_valid) if every_row else np.unique(entries[:, 0])
    first = np.searchsorted(entries[:, 0], numbers)
    count = np.searchsorted(entries[:, 0], numbers, "right") - first
    items = np.concatenate([origins(rows, numbers), first[:, None], count[:, None]], axis=1)
    at = np.zeros((len(entries), 3), np.int64)
    for v, one in enumerate(cols):
        mine = entries[:, 1] == v
        at[mine] = origins(one, entries[mine, 2])
    table = np.concatenate([at, entries[:, [1, 3, 4]]], axis=1)
    return Cover(q_len, kv_len, rows, cols, items, table, shapes, np.zeros((0, cols[0].lanes), np.int64))


def tiles_of(q_len: int, kv_len: int, regions: tuple[Region, ...]) -> int:
    """Tiles that regions need in all, row view by row view."""
    views = tuple(dict.fromkeys(region.rows for region in regions))
    parts = (tuple(region for region in regions if region.rows == view) for view in views)
    return sum(cover(q_len, kv_len, part, every_row=not i).tiles for i, part in enumerate(parts))


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
    row_group, row_inside = rows.place(row_line)
    col_group, col_inside = cols.place(col_line)
    lane = s[:, ROW] - k * rows.b1 + rows.b1 * row_inside
    row_tile = k + rows.across * row_group
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
    base = cols.across * col_group
    some = f1 > f0
    full = np.stack([row_tile, base + f0, f1 - f0, np.zeros_like(f0)], axis=1)[some]

    before, after = f0 - j0, j1 - f1
    owner, i = ramp(before + after)
    j = np.where(i < before[owner], j0[owner] + i, f1[owner] + i - before[owner])
    inside = cols.b1 * col_inside  # where this line lies in a tile of several lines
    begin, dbegin, w, dw = _clip(col[owner] - j * cols.b1, dcol[owner], width[owner], dwidth[owner], last[owner],
                                 solid[owner], cols.b1)  # fmt: skip
    columns = [row_tile[owner], base[owner] + j, lane[owner], lanes[owner], begin + inside[owner], dbegin, w, dw,
               stride[owner], count[owner], dcount[owner]]  # fmt: skip
    spans = np.stack(columns, axis=1)
    return full, _clip_combs(spans, cols.b1) if cols.b2 == 1 else _clip_lines(spans, inside[owner], cols.b1)


def _filled_together(full: Ints, spans: Ints, lanes_valid: Ints, lanes_k: int) -> tuple[Ints, Ints]:
    """(full, spans), where tiles that several strips fill between them are full tiles too."""
    across = spans[:, 1].max(initial=0) + 1
    key, which = np.unique(spans[:, 0] * across + spans[:, 1], return_inverse=True)  # far faster than of rows
    tile = np.stack([key // across, key % across], axis=1)
    wide = (spans[:, 4] == 0) & (spans[:, 6] == lanes_k) & (spans[:, 9] == 1) & ~spans[:, [5, 7, 10]].any(axis=1)
    lanes = np.bincount(which, spans[:, 3] * wide, len(tile))
    filled = lanes == lanes_valid[tile[:, 0]]
    more = np.insert(tile[filled], 2, [[1], [0]], axis=1)
    return np.concatenate([full, more]), spans[~filled[which]]


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
        if lanes_q % BLOCK or (lanes_k % BLOCK and BLOCK % lanes_k):
            raise Unsupported(f"blocks of 64 x 64 bits do not fit tiles of {lanes_q} x {lanes_k}: use multiples of 64")
        q, k, words = _split_blocks(remainder, lanes_k)
        number = np.arange(len(q)) + sum(len(b) for b in bits)
        blocks.append(
            np.stack([q // lanes_q, np.full_like(q, view), k // lanes_k, number, q % lanes_q, k % lanes_k], axis=1)
        )
        bits.append(words)
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


def _split_blocks(remainder: BlockBits, lanes_k: int) -> tuple[Ints, Ints, NDArray[np.uint64]]:
    """(first row, first column, bits) of the blocks, cut where tiles are narrower: bits beyond a tile are then 0."""
    q, k, bits = remainder.rows * BLOCK, remainder.cols * BLOCK, remainder.bits
    if lanes_k >= BLOCK:
        return q, k, bits
    inside = np.uint64((1 << lanes_k) - 1)
    first = np.arange(0, BLOCK, lanes_k)
    parts = bits[:, None] >> first.astype(np.uint64)[None, :, None] & inside
    block, part = np.nonzero(parts.any(axis=2))
    return q[block], k[block] + first[part], parts[block, part]


def _check_equal(content: Ints, where: Ints, mixed: NDArray[np.uint64], model: Ints) -> None:
    """Raise VerifyError unless the spans of every tile are those of its model: hashes alone prove nothing."""
    copies = np.flatnonzero(model != np.arange(len(model)))
    if not len(copies):
        return
    wanted = np.zeros(len(model), bool)
    wanted[copies] = wanted[model[copies]] = True
    some = np.flatnonzero(wanted[where])
    some = some[np.lexsort((mixed[some], where[some]))]
    count = np.bincount(where[some], minlength=len(model))
    first = np.cumsum(count) - count
    tile, i = ramp(count[copies])
    mine, other = (some[np.minimum(first[of[tile]] + i, len(some) - 1)] for of in (copies, model[copies]))
    if (count[copies] != count[model[copies]]).any() or not np.array_equal(content[mine], content[other]):
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


ShapeRuns = tuple[Ints, Ints, Ints, Ints]  # of runs of columns in shapes: shape, lane, first column, one past the last


def runs_of(spans: Ints, lanes_k: int) -> ShapeRuns:
    """Every run of spans, as far as it lies in the tile."""
    owner, t = ramp(spans[:, 2])
    lane, shape = spans[owner, 1] + t, spans[owner, 0]
    start, width, count = (spans[owner, f] + spans[owner, f + 1] * t for f in (3, 5, 8))
    again, k = ramp(np.maximum(count, 0))
    begin = start[again] + spans[owner, 7][again] * k
    end = np.clip(begin + width[again], 0, lanes_k)
    begin = np.clip(begin, 0, lanes_k)
    keep = end > begin
    return shape[again][keep], lane[again][keep], begin[keep], end[keep]


def paint(shapes: Shapes, chosen: slice, lanes_q: int, lanes_k: int) -> NDArray[np.bool_]:
    """The elements of a range of shapes: bool (n, lanes_q, lanes_k), in memory column after column."""
    first, n = chosen.start, chosen.stop - chosen.start
    lo, hi = np.searchsorted(shapes.spans[:, 0], [first, chosen.stop])
    steps = np.zeros((lanes_k + 1, n, lanes_q), np.int8)
    if hi > lo:
        shape, lane, begin, end = runs_of(shapes.spans[lo:hi], lanes_k)
        at, flat = (shape - first) * lanes_q + lane, steps.reshape(-1)
        np.add.at(flat, begin * (n * lanes_q) + at, np.int8(1))
        np.add.at(flat, end * (n * lanes_q) + at, np.int8(-1))
        for before, column in pairwise(steps[:-1]):  # many times faster than cumsum
            column += before
    painted = steps[:-1] != 0
    blocks = shapes.blocks[(shapes.blocks[:, 0] >= first) & (shapes.blocks[:, 0] < chosen.stop)]
    if len(blocks):  # tiles are whole blocks then, or as many rows of parts of blocks, see _shapes
        number, index, lane0, col0 = blocks.T
        width = min(lanes_k, BLOCK)
        grid = painted.reshape(lanes_k // width, width, n, lanes_q // BLOCK, BLOCK).transpose(2, 3, 0, 4, 1)
        grid[number - first, lane0 // BLOCK, col0 // width] |= unpack(shapes.bits[index])[..., :width]
    return np.moveaxis(painted, 0, 2)
