"""splatc's operators in PyTorch: what autograd, torch.compile, torch.export and torch.func see.

    splatc::attention(q, k, v, mask, scale, enable_gqa) -> (o, lse)
    splatc::attention_backward(q, k, v, o, lse, do, dlse, mask, scale, enable_gqa) -> (dq, dk, dv)

``mask`` is the handle of a CompiledAttention, which has to be alive when an operator runs: whoever calls it holds it,
as does the autograd graph. A handle means nothing in another process.
"""

from __future__ import annotations

from typing import Any

import torch

from splatc.errors import Unsupported
from splatc.runtime.handles import find
from splatc.runtime.tensors import NO_TRANSFORMS, computed_in, dtype_name


@torch.library.custom_op("splatc::attention", mutates_args=())
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: str, scale: float | None, enable_gqa: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, lse) as CompiledAttention returns them."""
    o, lse = find(mask).run(q, k, v, scale, enable_gqa)
    return o, lse


@attention.register_fake
def _(q: Any, k: Any, v: Any, mask: str, scale: float | None, enable_gqa: bool) -> tuple[Any, Any]:
    batch, *middle, _ = q.shape
    rows = middle if find(mask).layout == "bhsd" else middle[::-1]
    lse = q.new_empty((batch, *rows), dtype=getattr(torch, computed_in(dtype_name(q))))
    return q.new_empty((batch, *middle, v.shape[-1])), lse


@torch.library.custom_op("splatc::attention_backward", mutates_args=())
def attention_backward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: torch.Tensor, lse: torch.Tensor, do: torch.Tensor,
    dlse: torch.Tensor, mask: str, scale: float | None, enable_gqa: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(dq, dk, dv) of the gradients do and dlse of o and lse."""
    dq, dk, dv = find(mask).backward(q, k, v, o, lse, do, dlse, scale, enable_gqa)
    return dq, dk, dv


@attention_backward.register_fake
def _(
    q: Any, k: Any, v: Any, o: Any, lse: Any, do: Any, dlse: Any, mask: str, scale: float | None, enable_gqa: bool
) -> tuple[Any, Any, Any]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, Any]) -> None:
    q, k, v, *options = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.options, ctx.kept_alive = options, find(options[0])


def _backward(ctx: Any, do: Any, dlse: Any) -> tuple[Any, ...]:
    return *attention_backward(*ctx.saved_tensors, do, dlse, *ctx.options), None, None, None


attention.register_autograd(_backward, setup_context=_save)


def _no_vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:  # eager calls are refused before
    raise Unsupported(NO_TRANSFORMS)


for _operator in (attention, attention_backward):
    _operator.register_vmap(_no_vmap)
