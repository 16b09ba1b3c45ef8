"""SparseK against bisection in float64, one row after the other; gradients by finite differences and by the formula."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from splatc.errors import InvalidInput

torch = pytest.importorskip("torch")

from splatc.sparsify import sparsek  # noqa: E402
from splatc.sparsify.projection import thresholds  # noqa: E402


def bisected(z: np.ndarray, k: float) -> np.ndarray:
    """The projection of one vector."""
    if len(z) <= k:
        return np.ones(len(z))
    low, high = z.min() - 1, z.max()
    for _ in range(70):
        middle = (low + high) / 2
        low, high = (middle, high) if np.clip(z - middle, 0, 1).sum() > k else (low, middle)
    return np.clip(z - high, 0, 1)


@pytest.mark.parametrize("n", [1, 2, 17, 129])
@pytest.mark.parametrize("k", [1, 3, 16.5, 200])
@pytest.mark.parametrize("spread", [0.1, 1.0, 30.0])
def test_the_projection(n, k, spread):
    z = np.random.default_rng(n).standard_normal((2, 3, n)) * spread
    wanted = np.stack([[bisected(row, k) for row in head] for head in z])
    got = sparsek(torch.from_numpy(z), k)
    assert np.allclose(got, wanted, atol=1e-12) and np.allclose(got.sum(-1), min(k, n))
    assert np.allclose(sparsek(torch.from_numpy(z).float(), k), wanted, atol=1e-5 * max(spread, 1))
    prefixes = sparsek(torch.from_numpy(z), k, causal=True)
    for i in range(0, n, 1 + n // 16):
        row = np.stack([[bisected(one[: i + 1], k) for one in head] for head in z])
        assert np.allclose(prefixes[..., i, : i + 1], row, atol=1e-12) and (prefixes[..., i, i + 1 :] == 0).all()


def test_sparsemax_and_ties():
    z = torch.tensor([2.0, 1.5, 0.0, -3.0])
    assert sparsek(z, 1).tolist() == pytest.approx([0.75, 0.25, 0, 0])
    assert sparsek(torch.zeros(6), 3).tolist() == pytest.approx([0.5] * 6)
    assert sparsek(torch.tensor([10.0, 10.0, 0.0, 0.0]), 3).tolist() == pytest.approx([1, 1, 0.5, 0.5])


def test_thresholds_never_fall():
    z = torch.randn(2, 300, dtype=torch.float64)
    tau = thresholds(z, 7, causal=True)
    assert (tau[:, :7] == -torch.inf).all() and (tau[:, 8:] >= tau[:, 7:-1] - 1e-12).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("k", [1, 4])
def test_gradients(causal, k):
    torch.manual_seed(k)
    z = (torch.randn(2, 11, dtype=torch.float64) * torch.tensor([[0.7], [5.0]])).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sparsek(x, k, causal=causal), (z,), eps=1e-7)
    p = sparsek(z, k)
    free = ((p > 0) & (p < 1)).double()
    jacobian = torch.diag_embed(free) - free[:, :, None] * free[:, None, :] / free.sum(-1).clamp_min(1)[:, None, None]
    g = torch.randn_like(p)
    (got,) = torch.autograd.grad(p, z, g)
    assert torch.allclose(got, (jacobian @ g[..., None])[..., 0])


def test_rows_in_parts(monkeypatch):
    z = torch.randn(2, 33, dtype=torch.float64, requires_grad=True)
    whole = sparsek(z, 5, causal=True)
    (wanted,) = torch.autograd.grad(whole.square().sum(), z)
    monkeypatch.setattr("splatc.sparsify.projection.LIMIT", 300)
    parts = sparsek(z, 5, causal=True)
    assert torch.equal(parts, whole) and torch.allclose(torch.autograd.grad(parts.square().sum(), z)[0], wanted)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("k", [1, 4.5, 9, 40])
def test_scores_of_minus_infinity_are_never_chosen(causal, k):
    random = torch.Generator().manual_seed(0)
    z = torch.randn(4, 20, dtype=torch.float64, generator=random) * torch.tensor([[0.3], [3.0], [1.0], [1.0]])
    out = torch.rand(4, 20, generator=random) < 0.5
    out[2, :3], out[2, 3:], out[3] = True, False, True  # from the beginning on; all
    z = z.masked_fill(out, -torch.inf).requires_grad_()
    p = sparsek(z, k, causal=causal)
    for row, mine, kept in zip(p.detach(), z.detach(), ~out):
        for i in range(20) if causal else [19]:
            among = kept & (torch.arange(20) <= i)
            wanted = torch.zeros(20, dtype=torch.float64)
            if among.any():
                wanted[among] = torch.from_numpy(bisected(mine[among].numpy(), k))
            assert torch.allclose(row[i] if causal else row, wanted, atol=1e-12)
    weight = torch.randn(p.shape, generator=random)
    (gradient,) = torch.autograd.grad((p * weight).sum(), z)
    assert torch.isfinite(gradient).all() and (gradient[out] == 0).all()
    if not causal:
        kept = z[0].detach()[~out[0]].requires_grad_()
        (wanted,) = torch.autograd.grad((sparsek(kept, k) * weight[0, ~out[0]]).sum(), kept)
        assert torch.allclose(gradient[0, ~out[0]], wanted)


def test_nan_stays_visible():
    z = torch.tensor([1.0, torch.nan, 0.5, -torch.inf, 0.1])
    assert sparsek(z, 2).isnan().tolist() == [True, True, True, False, True]
    assert sparsek(z, 9).isnan().tolist() == [False, True, False, False, False]
    assert sparsek(z, 2, causal=True).isnan().any(-1).tolist() == [False, True, True, True, True]


@pytest.mark.parametrize("z, k, words", [
    (torch.zeros(3, dtype=torch.bfloat16), 1, "must be float32"),
    (torch.zeros(3, 0), 1, "n > 0"),
    (torch.zeros(()), 1, "n > 0"),
    (torch.zeros(3), 0, "k is 0"),
])  # fmt: skip
def test_wrong_scores(z: Any, k: float, words: str):
    with pytest.raises(InvalidInput, match=words):
        sparsek(z, k)
