"""Padding of each batch entry: against dense attention in float64, against the sequence cut off, what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from splatc.errors import InvalidInput, Unsupported
from splatc.oracle import relative_error

torch = pytest.importorskip("torch")

from splatc.nn import SparseAttention  # noqa: E402
from splatc.nn.functional import dense_attention  # noqa: E402


def wide(x: Any) -> Any:
    return x.detach().double().cpu()


def check(pattern: str, layout: str, scale: float | None, dtype: Any, bound: float, device: str = "cpu") -> None:
    """O, LSE and gradients of a layer. Entries have no padding, some at the end, and holes; the last nothing else."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(4, heads, 70, 16, dtype=dtype, device=device) for heads in (4, 2, 2))
    padding = torch.zeros(4, 70, dtype=torch.bool, device=device)
    padding[1, 33:] = padding[2, 3:20] = padding[3] = True
    turn = (lambda x: x.transpose(1, 2)) if layout == "bshd" else (lambda x: x)
    layer = SparseAttention(64, 4, pattern, num_kv_heads=2, projections=False, layout=layout, scale=scale)
    given, exact = [[x.to(t).requires_grad_() for x in (q, k, v)] for t in (dtype, torch.float64)]
    o, lse = layer(*map(turn, given), key_padding_mask=padding, return_lse=True)
    a, b, c = exact
    wanted, wanted_lse = dense_attention(a, b, c, pattern, scale=scale, return_lse=True, enable_gqa=True,
                                         mask=~padding[:, None, None])  # fmt: skip
    some = wanted_lse.isfinite()
    assert torch.equal(some, lse.isfinite()) and (turn(o)[3] == 0).all() and not some[3].any()
    assert relative_error(wide(turn(o)), wide(wanted)) < bound
    assert relative_error(wide(lse[some]), wide(wanted_lse[some])) < bound
    do = torch.randn_like(wanted)
    got = torch.autograd.grad((turn(o) * do).sum() + lse[some].sum(), given)
    for a, b in zip(got, torch.autograd.grad((wanted * do).sum() + wanted_lse[some].sum(), exact)):
        assert torch.isfinite(a).all() and relative_error(wide(a), wide(b)) < bound


@pytest.mark.parametrize("dtype, bound", [("float64", 1e-12), ("float32", 1e-5), ("float16", 5e-3)])
@pytest.mark.parametrize("pattern, layout, scale", [
    ("full()", "bhsd", None), ("causal()", "bshd", -0.3), ("blocked(16)", "bshd", None), ("nm(2, 4)", "bhsd", 1.0),
])  # fmt: skip
def test_against_float64(dtype, bound, pattern, layout, scale):
    check(pattern, layout, scale, getattr(torch, dtype), bound)


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", ["full()", "causal()", "blocked(16)"])
def test_on_a_gpu(pattern):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    check(pattern, "bshd", None, torch.bfloat16, 2e-2, "cuda")


@pytest.mark.parametrize("options", [{}, {"alibi": True}, {"relative_bias": 4, "sinks": True}, {"dropout": 0.5}])
def test_padding_at_the_end_could_be_cut_off(options):
    torch.manual_seed(1)
    layer = SparseAttention(32, 4, "window(20, 20)", **options).eval()
    for name in {"relative_bias", "sinks"} & set(options):
        torch.nn.init.normal_(getattr(layer, name))
    x, lengths = torch.randn(3, 50, 32), [50, 31, 1]
    y = layer(x, key_padding_mask=torch.arange(50) >= torch.tensor(lengths)[:, None])
    for got, one, n in zip(y, x, lengths):
        assert torch.allclose(got[:n], layer(one[None, :n])[0], atol=1e-5)


def test_keys_of_another_sequence():
    torch.manual_seed(2)
    layer, x, memory = SparseAttention(32, 4, "full()"), torch.randn(2, 9, 32), torch.randn(2, 21, 32)
    y = layer(x, memory, key_padding_mask=torch.arange(21).expand(2, -1) < 6)
    assert torch.allclose(y, layer(x, memory[:, 6:]), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_traced_layer(dtype):
    torch.manual_seed(3)
    layer, x = SparseAttention(32, 2, "causal()"), torch.randn(2, 40, 32)
    padding = torch.arange(40) >= torch.tensor([[40], [11]])
    traced = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        wanted = layer(x, key_padding_mask=padding)
        assert torch.allclose(wanted, traced(x, key_padding_mask=padding), atol=1e-6)
    assert torch.allclose(wanted[1, :11].float(), layer(x[1:, :11])[0], atol=1e-5 if dtype == torch.float32 else 2e-2)


def test_wrong_masks():
    layer, x = SparseAttention(32, 2, "full()"), torch.randn(2, 12, 32)
    for wrong in (torch.zeros(2, 12), torch.zeros(2, 11, dtype=torch.bool), [[False] * 12] * 2):
        with pytest.raises(InvalidInput, match=r"it must be bool \(2, 12\), True where a key is padding"):
            layer(x, key_padding_mask=wrong)
    padding = torch.zeros(2, 12, dtype=torch.bool)
    for options, words in (({"softcap": 20.0}, "a softcap bounds"), ({"head_dim": 256}, "it must be at most 248"),
                           ({"scale": 0.0}, "it must be from"), ({"scale": 1e4}, "it must be from")):  # fmt: skip
        with pytest.raises(Unsupported, match=words):
            SparseAttention(32, 2, "full()", **options)(x, key_padding_mask=padding)
