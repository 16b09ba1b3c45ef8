"""splatc.jax.attention against the float64 reference and the PyTorch path: jit, grad, vmap, every option, errors."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("jax_tvm_ffi")

import jax.numpy as jnp  # noqa: E402

import splatc.jax  # noqa: E402
from splatc import oracle  # noqa: E402
from splatc import patterns as P  # noqa: E402
from splatc.errors import InvalidInput, Unsupported  # noqa: E402
from splatc.ir.terms import NO_TERMS, Terms  # noqa: E402

attention = splatc.jax.attention
BOUND = {"float64": 1e-12, "float32": 2e-6, "float16": 2e-3, "bfloat16": 1e-2}
# pattern, q_len, kv_len: odd sizes, several passes, empty rows, a remainder
MASKS = {
    "one": (P.causal(), 1, 1),
    "causal": (P.causal(), 127, 127),
    "passes": (P.causal() & (P.window(16, 0) | P.strided(16)), 300, 300),
    "long_keys": (P.causal("bottom_right"), 17, 129),
    "empty_rows": (P.causal() & P.window(40, -9), 129, 100),
    "matrix": (np.random.default_rng(5).random((65, 90)) < 0.1, 65, 90),
}


def dense(mask, q_len: int, kv_len: int) -> np.ndarray:
    return mask if isinstance(mask, np.ndarray) else P.as_pattern(mask).dense(q_len, kv_len)


def tensors(q_len: int, kv_len: int, dtype: str = "float32", batch: int = 2, heads: int = 4, kv_heads: int = 2,
            dim: int = 16, v_dim: int = 24, seed: int = 0):  # fmt: skip
    """Random q, k, v and do as NumPy arrays of ``dtype``."""
    rng = np.random.default_rng(seed)
    sizes = (heads, q_len, dim), (kv_heads, kv_len, dim), (kv_heads, kv_len, v_dim), (heads, q_len, v_dim)
    return [rng.standard_normal((batch, *size)).astype(jnp.dtype(dtype)) for size in sizes]


def error(got, wanted) -> float:
    """Relative error of what is finite; the rest has to be equal."""
    got, wanted = (np.asarray(x).astype(np.float64) for x in (got, wanted))
    finite = np.isfinite(wanted)
    assert got.shape == wanted.shape and np.array_equal(got[~finite], wanted[~finite])
    return oracle.relative_error(got[finite], wanted[finite])


def check(mask, q_len, kv_len, dtype="float32", terms=NO_TERMS, v_dim=24, **options):
    """Results and gradients of a jitted call against the reference. terms: NumPy's, given by options as well.

    v_dim: 16 for kernels that other tests compile too.
    """
    q, k, v, do = tensors(q_len, kv_len, dtype, v_dim=v_dim)
    learned = {name: x for name, x in options.items() if isinstance(x, np.ndarray)}
    fixed = {name: x for name, x in options.items() if name not in learned}
    numbers = {name: fixed[name] for name in ("scale", "softcap") if name in fixed}
    allowed = dense(mask, q_len, kv_len)
    dlse = np.random.default_rng(1).standard_normal((2, 4, q_len))
    dlse *= np.ones_like(dlse) if terms.sinks is not None else allowed.any(1)

    @jax.jit
    def run(q, k, v, learned):
        return attention(q, k, v, mask, return_lse=True, enable_gqa=True, **learned, **fixed)

    (o, lse), back = jax.vjp(run, *(jnp.asarray(x) for x in (q, k, v)), learned)
    wanted_o, wanted_lse = oracle.attention(q, k, v, allowed, terms=terms, **numbers)
    assert (o.dtype, lse.dtype) == (dtype, "float64" if dtype == "float64" else "float32")
    assert error(o, wanted_o) < BOUND[dtype] and error(lse, wanted_lse) < BOUND[dtype]
    dq, dk, dv, of_learned = back((jnp.asarray(do), jnp.asarray(dlse, lse.dtype)))
    wanted = oracle.gradients(q, k, v, allowed, do, dlse, terms=terms, **numbers)
    got = dq, dk, dv, *(of_learned[name] for name in learned)
    for one, other in zip(got, wanted, strict=True):
        assert error(one, other) < 4 * BOUND[dtype]


@pytest.fixture(autouse=True)
def on_a_cpu():
    """Also where there is a GPU: tests/test_gpu_jax.py is for that."""
    with jax.default_device(jax.devices("cpu")[0]):
        yield


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("name", MASKS)
def test_is_the_reference(name):
    check(*MASKS[name])


def test_16_bits():
    check(*MASKS["passes"], dtype="bfloat16", v_dim=16)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_with_x64(x64, dtype):
    check(*MASKS["passes"], dtype=dtype, scale=0.3, v_dim=16)


def test_softcap_biases_and_sinks():
    rng = np.random.default_rng(3)
    slopes, sinks = rng.random(4).astype("f"), rng.standard_normal(4).astype("f")
    relative = rng.standard_normal((4, 15)).astype("f")
    block = rng.standard_normal((4, 2, 9)).astype("f")
    terms = Terms(slopes, relative, block, sinks, block_size=15, shift=112)
    check(*MASKS["long_keys"], terms=terms, alibi_slopes=slopes, relative_bias=relative, block_bias=block,
          sinks=sinks, block_size=15, bias_align="bottom_right", softcap=2.0)  # fmt: skip


SEEDS = [7, -1, 2**40 + 3, np.int32(-5), np.uint32(2**32 - 1)]


@pytest.mark.parametrize("seed", SEEDS)
def test_dropout(seed):
    terms = Terms(seed=np.array([int(seed)], np.int64), dropout_p=0.3)
    given = seed if isinstance(seed, int) else jnp.asarray(seed)
    check(*MASKS["causal"], terms=terms, v_dim=16, dropout_p=0.3, seed=given)


def test_dropout_with_a_traced_seed():
    q, k, v, _ = tensors(60, 60, kv_heads=4, v_dim=16)
    run = jax.jit(lambda q, seed: attention(q, k, v, "causal", dropout_p=0.5, seed=seed))
    seeds = [jax.random.bits(jax.random.key(n), dtype="uint32") for n in (1, 2)]
    first, again, other = run(q, seeds[0]), run(q, seeds[0]), run(q, seeds[1])
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    terms = Terms(seed=np.array([int(seeds[1])], np.int64), dropout_p=0.5)
    assert error(other, oracle.attention(q, k, v, P.causal().dense(60), terms=terms)[0]) < 2e-6


def test_an_int64_seed(x64):
    seed = -(2**50) + 1
    terms = Terms(seed=np.array([seed], np.int64), dropout_p=0.3)
    check(*MASKS["causal"], terms=terms, v_dim=16, dropout_p=0.3, seed=jnp.asarray(seed))


def test_layout():
    q, k, v, do = tensors(70, 70)
    turned = [jnp.asarray(x.swapaxes(1, 2)) for x in (q, k, v)]
    run = jax.jit(partial(attention, pattern="causal", layout="bshd", enable_gqa=True, return_lse=True))
    (o, lse), back = jax.vjp(run, *turned)
    mask = P.causal().dense(70)
    wanted = oracle.attention(q, k, v, mask)
    assert error(o.swapaxes(1, 2), wanted[0]) < 2e-6 and error(lse, wanted[1]) < 2e-6
    got = back((jnp.asarray(do.swapaxes(1, 2)), jnp.zeros_like(lse)))
    for one, other in zip(got, oracle.gradients(q, k, v, mask, do), strict=True):
        assert error(one.swapaxes(1, 2), other) < 4e-6


def test_a_pattern_for_each_head():
    q, k, v, _ = tensors(90, 90, heads=2)
    heads = [P.causal(), P.window(9, 9)]
    wanted, _ = oracle.attention(q, k, v, np.stack([one.dense(90) for one in heads]))
    assert error(attention(q, k, v, heads), wanted) < 2e-6
    q, k, v, _ = tensors(90, 90)
    with pytest.raises(InvalidInput, match="2 heads but q has 4"):
        jax.jit(partial(attention, pattern=P.per_head(heads), enable_gqa=True))(q, k, v)


def test_patterns_for_each_batch_entry_are_refused():
    q, k, v, _ = tensors(8, 8, kv_heads=4)
    for mask in (P.per_batch([P.causal()] * len(q)), np.arange(len(q) * 64).reshape(-1, 1, 8, 8) % 3 > 0):
        with pytest.raises(Unsupported, match="in JAX all batch entries have the same mask"):
            attention(q, k, v, mask)


def test_is_the_torch_path_bit_by_bit():
    torch = pytest.importorskip("torch")
    q, k, v, do = tensors(300, 300, "float32")
    run = partial(attention, pattern=MASKS["passes"][0], enable_gqa=True)
    o, back = jax.vjp(run, *map(jnp.asarray, (q, k, v)))
    leaves = [torch.from_numpy(x).requires_grad_() for x in (q, k, v)]
    other = splatc.attention(leaves[0], leaves[1], leaves[2], MASKS["passes"][0], enable_gqa=True)
    assert np.array_equal(o, other.detach().numpy())
    other.backward(torch.from_numpy(do))
    for got, leaf in zip(back(jnp.asarray(do)), leaves, strict=True):
        assert error(got, leaf.grad.numpy()) < 1e-6  # delta is summed in another order


def test_several_lengths_and_value_and_grad():
    run = jax.jit(partial(attention, pattern="causal & window(20, 0)", enable_gqa=True))
    for n in (33, 128, 33, 64):
        q, k, v, do = tensors(n, n, seed=n)
        value, (dq,) = jax.value_and_grad(lambda q: (run(q, k, v) * do).sum(), (0,))(q)  # noqa: B023
        mask = (P.causal() & P.window(20, 0)).dense(n)
        assert abs(float(value) - (oracle.attention(q, k, v, mask)[0] * do).sum()) < 1e-3
        assert error(dq, oracle.gradients(q, k, v, mask, do)[0]) < 4e-6


def test_vmap_and_its_gradients():
    q, k, v, do = tensors(50, 50, batch=6)
    some = [x.reshape(3, 2, *x.shape[1:]) for x in (q, v)]
    run = jax.vmap(partial(attention, pattern="causal", enable_gqa=True), in_axes=(0, None, 0))

    def loss(q, k, v):
        return (run(q, k, v).reshape(do.shape) * do).sum()

    k_once = k[:2]  # shared by all three
    got = jax.grad(loss, (0, 1, 2))(some[0], k_once, some[1])
    wanted = oracle.gradients(q, np.concatenate([k_once] * 3), v, P.causal().dense(50), do)
    assert error(got[0].reshape(q.shape), wanted[0]) < 4e-6
    assert error(got[1], wanted[1].reshape(3, *k_once.shape).sum(0)) < 4e-6
    assert error(got[2].reshape(v.shape), wanted[2]) < 4e-6


def test_within_other_transformations():
    """Recomputed, in a loop, and beside other work: many calls from XLA's threads, whose memory stays whole."""
    q, k, v, _ = map(jnp.asarray, tensors(65, 65, kv_heads=4))
    step = jax.checkpoint(lambda x: x + attention(x, k, v, "causal & window(5, 0)")[..., :16])

    @jax.jit
    def run(x):
        return jax.lax.scan(lambda x, _: (step(x), x.sum()), x, None, length=20)[0].sum()

    plain = jax.jit(lambda x: jax.lax.scan(lambda x, _: (x + _dense(x), None), x, None, length=20)[0].sum())
    allowed = (P.causal() & P.window(5, 0)).dense(65)

    def _dense(q):
        scores = jnp.where(allowed, q @ k.swapaxes(-1, -2) / 4, -jnp.inf)
        return jax.nn.softmax(scores) @ v[..., :16]

    wanted = jax.grad(plain)(q)
    for _ in range(10):
        assert error(jax.grad(run)(q), wanted) < 1e-4


def test_no_torch_is_imported(tmp_path):
    """In a fresh process with an empty cache: building, running and differentiating."""
    script = """
import sys, jax, jax.numpy as jnp, splatc
q = jnp.ones((1, 1, 40, 8))
run = lambda q: splatc.jax.attention(q, q, q, "causal & window(3, 0)").sum()
dq = jax.jit(jax.grad(run))(q)
assert dq.shape == q.shape and bool(jnp.isfinite(dq).all())
assert "tvm" in sys.modules  # it was built now
print([name for name in sys.modules if name.partition(".")[0] == "torch"])
"""
    env = {**os.environ, "SPLATC_CACHE_DIR": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


ONES = np.ones((1, 2, 8, 4), np.float32)
INTS, JAX_ONES = ONES.astype(np.int32), jnp.asarray(ONES)
BAD = [
    (lambda: attention(ONES, ONES[:, :1], ONES[:, :1], "causal"), "pass enable_gqa=True"),
    (lambda: attention(ONES, ONES[..., :3], ONES, "causal"), "head_dim 4 but k has 3"),
    (lambda: attention(ONES[0], ONES, ONES, "causal"), "4 dimensions"),
    (lambda: attention([1.0], ONES, ONES, "causal"), "q is a list: give JAX or NumPy arrays"),
    (lambda: attention(ONES, ONES.astype(np.float16), ONES, "causal"), "different dtypes"),
    (lambda: attention(INTS, INTS, INTS, "causal"), "dtype is int32"),
    (lambda: attention(ONES, ONES, ONES, "causal", layout="hbsd"), "layout is 'hbsd'"),
    (lambda: attention(ONES, ONES, ONES, "causal", dropout_p=0.1), "seed is missing"),
    (lambda: attention(ONES, ONES, ONES, "causal", dropout_p=0.1, seed=1.5), "whole number"),
    (lambda: attention(ONES, ONES, ONES, "causal", dropout_p=0.1, seed=jnp.ones(2)), "shape .2,. and float32"),
    (lambda: attention(ONES, ONES, ONES, "causal", sinks=np.ones(3, "f")), "sinks has shape .3,."),
    (lambda: attention(ONES, ONES, ONES, "causal", sinks=np.ones(2, int)), "give floating-point numbers"),
    (lambda: jax.jit(lambda m: attention(ONES, ONES, ONES, m))(np.ones((8, 8), bool)), "a mask is compiled"),
    (lambda: jax.jit(lambda s: attention(ONES, ONES, ONES, "causal", scale=s))(0.1), "scale is"),
    (lambda: splatc.attention(JAX_ONES, JAX_ONES, JAX_ONES, "causal"), "to splatc.jax.attention"),
]


@pytest.mark.parametrize("call, words", BAD, ids=[words for _, words in BAD])
def test_bad_input(call, words):
    with pytest.raises(InvalidInput, match=words):
        call()


def test_a_constant_mask_may_be_a_jax_array():
    mask = jnp.asarray(P.causal().dense(8))
    q, k, v, _ = tensors(8, 8, kv_heads=4)
    assert np.array_equal(attention(q, k, v, mask), attention(q, k, v, "causal"))


def test_other_devices_are_refused(monkeypatch):
    class Device:
        platform = "tpu"

    x = jnp.asarray(ONES)
    monkeypatch.setattr(type(x), "devices", lambda _: {Device()})
    with pytest.raises(Unsupported, match="arrays are on tpu: put all of them on a CPU or on an NVIDIA GPU"):
        attention(x, x, x, "causal")


def twice(function):
    return jax.grad(lambda x: jax.grad(function)(x).sum())


@pytest.mark.parametrize("transform, words", [(twice, "cannot be differentiated"), (jax.jacfwd, "custom_vjp")])
def test_only_reverse_mode_of_the_first_order(transform, words):
    q, k, v, _ = tensors(8, 8, kv_heads=4)
    with pytest.raises((TypeError, ValueError), match=words):
        transform(lambda q: attention(q, k, v, "causal").sum())(q)
