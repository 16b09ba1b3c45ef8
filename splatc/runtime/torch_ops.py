"""splatc's operators in PyTorch: what autograd, torch.compile, torch.export and torch.func see.

    splatc::attention(q, k, v, mask, scale, enable_gqa, *terms) -> (o, lse)
    splatc::attention_backward(q, k, v, o, lse, do, dlse, mask, scale, enable_gqa, *terms, learning) -> (dq, dk, dv,
        dterms)

``mask`` is the handle of a CompiledAttention, which has to be alive when an operator runs: whoever calls it holds it,
as does the autograd graph. A handle means nothing in another process. ``terms`` are the fields of ``Terms``; dterms are
the gradients of ``Terms.learning(learning)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from splatc.errors import Unsupported
from splatc.ir.terms import LEARNABLE, NO_TERMS, Terms
from splatc.runtime.handles import find
from splatc.runtime.tensors import NO_TRANSFORMS, computed_in, dtype_name, recorded

TENSORS = len(LEARNABLE) + 1  # of Terms: these and the seed
FIELDS = len(NO_TERMS.arguments)
FIRST = 6  # of the operator's arguments that is one of Terms


@torch.library.custom_op("splatc::attention", mutates_args=())
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: str, scale: float | None, enable_gqa: bool,
    alibi_slopes: torch.Tensor | None = None, relative_bias: torch.Tensor | None = None,
    block_bias: torch.Tensor | None = None, sinks: torch.Tensor | None = None, seed: torch.Tensor | None = None,
    block_size: int = 0, shift: int = 0, dropout_p: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(o, lse) as CompiledAttention returns them."""
    return _forward(q, k, v, mask, scale, enable_gqa, alibi_slopes, relative_bias, block_bias, sinks, seed, block_size,
                    shift, dropout_p)  # fmt: skip


@attention.register_fake
def _(q: Any, k: Any, v: Any, mask: str, *options: Any, **terms: Any) -> tuple[Any, Any]:
    batch, *middle, _ = q.shape
    rows = middle if find(mask).layout == "bhsd" else middle[::-1]
    lse = q.new_empty((batch, *rows), dtype=getattr(torch, computed_in(dtype_name(q))))
    return q.new_empty((batch, *middle, v.shape[-1])), lse


@torch.library.custom_op("splatc::attention_backward", mutates_args=())
def attention_backward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: torch.Tensor, lse: torch.Tensor, do: torch.Tensor,
    dlse: torch.Tensor | None, mask: str, scale: float | None, enable_gqa: bool,
    alibi_slopes: torch.Tensor | None = None, relative_bias: torch.Tensor | None = None,
    block_bias: torch.Tensor | None = None, sinks: torch.Tensor | None = None, seed: torch.Tensor | None = None,
    block_size: int = 0, shift: int = 0, dropout_p: float = 0.0, learning: Sequence[bool] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:  # fmt: skip
    """The gradients for those, do and dlse, of o and lse."""
    return _gradients(q, k, v, o, lse, do, dlse, mask, scale, enable_gqa, alibi_slopes, relative_bias, block_bias,
                      sinks, seed, block_size, shift, dropout_p, learning=learning)  # fmt: skip


@attention_backward.register_fake
def _(
    q: Any, k: Any, v: Any, o: Any, lse: Any, do: Any, dlse: Any, mask: str, scale: float | None, enable_gqa: bool,
    *rest: Any, **named: Any,
) -> tuple[Any, Any, Any, list[Any]]:  # fmt: skip
    *given, learning = (*rest, None) if len(rest) <= FIELDS else rest
    terms = Terms(*given, **{name: x for name, x in named.items() if name != "learning"})
    found = [getattr(terms, name) for name in terms.learning(named.get("learning", learning))]
    dterms = [x.new_empty(x.shape) for x in found]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dterms


def _forward(q: Any, k: Any, v: Any, mask: str, scale: Any, enable_gqa: bool, *terms: Any) -> tuple[Any, Any]:
    o, lse = find(mask).run(q, k, v, scale, enable_gqa, _terms(*terms))
    return o, lse


def _gradients(q: Any, k: Any, v: Any, o: Any, lse: Any, do: Any, dlse: Any, mask: str, scale: Any, enable_gqa: bool,
               *terms: Any, learning: Any = None) -> tuple[Any, Any, Any, list[Any]]:  # fmt: skip
    dq, dk, dv, dterms = find(mask).backward(q, k, v, o, lse, do, dlse, scale, enable_gqa, _terms(*terms), learning)
    return dq, dk, dv, dterms


def _terms(*fields: Any) -> Terms | None:
    """Those of an operator's arguments, None where none is given."""
    return Terms(*fields) if any(x is not None for x in fields[:TENSORS]) else None


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, Any]) -> None:
    q, k, v, mask, scale, enable_gqa = inputs[:FIRST]
    terms = inputs[FIRST:]
    ctx.save_for_backward(q, k, v, *output, *terms[:TENSORS])
    ctx.options, ctx.numbers, ctx.kept_alive = (mask, scale, enable_gqa), terms[TENSORS:], find(mask)
    ctx.set_materialize_grads(False)  # mostly nobody asks for gradients of lse


def _backward(ctx: Any, do: Any, dlse: Any, run: Callable[..., Any] = attention_backward) -> tuple[Any, ...]:
    q, k, v, o, lse, *tensors = ctx.saved_tensors
    do = torch.zeros_like(o) if do is None else do
    flags = [x is not None and ctx.needs_input_grad[FIRST + i] for i, x in enumerate(tensors[: len(LEARNABLE)])]
    dq, dk, dv, dterms = run(q, k, v, o, lse, do, dlse, *ctx.options, *tensors, *ctx.numbers, learning=flags)
    left = iter(dterms)
    of_terms = (next(left) if flag else None for flag in flags)
    return dq, dk, dv, None, None, None, *of_terms, *[None] * (FIELDS - len(flags))


attention.register_autograd(_backward, setup_context=_save)


def _no_second(ctx: Any, *gradients: Any) -> Any:
    raise Unsupported("splatc has first derivatives only: detach() its gradients, or compute attention densely where "
                      "second ones are needed")  # fmt: skip


attention_backward.register_autograd(_no_second)


class _Eager(torch.autograd.Function):
    """The same without operators, which take PyTorch longer each way than all else that is done on the host."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Any, Any]:
        output = _forward(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, do: Any, dlse: Any) -> tuple[Any, ...]:
        if any(x is not None and torch._C._functorch.is_legacy_batchedtensor(x) for x in (do, dlse)):
            raise Unsupported("splatc computes gradients one by one, without is_grads_batched=True or vectorize=True")
        again = torch.is_grad_enabled()  # a graph of this is made: the operator refuses to be differentiated
        return _backward(ctx, do, dlse, attention_backward if again else _gradients)


def differentiable(q: Any, k: Any, v: Any, *options: Any) -> tuple[Any, Any]:
    """(o, lse) with a way back: by the operator wherever anything but autograd must see it."""
    if recorded() or not all(type(x) in (torch.Tensor, torch.nn.Parameter) for x in (q, k, v)):
        o, lse = attention(q, k, v, *options)
    else:
        o, lse = _Eager.apply(q, k, v, *options)  # type: ignore[no-untyped-call]
    return o, lse


def _no_vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:  # eager calls are refused before
    raise Unsupported(NO_TRANSFORMS)


for _operator in (attention, attention_backward):
    _operator.register_vmap(_no_vmap)
