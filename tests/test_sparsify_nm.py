"""splatc.sparsify.to_nm: what is swapped computes N:M attention with the same weights, also in torch's layers."""

from typing import Any

import pytest

import splatc
from splatc.errors import InvalidInput, Unsupported

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from splatc import patterns as P  # noqa: E402
from splatc.nn import SparseAttention  # noqa: E402
from splatc.nn.functional import dense_attention  # noqa: E402
from splatc.sparsify import NMAttention, to_nm  # noqa: E402

WIDTH, HEADS, LENGTH = 32, 2, 21
WAYS = [False, True]  # by the kernel; densely


def attention_of(mha: Any, x: Any, pattern: Any, y: Any = None, mask: Any = None) -> Any:
    """What an nn.MultiheadAttention with batch_first would compute over a pattern."""
    y = x if y is None else y
    weights, biases = mha.in_proj_weight.chunk(3), mha.in_proj_bias.chunk(3)
    q, k, v = (nn.functional.linear(z, w, b).unflatten(-1, (HEADS, -1)).transpose(1, 2)
               for z, w, b in zip((x, y, y), weights, biases, strict=True))  # fmt: skip
    return mha.out_proj(dense_attention(q, k, v, pattern, mask=mask).transpose(1, 2).flatten(2))


@pytest.fixture
def mha() -> Any:
    torch.manual_seed(0)
    return nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).eval()


@pytest.fixture
def x() -> Any:
    torch.manual_seed(1)
    return torch.randn(2, LENGTH, WIDTH)


@pytest.mark.parametrize("dense", WAYS)
def test_multihead_attention(mha, x, dense):
    before = dict(mha.named_parameters())
    made = to_nm(nn.Sequential(mha), dense=dense).get_submodule("0")
    assert isinstance(made, NMAttention) and not made.training
    after = dict(made.named_parameters())
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)
    made.load_state_dict(mha.state_dict())
    y, weights = made(x, x, x)
    assert weights is None
    torch.testing.assert_close(y, attention_of(mha, x, P.nm(2, 4)))
    causal = nn.Transformer.generate_square_subsequent_mask(LENGTH)
    y = made(x, x, x, attn_mask=causal, is_causal=True, need_weights=False)[0]
    torch.testing.assert_close(y, attention_of(mha, x, P.causal() & P.nm(2, 4)))
    keys = torch.randn(2, 13, WIDTH)
    torch.testing.assert_close(made(x, keys, keys)[0], attention_of(mha, x, P.nm(2, 4), keys))
    torch.testing.assert_close(made(x[0], keys[0], keys[0])[0], made(x, keys, keys)[0][0])  # without a batch
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mha.parameters())


def test_sequence_first_other_dimensions_and_no_bias(x):
    torch.manual_seed(2)
    first = nn.MultiheadAttention(WIDTH, HEADS, bias=False)
    second = nn.MultiheadAttention(WIDTH, HEADS, bias=False, batch_first=True)
    second.load_state_dict(first.state_dict())
    y, same = to_nm(first, 1, 2)(*(x.transpose(0, 1),) * 3)[0], to_nm(second, 1, 2)(x, x, x)[0]
    torch.testing.assert_close(y.transpose(0, 1), same)
    other = nn.MultiheadAttention(WIDTH, HEADS, kdim=5, vdim=7, batch_first=True)
    keys, values = torch.randn(2, 9, 5), torch.randn(2, 9, 7)
    torch.testing.assert_close(to_nm(other)(x, keys, values)[0], to_nm(other, dense=True)(x, keys, values)[0])


@pytest.mark.parametrize("eager", [True, False])
def test_in_torchs_encoder_there_is_no_short_cut(x, eager):
    """In inference torch's layers have a fused way for dense attention, with padding another one."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 48, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).train(eager)
    with torch.no_grad():
        before = model(x)
        names = list(model.state_dict())
        assert to_nm(model) is model and list(model.state_dict()) == names
        y, first = model(x), model.layers[0]
        z = first.norm1(x + attention_of(first.self_attn, x, P.nm(2, 4)))
        torch.testing.assert_close(first(x), first.norm2(z + first.linear2(first.linear1(z).relu())))
        assert (y - before).abs().max() > 1e-3
        padding = torch.arange(LENGTH) >= torch.tensor([15, LENGTH])[:, None]
        with pytest.raises(Unsupported, match=r"to_nm\(model, dense=True\)"):
            model(x, src_key_padding_mask=padding)


def test_masks_in_the_dense_way(mha, x):
    made = to_nm(mha, dense=True)
    padding = torch.arange(LENGTH) >= torch.tensor([15, LENGTH])[:, None]
    band = ~torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(5).triu(-5)
    counts = ~padding[:, None, None] & ~band
    wanted = attention_of(mha, x, P.nm(2, 4), mask=counts)
    torch.testing.assert_close(made(x, x, x, key_padding_mask=padding, attn_mask=band)[0], wanted)
    of_heads = band.expand(2 * HEADS, LENGTH, LENGTH)
    torch.testing.assert_close(made(x, x, x, key_padding_mask=padding, attn_mask=of_heads)[0], wanted)
    floats = torch.zeros(LENGTH, LENGTH).masked_fill(band, -torch.inf)
    torch.testing.assert_close(made(x, x, x, key_padding_mask=padding, attn_mask=floats)[0], wanted)
    with pytest.raises(Unsupported, match="attn_mask adds to scores"):
        made(x, x, x, attn_mask=floats + 1)


def test_sparse_attention_keeps_its_pattern(x):
    model = nn.Sequential(SparseAttention(WIDTH, HEADS, "causal"), SparseAttention(WIDTH, HEADS, ["full", "causal"]))
    before = [p.clone() for p in model.parameters()]
    to_nm(model, 1, 2)
    assert model[0].pattern == P.causal() & P.nm(1, 2) and str(model[1].pattern).count("nm(1, 2)") == 2
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert model(x).shape == x.shape
    to_nm(model, 1, 2)  # again: nothing changes
    assert model[0].pattern == P.causal() & P.nm(1, 2)
    with pytest.raises(InvalidInput, match="a pattern is pruned once"):
        to_nm(model, 2, 4)
    assert model[0].pattern == P.causal() & P.nm(1, 2)


def test_a_shared_module_stays_shared(mha):
    both = nn.ModuleList([mha, mha])
    to_nm(both)
    assert both[0] is both[1] and isinstance(both[0], NMAttention)


def test_dropout_only_in_training(x):
    for dense in WAYS:
        torch.manual_seed(0)
        made = to_nm(nn.MultiheadAttention(WIDTH, HEADS, dropout=0.5, batch_first=True), dense=dense)
        assert not torch.equal(made(x, x, x)[0], made(x, x, x)[0])
        made.eval()
        assert torch.equal(made(x, x, x)[0], made(x, x, x)[0])


def test_refusals(mha, x):
    assert splatc.sparsify.to_nm is to_nm
    with pytest.raises(InvalidInput, match="there is nothing to swap"):
        to_nm(nn.Linear(3, 3))
    with pytest.raises(InvalidInput, match="nothing to swap"):
        to_nm(to_nm(nn.ModuleList([mha])))
    with pytest.raises(InvalidInput, match="nm"):
        to_nm(nn.ModuleList([mha]), 3, 4)
    with pytest.raises(Unsupported, match="a SparseAttention has kernels only"):
        to_nm(SparseAttention(WIDTH, HEADS, "causal"), dense=True)
    for option in ("add_bias_kv", "add_zero_attn"):
        with pytest.raises(Unsupported, match="keys beside the sequence"):
            to_nm(nn.MultiheadAttention(WIDTH, HEADS, **{option: True}))
    with pytest.raises(Unsupported, match="nested"):
        to_nm(mha)(*(torch.nested.nested_tensor(list(x)),) * 3)
