"""A symbolic pattern to strips, without ever forming the S x S mask.

The pattern says along which lines its membership may change (``Pattern.lines``): row breakpoints, columns k, diagonals
k - q = d, residues of k or of k - q. These lines cut the plane into cells where membership cannot change; rows are cut
further where two lines cross, so that inside a row segment the order of the lines is fixed and every bound is affine in
the row. One sample decides a cell. What is left is bookkeeping: cells become strips.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from splatc.errors import VerifyError
from splatc.formats.fold import fold_columns, fold_rows, join_strips, stack_columns
from splatc.formats.strips import (
    COL,
    COUNT,
    DCOL,
    DCOUNT,
    DWIDTH,
    ROW,
    ROWS,
    STRIDE,
    WIDTH,
    Ints,
    make,
    ramp,
    row_runs,
    unit_runs,
)
from splatc.patterns.base import Lines, Pattern


@dataclass(frozen=True)
class Residues:
    """Classes of x = k - shift*q modulo ``modulus``, cut at ``fixed`` thresholds and at ``moving`` + q ones.

    ``moving`` is used only where a pattern has residues of both k and k - q (shift is 0 then).
    """

    modulus: int
    shift: int
    fixed: Ints
    moving: Ints

    @property
    def mixed(self) -> bool:
        return len(self.moving) > 0

    def bounds(self, row: Ints) -> Ints:
        """Class c of row i is [bounds[i, c], bounds[i, c+1]): int64 (rows, classes + 1)."""
        fixed = np.broadcast_to(self.fixed, (len(row), len(self.fixed)))
        moving = (self.moving + row[:, None]) % self.modulus
        bounds = np.sort(np.concatenate([fixed, moving], axis=1), axis=1)
        return np.concatenate([bounds, bounds[:, :1] + self.modulus], axis=1)


@dataclass(frozen=True)
class Cells:
    """Parallelograms of the (row, column) plane: rows [row, row+rows), columns [lo, hi), both affine in the row.

    Bounds are given at the first and at the last row; cells of one segment are adjacent and in order.
    """

    segment: Ints
    row: Ints
    rows: Ints
    lo_first: Ints
    lo_last: Ints
    hi_first: Ints
    hi_last: Ints


def strips_of(pattern: Pattern, q_len: int, kv_len: int, lines: Lines) -> Ints:
    """The exact strips of a symbolic pattern, int64 (n, 9), disjoint, not nested yet."""
    everywhere = [(0, q_len, 0), (0, q_len, kv_len)]
    cols = np.concatenate([lines.cols, np.array(everywhere, np.int64)])
    cuts: list[Ints] = [
        np.array([0, q_len]),
        lines.rows,
        cols[:, :2].ravel(),
        lines.diags[:, :2].ravel(),
        _crossings(lines, cols),
    ]
    edges = np.unique(np.concatenate(cuts))
    edges = edges[(edges >= 0) & (edges <= q_len)]
    cells = _cut(edges, cols, lines.diags, kv_len)
    residues = _residues(lines)
    if residues is None:
        return stack_columns(join_strips(_intervals(cells, _holds(pattern, q_len, kv_len, _trim(_plain(cells))))))
    held, possible = _classify(pattern, q_len, kv_len, cells, residues)
    varied = ~held & possible.any(1)
    parts, owner = _class_strips(_refine(cells, np.flatnonzero(varied), residues), possible, residues)
    kept = _holds(pattern, q_len, kv_len, parts)
    whole = varied & possible.all(1) & (np.bincount(owner, minlength=len(varied)) > 0)  # an interval after all
    whole[owner[~kept]] = False
    strips = np.concatenate([_intervals(cells, held | whole), parts[kept & ~whole[owner]]])
    return _fold_single_rows(strips) if residues.mixed else stack_columns(join_strips(strips))


def _common(mods: tuple[tuple[int, tuple[int, ...]], ...]) -> tuple[int, tuple[int, ...]] | None:
    """One modulus and its thresholds for several."""
    if not mods:
        return None
    modulus = math.lcm(*(m for m, _ in mods))
    thresholds = {t + m * i for m, ts in mods for t in ts for i in range(modulus // m)}
    return modulus, tuple(sorted(thresholds))


def _crossings(lines: Lines, cols: Ints) -> Ints:
    """Rows from which a diagonal lies beyond a column line (a superset: any column line of that k counts)."""
    ks = np.unique(cols[:, 2])
    low, high, d = lines.diags.T
    a, b = np.searchsorted(ks, low + d), np.searchsorted(ks, high + d)
    owner, i = ramp(np.maximum(b - a, 0))
    rows: Ints = ks[a[owner] + i] - d[owner]
    return rows


def _cut(edges: Ints, cols: Ints, diags: Ints, kv_len: int) -> Cells:
    """Sort the lines inside every row segment and return the cells between neighbours."""
    low = np.concatenate([cols[:, 0], diags[:, 0]])
    high = np.concatenate([cols[:, 1], diags[:, 1]])
    value = np.concatenate([cols[:, 2], diags[:, 2]])
    slope = np.repeat([0, 1], [len(cols), len(diags)])
    a, b = np.searchsorted(edges, low), np.searchsorted(edges, high)
    line, i = ramp(np.maximum(b - a, 0))
    segment = a[line] + i
    first = value[line] + slope[line] * edges[segment]
    last = value[line] + slope[line] * (edges[segment + 1] - 1)
    inside = (np.maximum(first, last) >= 0) & (np.minimum(first, last) <= kv_len)
    segment, first, last = segment[inside], first[inside], last[inside]
    order = np.lexsort((last, first, segment))
    segment, first, last = segment[order], first[order], last[order]
    first, last = np.clip(first, 0, kv_len), np.clip(last, 0, kv_len)
    neighbours = (segment[1:] == segment[:-1]) & ((first[1:] > first[:-1]) | (last[1:] > last[:-1]))
    at = np.flatnonzero(neighbours)
    row = edges[segment[at]]
    rows = edges[segment[at] + 1] - row
    return Cells(segment[at], row, rows, first[at], last[at], first[at + 1], last[at + 1])


def _residues(lines: Lines) -> Residues | None:
    """The residue classes that a pattern may tell apart."""
    column, difference = _common(lines.col_mod), _common(lines.diff_mod)
    none = np.zeros(0, np.int64)
    if column and difference:
        modulus = math.lcm(column[0], difference[0])
        fixed, moving = (_common((mod, (modulus, ()))) for mod in (column, difference))
        return Residues(modulus, 0, np.array(fixed[1]), np.array(moving[1]))  # type: ignore[index]
    if column or difference:
        modulus, thresholds = column or difference  # type: ignore[misc]
        return Residues(modulus, 0 if column else 1, np.array(thresholds), none)
    return None


def _classify(pattern: Pattern, q_len: int, kv_len: int, cells: Cells,
              residues: Residues) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:  # fmt: skip
    """(held, possible): cells held whatever the residue, and for each cell the residue classes that may be held.

    A class that a small cell does not show in its first or last row counts as possible.
    """
    n = len(cells.row)
    if residues.mixed:
        return np.zeros(n, bool), np.ones((n, len(residues.fixed) + len(residues.moving)), bool)
    begin = residues.fixed[None, :]
    answers = np.zeros((n, begin.shape[1]), bool)
    known = np.zeros_like(answers)
    for row, lo, hi in ((cells.row, cells.lo_first, cells.hi_first),
                        (cells.row + cells.rows - 1, cells.lo_last, cells.hi_last)):  # fmt: skip
        x = (lo - residues.shift * row)[:, None]
        k = lo[:, None] + (begin - x) % residues.modulus
        seen = k < hi[:, None]
        q = np.broadcast_to(row[:, None], k.shape)
        answers[seen] = pattern.contains(q[seen], k[seen], q_len, kv_len)
        known |= seen
    return np.asarray((known & answers).all(1)), ~known | answers


def _refine(cells: Cells, chosen: Ints, residues: Residues) -> Cells:
    """The chosen cells, cut at the rows where a bound passes from one residue class to the next; ``segment`` then names
    the cell that each came from."""
    row, rows = cells.row[chosen], cells.rows[chosen]
    owners, starts = [np.arange(len(chosen))], [np.zeros(len(chosen), np.int64)]
    if residues.mixed:
        owner, t = ramp(rows)
        owners.append(owner)
        starts.append(t)
    else:
        m = residues.modulus
        for first, last in ((cells.lo_first, cells.lo_last), (cells.hi_first, cells.hi_last)):
            first, last = first[chosen], last[chosen]
            slope = (last - first) // np.maximum(rows - 1, 1) - residues.shift
            x = first - residues.shift * row
            for threshold in residues.fixed:
                moving = np.flatnonzero((slope != 0) & (rows > 1))
                t0 = (slope[moving] * (threshold - x[moving])) % m
                owner, i = ramp(np.maximum(-(-(rows[moving] - t0) // m), 0))
                owners.append(moving[owner])
                starts.append(t0[owner] + m * i)
    most = int(rows.max(initial=0)) + 1
    owner, t = np.divmod(np.unique(np.concatenate(owners) * most + np.concatenate(starts)), most)
    stop = np.append(t[1:], 0)[: len(t)]  # the next start, 0 where the next cell begins
    stop = np.where(stop == 0, rows[owner], stop)
    index = chosen[owner]

    def at(first: Ints, last: Ints, when: Ints) -> Ints:
        slope = (last - first) // np.maximum(cells.rows - 1, 1)
        moved: Ints = first[index] + slope[index] * when
        return moved

    lo, hi = (cells.lo_first, cells.lo_last), (cells.hi_first, cells.hi_last)
    return Cells(index, cells.row[index] + t, stop - t, at(*lo, t), at(*lo, stop - 1), at(*hi, t), at(*hi, stop - 1))


def _plain(cells: Cells) -> Ints:
    """Each cell as the strip of all its columns."""
    steps = np.maximum(cells.rows - 1, 1)
    width = cells.hi_first - cells.lo_first
    return make(row=cells.row, rows=cells.rows, col=cells.lo_first, dcol=(cells.lo_last - cells.lo_first) // steps,
                width=width, dwidth=(cells.hi_last - cells.lo_last - width) // steps)  # fmt: skip


def _intervals(cells: Cells, kept: NDArray[np.bool_]) -> Ints:
    """The kept cells as strips; those that touch in one segment become one."""
    index = np.flatnonzero(kept)
    if not len(index):
        return make()
    strips, segment = _plain(cells)[index], cells.segment[index]
    ends = strips[:, [COL, DCOL]] + strips[:, [WIDTH, DWIDTH]]
    fresh = np.ones(len(index), bool)
    fresh[1:] = (segment[1:] != segment[:-1]) | (strips[1:, [COL, DCOL]] != ends[:-1]).any(1)
    first = np.flatnonzero(fresh)
    out = strips[first]
    for field in (WIDTH, DWIDTH):
        out[:, field] = np.add.reduceat(strips[:, field], first)
    return _trim(out)


def _class_strips(cells: Cells, possible: NDArray[np.bool_], residues: Residues) -> tuple[Ints, Ints]:
    """The strips of every possible residue class in every refined cell, and the cell that each came from.

    A class holds runs [modulus*a + e0, modulus*a + e1) of x = k - shift*q. In a cell that is a (possibly cut) first
    run, whole runs, and a (possibly cut) last run.
    """
    m = residues.modulus
    bounds = residues.bounds(cells.row)
    cell, kind = np.nonzero(possible[cells.segment])
    e0, e1 = bounds[cell, kind], bounds[cell, kind + 1]
    row, rows = cells.row[cell], cells.rows[cell]
    shift_first, shift_last = residues.shift * row, residues.shift * (row + rows - 1)
    lo = np.stack([cells.lo_first[cell] - shift_first, cells.lo_last[cell] - shift_last])  # x at the first, last row
    hi = np.stack([cells.hi_first[cell] - shift_first, cells.hi_last[cell] - shift_last])
    first_run = (lo.min(0) - e1) // m + 1
    last_run = (hi.max(0) - 1 - e0) // m
    runs = last_run - first_run + 1
    some = (runs > 0) & (e1 > e0)
    cell, row, rows, lo, hi, e0, e1, first_run, last_run, runs = (
        x[..., some] for x in (cell, row, rows, lo, hi, e0, e1, first_run, last_run, runs))  # fmt: skip

    def cut(run: Ints) -> tuple[Ints, Ints]:
        begin = np.maximum(lo, run * m + e0)
        return begin, np.minimum(hi, run * m + e1) - begin

    head, head_width = cut(first_run)
    tail, tail_width = cut(last_run)
    head_whole = (head_width == e1 - e0).all(0)
    tail_whole = (tail_width == e1 - e0).all(0) | (runs == 1)
    middle_first = first_run + ~head_whole
    middle = last_run - (~tail_whole & (runs > 1)) - middle_first + 1
    steps = np.maximum(rows - 1, 1)
    strips, owner = [], []
    for begin, width, count, wanted in (
        (head, head_width, np.ones_like(runs), ~head_whole),
        (np.stack([middle_first * m + e0] * 2), np.stack([e1 - e0] * 2), middle, middle > 0),
        (tail, tail_width, np.ones_like(runs), ~tail_whole & (runs > 1)),
    ):
        dcol = (begin[1] - begin[0]) // steps + residues.shift
        part = make(row=row, rows=rows, col=begin[0] + residues.shift * row, dcol=dcol, width=width[0],
                    dwidth=(width[1] - width[0]) // steps, stride=m, count=count)  # fmt: skip
        strips.append(_trim(part[wanted]))
        owner.append(cells.segment[cell[wanted]])
    parts, cell = np.concatenate(strips), np.concatenate(owner)
    filled = (parts[:, ROWS] > 0) & (parts[:, WIDTH] + parts[:, DWIDTH] * (parts[:, ROWS] - 1) > 0)
    return parts[filled], cell[filled]


def _trim(strips: Ints) -> Ints:
    """Drop a first or last row in which a growing or shrinking strip is still empty."""
    last = strips[:, WIDTH] + strips[:, DWIDTH] * (strips[:, ROWS] - 1)
    late = (strips[:, WIDTH] <= 0) & (strips[:, DWIDTH] > 0)
    early = (last <= 0) & (strips[:, DWIDTH] < 0)
    strips = strips.copy()
    for field, slope in ((ROW, None), (COL, DCOL), (WIDTH, DWIDTH)):
        strips[late, field] += 1 if slope is None else strips[late, slope]
    strips[late | early, ROWS] -= 1
    return strips


def _holds(pattern: Pattern, q_len: int, kv_len: int, strips: Ints) -> NDArray[np.bool_]:
    """Whether the pattern holds each strip: its first element decides, its last one must agree."""
    first = pattern.contains(strips[:, ROW], strips[:, COL], q_len, kv_len)
    t = strips[:, ROWS] - 1
    width = strips[:, WIDTH] + strips[:, DWIDTH] * t
    col = strips[:, COL] + strips[:, DCOL] * t
    t, col = np.where(width > 0, t, 0), np.where(width > 0, col, strips[:, COL])
    width = np.where(width > 0, width, strips[:, WIDTH])
    count = strips[:, COUNT] + strips[:, DCOUNT] * t
    corner = col + strips[:, STRIDE] * (count - 1) + width - 1
    last = pattern.contains(strips[:, ROW] + t, corner, q_len, kv_len)
    if (first != last).any():
        i = int(np.flatnonzero(first != last)[0])
        raise VerifyError(
            f"pattern {pattern} changes inside the cell at row {strips[i, ROW]}, column {strips[i, COL]}: "
            "its lines() leaves out a line; please report this pattern"
        )
    return np.asarray(first, bool)


def _fold_single_rows(strips: Ints) -> Ints:
    """Strips of one row each (both kinds of residue in one pattern) go the way of an explicit mask's rows."""
    runs = unit_runs(row_runs(strips))
    if not len(runs.row):
        return make()
    order = np.lexsort((runs.start, runs.row))
    row, start, stop = (column[order] for column in runs)
    fresh = np.ones(len(row), bool)
    fresh[1:] = (row[1:] != row[:-1]) | (start[1:] != stop[:-1])
    first = np.flatnonzero(fresh)
    stop = stop[np.append(first[1:], len(row)) - 1]
    return fold_rows(fold_columns(row[first], start[first], stop - start[first]))
