"""A pattern for each attention head."""

# ruff: noqa: D102 (member, lines and check are documented once, on Pattern)

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import and_, or_

import numpy as np

from splatc.errors import InvalidInput
from splatc.patterns.base import And, Bool, Int, Or, Pattern, first_lengths


@dataclass(frozen=True, repr=False)
class PerHead(Pattern):
    """Head h uses heads[h]. & | ~ act head by head, with another PerHead or with one pattern for all heads.

    It has no membership of its own: ask `heads_of(pattern, n)` for the patterns of n heads.
    """

    heads: tuple[Pattern, ...]

    def member(self, q: Int, k: Int, q_len: int, kv_len: int) -> Bool:
        raise InvalidInput("a per_head pattern has no single mask: use .heads[h].contains(...)")

    def check(self, q_len: int, kv_len: int) -> None:
        for p in dict.fromkeys(self.heads):
            p.check(q_len, kv_len)

    def own_lengths(self) -> tuple[int, int] | None:
        return first_lengths(self.heads)

    def transposed(self) -> Pattern:
        each = {p: p.transposed() for p in dict.fromkeys(self.heads)}
        return PerHead(tuple(each[p] for p in self.heads))

    def dense(self, q_len: int, kv_len: int | None = None) -> Bool:
        """bool[heads, q_len, kv_len]."""
        return np.stack([p.dense(q_len, kv_len) for p in self.heads])

    def __and__(self, other: object) -> Pattern:
        return self._zip(and_, self, other) if isinstance(other, Pattern) else NotImplemented

    def __or__(self, other: object) -> Pattern:
        return self._zip(or_, self, other) if isinstance(other, Pattern) else NotImplemented

    def __invert__(self) -> Pattern:
        return PerHead(tuple(~p for p in self.heads))

    def _under(self, op: type[And | Or], left: Pattern) -> Pattern:
        return self._zip(and_ if op is And else or_, left, self)

    @staticmethod
    def _zip(op: Callable[[Pattern, Pattern], Pattern], a: Pattern, b: Pattern) -> Pattern:
        n = max(len(p.heads) for p in (a, b) if isinstance(p, PerHead))
        return PerHead(tuple(op(x, y) for x, y in zip(heads_of(a, n), heads_of(b, n), strict=True)))

    def __repr__(self) -> str:
        return f"per_head([{', '.join(map(repr, self.heads))}])"


def per_head(patterns: Sequence[Pattern]) -> PerHead:
    """Head h uses patterns[h]; the number of patterns must equal the number of
    heads.
    """
    if not isinstance(patterns, (list, tuple)) or not patterns:
        raise InvalidInput("per_head: give a non-empty list of patterns, one for each head")
    for h, p in enumerate(patterns):
        if not isinstance(p, Pattern) or isinstance(p, PerHead):
            raise InvalidInput(
                f"per_head: item {h} is a {type(p).__name__}, but it must be the pattern of one head"
            )
    return PerHead(tuple(patterns))


def heads_of(pattern: Pattern, heads: int) -> tuple[Pattern, ...]:
    """The pattern of each of `heads` heads; InvalidInput if a per_head pattern has another number of them."""
    if not isinstance(pattern, PerHead):
        return (pattern,) * heads
    if len(pattern.heads) != heads:
        raise InvalidInput(f"the pattern is for {len(pattern.heads)} heads, but there are {heads}")
    return pattern.heads
