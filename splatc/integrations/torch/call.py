"""A pattern in place of all keys, with the padding and flags that calls of PyTorch's attention bring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from splatc.errors import InvalidInput, Unsupported
from splatc.nn.functional import sparse_attention
from splatc.patterns import Pattern, causal
from splatc.patterns.taken import take

Real = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True)
class Ways:
    """A pattern as it is, and without later keys, for calls that are causal: made ahead, as compilers cannot."""

    plain: Pattern
    causal: Pattern

    @staticmethod
    def of(pattern: Pattern) -> Ways:
        """The two ways of a pattern."""
        return Ways(pattern, pattern & causal())


def attend(pattern: Pattern, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, real: Real | None = None,
           layout: str = "bhsd", **options: Any) -> torch.Tensor:  # fmt: skip
    """``sparse_attention`` of 4-D tensors in ``layout`` to the keys that are real: bool (batch or 1, kv_len), None for
    all.

    Keys keep their positions in the pattern, whatever is left out between them. Entries with the same keys are one
    call, with a copy of their k and v. A query that is left with nothing gives 0.
    options: as of ``sparse_attention``.
    """
    if real is None or real.all():
        return sparse_attention(q, k, v, pattern, layout=layout, **options)  # type: ignore[no-any-return]
    entries: dict[bytes, list[int]] = {}
    for i in range(q.shape[0]):
        entries.setdefault(real[i % len(real)].tobytes(), []).append(i)
    axis = 2 if layout == "bhsd" else 1
    q_len, kv_len = q.shape[axis], k.shape[axis]
    out = v.new_zeros(*q.shape[:3], v.shape[3])
    for group in entries.values():
        keys = np.flatnonzero(real[group[0] % len(real)])
        if not len(keys):
            continue
        part = take(pattern, np.arange(q_len), keys, (q_len, kv_len))
        at, chosen = (torch.from_numpy(np.asarray(x)).to(q.device) for x in (group, keys))
        k_part, v_part = (x[at].index_select(axis, chosen) for x in (k, v))
        out = out.index_copy(0, at, sparse_attention(q[at], k_part, v_part, part, layout=layout, **options))
    return out


def real_keys(name: str, mask: torch.Tensor, kept: bool) -> Real:
    """bool of the shape of a mask of keys: which are real. kept: what True says in a boolean mask; a mask of numbers is
    added to scores, so that it is 0 there and elsewhere -inf, or the least number of its type."""
    if mask.dtype == torch.bool:
        return (mask if kept else ~mask).cpu().numpy()
    if not mask.is_floating_point():
        raise InvalidInput(f"{name} has dtype {mask.dtype}: give bool, {kept} for keys that count, or numbers that are "
                           "added to the scores")  # fmt: skip
    real = (mask == 0).cpu().numpy()
    if not bool((mask[mask != 0] <= torch.finfo(mask.dtype).min).all()):
        raise Unsupported(f"{name} is added to the scores, and has numbers other than 0 and -inf (or the least of its "
                          "type): a pattern only says which keys count")  # fmt: skip
    return real


def refuse(where: str, given: Sequence[tuple[str, bool, str]]) -> None:
    """Raise Unsupported for the first of (what, whether it is there, what to do) that is there."""
    for what, there, advice in given:
        if there:
            raise Unsupported(f"{where}: {what}: {advice}")
