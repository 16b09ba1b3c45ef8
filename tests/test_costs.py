"""Operations and memory of attention, counted on the matrix of the mask."""

from __future__ import annotations

import numpy as np
import pytest

from splatc import patterns as P
from splatc.errors import InvalidInput
from splatc.sparsify import costs_of

MASKS = {
    "full": P.full(),
    "window": P.window(5, 0),
    "blocks": P.block_mask(np.random.default_rng(0).random((9, 9)) < 0.3, 8),
    "heads": P.per_head([P.causal(), P.window(3, 3)]),
}


@pytest.mark.parametrize("name", MASKS)
def test_counts(name):
    n, dim = 70, 16
    pattern = MASKS[name]
    each = pattern.heads if name == "heads" else (pattern, pattern)
    pairs = sum(int(one.dense(n).sum()) for one in each)
    costs = costs_of(pattern, n, 2, dim, itemsize=4)
    assert costs.pairs == pairs and costs.dense_pairs == 2 * n * n
    assert costs.multiply_adds == 7 * pairs * dim and costs.dense_multiply_adds == 6 * 2 * n * n * dim
    assert costs.dense_bytes == 2 * n * n * 4 and costs.bytes == 2 * n * 4
    assert costs.fewer_operations == pytest.approx(6 * 2 * n * n / (7 * pairs))


@pytest.mark.parametrize("variant, options", [("CF", {}), ("F", {}), ("C", {"density": 0.04})])
def test_the_published_density(variant, options):
    """ListOps: L 2048, blocks of 64, quantile 0.98 or density 0.04, heads of 32."""
    from splatc.sparsify import find_pattern

    rng = np.random.default_rng(1)
    scores = rng.random((2048, 2048)) + 50 * (np.abs(np.subtract.outer(np.arange(2048), np.arange(2048))) < 90)
    found = find_pattern(scores, 64, 0.98, variant=variant, **options)
    costs = costs_of(found.pattern, 2048, 2, 32)
    assert costs.fewer_operations > 5.91 and costs.less_memory > 7.24


def test_layers_of_a_model():
    torch = pytest.importorskip("torch")
    from splatc.nn import SparseAttention
    from splatc.sparsify import SpionAttention, layer_costs

    model = torch.nn.ModuleDict({"one": SpionAttention(16, 2), "two": SparseAttention(16, 4, "window(3, 3)")})
    blocks = P.block_mask(np.eye(8, dtype=bool), 4)
    assert layer_costs(model, 32)["one"].fewer_operations == pytest.approx(6 / 7)
    model["one"].switch(blocks)
    costs = layer_costs(model, 32, 4)
    assert costs["one"] == costs_of(blocks, 32, 2, 8, 4) and costs["one"].fewer_operations == pytest.approx(48 / 7)
    assert costs["two"] == costs_of(P.window(3, 3), 32, 4, 4, 4)
    with pytest.raises(InvalidInput, match="Linear has no SparseAttention"):
        layer_costs(torch.nn.Linear(2, 2), 8)
    with pytest.raises(InvalidInput, match="head_dim is 0"):
        costs_of(P.full(), 8, 1, 0)
