"""splatc's operators in JAX: what jit, grad and vmap see. XLA calls handlers on the host, which call CPU kernels or
start GPU kernels.

An operator takes arrays and a handle; all else of a call is a ``Call``, which the handle finds. Handles are unlike
those of any other process, so that nothing that XLA keeps on disk can mean another mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any
from uuid import uuid4

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from splatc.codegen.no_torch import without_torch
from splatc.errors import Unsupported
from splatc.ir.terms import LEARNABLE, Terms
from splatc.runtime.attention import CompiledAttention
from splatc.runtime.gradients import Gradients
from splatc.runtime.gradients_gpu import RESULTS
from splatc.runtime.jax_gpu import GpuCalls, scratch_bytes
from splatc.runtime.tensors import Shape, computed_in

with without_torch():
    import jax_tvm_ffi
    import tvm_ffi

FORWARD, BACKWARD = "splatc_attention", "splatc_attention_backward"
ELSEWHERE = ("a call that was traced for {} runs on {}: under jit, splatc compiles for JAX's default device, so trace "
             "under `with jax.default_device(...)` of the other kind")  # fmt: skip
ON_CPUS = ("in JAX gradients of {} are computed on CPUs only: stop them (jax.lax.stop_gradient), put the arrays on a "
           "CPU (jax.device_put(x, jax.devices('cpu')[0])), or use splatc with PyTorch")  # fmt: skip

Arrays = tuple[Any, ...]


@dataclass(frozen=True)
class Call:
    """All of a call that is no array. names: of the terms that come as arrays, in their order, the seed last.

    block_size, shift, dropout_p: as in ``Terms``."""

    compiled: CompiledAttention
    shape: Shape
    scale: float
    names: tuple[str, ...]
    block_size: int
    shift: int
    dropout_p: float

    @property
    def ordinal(self) -> int | None:
        """The GPU that it was traced for, None for a CPU."""
        kind, _, number = self.shape.device.partition(":")
        return None if kind == "cpu" else int(number)

    @cached_property
    def on_gpus(self) -> GpuCalls:
        """The kernels' calls, for a GPU."""
        return GpuCalls(self.compiled, self.shape)

    def prepare(self) -> None:
        """Plan, load and upload what a call needs: errors reach who asked."""
        if self.ordinal is None:
            self.compiled.prepare(self.shape)
        else:
            self.on_gpus.forward(self.ordinal)

    def prepare_gradients(self) -> None:
        """The same for gradients."""
        if self.ordinal is None:
            _gradients(self).prepare(self.shape)
        else:
            self.on_gpus.backward(self.ordinal)

    @property
    def learnable(self) -> tuple[str, ...]:
        """The names of what has gradients."""
        return tuple(name for name in self.names if name in LEARNABLE)

    def terms_on_gpu(self, arrays: Arrays) -> Terms | None:
        """The terms that a kernel on a GPU takes, of the arrays of a handler."""
        found = dict(zip(self.names, arrays, strict=True))
        return self._terms(found) if found else None

    def terms(self, arrays: Arrays) -> Terms:
        """The terms that a kernel takes, of the arrays of a handler."""
        found = {name: np.from_dlpack(x) for name, x in zip(self.names, arrays, strict=True)}
        if "seed" in found:
            found["seed"] = found["seed"].view(np.int64)
        return self._terms(found)

    def _terms(self, found: dict[str, Any]) -> Terms:
        return Terms(**found, block_size=self.block_size, shift=self.shift, dropout_p=self.dropout_p)


def call_of(compiled: CompiledAttention, shape: Shape, scale: float, terms: Terms) -> tuple[Call, Arrays]:
    """A call, and the arrays among its terms; the seed is uint32 (2,), its low half first. Prepared, once."""
    arrays = {name: x for name in (*LEARNABLE, "seed") if (x := getattr(terms, name)) is not None}
    call = Call(compiled, shape, scale, tuple(arrays), terms.block_size, terms.shift, terms.dropout_p)
    return _prepared(call), tuple(arrays.values())


@cache
def _prepared(call: Call) -> Call:
    """The call, or one that is equal to it."""
    call.prepare()
    return call


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(call: Call, q: Any, k: Any, v: Any, terms: Arrays) -> tuple[Any, Any]:
    """(o, lse) of q, k, v (batch, heads, seq, dim)."""
    s = call.shape
    rows = s.batch, s.heads, s.q_len
    results = [jax.ShapeDtypeStruct((*rows, s.v_head_dim), q.dtype), jax.ShapeDtypeStruct(rows, computed_in(s.dtype))]
    if call.ordinal is not None:
        results.append(_scratch(scratch_bytes(call.on_gpus.forward(call.ordinal).scratch)))
    o, lse, *_ = _operator(FORWARD, results)(q, k, v, *terms, handle=_handle(call))
    return o, lse


def _scratch(size: int) -> Any:
    return jax.ShapeDtypeStruct((size,), np.uint8)


def _attend_forward(call: Call, *primals: Any) -> tuple[Any, Any]:
    """primals: each with its value, and whether it is perturbed: whether gradients of it are asked for."""
    q, k, v, terms = jax.tree.map(lambda x: x.value, primals)
    asked = {name: None for name, x in zip(call.learnable, primals[3], strict=False) if x.perturbed}  # a structure
    o, lse = attend(call, q, k, v, terms)
    return (o, lse), (q, k, v, terms, o, lse, asked)


def _attend_backward(call: Call, kept: Any, cotangents: tuple[Any, Any]) -> tuple[Any, ...]:
    q, k, v, terms, o, lse, asked = kept
    do, dlse = (jnp.zeros(x.shape, x.dtype) if isinstance(x, SymbolicZero) else x for x in cotangents)
    if call.ordinal is not None and (refused := [name for name in asked if name != "sinks"]):
        raise Unsupported(ON_CPUS.format(" and ".join(refused)))
    call.prepare_gradients()
    differentiate = _differentiate_on_cpu if call.ordinal is None else _differentiate_on_gpu
    dq, dk, dv, *of_terms = differentiate(call, q, k, v, terms, o, lse, do, dlse)
    return dq, dk, dv, (*of_terms, *(None for _ in terms[len(of_terms) :]))


def _differentiate_on_cpu(call: Call, q: Any, k: Any, v: Any, terms: Arrays, o: Any, lse: Any, do: Any,
                          dlse: Any) -> list[Any]:  # fmt: skip
    delta = _delta(o, lse, do, dlse)
    results = tuple(jax.ShapeDtypeStruct(x.shape, lse.dtype) for x in (q, k, v, *terms[: len(call.learnable)]))
    found = _operator(BACKWARD, results)(q, k, v, do, lse, delta, *terms, handle=_handle(call))
    return [*(x.astype(q.dtype) for x in found[:3]), *found[3:]]


def _differentiate_on_gpu(call: Call, q: Any, k: Any, v: Any, terms: Arrays, o: Any, lse: Any, do: Any,
                          dlse: Any) -> list[Any]:  # fmt: skip
    assert call.ordinal is not None
    calls, known = call.on_gpus, {"q": q, "k": k, "v": v, "o": o, "do": do, "lse": lse, "dlse": dlse}
    delta = known["delta"] = _delta(o, lse, do, dlse)  # XLA drops it where nothing takes it
    made = calls.backward(call.ordinal)
    results = [jax.ShapeDtypeStruct(x.shape, made.sizes[name][0])
               for name, x in zip(RESULTS, (q, k, v), strict=True)]  # fmt: skip
    results.append(_scratch(scratch_bytes(made.scratch)))
    found = _operator(BACKWARD, results)(*(known[name] for name in calls.takes), *terms, handle=_handle(call))
    of_terms = [_of_sinks(x, lse, delta) if name == "sinks" else None
                for name, x in zip(call.learnable, terms, strict=False)]  # fmt: skip
    return [*(x.astype(q.dtype) for x in found[:3]), *of_terms]


def _of_sinks(sinks: Any, lse: Any, delta: Any) -> Any:
    """Of sinks (heads,): -delta times their share in the rows, of which those with LSE -inf have none."""
    share = jnp.exp(sinks[:, None] - jnp.where(lse == -jnp.inf, jnp.inf, lse))
    return -(share * delta).sum((0, 2)).astype(sinks.dtype)


def _delta(o: Any, lse: Any, do: Any, dlse: Any) -> Any:
    return (do.astype(lse.dtype) * o.astype(lse.dtype)).sum(-1) - dlse


attend.defvjp(_attend_forward, _attend_backward, symbolic_zeros=True)
attend_at_once = jax.jit(attend, static_argnums=0, inline=True)  # eager calls are traced once, too


def _operator(name: str, results: Any) -> Any:
    return jax.ffi.ffi_call(name, results, vmap_method="sequential")


_calls: dict[int, Call] = {}  # what operators refer to, by handle: kept as long as the process, like what jit compiled


@cache
def _handle(call: Call) -> Any:
    """A number, as text would do harm: jax-tvm-ffi 0.1.3 frees some lengths of it in a way that corrupts memory."""
    handle = np.int64(uuid4().int >> 65)
    _calls[int(handle)] = call
    return handle


def _found(handle: int, on_gpu: bool) -> Call:
    call = _calls[handle]
    if (call.ordinal is not None) != on_gpu:
        raise Unsupported(ELSEWHERE.format(*(("CPUs", "a GPU") if on_gpu else ("GPUs", "a CPU"))))
    return call


def _forward(handle: int, *arrays: Any) -> None:
    """The handler of FORWARD: q, k, v, terms, then the results o and lse."""
    call = _found(handle, on_gpu=False)
    q, k, v, *terms, o, lse = arrays
    call.compiled.write(call.shape, (q, k, v, o, lse), call.scale, call.terms(tuple(terms)))


def _backward(handle: int, *arrays: Any) -> None:
    """The handler of BACKWARD: q, k, v, do, lse, delta, terms, then the results dq, dk, dv and those of terms."""
    call = _found(handle, on_gpu=False)
    inputs, (lse, delta), rest = arrays[:4], map(np.from_dlpack, arrays[4:6]), arrays[6:]
    terms, results = rest[: len(call.names)], rest[len(call.names) :]
    found = _gradients(call).write(call.shape, inputs, lse, delta, results[:3], call.scale, call.terms(terms))
    for result, x in zip(results[3:], found, strict=True):
        np.from_dlpack(result)[...] = x


def _gradients(call: Call) -> Gradients:
    gradients = call.compiled.gradients
    assert isinstance(gradients, Gradients)  # of a CPU
    return gradients


def _forward_on_gpu(handle: int, *arrays: Any) -> None:
    """The same on a GPU, with scratch memory as the last result."""
    call = _found(handle, on_gpu=True)
    q, k, v, *terms, o, lse, scratch = arrays
    addresses = [x.data_ptr() for x in (q, k, v, o, lse)]
    call.on_gpus.attend(q.device.index, addresses, scratch.data_ptr(), call.scale, call.terms_on_gpu(tuple(terms)))


def _backward_on_gpu(handle: int, *arrays: Any) -> None:
    """The handler of BACKWARD on a GPU: what the gradients take, terms, then the results dq, dk, dv and scratch
    memory."""
    call = _found(handle, on_gpu=True)
    takes = call.on_gpus.takes
    tensors, terms, results = arrays[: len(takes)], arrays[len(takes) : -4], arrays[-4:-1]
    known = dict(zip((*takes, *RESULTS), (*tensors, *results), strict=True))
    call.on_gpus.differentiate(tensors[0].device.index, {name: x.data_ptr() for name, x in known.items()},
                               arrays[-1].data_ptr(), call.scale, call.terms_on_gpu(terms))  # fmt: skip


for _name, _handler, _on_gpu in ((FORWARD, _forward, _forward_on_gpu), (BACKWARD, _backward, _backward_on_gpu)):
    for _platform, _function in (("cpu", _handler), ("gpu", _on_gpu)):
        jax_tvm_ffi.register_ffi_target(_name, tvm_ffi.convert(_function), ["attrs.handle", "args", "rets"],
                                        platform=_platform, pass_owned_tensor=True)  # fmt: skip
