"""Strips: the flat, vectorised form of ACSR's affine pieces.

A strip covers consecutive rows. In row ``row + t`` (0 <= t < rows) it holds ``count + dcount*t`` runs of
``width + dwidth*t`` adjacent columns; the first run begins at ``col + dcol*t``, the next ones ``stride`` further each.
A sliding window is one strip; a dilated window is one strip of width-1 runs; SPLAT's ACSR row (start, stride, count)
is the special case of one row.

Strips are kept as an int64 array of shape (n, 9), so that a million of them is cheap; the column names are below.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

FIELDS = ("row", "rows", "col", "dcol", "width", "dwidth", "stride", "count", "dcount")
ROW, ROWS, COL, DCOL, WIDTH, DWIDTH, STRIDE, COUNT, DCOUNT = range(9)
VARYING = (ROW, ROWS, COL, WIDTH, COUNT)  # fields that may change from one repetition of a piece to the next


class Runs(NamedTuple):
    """Runs of adjacent columns, one row each: row, first column, one past the last column (int64 arrays)."""

    row: Ints
    start: Ints
    stop: Ints


class RowRuns(NamedTuple):
    """SPLAT rows: ``times`` runs of ``width`` columns from ``start``, ``stride`` apart, in one row (int64 arrays)."""

    row: Ints
    start: Ints
    width: Ints
    stride: Ints
    times: Ints


def make(**fields: Ints | int) -> Ints:
    """Strips from named columns; what is not named is 1 for rows, width and count, else 0."""
    n = max((value.size for value in fields.values() if isinstance(value, np.ndarray)), default=0)
    out = np.zeros((n, len(FIELDS)), np.int64)
    out[:, [ROWS, WIDTH, COUNT]] = 1
    for name, value in fields.items():
        out[:, FIELDS.index(name)] = value
    return out


def ramp(counts: Ints) -> tuple[Ints, Ints]:
    """For ragged loops: (owner, index) of every element when item i has counts[i] elements."""
    owner = np.repeat(np.arange(len(counts)), counts)
    first = np.cumsum(counts) - counts
    return owner, np.arange(len(owner)) - first[owner]


def element_counts(strips: Ints) -> Ints:
    """Covered elements of each strip, int64 (n,): sum_t (width + dwidth t)(count + dcount t) in closed form."""
    t = strips[:, ROWS]
    s1, s2 = t * (t - 1) // 2, (t - 1) * t * (2 * t - 1) // 6
    w, dw, c, dc = (strips[:, f] for f in (WIDTH, DWIDTH, COUNT, DCOUNT))
    counts: Ints = w * c * t + (w * dc + dw * c) * s1 + dw * dc * s2
    return counts


def row_runs(strips: Ints, rows: Ints | None = None) -> RowRuns:
    """The strips' rows one by one; with ``rows`` (sorted, unique) only those. Empty ones are left out."""
    if rows is None:
        owner, t = ramp(strips[:, ROWS])
    else:
        lo = np.searchsorted(rows, strips[:, ROW])
        hi = np.searchsorted(rows, strips[:, ROW] + strips[:, ROWS])
        owner, i = ramp(hi - lo)
        t = rows[lo[owner] + i] - strips[owner, ROW]
    s = strips[owner]
    width, count = s[:, WIDTH] + s[:, DWIDTH] * t, s[:, COUNT] + s[:, DCOUNT] * t
    keep = (width > 0) & (count > 0)
    if not keep.all():
        s, t, width, count = s[keep], t[keep], width[keep], count[keep]
    return RowRuns(s[:, ROW] + t, s[:, COL] + s[:, DCOL] * t, width, s[:, STRIDE], count)


def unit_runs(runs: RowRuns) -> Runs:
    """Every run of adjacent columns by itself (touching runs are not merged)."""
    owner, k = ramp(runs.times)
    start = runs.start[owner] + runs.stride[owner] * k
    return Runs(runs.row[owner], start, start + runs.width[owner])


def paint(strips: Ints, q_len: int, kv_len: int) -> NDArray[np.int32]:
    """How many strips cover each element: int32 (q_len, kv_len). For checks and small sizes."""
    runs = unit_runs(row_runs(strips))
    steps = np.zeros((q_len, kv_len + 1), np.int32)
    np.add.at(steps, (runs.row, runs.start), 1)
    np.add.at(steps, (runs.row, runs.stop), -1)
    return np.cumsum(steps, axis=1, dtype=np.int32)[:, :kv_len]
