"""N:M attention on the CPU, by its kernels and densely in PyTorch, against the float64 oracle."""

import pickle
from typing import Any

import numpy as np
import pytest

import splatc
from splatc import oracle
from splatc import patterns as P
from splatc.oracle import relative_error
from splatc.patterns.pruned import Pruned, split
from tests.test_terms import LEARNABLE, options_of, oracle_terms

torch = pytest.importorskip("torch")

from splatc.nn import SparseAttention  # noqa: E402
from splatc.nn.functional import dense_attention, sparse_attention  # noqa: E402

D = 16
NM24, NM12 = P.nm(2, 4), P.nm(1, 2)
BOUND = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-2, "float64": 1e-13}
HOLES = P.causal("bottom_right") & (P.window(30, 0) | P.strided(16)) & ~P.global_rows(3)
SIZES = [(1, 1), (17, 200), (127, 129), (200, 66)]


def tensors(q_len: int, kv_len: int, dtype: str = "float32", batch: int = 2, heads: int = 2,
            kv_heads: int = 0) -> tuple[Any, Any]:  # fmt: skip
    """(q, k, v) that require gradients, and a gradient of o."""
    make = torch.Generator().manual_seed(q_len + kv_len)
    shapes = [(batch, heads, q_len, D), *[(batch, kv_heads or heads, kv_len, D)] * 2, (batch, heads, q_len, D)]
    *qkv, do = (torch.randn(shape, generator=make).to(getattr(torch, dtype)) for shape in shapes)
    return [x.requires_grad_() for x in qkv], do


def wide(x: Any) -> np.ndarray:
    return x.detach().double().numpy()


def check(attend: Any, pattern: Any, qkv: Any, do: Any, options: Any = None, softcap: Any = None,
          **more: Any) -> None:  # fmt: skip
    """attend(q, k, v, pattern) and its gradients are the oracle's."""
    q, k, v = qkv
    q_len, kv_len, heads = q.shape[2], k.shape[2], q.shape[1]
    static, pruning = split(P.as_pattern(pattern, q_len=q_len, kv_len=kv_len, heads=heads))
    dense, dtype = static.dense(q_len, kv_len), str(q.dtype).removeprefix("torch.")
    learned = [x.requires_grad_() for name, x in (options or {}).items() if name in LEARNABLE]
    gqa, given = heads != k.shape[1], {**more, **({"softcap": softcap} if softcap else {}), **(options or {})}
    o, lse = attend(q, k, v, pattern, return_lse=True, enable_gqa=gqa, **given)
    dlse = torch.linspace(-1, 1, lse.numel(), dtype=lse.dtype).reshape(lse.shape)
    torch.autograd.backward((o, lse), (do, dlse))
    known: Any = {"softcap": softcap, "pruning": pruning}
    if options:
        known["terms"] = oracle_terms(options, q_len, kv_len, dtype)
    a, b, c = (wide(x) for x in qkv)
    wanted, wanted_lse = oracle.attention(a, b, c, dense, **known)
    empty = np.isneginf(wanted_lse)
    dlse = np.where(empty, 0, wide(dlse))
    assert (np.isneginf(wide(lse)) == empty).all() and (wide(o)[empty] == 0).all()
    assert relative_error(wide(o), wanted) < BOUND[dtype]
    np.testing.assert_allclose(wide(lse)[~empty], wanted_lse[~empty], rtol=BOUND[dtype], atol=BOUND[dtype])
    results = oracle.gradients(a, b, c, dense, wide(do), dlse, **known)
    for x, gradient in zip((*qkv, *learned), results, strict=True):
        error = np.linalg.norm(wide(x.grad) - gradient) / max(np.linalg.norm(gradient), 1.0)
        assert error < 10 * BOUND[dtype]


@pytest.mark.parametrize("attend", [splatc.attention, dense_attention])
@pytest.mark.parametrize("nm", [NM24, NM12], ids=str)
@pytest.mark.parametrize("static", [P.full(), P.causal(), HOLES], ids=str)
def test_patterns_and_lengths(static, nm, attend):
    for size in SIZES:
        check(attend, static & nm, *tensors(*size))


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_dtypes(dtype):
    check(splatc.attention, HOLES & NM24, *tensors(100, 131, dtype))
    check(dense_attention, HOLES & NM24, *tensors(100, 131, dtype))


@pytest.mark.parametrize("attend", [splatc.attention, dense_attention])
def test_heads_in_groups_and_each_with_its_pattern(attend):
    check(attend, P.causal() & NM24, *tensors(129, 129, heads=4, kv_heads=2))
    heads = [P.causal() & NM24, HOLES & NM24, NM24, "blocked(10) & nm(2, 4)"]
    check(attend, heads, *tensors(129, 129, heads=4, kv_heads=1))


def test_terms_and_softcap():
    """Scores are compared after all steps; sinks are no keys, and dropout is of what stays."""
    options = {k: x for name in ("alibi", "sinks", "dropout") for k, x in options_of(name, 2, 100, 131).items()}
    check(splatc.attention, HOLES & NM24, *tensors(100, 131), options, softcap=2.0)
    check(dense_attention, HOLES & NM24, *tensors(100, 131), softcap=2.0)


def test_a_compiled_mask_at_other_lengths():
    attend = splatc.compile(P.causal() & NM24, seq_len=64, head_dim=D, dtype="float32", target="cpu", layout="bshd")
    for length in (64, 5, 130):
        (q, k, v), _ = tensors(length, length)
        got = attend(*(x.detach().transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
        wanted, _ = oracle.attention(wide(q), wide(k), wide(v), P.causal().dense(length), pruning=NM24.pruning)
        assert relative_error(wide(got), wanted) < 1e-5


# -- ties, and what is not finite --------------------------------------------------------------------------------------


@pytest.mark.parametrize("attend", [splatc.attention, dense_attention])
def test_equal_scores_keep_the_lower_keys(attend):
    """Whole numbers: many scores are equal, and all exact."""
    for nm in (NM24, NM12):
        qkv, do = tensors(70, 90)
        exact = [(x.detach() * 0.7).round().requires_grad_() for x in qkv]
        check(attend, P.causal("bottom_right") & nm, exact, do, scale=None)
    q = torch.zeros(1, 1, 3, D)
    k, v = torch.randn(1, 1, 11, D), torch.eye(11).reshape(1, 1, 11, 11)
    o = attend(q, k, v, NM24)
    stay = [1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 0]  # the last group is short
    torch.testing.assert_close(o[0, 0], torch.tensor(stay) / 6 * torch.ones(3, 1))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_both_directions_keep_the_same_keys(dtype):
    """Scores that only rounding tells apart: all walks must round alike. P is read through V and dO of unit vectors."""
    make = torch.Generator().manual_seed(0)
    kind, n, batch = getattr(torch, dtype), D, 8
    one = torch.randn(n, generator=make, dtype=torch.float64)
    k = torch.stack([one[torch.randperm(n, generator=make)] for _ in range(batch * n)]).to(kind).reshape(batch, 1, n, n)
    q = (0.3 * torch.linspace(0.5, 2, n, dtype=kind))[:, None].expand(batch, 1, n, n)
    unit = torch.eye(n, dtype=kind).expand(batch, 1, n, n)
    q, k, v = (x.clone().requires_grad_() for x in (q, k, unit))
    o = splatc.attention(q, k, v, NM24)
    o.backward(unit)
    p = o.detach()
    assert ((p > 0).sum(-1) == n // 2).all()
    assert len({tuple(row) for row in (p > 0).flatten(0, 2).tolist()}) > batch  # rounding differs from row to row
    assert ((v.grad.transpose(2, 3) > 0) == (p > 0)).all()  # of the walk over keys: with dO = 1, dV is P transposed
    ds = p * (unit - (unit * p).sum(-1, keepdim=True))  # with V = 1, by the keys that the forward pass kept
    for got, wanted in ((q.grad, ds @ k.detach() / 4), (k.grad, ds.transpose(2, 3) @ q.detach() / 4)):
        assert relative_error(wide(got), wide(wanted)) < 1e-4


def test_nan_is_seen_and_what_is_pruned_is_not():
    (q, k, v), do = tensors(40, 40)
    with torch.no_grad():
        k[0, 0, 13] = float("nan")
        v[1, 1, 22] = float("inf")
    for attend in (splatc.attention, dense_attention):
        o = attend(q, k, v, P.causal() & NM24)
        assert o[0, 0, 13:].isnan().all() and o[0, 0, :13].isfinite().all() and o[0, 1].isfinite().all()
    o = splatc.attention(q, k, v, P.causal() & NM24)
    finite = oracle.attention(wide(q), wide(k), np.broadcast_to(np.arange(40) == 22, (2, 2, D, 40)).swapaxes(2, 3),
                              P.causal().dense(40), pruning=NM24.pruning)[0][1, 1] == 0  # fmt: skip
    rows = finite.all(1)
    assert 18 + 1 < rows.sum() < 40  # some of the later queries did not keep key 22
    assert o[1, 1, rows].isfinite().all() and not o[1, 1, ~rows].isfinite().any()
    o.backward(do)
    assert q.grad[1, 0].isfinite().all() and q.grad[1, 1, rows].isfinite().all()


# -- in PyTorch --------------------------------------------------------------------------------------------------------


def test_dense_attention_has_masks_layouts_and_dropout():
    (q, k, v), _ = tensors(33, 33)
    pattern = P.causal() & NM24
    padding = torch.arange(33) < torch.tensor([20, 33])[:, None]
    o = dense_attention(q, k, v, pattern, mask=padding[:, None, None])
    for b, kv_len in enumerate((20, 33)):
        one, two, three = (x[b : b + 1, :, :kv_len] for x in (q, k, v))
        same = dense_attention(one, two, three, pattern)
        torch.testing.assert_close(o[b : b + 1, :, :kv_len], same)
    one, two, three = (x.transpose(1, 2) for x in (q, k, v))
    turned = dense_attention(one, two, three, pattern, layout="bshd")
    torch.testing.assert_close(turned.transpose(1, 2), dense_attention(q, k, v, pattern))
    torch.manual_seed(0)
    dropped = torch.stack([dense_attention(q, k, v, pattern, dropout_p=0.2) for _ in range(60)])
    assert (dropped.mean(0) - dense_attention(q, k, v, pattern)).abs().max() < 0.6 and dropped.std(0).max() > 0.1


def test_dense_attention_computes_in_float32_under_autocast():
    (q, k, v), _ = tensors(33, 33)
    with torch.autocast("cpu", torch.bfloat16):
        o = dense_attention(q, k, v, NM24)
    torch.testing.assert_close(o, dense_attention(q, k, v, NM24), atol=0, rtol=0)


def test_module_and_torch_compile():
    torch.manual_seed(0)
    layer = SparseAttention(32, 2, "causal & nm(2, 4)")
    x = torch.randn(2, 50, 32)
    y = layer(x)
    assert isinstance(layer.pattern, Pruned) and "pattern=causal() & nm(2, 4)" in repr(layer)
    torch.testing.assert_close(pickle.loads(pickle.dumps(layer))(x), y)
    q, k, v = (p(x).unflatten(-1, (2, 16)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    dense = dense_attention(q, k, v, layer.pattern).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer.out_proj(dense), y)

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def compiled(q: Any, k: Any, v: Any) -> Any:
        return sparse_attention(q, k, v, "causal & nm(2, 4)")

    torch.testing.assert_close(compiled(q, k, v), sparse_attention(q, k, v, layer.pattern))
