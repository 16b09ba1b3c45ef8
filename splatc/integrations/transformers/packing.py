"""Batch entries that differ, as one packed sequence: one call of the kernel for all of them, over documents.

A call for each would leave most of a GPU idle, and each length would be planned by itself. It takes a pattern that says
what is near or before, not how far a sequence's beginning is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from splatc.integrations.transformers.masks import Part, all_of
from splatc.nn.any_length import AnyLength
from splatc.patterns import Pattern, documents
from splatc.patterns.base import And, Not, Or
from splatc.patterns.library import Causal, Documents, Full, Window


@dataclass(frozen=True)
class Packed:
    """Parts as documents of one sequence. queries, keys: their places, int64, in the batch laid out row after row."""

    over: AnyLength
    queries: torch.Tensor
    keys: torch.Tensor

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        """(batch, q_len, heads, dim) of q, k and v (batch, heads, positions, dim); zeros for queries in no part."""
        batch, heads, q_len, _ = q.shape
        places = (q, self.queries), (k, self.keys), (v, self.keys)
        o = self.over(*(x.transpose(1, 2).flatten(0, 1).index_select(0, at)[None] for x, at in places), **options)
        out = o.new_zeros(batch * q_len, heads, v.shape[3]).index_copy(0, self.queries, o[0])
        return out.view(batch, q_len, heads, -1)  # type: ignore[no-any-return]


@lru_cache(maxsize=16)  # the layers of a model have the same parts; another batch has others, with tables of their own
@torch.inference_mode(False)  # what is remembered serves passes with gradients too
def packed(parts: tuple[Part, ...], q_len: int, kv_len: int, softcap: float | None,
           device: torch.device) -> Packed | None:  # fmt: skip
    """The parts as one, None where their pattern does not allow it."""
    split = [_split(part) for part in parts]
    others = {rest for _, _, rest in split}
    if len(others) > 1 or not _relative(rest := others.pop()):
        return None
    q_lengths, k_lengths, queries, keys = [], [], [], []
    for part, (mine, theirs, _) in zip(parts, split, strict=True):
        if not isinstance(rest, Full) and mine != theirs:  # a diagonal begins where both do
            return None
        for entry in part.entries:
            q_lengths += mine
            k_lengths += theirs
            queries.append(entry * q_len + np.arange(part.q_from, part.q_to))
            keys.append(entry * kv_len + np.arange(part.k_from, part.k_to))
    apart = documents(q_lengths, kv_lengths=None if q_lengths == k_lengths else k_lengths)
    places = (torch.from_numpy(np.concatenate(x)).to(device) for x in (queries, keys))
    return Packed(AnyLength(all_of([apart, rest]), "bshd", softcap, True, None), *places)


def _split(part: Part) -> tuple[list[int], list[int], Pattern]:
    """(lengths of the documents of a part: of queries, of keys; what its pattern says besides)."""
    factors = part.pattern.parts if isinstance(part.pattern, And) else (part.pattern,)
    apart = [one for one in factors if isinstance(one, Documents)]
    rest = [one for one in factors if not isinstance(one, Documents)]
    if len(apart) != 1:
        return [part.q_to - part.q_from], [part.k_to - part.k_from], part.pattern
    lengths = list(apart[0].lengths)
    return lengths, list(apart[0].kv_lengths or lengths), all_of(rest)


def _relative(pattern: Pattern) -> bool:
    """Whether all that counts is how far a key is from a query."""
    match pattern:
        case And() | Or():
            return all(map(_relative, pattern.parts))
        case Not():
            return _relative(pattern.part)
    return isinstance(pattern, Full | Causal | Window)
