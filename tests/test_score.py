"""Scores as parts of kernels, and which probabilities dropout drops."""

from __future__ import annotations

import numpy as np
import pytest

from splatc.ir.dropout import kept, pair_words, query_words
from splatc.ir.score import ORDER, Score, Softcap, score_of


def test_scores_name_what_they_have() -> None:
    assert not Score() and score_of() == Score()
    score = score_of(softcap=True, relative=True, sinks=True)
    assert score and score.names == ("softcap", "relative", "sinks")
    assert score.has(Softcap) and [type(step) for step in score.biases] == [ORDER[2]]


def test_philox_gives_its_published_words() -> None:
    """The known answers of philox4x32-10 in Random123's kat_vectors, first words, for counters that end in 0."""
    zero = np.array(0)
    assert query_words(0, zero, zero, zero) == 0x6627E8D5


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_its_share_everywhere(p: float) -> None:
    mask = kept(2**40 + 7, p, 2, 2, 512, 512)
    share = mask.mean()
    sigma = (p * (1 - p) / mask.size) ** 0.5
    assert abs(share - (1 - p)) < 5 * sigma
    for axes in ((0, 1, 3), (0, 1, 2)):  # of queries, of keys
        counts = mask.mean(axes)
        assert abs(counts - (1 - p)).max() < 6 * (p * (1 - p) / (4 * 512)) ** 0.5


def test_pairs_of_rows_and_columns_are_not_correlated() -> None:
    signs = kept(3, 0.5, 1, 2, 1024, 1024).astype(np.float64) * 2 - 1
    for a, b in (
        (signs[0, 0, :-1], signs[0, 0, 1:]),
        (signs[0, 0, :, :-1], signs[0, 0, :, 1:]),
        (signs[0, 0], signs[0, 1]),
        (signs[0, 0, :-1, :-1], signs[0, 0, 1:, 1:]),
        (signs[0, 0], signs[0, 0].T),
    ):
        assert abs((a * b).mean()) < 5 / 1024


def test_words_depend_on_the_seed_alone() -> None:
    again = kept(5, 0.3, 1, 3, 40, 50)
    assert (kept(5, 0.3, 2, 3, 64, 80)[:1, :, :40, :50] == again).all()
    assert (kept(6, 0.3, 1, 3, 40, 50) != again).any()
    assert (kept(5 + 2**32, 0.3, 1, 3, 40, 50) != again).any()


def test_mixing_loses_nothing() -> None:
    words = pair_words(np.uint32(12345), np.arange(1 << 16))
    assert len(np.unique(words)) == 1 << 16
