"""splatc on a CUDA device, end to end, against the float64 oracle: every pattern of the library, odd sizes included."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import splatc
from splatc import oracle
from splatc import patterns as P
from tests.library import LIBRARY, SQUARE

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

TOLERANCE = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 1e-2}
SIZES = [(1, 1), (17, 17), (63, 63), (127, 127), (129, 129), (1000, 1000), (129, 300), (300, 64)]


def draw(q_len: int, kv_len: int, dim: int, v_dim: int, dtype: str, heads: int = 4, kv_heads: int = 2) -> list[Any]:
    """Random q, k, v on the device; k is strided (bshd memory), so that strides are always exercised."""
    generator = torch.Generator("cuda").manual_seed(q_len * 7 + kv_len + dim)
    kind = getattr(torch, dtype)
    q = torch.randn(2, heads, q_len, dim, device="cuda", generator=generator).to(kind)
    k = torch.randn(2, kv_len, kv_heads, dim, device="cuda", generator=generator).to(kind).transpose(1, 2)
    v = torch.randn(2, kv_heads, kv_len, v_dim, device="cuda", generator=generator).to(kind)
    return [q, k, v]


def reference(q: Any, k: Any, v: Any, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return oracle.attention(q.double().cpu().numpy(), k.double().cpu().numpy(), v.double().cpu().numpy(), mask)


def check(pattern: Any, mask: np.ndarray, q_len: int, kv_len: int, dim: int, dtype: str, v_dim: int = 0) -> None:
    q, k, v = draw(q_len, kv_len, dim, v_dim or dim, dtype)
    o, lse = splatc.attention(q, k, v, pattern, return_lse=True, enable_gqa=True)
    want, want_lse = reference(q, k, v, mask)
    got_lse = lse.cpu().numpy()
    assert oracle.relative_error(o.double().cpu().numpy(), want) < TOLERANCE[dtype]
    finite = np.isfinite(want_lse)
    assert np.array_equal(np.isneginf(got_lse), ~finite)
    assert np.abs(got_lse[finite] - want_lse[finite]).max(initial=0) < 1e-3
    assert (o.cpu().numpy() if dtype == "float32" else o.float().cpu().numpy())[~finite].any() == np.False_


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", [*LIBRARY, *SQUARE])
def test_every_pattern(name: str, dtype: str) -> None:
    for q_len, kv_len in SIZES:
        if name in SQUARE and q_len != kv_len:
            continue
        pattern = {**LIBRARY, **SQUARE}[name](q_len, kv_len)
        check(pattern, pattern.dense(q_len, kv_len), q_len, kv_len, 64, dtype)


@pytest.mark.parametrize(("dim", "v_dim"), [(16, 16), (40, 24), (96, 96), (128, 128), (192, 128), (256, 256)])
def test_head_dims(dim: int, v_dim: int) -> None:
    pattern = P.causal() & (P.window(31, 0) | P.strided(32))
    check(pattern, pattern.dense(300), 300, 300, dim, "bfloat16", v_dim)


def test_per_head_patterns() -> None:
    heads = [P.causal(), P.window(9, 9), P.strided(4), P.causal()]
    check(heads, np.stack([p.dense(200) for p in heads]), 200, 200, 64, "float32")


def test_side_stream_and_new_length() -> None:
    attend = splatc.compile(P.causal(), seq_len=256, head_dim=64, dtype="float32")
    for length in (256, 77):
        q, k, v = draw(length, length, 64, 64, "float32", kv_heads=4)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            o = attend(q, k, v)
        torch.cuda.current_stream().wait_stream(stream)
        want, _ = reference(q, k, v, np.tri(length, dtype=bool))
        assert oracle.relative_error(o.double().cpu().numpy(), want) < 1e-5


def test_fifty_runs_are_bitwise_equal() -> None:
    q, k, v = draw(500, 500, 64, 64, "bfloat16")
    runs = [splatc.attention(q, k, v, P.longformer(40, 8), enable_gqa=True) for _ in range(50)]
    assert all(torch.equal(run, runs[0]) for run in runs)
