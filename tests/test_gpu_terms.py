"""Biases, sinks and dropout on a Hopper GPU, forward and backward, and their gradients, against the float64 oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import splatc
from splatc import oracle
from splatc import patterns as P
from splatc.ir.terms import Terms
from tests.gpu_gradients import DEVICE, MARKS, draw, draw_dlse, mask_of, poisoned

pytestmark = MARKS
MASKS = {
    "causal": P.causal(), "window": P.window(80, 10), "strided": P.causal() & (P.window(30, 0) | P.strided(32)),
    "long rows": P.longformer(40, 8), "gathered": P.random_blocks(2, 3), "grid": P.neighborhood((16, 20), 5),
    "per head": P.per_head([P.causal(), P.window(9, 30)]),
}  # fmt: skip
EVERYTHING = "alibi", "relative", "block", "sinks", "dropout"
CASES = [(one,) for one in EVERYTHING] + [EVERYTHING, ("alibi", "dropout"), ("block", "sinks")]
SLOPES = 3e-2  # one number a head, of which much cancels
BOUND = {"bfloat16": 1e-2, "float16": 5e-3, "float32": 2e-3}


def term_options(names: tuple[str, ...], heads: int, q_len: int, kv_len: int) -> dict[str, Any]:
    """Random options of a call."""
    generator = torch.Generator(DEVICE).manual_seed(len(names) + q_len)

    def normal(*shape: int) -> Any:
        return torch.randn(*shape, device=DEVICE, generator=generator)

    options: dict[str, Any] = {}
    if "alibi" in names:
        options["alibi_slopes"] = normal(heads).abs() * 0.02
    if "relative" in names:
        options["relative_bias"] = normal(heads, 101)
    if "block" in names:
        options |= {"block_bias": normal(heads, -(-q_len // 48), -(-kv_len // 48)), "block_size": 48}
    if "sinks" in names:
        options["sinks"] = normal(heads) + 1
    if "dropout" in names:
        options |= {"dropout_p": 0.25, "seed": 2**41 + 12345}
    return options


def oracle_terms(options: dict[str, Any], shift: int = 0) -> Terms:
    """The same for the oracle."""
    arrays = {name: x.double().cpu().numpy() for name, x in options.items() if torch.is_tensor(x)}
    seed = np.array([options["seed"]]) if "seed" in options else None
    return Terms(**arrays, seed=seed, block_size=options.get("block_size", 0), shift=shift,
                 dropout_p=options.get("dropout_p", 0.0))  # fmt: skip


def check(pattern: Any, q_len: int, kv_len: int, dim: int, dtype: str, names: tuple[str, ...], kv_heads: int = 2,
          softcap: float | None = None, align: str = "top_left") -> None:  # fmt: skip
    q, k, v, _ = draw(q_len, kv_len, dim, dtype, heads=2, kv_heads=kv_heads, batch=2)
    options = term_options(names, 2, q_len, kv_len)
    o, lse = splatc.attention(q, k, v, pattern, return_lse=True, enable_gqa=kv_heads != 2, softcap=softcap,
                              bias_align=align, **options)  # fmt: skip
    shift = kv_len - q_len if align == "bottom_right" else 0
    q64, k64, v64 = (x.double().cpu().numpy() for x in (q, k, v))
    mask = mask_of(pattern, 2, q_len, kv_len).cpu().numpy()
    want, want_lse = oracle.attention(q64, k64, v64, mask, softcap=softcap, terms=oracle_terms(options, shift))
    assert oracle.relative_error(o.double().cpu().numpy(), want) < BOUND[dtype]
    got, finite = lse.double().cpu().numpy(), np.isfinite(want_lse)
    assert np.array_equal(np.isfinite(got), finite)
    assert np.abs(got[finite] - want_lse[finite]).max(initial=0) < (2e-3 if dtype == "float32" else 1e-3)


@pytest.mark.parametrize("names", CASES, ids="+".join)
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("dtype, dim", [("bfloat16", 64), ("float16", 128)])
def test_forward(name: str, names: tuple[str, ...], dtype: str, dim: int) -> None:
    check(MASKS[name], 320, 320, dim, dtype, names)


@pytest.mark.parametrize("names", CASES[:6], ids="+".join)
@pytest.mark.parametrize(
    "q_len, kv_len, align", [(1, 129, "bottom_right"), (127, 300, "bottom_right"), (300, 65, "top_left")]
)
def test_odd_sizes_and_grouped_heads(names: tuple[str, ...], q_len: int, kv_len: int, align: str) -> None:
    check(P.causal(align), q_len, kv_len, 64, "bfloat16", names, kv_heads=1, align=align)


@pytest.mark.parametrize("names", CASES[:6], ids="+".join)
def test_float32_and_softcap(names: tuple[str, ...]) -> None:
    check(MASKS["strided"], 500, 500, 64, "float32", names)
    check(MASKS["window"], 500, 500, 128, "bfloat16", names, softcap=2.0)


def test_sinks_of_long_rows_and_empty_ones() -> None:
    """Rows in parts have a sink only once; rows without keys have nothing but it."""
    check(P.longformer(40, 8), 4096, 4096, 64, "bfloat16", ("sinks",))
    q, k, v, _ = draw(64, 64, 64, "bfloat16")
    sinks = torch.tensor([1.0, -3.0], device=DEVICE)
    o, lse = splatc.attention(q, k, v, P.causal() & ~P.causal(), return_lse=True, sinks=sinks)
    assert not o.any()
    assert torch.equal(lse, sinks[None, :, None].expand_as(lse))


def test_dropout_is_a_function_of_the_seed() -> None:
    q, k, v, _ = draw(512, 512, 64, "bfloat16")

    def attend(seed: Any, p: float = 0.5) -> Any:
        return splatc.attention(q, k, v, P.causal(), dropout_p=p, seed=seed)

    assert torch.equal(attend(7), attend(7)) and not torch.equal(attend(7), attend(8))
    assert torch.equal(attend(torch.tensor(7, device=DEVICE)), attend(7))
    torch.manual_seed(3)
    one = attend(None)
    torch.manual_seed(3)
    assert torch.equal(one, attend(None)) and not torch.equal(one, attend(None))
    compiled = splatc.compile(P.causal(), seq_len=512, head_dim=64, dtype="bfloat16", target=DEVICE, dropout=True)
    assert torch.equal(compiled(q, k, v), splatc.attention(q, k, v, P.causal()))


def test_terms_in_a_cuda_graph() -> None:
    """A graph reads the terms' tensors anew: other slopes and another seed need no other graph."""
    q, k, v, _ = draw(256, 256, 64, "bfloat16")
    slopes, seed = torch.full((2,), 0.01, device=DEVICE), torch.tensor([1], device=DEVICE)
    attend = splatc.compile(P.causal(), seq_len=256, head_dim=64, dtype="bfloat16", target=DEVICE, alibi=True,
                            dropout=True)  # fmt: skip

    def call() -> Any:
        return attend(q, k, v, alibi_slopes=slopes, seed=seed, dropout_p=0.3)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = call()
    slopes.fill_(0.05)
    seed.fill_(9)
    graph.replay()
    assert torch.equal(o, call())


# -- gradients ---------------------------------------------------------------------------------------------------------


def check_gradients(pattern: Any, q_len: int, kv_len: int, dim: int, dtype: str, names: tuple[str, ...], heads: int = 2,
                    kv_heads: int = 2, softcap: float | None = None, align: str = "top_left", batch: int = 2,
                    with_dlse: bool = False) -> list[Any]:  # fmt: skip
    """Of q, k, v and every tensor of the terms, by autograd from memory full of NaN."""
    q, k, v, do = draw(q_len, kv_len, dim, dtype, heads=heads, kv_heads=kv_heads, batch=batch)
    options = term_options(names, heads, q_len, kv_len)
    tensors = {name: x.requires_grad_() for name, x in options.items() if torch.is_tensor(x)}
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    dlse = draw_dlse(do) if with_dlse else torch.zeros(do.shape[:3], device=DEVICE)
    with poisoned():
        a, b, c = leaves
        o, lse = splatc.attention(a, b, c, pattern, return_lse=True, enable_gqa=heads != kv_heads, softcap=softcap,
                                  bias_align=align, **options)  # fmt: skip
        got = torch.autograd.grad([o, lse], [*leaves, *tensors.values()], [do, dlse])
    q64, k64, v64, do64, dlse64 = (x.double().cpu().numpy() for x in (q, k, v, do, dlse))
    mask = mask_of(pattern, heads, q_len, kv_len).cpu().numpy()
    detached = {name: x.detach() if torch.is_tensor(x) else x for name, x in options.items()}
    terms = oracle_terms(detached, kv_len - q_len if align == "bottom_right" else 0)
    want = oracle.gradients(q64, k64, v64, mask, do64, dlse64, softcap=softcap, terms=terms)
    assert len(got) == len(want)
    for name, x, wanted in zip(("dq", "dk", "dv", *tensors), got, want, strict=True):
        assert torch.isfinite(x).all(), name
        bound = SLOPES if name == "alibi_slopes" else 1e-2
        assert oracle.relative_error(x.double().cpu().numpy(), wanted) < bound, name
    return list(got)


@pytest.mark.parametrize("names", CASES, ids="+".join)
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("dtype, dim", [("bfloat16", 64), ("float16", 128)])
def test_gradients(name: str, names: tuple[str, ...], dtype: str, dim: int) -> None:
    check_gradients(MASKS[name], 320, 320, dim, dtype, names, with_dlse=dim == 64)


@pytest.mark.parametrize("names", [*CASES[:5], ("alibi", "dropout")], ids="+".join)
@pytest.mark.parametrize("name", ["strided", "long rows", "grid"])
@pytest.mark.parametrize("dtype, dim", [("bfloat16", 192), ("float16", 256)])
def test_gradients_of_wide_heads(name: str, names: tuple[str, ...], dtype: str, dim: int) -> None:
    """dV and dK by a kernel each."""
    check_gradients(MASKS[name], 320, 320, dim, dtype, names, with_dlse=dim == 192)


@pytest.mark.parametrize("names", CASES[:6], ids="+".join)
@pytest.mark.parametrize(
    "q_len, kv_len, align", [(1, 129, "bottom_right"), (127, 300, "bottom_right"), (300, 65, "top_left")]
)
def test_gradients_of_odd_sizes_and_grouped_heads(names: tuple[str, ...], q_len: int, kv_len: int, align: str) -> None:
    check_gradients(P.causal(align), q_len, kv_len, 64, "float16", names, heads=4, kv_heads=2, align=align)
    check_gradients(P.causal(align), q_len, kv_len, 128, "float16", names, align=align, softcap=3.0)


@pytest.mark.parametrize("names", [("alibi", "relative", "block", "sinks"), ("dropout", "relative")], ids="+".join)
def test_gradients_are_the_same_each_time(names: tuple[str, ...]) -> None:
    """Also of long rows, which go in parts, and of a pattern in two passes."""
    for pattern in (P.longformer(40, 8), MASKS["strided"]):
        first = check_gradients(pattern, 2048, 2048, 64, "bfloat16", names, batch=1)
        for _ in range(5):
            again = check_gradients(pattern, 2048, 2048, 64, "bfloat16", names, batch=1)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("learning", [("alibi_slopes",), ("relative_bias", "sinks"), ("block_bias",), ()], ids="+".join)
def test_a_part_of_the_terms_may_learn(learning: tuple[str, ...]) -> None:
    """Each with a kernel of its own, also in two passes and with a softcap."""
    q, k, v, do = draw(320, 320, 64, "bfloat16")
    options = term_options(("alibi", "relative", "block", "sinks"), 2, 320, 320)
    tensors = {name: x.detach().requires_grad_(name in learning) for name, x in options.items() if torch.is_tensor(x)}
    a, b, c = leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o = splatc.attention(a, b, c, MASKS["strided"], softcap=3.0, **{**options, **tensors})
    got = torch.autograd.grad(o, [*leaves, *(tensors[name] for name in learning)], do)
    q64, k64, v64, do64 = (x.double().cpu().numpy() for x in (q, k, v, do))
    mask = mask_of(MASKS["strided"], 2, 320, 320).cpu().numpy()
    *wanted, slopes, relative, block, sinks = oracle.gradients(q64, k64, v64, mask, do64, softcap=3.0,
                                                               terms=oracle_terms(options))  # fmt: skip
    of_terms = {"alibi_slopes": slopes, "relative_bias": relative, "block_bias": block, "sinks": sinks}
    wanted += [of_terms[name] for name in learning]
    for name, x, y in zip(("dq", "dk", "dv", *learning), got, wanted, strict=True):
        assert oracle.relative_error(x.double().cpu().numpy(), y) < (SLOPES if name == "alibi_slopes" else 1e-2), name


def test_gradients_of_bias_know_no_scale() -> None:
    """Sums are integers: gradients a million times larger or smaller are as precise."""
    q, k, v, do = draw(512, 512, 64, "float32")
    q, k, v = (x.bfloat16() for x in (q, k, v))
    table = torch.zeros(2, 65, device=DEVICE, requires_grad=True)
    grads = []
    for factor in (2.0**-20, 1.0, 2.0**20):
        o = splatc.attention(q, k, v, P.causal(), relative_bias=table)
        grads.append(torch.autograd.grad(o, table, (do * factor).bfloat16())[0] / factor)
    assert oracle.relative_error(grads[0].cpu().numpy(), grads[1].cpu().numpy()) < 1e-5
    assert oracle.relative_error(grads[2].cpu().numpy(), grads[1].cpu().numpy()) < 1e-5


def test_a_number_that_is_none_shows_in_gradients_of_biases() -> None:
    q, k, v, do = draw(300, 300, 64, "bfloat16")
    slopes = torch.full((2,), 0.01, device=DEVICE, requires_grad=True)
    sinks = torch.zeros(2, device=DEVICE, requires_grad=True)
    do[0, 1, 17, 3] = float("nan")
    o = splatc.attention(q, k, v, P.causal(), alibi_slopes=slopes, sinks=sinks)
    for grad in torch.autograd.grad(o, [slopes, sinks], do):
        assert torch.isfinite(grad).tolist() == [True, False]
