"""The softmax of SPION's public code, in which what a pattern prunes has the score 0 instead of none."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from splatc.formats.acsr import ACSR
from splatc.patterns import Pattern, PerHead, heads_of


def prune_to_zero(o: torch.Tensor, lse: torch.Tensor, pruned: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, lse) of attention as if ``pruned`` more keys a row had the score 0 and values of zeros: the denominator of
    the softmax has another pruned * exp(0).

    o (batch, heads, q_len, dim) and lse (batch, heads, q_len) are those of the kept entries; pruned: how many entries a
    row has lost, (q_len,), (heads, q_len) or (batch, 1 or heads, q_len). Differentiable in o and lse. o shrinks by
    exp(lse) / (exp(lse) + pruned), in the form of a sigmoid, which no score overflows. Rows without anything to attend
    to stay 0.
    """
    some = pruned > 0
    others = torch.log(torch.where(some, pruned, 1).to(lse.dtype))  # the LSE of the pruned entries
    share = torch.where(some, torch.sigmoid(lse - others), 1.0)
    return o * share[..., None].to(o.dtype), torch.where(some, torch.logaddexp(lse, others), lse)


def pruned_counts(base: Pattern, kept: Pattern, q_len: int, kv_len: int, heads: int) -> NDArray[np.int64]:
    """How many entries of each row of ``base`` are not in ``kept``, a part of it: int64 (q_len,), or (heads, q_len) if
    heads differ."""
    if isinstance(base, PerHead) or isinstance(kept, PerHead):
        pairs = zip(heads_of(base, heads), heads_of(kept, heads), strict=True)
        return np.stack([pruned_counts(a, b, q_len, kv_len, 1) for a, b in pairs])
    before, after = (ACSR.from_pattern(one, q_len, kv_len).row_counts() for one in (base, kept))
    return np.asarray(before - after)
