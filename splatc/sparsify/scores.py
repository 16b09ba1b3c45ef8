"""The mean attention of a layer, without its scores of all batch entries and heads at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from splatc.errors import InvalidInput
from splatc.nn.padding import check_padding
from splatc.patterns import Pattern, PerHead, heads_of

LIMIT = 2**24  # scores held at a time


def mean_attention(q: torch.Tensor, k: torch.Tensor, pattern: Pattern | None = None, *, scale: float | None = None,
                   key_padding_mask: torch.Tensor | None = None, per_head: bool = False,
                   limit: int = LIMIT) -> torch.Tensor:  # fmt: skip
    """What queries attend to, after the softmax, in the mean over the batch and heads: float32 (q_len, kv_len), or with
    ``per_head`` over the batch only: (heads, q_len, kv_len).

    q (batch, heads, q_len, head_dim), k (batch, kv_heads, kv_len, head_dim), kv_heads a divisor of heads. pattern: what
    they may attend to, default everything. scale: of the scores, default 1/sqrt(head_dim). key_padding_mask: bool
    (batch, kv_len), True where a key is padding, which nothing attends to; if q_len is kv_len, queries there do not
    count in the mean of their row (0 if none is left). limit: scores to hold at a time, if that is a row of one batch
    entry's heads or more. Never differentiable. Raises InvalidInput for shapes that do not fit.
    """
    return _mean(_sums(q, k, pattern, scale, key_padding_mask, per_head, limit))


def _sums(q: torch.Tensor, k: torch.Tensor, pattern: Pattern | None, scale: float | None,
          padding: torch.Tensor | None, per_head: bool, limit: int) -> torch.Tensor:  # fmt: skip
    """The sums of which `mean_attention` is the mean, and in a last column over how many, (..., q_len, kv_len + 1)."""
    batch, heads, q_len, head_dim = q.shape
    kv_len = k.shape[2]
    if 0 in (*q.shape, *k.shape) or heads % k.shape[1]:
        raise InvalidInput(f"q {tuple(q.shape)} and k {tuple(k.shape)}: they must be (batch, heads, length, head_dim)")
    scale = head_dim**-0.5 if scale is None else scale
    rows = min(max(limit // (heads * kv_len), 1), q_len)
    entries = min(max(limit // (heads * rows * kv_len), 1), batch)
    left_out = torch.zeros(batch, q_len, dtype=torch.bool, device=q.device)  # queries
    if padding is not None:
        check_padding(padding, batch, kv_len)
        left_out = padding if q_len == kv_len else left_out
    out = torch.zeros((heads, q_len, kv_len + 1) if per_head else (q_len, kv_len + 1), device=q.device)
    out[..., -1] = (~left_out).sum(0) * (1 if per_head else heads)
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        for lo in range(0, q_len, rows):
            hi = min(lo + rows, q_len)
            unseen = None
            if pattern is not None:
                unseen = torch.from_numpy(~_rows(pattern, heads, lo, hi, q_len, kv_len)).to(q.device)
            for b in range(0, batch, entries):
                some = slice(b, b + entries)
                keys = k[some].float().repeat_interleave(heads // k.shape[1], 1)
                scores = (q[some, :, lo:hi].float() * scale) @ keys.mT
                hidden = unseen
                if padding is not None:
                    nobody = padding[some, None, None, :] | left_out[some, None, lo:hi, None]
                    hidden = nobody if unseen is None else nobody | unseen
                if hidden is not None:
                    scores.masked_fill_(hidden, -1e30)
                shares = scores.softmax(-1)
                if hidden is not None:
                    shares.masked_fill_(hidden, 0.0)
                out[..., lo:hi, :-1] += shares.sum(0) if per_head else shares.sum((0, 1))
    return out


def _mean(sums: torch.Tensor) -> torch.Tensor:
    return sums[..., :-1] / sums[..., -1:].clamp_min(1)


def _rows(pattern: Pattern, heads: int, lo: int, hi: int, q_len: int, kv_len: int) -> NDArray[np.bool_]:
    """The rows of a mask: bool (hi - lo, kv_len), or (heads, hi - lo, kv_len) if heads differ."""
    q, k = np.arange(lo, hi)[:, None], np.arange(kv_len)[None, :]
    if not isinstance(pattern, PerHead):
        return pattern.contains(q, k, q_len, kv_len)
    return np.stack([one.contains(q, k, q_len, kv_len) for one in heads_of(pattern, heads)])


class MeanMap:
    """The mean of `mean_attention` over calls: of the micro-batches of a step, of the processes that share it."""

    def __init__(self, per_head: bool = False) -> None:
        self._per_head = per_head
        self._sums: torch.Tensor | None = None

    def add(self, q: torch.Tensor, k: torch.Tensor, pattern: Pattern | None, scale: float | None,
            padding: torch.Tensor | None = None) -> None:  # fmt: skip
        """One more call; arguments as of `mean_attention`."""
        new = _sums(q.detach(), k.detach(), pattern, scale, padding, self._per_head, LIMIT)
        if self._sums is not None and self._sums.shape != new.shape:
            sizes = f"{_size(self._sums.shape)} and {_size(new.shape)}"
            raise InvalidInput(f"maps {sizes} have no mean: keep to one length")
        self._sums = new if self._sums is None else self._sums + new

    def mean(self) -> torch.Tensor | None:
        """The mean so far, of all calls in all processes of ``torch.distributed``, which have to ask together; None
        where there was no call in any."""
        sums = _over_processes(self._sums)
        return None if sums is None else _mean(sums)


def _over_processes(sums: torch.Tensor | None) -> torch.Tensor | None:
    """The sum of what processes have, some of them nothing; InvalidInput in all of them if sizes differ."""
    if not (dist.is_available() and dist.is_initialized()):
        return sums
    each: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(each, None if sums is None else (sums.device.type, *sums.shape))
    kinds = {one for one in each if one is not None}
    if not kinds:
        return None
    if len(kinds) > 1:
        sizes = ", ".join(str(_size(shape)) for _, *shape in sorted(kinds))
        raise InvalidInput(f"maps of processes have sizes {sizes}, and no mean: watch sequences of one length in all")
    device, *shape = kinds.pop()
    out = torch.zeros(shape, device=device) if sums is None else sums.clone()
    dist.all_reduce(out)
    return out


def _size(shape: Sequence[int]) -> tuple[int, ...]:
    """Of a map, whose sums have one more column."""
    return (*shape[:-1], shape[-1] - 1)
