"""Patterns of batch entries: what they are, and that they compute what each entry by itself does."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import splatc
from splatc import patterns as P
from splatc.codegen.kernel import gradient_spec, kernel_spec, two_walks
from splatc.codegen.target import Target
from splatc.compile import best_plan, heaviest, make_plan
from splatc.errors import InvalidInput, Unsupported
from splatc.patterns.heads import patterns_of
from splatc.runtime.gradient_walks import Sources, way_of
from splatc.runtime.tensors import Shape

torch = pytest.importorskip("torch")
flex = pytest.importorskip("torch.nn.attention.flex_attention")

B, H, KV, S, D = 3, 4, 2, 70, 16
ENTRIES = [P.documents([30, 40]) & P.causal(), P.window(9, 3), P.documents([5, 65])]
HEADS = [P.per_head([P.causal(), P.full()] * 2), P.window(5, 5), P.per_head([P.strided(7)] * 3 + [P.causal()])]


def draw(layout: str = "bhsd", dtype: Any = torch.float64, batch: int = B) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    qkv = [torch.randn(batch, heads, S, D, generator=generator, dtype=dtype) for heads in (H, KV, KV)]
    return [(x.transpose(1, 2).contiguous() if layout == "bshd" else x).requires_grad_() for x in qkv]


# -- patterns ----------------------------------------------------------------------------------------------------------


def test_algebra_text_and_entries():
    pattern = P.per_batch(HEADS)
    assert P.parse(str(pattern)) == pattern and pattern.batch == 3 and pattern.per_entry == 4
    assert pattern.entry(0) == HEADS[0] and pattern.entry(1) == P.PerHead((HEADS[1],) * 4)
    assert pattern.dense(S).shape == (B, H, S, S) and P.per_batch(ENTRIES).dense(S).shape == (B, 1, S, S)
    several = P.per_batch(ENTRIES) & P.per_head([P.causal(), P.full()]) | ~P.per_batch(ENTRIES)
    assert isinstance(several, P.PerBatch) and several.per_entry == 2
    for b, one in enumerate(ENTRIES):
        dense, heads = one.dense(S), np.stack([P.causal().dense(S), P.full().dense(S)])
        np.testing.assert_array_equal(several.entry(b).dense(S), dense & heads | ~dense)
    np.testing.assert_array_equal(pattern.transposed().dense(S), pattern.dense(S).swapaxes(-1, -2))
    assert (P.causal() & P.per_batch(ENTRIES)).batch == 3
    assert len(patterns_of(P.per_batch(ENTRIES), 5, 3)) == 15


def test_what_does_not_fit():
    with pytest.raises(InvalidInput, match="item 1 is a int"):
        P.per_batch([P.causal(), 3])  # type: ignore[list-item]
    with pytest.raises(InvalidInput, match="item 0 is a PerBatch"):
        P.per_batch([P.per_batch([P.causal()])])
    with pytest.raises(InvalidInput, match="for 2 heads, but there are 3"):
        P.per_batch([P.per_head([P.causal()] * 2), P.per_head([P.causal()] * 3)])
    with pytest.raises(InvalidInput, match="for 2 batch entries, but there are 3"):
        P.per_batch(ENTRIES) & P.per_batch(ENTRIES[:2])
    with pytest.raises(InvalidInput, match=r"for 3 batch entries: ask for one of them, .entry\(b\)"):
        P.heads_of(P.per_batch(ENTRIES), 4)
    q, k, v = draw(batch=2)
    with pytest.raises(InvalidInput, match="for 3 batch entries"):
        splatc.attention(q, k, v, P.per_batch(ENTRIES), enable_gqa=True)
    q, k, v = draw()
    with pytest.raises(InvalidInput, match="for 4 heads but q has 2"):
        splatc.attention(k, k, v, P.per_batch(HEADS))
    with pytest.raises(Unsupported, match=r"each entry, with pattern.entry\(b\)"):
        splatc.sddmm(q, k, P.per_batch(ENTRIES), enable_gqa=True)


# -- results -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("entries", [ENTRIES, HEADS], ids=["entries", "heads"])
def test_equal_to_each_entry_by_itself(entries, layout):
    q, k, v = draw(layout)
    options: dict[str, Any] = {"enable_gqa": True, "return_lse": True, "layout": layout}
    o, lse = splatc.attention(q, k, v, P.per_batch(entries), **options)
    do, dlse = torch.randn_like(o), torch.randn_like(lse)
    gradients = torch.autograd.grad([o, lse], (q, k, v), [do, dlse])
    for b, pattern in enumerate(entries):
        mine = q_, k_, v_ = q[b : b + 1], k[b : b + 1], v[b : b + 1]
        one, one_lse = splatc.attention(q_, k_, v_, pattern, **options)
        torch.testing.assert_close(o[b : b + 1], one)
        torch.testing.assert_close(lse[b : b + 1], one_lse)
        for got, wanted in zip(gradients, torch.autograd.grad([one, one_lse], mine, [do[b : b + 1], dlse[b : b + 1]]),
                               strict=True):  # fmt: skip
            torch.testing.assert_close(got[b : b + 1], wanted)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_compiled_with_biases(layout):
    """In torch.compile; the gradient of what entries share is the sum over them."""
    from splatc.nn.functional import sparse_attention

    q, k, v = draw(layout, torch.float32)
    slopes, sinks = (torch.rand(H, requires_grad=True) for _ in range(2))
    given: dict[str, Any] = {"enable_gqa": True, "layout": layout, "alibi_slopes": slopes, "sinks": sinks}

    pattern = P.per_batch(ENTRIES)

    def attend(q: Any, k: Any, v: Any) -> Any:
        return sparse_attention(q, k, v, pattern=pattern, **given)

    compiled = torch.compile(attend, fullgraph=True)(q, k, v)
    each = [sparse_attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], pattern=one, **given)
            for b, one in enumerate(ENTRIES)]  # fmt: skip
    inputs = q, k, v, slopes, sinks
    wanted = torch.autograd.grad(torch.cat(each).square().sum(), inputs)
    for o in (attend(q, k, v), compiled):
        torch.testing.assert_close(o, torch.cat(each))
        for got, one in zip(torch.autograd.grad(o.square().sum(), inputs), wanted, strict=True):
            torch.testing.assert_close(got, one, rtol=1e-4, atol=1e-4)


def test_numpy_and_pruned():
    q, k, v = (x.detach().float() for x in draw())
    pattern = P.per_batch(HEADS) & P.nm(2, 4)
    o = splatc.attention(q.numpy(), k.numpy(), v.numpy(), pattern, enable_gqa=True)
    for b in range(B):
        one = splatc.attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], pattern.entry(b), enable_gqa=True)
        torch.testing.assert_close(torch.from_numpy(o[b : b + 1]), one)


def test_tiles_and_ways_are_those_of_the_heaviest_entry(monkeypatch):
    """The others are planned for these only."""
    planned: list[Any] = []
    module = sys.modules["splatc.compile"]
    real = module.make_plan

    def counted(pattern: Any, *given: Any, **options: Any) -> Any:
        planned.append(pattern)
        return real(pattern, *given, **options)

    monkeypatch.setattr(module, "make_plan", counted)
    heavy = P.causal()
    pattern = P.per_batch([P.window(60, 0) & P.documents([1000, 1048]), heavy, P.documents([500] * 4 + [48])])
    assert heaviest(pattern, 2048, 2048) == heavy
    spec = kernel_spec(64, None, "bfloat16", Target("cuda", "sm_90a"))
    for one in (spec, *two_walks(spec)):
        planned.clear()
        best = best_plan(pattern, 2048, 2048, one)
        alone = best_plan(heavy, 2048, 2048, one)
        assert (best.spec.tile_m, best.spec.tile_n) == (alone.spec.tile_m, alone.spec.tile_n)
        assert best.entries == 3 and planned.count(pattern) == 1
    shape = Shape(3, 16, 16, 2048, 2048, 64, 64, "bfloat16", "cuda:0")
    of_rows, *of_columns = two_walks(spec)

    def sources(mask: Any) -> Sources:
        return Sources(lambda q, k: best_plan(mask, q, k, of_rows),
                       lambda k, q: best_plan(mask.transposed(), k, q, of_columns[0]),
                       lambda k, q: make_plan(mask.transposed(), k, q, gradient_spec(spec)), gradient_spec(spec),
                       tuple(of_columns))  # fmt: skip

    for judge in (heavy, P.window(9, 9)):
        way = way_of(replace(sources(pattern), judged_by=sources(judge)), shape, 132)
        assert (way.rows is None) == (way_of(sources(judge), shape, 132).rows is None)


# -- masks that people have --------------------------------------------------------------------------------------------


def test_flex_attention_masks():
    """mask_mod and BlockMask with documents of each batch entry."""
    document = torch.tensor([[0] * 30 + [1] * 40, [0] * 70, [0] * 5 + [1] * 65])

    def mask_mod(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return (document[b, q] == document[b, kv]) & (q >= kv)

    q, k, v = draw()
    wanted = splatc.attention(q, k, v, P.per_batch([
        P.documents([30, 40]) & P.causal(), P.causal(), P.documents([5, 65]) & P.causal(),
    ]), enable_gqa=True)  # fmt: skip
    block = flex.create_block_mask(mask_mod, B, None, S, S, device="cpu", BLOCK_SIZE=16)
    for mask in (mask_mod, block, torch.stack([document[b, :, None] == document[b] for b in range(B)])[:, None]
                 & torch.ones(S, S, dtype=torch.bool).tril()):  # fmt: skip
        torch.testing.assert_close(splatc.attention(q, k, v, mask, enable_gqa=True), wanted)
    with pytest.raises(InvalidInput, match="depends on the batch index b: say how many"):
        P.as_pattern(mask_mod, q_len=S)
    same = P.as_pattern(lambda b, h, q, kv: (q >= kv) & (b >= 0), q_len=S, batch=3)
    assert not isinstance(same, P.PerBatch)


def test_dense_attention_agrees():
    from splatc.nn.dense import dense_attention

    q, k, v = draw()
    for entries in (ENTRIES, HEADS):
        pattern = P.per_batch(entries)
        o = dense_attention(q, k, v, pattern=pattern, enable_gqa=True)
        torch.testing.assert_close(o, splatc.attention(q, k, v, pattern, enable_gqa=True))
