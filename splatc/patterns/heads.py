"""A pattern for each attention head, and for each batch entry."""

# ruff: noqa: D102 (member, lines and check are documented once, on Pattern)

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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

    def map(self, change: Callable[[Pattern], Pattern]) -> Pattern:
        """The same with every pattern changed."""
        each = {p: change(p) for p in dict.fromkeys(self.heads)}
        return replace(self, heads=tuple(each[p] for p in self.heads))

    def transposed(self) -> Pattern:
        return self.map(lambda p: p.transposed())

    def dense(self, q_len: int, kv_len: int | None = None) -> Bool:
        """bool[heads, q_len, kv_len]."""
        return np.stack([p.dense(q_len, kv_len) for p in self.heads])

    def __and__(self, other: object) -> Pattern:
        return self._zip(and_, self, other) if isinstance(other, Pattern) else NotImplemented

    def __or__(self, other: object) -> Pattern:
        return self._zip(or_, self, other) if isinstance(other, Pattern) else NotImplemented

    def __invert__(self) -> Pattern:
        return self.map(lambda p: ~p)

    def _under(self, op: type[And | Or], left: Pattern) -> Pattern:
        return self._zip(and_ if op is And else or_, left, self)

    @staticmethod
    def _zip(op: Callable[[Pattern, Pattern], Pattern], a: Pattern, b: Pattern) -> Pattern:
        sides = [p for p in (a, b) if isinstance(p, PerHead)]
        n, batch = max(p.per_entry for p in sides), max(isinstance(p, PerBatch) and p.batch for p in sides)
        each = tuple(op(x, y) for x, y in zip(patterns_of(a, n, batch), patterns_of(b, n, batch), strict=True))
        return PerBatch(each, batch) if batch else PerHead(each)

    @property
    def per_entry(self) -> int:
        """The heads of a batch entry that have patterns."""
        return len(self.heads)

    def __repr__(self) -> str:
        return f"per_head([{', '.join(map(repr, self.heads))}])"


@dataclass(frozen=True, repr=False)
class PerBatch(PerHead):
    """Batch entry b uses its own patterns: those of its heads, or one for all of them, follow those of entry b - 1 in
    ``heads``. Otherwise as ``PerHead``."""

    batch: int = 1

    def member(self, q: Int, k: Int, q_len: int, kv_len: int) -> Bool:
        raise InvalidInput("a per_batch pattern has no single mask: use .entry(b)")

    @property
    def per_entry(self) -> int:
        return len(self.heads) // self.batch

    def entry(self, b: int) -> Pattern:
        """The pattern of a batch entry."""
        n = self.per_entry
        mine = self.heads[b * n : (b + 1) * n]
        return mine[0] if n == 1 else PerHead(mine)

    def dense(self, q_len: int, kv_len: int | None = None) -> Bool:
        """bool[batch, heads, q_len, kv_len], or bool[batch, 1, q_len, kv_len]."""
        each = super().dense(q_len, kv_len)
        return each.reshape(self.batch, self.per_entry, *each.shape[1:])

    def __repr__(self) -> str:
        return f"per_batch([{', '.join(repr(self.entry(b)) for b in range(self.batch))}])"


def per_batch(patterns: Sequence[Pattern]) -> PerBatch:
    """Batch entry b uses patterns[b], a per_head pattern or one for all heads; the number of patterns must equal the
    number of batch entries.
    """
    if not isinstance(patterns, (list, tuple)) or not patterns:
        raise InvalidInput("per_batch: give a non-empty list of patterns, one for each batch entry")
    for b, p in enumerate(patterns):
        if not isinstance(p, Pattern) or isinstance(p, PerBatch):
            raise InvalidInput(f"per_batch: item {b} is a {type(p).__name__}, but it must be the pattern of one batch "
                               "entry")  # fmt: skip
    n = max(p.per_entry if isinstance(p, PerHead) else 1 for p in patterns)
    return PerBatch(tuple(head for p in patterns for head in heads_of(p, n)), len(patterns))


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
    if isinstance(pattern, PerBatch):
        raise InvalidInput(f"the pattern is for {pattern.batch} batch entries: ask for one of them, .entry(b)")
    if len(pattern.heads) != heads:
        raise InvalidInput(f"the pattern is for {len(pattern.heads)} heads, but there are {heads}")
    return pattern.heads


def patterns_of(pattern: Pattern, heads: int, batch: int = 0) -> tuple[Pattern, ...]:
    """The pattern of each of ``heads`` heads, of every one of ``batch`` entries if these are told apart; InvalidInput
    if there is another number of either."""
    if not isinstance(pattern, PerBatch):
        return heads_of(pattern, heads) * max(batch, 1)
    if pattern.batch != batch:
        raise InvalidInput(f"the pattern is for {pattern.batch} batch entries, but there are {batch}")
    return tuple(head for b in range(batch) for head in heads_of(pattern.entry(b), heads))
