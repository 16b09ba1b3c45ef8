"""splatc's operators in JAX: what jit, grad and vmap see. XLA calls handlers on the host, which call the CPU kernels.

An operator takes arrays and a handle; all else of a call is a ``Call``, which the handle finds. Handles are unlike
those of any other process, so that nothing that XLA keeps on disk can mean another mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from typing import Any
from uuid import uuid4

import jax
import numpy as np

from splatc.codegen.no_torch import without_torch
from splatc.errors import Unsupported
from splatc.ir.terms import LEARNABLE, Terms
from splatc.runtime.attention import CompiledAttention
from splatc.runtime.gradients import Gradients
from splatc.runtime.tensors import Shape, computed_in

with without_torch():
    import jax_tvm_ffi
    import tvm_ffi

FORWARD, BACKWARD = "splatc_attention", "splatc_attention_backward"
ONLY_CPU = ("splatc.jax computes on CPUs only: put the arrays on one (jax.device_put(x, jax.devices('cpu')[0])), or "
            "use splatc with PyTorch on a GPU")  # fmt: skip

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
    def learnable(self) -> tuple[str, ...]:
        """The names of what has gradients."""
        return tuple(name for name in self.names if name in LEARNABLE)

    def terms(self, arrays: Arrays) -> Terms:
        """The terms that a kernel takes, of the arrays of a handler."""
        found = {name: np.from_dlpack(x) for name, x in zip(self.names, arrays, strict=True)}
        if "seed" in found:
            found["seed"] = found["seed"].view(np.int64)
        return Terms(**found, block_size=self.block_size, shift=self.shift, dropout_p=self.dropout_p)


def call_of(compiled: CompiledAttention, shape: Shape, scale: float, terms: Terms) -> tuple[Call, Arrays]:
    """A call, and the arrays among its terms; the seed is uint32 (2,), its low half first."""
    arrays = {name: x for name in (*LEARNABLE, "seed") if (x := getattr(terms, name)) is not None}
    call = Call(compiled, shape, scale, tuple(arrays), terms.block_size, terms.shift, terms.dropout_p)
    return call, tuple(arrays.values())


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(call: Call, q: Any, k: Any, v: Any, terms: Arrays) -> tuple[Any, Any]:
    """(o, lse) of q, k, v (batch, heads, seq, dim)."""
    s = call.shape
    rows = s.batch, s.heads, s.q_len
    results = jax.ShapeDtypeStruct((*rows, s.v_head_dim), q.dtype), jax.ShapeDtypeStruct(rows, computed_in(s.dtype))
    o, lse = _operator(FORWARD, results)(q, k, v, *terms, handle=_handle(call))
    return o, lse


def _attend_forward(call: Call, q: Any, k: Any, v: Any, terms: Arrays) -> tuple[Any, Any]:
    o, lse = attend(call, q, k, v, terms)
    return (o, lse), (q, k, v, terms, o, lse)


def _attend_backward(call: Call, kept: Any, cotangents: tuple[Any, Any]) -> tuple[Any, ...]:
    q, k, v, terms, o, lse = kept
    do, dlse = cotangents
    _gradients(call).prepare(call.shape)  # here, where errors reach who asked
    delta = (do.astype(lse.dtype) * o.astype(lse.dtype)).sum(-1) - dlse
    learnable = terms[: len(call.learnable)]
    results = tuple(jax.ShapeDtypeStruct(x.shape, lse.dtype) for x in (q, k, v, *learnable))
    found = _operator(BACKWARD, results)(q, k, v, do, lse, delta, *terms, handle=_handle(call))
    dq, dk, dv = (x.astype(q.dtype) for x in found[:3])
    return dq, dk, dv, (*found[3:], *(None for _ in terms[len(learnable) :]))


attend.defvjp(_attend_forward, _attend_backward)
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


def _forward(handle: int, *arrays: Any) -> None:
    """The handler of FORWARD: q, k, v, terms, then the results o and lse."""
    call = _calls[handle]
    q, k, v, *terms, o, lse = arrays
    call.compiled.write(call.shape, (q, k, v, o, lse), call.scale, call.terms(tuple(terms)))


def _backward(handle: int, *arrays: Any) -> None:
    """The handler of BACKWARD: q, k, v, do, lse, delta, terms, then the results dq, dk, dv and those of terms."""
    call = _calls[handle]
    inputs, (lse, delta), rest = arrays[:4], map(np.from_dlpack, arrays[4:6]), arrays[6:]
    terms, results = rest[: len(call.names)], rest[len(call.names) :]
    found = _gradients(call).write(call.shape, inputs, lse, delta, results[:3], call.scale, call.terms(terms))
    for result, x in zip(results[3:], found, strict=True):
        np.from_dlpack(result)[...] = x


def _gradients(call: Call) -> Gradients:
    gradients = call.compiled.gradients
    assert isinstance(gradients, Gradients)  # of a CPU
    return gradients


def _refuse(*_: Any) -> None:
    raise Unsupported(ONLY_CPU)


for _name, _handler in ((FORWARD, _forward), (BACKWARD, _backward)):
    for _platform, _function in (("cpu", _handler), ("gpu", _refuse)):
        jax_tvm_ffi.register_ffi_target(_name, tvm_ffi.convert(_function), ["attrs.handle", "args", "rets"],
                                        platform=_platform, pass_owned_tensor=True)  # fmt: skip
