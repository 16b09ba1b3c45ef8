"""Regularity is found from the matrix alone, and a wrong analysis cannot leave."""

import numpy as np
import pytest
from hypothesis import given, settings

from splatc import patterns as P
from splatc.errors import VerifyError
from splatc.formats import analysis
from splatc.formats.acsr import ACSR
from splatc.formats.analysis import fold_dense, runs_of_dense
from splatc.formats.strips import unit_runs
from tests import library

S = 8192
DOCUMENTS = np.diff([0, *np.sort(np.random.default_rng(0).choice(S, 11, replace=False)), S]).tolist()

# The patterns on which the peers were measured.
REGULAR = {
    "full": P.full(),
    "causal": P.causal(),
    "causal_win1024": P.window(1023, 0),
    "causal_win256": P.window(255, 0),
    "win_pm256": P.window(256, 256),
    "longformer": P.longformer(256, 64),
    "dilated4_pm1024": P.dilated(1024, 1024, 4),
    "dilated2_pm512": P.dilated(512, 512, 2),
    "st_strided128": P.causal() & (P.window(127, 0) | P.strided(128)),
    "strided64": P.strided(64),
    "strided8": P.strided(8),
    "st_fixed128_16": P.causal() & P.fixed(128, 16),
    "bigbird64": P.bigbird(64, 3, 2, 3),
    "blocked256": P.blocked(256),
    "doc_causal": P.documents(DOCUMENTS) & P.causal(),
    "sink_win1024": P.causal() & (P.sink(4) | P.window(1023, 0)),
    "prefix_lm1024": P.prefix(1024),
}


@pytest.mark.parametrize("name", REGULAR)
def test_regularity_is_found_from_the_matrix(name):
    pattern = REGULAR[name]
    symbolic = ACSR.from_pattern(pattern, S)
    mask = pattern.dense(S)
    analysed = ACSR.from_dense(mask)
    assert symbolic.remainder.nnz == analysed.remainder.nnz == 0
    assert len(analysed.pieces) <= 2 * len(symbolic.pieces)
    assert analysed.nnz == symbolic.nnz == mask.sum()
    assert analysed == symbolic


# At odd lengths and sizes, where the last block or residue is cut short. "mask" and the like are not regular.
IRREGULAR = {"mask", "block_mask", "random_blocks", "bigbird", "two_residues"}


@pytest.mark.parametrize("name", sorted(set(library.LIBRARY) - IRREGULAR))
@pytest.mark.parametrize("shape", [(1000, 1000), (1000, 617)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_regular_patterns_leave_little_to_bits(name, shape):
    analysed = ACSR.from_dense(library.pattern(name, *shape).dense(*shape))
    assert analysed.remainder.nnz <= 0.05 * analysed.nnz


def test_noise_goes_to_bits_and_leaves_the_window():
    mask = P.window(64, 64).dense(1024)
    rng = np.random.default_rng(0)
    mask[rng.integers(0, 1024, 40), rng.integers(0, 1024, 40)] ^= True
    acsr = ACSR.from_dense(mask)
    np.testing.assert_array_equal(acsr.to_dense(), mask)
    assert acsr.nbytes < mask.sum() // 2  # an index is four bytes


@settings(max_examples=200)
@given(library.masks(64))
def test_runs_and_row_runs_rebuild_the_matrix(mask):
    for runs in (runs_of_dense(mask), unit_runs(fold_dense(mask))):
        back = np.zeros(mask.shape, np.int8)
        for row, start, stop in zip(*runs):
            back[row, start:stop] += 1
        np.testing.assert_array_equal(back, mask)
    runs = runs_of_dense(mask)
    order = np.lexsort((runs.start, runs.row))
    np.testing.assert_array_equal(order, np.arange(len(order)))
    touching = (runs.row[1:] == runs.row[:-1]) & (runs.start[1:] <= runs.stop[:-1])
    assert not touching.any()


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (64, 64), (65, 63)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("value", [False, True])
def test_constant_matrices(shape, value):
    mask = np.full(shape, value)
    acsr = ACSR.from_dense(mask)
    np.testing.assert_array_equal(acsr.to_dense(), mask)
    assert len(acsr.pieces) == value and acsr.remainder.nnz == 0 and acsr.nnz == mask.sum()


def test_equal_hashes_of_unequal_rows_do_no_harm(monkeypatch):
    monkeypatch.setattr(analysis, "_row_hashes", lambda packed: np.zeros(len(packed), np.uint64))
    mask = np.random.default_rng(0).random((40, 33)) < 0.3
    np.testing.assert_array_equal(ACSR.from_dense(mask).to_dense(), mask)


def test_a_wrong_step_of_the_analysis_is_caught(monkeypatch):
    mask = (P.window(3, 3) | P.strided(9)).dense(60)
    columns, rows, nest = analysis.fold_columns, analysis.fold_rows, analysis.nest

    def wrong_columns(row, start, width):
        runs = columns(row, start, width)
        return runs._replace(width=runs.width + (np.arange(len(runs.width)) == 5))

    def wrong_rows(runs):
        strips = rows(runs).copy()
        strips[0, 2] += 1
        return strips

    def wrong_nest(strips):
        pieces = nest(strips).copy()
        pieces[-1, 4] += 1
        return pieces

    for name, wrong in (("fold_columns", wrong_columns), ("fold_rows", wrong_rows), ("nest", wrong_nest)):
        with monkeypatch.context() as patch:
            patch.setattr(analysis, name, wrong)
            with pytest.raises(VerifyError, match="please report this mask"):
                ACSR.from_dense(mask)
    np.testing.assert_array_equal(ACSR.from_dense(mask).to_dense(), mask)
