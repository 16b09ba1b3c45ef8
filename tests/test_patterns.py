"""Patterns: what each leaf means, element by element; the law of lines; validation."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from splatc import patterns as P
from splatc.errors import InvalidInput
from splatc.patterns.base import Lines
from tests.library import combinations, leaves

FAST = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


def by_definition(f, q_len, kv_len):
    return np.array([[bool(f(q, k)) for k in range(kv_len)] for q in range(q_len)])


def assert_law(p, q_len, kv_len):
    """Cut the plane at every band, line and residue threshold: membership is constant in every cell."""
    lines = p.lines(q_len, kv_len)
    assert lines is not None
    q, k = np.arange(q_len)[:, None], np.arange(kv_len)[None, :]
    rng = np.random.default_rng(0)

    def weigh(parts):  # a random linear hash of the cell's coordinates
        return sum(
            (np.asarray(x, np.int64) * w for x, w in zip(parts, rng.integers(2**40, size=9999))), np.int64(0)
        )

    edges = {0, q_len, *lines.rows.tolist()}
    assert (np.diff(lines.rows) > 0).all() and all(0 < r < q_len for r in lines.rows)
    parts = [np.searchsorted(lines.rows, q, side="right") + 0 * k]
    for group, at in ((lines.cols, lambda x: k >= x), (lines.diags, lambda x: k >= q + x)):
        assert group.dtype == np.int64 and group.shape[1] == 3
        for lo, hi, x in group.tolist():
            assert lo in edges and hi in edges and lo < hi
            parts.append((q >= lo) & (q < hi) & at(x))
    for mods, value in ((lines.col_mod, k + 0 * q), (lines.diff_mod, k - q)):
        for m, thresholds in mods:
            assert list(thresholds) == sorted(set(thresholds)) and thresholds[0] == 0 and thresholds[-1] < m
            parts.append(np.searchsorted(np.array(thresholds), value % m, side="right"))
    label = np.broadcast_to(weigh(parts), (q_len, kv_len)).reshape(-1)
    mask = p.contains(q, k, q_len, kv_len)
    assert mask.shape == (q_len, kv_len) and mask.dtype == np.bool_
    flat = mask.reshape(-1)
    order = np.argsort(label, kind="stable")
    same = label[order][1:] == label[order][:-1]
    assert not (same & (flat[order][1:] != flat[order][:-1])).any(), (
        f"{p} breaks the law at {q_len} x {kv_len}"
    )


SHAPES = [(24, 24), (17, 31), (33, 12), (1, 9), (9, 1), (40, 40)]

SIMPLE = [
    (P.full(), lambda q, k, Q, K: True),
    (P.causal(), lambda q, k, Q, K: k <= q),
    (P.causal(align="bottom_right"), lambda q, k, Q, K: k <= q + K - Q),
    (P.window(5, 2), lambda q, k, Q, K: q - 5 <= k <= q + 2),
    (P.window(0, 0), lambda q, k, Q, K: q == k),
    (P.window(-3, 9), lambda q, k, Q, K: q + 3 <= k <= q + 9),
    (P.window(5, 2, align="bottom_right"), lambda q, k, Q, K: -5 <= k - (q + K - Q) <= 2),
    (P.dilated(7, 6, 3), lambda q, k, Q, K: -7 <= k - q <= 6 and (q - k) % 3 == 0),
    (P.dilated(6, 0, 1), lambda q, k, Q, K: -6 <= k - q <= 0),
    (
        P.dilated(6, 4, 2, align="bottom_right"),
        lambda q, k, Q, K: -6 <= k - (q + K - Q) <= 4 and (q + K - Q - k) % 2 == 0,
    ),
    (P.strided(4), lambda q, k, Q, K: (q - k) % 4 == 0),
    (P.strided(1), lambda q, k, Q, K: True),
    (P.fixed(5, 2), lambda q, k, Q, K: q // 5 == k // 5 or k % 5 >= 3),
    (P.fixed(6, 6), lambda q, k, Q, K: True),
    (P.blocked(7), lambda q, k, Q, K: q // 7 == k // 7),
    (P.block_window(4, 2, 1), lambda q, k, Q, K: -2 <= k // 4 - q // 4 <= 1),
    (P.global_rows(3), lambda q, k, Q, K: q < 3),
    (P.global_rows(0), lambda q, k, Q, K: False),
    (P.global_cols(3), lambda q, k, Q, K: k < 3),
    (P.sink(2), lambda q, k, Q, K: k < 2),
    (P.prefix(5), lambda q, k, Q, K: k <= q or k < 5),
    (P.longformer(3, 2), lambda q, k, Q, K: abs(q - k) <= 3 or q < 2 or k < 2),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", SIMPLE, ids=[str(c[0]) for c in SIMPLE])
def test_leaf_means_what_its_definition_says(case, shape):
    p, definition = case
    np.testing.assert_array_equal(
        p.dense(*shape), by_definition(lambda q, k: definition(q, k, *shape), *shape)
    )
    assert_law(p, *shape)
    assert_law(~p, *shape)


@pytest.mark.parametrize(
    "grid, size, dilation, causal",
    [
        ((12,), 5, 1, False),
        ((13,), 3, 2, True),
        ((5, 7), 3, 1, False),
        ((6, 5), (3, 5), (2, 1), False),
        ((5, 8), (3, 3), (1, 3), (True, False)),
        ((4, 9), (1, 4), (1, 2), (False, True)),
        ((3, 4, 5), 3, 1, False),
        ((3, 4, 6), (3, 2, 3), (1, 2, 2), (False, True, False)),
        ((2, 3), 9, 1, False),
        ((7, 1), 3, 1, False),
    ],
)
def test_neighborhood(grid, size, dilation, causal):
    p = P.neighborhood(grid, size, dilation, causal)
    per = [x if isinstance(x, tuple) else (x,) * len(grid) for x in (size, dilation, causal)]

    def near(q, k):
        a, b = np.unravel_index(q, grid), np.unravel_index(k, grid)
        for x, y, s, d, c in zip(a, b, *per):
            lo, hi = (-(s - 1) * d, 0) if c else (-(s // 2) * d, s // 2 * d)
            if not lo <= y - x <= hi or (y - x) % d:
                return False
        return True

    n = int(np.prod(grid))
    np.testing.assert_array_equal(p.dense(n), by_definition(near, n, n))
    assert_law(p, n, n)
    assert P.parse(str(p)) == p


@pytest.mark.parametrize(
    "grid, size, dilation, causal",
    [
        ((12,), 5, 1, False),
        ((13,), 3, 4, False),
        ((11,), 11, 1, False),
        ((5, 7), (3, 5), 1, False),
        ((7, 11), (3, 5), (2, 2), False),
        ((4, 9), (3, 4), (1, 2), (False, True)),
        ((3, 5, 6), (1, 3, 3), (1, 1, 2), False),
        ((4, 3, 5), 3, 1, (True, False, False)),
    ],
)
def test_clamped_neighborhood(grid, size, dilation, causal):
    """Against a direct count: the size nearest positions of a query's residue class, an equal number on both sides
    where there are enough."""
    p = P.neighborhood(grid, size, dilation, causal, border="clamp")
    per = [x if isinstance(x, tuple) else (x,) * len(grid) for x in (size, dilation, causal)]

    def window(x, n, s, d, c):
        mine = list(range(x % d, n, d))
        at = mine.index(x)
        if c:
            return mine[max(at - s + 1, 0) : at + 1]
        while s // 2 > at:
            at += 1
        while at + s // 2 >= len(mine):
            at -= 1
        return mine[at - s // 2 : at + s // 2 + 1]

    def near(q, k):
        a, b = np.unravel_index(q, grid), np.unravel_index(k, grid)
        return all(y in window(x, *rest) for x, y, *rest in zip(a, b, grid, *per))

    n = int(np.prod(grid))
    dense = by_definition(near, n, n)
    np.testing.assert_array_equal(p.dense(n), dense)
    assert any(per[2]) or (dense.sum(1) == np.prod(per[0])).all()
    assert_law(p, n, n)
    assert_law(p.transposed(), n, n)
    np.testing.assert_array_equal(p.transposed().dense(n), dense.T)
    assert P.parse(str(p)) == p != P.neighborhood(grid, size, dilation, causal)


@pytest.mark.parametrize(
    "first, part",
    [(4, P.causal()), (3, P.fixed(4, 1)), (1, P.dilated(9, 9, 3)), (5, P.global_cols(2) | P.window(1, 0))],
)
def test_after(first, part):
    p = P.after(first, part)
    for q_len, kv_len in ((13, 13), (9, 14), (14, 7), (3, 1)):
        expected = np.zeros((q_len, kv_len), bool)
        if min(q_len, kv_len) > first:
            expected[first:, first:] = part.dense(q_len - first, kv_len - first)
        np.testing.assert_array_equal(p.dense(q_len, kv_len), expected)
        assert_law(p, q_len, kv_len)
        assert_law(p.transposed(), kv_len, q_len)
        np.testing.assert_array_equal(p.transposed().dense(kv_len, q_len), expected.T)
    assert P.parse(str(p)) == p and P.after(0, part) == part
    grid = P.after(1, P.neighborhood((3, 4), 3))
    assert grid.own_lengths() == (13, 13)
    heads = P.after(2, P.per_head([P.causal(), P.full()]))
    assert heads == P.per_head([P.after(2, P.causal()), P.after(2, P.full())])


def test_documents():
    p = P.documents([3, 0, 4, 1])
    of = [0, 0, 0, 2, 2, 2, 2, 3]
    np.testing.assert_array_equal(p.dense(8), by_definition(lambda q, k: of[q] == of[k], 8, 8))
    assert_law(p, 8, 8)
    assert (
        p == P.documents(cu_seqlens=np.array([0, 3, 3, 7, 8], np.int32)) == P.documents(lengths=(3, 0, 4, 1))
    )
    assert P.documents(ids=[5, 5, 2]) == P.documents([2, 1]) and hash(P.documents([2, 1]))
    wide = P.documents([2, 1, 2], kv_lengths=[1, 0, 5])
    of_q, of_k = [0, 0, 1, 2, 2], [0, 2, 2, 2, 2, 2]
    np.testing.assert_array_equal(wide.dense(5, 6), by_definition(lambda q, k: of_q[q] == of_k[k], 5, 6))
    assert_law(wide, 5, 6)
    mixed = P.documents(ids=[7, 7, 1, 7, 3, 3, 1])
    ids = [7, 7, 1, 7, 3, 3, 1]
    np.testing.assert_array_equal(mixed.dense(7), by_definition(lambda q, k: ids[q] == ids[k], 7, 7))
    assert_law(mixed, 7, 7)
    assert mixed == P.documents(ids=[0, 0, 4, 0, 9, 9, 4])
    assert P.documents(ids=np.arange(10_000) % 2).lines(10_000, 10_000) is None  # too many runs to list


def test_block_mask():
    rng = np.random.default_rng(1)
    m = rng.random((4, 3)) < 0.5
    for size, (Q, K) in ((4, (16, 12)), ((5, 3), (18, 8)), (1, (4, 3))):
        bq, bk = size if isinstance(size, tuple) else (size, size)
        p = P.block_mask(m, size)
        np.testing.assert_array_equal(p.dense(Q, K), np.repeat(np.repeat(m, bq, 0), bk, 1)[:Q, :K])
        assert_law(p, Q, K)
        assert P.parse(str(p)) == p
    assert P.block_mask(m.astype(int).tolist(), 4) == P.block_mask(m, 4) != P.block_mask(~m, 4)
    flipped = P.block_mask(["10", "01"], 3)  # equal edges, opposite sides: a row break all the same
    assert_law(flipped, 6, 6)
    assert flipped.lines(6, 6).rows.tolist() == [3]


def test_random_blocks_are_pinned_and_do_not_depend_on_q_len():
    p = P.random_blocks(4, 3, seed=7)
    long, short = p.dense(80, 40), p.dense(20, 40)
    np.testing.assert_array_equal(long[:20], short)
    blocks = long[::4, ::4]
    assert (blocks.sum(axis=1) == 3).all() and (np.repeat(np.repeat(blocks, 4, 0), 4, 1) == long).all()
    # These values must never change: saved models depend on them.
    assert p.table(12, 400).tolist() == PINNED
    assert p.dense(8, 5).all()  # fewer key blocks than per_row: all of them
    assert not np.array_equal(long, P.random_blocks(4, 3, seed=8).dense(80, 40))
    assert_law(p, 30, 41)
    counts = np.bincount(P.random_blocks(1, 3).table(4000, 10).reshape(-1))
    assert abs(counts - 1200).max() < 150  # uniform


PINNED = [[2, 35, 43], [0, 14, 38], [28, 67, 80]]


def test_bigbird():
    p = P.bigbird(block=4, window=3, global_blocks=1, random=2, seed=3)
    m = p.dense(48)
    band = by_definition(lambda q, k: abs(q // 4 - k // 4) <= 1 or q < 4 or k < 4, 48, 48)
    assert m[band].all()
    np.testing.assert_array_equal(m, band | P.random_blocks(4, 2, seed=3).dense(48))
    assert_law(p, 48, 48)
    assert_law(P.bigbird(block=4, random=0, global_blocks=0), 30, 22)


def test_mask_leaf():
    m = np.random.default_rng(0).random((13, 21)) < 0.5
    p = P.mask(m)
    np.testing.assert_array_equal(p.dense(13, 21), m)
    np.testing.assert_array_equal((p & P.full()).dense(13, 21), m)
    assert p.lines(13, 21) is None and (p & P.causal()).lines(13, 21) is None
    assert p == P.mask(m.astype(np.int64)) == P.mask(m.tolist()) and hash(p) == hash(P.mask(m.copy()))
    assert p != P.mask(~m)
    with pytest.raises(InvalidInput, match="13 x 21, but q_len is 21"):
        p.check(21, 21)
    with pytest.raises(InvalidInput, match="additive"):
        P.mask(m.astype(np.float32))
    with pytest.raises(InvalidInput, match="other than 0 and 1"):
        P.mask(m * 2)


def test_combination():
    a, b, c = P.causal(), P.window(3, 3), P.strided(2)
    p = a & (b | ~c)
    A, B, C = (x.dense(9) for x in (a, b, c))
    np.testing.assert_array_equal(p.dense(9), A & (B | ~C))
    assert ~~p == p and (a & b) & c == a & (b & c) and hash((a | b) | c) == hash(a | (b | c))
    assert str(p) == "causal() & (window(3, 3) | ~strided(2))"
    assert (
        str(~(a & b)) == "~(causal() & window(3, 3))"
        and str(a & b | c) == "causal() & window(3, 3) | strided(2)"
    )
    assert P.sink(4) != P.global_cols(4)
    with pytest.raises(InvalidInput, match="write & "):
        bool(a)
    with pytest.raises(InvalidInput, match="write & "):
        a and b
    with pytest.raises(TypeError):
        a & 3  # type: ignore[operator]


def test_contains_broadcasts_to_full_shape():
    for p in (P.global_cols(2), P.global_rows(2), P.full(), ~P.full(), P.full() & P.sink(3)):
        assert p.contains(np.arange(5)[:, None], np.arange(7)[None, :], 5, 7).shape == (5, 7)
        assert p.contains(np.arange(5), np.arange(5), 5, 7).shape == (5,)
        assert p.contains(np.int64(1), np.int64(2), 5, 7).shape == ()


def test_per_head():
    p = P.per_head([P.causal(), P.window(1, 1)])
    assert P.heads_of(p, 2) == (P.causal(), P.window(1, 1)) and P.heads_of(P.full(), 2) == (P.full(),) * 2
    assert p.dense(4).shape == (2, 4, 4)
    s = P.sink(1)
    for got, left, right in ((p & s, p, s), (s & p, s, p)):
        assert got == P.per_head([a & b for a, b in zip(P.heads_of(left, 2), P.heads_of(right, 2))])
    assert ~p == P.per_head([~P.causal(), ~P.window(1, 1)])
    assert p | p == P.per_head([P.causal() | P.causal(), P.window(1, 1) | P.window(1, 1)])
    assert P.parse(str(p)) == p
    with pytest.raises(InvalidInput, match="2 heads, but there are 3"):
        P.heads_of(p, 3)
    with pytest.raises(InvalidInput, match="2 heads, but there are 3"):
        p & P.per_head([P.full()] * 3)
    with pytest.raises(InvalidInput, match="heads"):
        p.contains(np.int64(0), np.int64(0), 4, 4)
    for bad in ([], [3], [p], P.causal()):
        with pytest.raises(InvalidInput, match="per_head"):
            P.per_head(bad)  # type: ignore[arg-type]


BAD = [
    (lambda: P.window(-3, 2), "left is -3 and right is 2"),
    (lambda: P.window(1.5, 2), "left is 1.5"),  # type: ignore[arg-type]
    (lambda: P.window(True, 2), "left is True"),
    (lambda: P.window(2**50, 2), "too large"),
    (lambda: P.causal(align="left"), 'align is \'left\', but it must be "top_left" or "bottom_right"'),
    (lambda: P.dilated(3, 3, 0), "step is 0, but it must be a whole number >= 1"),
    (lambda: P.strided("3"), "step is '3'"),  # type: ignore[arg-type]
    (lambda: P.fixed(8, 9), "summary is 9, but it must be a whole number from 1 to 8"),
    (lambda: P.fixed(0, 1), "block is 0"),
    (lambda: P.blocked(0), "size is 0"),
    (lambda: P.block_window(4, -1, 0), "left is -1"),
    (lambda: P.global_rows(-1), "n is -1"),
    (lambda: P.prefix(None), "n is None"),  # type: ignore[arg-type]
    (lambda: P.longformer(-1, 2), "window is -1"),
    (lambda: P.random_blocks(4, 0), "per_row is 0"),
    (lambda: P.random_blocks(4, 1, seed=-1), "seed is -1"),
    (lambda: P.bigbird(window=4), "window is 4, but it must be odd"),
    (lambda: P.documents(), "exactly one"),
    (lambda: P.documents([1], ids=[0]), "exactly one"),
    (lambda: P.documents([]), "non-empty"),
    (lambda: P.documents([1.5]), "whole numbers"),
    (lambda: P.documents([[1], [2, 3]]), "whole numbers"),
    (lambda: P.documents([3, -1]), r"lengths\[1\] is -1"),
    (lambda: P.documents([0, 0]), "no position"),
    (lambda: P.documents(cu_seqlens=[1, 2]), "start with 0"),
    (lambda: P.documents(cu_seqlens=[0, 5, 3]), r"decreases at index 2 \(5 to 3\)"),
    (lambda: P.documents([1, 2], kv_lengths=[3]), "2 documents of queries but 1 of keys"),
    (lambda: P.documents(ids=[0, -1]), r"ids\[1\] is -1"),
    (lambda: P.documents([1, 2]).check(4, 4), "sum to 3, but q_len is 4"),
    (lambda: P.documents([1, 2]).check(3, 4), "sum to 3, but kv_len is 4"),
    (lambda: P.documents(ids=[0, 1, 0]).check(3, 4), "3 ids"),
    (lambda: P.neighborhood((2, 2, 2, 2), 3), "1 to 3 axes"),
    (lambda: P.neighborhood((4, 4), 4), "odd"),
    (lambda: P.neighborhood((4, 4), (3, 3, 3)), "2 axes"),
    (lambda: P.neighborhood((4, 4), 3, causal=2), "causal is 2"),
    (lambda: P.neighborhood((4, 4), 3, dilation=0), "dilation is 0"),
    (lambda: P.neighborhood((4, 4), 3).check(15, 15), "16 positions"),
    (lambda: P.after(1, P.neighborhood((3, 4), 3)).check(14, 14), "12 positions"),
    (lambda: P.after(4, "causal"), "expected a pattern"),
    (lambda: P.neighborhood((9, 5), 3, 2, border="clamp"), "no room"),
    (lambda: P.neighborhood(9, 3, border="shift"), "border"),
    (lambda: P.block_mask([1, 0], 4), "2-D"),
    (lambda: P.block_mask(["01", "1"], 4), "equal length"),
    (lambda: P.block_mask(["02"], 4), "rows of 0 and 1"),
    (lambda: P.block_mask([[1]], (1, 2, 3)), "size is"),  # type: ignore[arg-type]
    (lambda: P.block_mask([[1, 0]], 4).check(4, 9), "1 x 2 blocks of 4, but q_len 4 and kv_len 9 need 1 x 3"),
    (lambda: P.causal().check(0, 4), "q_len is 0"),
    (lambda: P.full().dense(2**17), "too large"),
]


@pytest.mark.parametrize("make, message", BAD, ids=[m for _, m in BAD])
def test_bad_input_is_one_line_that_names_what_is_wrong(make, message):
    with pytest.raises(InvalidInput, match=message) as e:
        make()
    assert "\n" not in str(e.value)


# Random patterns at random sizes.

@st.composite
def sized(draw, patterns):
    q_len = draw(st.integers(1, 36))
    kv_len = q_len if draw(st.booleans()) else draw(st.integers(1, 36))
    return draw(patterns(q_len, kv_len)), q_len, kv_len


@FAST
@given(sized(leaves))
def test_law_holds_for_random_leaves(case):
    assert_law(*case)


@FAST
@given(sized(combinations))
def test_law_and_round_trip_hold_for_random_combinations(case):
    p, q_len, kv_len = case
    assert_law(*case)
    again = P.parse(str(p))
    assert again == p and hash(again) == hash(p) and str(again) == str(p)
    np.testing.assert_array_equal(again.dense(q_len, kv_len), p.dense(q_len, kv_len))


@FAST
@given(st.lists(st.tuples(st.integers(-3, 14), st.integers(-3, 14), st.integers(-12, 12)), max_size=12))
def test_lines_of_joins_without_losing_a_line(triples):
    q_len, kv_len = 10, 9
    lines = Lines.of(q_len, kv_len, cols=triples, diags=triples)
    for got, at in ((lines.cols, lambda q, x: x), (lines.diags, lambda q, x: q + x)):
        drawn = {
            (q, x)
            for lo, hi, x in triples
            for q in range(max(lo, 0), min(hi, q_len))
            if 0 < at(q, x) < kv_len
        }
        kept = {(q, x) for lo, hi, x in got.tolist() for q in range(lo, hi)}
        assert drawn <= kept
        for (a, b, x), (c, _, y) in itertools.pairwise(got.tolist()):
            assert a < b and (x < y or (x == y and b < c))  # sorted, neither overlapping nor abutting
    assume(len(lines.rows))
    assert (np.diff(lines.rows) > 0).all()


def test_a_broken_law_is_caught():
    class Lying(type(P.window(1, 1))):  # type: ignore[misc]
        def lines(self, q_len, kv_len):
            return P.window(self.left, self.right + 1).lines(q_len, kv_len)

    with pytest.raises(AssertionError, match="breaks the law"):
        assert_law(Lying(2, 2), 20, 20)


MILLION = 2**20


@pytest.mark.parametrize(
    "p",
    [
        P.fixed(128, 16),
        P.blocked(64),
        P.bigbird(block=64),
        P.documents([1024] * 1000 + [MILLION - 1_024_000]),
        P.documents(ids=np.arange(MILLION) // 1024 % 500),
        P.neighborhood((1024, 1024), 7),
        P.neighborhood((16, 256, 256), (3, 7, 7)),
        P.causal() & (P.sink(4) | P.window(4095, 0) | P.strided(512)),
        P.longformer(256, 64) & P.documents([MILLION // 4] * 4),
    ],
    ids=lambda p: str(p)[:30],
)
def test_a_million_positions_are_cheap(p):
    begin = time.perf_counter()
    p.check(MILLION, MILLION)
    lines = p.lines(MILLION, MILLION)
    at = np.random.default_rng(0).integers(MILLION, size=(2, 100_000))
    got = p.contains(at[0], at[1], MILLION, MILLION)
    assert got.shape == (100_000,) and lines is not None
    assert time.perf_counter() - begin < 5
    assert len(lines.cols) + len(lines.diags) < 2**20
