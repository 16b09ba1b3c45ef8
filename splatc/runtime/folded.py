"""Masks that differ between batch entries, for kernels that do not tell these apart: all but Hopper's whose gradients
tensor cores compute. All entries' heads become those of one entry, by copies where they do not lie so in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from splatc.errors import InvalidInput
from splatc.ir.terms import LEARNABLE, Terms
from splatc.runtime.attention import CompiledAttention
from splatc.runtime.tensors import to_bhsd


class FoldedAttention(CompiledAttention):
    """A ``CompiledAttention`` for one entry of so many heads, called for several."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._run_one = self.run
        self.run = self._run_folded

    def _run_folded(self, q: Any, k: Any, v: Any, scale: float | None, enable_gqa: bool,
                    terms: Terms | None = None) -> tuple[Any, Any]:  # fmt: skip
        one = self._one_entry(q, k, v)
        o, lse = self._run_one(*one, scale, enable_gqa, self._for_all(terms))
        return self._entries_of(o), lse.reshape(self._plan.entries, -1, lse.shape[-1])

    def backward(self, q: Any, k: Any, v: Any, o: Any, lse: Any, do: Any, dlse: Any, scale: float | None,
                 enable_gqa: bool, terms: Terms | None = None,
                 learning: Sequence[bool] | None = None) -> tuple[Any, Any, Any, list[Any]]:  # fmt: skip
        """As ``CompiledAttention.backward``."""
        q, k, v, o, do = self._one_entry(q, k, v, o, do)
        lse, dlse = (None if x is None else x.reshape(1, -1, x.shape[-1]) for x in (lse, dlse))
        given = q, k, v, o, lse, do, dlse, scale, enable_gqa, self._for_all(terms), learning
        dq, dk, dv, of_terms = super().backward(*given)
        each = [dx.reshape(self._plan.entries, -1, *dx.shape[1:]).sum(0) for dx in of_terms]
        return self._entries_of(dq), self._entries_of(dk), self._entries_of(dv), each

    @property
    def _batch(self) -> int:
        return 1

    def _one_entry(self, *tensors: Any) -> list[Any]:
        """(entries, heads, seq, dim), in the compiled layout, as (1, entries * heads, seq, dim)."""
        batch = self._plan.entries
        for name, x in zip("qkv", tensors, strict=False):
            if x.ndim != 4 or x.shape[0] != batch:
                raise InvalidInput(f"{name} has shape {tuple(x.shape)}, but the pattern is for {batch} batch entries: "
                                   f"the first of its 4 dimensions must be {batch}")  # fmt: skip
        seen = [to_bhsd(x, self.layout) for x in tensors]
        return [to_bhsd(x.reshape(1, -1, *x.shape[2:]), self.layout) for x in seen]

    def _entries_of(self, x: Any) -> Any:
        """The way back, contiguous as all results are."""
        x = to_bhsd(x, self.layout)
        x = to_bhsd(x.reshape(self._plan.entries, -1, *x.shape[2:]), self.layout)
        return np.ascontiguousarray(x) if isinstance(x, np.ndarray) else x.contiguous()

    def _for_all(self, terms: Terms | None) -> Terms | None:
        """Terms of an entry's heads, for those of all."""
        if terms is None:
            return None
        given = {name: x for name in LEARNABLE if (x := getattr(terms, name)) is not None}
        return replace(terms, **{name: _repeated(x, self._plan.entries) for name, x in given.items()})


def _repeated(x: Any, times: int) -> Any:
    """x so many times along its first axis."""
    if isinstance(x, np.ndarray):
        return np.concatenate([x] * times)
    return x.repeat(times, *[1] * (x.ndim - 1))
