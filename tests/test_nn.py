"""splatc.nn on the CPU against a dense reference in float64: values, gradients, and what modules must survive."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest

import splatc
from splatc import patterns as P
from splatc.errors import InvalidInput
from splatc.oracle import relative_error
from splatc.patterns.heads import heads_of

torch = pytest.importorskip("torch")

from splatc.nn import SparseAttention  # noqa: E402  (it imports torch)
from splatc.nn.any_length import any_length  # noqa: E402
from splatc.nn.functional import sparse_attention  # noqa: E402
from splatc.nn.module import alibi_slopes  # noqa: E402

PATTERN = P.causal() & (P.window(30, 0) | P.strided(16))
WIDTH, HEADS, D = 48, 4, 16
BOUND = {"float32": 1e-4, "bfloat16": 2e-2, "float64": 1e-11}


def dense_attention(q: Any, k: Any, v: Any, pattern: Any, scale: Any = None, softcap: Any = None, bias: Any = None,
                    sinks: Any = None) -> Any:  # fmt: skip
    """(o, lse) of (batch, heads, seq, dim), differentiable, by the whole matrix of scores. bias: (heads, q, k)."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    masks = [one.dense(q.shape[2], k.shape[2]) for one in heads_of(pattern, q.shape[1])]
    seen = torch.stack([torch.from_numpy(mask) for mask in masks])
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(~seen, -1e30)
    lse = scores.logsumexp(-1).masked_fill(~seen.any(-1), -float("inf"))
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks[:, None])
        return torch.exp(scores - lse[..., None]) * seen @ v, lse
    return (scores.softmax(-1) * seen) @ v, lse


def dense_layer(layer: SparseAttention, x: Any, key: Any = None, value: Any = None) -> Any:
    """What a layer with projections computes."""
    key = x if key is None else key
    value = key if value is None else value
    q, k, v = layer.q_proj(x), layer.k_proj(key), layer.v_proj(value)
    q, k, v = (y.unflatten(-1, (-1, layer.head_dim)).transpose(1, 2) for y in (q, k, v))
    away = torch.arange(k.shape[2]) - torch.arange(q.shape[2])[:, None]
    if layer.bias_align == "bottom_right":
        away = away - (k.shape[2] - q.shape[2])
    bias: Any = 0.0
    if layer.alibi:
        bias = bias - alibi_slopes(layer.num_heads, "cpu").to(q.dtype)[:, None, None] * away.abs()
    if layer.relative_bias is not None:
        reach = layer.relative_bias.shape[1] // 2
        bias = bias + layer.relative_bias[:, away.clip(-reach, reach) + reach]
    o, lse = dense_attention(q, k, v, layer.pattern, layer.scale, layer._attend.softcap, bias, layer.sinks)
    return layer.out_proj(o.transpose(1, 2).flatten(2)), lse


def close(a: Any, b: Any, dtype: str = "float32") -> bool:
    return relative_error(a.detach().double().numpy(), b.detach().double().numpy()) < BOUND[dtype]


def check_layer(layer: SparseAttention, *inputs: Any) -> None:
    """Output, LSE, and the gradients of all parameters and inputs."""
    dtype = str(inputs[0].dtype).removeprefix("torch.")
    layer.zero_grad()
    exact = copy.deepcopy(layer).double()
    mine = [x.detach().clone().requires_grad_() for x in inputs]
    theirs = [x.detach().double().requires_grad_() for x in inputs]
    results = [layer(*mine, return_lse=True), dense_layer(exact, *theirs)]
    for y, lse in results:
        (y.double().square().sum() + lse.double().masked_fill(lse.isinf(), 0.0).sum()).backward()
    for a, b in zip(*results):
        finite = b.isfinite()
        assert a.shape == b.shape and torch.equal(a.isfinite(), finite) and close(a[finite], b[finite], dtype)
    for a, b in [*zip(mine, theirs), *zip(layer.parameters(), exact.parameters())]:
        if b.grad.norm() > 1e-9:  # the bias of keys moves all scores of a row alike
            assert close(a.grad, b.grad, dtype)


# -- values and gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 17, 150])
@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 2, "bias": False}, {"num_kv_heads": 1, "head_dim": 8},
                                     {"softcap": 2.0, "scale": 0.7}, {"alibi": True, "sinks": True, "relative_bias": 5},
                                     {"relative_bias": 7, "num_kv_heads": 2}], ids=str)  # fmt: skip
def test_layer(length, options):
    torch.manual_seed(0)
    layer = SparseAttention(WIDTH, HEADS, PATTERN, **{"head_dim": D, **options})
    for learned in (layer.relative_bias, layer.sinks):
        if learned is not None:
            torch.nn.init.normal_(learned)
    check_layer(layer, torch.randn(2, length, WIDTH))


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_layer_of_another_dtype(dtype):
    torch.manual_seed(0)
    layer = SparseAttention(WIDTH, HEADS, PATTERN, head_dim=D, dtype=getattr(torch, dtype))
    check_layer(layer, torch.randn(2, 70, WIDTH).to(getattr(torch, dtype)))


def test_a_pattern_for_each_head():
    heads = [PATTERN, P.full(), P.window(3, -1), "strided(7)"]  # the third has an empty row
    check_layer(SparseAttention(WIDTH, HEADS, heads, num_kv_heads=2, head_dim=D), torch.randn(2, 90, WIDTH))


def test_keys_of_another_sequence():
    layer = SparseAttention(WIDTH, HEADS, P.causal("bottom_right"), head_dim=D)
    x, other, third = torch.randn(2, 30, WIDTH), torch.randn(2, 77, WIDTH), torch.randn(2, 77, WIDTH)
    check_layer(layer, x, other)
    check_layer(layer, x, other, third)
    check_layer(SparseAttention(WIDTH, HEADS, P.causal("bottom_right"), head_dim=D, alibi=True,
                                bias_align="bottom_right"), x, other)  # fmt: skip


def test_dropout_in_training_only():
    torch.manual_seed(0)
    x = torch.randn(2, 60, WIDTH)
    layer = SparseAttention(WIDTH, HEADS, PATTERN, head_dim=D, dropout=0.5)
    plain = SparseAttention(WIDTH, HEADS, PATTERN, head_dim=D)
    plain.load_state_dict(layer.state_dict())
    torch.manual_seed(1)
    first, second = step(Returning(layer), x), step(Returning(layer), x)
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(step(Returning(layer), x), first))
    assert not torch.equal(first[0], second[0]) and torch.equal(layer.eval()(x), plain(x))
    assert "dropout=0.5" in repr(layer) and not torch.equal(layer.train()(x), plain(x))
    torch.manual_seed(2)
    mean = torch.stack([layer(x) for _ in range(200)]).mean(0)
    assert relative_error(mean.detach().numpy(), plain(x).detach().numpy()) < 0.15


def test_what_a_layer_learns_of_its_scores():
    layer = SparseAttention(WIDTH, HEADS, PATTERN, projections=False, head_dim=D, alibi=True, relative_bias=4,
                            sinks=True)  # fmt: skip
    assert {name: tuple(x.shape) for name, x in layer.state_dict().items()} == {"relative_bias": (4, 9), "sinks": (4,)}
    assert alibi_slopes(4, "cpu").tolist() == [2**-2, 2**-4, 2**-6, 2**-8]
    assert "alibi=True, sinks=True, relative_bias=4" in repr(layer)
    twin = pickle.loads(pickle.dumps(layer))
    q = torch.randn(1, HEADS, 20, D)
    assert torch.equal(twin(q, q, q), layer(q, q, q)) and twin.relative_bias is not layer.relative_bias


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_without_projections(layout):
    layer = SparseAttention(HEADS * D, HEADS, PATTERN, num_kv_heads=2, projections=False, layout=layout)
    assert not layer.state_dict() and not list(layer.parameters())
    qkv = [torch.randn(2, heads, 60, D) for heads in (HEADS, 2, 2)]
    q, k, v = (x.double() for x in qkv)
    wanted, wanted_lse = dense_attention(q, k, v, PATTERN)
    turned = qkv if layout == "bhsd" else [x.transpose(1, 2) for x in qkv]
    o, lse = layer(*turned, return_lse=True)
    assert close(o if layout == "bhsd" else o.transpose(1, 2), wanted) and close(lse, wanted_lse)
    assert torch.equal(layer(*turned), o)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_functional(layout):
    """Any mask that patterns take, and gradients of O and LSE."""
    dense = PATTERN.dense(90)
    for pattern in (PATTERN, str(PATTERN), dense, torch.from_numpy(dense), [PATTERN] * HEADS,
                    lambda b, h, q, k: (q >= k) & ((q - k < 31) | ((q - k) % 16 == 0))):  # fmt: skip
        qkv = [torch.randn(2, heads, 90, D) for heads in (HEADS, 2, 2)]
        exact = [x.double().requires_grad_() for x in qkv]
        mine = [x.requires_grad_() for x in qkv]
        q, k, v = mine if layout == "bhsd" else [x.transpose(1, 2) for x in mine]
        o, lse = sparse_attention(q, k, v, pattern, layout=layout, enable_gqa=True, return_lse=True)
        got = o if layout == "bhsd" else o.transpose(1, 2), lse
        wanted = dense_attention(exact[0], exact[1], exact[2], PATTERN)
        for y, z in (got, wanted):
            (y.square().sum() + z.sin().sum()).backward()
        assert all(close(a, b) for a, b in zip(got, wanted))
        assert all(close(a.grad, b.grad) for a, b in zip(mine, exact))


def test_functional_options():
    q, k, v = (torch.randn(1, 2, 40, D) for _ in range(3))
    o = sparse_attention(3 * q, k, v, "causal", scale=0.5, softcap=1.5)
    assert close(o, dense_attention(3 * q.double(), k.double(), v.double(), P.causal(), 0.5, 1.5)[0])


# -- what modules must survive -----------------------------------------------------------------------------------------


def test_state_is_the_projections_only():
    layer = SparseAttention(WIDTH, HEADS, PATTERN, head_dim=D)
    names = [f"{one}_proj.{part}" for one in ("q", "k", "v", "out") for part in ("weight", "bias")]
    assert list(layer.state_dict()) == names
    other = SparseAttention(WIDTH, HEADS, PATTERN, head_dim=D)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(1, 20, WIDTH)
    assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize("pattern", [PATTERN, [P.causal(), P.full(), P.window(3, 3), P.strided(4)],
                                     P.window(5, 5).dense(20), P.documents([8, 12])], ids=str)  # fmt: skip
def test_copies(pattern):
    layer = SparseAttention(WIDTH, HEADS, pattern, head_dim=D, num_kv_heads=2, softcap=3.0, scale=0.1)
    x = torch.randn(1, 20, WIDTH)
    wanted = layer(x)
    stored = io.BytesIO()
    torch.save(layer, stored)
    stored.seek(0)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(stored, weights_only=False)):
        assert twin.pattern == layer.pattern and torch.equal(twin(x), wanted)
        assert twin.q_proj.weight is not layer.q_proj.weight and repr(twin) == repr(layer)


def test_pickles_hold_the_text_of_a_pattern():
    layer = SparseAttention(WIDTH, HEADS, PATTERN, projections=False, head_dim=D)
    data = pickle.dumps(layer)
    assert str(PATTERN).encode() in data and b"splatc.patterns" not in data


def test_layers_share_what_is_compiled():
    first, second = (SparseAttention(WIDTH, HEADS, "causal & window(9, 0)", head_dim=D) for _ in range(2))
    x = torch.randn(1, 33, WIDTH)
    first(x)
    assert first._attend is second._attend and len(first._attend._compiled) == 1
    (attend,) = first._attend._compiled.values()
    second(torch.randn(1, 50, WIDTH))
    first.double()(x.double())
    assert len(first._attend._compiled) == 2 and attend in second._attend._compiled.values()


def test_moves():
    """.to() changes the parameters; the kernel follows the tensors."""
    layer, x = SparseAttention(WIDTH, HEADS, PATTERN, head_dim=D), torch.randn(1, 40, WIDTH)
    wanted = layer.double()(x.double())
    assert close(layer.float()(x), wanted) and close(layer.to(torch.bfloat16)(x.bfloat16()), wanted, "bfloat16")
    assert layer.out_proj.weight.dtype == torch.bfloat16
    meta = SparseAttention(WIDTH, HEADS, PATTERN, head_dim=D, device="meta")
    meta.to_empty(device="cpu").load_state_dict(layer.float().state_dict())
    assert torch.equal(meta(x), layer(x))


def test_repr():
    layer = SparseAttention(WIDTH, HEADS, PATTERN, num_kv_heads=2, head_dim=D, softcap=30.0)
    assert layer.extra_repr() == ("embed_dim=48, num_heads=4, num_kv_heads=2, head_dim=16, softcap=30.0, "
                                  f"pattern={PATTERN}")  # fmt: skip
    long = SparseAttention(WIDTH, HEADS, P.documents([1] * 200), projections=False)
    assert "projections=False, layout=bhsd" in repr(long) and "..." in repr(long) and len(repr(long)) < 300


# -- compilers, autocast, determinism ----------------------------------------------------------------------------------


class Model(torch.nn.Module):  # type: ignore[name-defined,misc]
    """Both ways of writing a layer."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layer = SparseAttention(WIDTH, HEADS, PATTERN, num_kv_heads=2, head_dim=D, **options)

    def forward(self, x: Any) -> Any:
        y, lse = self.layer(x, return_lse=True)
        heads = y.unflatten(-1, (3, D)).transpose(1, 2)
        o = sparse_attention(heads, heads[:, :1], heads[:, :1], PATTERN, enable_gqa=True, scale=0.3)
        return o + sparse_attention(heads, heads, heads, "window(7, 7)"), lse


class Returning(torch.nn.Module):  # type: ignore[name-defined,misc]
    """A layer and its LSE."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Any) -> Any:
        return self.layer(x, return_lse=True)


def step(model: Any, x: Any) -> list[Any]:
    model.zero_grad()
    o, lse = model(x)
    (o.float().square().sum() + lse.sum()).backward()
    return [o.detach(), lse.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("options", [{}, {"alibi": True, "relative_bias": 5, "sinks": True}], ids=str)
def test_compile_without_a_break_and_without_a_recompilation(options):
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Model(**options)
    traced = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")

    def both(length: int) -> None:
        x = torch.randn(2, length, WIDTH)
        for a, b in zip(step(model, x), step(traced, x)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)

    both(100)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (64, 33, 250):
            both(length)


def test_compile_comes_first():
    """A trace compiles nothing, so that a fresh module may be traced."""
    torch._dynamo.reset()
    pattern = P.causal() & P.window(11, 0)
    attend = any_length(pattern, "bhsd", None, True, None)
    qkv = [torch.randn(1, 2, 40, D) for _ in range(3)]

    def run(q: Any, k: Any, v: Any) -> Any:
        return sparse_attention(q, k, v, pattern)

    traced = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert not attend._compiled
    assert torch.equal(traced(*qkv), run(*qkv)) and attend._compiled


def test_export():
    model = Model()
    x = torch.randn(2, 50, WIDTH)
    dynamic = {"x": {1: torch.export.Dim("length", min=2, max=4096)}}
    program = torch.export.export(model, (x,), dynamic_shapes=dynamic)
    for n in (50, 90):
        x = torch.randn(2, n, WIDTH)
        for a, b in zip(program.module()(x), model(x)):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_opcheck():
    from splatc.runtime import torch_ops

    attend = any_length(PATTERN, "bhsd", None, True, None)
    qkv = [torch.randn(1, 2, 20, D, requires_grad=True) for _ in range(3)]
    torch.library.opcheck(torch_ops.attention, (*qkv, attend.handle, None, False))


@pytest.mark.parametrize("traced", [False, True])
def test_autocast(traced):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = Model(), torch.randn(2, 60, WIDTH)
    wanted = step(model, x)
    run = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager") if traced else model
    with torch.autocast("cpu", torch.bfloat16):
        got = step(run, x)
        assert model(x)[0].dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    for a, b in zip(got, wanted):
        if b.norm() > 1e-2:  # not the bias of keys
            assert relative_error(a.double().numpy(), b.double().numpy()) < 5e-2


def test_checkpoint():
    from torch.utils.checkpoint import checkpoint

    layer, x = SparseAttention(WIDTH, HEADS, PATTERN, head_dim=D), torch.randn(2, 60, WIDTH)
    grads = []
    for run in (layer, lambda y: checkpoint(layer, y, use_reentrant=False)):
        layer.zero_grad()
        run(x).square().sum().backward()
        grads.append([p.grad.clone() for p in layer.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize("demanded", [False, True])
def test_deterministic_whatever_is_demanded(demanded):
    model, x = Model(), torch.randn(2, 130, WIDTH)
    torch.use_deterministic_algorithms(demanded)
    try:
        first = step(model, x)
        for _ in range(5):
            assert all(torch.equal(a, b) for a, b in zip(step(model, x), first))
    finally:
        torch.use_deterministic_algorithms(False)


def test_it_learns():
    """A layer fits another one's output."""
    torch.manual_seed(0)
    teacher, pupil = (SparseAttention(WIDTH, HEADS, PATTERN, head_dim=D) for _ in range(2))
    x = torch.randn(4, 60, WIDTH)
    wanted = teacher(x).detach()
    optimizer = torch.optim.Adam(pupil.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (pupil(x) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


# -- wrong input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"embed_dim": 0}, InvalidInput, "embed_dim is 0"),
        ({"num_heads": 5, "head_dim": None}, InvalidInput, "embed_dim 48 is no multiple of 5 heads"),
        ({"num_kv_heads": 3}, InvalidInput, "4 heads cannot share 3"),
        ({"head_dim": True}, InvalidInput, "head_dim is True"),
        ({"pattern": [P.causal()] * 3}, InvalidInput, "for 3 heads, but there are 4"),
        ({"pattern": "causal & windw(3, 3)"}, InvalidInput, "windw"),
        ({"pattern": lambda b, h, q, k: q >= k}, InvalidInput, "a mask_mod has no lengths"),
        ({"softcap": -1.0}, InvalidInput, "softcap is -1"),
        ({"scale": "big"}, InvalidInput, "scale is 'big'"),
        ({"layout": "sbhd", "projections": False}, InvalidInput, "layout is 'sbhd'"),
        ({"dropout": 1.0}, InvalidInput, "dropout_p is 1.0: it must be at least 0 and below 1"),
        ({"relative_bias": 0}, InvalidInput, "relative_bias is 0"),
        ({"bias_align": "middle"}, InvalidInput, "bias_align is 'middle'"),
    ],
)
def test_wrong_options(options, error, message):
    given = {"embed_dim": WIDTH, "num_heads": HEADS, "pattern": PATTERN, "head_dim": D, **options}
    with pytest.raises(error, match=message):
        SparseAttention(**given)


def test_wrong_tensors():
    layer, bare = (SparseAttention(WIDTH, HEADS, P.documents([20]), head_dim=D, projections=p) for p in (True, False))
    q = torch.randn(1, HEADS, 20, D)
    with pytest.raises(InvalidInput, match=r"has shape \(20, 48\): it must be \(batch, seq, 48\)"):
        layer(torch.randn(20, WIDTH))
    with pytest.raises(InvalidInput, match="20"):
        layer(torch.randn(1, 21, WIDTH))
    with pytest.raises(InvalidInput, match="call it with q, k and v"):
        bare(q)
    with pytest.raises(InvalidInput, match=r"k has shape \(1, 2, 20, 16\): this module is for 4 heads of 16, bhsd"):
        bare(q, q[:, :2], q[:, :2])
    with pytest.raises(InvalidInput, match="torch tensors of 4 dimensions"):
        sparse_attention(q.numpy(), q.numpy(), q.numpy(), "causal")
    with pytest.raises(InvalidInput, match="different dtypes"):
        sparse_attention(q, q.double(), q, "causal")


def test_splatc_nn_comes_when_asked_for():
    assert splatc.nn.SparseAttention is SparseAttention and splatc.nn.functional.sparse_attention is sparse_attention
