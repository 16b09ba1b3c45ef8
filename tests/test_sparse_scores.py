"""SparseScores: conversions to and from dense and sparse matrices, and the memory of values and of what says where."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import scipy.sparse
import torch

import splatc
from splatc import patterns as P
from splatc.errors import InvalidInput
from splatc.formats.acsr import ACSR
from splatc.runtime.structure import structure_of
from tests.test_products import MASKS, numpy, tensors


@pytest.mark.parametrize("kind", ["torch", "numpy"])
@pytest.mark.parametrize("name", ["window", "strided", "global", "no_rows", "empty"])
def test_conversions(kind, name):
    q, k, _ = tensors(2, 3, 3, (50, 60), 16, 16)
    if kind == "numpy":
        q, k = numpy(q, k)
    scores = splatc.sddmm(q, k, MASKS[name])
    mask, dense = MASKS[name].dense(50, 60), scores.to_dense()
    assert type(dense) is type(q) and dense.shape == (2, 3, 50, 60)
    filled = np.asarray(scores.to_dense(fill=-np.inf))
    np.testing.assert_array_equal(np.isneginf(filled), np.broadcast_to(~mask, filled.shape))
    again = splatc.SparseScores.from_dense(dense, MASKS[name])
    np.testing.assert_array_equal(again.values, scores.values)
    at = {"batch": 1, "head": 2}
    csr, sparse = scores.to_scipy(**at), scores.to_torch(**at)
    np.testing.assert_array_equal(csr.toarray(), dense[1, 2])
    np.testing.assert_array_equal(sparse.to_dense(), dense[1, 2])
    for one in (splatc.SparseScores.from_scipy(csr), splatc.SparseScores.from_torch(sparse)):
        np.testing.assert_array_equal(one.values[0, 0], scores.values[1, 2])
        np.testing.assert_array_equal(one.to_dense()[0, 0], dense[1, 2])


@pytest.mark.parametrize("kind", ["torch", "numpy"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_conversions_of_types(kind, dtype):
    if (kind, dtype) == ("numpy", "bfloat16"):
        pytest.skip("NumPy has none")
    q, k = (x.to(getattr(torch, dtype)) for x in tensors(1, 1, 1, (20, 30), 16, 16)[:2])
    if kind == "numpy":
        q, k = q.numpy(), k.numpy()
    scores = splatc.sddmm(q, k, P.window(5, 3))
    dense = torch.as_tensor(scores.to_dense())[0, 0]
    np.testing.assert_array_equal(scores.to_scipy().toarray(), dense.float())
    sparse = scores.to_torch()
    assert str(sparse.dtype) == f"torch.{dtype}" and torch.equal(sparse.to_dense(), dense)
    for one in (sparse, sparse.to_sparse_coo(), sparse.to_sparse_csc()):
        again = splatc.SparseScores.from_torch(one)
        assert again.dtype == dtype and torch.equal(again.values, torch.as_tensor(scores.values))


@pytest.mark.parametrize(("make", "given"), [
    (splatc.SparseScores.from_torch, torch.ones(3, 3)), (splatc.SparseScores.from_torch, np.ones((3, 3))),
    (splatc.SparseScores.from_torch, torch.ones(2, 3, 3).to_sparse_csr()),
    (splatc.SparseScores.from_torch, torch.ones(4, 4).to_sparse_bsr(2)),
    (splatc.SparseScores.from_scipy, np.ones((3, 3))),
    (splatc.SparseScores.from_scipy, scipy.sparse.coo_array(np.ones(3))),
])  # fmt: skip
def test_what_is_no_sparse_matrix(make, given):
    with pytest.raises(InvalidInput, match=r"matrix is .*: give a (torch|scipy).*sparse"):
        make(given)


def test_matrices_from_elsewhere():
    """Unsorted entries, zeros among them, duplicates."""
    coo = scipy.sparse.coo_array(([1.0, 2.0, 0.0, 4.0], ([2, 0, 0, 2], [1, 3, 1, 1])), shape=(3, 4))
    scores = splatc.SparseScores.from_scipy(coo)
    np.testing.assert_array_equal(scores.values, [[[0.0, 2.0, 5.0]]])
    np.testing.assert_array_equal(scores.elements(), [[0, 0, 2], [1, 3, 1]])
    unsorted = torch.sparse_csr_tensor(torch.tensor([0, 2, 3]), torch.tensor([2, 0, 1]), torch.tensor([7.0, 8.0, 9.0]),
                                       size=(2, 3), check_invariants=False)  # fmt: skip
    np.testing.assert_array_equal(splatc.SparseScores.from_torch(unsorted).values, [[[8.0, 7.0, 9.0]]])
    v = np.arange(36.0).reshape(4, 9)
    np.testing.assert_array_equal(splatc.spmm(scores, v[None, None])[0, 0], coo.toarray() @ v)


def test_memory_is_of_the_elements():
    """A global token and a window: every row but one has 17 elements. Nothing is as wide as that one row."""
    size, pattern = 4096, P.window(8, 8) | P.global_rows(1)
    nnz = ACSR.from_pattern(pattern, size).nnz
    assert nnz < 19 * size
    q, k, v = (np.ones((1, 2, size, 9), np.float32) for _ in range(3))
    splatc.spmm(splatc.softmax(splatc.sddmm(q, k, pattern)), v)  # makes the tables
    tracemalloc.start()
    probs, lse = splatc.softmax(splatc.sddmm(q, k, pattern), return_lse=True)
    o = splatc.spmm(probs, v)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert probs.nbytes == probs.values.nbytes == 2 * nnz * 4
    assert peak < 2.1 * probs.nbytes + lse.nbytes + o.nbytes
    assert probs.structure.nbytes < 1.5 * nnz * 4  # of both walks, for any batch and heads; dense scores: 64 MB a head


def test_metadata_is_small_where_masks_are_dense_enough():
    """At the densities of SPLAT's masks, tables are a few percent of the values of one head."""
    for pattern in (P.window(256, 256), P.blocked(512), P.strided(8)):
        structure = structure_of(pattern, 2048, 2048)
        assert structure._rows and structure._columns
        assert structure.nbytes < 0.06 * structure.orders[0].nnz * 4
