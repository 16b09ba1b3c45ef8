"""splatc.jax on a GPU without a GPU: XLA of a CPU calls what it would call on one, and NumPy twins are the kernels."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("jax_tvm_ffi")
pytest.importorskip("torch")  # of the fake GPU

import jax.numpy as jnp  # noqa: E402

import splatc.jax  # noqa: E402
from splatc import oracle  # noqa: E402
from splatc import patterns as P  # noqa: E402
from splatc.codegen.costs import Costs  # noqa: E402
from splatc.errors import Unsupported  # noqa: E402
from splatc.ir.score import score_of  # noqa: E402
from splatc.ir.terms import NO_TERMS, Terms  # noqa: E402
from splatc.runtime import jax_gpu, jax_ops  # noqa: E402
from tests.test_launch_gradients import Machine as GradientMachine  # noqa: E402
from tests.test_launch_hopper import Machine  # noqa: E402

D = 16
MIXED = P.causal() & (P.window(30, 0) | P.strided(32))  # two passes
FORWARD, BACKWARD = "splatc_attention_as_on_a_gpu", "splatc_attention_backward_as_on_a_gpu"
for _name, _handler in ((FORWARD, jax_ops._forward_on_gpu), (BACKWARD, jax_ops._backward_on_gpu)):
    jax_ops.jax_tvm_ffi.register_ffi_target(_name, jax_ops.tvm_ffi.convert(_handler), ["attrs.handle", "args", "rets"],
                                            platform="cpu", pass_owned_tensor=True)  # fmt: skip


class Compiled:
    """What JAX's calls ask of a compiled mask."""

    def __init__(self, forward: Machine, backward: GradientMachine) -> None:
        self.kernel = forward.launcher._kernel
        self._machines = forward, backward

    def launcher_on(self, find_gpu: Any) -> Any:
        return self._machines[0].launcher

    def gradients_on(self, find_gpu: Any) -> Any:
        return self._machines[1].gradients


@pytest.fixture
def on_gpu(monkeypatch, tmp_path):
    """on_gpu(pattern, walks): JAX's calls find a GPU, and this mask compiled for it."""
    monkeypatch.setattr(jax_ops, "FORWARD", FORWARD)
    monkeypatch.setattr(jax_ops, "BACKWARD", BACKWARD)
    monkeypatch.setattr(splatc.jax, "_device", lambda arrays: "cuda:0")
    monkeypatch.setattr(splatc.jax, "arch_here", lambda ordinal: "sm_90a")

    def use(pattern: Any, walks: str | None = None, **options: Any) -> Any:
        forward = Machine(tmp_path / "forward", pattern, **options)
        (tmp_path / "gradients").mkdir()
        backward = GradientMachine(tmp_path / "gradients", pattern, walks, dims=(D, D))
        compiled, asked = Compiled(forward, backward), []

        def compiled_for(*options: Any) -> Compiled:
            asked.append(options)
            return compiled

        monkeypatch.setattr(splatc.jax, "compiled_for", compiled_for)
        return SimpleNamespace(forward=forward, backward=backward, asked=asked)

    with jax.default_device(jax.devices("cpu")[0]):
        yield use


def draw(*sizes: int) -> Any:
    return np.random.default_rng(sum(sizes)).standard_normal(sizes).astype(np.float16)


def check(got: Any, wanted: Any, most: float = 3e-3) -> None:
    assert got.shape == wanted.shape and oracle.relative_error(np.asarray(got, np.float64), wanted) < most


@pytest.mark.parametrize("walks", ["one", "two"])
@pytest.mark.parametrize("pattern, q_len, kv_len", [(MIXED, 300, 300), (P.causal("bottom_right"), 130, 200)], ids=str)
def test_results_and_gradients(pattern, q_len, kv_len, walks, on_gpu):
    machines = on_gpu(pattern, walks)
    q, k, v, do = draw(2, 4, q_len, D), draw(2, 2, kv_len, D), draw(2, 2, kv_len, D), draw(2, 4, q_len, D)
    allowed = pattern.dense(q_len, kv_len)
    dlse = np.random.default_rng(1).standard_normal((2, 4, q_len)).astype("f") * allowed.any(1)
    run = jax.jit(lambda q, k, v: splatc.jax.attention(q, k, v, pattern, scale=0.3, enable_gqa=True, return_lse=True))
    (o, lse), back = jax.vjp(run, q, k, v)
    wanted_o, wanted_lse = oracle.attention(q, k, v, allowed, 0.3)
    check(o, wanted_o)
    finite = np.isfinite(wanted_lse)
    assert np.array_equal(np.isfinite(lse), finite) and np.abs(lse - wanted_lse)[finite].max() < 1e-3
    wanted = oracle.gradients(q, k, v, allowed, do, dlse, scale=0.3)
    for got, other in zip(back((jnp.asarray(do), jnp.asarray(dlse))), wanted, strict=True):
        assert got.dtype == jnp.float16
        check(got, other, 5e-3)
    assert machines.asked[0][-1] == "sm_90a"


def test_scratch_for_rows_in_parts(on_gpu, monkeypatch):
    free = lambda spec, workers: Costs(1.0, 0.0, 0.0, 0.0, 0.0, 1.0, workers, "")  # noqa: E731
    monkeypatch.setattr("splatc.runtime.launch_hopper.costs_of", free)
    pattern = P.longformer(20, 8)
    machines = on_gpu(pattern, sms=200)
    q, k, v = (draw(1, 2, 600, D) + i for i in np.float16([0, 0.1, 0.2]))
    o = jax.jit(lambda q, k, v: splatc.jax.attention(q, k, v, pattern))(q, k, v)
    check(o, oracle.attention(q, k, v, pattern.dense(600))[0])
    assert machines.forward.driver.launched[-1][0] == "splatc_combine_kernel"


@pytest.mark.parametrize("scale", [0.0, -0.4])
def test_scales_that_are_not_positive(scale, on_gpu):
    on_gpu(P.causal())
    q, k, v = (draw(1, 2, 70, D) + i for i in np.float16([0, 0.1, 0.2]))
    o = splatc.jax.attention(q, k, v, P.causal(), scale=scale)
    check(o, oracle.attention(q, k, v, P.causal().dense(70), scale)[0])


def test_terms(on_gpu):
    """Biases by address; their gradients are refused, others given."""
    slopes, seed = np.array([0.5, 0.25], "f"), 12345
    score = score_of(False, True, False, False, False, True)
    machines = on_gpu(P.causal(), score=score)
    q, k, v = (draw(1, 2, 70, D) + i for i in np.float16([0, 0.1, 0.2]))
    o = splatc.jax.attention(q, k, v, P.causal(), alibi_slopes=slopes, dropout_p=0.3, seed=seed)
    terms = Terms(slopes, seed=np.array([seed], np.int64), dropout_p=0.3)
    check(o, oracle.attention(q, k, v, P.causal().dense(70), terms=terms)[0])
    assert machines.forward.driver.launched

    def loss(q, slopes):
        return splatc.jax.attention(q, k, v, P.causal(), alibi_slopes=slopes, dropout_p=0.3, seed=seed).sum()

    with pytest.raises(Unsupported, match="gradients of alibi_slopes are computed on CPUs only"):
        jax.grad(loss, 1)(jnp.asarray(q), slopes)
    shape = jax.eval_shape(jax.grad(loss), q, slopes)  # asks for no gradients of slopes
    assert (shape.shape, shape.dtype) == (q.shape, jnp.float16)


def test_gradients_of_sinks(on_gpu):
    sinks = np.array([0.5, -1.0], "f")
    machines = on_gpu(P.causal(), score=score_of(False, False, False, False, True, False))
    q, k, v = (draw(1, 2, 70, D) + i for i in np.float16([0, 0.1, 0.2]))
    o, back = jax.vjp(lambda sinks: splatc.jax.attention(q, k, v, P.causal(), sinks=sinks), sinks)
    allowed, terms = P.causal().dense(70), Terms(sinks=sinks)
    check(o, oracle.attention(q, k, v, allowed, terms=terms)[0])
    do = draw(1, 2, 71, D)[:, :, :70]
    wanted = oracle.gradients(q, k, v, allowed, do, terms=terms)
    check(back(jnp.asarray(do))[0], wanted[3], 5e-3)
    assert machines.forward.driver.launched


def test_calls_are_prepared_once(on_gpu):
    machines = on_gpu(P.causal())
    q = jnp.asarray(draw(1, 2, 70, D))
    run = jax.jit(lambda q: splatc.jax.attention(q, q, q, P.causal()))
    first = run(q)
    maps = len(machines.forward.driver.maps)
    assert np.array_equal(first, run(q)) and len(machines.forward.driver.maps) == maps
    assert len({values["queue_ptr"] for _, _, values in machines.forward.driver.launched}) == 2  # a counter each


def test_on_the_other_kind_of_device(on_gpu, monkeypatch):
    on_gpu(P.causal())
    monkeypatch.setattr(jax_ops, "FORWARD", "splatc_attention")  # the handler of CPUs
    q = jnp.asarray(draw(1, 2, 64, D))
    with pytest.raises(Exception, match="traced for GPUs runs on a CPU"):
        jax.block_until_ready(splatc.jax.attention(q, q, q, P.causal()))


class Device:
    """What JAX says of a device."""

    def __init__(self, platform: str, number: int) -> None:
        self.platform, self.local_hardware_id = platform, number


@pytest.mark.parametrize(("devices", "wanted"), [([("cpu", 0)], "cpu"), ([("gpu", 1)], "cuda:1")])
def test_where_a_call_runs(devices, wanted, monkeypatch):
    x = jnp.ones(3)
    monkeypatch.setattr(type(x), "devices", lambda _: {Device(*one) for one in devices})
    assert splatc.jax._device((x,)) == wanted


def test_where_a_traced_call_runs(monkeypatch):
    seen = []

    def trace() -> None:
        def look(x: Any) -> Any:  # a new function, which JAX has not traced yet
            seen.append(splatc.jax._device((x,)))
            return x

        jax.eval_shape(look, jnp.ones(3))

    for platform in ("cpu", "gpu"):
        monkeypatch.setattr(jax, "local_devices", lambda platform=platform: [Device(platform, 0)])
        trace()
    with jax.default_device(jax.devices("cpu")[0]):
        trace()
    assert seen == ["cpu", "cuda:0", "cpu"]


def test_memory_of_the_driver():
    given = []

    def upload(*what: Any) -> int:
        given.append(what)
        return 4096

    words = np.arange(5, dtype=np.int32)
    memory = jax_gpu.DriverMemory(words, SimpleNamespace(upload=upload), 1)
    assert (memory.address, given) == (4096, [(words.ctypes.data, 20, 1)])


def test_scratch_lies_side_by_side():
    sizes = {"a": ("float16", (3, 5)), "b": ("int32", (65,)), "c": ("float32", (0,))}
    assert jax_gpu.places(sizes, 1000) == {"a": 1000, "b": 1256, "c": 1768} and jax_gpu.scratch_bytes(sizes) == 768


def test_what_has_no_call():
    with pytest.raises(Unsupported, match="multiple of 16 bytes"):
        jax_gpu.check_alignment([32, 40])
    pruned = SimpleNamespace(kernel="hopper", score=SimpleNamespace(pruning=object()))
    compiled = SimpleNamespace(kernel=SimpleNamespace(spec=pruned))
    with pytest.raises(Unsupported, match="130 are no "):
        jax_gpu.GpuCalls(compiled, SimpleNamespace(kv_len=130))


def test_terms_of_nothing():
    call = jax_ops.Call(None, None, 1.0, (), 0, 0, 0.0)
    assert call.terms_on_gpu(()) is None and call.terms(()) == NO_TERMS
