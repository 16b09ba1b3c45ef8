"""Rows of K and V from rank to rank, and their gradients back."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from splatc.distributed.plan import Plan


class Exchange:
    """What one rank of a group sends and receives; index tensors are kept for each device."""

    def __init__(self, plan: Plan, group: dist.ProcessGroup) -> None:
        self.share = plan.shares[dist.get_rank(group)]
        self.group = group
        self.needed = plan.exchanges  # by anyone: a collective is called by all ranks or by none
        self.in_place = not plan.exchanges and np.array_equal(self.share.index, np.arange(len(self.share.rows)))
        self.send_counts = [len(one) for one in self.share.send]
        self.receive_counts = list(self.share.receive)
        self.on = lru_cache(maxsize=8)(self._on)

    def keys(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values that this rank's queries attend to, from the local k (batch, kv_heads, rows, head_dim)
        and v. Differentiable: gradients of fetched rows go back to their owners."""
        return (k, v) if self.in_place else _Keys.apply(k, v, self)  # type: ignore[no-untyped-call,no-any-return]

    def _on(self, device: torch.device) -> tuple[list[torch.Tensor], torch.Tensor]:
        """(rows to send to each rank, where keys are in own and received rows)."""
        send = [torch.from_numpy(one).to(device) for one in self.share.send]
        return send, torch.from_numpy(self.share.index).to(device)

    def swap(self, rows: torch.Tensor, back: bool = False) -> torch.Tensor:
        """Rows (n, width), those for rank 0 first, for what the ranks send here, that of rank 0 first."""
        counts = self.receive_counts, self.send_counts
        come, go = counts[::-1] if back else counts
        out = rows.new_empty(sum(come), rows.shape[1])
        dist.all_to_all_single(out, rows, come, go, group=self.group)
        return out


class _Keys(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, k: torch.Tensor, v: torch.Tensor, exchange: Exchange) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.exchange = exchange
        send, index = exchange.on(k.device)
        parts = [k], [v]
        if exchange.needed:
            go = torch.cat(send)
            received = exchange.swap(_pack(k.index_select(2, go), v.index_select(2, go)))
            for own, one in zip(parts, _unpack(received, k, v), strict=True):
                own.append(one)
        k, v = (torch.cat(part, 2).index_select(2, index) for part in parts)
        return k, v

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        exchange: Exchange = ctx.exchange
        send, index = exchange.on(gradients[0].device)
        own, received = len(exchange.share.rows), exchange.share.received
        placed = [_place(one, index, own + received) for one in gradients]
        dk, dv = (one[:, :, :own] for one in placed)
        if exchange.needed:
            rows = exchange.swap(_pack(*(one[:, :, own:] for one in placed)), back=True)
            dk, dv = (_add(*pair, send) for pair in zip((dk, dv), _unpack(rows, dk, dv), strict=True))
        return dk, dv, None


def _pack(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """K and V (batch, heads, n, dim) as one row for each position: (n, batch * heads * (dim + v_dim))."""
    return torch.cat([x.permute(2, 0, 1, 3).flatten(1) for x in (k, v)], 1)


def _unpack(rows: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
    """The inverse of _pack, with the batch, heads and dims of k and v."""
    sizes = [x.shape[0] * x.shape[1] * x.shape[3] for x in (k, v)]
    parts = zip(torch.split(rows, sizes, 1), (k, v), strict=True)
    return [part.reshape(-1, x.shape[0], x.shape[1], x.shape[3]).permute(1, 2, 0, 3) for part, x in parts]


def _place(gradient: torch.Tensor, index: torch.Tensor, rows: int) -> torch.Tensor:
    """Gradients of keys at their places in own and received rows; zeros for rows that no query attends to."""
    out = gradient.new_zeros(*gradient.shape[:2], rows, gradient.shape[3])
    return out.index_copy_(2, index, gradient)


def _add(own: torch.Tensor, others: torch.Tensor, send: list[torch.Tensor]) -> torch.Tensor:
    """Own gradients and those of the ranks that the rows went to, added in the order of ranks, in float32 at least."""
    total = own.to(torch.promote_types(own.dtype, torch.float32), copy=True)
    for rows, part in zip(send, torch.split(others, [len(one) for one in send], 2), strict=True):
        total.index_add_(2, rows, part.to(total.dtype))  # no row twice: one writer for each
    return total.to(own.dtype)
