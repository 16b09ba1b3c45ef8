"""Folding: the one idea behind ACSR, applied at every level.

A sorted sequence of integer vectors is cut into maximal arithmetic progressions; each becomes one record with a count
and a step. Columns of a row fold into runs with a stride, equal rows into strips, strips into pieces that repeat.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

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
    VARYING,
    WIDTH,
    Ints,
    RowRuns,
    make,
)

MAX_LEVELS = 3


def progressions(values: Sequence[Ints], same: Sequence[Ints], min_count: int) -> tuple[Ints, Ints]:
    """Cut a sequence into arithmetic progressions.

    values: columns in which consecutive members must differ by one constant vector; same: columns that must be equal.
    A progression has at least ``min_count`` members (2 or more) or is a single one. Where two progressions share a
    member the earlier keeps it. Returns (first, count): the members of progression i are first[i] ..
    first[i]+count[i]-1.
    """
    n = len(values[0])
    if n < 2:
        return np.arange(n), np.ones(n, np.int64)
    joined = np.ones(n - 1, bool)
    for column in same:
        joined &= column[1:] == column[:-1]
    repeats = joined[1:] & joined[:-1]  # step i+1 equals step i
    for column in values:
        step = column[1:] - column[:-1]
        repeats &= step[1:] == step[:-1]
    # maximal stretches of equal steps; stretch [a, b) of steps joins the members a..b
    a = np.flatnonzero(np.concatenate([[True], ~repeats]))
    b = np.append(a[1:], n - 1)
    long = joined[a] & (b - a >= 2)
    a, b = a[long], b[long]
    shared = np.zeros(len(a), np.int64)
    if len(a):
        shared[1:] = a[1:] == b[:-1]
    first, count = a + shared, b - a + 1 - shared
    keep = count >= min_count
    first, count = first[keep], count[keep]
    held = np.zeros(n + 1, np.int8)
    held[first] += 1
    held[first + count] -= 1  # a progression may begin where the one before ends: the two cancel
    alone = np.flatnonzero(np.cumsum(held, dtype=np.int8)[:n] == 0)
    if min_count == 2 and len(alone):  # pair what is left, from the left
        linked = np.zeros(len(alone), bool)
        linked[1:] = (alone[1:] == alone[:-1] + 1) & joined[alone[1:] - 1]
        head = np.flatnonzero(~linked)
        position = np.arange(len(alone)) - np.repeat(head, np.diff(np.append(head, len(alone))))
        paired = position % 2 == 1
        size = np.ones(len(alone), np.int64)
        size[np.flatnonzero(paired) - 1] = 2
        alone, size = alone[~paired], size[~paired]
    else:
        size = np.ones(len(alone), np.int64)
    first, count = np.concatenate([first, alone]), np.concatenate([count, size])
    order = np.argsort(first, kind="stable")
    return first[order], count[order]


def fold_columns(row: Ints, start: Ints, width: Ints) -> RowRuns:
    """Runs of equal width at a constant distance in one row become one strided run (sorted input).

    Three or more make a progression anywhere. Two do if their stride is the one that recurs down the rows: then a wider
    run that begins where such a progression goes on also lends it its head (a window that touches a strided column).
    """
    found = _fold_equal(row, start, width)
    strided = found.times > 1
    if not strided.any():
        return found
    kinds, votes = np.unique(np.stack([found.stride, found.width], 1)[strided], axis=0, return_counts=True)
    stride, unit = kinds[votes.argmax()]
    goes_on = np.zeros(len(row), bool)
    goes_on[1:] = (row[1:] == row[:-1]) & (start[1:] == start[:-1] + stride) & (width[:-1] == unit) & (width[1:] > unit)
    if goes_on.any():
        where = np.flatnonzero(goes_on)
        row, start = np.insert(row, where + 1, row[where]), np.insert(start, where + 1, start[where] + unit)
        rest = width[where] - unit
        width = width.copy()
        width[where] = unit
        width = np.insert(width, where + 1, rest)
        found = _fold_equal(row, start, width)
    return _pair(found, int(stride), int(unit))


def _fold_equal(row: Ints, start: Ints, width: Ints) -> RowRuns:
    first, count = progressions([start], [row, width], min_count=3)
    stride = np.zeros(len(first), np.int64)
    many = count > 1
    stride[many] = start[first[many] + 1] - start[first[many]]
    return RowRuns(row[first], start[first], width[first], stride, count)


def _pair(runs: RowRuns, stride: int, unit: int) -> RowRuns:
    """Two lone runs of width ``unit``, ``stride`` apart in one row, become one run of count 2."""
    row, start, width, strides, count = runs
    lone = (count == 1) & (width == unit)
    near = np.zeros(len(row), bool)
    near[1:] = lone[1:] & lone[:-1] & (row[1:] == row[:-1]) & (start[1:] == start[:-1] + stride)
    if not near.any():
        return runs
    head = np.flatnonzero(~near)  # three in a line would be a progression already, so chains have two members
    size = np.diff(np.append(head, len(row)))
    return RowRuns(
        row[head], start[head], width[head], np.where(size > 1, stride, strides[head]), count[head] + size - 1
    )


def fold_rows(runs: RowRuns) -> Ints:
    """Row runs (sorted by row, start) whose start, width and count are affine down consecutive rows become strips."""
    if not len(runs.row):
        return make()
    per_row = np.bincount(runs.row)
    first_of_row = np.cumsum(per_row) - per_row
    rank = np.arange(len(runs.row)) - first_of_row[runs.row]
    block = np.cumsum(np.concatenate([[0], per_row[1:] != per_row[:-1]]))  # consecutive rows with as many runs
    lane = block[runs.row] * (per_row.max() + 1) + rank
    order = np.argsort(lane, kind="stable")
    row, start, width, stride, count = (column[order] for column in runs)
    lane = lane[order]
    # a lone run has no stride of its own: give it the usual one, so that counts can grow from 1
    stride = np.where(count == 1, dominant_stride(stride, count), stride)
    first, rows = progressions([start, width, count], [lane, stride], min_count=2)
    second = np.minimum(first + 1, len(row) - 1)
    step = [np.where(rows > 1, column[second] - column[first], 0) for column in (start, width, count)]
    return make(row=row[first], rows=rows, col=start[first], dcol=step[0], width=width[first], dwidth=step[1],
                stride=stride[first], count=count[first], dcount=step[2])  # fmt: skip


def dominant_stride(stride: Ints, count: Ints) -> int:
    """The stride that most strided runs have, 0 if there is none."""
    strides, votes = np.unique(stride[count > 1], return_counts=True)
    return int(strides[votes.argmax()]) if len(strides) else 0


def join_strips(strips: Ints) -> Ints:
    """Strips that continue one another down the rows become one."""
    rows = strips[:, ROW]
    family = strips.copy()
    for field, slope in ((COL, DCOL), (WIDTH, DWIDTH), (COUNT, DCOUNT)):
        family[:, field] -= family[:, slope] * rows
    family = family[:, [DCOL, DWIDTH, DCOUNT, STRIDE, COL, WIDTH, COUNT]]
    order = _sorted_by(*family.T, rows)
    strips, family = strips[order], family[order]
    ends = strips[:, ROW] + strips[:, ROWS]
    fresh = np.ones(len(strips), bool)
    fresh[1:] = (family[1:] != family[:-1]).any(1) | (strips[1:, ROW] != ends[:-1])
    first = np.flatnonzero(fresh)
    joined = strips[first]
    if len(first):
        joined[:, ROWS] = np.add.reduceat(strips[:, ROWS], first)
    return _adopt_single_rows(joined)


def _adopt_single_rows(strips: Ints) -> Ints:
    """A strip of one row has no slopes of its own: it joins the strip above that it continues."""
    single = strips[:, ROWS] == 1
    if single.all() or not single.any():
        return strips
    long, lone = strips[~single], strips[single]
    after = long.copy()
    after[:, ROW] += long[:, ROWS]
    for field, slope in ((COL, DCOL), (WIDTH, DWIDTH), (COUNT, DCOUNT)):
        after[:, field] += long[:, slope] * long[:, ROWS]
    shape = [ROW, COL, WIDTH, COUNT, STRIDE]
    _, key = np.unique(np.concatenate([after[:, shape], lone[:, shape]]), axis=0, return_inverse=True)
    _, above, below = np.intersect1d(key[: len(long)], key[len(long) :], return_indices=True)
    long[above, ROWS] += 1
    return np.concatenate([long, np.delete(lone, below, axis=0)])


def stack_columns(strips: Ints) -> Ints:
    """Single-run strips of the same rows and shape at a constant distance become one strip of several runs."""
    single = (strips[:, COUNT] == 1) & (strips[:, DCOUNT] == 0)
    rest, strips = strips[~single], strips[single]
    shape = strips[:, [ROW, ROWS, DCOL, WIDTH, DWIDTH]]
    order = _sorted_by(*shape.T, strips[:, COL])
    strips, shape = strips[order], shape[order]
    first, count = progressions([strips[:, COL]], list(shape.T), min_count=3)
    many = count > 1
    folded = strips[first]
    folded[many, STRIDE] = strips[first[many] + 1, COL] - folded[many, COL]
    folded[:, COUNT] = count
    return np.concatenate([rest, folded])


def _sorted_by(*keys: Ints) -> Ints:
    """The order by the first key, then the second, ...; keys with one value cost nothing."""
    used = [key for key in keys if len(key) and key.min() != key.max()]
    return np.lexsort(used[::-1]) if used else np.arange(len(keys[0]))


def nest(strips: Ints) -> Ints:
    """Strips that repeat at a constant offset become pieces: int64 (n, 9 + 10 * MAX_LEVELS).

    A piece is a strip followed by MAX_LEVELS repetitions (extent, step of each strip field); unused ones have extent 1.
    """
    width = len(FIELDS)
    pieces = np.zeros((len(strips), width + MAX_LEVELS * (1 + width)), np.int64)
    pieces[:, :width] = strips
    pieces[:, _extent_columns()] = 1
    for at in _extent_columns():
        if len(pieces) < 3:
            break
        differ = (pieces != pieces[0]).any(0)
        best = min((_repeat(pieces, differ, keys) for keys in _ORDERS), key=lambda found: len(found[1]))
        order, first, count = best
        if len(first) == len(pieces):
            break
        pieces = pieces[order]
        step = pieces[np.minimum(first + 1, len(pieces) - 1), :width] - pieces[first, :width]
        pieces = pieces[first]
        many = count > 1
        pieces[many, at] = count[many]
        pieces[many, at + 1 : at + 1 + width] = step[many]
    return pieces[np.lexsort((pieces[:, COL], pieces[:, ROW]))]


# ways to line up pieces before looking for repetitions: which varying fields group them, what they are sorted by
_ORDERS = (
    ((ROWS, WIDTH, COUNT), "row col"),
    ((ROWS, WIDTH, COUNT), "diagonal row"),
    ((ROWS, WIDTH, COUNT), "col row"),
    ((ROWS, WIDTH), "row col"),
    ((), "row col"),
    ((), "diagonal row"),
)


def _repeat(pieces: Ints, differ: NDArray[np.bool_], keys: tuple[tuple[int, ...], str]) -> tuple[Ints, Ints, Ints]:
    """(order, first, count) of the repetitions found when the pieces are lined up in one way. differ: in which fields
    any do."""
    group_by, sort_by = keys
    fixed = [f for f in range(pieces.shape[1]) if f not in VARYING or f in group_by]
    columns = [pieces[:, f] for f in fixed if differ[f]]
    place = {"row": pieces[:, ROW], "col": pieces[:, COL], "diagonal": pieces[:, COL] - pieces[:, ROW]}
    order = _sorted_by(*columns, *(place[name] for name in sort_by.split()))
    first, count = progressions([pieces[order, f] for f in VARYING], [c[order] for c in columns], min_count=3)
    return order, first, count


def unnest(pieces: Ints) -> Ints:
    """The strips of pieces, repetition by repetition: int64 (m, 9)."""
    return unnested(pieces)[0]


def unnested(pieces: Ints) -> tuple[Ints, Ints]:
    """(the strips of pieces, as ``unnest`` has them; the piece of each)."""
    extents, strips = pieces[:, _extent_columns()], pieces[:, : len(FIELDS)]
    if (extents == 1).all():
        return strips.copy(), np.arange(len(pieces))
    owner = np.repeat(np.arange(len(pieces)), extents.prod(1))
    return strips[owner] + _offsets(pieces, owner), owner


def _extent_columns() -> list[int]:
    width = len(FIELDS)
    return [width + level * (1 + width) for level in range(MAX_LEVELS)]


def _offsets(pieces: Ints, owner: Ints) -> Ints:
    """What repetition adds to each strip's fields, in unnest's order (the last level outermost). owner: its piece."""
    width = len(FIELDS)
    total = np.bincount(owner, minlength=len(pieces))
    index = np.arange(len(owner)) - (np.cumsum(total) - total)[owner]
    added = np.zeros((len(owner), width), np.int64)
    for at in _extent_columns():
        extent = pieces[owner, at]
        if (extent > 1).any():
            added += pieces[owner, at + 1 : at + 1 + width] * (index % extent)[:, None]
            index //= extent
    return added
