"""N:M attention on a Hopper GPU against the float64 oracle, fresh random inputs each time, and which keys it keeps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import splatc
from splatc import oracle
from splatc import patterns as P
from splatc.formats.nm import prune
from splatc.patterns.pruned import ONE_OF_TWO, RATIOS, TWO_OF_FOUR, Pruned, Pruning

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
                       reason="needs a Hopper GPU"),
]  # fmt: skip
STATIC = {
    "full": P.full(), "causal": P.causal(), "window": P.causal() & P.window(200, 0), "longformer": P.longformer(33, 5),
    "blocked": P.blocked(64), "nothing": P.window(5, 5) & ~P.window(9, 9),
}  # fmt: skip
both_ratios = pytest.mark.parametrize("pruning", RATIOS, ids=str)
SIZES = [(1, 1), (17, 3), (127, 128), (129, 129), (300, 130), (1024, 1024), (1000, 1001)]


def draw(q_len: int, kv_len: int, dim: int, dtype: str, heads: int = 4, kv_heads: int = 2) -> list[Any]:
    """Fresh random q, k, v; k is strided (bshd memory)."""
    of = getattr(torch, dtype)
    q = torch.randn(2, heads, q_len, dim, device="cuda").to(of)
    k = torch.randn(2, kv_len, kv_heads, dim, device="cuda").to(of).transpose(1, 2)
    v = torch.randn(2, kv_heads, kv_len, dim, device="cuda").to(of)
    return [q, k, v]


def wide(x: Any) -> np.ndarray:
    return np.asarray(x.double().cpu().numpy())


def dynamic(pattern: Any, pruning: Pruning) -> Pruned:
    """Of the keys of a static pattern those that a pruning keeps."""
    both = pattern & P.nm(pruning.n, pruning.m)
    assert isinstance(both, Pruned)
    return both


def attend(pattern: Any, q: Any, k: Any, v: Any, pruning: Pruning = TWO_OF_FOUR) -> tuple[Any, Any]:
    o, lse = splatc.attention(q, k, v, dynamic(pattern, pruning), return_lse=True, enable_gqa=True)
    return o, lse


def check(pattern: Any, q: Any, k: Any, v: Any, *, pruning: Pruning, most: float = 1e-2) -> None:
    o, lse = attend(pattern, q, k, v, pruning)
    lengths = q.shape[2], k.shape[2]
    want, want_lse = oracle.attention(wide(q), wide(k), wide(v), pattern.dense(*lengths), pruning=pruning)
    got, got_lse = o.double().cpu().numpy(), lse.double().cpu().numpy()
    finite = np.isfinite(want_lse)
    assert np.array_equal(np.isneginf(got_lse), ~finite)
    assert not got[~finite].any()
    assert oracle.relative_error(got, want) < most
    assert np.abs(got_lse[finite] - want_lse[finite]).max(initial=0) < 2e-3


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", STATIC)
@both_ratios
def test_patterns_and_lengths(pruning: Pruning, name: str, dtype: str, dim: int) -> None:
    for q_len, kv_len in SIZES:
        check(STATIC[name], *draw(q_len, kv_len, dim, dtype), pruning=pruning)


@pytest.mark.parametrize(("dim", "tile"), [(64, (192, 128)), (64, (128, 128)), (128, (128, 128)), (128, (128, 64)),
                                           (128, (64, 128)), (96, (128, 128)), (256, (128, 64))])  # fmt: skip
@both_ratios
def test_tiles_and_head_dims(pruning: Pruning, dim: int, tile: tuple[int, int]) -> None:
    q, k, v = draw(700, 700, dim, "bfloat16", 2, 2)
    pattern = dynamic(P.causal(), pruning)
    compiled = splatc.compile(pattern, seq_len=700, head_dim=dim, dtype="bfloat16", target="sm_90a", tile=tile)
    want, _ = oracle.attention(wide(q), wide(k), wide(v), P.causal().dense(700), pruning=pruning)
    assert oracle.relative_error(compiled(q, k, v).double().cpu().numpy(), want) < 1e-2


@pytest.mark.parametrize("static", [P.full(), P.causal()], ids=str)
def test_which_keys_are_kept(static: Any) -> None:
    """With V = I, O shows the probabilities: every group keeps as many keys as it can, and those of the oracle."""
    n = 128
    different = 0
    for _ in range(8):
        q, k, _ = draw(256, n, 128, "float16", 2, 2)
        eye = torch.eye(n, device="cuda", dtype=torch.float16).expand(2, 2, n, n).contiguous()
        o = attend(static, q / 4, k, eye)[0].double().cpu().numpy()
        scores = (q / 4).double().cpu().numpy() @ k.double().cpu().numpy().swapaxes(-1, -2)
        kept = np.isfinite(prune(np.where(static.dense(256, n), scores, -np.inf), TWO_OF_FOUR))
        assert np.array_equal((o > 0).reshape(*o.shape[:-1], -1, 4).sum(-1), kept.reshape(*o.shape[:-1], -1, 4).sum(-1))
        different += int(((o > 0) != kept).reshape(*o.shape[:-1], -1, 4).any(-1).sum())
    assert different <= 8, "near ties alone may go either way"  # of 262144 groups


@pytest.mark.parametrize("static", [P.full(), P.causal(), P.longformer(20, 5)], ids=str)
def test_one_of_two_is_exact(static: Any) -> None:
    """Scores are whole numbers, with many ties of both signs: with V = I, O shows that the oracle's keys are kept."""
    n = 126
    q, k, _ = ((x * 2).round().clamp(-8, 8) / 16 for x in draw(256, n, 64, "float16", 2, 2))
    eye = torch.eye(n, 128, device="cuda", dtype=torch.float16).expand(2, 2, n, 128).contiguous()
    o = attend(static, q, k, eye, ONE_OF_TWO)[0][..., :n].double().cpu().numpy()
    scores = wide(q) @ wide(k).swapaxes(-1, -2)
    kept = np.isfinite(prune(np.where(static.dense(256, n), scores, -np.inf), ONE_OF_TWO))
    assert np.array_equal(o > 0, kept)


def test_one_of_two_shows_nan() -> None:
    """A key of NaN is the largest of its pair, be it the lower or the upper one; other warps' rows are as they were."""
    q, k, v = draw(200, 200, 64, "bfloat16")
    clean, _ = attend(P.causal(), q, k, v, ONE_OF_TWO)
    for key in (96, 97):
        poisoned = k.clone()
        poisoned[:, :, key] = torch.nan
        o, lse = attend(P.causal(), q, poisoned, v, ONE_OF_TWO)
        assert o[:, :, key:].isnan().all() and lse[:, :, key:].isnan().all()
        assert torch.equal(o[:, :, :96], clean[:, :, :96]) and lse[:, :, :key].isfinite().all()


@both_ratios
def test_equal_scores_keep_the_lower_keys(pruning: Pruning) -> None:
    q, k, _ = draw(128, 128, 128, "float16", 2, 2)
    eye = torch.eye(128, device="cuda", dtype=torch.float16).expand(2, 2, 128, 128).contiguous()
    o = attend(P.full(), q.mul(0), k, eye, pruning)[0].double().cpu().numpy()
    lower = np.arange(128) % pruning.m < pruning.n
    assert np.array_equal(o > 0, np.broadcast_to(lower, o.shape))
    assert np.allclose(o[..., lower], 1 / 64, rtol=1e-3)


@both_ratios
def test_growing_scores(pruning: Pruning) -> None:
    """The running maximum changes with every tile."""
    q, k, v = draw(256, 2048, 128, "bfloat16")
    growth = torch.linspace(0.1, 3, 2048, device="cuda", dtype=torch.bfloat16)[:, None]
    check(P.full(), q, k * growth, v, pruning=pruning)


@both_ratios
def test_fifty_runs_are_bitwise_equal(pruning: Pruning) -> None:
    q, k, v = draw(1000, 1001, 128, "bfloat16")
    first, first_lse = attend(P.causal(), q, k, v, pruning)
    for _ in range(50):
        o, lse = attend(P.causal(), q, k, v, pruning)
        assert torch.equal(o, first) and torch.equal(lse, first_lse)


@both_ratios
def test_poisoned_memory_beyond_the_keys(pruning: Pruning) -> None:
    """What lies after the last key of a head does not matter, NaN included."""
    q, k, v = draw(200, 260, 64, "float16", 2, 2)
    for kv_len in (128, 201, 256):
        kept_k, kept_v = k[:, :, :kv_len].clone(), v[:, :, :kv_len].clone()
        wide_k, wide_v = (torch.full_like(x.contiguous(), torch.nan) for x in (k, v))
        wide_k[:, :, :kv_len], wide_v[:, :, :kv_len] = kept_k, kept_v
        o = attend(P.full(), q, wide_k[:, :, :kv_len], wide_v[:, :, :kv_len], pruning)[0]
        assert torch.equal(o, attend(P.full(), q, kept_k, kept_v, pruning)[0])
