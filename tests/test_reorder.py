"""Orders of irregular masks: permutations, tiles saved where there are some to save, the same attention."""

from __future__ import annotations

import numpy as np
import pytest

import splatc
from splatc import patterns as P
from splatc.errors import InvalidInput
from splatc.formats.reorder import band, band_both, cluster_both, clusters
from splatc.oracle import attention as oracle

N = 512


def shuffled(mask, seed=0, both=False):
    """The mask with its positions in random places; with ``both`` keys in others than queries."""
    rng = np.random.default_rng(seed)
    rows = rng.permutation(len(mask))
    return mask[rows][:, rng.permutation(len(mask)) if both else rows]


def communities(n=N, count=8, inside=0.5, outside=0.002, seed=0):
    """A graph of groups that mostly link among themselves."""
    rng = np.random.default_rng(seed)
    group = np.arange(n) * count // n
    linked = rng.random((n, n)) < np.where(group[:, None] == group, inside, outside)
    return linked | linked.T | np.eye(n, dtype=bool)


MASKS = {
    "shuffled band": shuffled(P.window(12, 12).dense(N)),
    "both sides shuffled": shuffled(P.window(12, 12).dense(N), both=True),
    "communities": shuffled(communities()),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("size", [1, 64, 100])
def test_orders_are_permutations(name, size):
    for order in (clusters(MASKS[name], size), band(MASKS[name]), *cluster_both(MASKS[name], size, 64),
                  *band_both(MASKS[name])):  # fmt: skip
        assert sorted(order.tolist()) == list(range(N))
    wide = np.random.default_rng(0).random((70, 130)) < 0.1
    wide[3] = False
    for order, count in zip([*cluster_both(wide, 16, 32), *band_both(wide)], [70, 130, 70, 130], strict=True):
        assert sorted(order.tolist()) == list(range(count))


def test_a_group_is_what_is_nearest():
    """One row after the other, as the rule reads."""
    matrix = np.random.default_rng(1).random((30, 40)) < 0.2
    order, left, seed = clusters(matrix, 8).tolist(), set(range(30)), 0

    def near(i, j):
        return (matrix[i] & matrix[j]).sum() / (matrix[i] | matrix[j]).sum()

    while left:
        ranked = sorted(left, key=lambda i: (i != seed, -near(seed, i), i))
        group, order = order[:8], order[8:]
        assert group == ranked[:8]
        left -= set(group)
        seed = ranked[8] if len(ranked) > 8 else 0


def test_a_band_is_found_again():
    for name, order in (("shuffled band", (band(MASKS["shuffled band"]),) * 2),
                        ("both sides shuffled", band_both(MASKS["both sides shuffled"]))):  # fmt: skip
        rows, cols = np.nonzero(MASKS[name][order[0]][:, order[1]])
        assert np.abs(rows - cols).max() <= 60, name


@pytest.mark.parametrize("name, symmetric, cpu, hopper", [
    ("band", False, 0.15, 0.5), ("band", True, 0.15, 0.3), ("both", False, 0.15, 0.5), ("graph", False, 0.5, 0.95),
    ("graph", True, 0.65, 0.8),
])  # fmt: skip
def test_covers_get_cheaper(name, symmetric, cpu, hopper):
    n = 2048
    near = P.window(40, 40).dense(n)
    mask = shuffled(communities(n, 16, 0.3, 1e-4) if name == "graph" else near, both=name == "both")
    for target, dtype, share in (("cpu", "float32", cpu), ("sm_90a", "bfloat16", hopper)):
        order = splatc.reorder(mask, target=target, dtype=dtype, symmetric=symmetric)
        assert order.method != "none" and order.after < share * order.before
        assert (order.pattern.dense(n, n) == mask[order.queries][:, order.keys]).all()


def test_what_is_in_order_stays():
    for mask in (P.window(20, 20), P.causal(), np.ones((256, 256), bool)):
        order = splatc.reorder(mask, seq_len=256, target="cpu")
        assert order.method == "none" and order.after == order.before
        assert (order.queries == np.arange(256)).all() and (order.keys == np.arange(256)).all()


def test_attention_in_another_order():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 2, N, 64)).astype(np.float32) for _ in range(3))
    for name in ("both sides shuffled", "communities"):
        order = splatc.reorder(MASKS[name], target="cpu")
        o, lse = order.attention(q, k, v, return_lse=True)
        wanted, wanted_lse = oracle(q, k, v, MASKS[name])
        assert np.allclose(o, wanted, atol=1e-5) and np.allclose(lse, wanted_lse, atol=1e-5), name
    torch = pytest.importorskip("torch")
    given = [torch.from_numpy(x).requires_grad_() for x in (q, k, v)]
    do = torch.from_numpy(rng.standard_normal(q.shape).astype(np.float32))
    got = torch.autograd.grad(order.attention(*given), given, do)
    plain = torch.nn.functional.scaled_dot_product_attention(*given, attn_mask=torch.from_numpy(MASKS[name]))
    for a, b in zip(got, torch.autograd.grad(plain, given, do), strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    same = splatc.reorder(MASKS["communities"], target="cpu", symmetric=True)
    assert (same.queries == same.keys).all() and same.method != "none"


def test_bad_input():
    with pytest.raises(InvalidInput, match="square masks"):
        splatc.reorder(np.ones((4, 8), bool), symmetric=True)
    with pytest.raises(InvalidInput, match="no PerHead"):
        splatc.reorder(P.per_head([P.causal(), P.full()]), seq_len=8)
    with pytest.raises(InvalidInput, match="reorder looks at up to"):
        splatc.reorder(P.causal(), seq_len=1 << 16)
    order = splatc.reorder(np.eye(8, dtype=bool), target="cpu")
    with pytest.raises(InvalidInput, match="v has shape"):
        order.attention(*(np.zeros((1, 1, n, 4), np.float32) for n in (8, 8, 9)))
