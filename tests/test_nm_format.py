"""N:M selection and the compressed form, against code that goes element by element."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from splatc.errors import InvalidInput
from splatc.formats.nm import decode, encode, keys_of_a_word, prune, select
from splatc.patterns.pruned import Pruning

NM24, NM12 = Pruning(2, 4), Pruning(1, 2)
WAYS = [(NM24, 16), (NM12, 16), (NM12, 32)]
CODES = {(0, 1): 4, (0, 2): 8, (0, 3): 12, (1, 2): 9, (1, 3): 13, (2, 3): 14}  # of the hardware
VALUES = st.sampled_from([-np.inf, -2.0, -1.0, 0.0, 0.5, 3.0])  # many ties


def slowly(row, pruning):
    """(pruned row, chosen positions of each group) by sorting (score, -position) with keys that are not there last."""
    out, chosen = np.full(len(row), -np.inf), []
    for first in range(0, len(row), pruning.m):
        group = range(first, min(first + pruning.m, len(row)))
        best = sorted(group, key=lambda i: (-row[i], i))[: pruning.n]
        chosen.append(sorted(best))
        for i in best:
            out[i] = row[i]
    return out, chosen


@given(st.lists(VALUES, min_size=1, max_size=40), st.sampled_from([NM24, NM12]))
def test_prune(values, pruning):
    row = np.array(values)
    got = prune(row, pruning)
    np.testing.assert_array_equal(got, slowly(row, pruning)[0])
    kept = got > -np.inf
    for first in range(0, len(row), pruning.m):
        group = slice(first, first + pruning.m)
        there = (row[group] > -np.inf).sum()
        assert kept[group].sum() == min(there, pruning.n)


@pytest.mark.parametrize("pruning, bits", WAYS)
@given(st.integers(1, 70), st.integers(0, 10**6), st.booleans())
def test_round_trip(pruning, bits, length, seed, ties):
    rng = np.random.default_rng(seed)
    scores = rng.standard_normal((3, 2, length)).astype(np.float32)
    scores = np.round(scores) if ties else scores
    scores[rng.random(scores.shape) < 0.4] = -np.inf
    c = encode(scores, pruning, bits)
    padded = -(-length // keys_of_a_word(bits)) * keys_of_a_word(bits)
    assert c.words.dtype == np.uint16 and c.words.shape == (3, 2, padded * bits // 256)
    assert c.values.dtype == np.float32 and c.values.shape == (3, 2, padded // 2)
    np.testing.assert_array_equal(decode(c), prune(scores, pruning))


def test_all_pairs_and_their_codes():
    """Every pair of a group of four, in all 16 places of a word and the next."""
    for pair in combinations(range(4), 2):
        for place in range(8):
            scores = np.full(32, -5.0)
            scores[[4 * place + i for i in pair]] = 1.0, 2.0
            nibbles = encode(scores, NM24).words[place // 4] >> 4 * (place % 4) & 15
            assert nibbles == CODES[pair]
    words = encode(np.random.default_rng(0).standard_normal((64, 64)), NM24).words
    codes = words[..., None] >> np.arange(0, 16, 4) & 15
    assert set(np.unique(codes)) == set(CODES.values())


def test_one_of_two():
    c = encode(np.array([3.0, 1.0, 0.0, 2.0] * 4), NM12, 16)  # the same sparsity as pairs of four
    assert c.words.tolist() == [0xCCCC] and c.values.tolist() == [3.0, 2.0] * 4
    c = encode(np.array([3.0, 1.0, 0.0, 2.0] * 4), NM12, 32)
    assert c.words.tolist() == [0xE4E4, 0xE4E4] and c.values.tolist() == [3.0, 2.0] * 4


def test_ties_tails_and_groups_of_few():
    assert encode(np.zeros(16), NM24).words.tolist() == [0x4444]  # the lower keys
    c = encode(np.array([1.0, 2.0, 3.0, 4.0, 5.0]), NM24)
    assert c.words.tolist() == [0x444E] and c.values.tolist() == [3.0, 4.0, 5.0, -np.inf] + 4 * [-np.inf]
    c = encode(np.array([-np.inf, -np.inf, 7.0, -np.inf]), NM24)  # one key: the lowest free place beside it
    assert c.words.tolist() == [0x4448] and c.values[:2].tolist() == [-np.inf, 7.0]
    assert decode(c, 0.0).tolist() == [-np.inf, 0.0, 7.0, 0.0]


def test_nan_is_largest():
    row = np.array([np.nan, 1.0, 2.0, 3.0, np.nan, np.nan, np.nan, np.inf])
    assert select(row, NM24).tolist() == [True, False, False, True, True, True, False, False]


def test_refusals():
    with pytest.raises(InvalidInput, match=r"sparse tensor cores take nm\(1, 2\) only"):
        encode(np.zeros(16), NM24, 32)
    with pytest.raises(InvalidInput, match="bits is 8"):
        encode(np.zeros(16), NM24, 8)
