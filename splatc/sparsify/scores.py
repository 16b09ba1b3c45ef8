"""The mean attention of a layer, without its scores of all batch entries and heads at once."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from splatc.errors import InvalidInput
from splatc.patterns import Pattern, PerHead, heads_of

LIMIT = 2**24  # scores held at a time


def mean_attention(q: torch.Tensor, k: torch.Tensor, pattern: Pattern | None = None, *, scale: float | None = None,
                   per_head: bool = False, limit: int = LIMIT) -> torch.Tensor:  # fmt: skip
    """What queries attend to, after the softmax, in the mean over the batch and heads: float32 (q_len, kv_len), or with
    ``per_head`` over the batch only: (heads, q_len, kv_len).

    q (batch, heads, q_len, head_dim), k (batch, kv_heads, kv_len, head_dim), kv_heads a divisor of heads. pattern: what
    they may attend to, default everything. scale: of the scores, default 1/sqrt(head_dim). limit: scores to hold at a
    time, if that is a row of one batch entry's heads or more. Never differentiable.
    """
    batch, heads, q_len, head_dim = q.shape
    kv_len = k.shape[2]
    if 0 in (*q.shape, *k.shape) or heads % k.shape[1]:
        raise InvalidInput(f"q {tuple(q.shape)} and k {tuple(k.shape)}: they must be (batch, heads, length, head_dim)")
    scale = head_dim**-0.5 if scale is None else scale
    rows = min(max(limit // (heads * kv_len), 1), q_len)
    entries = min(max(limit // (heads * rows * kv_len), 1), batch)
    out = torch.zeros((heads, q_len, kv_len) if per_head else (q_len, kv_len), device=q.device)
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        for lo in range(0, q_len, rows):
            seen = None if pattern is None else _rows(pattern, heads, lo, min(lo + rows, q_len), q_len, kv_len)
            hidden = None if seen is None else torch.from_numpy(~seen).to(q.device)
            for b in range(0, batch, entries):
                keys = k[b : b + entries].float().repeat_interleave(heads // k.shape[1], 1)
                scores = (q[b : b + entries, :, lo : lo + rows].float() * scale) @ keys.mT
                if hidden is not None:
                    scores.masked_fill_(hidden, -1e30)
                shares = scores.softmax(-1)
                if hidden is not None:
                    shares.masked_fill_(hidden, 0.0)
                out[..., lo : lo + rows, :] += shares.sum(0) if per_head else shares.sum((0, 1))
    return out.div_(batch if per_head else batch * heads)


def _rows(pattern: Pattern, heads: int, lo: int, hi: int, q_len: int, kv_len: int) -> NDArray[np.bool_]:
    """The rows of a mask: bool (hi - lo, kv_len), or (heads, hi - lo, kv_len) if heads differ."""
    q, k = np.arange(lo, hi)[:, None], np.arange(kv_len)[None, :]
    if not isinstance(pattern, PerHead):
        return pattern.contains(q, k, q_len, kv_len)
    return np.stack([one.contains(q, k, q_len, kv_len) for one in heads_of(pattern, heads)])


class MeanMap:
    """The mean of `mean_attention` over calls: of the micro-batches of a step."""

    def __init__(self, per_head: bool = False) -> None:
        self._per_head = per_head
        self._sum: torch.Tensor | None = None
        self._count = 0

    def add(self, q: torch.Tensor, k: torch.Tensor, pattern: Pattern | None, scale: float | None) -> None:
        """One more call; arguments as of `mean_attention`."""
        new = mean_attention(q.detach(), k.detach(), pattern, scale=scale, per_head=self._per_head)
        if self._sum is not None and self._sum.shape != new.shape:
            raise InvalidInput(f"maps {tuple(self._sum.shape)} and {tuple(new.shape)} have no mean: keep to one length")
        self._sum = new if self._sum is None else self._sum + new
        self._count += 1

    def mean(self) -> torch.Tensor | None:
        """The mean so far, over all processes of ``torch.distributed``; None without a call."""
        if self._sum is None:
            return None
        out: torch.Tensor = self._sum / self._count
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(out)
            out /= torch.distributed.get_world_size()
        return out
