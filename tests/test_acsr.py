"""ACSR is exact: every pattern, random masks, conversions and set operations against NumPy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splatc import patterns as P
from splatc.errors import InvalidInput, VerifyError
from splatc.formats.acsr import ACSR
from splatc.formats.analysis import runs_of_dense
from splatc.formats.remainder import BlockBits
from splatc.formats.strips import Runs, paint
from tests import library

SIZES = [(1, 1), (2, 2), (63, 63), (127, 127), (129, 129), (1000, 1000), (127, 1000), (1000, 129), (2, 63)]


def assert_exact(acsr: ACSR, mask: np.ndarray) -> None:
    """The pieces and the remainder hold each element of the mask once, and nothing else."""
    held = paint(acsr.strips, *mask.shape)
    np.add.at(held, acsr.remainder.elements(), 1)
    np.testing.assert_array_equal(held, mask)
    np.testing.assert_array_equal(acsr.to_dense(), mask)
    assert acsr.nnz == mask.sum() and acsr.density == pytest.approx(mask.mean())


# -- the paper's row ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [P.window(5, 5), P.blocked(16), P.strided(4)], ids=str)
def test_rows_of_the_paper_are_single_progressions(pattern):
    mask = pattern.dense(64)
    for acsr in (ACSR.from_dense(mask), ACSR.from_pattern(pattern, 64)):
        assert_exact(acsr, mask)
        assert acsr.remainder.nnz == 0
        wrong = 0
        for q in range(64):
            strips = acsr.strips[(acsr.strips[:, 0] <= q) & (q < acsr.strips[:, :2].sum(1))]
            assert len(strips) == 1
            row, _, col, dcol, width, dwidth, stride, count, dcount = strips[0].tolist()
            t = q - row
            start, width, count = col + dcol * t, width + dwidth * t, count + dcount * t
            if count == 1:  # adjacent columns: stride 1
                stride, count = 1, width
            else:
                assert width == 1
            found = start + stride * np.arange(count)
            wrong += not np.array_equal(found, np.flatnonzero(mask[q]))
        assert wrong == 0


def test_a_row_that_is_no_progression_is_still_exact():
    mask = np.zeros((64, 64), bool)
    mask[:, [0, 1, 5, 9]] = True
    acsr = ACSR.from_dense(mask)
    assert_exact(acsr, mask)
    assert len(acsr.pieces) + len(acsr.remainder.rows) > 1 or acsr.remainder.nnz
    one = np.zeros((1, 12), bool)
    one[0, [0, 1, 5, 9]] = True
    assert_exact(ACSR.from_dense(one), one)


# -- exactness ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", library.NAMES)
@pytest.mark.parametrize("shape", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_every_pattern_is_exact(name, shape):
    pattern = library.pattern(name, *shape)
    if pattern is None:
        return  # it needs q_len == kv_len
    mask = pattern.dense(*shape)
    symbolic, analysed = ACSR.from_pattern(pattern, *shape), ACSR.from_dense(mask)
    assert_exact(symbolic, mask)
    assert_exact(analysed, mask)
    assert symbolic == analysed


@settings(max_examples=2000)
@given(library.masks())
def test_random_masks_are_exact(mask):
    assert_exact(ACSR.from_dense(mask), mask)


@settings(max_examples=100)
@given(library.masks())
def test_conversions_round_trip(mask):
    torch = pytest.importorskip("torch")
    acsr = ACSR.from_dense(mask)
    sparse = acsr.to_scipy()
    assert sparse.has_canonical_format and sparse.dtype == bool
    np.testing.assert_array_equal(sparse.toarray(), mask)
    tensor = acsr.to_torch()
    assert tensor.layout == torch.sparse_csr
    np.testing.assert_array_equal(tensor.to_dense().numpy(), mask)
    q, k = acsr.elements()
    np.testing.assert_array_equal(np.stack([q, k], 1), np.argwhere(mask))
    shuffled = np.random.default_rng(0).permutation(np.concatenate([np.arange(len(q))] * 2))  # each twice
    for back in (
        ACSR.from_scipy(sparse),
        ACSR.from_scipy(sparse.tocoo()),
        ACSR.from_torch(tensor),
        ACSR.from_torch(tensor.to_sparse_coo()),
        ACSR.from_torch(torch.from_numpy(mask)),
        ACSR.from_elements(q[shuffled], k[shuffled], *mask.shape),
    ):
        assert back == acsr
        assert_exact(back, mask)


def test_stored_zeros_do_not_attend():
    import scipy.sparse

    torch = pytest.importorskip("torch")
    coo = scipy.sparse.coo_array(([1.0, 0.0, -2.0], ([0, 1, 2], [1, 1, 0])), shape=(3, 4))
    wanted = np.zeros((3, 4), bool)
    wanted[[0, 2], [1, 0]] = True
    assert_exact(ACSR.from_scipy(coo), wanted)
    indices = torch.tensor([[0, 1, 2], [1, 1, 0]])
    assert_exact(ACSR.from_torch(torch.sparse_coo_tensor(indices, [1.0, 0.0, -2.0], (3, 4))), wanted)


# -- algebra -----------------------------------------------------------------------------------------------------------


@st.composite
def pairs(draw):
    a, b = draw(library.masks(48)), draw(library.masks(48))
    q, k = min(len(a), len(b)), min(a.shape[1], b.shape[1])
    return a[:q, :k], b[:q, :k]


@settings(max_examples=150)
@given(pairs())
def test_algebra_is_that_of_matrices(pair):
    a, b = pair
    x, y = ACSR.from_dense(a), ACSR.from_dense(b)
    for got, wanted in ((x & y, a & b), (x | y, a | b), (x - y, a & ~b), (~x, ~a), (x.transpose(), a.T)):
        assert_exact(got, wanted)
    assert (x == y) == np.array_equal(a, b)
    assert ~~x == x and x.transpose().transpose() == x
    assert x != "a mask" and x != ACSR.from_dense(np.ones((len(a) + 1, a.shape[1]), bool))


@settings(max_examples=60)
@given(library.sized_patterns(60, 2), st.data())
def test_algebra_of_symbolic_masks(case, data):
    p, q_len, kv_len = case
    r = data.draw(library.combinations(q_len, kv_len, 2))
    x, y = (ACSR.from_pattern(one, q_len, kv_len) for one in (p, r))
    assert x & y == ACSR.from_pattern(p & r, q_len, kv_len)
    assert x | y == ACSR.from_pattern(p | r, q_len, kv_len)
    assert ~x == ACSR.from_pattern(~p, q_len, kv_len)


# -- what is said about it ---------------------------------------------------------------------------------------------


def test_pieces_are_a_sequence_that_reads_well():
    acsr = ACSR.from_pattern(P.window(2, 2), 10)
    assert [str(piece) for piece in acsr.pieces] == [
        "rows 0+t, t<2: cols 0 width 3+1t",
        "rows 2+t, t<5: cols 0+1t width 5",
        "rows 7+t, t<3: cols 5+1t width 5-1t",
    ]
    assert acsr.pieces[0] == next(iter(acsr.pieces)) and acsr.pieces[1:] == tuple(acsr.pieces)[1:]
    assert acsr.pieces[-1].row == 7 and hash(acsr.pieces[0]) == hash(acsr.pieces[0])
    assert str(acsr).startswith("acsr 10 x 10: nnz 44, density 0.4400, 3 pieces, remainder 0")
    nested = ACSR.from_pattern(P.blocked(4), 64)
    assert len(nested.pieces) == 1 and nested.pieces[0].repeats == ((16, (("row", 4), ("col", 4))),)
    assert nested.nbytes < 400


def test_metadata_is_small():
    """O(1) numbers for a regular mask of any length, whereas its elements are many."""
    for pattern in (P.window(256, 256), P.dilated(1024, 1024, 4), P.strided(64), P.fixed(128, 16)):
        small, large = (ACSR.from_pattern(pattern, n) for n in (8192, 65536))
        assert len(large.pieces) <= len(small.pieces) <= 2000
        assert large.remainder.nnz == 0


@settings(max_examples=100)
@given(library.masks())
def test_block_bits_hold_what_they_are_given(mask):
    shuffled = np.random.default_rng(0).permutation(np.stack(runs_of_dense(mask), 1))
    for bits in (BlockBits.from_dense(mask), BlockBits.from_runs(Runs(*shuffled.T))):
        assert bits.nnz == mask.sum()
        back = np.zeros_like(mask)
        back[bits.elements()] = True
        np.testing.assert_array_equal(back, mask)
    runs = bits.runs()
    back = np.zeros_like(mask)
    for row, start, stop in zip(*runs):
        assert not back[row, start:stop].any()
        back[row, start:stop] = True
    np.testing.assert_array_equal(back, mask)


# -- errors ------------------------------------------------------------------------------------------------------------


def test_errors_say_what_to_do():
    with pytest.raises(InvalidInput, match=r"boolean matrix.*got int64 of shape \(2, 2\).*astype\(bool\)"):
        ACSR.from_dense(np.ones((2, 2), np.int64))
    with pytest.raises(InvalidInput, match="boolean matrix"):
        ACSR.from_dense(np.ones(4, bool))
    a, b = ACSR.from_dense(np.ones((2, 2), bool)), ACSR.from_dense(np.ones((2, 3), bool))
    for combine in (a.__and__, a.__or__, a.__sub__):
        with pytest.raises(InvalidInput, match="2 x 2 and 2 x 3"):
            combine(b)
    for q, k in (([2], [0]), ([0], [2]), ([-1], [0]), ([1], [-1]), ([0, 0], [5, 0])):
        with pytest.raises(InvalidInput, match="inside 2 x 2"):
            ACSR.from_elements(np.array(q), np.array(k), 2, 2)
    with pytest.raises(TypeError):
        hash(a)


def test_a_pattern_that_hides_a_line_cannot_leave():
    class Lying(type(P.window(1, 1))):  # type: ignore[misc]
        def lines(self, q_len, kv_len):
            return P.window(self.left, self.right + 1).lines(q_len, kv_len)

    class Silent(type(P.strided(3))):  # type: ignore[misc]
        def lines(self, q_len, kv_len):
            return P.full().lines(q_len, kv_len)

    for pattern, n in ((Lying(4, 3), 40), (Lying(4, 3), 5000), (Silent(3), 40), (Silent(3), 5000)):
        with pytest.raises(VerifyError, match="please report this pattern"):
            ACSR.from_pattern(pattern, n)
