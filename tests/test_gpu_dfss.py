"""The three kernels of compressed scores on a Hopper GPU, bit by bit against the reference, fresh random inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import splatc
from splatc import oracle
from splatc.formats.nm import encode, to_registers
from splatc.patterns.pruned import ONE_OF_TWO, RATIOS, TWO_OF_FOUR, Pruning

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
                       reason="needs a Hopper GPU"),
]  # fmt: skip
both_ratios = pytest.mark.parametrize("pruning", RATIOS, ids=str)
CODES = {TWO_OF_FOUR: {4, 8, 12, 9, 13, 14}, ONE_OF_TWO: {8, 12, 9, 13}}
SIZES = [(1, 1), (17, 3), (64, 128), (129, 126), (300, 257), (512, 512), (1000, 1001)]
DTYPES = ["float16", "bfloat16"]


def draw(q_len: int, kv_len: int, dim: int, dtype: str, heads: int = 4, kv_heads: int = 2, batch: int = 2) -> list[Any]:
    """Fresh random q, k, v; k is strided (bshd memory)."""
    of = getattr(torch, dtype)
    q = torch.randn(batch, heads, q_len, dim, device="cuda").to(of)
    k = torch.randn(batch, kv_len, kv_heads, dim, device="cuda").to(of).transpose(1, 2)
    v = torch.randn(batch, kv_heads, kv_len, dim, device="cuda").to(of)
    return [q, k, v]


def whole(x: Any) -> Any:
    """Of small integers: sums of their products are exact in any order."""
    return (x * 2).round().clamp(-8, 8)


def wide(x: Any) -> np.ndarray:
    return np.asarray(x.double().cpu().numpy())


@pytest.mark.parametrize("dim", [64, 128, 40])
@pytest.mark.parametrize("dtype", DTYPES)
@both_ratios
def test_values_and_metadata_are_the_encoders(pruning: Pruning, dtype: str, dim: int) -> None:
    """All of both, bit by bit, with many ties; the scale makes scores round."""
    codes: set[int] = set()
    for q_len, kv_len in SIZES:
        q, k, _ = draw(q_len, kv_len, dim, dtype)
        q, k = whole(q), whole(k)
        got = splatc.nm_scores(q, k, pruning.n, pruning.m, scale=0.3, enable_gqa=True)
        exact = wide(q).astype(np.float32) @ wide(k).astype(np.float32).repeat(2, 1).swapaxes(-1, -2)
        want = encode(exact * np.float32(0.3), pruning)
        assert torch.equal(got.values.cpu(), torch.from_numpy(want.values).to(q.dtype))
        assert np.array_equal(got.metadata.cpu().numpy().view(np.uint32), to_registers(want.words, pruning))
        assert np.array_equal(got.words, want.words)
        codes |= set(np.unique(got.words[..., None] >> np.arange(0, 16, 4) & 15).tolist())
    assert codes == CODES[pruning]


@pytest.mark.parametrize("dim", [64, 128, 40])
@pytest.mark.parametrize("dtype", DTYPES)
@both_ratios
def test_the_three_are_pruned_attention(pruning: Pruning, dtype: str, dim: int) -> None:
    for q_len, kv_len in SIZES:
        q, k, v = draw(q_len, kv_len, dim, dtype)
        scores = splatc.nm_scores(q, k, pruning.n, pruning.m, enable_gqa=True)
        probs = scores.softmax()
        again = scores.softmax(in_place=True)
        assert again.values.data_ptr() == scores.values.data_ptr() and torch.equal(again.values, probs.values)
        o = probs.spmm(v, enable_gqa=True)
        want, _ = oracle.attention(wide(q), wide(k), wide(v), np.ones((q_len, kv_len), bool), pruning=pruning)
        assert oracle.relative_error(wide(o), want) < 1e-2
        dense = wide(probs.to_dense()) @ wide(v).repeat(2, 1)
        assert oracle.relative_error(wide(o), dense) < 4e-3, "the product alone rounds once"


@pytest.mark.parametrize("kv_len", [16, 250, 256, 500, 700, 2048, 4096, 4500])
def test_softmax_of_every_width(kv_len: int) -> None:
    q, k, _ = draw(37, kv_len, 64, "bfloat16")
    scores = splatc.nm_scores(q, k, scale=1.0, enable_gqa=True)
    want = torch.softmax(scores.values.double(), -1)
    got = scores.softmax().values.double()
    assert torch.equal(got == 0, want.bfloat16() == 0)
    assert ((got - want).abs() <= want * 2**-8 + 1e-30).all()


@both_ratios
def test_tall_tiles(pruning: Pruning) -> None:
    """As many rows as there are tiles of 256 for all multiprocessors."""
    q, k, v = draw(1000, 130, 64, "bfloat16", batch=20)
    q, k = whole(q), whole(k)
    got = splatc.nm_scores(q, k, pruning.n, pruning.m, scale=0.3, enable_gqa=True)
    want = splatc.nm_scores(q.cpu(), k.cpu(), pruning.n, pruning.m, scale=0.3, enable_gqa=True)
    assert torch.equal(got.values.cpu(), want.values) and torch.equal(got.metadata.cpu(), want.metadata)
    probs = got.softmax()
    dense = wide(probs.to_dense()) @ wide(v).repeat(2, 1)
    assert oracle.relative_error(wide(probs.spmm(v, enable_gqa=True)), dense) < 4e-3


def test_any_scale() -> None:
    q, k, _ = (whole(x) for x in draw(100, 101, 64, "float16"))
    for scale in (-0.25, 0.0):
        got = splatc.nm_scores(q, k, scale=scale, enable_gqa=True)
        want = splatc.nm_scores(q.cpu(), k.cpu(), scale=scale, enable_gqa=True)
        assert torch.equal(got.values.cpu(), want.values) and torch.equal(got.metadata.cpu(), want.metadata)


def test_memory() -> None:
    q, k, v = draw(2048, 2048, 64, "bfloat16", 4, 4)
    splatc.nm_scores(q, k).softmax(in_place=True).spmm(v)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    o = splatc.nm_scores(q, k).softmax(in_place=True).spmm(v)
    torch.cuda.synchronize()
    needed = 2 * 4 * 2048 * 2048 * (1 + 1 / 8)  # values and metadata
    assert torch.cuda.max_memory_allocated() - before - o.nbytes <= 1.01 * needed


def test_graphs_and_repeats() -> None:
    q, k, v = draw(700, 1001, 64, "bfloat16")

    def run() -> Any:
        return splatc.nm_scores(q, k, enable_gqa=True).softmax(in_place=True).spmm(v, enable_gqa=True)

    first = run()
    for _ in range(20):
        assert torch.equal(run(), first)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = run()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(o, first)
