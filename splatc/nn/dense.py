"""Attention over any pattern, the slow and plain way: dense, in PyTorch's own operations."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from splatc.errors import InvalidInput
from splatc.patterns import Pattern, as_pattern
from splatc.patterns.pruned import Pruning, split
from splatc.runtime.tensors import LAYOUTS, check_call, check_scale, check_softcap, to_bhsd

INF = float("inf")


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: Any, *, scale: float | None = None,
                    softcap: float | None = None, return_lse: bool = False, enable_gqa: bool = False,
                    layout: str = "bhsd", mask: torch.Tensor | None = None,
                    dropout_p: float = 0.0) -> Any:  # fmt: skip
    """What ``sparse_attention`` computes, from all q_len x kv_len scores: for checking, and for training where a
    dynamic pattern has no kernel. Differentiable, on CPUs and GPUs; time and memory are quadratic.

    q, k, v, pattern, scale, softcap, return_lse, enable_gqa, layout: as of ``sparse_attention``. mask: boolean,
    broadcast to (batch, heads, q_len, kv_len); keys count only where it is True, too (padding, say). dropout_p: of the
    weights, by torch's generator. Everything is computed in float32 (float64 for float64, also under autocast), by
    PyTorch's matmul in the precision that it is set to; o has the dtype of q. Raises InvalidInput for tensors that do
    not fit.
    """
    if layout not in LAYOUTS:
        raise InvalidInput(f"layout is {layout!r}: it must be one of {', '.join(LAYOUTS)}")
    shape = check_call(q, k, v, layout, enable_gqa)
    static, pruning = split(as_pattern(pattern, q_len=shape.q_len, kv_len=shape.kv_len, heads=shape.heads))
    factor, cap = check_scale(scale, shape.head_dim), check_softcap(softcap)
    with torch.autocast(q.device.type, enabled=False):
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        a, b, c = (to_bhsd(x, layout).to(wide) for x in (q, k, v))
        b, c = (x.repeat_interleave(shape.heads // shape.kv_heads, dim=1) for x in (b, c))
        s = a @ b.transpose(-1, -2) * factor
        if cap:
            s = cap * torch.tanh(s / cap)
        there = _dense(static, shape.q_len, shape.kv_len, q.device)
        s = s.masked_fill(~(there if mask is None else there & mask), -INF)
        if pruning is not None:
            s = s.masked_fill(~kept(s.detach(), pruning), -INF)
        p, lse = _softmax(s)
        o = to_bhsd(torch.dropout(p, dropout_p, True) @ c, layout).to(q.dtype)
    return (o, lse) if return_lse else o


def kept(scores: torch.Tensor, pruning: Pruning) -> torch.Tensor:
    """Which of scores (..., kv_len) stay, boolean: the rules of ``Pruning``; -inf for what is not in the mask."""
    kv_len, m = scores.shape[-1], pruning.m
    rank = scores.masked_fill(scores.isnan(), INF)
    rank = torch.nn.functional.pad(rank, (0, -kv_len % m), value=-INF)
    groups = [rank[..., i::m] for i in range(m)]  # by their place in a group
    stay = []
    for i, mine in enumerate(groups):  # earlier keys win ties
        beaten = [other >= mine if j < i else other > mine for j, other in enumerate(groups) if j != i]
        stay.append((sum(x.to(torch.int8) for x in beaten) < pruning.n) & (mine > -INF))
    return torch.stack(stay, dim=-1).flatten(-2)[..., :kv_len]


def _softmax(s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(softmax, log-sum-exp) along the last axis; 0 and -inf for a row of nothing."""
    top = s.detach().amax(-1, keepdim=True)
    e = torch.exp(s - top.masked_fill(top == -INF, 0.0))
    total = e.sum(-1, keepdim=True)
    nothing = total == 0
    total = total.masked_fill(nothing, 1.0)
    lse = (top + total.log()).masked_fill(nothing, -INF)
    return e / total, lse.squeeze(-1)


@lru_cache(maxsize=8)
def _dense(static: Pattern, q_len: int, kv_len: int, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(static.dense(q_len, kv_len)).to(device)
