"""Layers that change from dense to blocks: their maps, both softmaxes against float64, saving.

When they change: test_spion_schedule.py.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from splatc import oracle
from splatc import patterns as P
from splatc.errors import InvalidInput, Unsupported
from splatc.oracle import relative_error

torch = pytest.importorskip("torch")

from splatc.sparsify import SpionAttention, find_pattern, mean_attention, prune_to_zero  # noqa: E402


def dense_weights(q: Any, k: Any, seen: Any = True, scale: float | None = None) -> Any:
    """The softmax in float64, (batch, heads, q_len, kv_len); rows that see nothing are 0."""
    q, k = q.double(), k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    hidden = ~torch.as_tensor(seen)
    return scores.masked_fill(hidden, -1e300).softmax(-1).masked_fill(hidden, 0.0)


# -- maps --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 100, 2**24])
@pytest.mark.parametrize("q_len, kv_len, kv_heads", [(1, 1, 4), (17, 17, 2), (33, 20, 1)])
def test_mean_attention(limit, q_len, kv_len, kv_heads):
    torch.manual_seed(0)
    q, k = torch.randn(3, 4, q_len, 8), torch.randn(3, kv_heads, kv_len, 8)
    heads = P.per_head([P.causal(), P.window(3, 1), P.full(), P.full() & ~P.full()])
    for pattern in (None, P.causal(), heads):
        seen = True if pattern is None else torch.from_numpy(pattern.dense(q_len, kv_len))
        wanted = dense_weights(q, k, seen, 0.4)
        together = mean_attention(q, k, pattern, scale=0.4, limit=limit)
        assert together.dtype == torch.float32 and relative_error(together, wanted.mean((0, 1))) < 1e-6
        each = mean_attention(q, k, pattern, scale=0.4, per_head=True, limit=limit)
        assert each.shape == (4, q_len, kv_len) and relative_error(each, wanted.mean(0)) < 1e-6
    with pytest.raises(InvalidInput, match="they must be"):
        mean_attention(q, k[:, :0])


@pytest.mark.parametrize("limit", [1, 2**24])
@pytest.mark.parametrize("pattern", [None, P.causal(), P.per_head([P.causal(), P.full()])])
def test_mean_attention_without_padding(limit, pattern):
    torch.manual_seed(0)
    q, k = torch.randn(3, 2, 20, 8), torch.randn(3, 2, 20, 8)
    padding = torch.arange(20) >= torch.tensor([[17], [9], [0]])  # the last rows are nobody's
    seen = ~padding[:, None, None] & torch.from_numpy((P.full() if pattern is None else pattern).dense(20))
    each = dense_weights(q, k, seen) * ~padding[:, None, :, None]
    rows = (~padding).sum(0).clamp_min(1)[:, None]
    options: dict[str, Any] = {"key_padding_mask": padding, "limit": limit}
    assert relative_error(mean_attention(q, k, pattern, **options), each.mean(1).sum(0) / rows) < 1e-6
    assert relative_error(mean_attention(q, k, pattern, per_head=True, **options), each.sum(0) / rows) < 1e-6
    few = mean_attention(q[:, :, :5], k, scale=0.4, key_padding_mask=padding)  # not of one sequence: all queries count
    assert relative_error(few, dense_weights(q[:, :, :5], k, ~padding[:, None, None], 0.4).mean((0, 1))) < 1e-6
    with pytest.raises(InvalidInput, match=r"it must be bool \(3, 20\)"):
        mean_attention(q, k, key_padding_mask=padding[:2])


def test_mean_attention_holds_little(monkeypatch):
    sizes: list[int] = []
    softmax = torch.Tensor.softmax

    def counted(x: Any, dim: int) -> Any:
        sizes.append(x.numel())
        return softmax(x, dim)

    monkeypatch.setattr(torch.Tensor, "softmax", counted)
    mean_attention(torch.randn(5, 2, 64, 4), torch.randn(5, 2, 64, 4), limit=1000)
    assert max(sizes) <= 1000 and sum(sizes) == 5 * 2 * 64 * 64


# -- the softmax with zeros --------------------------------------------------------------------------------------------


def zero_reference(q: Any, k: Any, v: Any, base: Any, kept: Any) -> Any:
    """(o, lse) in float64, by the definition: pruned entries have the score 0 and add nothing."""
    q, k, v = (x.double() for x in (q, k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    pruned = base & ~kept
    top = torch.where(kept, scores, torch.where(pruned, 0.0, -1e30)).amax(-1, keepdim=True)
    weights = torch.where(kept, (scores - top).exp(), 0.0)
    total = weights.sum(-1, keepdim=True) + pruned.sum(-1, keepdim=True) * (-top).exp()
    return weights / total.clamp_min(1e-300) @ v, top[..., 0] + total[..., 0].log()


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("length", [1, 48, 127])
@pytest.mark.parametrize("base", ["full()", "causal()"])
def test_prune_to_zero_against_float64(layout, length, base):
    rng = np.random.default_rng(length)
    n = -(-length // 16)
    blocks = P.block_mask(rng.random((n, n)) < 0.4, 16)  # some rows attend to nothing, some to everything
    layer = SpionAttention(16, 2, base, projections=False, prune_to="zero", layout=layout)
    turn = (lambda x: x.transpose(1, 2)) if layout == "bshd" else (lambda x: x)
    q, k, v = (torch.from_numpy(rng.standard_normal((2, 2, length, 8)) * 2).requires_grad_() for _ in "qkv")
    whole = torch.from_numpy(P.parse(base).dense(length))
    o, lse = layer(*map(turn, (q, k, v)), return_lse=True)
    wanted = dense_weights(q, k, whole) @ v
    assert relative_error(turn(o).detach(), wanted.detach()) < 1e-12  # dense: nothing is pruned
    layer.switch(blocks)
    o, lse = layer(*map(turn, (q, k, v)), return_lse=True)
    kept = whole & torch.from_numpy(blocks.dense(length))
    wanted, wanted_lse = zero_reference(q, k, v, whole, kept)
    some = torch.isfinite(lse)
    assert relative_error(turn(o).detach(), wanted.detach()) < 1e-12
    assert torch.allclose(lse[some], wanted_lse[some]) and (wanted[~some] == 0).all()
    do = torch.randn_like(wanted)
    got = torch.autograd.grad((turn(o) * do).sum() + lse[some].sum(), (q, k, v))
    want = torch.autograd.grad((wanted * do).sum() + wanted_lse[some].sum(), (q, k, v))
    for a, b in zip(got, want):
        assert torch.isfinite(a).all() and relative_error(a, b) < 1e-10


def test_prune_to_zero_is_safe():
    lse = torch.tensor([[[-float("inf"), -float("inf"), 300.0, -300.0, 1e4, 3.0]]], requires_grad=True)
    o = torch.ones(1, 1, 6, 2, requires_grad=True)
    new, new_lse = prune_to_zero(o, lse, torch.tensor([4, 0, 4, 4, 4, 0]))
    assert torch.isfinite(new).all() and new[0, 0, :, 0].tolist() == pytest.approx([0, 1, 1, 0, 1, 1])
    assert new_lse[0, 0].tolist() == pytest.approx([np.log(4), -np.inf, 300, np.log(4), 1e4, 3])
    new.sum().backward()
    assert torch.isfinite(o.grad).all() and torch.isfinite(lse.grad).all()


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("base", ["full()", "causal()"])
@pytest.mark.parametrize("per_head", [False, True])
def test_zero_counts_no_padding(layout, base, per_head):
    rng = np.random.default_rng(7)
    each = [P.block_mask(rng.random((3, 3)) < 0.5, 16) for _ in range(2)]
    layer = SpionAttention(16, 2, base, projections=False, prune_to="zero", layout=layout)
    layer.switch(P.per_head(each) if per_head else each[0])
    q, k, v = (torch.from_numpy(rng.standard_normal((3, 2, 40, 8))) for _ in "qkv")
    padding = torch.arange(40) >= torch.tensor([[40], [21], [0]])
    whole = torch.from_numpy(P.parse(base).dense(40)) & ~padding[:, None, None]
    wanted, wanted_lse = zero_reference(q, k, v, whole, whole & torch.from_numpy(layer.blocks.dense(40)))
    turn = (lambda x: x.transpose(1, 2)) if layout == "bshd" else (lambda x: x)
    for _ in range(2):
        o, lse = layer(*map(turn, (q, k, v)), key_padding_mask=padding, return_lse=True)
        assert relative_error(turn(o)[:2], wanted[:2]) < 1e-12 and torch.allclose(lse[:2], wanted_lse[:2])
    assert (turn(o)[2] == 0).all() and (lse[2] == -torch.inf).all()


def test_zero_counts_exactly_under_autocast():
    layer = SpionAttention(16, 2, prune_to="zero", bias=False)
    layer.switch(P.block_mask([[1, 0], [0, 1]], 512))
    x, padding = torch.zeros(1, 1024, 16), torch.arange(1024)[None] >= 845
    with torch.autocast("cpu", torch.bfloat16):
        _, lse = layer(x, key_padding_mask=padding, return_lse=True)
    assert torch.allclose(lse[..., :845].exp(), torch.tensor(845.0), rtol=1e-4)


def test_zero_with_blocks_of_each_head():
    rng = np.random.default_rng(5)
    blocks = P.per_head([P.block_mask(rng.random((3, 3)) < 0.5, 16) for _ in range(2)])
    layer = SpionAttention(16, 2, projections=False, prune_to="zero")
    layer.switch(blocks)
    q, k, v = (torch.randn(1, 2, 40, 8, dtype=torch.float64) for _ in "qkv")
    wanted, _ = zero_reference(q, k, v, torch.tensor(True), torch.from_numpy(blocks.dense(40)))
    assert relative_error(layer(q, k, v), wanted) < 1e-12
    assert "prune_to=zero" in repr(layer)


# -- the layer ---------------------------------------------------------------------------------------------------------


def test_a_layer_is_dense_then_sparse():
    torch.manual_seed(1)
    layer, x = SpionAttention(32, 4, num_kv_heads=2), torch.randn(2, 50, 32)
    names = {name for name, _ in layer.named_parameters()}
    layer.watch()
    dense = layer(x)
    scores = layer.watched()
    assert scores.shape == (50, 50) and torch.allclose(scores.sum(-1), torch.ones(50), atol=1e-5)
    assert torch.equal(layer(x), dense) and layer.watched() is None  # watching changed nothing and has ended
    layer.switch(found := find_pattern(scores, 16, 0.7).pattern)
    assert layer.pattern == layer.blocks == found and {name for name, _ in layer.named_parameters()} == names
    q, k, v = (f(x).unflatten(-1, (-1, 8)).transpose(1, 2).detach() for f in (layer.q_proj, layer.k_proj, layer.v_proj))
    o = torch.from_numpy(oracle.attention(q, k, v, found.dense(50))[0]).float()
    assert torch.allclose(layer(x), layer.out_proj(o.transpose(1, 2).flatten(-2)), atol=1e-5)
    layer.switch(None)
    assert torch.equal(layer(x), dense)


def test_another_pattern_is_a_new_begin():
    torch.manual_seed(2)
    blocks, x = find_pattern(torch.rand(64, 64), 16, 0.5).pattern, torch.randn(1, 64, 32)
    layer, made = SpionAttention(32, 2, prune_to="zero"), SpionAttention(32, 2, P.causal(), prune_to="zero")
    layer.switch(blocks)
    layer(x)
    layer.set_pattern(P.causal())
    assert layer.blocks is None and layer.base == layer.pattern == P.causal()
    made.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), made(x))
    for one in (layer, made):
        one.switch(blocks)
    assert layer.pattern == P.causal() & blocks and torch.equal(layer(x), made(x))


@pytest.mark.parametrize("per_head", [False, True])
def test_blocks_are_saved_with_the_model(tmp_path, per_head):
    rng = np.random.default_rng(2)
    each = [P.block_mask(rng.random((70, 70)) < 0.3, 8) for _ in range(2)]
    blocks = P.per_head(each) if per_head else each[0]
    layer = SpionAttention(16, 2, P.causal())
    dense_state = copy.deepcopy(layer.state_dict())
    layer.switch(blocks)
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    other = SpionAttention(16, 2, P.causal())
    other.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    assert other.blocks == blocks and other.pattern == layer.pattern == P.causal() & blocks
    x = torch.randn(1, 560, 16)
    assert torch.equal(other(x), layer(x)) and torch.equal(copy.deepcopy(layer)(x), layer(x))
    other.load_state_dict(dense_state)
    assert other.blocks is None and other.pattern == P.causal()


def test_blocks_belong_to_what_their_layer_was_made_with():
    matrix = np.random.default_rng(3).random((40, 40)) < 0.3
    causal, masked = P.causal(), P.as_pattern(matrix)
    blocks = P.block_mask(np.tri(5, dtype=bool), 8)
    for base, prune_to, others in (
        (causal, "-inf", [(P.full(), "-inf"), (causal, "zero"), (masked, "-inf")]),
        (masked, "zero", [(P.as_pattern(~matrix), "zero"), (masked, "-inf")]),
    ):
        layer = SpionAttention(16, 2, base, prune_to=prune_to)
        dense = copy.deepcopy(layer.state_dict())
        layer.switch(blocks)
        for pattern, other in others:
            made = SpionAttention(16, 2, pattern, prune_to=other)
            with pytest.raises(InvalidInput, match=f"with prune_to={prune_to}, pattern=.* make it with the same"):
                made.load_state_dict(layer.state_dict())
            assert made.blocks is None and made.pattern == pattern
            made.load_state_dict(dense)  # parameters alone
        same = SpionAttention(16, 2, base, prune_to=prune_to)
        same.load_state_dict(layer.state_dict())
        assert torch.equal(same(x := torch.randn(1, 40, 16)), layer(x))


@pytest.mark.parametrize("per_head", [False, True])
def test_checkpoints_that_do_not_say_what_blocks_belong_to(per_head):
    matrices = np.random.default_rng(4).random((2 if per_head else 1, 5, 5)) < 0.5
    layer = SpionAttention(16, 2, P.causal(), prune_to="zero")
    state = layer.state_dict()
    state["_extra_state"] = torch.from_numpy(matrices * 8).int()
    layer.load_state_dict(state)
    each = [P.block_mask(one, 8) for one in matrices]
    assert layer.blocks == (P.per_head(each) if per_head else each[0])


def test_a_traced_layer_follows_the_switch():
    layer, x = SpionAttention(32, 2), torch.randn(1, 64, 32)
    traced = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.allclose(traced(x), layer(x), atol=1e-6)
    layer.switch(P.block_mask([[1, 0], [1, 1]], 32))
    assert torch.allclose(changed := layer(x), traced(x), atol=1e-6)
    layer.switch(P.block_mask([[0, 1], [1, 1]], 32))
    assert torch.allclose(other := layer(x), traced(x), atol=1e-6) and not torch.allclose(changed, other)


def test_wrong_layers():
    with pytest.raises(Unsupported, match="has no softcap"):
        SpionAttention(16, 2, softcap=20.0)
    with pytest.raises(InvalidInput, match="prune_to is 'none'"):
        SpionAttention(16, 2, prune_to="none")
    layer = SpionAttention(16, 2)
    mixed = P.per_head([P.block_mask([[1]], 8), P.block_mask([[1]], 16)])
    for wrong in (P.causal(), P.block_mask([[1]], (8, 16)), mixed, P.per_head([P.block_mask([[1]], 8), P.full()])):
        with pytest.raises(InvalidInput, match="no block_mask of square blocks"):
            layer.switch(wrong)
    layer.switch(P.block_mask([[1, 0], [0, 1]], 8))
    with pytest.raises(InvalidInput, match="q_len 50"):
        layer(torch.randn(1, 50, 16))
