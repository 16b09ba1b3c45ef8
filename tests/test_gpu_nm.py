"""2:4 attention on a Hopper GPU against the float64 oracle, fresh random inputs each time, and which keys it keeps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import splatc
from splatc import oracle
from splatc import patterns as P
from splatc.formats.nm import prune
from splatc.patterns.pruned import Pruning

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
                       reason="needs a Hopper GPU"),
]  # fmt: skip
NM = Pruning(2, 4)
STATIC = {
    "full": P.full(), "causal": P.causal(), "window": P.causal() & P.window(200, 0), "longformer": P.longformer(33, 5),
    "blocked": P.blocked(64), "nothing": P.window(5, 5) & ~P.window(9, 9),
}  # fmt: skip
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


def attend(pattern: Any, q: Any, k: Any, v: Any) -> tuple[Any, Any]:
    o, lse = splatc.attention(q, k, v, pattern & P.nm(2, 4), return_lse=True, enable_gqa=True)
    return o, lse


def check(pattern: Any, q: Any, k: Any, v: Any, most: float = 1e-2) -> None:
    o, lse = attend(pattern, q, k, v)
    lengths = q.shape[2], k.shape[2]
    want, want_lse = oracle.attention(wide(q), wide(k), wide(v), pattern.dense(*lengths), pruning=NM)
    got, got_lse = o.double().cpu().numpy(), lse.double().cpu().numpy()
    finite = np.isfinite(want_lse)
    assert np.array_equal(np.isneginf(got_lse), ~finite)
    assert not got[~finite].any()
    assert oracle.relative_error(got, want) < most
    assert np.abs(got_lse[finite] - want_lse[finite]).max(initial=0) < 2e-3


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", STATIC)
def test_patterns_and_lengths(name: str, dtype: str, dim: int) -> None:
    for q_len, kv_len in SIZES:
        check(STATIC[name], *draw(q_len, kv_len, dim, dtype))


@pytest.mark.parametrize(("dim", "tile"), [(64, (192, 128)), (64, (128, 128)), (128, (128, 128)), (128, (128, 64)),
                                           (128, (64, 128)), (96, (128, 128)), (256, (128, 64))])  # fmt: skip
def test_tiles_and_head_dims(dim: int, tile: tuple[int, int]) -> None:
    q, k, v = draw(700, 700, dim, "bfloat16", 2, 2)
    pattern = P.causal() & P.nm(2, 4)
    compiled = splatc.compile(pattern, seq_len=700, head_dim=dim, dtype="bfloat16", target="sm_90a", tile=tile)
    want, _ = oracle.attention(wide(q), wide(k), wide(v), P.causal().dense(700), pruning=NM)
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
        kept = np.isfinite(prune(np.where(static.dense(256, n), scores, -np.inf), NM))
        assert np.array_equal((o > 0).reshape(*o.shape[:-1], -1, 4).sum(-1), kept.reshape(*o.shape[:-1], -1, 4).sum(-1))
        different += int(((o > 0) != kept).reshape(*o.shape[:-1], -1, 4).any(-1).sum())
    assert different <= 8, "near ties alone may go either way"  # of 262144 groups


def test_equal_scores_keep_the_lower_keys() -> None:
    q, k, _ = draw(128, 128, 128, "float16", 2, 2)
    eye = torch.eye(128, device="cuda", dtype=torch.float16).expand(2, 2, 128, 128).contiguous()
    o = attend(P.full(), q.mul(0), k, eye)[0].double().cpu().numpy()
    lower = np.tile([True, True, False, False], 32)
    assert np.array_equal(o > 0, np.broadcast_to(lower, o.shape))
    assert np.allclose(o[..., lower], 1 / 64, rtol=1e-3)


def test_growing_scores() -> None:
    """The running maximum changes with every tile."""
    q, k, v = draw(256, 2048, 128, "bfloat16")
    growth = torch.linspace(0.1, 3, 2048, device="cuda", dtype=torch.bfloat16)[:, None]
    check(P.full(), q, k * growth, v)


def test_fifty_runs_are_bitwise_equal() -> None:
    q, k, v = draw(1000, 1001, 128, "bfloat16")
    first, first_lse = attend(P.causal(), q, k, v)
    for _ in range(50):
        o, lse = attend(P.causal(), q, k, v)
        assert torch.equal(o, first) and torch.equal(lse, first_lse)


def test_poisoned_memory_beyond_the_keys() -> None:
    """What lies after the last key of a head does not matter, NaN included."""
    q, k, v = draw(200, 260, 64, "float16", 2, 2)
    for kv_len in (128, 201, 256):
        kept_k, kept_v = k[:, :, :kv_len].clone(), v[:, :, :kv_len].clone()
        wide_k, wide_v = (torch.full_like(x.contiguous(), torch.nan) for x in (k, v))
        wide_k[:, :, :kv_len], wide_v[:, :, :kv_len] = kept_k, kept_v
        o = attend(P.full(), q, wide_k[:, :, :kv_len], wide_v[:, :, :kv_len])[0]
        assert torch.equal(o, attend(P.full(), q, kept_k, kept_v)[0])
