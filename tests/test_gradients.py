"""Gradients on the CPU against float64: every pattern, dtype, layout and kind of input."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

import splatc
from splatc import oracle
from splatc import patterns as P
from splatc.codegen.kernel import kernel_spec
from splatc.codegen.target import Target
from splatc.formats.acsr import ACSR
from splatc.ir.interpret import interpret_gradients
from splatc.ir.passes import PASSES, Schedule, lower, run_passes
from splatc.oracle import relative_error
from tests import library
from tests.test_attention import tensors

torch = pytest.importorskip("torch")

BOUND = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 1e-2, "float64": 1e-12}
D = 16  # most tests share one kernel
MIXED = P.causal() & (P.window(30, 0) | P.strided(16))


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    """What a kernel does not write is NaN."""

    def poisoned(*args, **options):
        x = empty(*args, **options)
        return x.fill_(float("nan")) if x.is_floating_point() else x

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", poisoned)


def compiled(mask: Any, q_len: int, kv_len: int | None = None, **options: Any) -> Any:
    chosen = {"head_dim": D, "dtype": "float32", "target": "cpu", **options}
    return splatc.compile(mask, seq_len=q_len, kv_len=kv_len, **chosen)


def backward(attend: Any, qkv: Any, do: Any = None, dlse: Any = None, **options: Any) -> tuple[Any, Any, Any]:
    """((dq, dk, dv), do, dlse) for random gradients of o and lse."""
    qkv = [x.detach().requires_grad_() for x in qkv]
    o, lse = attend(*qkv, return_lse=True, **options)
    rng = torch.Generator().manual_seed(7)
    do = torch.randn(o.shape, generator=rng, dtype=torch.float64).to(o.dtype) if do is None else do
    dlse = torch.randn(lse.shape, generator=rng).to(lse.dtype) if dlse is None else dlse
    return torch.autograd.grad([o, lse], qkv, [do, dlse]), do, dlse


def double(x: Any) -> np.ndarray:
    return x.detach().double().numpy()


def check(attend: Any, qkv: Any, dense: np.ndarray, softcap: Any = None, **options: Any) -> Any:
    """Each of dq, dk and dv agrees with the oracle on the very same inputs."""
    got, do, dlse = backward(attend, qkv, **options)
    q, k, v = map(double, qkv)
    wanted = oracle.gradients(q, k, v, dense, double(do), double(dlse), options.get("scale"), softcap)
    for name, x, y, z in zip(("dq", "dk", "dv"), got, wanted, qkv):
        assert x.shape == y.shape == z.shape and x.dtype == z.dtype
        assert torch.isfinite(x).all(), name
        # rows of one key have dq = 0: rounding is measured against what was added up
        size = np.linalg.norm(y) + 1e-3 * np.linalg.norm(double(do))
        assert np.linalg.norm(double(x) - y) / (size or 1.0) < BOUND[str(z.dtype).removeprefix("torch.")], name
    return got


def run(qkv: Any, mask: Any, dense: np.ndarray, **options: Any) -> Any:
    dtype = str(qkv[0].dtype).removeprefix("torch.")
    shape = {"head_dim": qkv[0].shape[-1], "v_head_dim": qkv[2].shape[-1], "dtype": dtype}
    attend = compiled(mask, *dense.shape[-2:], **shape, softcap=options.get("softcap"))
    return check(attend, qkv, dense, **options)


# -- every pattern -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [16, 64])
@pytest.mark.parametrize("length", [1, 17, 127, 129, 1000])
def test_every_pattern(length, d):
    names = library.NAMES if (length, d) != (1000, 64) else library.NAMES[::3]  # which costs most and adds least
    for name in names:
        pattern = library.pattern(name, length)
        run(tensors(length, length, heads=1, d=d), pattern, pattern.dense(length))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_pattern_in_16_bits(dtype):
    for name in library.NAMES:
        pattern = library.pattern(name, 200)
        run(tensors(200, 200, heads=1, dtype=dtype), pattern, pattern.dense(200))


@pytest.mark.parametrize("shape", [(100, 333), (333, 100), (1, 500), (500, 1)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_every_pattern_of_unequal_lengths(shape):
    for name in library.NAMES:
        pattern = library.pattern(name, *shape)
        if pattern is not None:
            run(tensors(*shape, heads=1), pattern, pattern.dense(*shape))


@settings(max_examples=60)
@given(library.sized_patterns(150))
def test_random_compositions(case):
    pattern, q_len, kv_len = case
    run(tensors(q_len, kv_len, heads=1), pattern, pattern.dense(q_len, kv_len))


@settings(max_examples=60)
@given(case=library.strided_patterns())
@pytest.mark.usefixtures("eager_views")
def test_strided_patterns(case):
    """Through residue, block and patch views, in up to three passes."""
    pattern, q_len, kv_len = case
    run(tensors(q_len, kv_len, heads=1), pattern, pattern.dense(q_len, kv_len))


@settings(max_examples=30)
@given(library.masks())
def test_random_masks(mask):
    run(tensors(*mask.shape, heads=1), mask, mask)


@settings(max_examples=25)
@given(library.sized_patterns(100))
def test_the_interpreter_agrees(case):
    """Before and after the passes."""
    pattern, q_len, kv_len = case
    schedule, rng = Schedule(64, 64), np.random.default_rng(0)
    q, k, v, do = (rng.standard_normal(s) for s in ((q_len, 5), (kv_len, 5), (kv_len, 3), (q_len, 3)))
    dlse = rng.standard_normal(q_len)
    plain = lower(ACSR.from_pattern(pattern, q_len, kv_len))
    turned = lower(ACSR.from_pattern(pattern.transposed(), kv_len, q_len))
    q1, k1, v1, do1, dlse1 = (x[None, None] for x in (q, k, v, do, dlse))
    wanted = oracle.gradients(q1, k1, v1, pattern.dense(q_len, kv_len), do1, dlse1, scale=0.4)
    covers = run_passes(plain, schedule, PASSES), run_passes(turned, schedule, PASSES)
    for a, b in ((plain, turned), covers):
        for x, y in zip(interpret_gradients(a, b, q, k, v, do, dlse, 0.4), wanted):
            np.testing.assert_allclose(x, y[0, 0], atol=1e-10)


# -- shapes, layouts, options ------------------------------------------------------------------------------------------

DENSE = MIXED.dense(150)


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (6, 1)])
def test_batch_and_grouped_heads(heads, kv_heads):
    run(tensors(150, 150, batch=3, heads=heads, kv_heads=kv_heads), MIXED, DENSE, enable_gqa=heads != kv_heads)


def test_a_pattern_for_each_head():
    heads = [MIXED, P.full(), P.strided(7), MIXED, P.global_cols(0), P.mask(P.window(3, 3).dense(150))]
    dense = np.stack([p.dense(150) for p in heads])
    for kv_heads in (6, 2, 1):
        run(tensors(150, 150, batch=2, heads=6, kv_heads=kv_heads), heads, dense, enable_gqa=True)


def test_softcap_scale_and_head_dims():
    q, k, v = tensors(90, 130, d=8, dv=5, heads=4, kv_heads=2, dtype="float64")
    dense = MIXED.dense(90, 130)
    for softcap, scale in ((2.0, None), (0.5, 1.0), (30.0, -0.5), (2.0, 0)):
        run([3 * q, k, v], MIXED, dense, softcap=softcap, scale=scale, enable_gqa=True)


def test_softcap():
    q, k, v = tensors(150, 150)
    run([3 * q, k, v], MIXED, DENSE, softcap=2.0)


@pytest.mark.parametrize("scale", [0.3, 0, -0.5])
def test_scale(scale):
    run(tensors(150, 150), MIXED, DENSE, scale=scale)


def test_several_passes_over_the_rows():
    pattern = P.causal() & (P.window(63, 0) | P.strided(128)) & ~P.window(40, -30)
    attend = compiled(pattern, 2048)
    assert attend.explain().passes > 1
    check(attend, tensors(2048, 2048, heads=1), pattern.dense(2048))


def test_layouts_and_strides():
    qkv = tensors(150, 150, batch=2, heads=3)
    attend = compiled(MIXED, 150)
    wanted, do, dlse = backward(attend, qkv)
    other = compiled(MIXED, 150, layout="bshd")
    moved = [x.transpose(1, 2).contiguous() for x in qkv]
    got, _, _ = backward(other, moved, do.transpose(1, 2), dlse)
    assert all(x.is_contiguous() and torch.equal(x.transpose(1, 2), y) for x, y in zip(got, wanted))
    wide = [torch.cat([x, x], -1)[..., :D] for x in qkv]
    last = do.transpose(2, 3).contiguous().transpose(2, 3)
    assert last.stride(-1) != 1 and not wide[0].is_contiguous()
    for inputs, grad in ((wide, do), (qkv, torch.cat([do, do], -1)[..., D:]), (qkv, last)):
        assert all(torch.equal(x, y) for x, y in zip(backward(attend, inputs, grad, dlse)[0], wanted))


def test_of_a_sum():
    """Its gradient is one number, expanded; no gradient reaches LSE."""
    qkv = [x.requires_grad_() for x in tensors(150, 150)]
    compiled(MIXED, 150)(*qkv).sum().backward()
    q, k, v = map(double, qkv)
    wanted = oracle.gradients(q, k, v, DENSE, np.ones((1, 2, 150, D)))
    assert all(relative_error(double(x.grad), y) < 1e-4 for x, y in zip(qkv, wanted))


def test_of_lse_alone():
    qkv = [x.requires_grad_() for x in tensors(150, 150)]
    compiled(MIXED, 150)(*qkv, return_lse=True)[1].sum().backward()
    dlse = np.ones((1, 2, 150))
    q, k, v = map(double, qkv)
    wanted = oracle.gradients(q, k, v, DENSE, np.zeros((1, 2, 150, D)), dlse)
    assert all(relative_error(double(x.grad), y) < 1e-4 for x, y in zip(qkv, wanted)) and (qkv[2].grad == 0).all()


def test_rows_without_keys_and_keys_without_rows():
    pattern = P.causal("bottom_right") & ~P.global_rows(3) & ~P.global_cols(20)
    dense = pattern.dense(150, 100)
    dq, dk, dv = run(tensors(150, 100), pattern, dense)
    assert (dq[:, :, ~dense.any(1)] == 0).all()
    assert (dk[:, :, ~dense.any(0)] == 0).all() and (dv[:, :, ~dense.any(0)] == 0).all()
    for x in run(tensors(50, 60), P.global_cols(0), np.zeros((50, 60), bool)):
        assert (x == 0).all()


@pytest.mark.parametrize("q_len, kv_len", [(0, 5), (5, 0), (0, 0)])
def test_no_queries_or_no_keys(q_len, kv_len):
    for x in backward(compiled(P.causal(), 10), tensors(q_len, kv_len))[0]:
        assert (x == 0).all()


def test_a_new_length_needs_no_new_kernel():
    attend = compiled(MIXED, 150)
    for q_len, kv_len in ((150, 150), (700, 700), (65, 400)):
        check(attend, tensors(q_len, kv_len), MIXED.dense(q_len, kv_len))


# -- what people must be able to trust ---------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck(softcap):
    pattern = P.causal("bottom_right") & (P.window(5, 0) | P.strided(4)) & ~P.global_rows(2)
    options = {"head_dim": 8, "v_head_dim": 5, "dtype": "float64", "softcap": softcap}
    attend = compiled(pattern, 13, 17, **options)
    qkv = tensors(13, 17, heads=2, kv_heads=1, d=8, dv=5, dtype="float64")
    empty = ~pattern.dense(13, 17).any(1)
    assert empty.any()

    def f(q, k, v):
        o, lse = attend(q, k, v, return_lse=True, enable_gqa=True)
        return o, lse[..., torch.from_numpy(~empty)]  # the others are -inf

    assert torch.autograd.gradcheck(f, [x.requires_grad_() for x in qkv])


def test_runs_are_equal_whatever_the_threads():
    qkv = tensors(200, 200, heads=6, kv_heads=2)
    first, do, dlse = backward(compiled(MIXED, 200), qkv, enable_gqa=True)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            attend = compiled(MIXED, 200)
            for _ in range(7):
                again, _, _ = backward(attend, qkv, do, dlse, enable_gqa=True)
                assert all(torch.equal(x, y) for x, y in zip(again, first))
    finally:
        torch.set_num_threads(threads)


def test_rows_of_very_different_size():
    """The error of each row against its own size."""
    qkv = tensors(300, 300)
    pattern = P.window(80, 10)
    do = torch.randn(1, 2, 300, D)
    do[:, :, ::3] *= 1e-4
    do[:, :, 1::3] *= 1e4
    do[:, :, [0, 100, 299]] = 0
    got, _, _ = backward(compiled(pattern, 300), qkv, do, torch.zeros(1, 2, 300))
    q, k, v = map(double, qkv)
    wanted = oracle.gradients(q, k, v, pattern.dense(300), double(do))
    for x, y in zip(got, wanted):
        size = np.linalg.norm(y, axis=-1)
        error = np.linalg.norm(double(x) - y, axis=-1)
        assert (error[size == 0] == 0).all() and (error < 1e-4 * size)[size > 0].all()
    assert (got[0][:, :, [0, 100, 299]] == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_where_it_belongs(bad):
    pattern = P.window(40, 20)
    seen = torch.from_numpy(pattern.dense(300))
    attend, qkv = compiled(pattern, 300), tensors(300, 300, heads=1)

    def rows(x):
        return ~torch.isfinite(x[0, 0]).all(-1)

    do, dlse = torch.randn(1, 1, 300, D), torch.zeros(1, 1, 300)
    do[0, 0, 150, 3] = bad
    dq, dk, dv = (rows(x) for x in backward(attend, qkv, do, dlse)[0])
    query = torch.arange(300) == 150
    assert torch.equal(dq, query) and torch.equal(dk, seen[150]) and torch.equal(dv, seen[150])

    q, k, v = (x.clone() for x in qkv)
    v[0, 0, 150, 3] = bad
    do = torch.randn(1, 1, 300, D)
    dq, dk, dv = (rows(x) for x in backward(attend, (q, k, v), do, dlse)[0])
    queries = seen[:, 150]  # their O is not finite, nor is their delta
    assert torch.equal(dq, queries) and torch.equal(dk, seen[queries].any(0)) and not dv.any()

    k[0, 0, 150, 3] = float("nan")
    v = qkv[2]
    dq, dk, dv = (rows(x) for x in backward(attend, (q, k, v), do, dlse)[0])
    assert torch.equal(dq, queries) and torch.equal(dk, seen[queries].any(0)) and torch.equal(dk, dv)


def test_the_backward_kernel_is_named_and_made_when_first_needed():
    attend = compiled(MIXED, 150)
    assert "_gradients" not in vars(attend)
    check(attend, tensors(150, 150), DENSE)
    kernel = attend.gradients.kernel
    assert kernel.spec.name == "attention_backward_cpu_d16_float32_m64n64" and kernel.folder != attend.kernel.folder
    assert "splatc_attention_dq" in kernel.source and "splatc_attention_dkv" in kernel.source
    other = kernel_spec(D, None, "float32", Target("cpu", "native"))
    assert other.role == "forward" and other.name == attend.kernel.spec.name
