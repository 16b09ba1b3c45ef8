"""Folding: progressions cover their sequence, and each level of folding can be undone."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from splatc.formats import fold
from splatc.formats.analysis import runs_of_dense
from splatc.formats.strips import (
    COUNT,
    ROW,
    ROWS,
    VARYING,
    WIDTH,
    RowRuns,
    element_counts,
    make,
    paint,
    ramp,
    row_runs,
    unit_runs,
)  # fmt: skip
from splatc.patterns import dilated, strided
from tests import library

MANY = settings(max_examples=300)
small = st.integers(-3, 3)


def by_line(strips: np.ndarray) -> list[list[int]]:
    return sorted(strips.tolist())


# -- progressions ------------------------------------------------------------------------------------------------------


@st.composite
def sequences(draw):
    """Columns made of stretches with a constant step, and a column of labels."""
    values: list[tuple[int, int]] = []
    labels: list[int] = []
    for _ in range(draw(st.integers(0, 6))):
        start, step = draw(st.tuples(small, small)), draw(st.tuples(small, small))
        label = draw(st.integers(0, 1))
        for i in range(draw(st.integers(1, 6))):
            values.append((start[0] + i * step[0], start[1] + i * step[1]))
            labels.append(label)
    table = np.array(values, np.int64).reshape(-1, 2)
    return [table[:, 0], table[:, 1]], [np.array(labels, np.int64)]


@MANY
@given(sequences(), st.integers(2, 5))
@example(([np.array([0, 1, 2, 4, 6, 8])], [np.zeros(6, np.int64)]), 3)  # two that share a member
@example(([np.array([0, 1, 2, 4, 6])], [np.zeros(5, np.int64)]), 3)  # and the second is too short without it
def test_progressions(case, min_count):
    values, same = case
    first, count = fold.progressions(values, same, min_count)
    n = len(values[0])
    owner, i = ramp(count)
    np.testing.assert_array_equal(first[owner] + i, np.arange(n))  # they cover it in order, each member once
    for a, c in zip(first.tolist(), count.tolist()):
        assert c == 1 or c >= min_count
        members = slice(a, a + c)
        for column in values:
            assert len(np.unique(np.diff(column[members]))) <= 1
        for column in same:
            assert len(np.unique(column[members])) == 1


def test_progressions_are_maximal():
    first, count = fold.progressions([np.arange(10) * 3], [np.zeros(10, np.int64)], 3)
    assert (first.tolist(), count.tolist()) == ([0], [10])
    first, count = fold.progressions([np.array([0, 5, 10, 15, 16, 17, 18])], [np.zeros(7, np.int64)], 3)
    assert (first.tolist(), count.tolist()) == ([0, 4], [4, 3])


@pytest.mark.parametrize("n", [0, 1, 2])
def test_progressions_of_almost_nothing(n):
    first, count = fold.progressions([np.arange(n)], [np.zeros(n, np.int64)], 3)
    assert first.tolist() == list(range(n)) and count.tolist() == [1] * n


# -- rows --------------------------------------------------------------------------------------------------------------


def assert_same_runs(runs: RowRuns, mask: np.ndarray) -> None:
    painted = np.zeros(mask.shape, np.int32)
    for row, start, stop in zip(*unit_runs(runs)):
        painted[row, start:stop] += 1
    np.testing.assert_array_equal(painted, mask)


@MANY
@given(library.masks(48))
def test_folding_of_columns_and_rows_is_undone_by_unfolding(mask):
    runs = runs_of_dense(mask)
    folded = fold.fold_columns(runs.row, runs.start, runs.stop - runs.start)
    assert_same_runs(folded, mask)
    order = np.lexsort((folded.start, folded.row))
    np.testing.assert_array_equal(order, np.arange(len(order)))  # still sorted, as fold_rows wants it
    strips = fold.fold_rows(folded)
    np.testing.assert_array_equal(paint(strips, *mask.shape), mask)
    assert len(strips) <= len(folded.row) <= len(runs.row) + mask.shape[0]
    assert element_counts(strips).sum() == mask.sum()
    assert (strips[:, [ROWS, WIDTH, COUNT]] > 0).all()


def test_a_window_lends_its_head_to_a_strided_column():
    """Where a window touches a strided column, the progression goes on inside the window."""
    mask = (strided(4) | dilated(0, 2, 1)).dense(64)
    runs = runs_of_dense(mask)
    folded = fold.fold_columns(runs.row, runs.start, runs.stop - runs.start)
    assert_same_runs(folded, mask)
    assert folded.times.max() >= 15


# -- strips and pieces -------------------------------------------------------------------------------------------------


@st.composite
def strip_tables(draw):
    """Strips that often continue or repeat one another; not necessarily disjoint."""
    tables = [make()]
    for _ in range(draw(st.integers(0, 5))):
        number = st.integers(0, 9)
        base = [draw(number), draw(st.integers(1, 4)), draw(number), draw(small), draw(st.integers(1, 4)),
                draw(st.integers(0, 1)), draw(number), draw(st.integers(1, 3)), draw(st.integers(0, 1))]  # fmt: skip
        step = np.zeros(9, np.int64)
        for field in VARYING:
            step[field] = draw(st.integers(0, 2))
        step[ROW] = draw(st.sampled_from([0, 1, base[1]]))
        tables.append(np.array(base) + step * np.arange(draw(st.integers(1, 7)))[:, None])
    return np.random.default_rng(draw(st.integers(0, 99))).permutation(np.concatenate(tables))


@MANY
@given(strip_tables())
def test_nesting_is_undone_by_unnesting(strips):
    pieces = fold.nest(strips)
    assert by_line(fold.unnest(pieces)) == by_line(strips)
    assert len(pieces) <= len(strips)
    again, owners = fold.unnested(pieces)
    np.testing.assert_array_equal(again, fold.unnest(pieces))
    np.testing.assert_array_equal(np.unique(owners), np.arange(len(pieces)))
    assert len(owners) == len(strips)


@MANY
@given(library.masks(48))
def test_joining_and_stacking_keep_the_mask(mask):
    runs = runs_of_dense(mask)
    strips = make(row=runs.row, col=runs.start, width=runs.stop - runs.start)  # a strip for each run
    joined = fold.join_strips(strips)
    np.testing.assert_array_equal(paint(joined, *mask.shape), mask)
    stacked = fold.stack_columns(joined)
    np.testing.assert_array_equal(paint(stacked, *mask.shape), mask)
    assert len(stacked) <= len(joined) <= len(strips)


@MANY
@given(library.sized_patterns(40, 2), st.integers(1, 9))
def test_joining_undoes_a_cut(case, height):
    """Strips cut into bands of rows join again, never to more strips than before."""
    pattern, q_len, kv_len = case
    mask = pattern.dense(q_len, kv_len)
    runs = runs_of_dense(mask)
    whole = fold.fold_rows(fold.fold_columns(runs.row, runs.start, runs.stop - runs.start))
    parts = []
    for strip in whole:
        row, rows, col, dcol, width, dwidth, stride, count, dcount = strip.tolist()
        for t in range(0, rows, height):
            taken = min(height, rows - t)
            parts.append([row + t, taken, col + dcol * t, dcol, width + dwidth * t, dwidth, stride,
                          count + dcount * t, dcount])  # fmt: skip
    cut = np.array(parts, np.int64).reshape(-1, 9)
    joined = fold.join_strips(cut)
    np.testing.assert_array_equal(paint(joined, q_len, kv_len), mask)
    assert len(joined) <= len(whole)


def test_many_equal_steps_are_one_piece():
    n = 1 << 16
    pieces = fold.nest(make(row=4 * np.arange(n), rows=4, col=7 * np.arange(n), width=5))
    assert len(pieces) == 1 and len(fold.unnest(pieces)) == n


def test_row_runs_of_chosen_rows():
    strips = make(row=np.array([0, 4]), rows=np.array([3, 5]), col=np.array([0, 1]), dcol=1, width=np.array([2, 3]))
    every = row_runs(strips)
    rows = np.array([1, 2, 5, 20])
    some = row_runs(strips, rows)
    keep = np.isin(every.row, rows)
    for a, b in zip(every, some):
        np.testing.assert_array_equal(a[keep], b)
