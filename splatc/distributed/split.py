"""Attention to the keys of this rank while those of others are on their way, then to these.

What is merged is (o, lse) of some rows. Their gradients need no way back through that: given o and lse of whole rows,
the backward pass of either part returns what the part adds to dQ, dK and dV.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from splatc.distributed.exchange import Exchange, Rows, add_rows, put_rows
from splatc.errors import Unsupported
from splatc.runtime.attention import CompiledAttention


@dataclass(frozen=True)
class Split:
    """One kind of call. own: of all local queries to local keys. beyond: of those at ``asking`` to the fetched keys,
    None where nothing is fetched."""

    exchange: Exchange
    own: CompiledAttention
    beyond: CompiledAttention | None
    asking: Rows

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float,
                 enable_gqa: bool) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """(o, lse) of the local q (batch, heads, rows, head_dim) over the keys and values of all ranks; k and v (batch,
        kv_heads, rows, dim) are the local ones. Differentiable once."""
        o, lse = _Attend.apply(q, k, v, self, scale, enable_gqa)  # type: ignore[no-untyped-call]
        return o, lse


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, split: Split,
                *options: Any) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        coming = split.exchange.fetch(k, v)
        o, lse = split.own.run(q, k, v, *options, None)
        fetched = coming.wait()
        if split.beyond is not None:
            attend_into(o, lse, split.asking, split.beyond, q, *fetched, *options)
        ctx.split, ctx.options = split, options
        ctx.save_for_backward(q, k, v, *fetched, o, lse)
        ctx.set_materialize_grads(False)  # mostly nobody asks for gradients of lse
        return o, lse

    @staticmethod
    def backward(ctx: Any, do: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[Any, ...]:
        if any(x is not None and torch._C._functorch.is_legacy_batchedtensor(x) for x in (do, dlse)):
            raise Unsupported("context parallel attention computes gradients one by one, without is_grads_batched=True")
        to_owners = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        given = do, dlse, *ctx.saved_tensors, ctx.split, to_owners, *ctx.options
        return *_Gradients.apply(*given), None, None, None  # type: ignore[no-untyped-call]


class _Gradients(torch.autograd.Function):
    """(dq, dk, dv) for those of o and lse, and a refusal to differentiate these again.

    to_owners: whether gradients of fetched rows are wanted, on all ranks or on none.
    """

    @staticmethod
    def forward(ctx: Any, do: torch.Tensor | None, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor,
                v: torch.Tensor, k_fetched: torch.Tensor, v_fetched: torch.Tensor, o: torch.Tensor, lse: torch.Tensor,
                split: Split, to_owners: bool, *options: Any) -> tuple[torch.Tensor, ...]:  # fmt: skip
        do = torch.zeros_like(o) if do is None else do
        d_fetched = [k_fetched, v_fetched]  # of no rows, unless there are gradients
        if split.beyond is not None:
            at = split.asking
            ends = o[:, :, at], lse[:, :, at].contiguous(), do[:, :, at], None if dlse is None else dlse[:, :, at]
            dq_asking, *d_fetched, _ = split.beyond.backward(q[:, :, at], k_fetched, v_fetched, *ends, *options)
        if to_owners:
            coming = split.exchange.give_back(*d_fetched)
        dq, dk, dv, _ = split.own.backward(q, k, v, o, lse, do, dlse, *options)
        if split.beyond is not None:
            add_rows(dq, at, dq_asking)
        if to_owners:
            for own, returned in zip((dk, dv), coming.wait(), strict=True):
                split.exchange.add(own, returned)
        return dq, dk, dv

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise Unsupported("context parallel attention has first derivatives only: detach() its gradients")


def attend_into(o: torch.Tensor, lse: torch.Tensor, at: Rows, attend: CompiledAttention, q: torch.Tensor,
                *given: Any) -> None:  # fmt: skip
    """Attention of the rows ``at`` to more keys, put into o and lse: by the kernel that computes it, where they are
    neighbours, else in steps."""
    asking = q[:, :, at]
    if not (isinstance(at, slice) and attend.merge(o[:, :, at], lse[:, :, at], asking, *given)):
        merge(o, lse, at, *attend.run(asking, *given, None))


def merge(o: torch.Tensor, lse: torch.Tensor, at: Rows, more_o: torch.Tensor, more_lse: torch.Tensor) -> None:
    """Attention of the rows ``at`` to more keys, put into o (batch, heads, rows, v_head_dim) and lse (batch, heads,
    rows), computed in the type of lse; 0 and -inf stay where a row attends to nothing."""
    total = torch.logaddexp(lse[:, :, at], more_lse)
    top = total.clamp_min(torch.finfo(total.dtype).min)  # finite, so that exp(-inf - top) is 0
    here, there = ((x - top).exp_()[..., None] for x in (lse[:, :, at], more_lse))
    put_rows(o, at, (o[:, :, at] * here).addcmul_(more_o, there))
    put_rows(lse, at, total)
