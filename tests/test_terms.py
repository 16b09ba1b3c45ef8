"""Score expressions and dropout on the CPU against the float64 oracle: every term by itself, and all together."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

import splatc
from splatc import oracle
from splatc import patterns as P
from splatc.ir.dropout import kept
from splatc.ir.terms import Terms
from splatc.oracle import relative_error
from tests import library
from tests.test_attention import attention, poisoned_outputs, tensors  # noqa: F401  (the fixture)

torch = pytest.importorskip("torch")

BOUND = {"float32": 1e-5, "bfloat16": 1e-2, "float64": 1e-13}
D = 16
MIXED = P.causal("bottom_right") & (P.window(30, 0) | P.strided(16)) & ~P.global_rows(3)
SIZE, REACH = 13, 9
TERMS: dict[str, dict[str, Any]] = {
    "alibi": {"alibi_slopes": True}, "relative": {"relative_bias": True}, "block": {"block_bias": True},
    "sinks": {"sinks": True}, "dropout": {"dropout_p": 0.3},
}  # fmt: skip
EACH_AND_ALL = [*TERMS, "all"]
# Kernels take seconds to compile. A term is emitted alike whatever the dtype and the softcap: each by itself meets one
# kernel, in float32; with every dtype and with a softcap it meets that of all of them.
EACH_AND_ALL_BY_DTYPE = pytest.mark.parametrize(
    ("which", "dtype"), [*((which, "float32") for which in EACH_AND_ALL), ("all", "bfloat16"), ("all", "float64")])
ALL: dict[str, Any] = {name: value for options in TERMS.values() for name, value in options.items()}


def options_of(which: str, heads: int, q_len: int, kv_len: int, **more: Any) -> dict[str, Any]:
    """Random options of a call, in float64."""
    rng = np.random.default_rng(3)
    blocks = -(-q_len // SIZE), -(-kv_len // SIZE)
    shapes = {"alibi_slopes": (heads,), "relative_bias": (heads, 2 * REACH + 1), "block_bias": (heads, *blocks),
              "sinks": (heads,)}  # fmt: skip
    wanted = ALL if which == "all" else TERMS[which]
    options = {name: torch.from_numpy(rng.standard_normal(shapes[name])) for name in shapes if name in wanted}
    if "alibi_slopes" in options:
        options["alibi_slopes"] = options["alibi_slopes"].abs() / 8
    if "block_bias" in options:
        options["block_size"] = SIZE
    if "dropout_p" in wanted:
        options |= {"dropout_p": wanted["dropout_p"], "seed": 2**40 + 17}
    return {**options, **more}


def oracle_terms(options: dict[str, Any], q_len: int, kv_len: int, dtype: str) -> Terms:
    """What the oracle takes for the options of a call: as they are after conversion."""
    arrays = {name: x.detach().to(torch.float64 if dtype == "float64" else torch.float32).double().numpy()
              for name, x in options.items() if isinstance(x, torch.Tensor) and name != "seed"}  # fmt: skip
    seed = np.array([int(options["seed"])]) if options.get("dropout_p") else None
    shift = kv_len - q_len if options.get("bias_align") == "bottom_right" else 0
    return Terms(**arrays, seed=seed, block_size=options.get("block_size", 0), shift=shift,
                 dropout_p=options.get("dropout_p", 0.0))  # fmt: skip


def check(got: Any, qkv: Any, dense: np.ndarray, options: dict[str, Any], softcap: Any = None, times: Any = 1) -> None:
    """(o, lse) agree with the oracle."""
    dtype = str(qkv[0].dtype).removeprefix("torch.")
    o, lse = (x.double().numpy() for x in got)
    q, k, v = (x.double().numpy() for x in qkv)
    terms = oracle_terms(options, q.shape[2], k.shape[2], dtype)
    wanted, wanted_lse = oracle.attention(q, k, v, dense, None, softcap, terms)
    empty = np.isneginf(wanted_lse)
    assert (np.isneginf(lse) == empty).all() and np.isfinite(o).all()
    assert (o[wanted == 0] == 0).all() and relative_error(o, wanted) < BOUND[dtype] * times
    np.testing.assert_allclose(lse[~empty], wanted_lse[~empty], rtol=BOUND[dtype], atol=BOUND[dtype])


def run(qkv: Any, mask: Any, dense: np.ndarray, which: str, softcap: Any = None, gqa: bool = False, **more: Any) -> Any:
    heads, q_len, kv_len = qkv[0].shape[1], qkv[0].shape[2], qkv[1].shape[2]
    options = options_of(which, heads, q_len, kv_len, **more)
    q, k, v = qkv
    got = splatc.attention(q, k, v, mask, return_lse=True, enable_gqa=gqa, softcap=softcap, **options)
    check(got, qkv, dense, options, softcap)
    return got


def softcap_of(which: str) -> float | None:
    """With all terms only: see EACH_AND_ALL_BY_DTYPE."""
    return 2.0 if which == "all" else None


# -- results -----------------------------------------------------------------------------------------------------------


@EACH_AND_ALL_BY_DTYPE
def test_each_term_and_all(which, dtype):
    for shape in ((150, 150), (65, 201), (201, 65)):
        for align in ("top_left", "bottom_right"):
            run(tensors(*shape, heads=3, dtype=dtype), MIXED, MIXED.dense(*shape), which, bias_align=align)


@pytest.mark.parametrize("which", EACH_AND_ALL)
def test_views_heads_and_softcap(which):
    """Strided tiles, neighbourhoods, a pattern for each head, grouped heads, full tiles."""
    grid = P.neighborhood((12, 13), (5, 5))
    for pattern in (P.strided(7), grid, P.full(), P.longformer(10, 4)):
        run(tensors(156, 156), pattern, pattern.dense(156), which, softcap=softcap_of(which))
    heads = [MIXED, P.full(), P.strided(7), MIXED]
    dense = np.stack([p.dense(150) for p in heads])
    run(tensors(150, 150, batch=2, heads=4, kv_heads=2), heads, dense, which, gqa=True)


@EACH_AND_ALL_BY_DTYPE
def test_several_passes(which, dtype):
    pattern = P.causal() & (P.window(63, 0) | P.strided(128)) & ~P.window(40, -30)
    asked = {"alibi": "alibi", "relative": "relative_bias", "block": "block_bias"}
    parts = {asked.get(name, name): True for name in (TERMS if which == "all" else [which])}
    attend = splatc.compile(pattern, seq_len=2048, head_dim=D, dtype=dtype, target="cpu", **parts)
    assert attend.explain().passes > 1
    qkv = tensors(2048, 2048, heads=1, dtype=dtype)
    options = options_of(which, 1, 2048, 2048)
    check(attend(*qkv, return_lse=True, **options), qkv, pattern.dense(2048), options, times=2)


# -- gradients ---------------------------------------------------------------------------------------------------------

GRADIENT_BOUND = {"float32": 1e-4, "bfloat16": 1e-2, "float64": 1e-12}
CANCELLED = 5  # sums over all rows cancel: their error is larger by so much, in bfloat16 that of delta from rounded O
LEARNABLE = "alibi_slopes", "relative_bias", "block_bias", "sinks"


def backward(attend: Any, qkv: Any, options: dict[str, Any], do: Any = None, dlse: Any = None, **more: Any) -> Any:
    """(gradients of q, k, v and then of all terms that there are, do, dlse)."""
    learn = {name: options[name].detach().requires_grad_() for name in LEARNABLE if name in options}
    qkv = [x.detach().requires_grad_() for x in qkv]
    o, lse = attend(*qkv, return_lse=True, **{**options, **learn}, **more)
    rng = torch.Generator().manual_seed(7)
    do = torch.randn(o.shape, generator=rng, dtype=torch.float64).to(o.dtype) if do is None else do
    dlse = torch.randn(lse.shape, generator=rng).to(lse.dtype) if dlse is None else dlse
    return torch.autograd.grad([o, lse], [*qkv, *learn.values()], [do, dlse]), do, dlse


def check_gradients(attend: Any, qkv: Any, dense: np.ndarray, options: dict[str, Any], softcap: Any = None,
                    **more: Any) -> Any:  # fmt: skip
    """Each gradient agrees with the oracle."""
    got, do, dlse = backward(attend, qkv, options, **more)
    dtype = str(qkv[0].dtype).removeprefix("torch.")
    q, k, v = (x.double().numpy() for x in qkv)
    terms = oracle_terms(options, q.shape[2], k.shape[2], dtype)
    wanted = oracle.gradients(q, k, v, dense, do.double().numpy(), dlse.double().numpy(), None, softcap, terms)
    names = ["dq", "dk", "dv", *(name for name in LEARNABLE if name in options)]
    for name, x, y in zip(names, got, wanted, strict=True):
        assert x.shape == y.shape and torch.isfinite(x).all(), name
        bound = GRADIENT_BOUND[dtype] * (CANCELLED if name in LEARNABLE else 1)
        assert relative_error(x.double().numpy(), y) < bound, name
    return got


def compiled(mask: Any, q_len: int, kv_len: int, which: str, **options: Any) -> Any:
    names = {"alibi": "alibi", "relative": "relative_bias", "block": "block_bias"}
    parts = {names.get(name, name): True for name in (TERMS if which == "all" else [which])}
    return splatc.compile(mask, seq_len=q_len, kv_len=kv_len, **{
        "head_dim": D, "dtype": "float32", "target": "cpu", **parts, **options})  # fmt: skip


@EACH_AND_ALL_BY_DTYPE
def test_gradients_of_each_term_and_all(which, dtype):
    attend = compiled(MIXED, 150, 150, which, dtype=dtype)
    for shape in ((150, 150), (65, 201), (201, 65)):
        for align in ("top_left", "bottom_right"):
            options = options_of(which, 3, *shape, bias_align=align)
            check_gradients(attend, tensors(*shape, heads=3, dtype=dtype), MIXED.dense(*shape), options)


@pytest.mark.parametrize("which", EACH_AND_ALL)
def test_gradients_with_views_heads_and_softcap(which):
    cap = softcap_of(which)
    for pattern in (P.strided(7), P.neighborhood((12, 13), (5, 5)), P.full(), P.longformer(10, 4)):
        attend = compiled(pattern, 156, 156, which, softcap=cap)
        check_gradients(attend, tensors(156, 156), pattern.dense(156), options_of(which, 2, 156, 156), softcap=cap)
    heads = [MIXED, P.full(), P.strided(7), MIXED]
    dense = np.stack([p.dense(150) for p in heads])
    attend, options = compiled(heads, 150, 150, which), options_of(which, 4, 150, 150)
    check_gradients(attend, tensors(150, 150, batch=2, heads=4, kv_heads=2), dense, options, enable_gqa=True)


@pytest.mark.parametrize("which", EACH_AND_ALL)
def test_gradients_over_several_passes(which):
    pattern = P.causal() & (P.window(63, 0) | P.strided(128)) & ~P.window(40, -30)
    attend = compiled(pattern, 2048, 2048, which)
    assert attend.explain().passes > 1
    options = options_of(which, 1, 2048, 2048)
    check_gradients(attend, tensors(2048, 2048, heads=1), pattern.dense(2048), options)


@pytest.mark.parametrize("which", ["relative", "all"])  # without sinks, rows without keys have an LSE of -inf
def test_gradcheck(which):
    pattern = P.causal("bottom_right") & (P.window(5, 0) | P.strided(4)) & ~P.global_rows(2)
    attend = compiled(pattern, 13, 17, which, head_dim=8, v_head_dim=5, dtype="float64", softcap=1.5)
    options = options_of(which, 2, 13, 17, bias_align="bottom_right")
    if "block_size" in options:
        options |= {"block_size": 5, "block_bias": torch.randn(2, 3, 4, dtype=torch.float64)}
    learn = [name for name in LEARNABLE if name in options]
    leaves = [*tensors(13, 17, heads=2, kv_heads=1, d=8, dv=5, dtype="float64"), *(options[name] for name in learn)]
    full = torch.from_numpy(pattern.dense(13, 17).any(1))
    assert not full.all()

    def f(q, k, v, *values):
        o, lse = attend(q, k, v, return_lse=True, enable_gqa=True, **options | dict(zip(learn, values)))
        return o, lse if "sinks" in options else lse[..., full]  # the others are -inf

    assert torch.autograd.gradcheck(f, [x.requires_grad_() for x in leaves])


def test_runs_are_equal_whatever_the_threads():
    qkv, options = tensors(200, 200, batch=2, heads=6, kv_heads=2), options_of("all", 6, 200, 200)
    first, do, dlse = backward(compiled(MIXED, 200, 200, "all"), qkv, options, enable_gqa=True)
    one = tensors(700, 700, heads=1)
    single, *rest = backward(compiled(MIXED, 700, 700, "all"), one, options_of("all", 1, 700, 700))
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            attend = compiled(MIXED, 200, 200, "all")
            for _ in range(4):
                again, _, _ = backward(attend, qkv, options, do, dlse, enable_gqa=True)
                assert all(torch.equal(x, y) for x, y in zip(again, first))
            again, _, _ = backward(compiled(MIXED, 700, 700, "all"), one, options_of("all", 1, 700, 700), *rest)
            assert all(torch.equal(x, y) for x, y in zip(again, single))
    finally:
        torch.set_num_threads(threads)


@settings(max_examples=25)
@given(case=library.strided_patterns())
@pytest.mark.usefixtures("eager_views")
def test_strided_patterns(case):
    """Through residue, block and patch views, in up to three passes: results and gradients, with all terms."""
    pattern, q_len, kv_len = case
    attend, dense = compiled(pattern, q_len, kv_len, "all", dtype="float64"), pattern.dense(q_len, kv_len)
    qkv, options = tensors(q_len, kv_len, dtype="float64"), options_of("all", 2, q_len, kv_len)
    check(attend(*qkv, return_lse=True, **options), qkv, dense, options)
    got, do, dlse = backward(attend, qkv, options)
    q, k, v = (x.numpy() for x in qkv)
    terms = oracle_terms(options, q_len, kv_len, "float64")
    wanted = oracle.gradients(q, k, v, dense, do.numpy(), dlse.numpy(), None, None, terms)
    for x, y in zip(got, wanted, strict=True):
        np.testing.assert_allclose(x.numpy(), y, rtol=1e-9, atol=1e-9)


# -- single properties -------------------------------------------------------------------------------------------------


def test_dropped_is_what_is_said_to_be():
    """With v = 1 for one key at a time, o is the probability after dropout: 0, or divided by 1 - p."""
    q, k, _ = tensors(70, 90, batch=2, heads=3)
    attend = compiled("full", 70, 90, "dropout")
    eyes = [eye.expand(2, 3, 90, D).contiguous() for eye in torch.eye(90, 96).split(D, 1)]  # D keys at a time

    def probabilities(**options):
        return torch.cat([attend(q, k, eye, **options) for eye in eyes], -1)[..., :90]

    plain = probabilities(dropout_p=0.0)
    for seed in (0, 7, -1, 2**63 - 1):
        wanted = torch.from_numpy(kept(seed, 0.4, 2, 3, 70, 90))
        got = probabilities(dropout_p=0.4, seed=seed)
        assert torch.equal(got != 0, wanted)
        torch.testing.assert_close(got, plain * wanted / 0.6, rtol=1e-6, atol=0)
        v = eyes[0].clone().requires_grad_()
        (dv,) = torch.autograd.grad(attend(q, k, v, dropout_p=0.4, seed=seed).sum(), v)
        torch.testing.assert_close(dv[..., 0], got.sum(2))


def test_seeds():
    qkv = tensors(100, 100)
    attend = compiled(P.causal(), 100, 100, "dropout")

    def run(**options):
        return attend(*qkv, dropout_p=0.5, **options)

    assert torch.equal(run(seed=3), run(seed=torch.tensor(3))) and not torch.equal(run(seed=3), run(seed=4))
    torch.manual_seed(11)
    first, second = run(), run()
    torch.manual_seed(11)
    assert torch.equal(run(), first) and torch.equal(run(), second) and not torch.equal(first, second)
    state = torch.get_rng_state()
    assert torch.equal(attend(*qkv), attention(qkv, P.causal()))  # dropout_p is 0: nothing is drawn
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("q_len, kv_len", [(0, 5), (5, 0), (0, 0)])
def test_no_queries_or_no_keys(q_len, kv_len):
    options = options_of("all", 2, q_len, kv_len)
    grads, _, dlse = backward(compiled(P.causal(), 10, 10, "all"), tensors(q_len, kv_len), options)
    o, lse = compiled(P.causal(), 10, 10, "all")(*tensors(q_len, kv_len), return_lse=True, **options)
    assert (o == 0).all() and torch.equal(lse, options["sinks"].float()[None, :, None].expand(1, 2, q_len))
    assert all((x == 0).all() for x in grads[:-1])
    torch.testing.assert_close(grads[-1], dlse.sum((0, 2)).double())


def test_a_sink_of_minus_infinity_is_none():
    qkv = tensors(100, 100)
    pattern = P.causal() & ~P.global_rows(3)
    attend = compiled(pattern, 100, 100, "sinks")
    options = {"sinks": torch.full((2,), -float("inf"))}
    got, do, dlse = backward(attend, qkv, options)
    plain = splatc.compile(pattern, seq_len=100, head_dim=D, dtype="float32", target="cpu")
    wanted, _, _ = backward(plain, qkv, {}, do, dlse)
    assert all(torch.equal(x, y) for x, y in zip(got[:3], wanted)) and (got[3] == 0).all()
    for x, y in zip(attend(*qkv, return_lse=True, **options), plain(*qkv, return_lse=True)):
        assert torch.equal(x, y)


def test_large_sinks_and_biases_do_not_overflow():
    qkv = tensors(100, 100)
    for size in (1e4, -1e4):
        options = {"sinks": torch.full((2,), size), "relative_bias": torch.full((2, 5), size)}
        attend = splatc.compile(P.causal(), seq_len=100, head_dim=D, dtype="float32", target="cpu", sinks=True,
                                relative_bias=True)  # fmt: skip
        check(attend(*qkv, return_lse=True, **options), qkv, P.causal().dense(100), options, times=100)


def test_numpy_arrays():
    qkv: Any = [x.numpy() for x in tensors(90, 90)]
    options = options_of("all", 2, 90, 90)
    arrays = {name: x.numpy() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    got = attention(qkv, MIXED, return_lse=True, **arrays)
    assert isinstance(got[0], np.ndarray)
    wanted = attention(tensors(90, 90), MIXED, return_lse=True, **options)
    assert all(np.array_equal(x, y.numpy()) for x, y in zip(got, wanted))


def test_layouts():
    qkv, options = tensors(90, 120, batch=2, heads=3), options_of("all", 3, 90, 120, bias_align="bottom_right")
    grads, do, dlse = backward(compiled(MIXED, 90, 120, "all"), qkv, options)
    moved = [x.transpose(1, 2).contiguous() for x in qkv]
    attend = compiled(MIXED, 90, 120, "all", layout="bshd")
    other, _, _ = backward(attend, moved, options, do.transpose(1, 2), dlse)
    assert all(torch.equal(x.transpose(1, 2), y) for x, y in zip(other[:3], grads[:3]))
    assert all(torch.equal(x, y) for x, y in zip(other[3:], grads[3:]))


def test_only_what_is_there_is_compiled():
    qkv = tensors(90, 90)
    assert torch.equal(attention(qkv, MIXED, dropout_p=0.0), attention(qkv, MIXED))
    attend = compiled(MIXED, 90, 90, "all")
    assert attend.kernel.spec.name.endswith("_alibi_relative_block_sinks_dropout")
