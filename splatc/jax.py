"""splatc in JAX's terms: ``splatc.jax.attention``. Importing this module imports JAX, and never torch."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from splatc.compile import compiled_for, pattern_for
from splatc.errors import InvalidInput, Unsupported
from splatc.patterns import PerBatch
from splatc.runtime.jax_gpu import arch_here
from splatc.runtime.jax_ops import attend_at_once, call_of
from splatc.runtime.tensors import LAYOUTS, check_scale, check_sizes, computed_in, to_bhsd
from splatc.runtime.terms import Convert, TermOptions, asked_of, check_seed, check_terms, terms_by

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["attention"]


def attention(q: Any, k: Any, v: Any, pattern: Any, *, scale: float | None = None, softcap: float | None = None,
              return_lse: bool = False, enable_gqa: bool = False, layout: str = "bhsd",
              **options: Unpack[TermOptions]) -> Any:  # fmt: skip
    """Attention of q (batch, heads, q_len, head_dim) to k (batch, kv_heads, kv_len, head_dim) and v (batch, kv_heads,
    kv_len, v_head_dim), where ``pattern`` says so; (batch, seq, heads, dim) with layout="bshd".

    q, k, v: JAX arrays of one type, float32, float16, bfloat16 or float64, or NumPy arrays, which become such. pattern:
    a pattern of ``splatc.patterns``, its text, or whatever else ``splatc.patterns.as_pattern`` takes; while JAX traces,
    it is a constant, as are all numbers. scale: of the scores, default 1/sqrt(head_dim). softcap: scores s become
    softcap * tanh(s / softcap). enable_gqa: allow fewer key/value heads. options: alibi_slopes, relative_bias,
    block_bias, block_size, sinks, bias_align, dropout_p and seed, as of ``splatc.runtime.terms.TermOptions``; the seed
    is a whole number or an integer array of one, such as ``jax.random.bits(key, dtype="uint32")``.

    Returns o like q, with v_head_dim; with return_lse also lse (batch, heads, q_len), natural log, float32 (for
    float64: float64). A row that attends to nothing gives 0 and -inf. Works under jit, grad and vmap (which calls once
    for each element); gradients are of q, k, v, sinks and, on CPUs, biases, of the first order. A mask is compiled
    while JAX traces, once for each kind of call: for the device of the arrays or, where JAX does not tell it, its
    default one. float32 on a Hopper GPU is rounded to tf32 in products, gradients are not. Raises Unsupported for
    other devices than CPUs and NVIDIA's GPUs, InvalidInput for arrays that do not fit.
    """
    if layout not in LAYOUTS:
        raise InvalidInput(f"layout is {layout!r}: it must be one of {', '.join(LAYOUTS)}")
    q, k, v = (_array(name, x) for name, x in (("q", q), ("k", k), ("v", v)))
    shape = replace(check_sizes(q, k, v, layout, enable_gqa), device=_device((q, k, v)))
    number, acc = check_scale(scale, shape.head_dim), computed_in(shape.dtype)
    terms = terms_by(Convert(lambda name, x: _term(name, x, acc), _seed), q, k, layout, **options)
    check_terms(terms, shape)
    target = None if shape.device == "cpu" else arch_here(int(shape.device.partition(":")[2]))
    pattern = pattern_for(shape, _constant(pattern))
    if isinstance(pattern, PerBatch):
        raise Unsupported("in JAX all batch entries have the same mask: make a pattern for each head, and reshape q, k "
                          "and v to (1, batch * heads, seq, dim)")  # fmt: skip
    compiled = compiled_for(shape, pattern, softcap, "bhsd", True, asked_of(terms), target)
    if compiled.kernel.spec.kernel == "hopper" and number <= 0:  # what it scales by is positive
        q, number = (-q if number else q * 0), -number or 1.0
    call, arrays = call_of(compiled, shape, number, terms)
    o, lse = attend_at_once(call, *(to_bhsd(x, layout) for x in (q, k, v)), arrays)
    o = to_bhsd(o, layout)
    return (o, lse) if return_lse else o


def _device(arrays: tuple[Any, ...]) -> str:
    """Where a call will run, as torch names devices: where the arrays are, JAX's default device if it traces them."""
    known = [device for x in arrays if not isinstance(x, jax.core.Tracer) for device in x.devices()]
    default = jax.config.jax_default_device
    if not known:
        known = [jax.devices(default)[0] if isinstance(default, str) else default or jax.local_devices()[0]]
    platforms = {device.platform for device in known}
    if platforms == {"cpu"}:
        return "cpu"
    if platforms <= {"gpu", "cuda"}:
        return f"cuda:{known[0].local_hardware_id or 0}"
    raise Unsupported(f"arrays are on {' and '.join(sorted(platforms))}: put all of them on a CPU or on an NVIDIA GPU")


def _array(name: str, x: Any) -> Any:
    if isinstance(x, np.ndarray):
        return jnp.asarray(x)
    if not isinstance(x, jax.Array):
        raise InvalidInput(f"{name} is a {type(x).__name__}: give JAX or NumPy arrays")
    return x


def _constant(pattern: Any) -> Any:
    """A pattern given as a JAX array as NumPy has it."""
    if isinstance(pattern, jax.core.Tracer):
        raise InvalidInput("the pattern is an array that JAX traces: a mask is compiled, so make it outside of jit, or "
                           "let jit have it as a constant")  # fmt: skip
    return np.asarray(pattern) if isinstance(pattern, jax.Array) else pattern


def _term(name: str, x: Any, dtype: str) -> Any:
    x = _array(name, x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise InvalidInput(f"{name} has dtype {x.dtype}: give floating-point numbers")
    return x.astype(dtype)


def _seed(seed: Any, p: float) -> Any:
    """The 64 bits of a seed as uint32 (2,), the low half first: JAX mostly has no int64."""
    if seed is None:
        raise InvalidInput("seed is missing: dropout needs a whole number, or jax.random.bits(key, dtype='uint32')")
    if not isinstance(seed, jax.Array | np.ndarray):
        return jnp.asarray(np.array([check_seed(seed)], np.int64).view(np.uint32))
    if seed.size != 1 or not jnp.issubdtype(seed.dtype, jnp.integer):
        raise InvalidInput(f"seed is an array of shape {seed.shape} and {seed.dtype}: give one whole number")
    return _words(jnp.asarray(seed).reshape(()))


def _words(seed: Any) -> Any:
    low = seed.astype(jnp.uint32)
    if seed.dtype.itemsize == 8:
        high = (seed >> 32).astype(jnp.uint32)
    else:  # its sign goes on
        high = jnp.where(seed < 0, jnp.uint32(0xFFFFFFFF), jnp.uint32(0))
    return jnp.stack([low, high])
