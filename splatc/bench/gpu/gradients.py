"""Right or wrong, for gradients: a float64 reference of whole heads, every row and every column of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

NAMES = ("dq", "dk", "dv")
ROWS = 2048  # of the matrix of scores at a time


@dataclass(frozen=True)
class Wanted:
    """dq of the query heads that share a key head, (batch, group, seq, dim), and its dk and dv, (batch, seq, dim)."""

    kv_head: int
    dq: Any
    dk: Any
    dv: Any


def reference(q: Any, k: Any, v: Any, do: Any, mask: Any, kv_heads: Sequence[int]) -> list[Wanted]:
    """The gradients of attention with a boolean mask (q_len, kv_len), for those of o, in some key heads."""
    import torch

    with torch.no_grad():
        return [_head(q, k, v, do, mask, one) for one in kv_heads]


def _head(q: Any, k: Any, v: Any, do: Any, mask: Any, kv_head: int) -> Wanted:
    import torch

    group, scale = q.shape[1] // k.shape[1], 1 / math.sqrt(q.shape[-1])
    heads = slice(kv_head * group, (kv_head + 1) * group)
    queries, arriving = q[:, heads].double(), do[:, heads].double()
    keys, values = k[:, kv_head, None].double(), v[:, kv_head, None].double()
    dk, dv = torch.zeros_like(keys[:, 0]), torch.zeros_like(values[:, 0])
    parts = []
    for rows in (slice(start, start + ROWS) for start in range(0, queries.shape[2], ROWS)):
        mine, given = queries[:, :, rows], arriving[:, :, rows]
        scores = (mine @ keys.mT * scale).masked_fill(~mask[rows], -math.inf)
        lse = scores.logsumexp(-1, keepdim=True)
        weights = (scores - lse).exp().masked_fill(~mask[rows], 0.0)  # an empty row: nan, then 0
        delta = (given * (weights @ values)).sum(-1, keepdim=True)
        slopes = weights * (given @ values.mT - delta) * scale
        parts.append(slopes @ keys)
        dk += (slopes.mT @ mine).sum(1)
        dv += (weights.mT @ given).sum(1)
    return Wanted(kv_head, torch.cat(parts, 2), dk, dv)


def errors(got: Sequence[Any], wanted: Sequence[Wanted]) -> dict[str, float]:
    """Of (dq, dk, dv): ||got - wanted|| / ||wanted|| over the heads of the reference. NaN anywhere gives NaN."""
    gaps, sizes = dict.fromkeys(NAMES, 0.0), dict.fromkeys(NAMES, 0.0)
    for one in wanted:
        for name, x, y in _pairs(got, one):
            gaps[name] += float((x.double() - y).square().sum())
            sizes[name] += float(y.square().sum())
    return {name: math.sqrt(gaps[name]) / (math.sqrt(sizes[name]) or 1.0) for name in NAMES}


def _pairs(got: Sequence[Any], wanted: Wanted) -> Iterator[tuple[str, Any, Any]]:
    dq, dk, dv = got
    group = wanted.dq.shape[1]
    yield "dq", dq[:, wanted.kv_head * group : (wanted.kv_head + 1) * group], wanted.dq
    yield "dk", dk[:, wanted.kv_head], wanted.dk
    yield "dv", dv[:, wanted.kv_head], wanted.dv
