"""From a symbolic pattern to strips: equal to the dense mask on adversarial compositions, without forming it."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import example, given, settings

from splatc import patterns as P
from splatc.errors import VerifyError
from splatc.formats import acsr as acsr_module
from splatc.formats.acsr import ACSR, Pieces, _are_runs_of
from splatc.formats.strips import Runs, paint
from splatc.formats.symbolic import strips_of
from tests import library


def check(pattern, q_len, kv_len):
    """symbolic == analysed == dense, and each element is held once."""
    mask = pattern.dense(q_len, kv_len)
    symbolic = ACSR.from_pattern(pattern, q_len, kv_len)
    held = paint(symbolic.strips, q_len, kv_len)
    np.add.at(held, symbolic.remainder.elements(), 1)
    np.testing.assert_array_equal(held, mask)
    analysed = ACSR.from_dense(mask)
    np.testing.assert_array_equal(analysed.to_dense(), mask)
    assert symbolic == analysed and symbolic.nnz == mask.sum()
    lines = pattern.lines(q_len, kv_len)
    if lines is not None:  # also where a quicker way was taken
        strips = strips_of(pattern, q_len, kv_len, lines)
        np.testing.assert_array_equal(paint(strips, q_len, kv_len), mask)
        assert (strips[:, 1] > 0).all()


EXTREMES = [
    (P.fixed(2, 1), 1, 2),
    (P.strided(2) & P.global_rows(0), 1, 1),
    (P.window(-500, 510), 60, 60),  # beside the mask
    (P.window(0, 0), 50, 80),
    (P.window(0, 0, "bottom_right"), 80, 50),
    (P.window(-49, 49), 50, 50),  # one element, in the corner
    (P.dilated(3, 3, 1000), 40, 40),
    (P.dilated(1000, 1000, 7), 33, 90),
    (P.dilated(-3, 3, 3), 33, 20),
    (P.strided(1000), 64, 64),
    (P.strided(63), 64, 64),
    (P.strided(64), 64, 64),
    (~P.strided(2), 31, 31),
    (~P.strided(3) & P.causal(), 31, 64),
    (P.fixed(100, 100), 30, 30),
    (P.fixed(7, 6), 100, 23),
    (P.blocked(1), 20, 30),
    (P.blocked(1000), 20, 30),
    (P.fixed(5, 1) & P.strided(3), 70, 70),
    (P.fixed(4, 1) & P.strided(4), 70, 41),
    (P.strided(4) & P.strided(6), 100, 100),
    (P.strided(4) | P.strided(6) | P.strided(9), 100, 77),
    (P.fixed(6, 2) & P.fixed(4, 1), 90, 90),
    (~P.full(), 12, 12),
    (P.causal("bottom_right"), 90, 20),  # rows without a key
    (P.causal() & ~P.causal(), 40, 40),
    (P.documents([0, 10, 0, 30, 0]), 40, 40),
    (P.documents([5, 0, 35], kv_lengths=[0, 9, 1]), 40, 10),
]


@pytest.mark.parametrize("case", EXTREMES, ids=lambda c: f"{c[0]}@{c[1]}x{c[2]}")
def test_extreme_parameters(case):
    check(*case)


@settings(max_examples=700)
@given(library.sized_patterns(150))
@example((P.causal() & (P.window(9, 0) | P.strided(7)), 100, 100))
@example((P.strided(6) | P.fixed(9, 2), 97, 61))
def test_random_compositions(case):
    check(*case)


@settings(max_examples=100)
@given(library.sized_patterns(60, 8))
def test_deep_compositions(case):
    check(*case)


@settings(max_examples=60)
@given(library.sized_patterns(40, 3))
def test_what_is_checked_in_random_rows_only_is_right_too(case):
    """Large masks are compared with their pattern in some rows: take that path on small ones."""
    limits = acsr_module.CHECK_ALL, acsr_module.CHECK_SOME, acsr_module.MAX_MIXED
    acsr_module.CHECK_ALL, acsr_module.CHECK_SOME, acsr_module.MAX_MIXED = 0, 64, 0
    try:
        check(*case)
    finally:
        acsr_module.CHECK_ALL, acsr_module.CHECK_SOME, acsr_module.MAX_MIXED = limits


@pytest.mark.parametrize("rows", ["every", "some"])
def test_the_comparison_finds_what_is_wrong(rows, monkeypatch):
    if rows == "some":
        monkeypatch.setattr(acsr_module, "CHECK_ALL", 0)
    pattern = P.causal() & (P.window(3, 0) | P.strided(8))
    pieces = ACSR.from_pattern(pattern, 60).pieces.table
    for table, words in ((np.concatenate([pieces, pieces[:1]]), "held by 2 pieces"), (pieces[1:], "held by 0 pieces")):
        with pytest.raises(VerifyError, match=words):
            ACSR(60, 60, Pieces(table))._check_against(pattern)
    with pytest.raises(VerifyError, match="but the mask says False"):
        ACSR(60, 60, Pieces(pieces))._check_against(P.window(3, 0))


@pytest.mark.parametrize("seed", range(50))
def test_runs_of_a_mask(seed):
    """Against coverage counted element by element: runs that touch, overlap or are empty, and masks that differ."""
    rng = np.random.default_rng(seed)
    row, start = rng.integers(0, 4, 8), rng.integers(0, 21, 8)
    runs = Runs(row, start, np.minimum(start + rng.integers(0, 5, 8), 20))
    covered = np.zeros((4, 20), int)
    for r, a, b in zip(row, runs.start, runs.stop):
        covered[r, a:b] += 1
    other = covered > 0
    other[rng.integers(4), rng.integers(20)] ^= True
    assert _are_runs_of(covered > 0, row, runs) == (covered.max() <= 1)
    assert not _are_runs_of(other, row, runs)


@pytest.mark.parametrize(
    "pattern, most",
    [
        (P.window(256, 256), 3),
        (P.causal(), 1),
        (P.strided(64), 40),
        (P.dilated(1024, 1024, 4), 40),
        (P.fixed(128, 16), 20),
        (P.documents([1024] * 1024) & P.causal(), 1100),
    ],
    ids=lambda x: str(x)[:20],
)
def test_a_million_rows_need_no_matrix(pattern, most):
    n = 1 << 20
    tracemalloc.start()
    try:
        acsr = ACSR.from_pattern(pattern, n)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 300e6
    assert len(acsr.pieces) <= most and not acsr.remainder.nnz
    rng = np.random.default_rng(0)
    for q in rng.integers(0, n, 3).tolist():
        runs = [s for s in acsr.strips if s[0] <= q < s[0] + s[1]]
        held = np.zeros(n, np.int8)
        for row, _, col, dcol, width, dwidth, stride, count, dcount in runs:
            t = q - row
            for i in range(count + dcount * t):
                start = col + dcol * t + stride * i
                held[start : start + width + dwidth * t] += 1
        np.testing.assert_array_equal(held, pattern.contains(np.array(q), np.arange(n), n, n))
