"""SparseK attention against one query after the other in float64, gradients by differences, a task that it learns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from splatc.errors import InvalidInput

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from splatc.nn import SparseKAttention  # noqa: E402
from splatc.nn.sparsek import sparsek_attention  # noqa: E402
from tests.test_sparsek import bisected  # noqa: E402


def by_query(q, k, v, scores, keep, window):
    """The definition: (heads, n, dim) of arrays without a batch; k and v of all heads."""
    out = np.zeros((*q.shape[:2], v.shape[-1]))
    for h, i in np.ndindex(q.shape[0], q.shape[1]):
        share = np.zeros(i + 1)
        share[max(i - window + 1, 0) :] = 1
        older = scores[h, : max(i - window + 1, 0)]
        if len(older):
            best = np.argsort(-older, kind="stable")[:keep]
            best = best[older[best] > -np.inf]
            if len(best):
                p = bisected(older[older > -np.inf], keep)
                share[best] = np.sort(p)[::-1][: len(best)]
        s = k[h, : i + 1] @ q[h, i] / np.sqrt(q.shape[-1])
        weight = share * np.exp(s - s.max())
        out[h, i] = weight @ v[h, : i + 1] / weight.sum()
    return out


def inputs(heads, kv_heads, n, batch=2, spread=1.0):
    random = torch.Generator().manual_seed(n)
    dim = 8
    shapes = (batch, heads, n, dim), (batch, kv_heads, n, dim), (batch, kv_heads, n, dim), (batch, kv_heads, n)
    q, k, v, scores = (torch.randn(*shape, generator=random, dtype=torch.float64) for shape in shapes)
    return [q, k, v, scores * spread]


@pytest.mark.parametrize("n, keep, window, spread", [(150, 5, 7, 1.0), (130, 40, 1, 0.05), (64, 3, 64, 1.0),
                                                     (200, 4, 90, 3.0), (97, 200, 3, 1.0)])  # fmt: skip
def test_against_the_definition(n, keep, window, spread):
    q, k, v, scores = inputs(4, 2, n, spread=spread)
    got = sparsek_attention(q, k, v, scores, keep, window)
    each = (x.repeat_interleave(2, 1) if x.shape[1] == 2 else x for x in (q, k, v, scores))
    wanted = np.stack([by_query(a, b, c, d, keep, window)
                       for a, b, c, d in zip(*(x.numpy() for x in each), strict=True)])  # fmt: skip
    assert np.allclose(got, wanted, atol=1e-10)
    rounded = sparsek_attention(q.float(), k.float(), v.float(), scores.float(), keep, window)
    assert rounded.dtype == torch.float32 and np.allclose(rounded, wanted, atol=2e-4)


def test_keys_whose_scores_are_minus_infinity():
    """They are attended to in the window and never after it: whole blocks of them, all, some."""
    n, keep, window = 200, 6, 9
    q, k, v, scores = inputs(2, 2, n, batch=3)
    out = torch.rand(3, 2, n, generator=torch.Generator().manual_seed(0)) < 0.5
    out[0, :, :130], out[1] = True, True
    scores = scores.masked_fill(out, -torch.inf).requires_grad_()
    got = sparsek_attention(q, k, v, scores, keep, window)
    each = (x.detach().numpy() for x in (q, k, v, scores))
    wanted = np.stack([by_query(a, b, c, d, keep, window) for a, b, c, d in zip(*each)])
    assert np.allclose(got.detach(), wanted, atol=1e-10)
    (gradient,) = torch.autograd.grad(got.square().sum(), scores)
    assert torch.isfinite(gradient).all() and (gradient[out] == 0).all() and (gradient[0] != 0).any()


def test_a_score_that_is_nan_is_seen():
    q, k, v, scores = inputs(1, 1, 40, batch=1)
    scores[..., 20] = torch.nan
    assert sparsek_attention(q, k, v, scores, 3, 4)[0, 0, 24:].isnan().all()


def test_gradients():
    tensors = [x.requires_grad_() for x in inputs(2, 1, 80, batch=1)]
    torch.manual_seed(0)
    weight = torch.randn(1, 2, 80, 8, dtype=torch.float64)

    def f(q, k, v, scores):
        return (sparsek_attention(q, k, v, scores, 4, 6) * weight).sum()

    got = torch.autograd.grad(f(*tensors), tensors)
    tensors = [x.detach() for x in tensors]
    for i, (x, g) in enumerate(zip(tensors, got, strict=True)):
        direction = torch.randn_like(x)
        ends = [f(*(x + step * direction if j == i else y for j, y in enumerate(tensors))) for step in (1e-6, -1e-6)]
        assert float((ends[0] - ends[1]) / 2e-6) == pytest.approx(float((g * direction).sum()), rel=1e-5), i
    assert (got[3] != 0).sum() > 10


@pytest.mark.parametrize("step", [None, 0.5, 1.5])
def test_a_dropped_key_never_returns(step):
    """So a query may gather what was kept before its block: keys beyond those would be missed else. With a step, many
    scores are equal."""
    from splatc.nn.sparsek import QUERIES, _kept

    scores = torch.randn(1, 1, 4 * QUERIES, dtype=torch.float64) * 0.5
    scores = scores if step is None else (scores / step).round() * step
    index, share = _kept(scores, 6, 10)
    kept = torch.zeros(4 * QUERIES, 4 * QUERIES, dtype=torch.bool)
    for block in range(4):
        row, column = (share[0, 0, block] > 0).nonzero(as_tuple=True)
        kept[block * QUERIES + row, index[0, 0, block][column]] = True
    kept = kept[10:, : 3 * QUERIES]
    place = torch.arange(len(kept))[:, None] - torch.arange(3 * QUERIES)
    was_there = kept.int().cummax(0).values.bool() & (place >= 0)
    gone = was_there & ~kept
    assert gone.any() and not (gone[:-1] & kept[1:]).any() and int(kept.sum(1).max()) <= 6


@pytest.mark.parametrize("step", [0.5, 10.0])
def test_what_comes_later_changes_nothing_before(step):
    q, k, v = (torch.randn(1, 2, 300, 16) for _ in range(3))
    scores = (torch.randn(1, 2, 300) / step).round() * step
    whole = sparsek_attention(q, k, v, scores, keep=5, window=20)
    for n in (130, 257):
        a, b, c, d = (x[:, :, :n] for x in (q, k, v, scores))
        part = sparsek_attention(a, b, c, d, keep=5, window=20)
        torch.testing.assert_close(whole[:, :, :n], part, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_a_traced_module():
    torch.manual_seed(4)
    layer = SparseKAttention(32, 4, keep=4, window=8, num_kv_heads=2)
    traced = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for n in (150, 70, 8):  # the last is all window
        x = torch.randn(2, n, 32)
        y, wanted = traced(x), layer(x)
        torch.testing.assert_close(y, wanted)
        gradients = [torch.autograd.grad(one.square().sum(), list(layer.parameters()), allow_unused=True)
                     for one in (y, wanted)]  # fmt: skip
        torch.testing.assert_close(*gradients)


# -- a task: copy what stood long ago ----------------------------------------------------------------------------------

VALUES, LENGTH, WIDTH = 4, 40, 32


def copying(batch, random):
    """Inputs (batch, LENGTH, WIDTH), each a value and noise; one of the first has a mark, and the last asks for its
    value: (batch,)."""
    x = torch.randn(batch, LENGTH, WIDTH, generator=random) * 0.1
    values = torch.randint(VALUES, (batch, LENGTH), generator=random)
    place = torch.randint(LENGTH - 8, (batch, 1), generator=random)
    x[..., 1 : 1 + VALUES] += nn.functional.one_hot(values, VALUES)
    x[..., 0].scatter_add_(1, place, torch.ones(batch, 1))
    x[:, -1] = torch.eye(WIDTH)[-1]
    return x, values.gather(1, place)[:, 0]


def trained(learn_scores):
    """The share of values copied right after training, with or without gradients through the choice of keys."""
    torch.manual_seed(0)
    random = torch.Generator().manual_seed(0)
    attention, out = SparseKAttention(WIDTH, 2, keep=4, window=2), nn.Linear(WIDTH, VALUES)
    if not learn_scores:
        attention.score_proj.register_forward_hook(lambda module, given, scores: scores.detach())
    optimizer = torch.optim.Adam([*attention.parameters(), *out.parameters()], 2e-2)
    for _ in range(150):
        x, values = copying(16, random)
        loss = nn.functional.cross_entropy(out(attention(x)[:, -1]), values)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, values = copying(256, random)
    with torch.no_grad():
        return float((out(attention(x)[:, -1]).argmax(-1) == values).double().mean())


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_module_learns_what_to_keep():
    learned, by_chance = trained(True), trained(False)
    assert learned > 0.9 and by_chance < 0.5, (learned, by_chance)


@pytest.mark.parametrize("change, words", [
    ({"keep": 0}, "keep is 0"), ({"window": 0}, "window 0"), ({"scores": torch.zeros(2, 3, 5)}, "they must be"),
    ({"k": torch.zeros(2, 2, 6, 8)}, "of one sequence"),
])  # fmt: skip
def test_bad_input(change, words):
    given: dict[str, Any] = dict(zip(["q", "k", "v", "scores"], inputs(2, 2, 5), strict=True))
    given |= {"keep": 2, "window": 2} | change
    with pytest.raises(InvalidInput, match=words):
        sparsek_attention(**given)


def test_bad_sizes():
    with pytest.raises(InvalidInput, match="multiple of the next"):
        SparseKAttention(30, 4, keep=2, window=2)
    with pytest.raises(InvalidInput, match="keep is 0"):
        SparseKAttention(32, 4, keep=0, window=2)
    with pytest.raises(InvalidInput, match="embed_dim"):
        SparseKAttention(32, 4, keep=2, window=2)(torch.zeros(3, 32))
    assert "keep=2" in repr(SparseKAttention(32, 4, keep=2, window=2))
