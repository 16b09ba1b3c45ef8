"""Choosing views: a cost model over candidate views, and the poset of view sets ordered by inclusion.

Each row view that a plan uses is one more pass over its rows; each piece goes to the cheapest view in use. Sets of row
views form a poset; we price its members and keep the cheapest. A plan never costs more tiles than the contiguous one.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from splatc.formats.acsr import ACSR
from splatc.formats.fold import unnest, unnested
from splatc.formats.remainder import BlockBits
from splatc.formats.strips import (
    COL,
    COUNT,
    DCOL,
    DCOUNT,
    DWIDTH,
    FIELDS,
    ROW,
    ROWS,
    STRIDE,
    WIDTH,
    Ints,
    element_counts,
)
from splatc.ir.cover import Grid, tiles_of
from splatc.ir.patches import patch_region
from splatc.ir.program import Region, Regions
from splatc.ir.see import Seen, see_some
from splatc.ir.views import PART, View, blocks, contiguous, residue

MAX_STEPS = 4  # candidate residue views, by how many elements have that stride
MAX_PASSES = 3
# Estimates err. Tiles are counted exactly where the contiguous view needs few; where it needs more, unless other views
# are estimated to need several times fewer; never where counting itself would be slow.
FEW_TILES = 1 << 15
CLEARLY = 2
MANY_TILES = 1 << 20
PASS_TILES = 1.0  # what a further pass over a row tile costs (reload q, o and lse), in tiles
UNSEEN = 1e15  # the price of a piece under views that cannot show it
SPAN_COST = 0.02  # what a partly filled tile costs more than a full one, in tiles


def choose_regions(acsr: ACSR, tile_m: int, tile_n: int, views: bool = True, max_row_views: int | None = None,
                   max_col_views: int | None = None) -> Regions:  # fmt: skip
    """The regions of a mask, each with its row view and column view; a pass has at most so many views of tables
    (View.shown: one or two of each view), None: any number.
    """
    table = acsr.pieces.table
    rows, cols = contiguous(acsr.q_len, tile_m), contiguous(acsr.kv_len, tile_n)
    plain: tuple[Region, ...] = (Region(rows, cols, table, acsr.remainder),)
    chosen = plain
    if views and len(table):
        chosen = _strided_views(acsr, plain[0], max_row_views, max_col_views)
        grid = _grid(table, acsr)
        if grid is not None:
            region = patch_region(table, plain[0], grid, tile_m, tile_n)
            chosen = _fewest_tiles(acsr, chosen, (region,) if region is not None else plain)
    return Regions(acsr.q_len, acsr.kv_len, chosen)


def _fewest_tiles(acsr: ACSR, *plans: tuple[Region, ...]) -> tuple[Region, ...]:
    """The plan with the fewest tiles, counted exactly; the first of equals."""
    return min(plans, key=lambda regions: tiles_of(acsr.q_len, acsr.kv_len, regions))


def _strided_views(acsr: ACSR, plain: Region, max_rows: int | None, max_cols: int | None) -> tuple[Region, ...]:
    """The pieces distributed over the cheapest set of contiguous, residue and block views."""
    table, strips = plain.pieces, unnest(plain.pieces)
    row_views, col_views = [plain.rows], [plain.cols]
    least = len(table)  # a step with fewer elements than there are pieces changes little
    for step in _steps(strips, least):
        rows = residue(acsr.q_len, step, plain.rows.lanes)
        if max_rows is None or len(rows.shown) <= max_rows:
            row_views.append(rows)
        col_views.append(residue(acsr.kv_len, step, plain.cols.lanes))
    col_views += _block_views(strips, acsr.kv_len, plain.cols.lanes, least)
    row_views += _block_rows(table, acsr.q_len, plain.rows.lanes, least)
    if len(col_views) == len(row_views) == 1:
        return (plain,)
    costs = {rows: _cheapest(table, rows, col_views, max_cols) for rows in row_views}
    used = _cheapest_set(costs, acsr)
    by_cost = np.stack([costs[rows][0] for rows in used])
    row_choice = by_cost.argmin(0)
    regions: list[Region] = []
    for r, rows in enumerate(used):
        for c, cols in enumerate(col_views):
            mine = (row_choice == r) & (costs[rows][1] == c)
            remainder = acsr.remainder if rows.kind == "contiguous" and c == 0 else BlockBits.none()
            if mine.any() or len(remainder.rows):
                regions.append(Region(rows, cols, table[mine], remainder))
    if regions[0].rows.kind == "blocks":  # the first pass writes every row
        return (plain,)
    plain_tiles = costs[plain.rows][0].sum()
    limit = MANY_TILES if by_cost.min(0).sum() * CLEARLY > plain_tiles else FEW_TILES
    return _fewest_tiles(acsr, tuple(regions), (plain,)) if plain_tiles < limit else tuple(regions)


def _grid(table: Ints, acsr: ACSR) -> tuple[int, int, int] | None:
    """The grid (W, H, Z) of a neighbourhood: wide runs of moving columns that recur every W, and repeat every W*H.

    None if there is none, or if positions are missing at its end: a view shows existing positions only.
    """
    strips = unnest(table)
    lines = strips[(strips[:, DCOL] == 1) & (strips[:, COUNT] > 1) & (strips[:, WIDTH] > 1)]
    if acsr.q_len != acsr.kv_len or len(acsr.remainder.rows) or not element_counts(lines).sum() * 2 > acsr.nnz:
        return None
    widths, votes = np.unique(lines[:, STRIDE], return_counts=True)
    width = int(widths[votes.argmax()])
    repeats = table[:, 9 + 1 :: 10].ravel()  # at clamped borders of planes there are other distances of rows
    steps = np.concatenate([np.diff(np.unique(lines[:, field])) for field in (ROW, COL)])
    planes, times = np.unique(repeats[(repeats > width) & (repeats % width == 0)], return_counts=True)
    apart = steps[(steps > width) & (steps % width == 0)]
    plane = planes[times.argmax()] if len(planes) else apart.min() if len(apart) else acsr.q_len
    height = -(-int(plane) // width)
    grid = width, height, -(-acsr.q_len // (width * height))
    return grid if width * height * grid[2] == acsr.q_len else None


def _steps(strips: Ints, least: int) -> list[int]:
    """Strides of single columns, those of the most elements first; each has at least so many elements."""
    thin = (strips[:, WIDTH] == 1) & (strips[:, DWIDTH] == 0) & (strips[:, STRIDE] > 1)
    s = strips[thin & ((strips[:, COUNT] > 1) | (strips[:, DCOUNT] != 0))]
    return [int(step) for (step,) in _most_voted(s[:, [STRIDE]], element_counts(s), least)]


def _most_voted(kinds: Ints, votes: Ints, least: int) -> list[list[int]]:
    """The MAX_STEPS distinct rows with the most votes, of those with at least ``least``."""
    if not len(kinds):
        return []
    distinct, which = np.unique(kinds, axis=0, return_inverse=True)
    total = np.bincount(which.ravel(), votes, len(distinct))
    best = np.argsort(-total, kind="stable")[:MAX_STEPS]
    found: list[list[int]] = distinct[best[total[best] >= least]].tolist()
    return found


def _block_views(strips: Ints, length: int, lanes: int, least: int) -> list[View]:
    """Views for columns that recur every ``stride`` from the same offset: one for each (stride, offset, width)."""
    recurs = (strips[:, DCOL] == 0) & (strips[:, DWIDTH] == 0) & (strips[:, STRIDE] > strips[:, WIDTH])
    recurs &= (strips[:, WIDTH] <= lanes // 2) & ((strips[:, COUNT] > 1) | (strips[:, DCOUNT] != 0))
    s = strips[recurs]
    kinds = np.stack([s[:, STRIDE], s[:, COL] % np.maximum(s[:, STRIDE], 1), s[:, WIDTH]], axis=1)
    best = _most_voted(kinds, element_counts(s), least)
    found = [blocks(length, size, offset, width, lanes) for size, offset, width in best]
    return [view for view in found if view.extents[1]]


def _block_rows(table: Ints, length: int, lanes: int, least: int) -> list[View]:
    """Views for rows that recur every so many: one for each (step, offset, number of rows) of a repetition."""
    parts = max(lanes // PART, 1)
    strips, owner = unnested(table)
    elements = np.bincount(owner, element_counts(strips), len(table))
    kinds, votes = [], []
    for extent in range(len(FIELDS), table.shape[1], 1 + len(FIELDS)):  # of a repetition, followed by its steps
        step, rows = table[:, extent + 1 + ROW], table[:, ROWS]
        recurs = (table[:, extent] > 1) & (step > rows) & (rows <= min(lanes // 2, lanes // parts))
        recurs &= table[:, extent + 1 + ROWS] == 0
        kinds.append(np.stack([step, table[:, ROW] % np.maximum(step, 1), rows], axis=1)[recurs])
        votes.append(elements[recurs])
    best = _most_voted(np.concatenate(kinds), np.concatenate(votes), least)
    found = [blocks(length, size, offset, width, lanes, parts) for size, offset, width in best]
    return [view for view in found if view.extents[1]]


def _cheapest(table: Ints, rows: View, col_views: list[View],
              most: int | None) -> tuple[NDArray[np.float64], Ints]:  # fmt: skip
    """(cost, column view) of each piece under a row view, in tiles."""
    costs = np.full((len(col_views), len(table)), UNSEEN)
    for c, cols in enumerate(col_views):
        if cols.kind == "residue" and (rows.kind, rows.step) != ("residue", cols.step):
            continue
        some = _candidates(table, cols)
        shown, seen = see_some(table[some], rows, cols)
        costs[c, some[shown]] = estimate(seen, rows, Grid.of(cols), len(shown))
    if most is not None:
        _limit(costs, col_views, most)
    return costs.min(0), costs.argmin(0)


def _limit(costs: NDArray[np.float64], col_views: list[View], most: int) -> None:
    """Rule out column views until at most ``most`` views of tables are left: the contiguous one, then what saves most.

    costs: (column view, piece), changed in place.
    """
    wanted = np.unique(costs.argmin(0)).tolist()
    size = [len(view.shown) for view in col_views]
    kept = [0]
    while room := [c for c in wanted if c not in kept and size[c] <= most - sum(size[k] for k in kept)]:
        best = costs[kept].min(0)
        kept.append(max(room, key=lambda c: float((best - np.minimum(best, costs[c])).sum())))
    costs[[c for c in range(len(col_views)) if c not in kept]] = UNSEEN


def _candidates(table: Ints, cols: View) -> Ints:
    """The pieces that a column view may be able to show (see_some decides)."""
    if cols.kind == "contiguous":
        return np.arange(len(table))
    shown = table[:, STRIDE] % cols.step == 0
    shown &= (table[:, DCOL] == 0) if cols.kind == "blocks" else (table[:, WIDTH] == 1) & (table[:, DWIDTH] == 0)
    return np.flatnonzero(shown)


def estimate(seen: Seen, rows: View, cols: Grid, pieces: int) -> NDArray[np.float64]:
    """An estimate of the tiles that each piece needs (float): row tiles of a strip times the column tiles of one.

    Strips that share their row tiles need no more than the widest of them needs in all rows of the piece.
    """
    s = seen.strips
    side = Grid.of(rows).b1
    row_tiles = s[:, ROWS] / side
    t = np.minimum(s[:, ROWS], side) - 1
    count = s[:, COUNT] + s[:, DCOUNT] * (s[:, ROWS] - 1) / 2
    reach = s[:, STRIDE] * np.maximum(count - 1, 0) + s[:, WIDTH] + s[:, DWIDTH] * (s[:, ROWS] - 1) / 2
    hull = reach + np.abs(s[:, DCOL]) * t
    cost = np.maximum(row_tiles, 1 / rows.box[1]) * (hull / cols.b1 + SPAN_COST)
    cost = np.maximum(cost / cols.b2, 1 / (rows.lanes * cols.b2))
    total = np.zeros(pieces)
    np.add.at(total, seen.piece, cost)
    if rows.kind == "residue" or not len(s):  # rows of many lines
        return total
    first, last, widest = np.full(pieces, s[:, ROW].max()), np.zeros(pieces, np.int64), np.zeros(pieces)
    np.minimum.at(first, seen.piece, s[:, ROW])
    np.maximum.at(last, seen.piece, s[:, ROW] + s[:, ROWS])
    np.maximum.at(widest, seen.piece, hull / cols.b1 + SPAN_COST)
    together: NDArray[np.float64] = ((last - first) / side + 1) * widest / cols.b2
    return np.minimum(total, together)


def _cheapest_set(costs: dict[View, tuple[NDArray[np.float64], Ints]], acsr: ACSR) -> tuple[View, ...]:
    """The cheapest set of row views; the smaller of equals. Contiguous is in it if bits remain; the first one shows
    every row."""
    views = list(costs)
    if len(views) == 1:
        return (views[0],)
    prices: dict[tuple[int, ...], float] = {}  # of the members of the poset, smaller sets first
    for size in range(1, MAX_PASSES + 1):
        for chosen in combinations(range(len(views)), size):
            if (len(acsr.remainder.rows) and 0 not in chosen) or views[chosen[0]].kind == "blocks":
                continue
            cheapest = np.stack([costs[views[i]][0] for i in chosen])
            best = cheapest.argmin(0)
            touched = [_rows_touched(acsr.pieces.table[best == i]) for i in range(size)]
            extra = (sum(touched) - max(touched)) / views[0].lanes * PASS_TILES
            prices[chosen] = float(cheapest.min(0).sum() + extra)
    return tuple(views[i] for i in min(prices, key=lambda chosen: prices[chosen]))


def _rows_touched(table: Ints) -> float:
    """Rows that pieces lie on (at most; overlaps count once as far as first and last rows tell)."""
    if not len(table):
        return 0.0
    strips = unnest(table)
    return float(strips[:, ROW].max() + strips[:, ROWS].max() - strips[:, ROW].min())
