"""Right or wrong: a float64 reference on sampled rows of every head, runs compared bit by bit, memory of a call."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from splatc.formats.nm import prune
from splatc.patterns.base import Pattern
from splatc.patterns.heads import heads_of
from splatc.patterns.pruned import Pruning, split

SAMPLED, SAMPLED_AREA = 64, 1 << 19  # rows a head, and mask elements a head that all of them may have
EDGE = 2  # rows at either end that are always among them


@dataclass(frozen=True)
class Sample:
    """Rows of each head, int64 (heads, rows), what they attend to, bool (heads, rows, kv_len), and how that is pruned
    by scores."""

    rows: NDArray[np.int64]
    mask: NDArray[np.bool_]
    pruning: Pruning | None = None


@dataclass(frozen=True)
class Errors:
    """o: ||o - reference|| / ||reference||; lse: the largest absolute difference. NaN anywhere gives NaN."""

    o: float
    lse: float


def sample_rows(pattern: Pattern, seq_len: int, heads: int, kv_len: int | None = None) -> Sample:
    """Fresh random rows for each head, other ones for each as far as they go; all rows where there are few.

    kv_len: how many keys there are, default seq_len. The pattern may be one a head.
    """
    kv_len = seq_len if kv_len is None else kv_len
    static, pruning = split(pattern)
    rng = np.random.default_rng()
    count = max(EDGE * 3, min(SAMPLED, SAMPLED_AREA // kv_len))
    if seq_len <= count:
        rows = np.tile(np.arange(seq_len), (heads, 1))
    else:
        edge = np.r_[:EDGE, seq_len - EDGE : seq_len]
        inner = rng.permutation(np.arange(EDGE, seq_len - EDGE))
        middle = np.resize(inner, (heads, count - len(edge)))  # starts again where rows run out
        rows = np.sort(np.concatenate([np.tile(edge, (heads, 1)), middle], axis=1), axis=1)
    keys = np.arange(kv_len)[None, :]
    mask = np.stack([
        np.broadcast_to(one.contains(mine[:, None], keys, seq_len, kv_len), (len(mine), kv_len))
        for one, mine in zip(heads_of(static, heads), rows, strict=True)
    ])  # fmt: skip
    return Sample(rows, mask, pruning)


def errors(o: Any, lse: Any, q: Any, k: Any, v: Any, sample: Sample) -> Errors:
    """Errors of o (batch, heads, seq, dim) and lse (batch, heads, seq; None: not checked) on the sampled rows.

    The reference is computed in float64 on the tensors' device, head by head.
    """
    import torch

    scale, group = 1 / math.sqrt(q.shape[-1]), q.shape[1] // k.shape[1]
    gap = size = 0.0
    lse_error = 0.0
    for head in range(q.shape[1]):
        rows = torch.from_numpy(sample.rows[head]).to(q.device)
        mask = torch.from_numpy(sample.mask[head]).to(q.device)
        keys, values = (x[:, head // group].double() for x in (k, v))
        scores = (q[:, head, rows].double() @ keys.mT * scale).masked_fill(~mask, -math.inf)
        if sample.pruning is not None:
            scores = torch.from_numpy(prune(scores.cpu().numpy(), sample.pruning)).to(q.device)
        wanted_lse = scores.logsumexp(-1)
        weights = (scores - wanted_lse[..., None]).exp()
        weights = weights.masked_fill(scores.isneginf(), 0.0)  # an empty row: nan, then 0
        wanted = weights @ values
        gap += float((o[:, head, rows].double() - wanted).square().sum())
        size += float(wanted.square().sum())
        if lse is not None:
            got = lse[:, head, rows].double()
            both_empty = (got == wanted_lse) & got.isinf()
            away = float((got - wanted_lse).abs().masked_fill(both_empty, 0.0).max())
            lse_error = max(lse_error, away) if not math.isnan(away) else math.nan
    return Errors(math.sqrt(gap) / (math.sqrt(size) or 1.0), lse_error)


def equal_runs(call: Callable[[], tuple[Any, Any]], runs: int) -> int:
    """How many of ``runs`` results (o, lse) are bitwise those of the first."""
    first = [_bits(x) for x in call()]
    same = 1
    for _ in range(runs - 1):
        same += all(bool((_bits(x) == y).all()) for x, y in zip(call(), first, strict=True))
    return same


def _bits(x: Any) -> Any:
    import torch

    return x.contiguous().view({2: torch.int16, 4: torch.int32}[x.element_size()])


def poison(like: Any, device: str) -> None:
    """Leave NaN in the memory that the allocator hands out next for a tensor of that shape."""
    import torch

    if device != "cpu":
        waste = [torch.full_like(like, math.nan) for _ in range(2)]
        torch.cuda.synchronize()
        del waste


def peak_bytes(call: Callable[[], Any], device: str) -> int | None:
    """Device memory that a call takes at its peak beyond the tensors that it returns; None on a CPU."""
    import torch

    if device == "cpu":
        return None
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    returned = call()
    torch.cuda.synchronize()
    kept = torch.cuda.memory_allocated() - before
    peak = torch.cuda.max_memory_allocated() - before
    del returned
    return int(peak - kept)
