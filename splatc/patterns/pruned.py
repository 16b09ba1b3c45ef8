"""Dynamic patterns: of the keys that a static pattern attends to, those that a query's own scores keep."""

# ruff: noqa: D102 (member, lines and check are documented once, on Pattern)

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

from splatc.errors import InvalidInput, Unsupported
from splatc.patterns.base import And, Bool, Int, Or, Pattern, whole
from splatc.patterns.heads import PerHead
from splatc.patterns.library import Full


@dataclass(frozen=True)
class Pruning:
    """Of every ``m`` consecutive keys the ``n`` with the largest scores stay (N:M; DFSS, arXiv 2203.00091).

    Scores are signed, after the scale and every step of the Score, before the softmax. Group g has the keys
    m g ... m g + m - 1, so the last one may be short. Only keys of the mask compete; a group with at most n of them
    keeps all. Of equal scores the lower key stays. NaN counts as the largest score, so that it is seen in the result; a
    score of -inf counts as a key that is not in the mask.
    """

    n: int
    m: int

    def __str__(self) -> str:
        return f"nm({self.n}, {self.m})"


TWO_OF_FOUR, ONE_OF_TWO = RATIOS = Pruning(2, 4), Pruning(1, 2)  # what sparse tensor cores take


@dataclass(frozen=True, repr=False)
class Pruned(Pattern):
    """The keys of ``static``, pruned by scores. No boolean function of (q, k), so only & with static patterns makes
    sense: it prunes last, among the keys that all of them keep."""

    static: Pattern
    pruning: Pruning

    def member(self, q: Int, k: Int, q_len: int, kv_len: int) -> Bool:
        raise InvalidInput(f"{self} keeps keys by their scores, so it is no mask: ask its static part (pattern.static)")

    def check(self, q_len: int, kv_len: int) -> None:
        self.static.check(q_len, kv_len)

    def own_lengths(self) -> tuple[int, int] | None:
        return self.static.own_lengths()

    def transposed(self) -> Pattern:
        self._refuse("transposed")

    def __and__(self, other: object) -> Pattern:
        if isinstance(other, PerHead):
            return other._under(And, self)
        if not isinstance(other, Pruned):
            return Pruned(_both(self.static, other), self.pruning) if isinstance(other, Pattern) else NotImplemented
        if other.pruning != self.pruning:
            raise InvalidInput(f"{self.pruning} & {other.pruning}: a pattern is pruned once, so give one of them")
        return Pruned(_both(self.static, other.static), self.pruning)

    def __or__(self, other: object) -> Pattern:
        self._refuse("part of |")

    def __invert__(self) -> Pattern:
        self._refuse("negated")

    def _under(self, op: type[And | Or], left: Pattern) -> Pattern:
        if op is not And:
            self._refuse("part of |")
        return Pruned(_both(left, self.static), self.pruning)

    def _refuse(self, what: str) -> NoReturn:
        raise InvalidInput(f"{self} cannot be {what}: which keys it keeps depends on scores, not on positions; "
                           "combine static patterns first, then & nm(...)")  # fmt: skip

    def __repr__(self) -> str:
        if self.static == Full():
            return str(self.pruning)
        return f"({self.static}) & {self.pruning}" if isinstance(self.static, Or) else f"{self.static} & {self.pruning}"


def _both(a: Pattern, b: Pattern) -> Pattern:
    """a & b, without a full() that says nothing."""
    return b if a == Full() else a if b == Full() else a & b


def nm(n: int, m: int) -> Pruned:
    """Of every m consecutive keys the n with the largest scores, n:m being 2:4 or 1:2; ``Pruning`` has the rules."""
    pruning = Pruning(whole("nm", "n", n, at_least=1), whole("nm", "m", m, at_least=2))
    if pruning not in RATIOS:
        raise InvalidInput(f"{pruning}: it must be {' or '.join(map(str, RATIOS))}, as sparse tensor cores have it")
    return Pruned(Full(), pruning)


def split(pattern: Pattern) -> tuple[Pattern, Pruning | None]:
    """(the static part, how it is pruned: None if it is not), of all heads.

    Raises Unsupported for heads that are pruned in different ways.
    """
    if isinstance(pattern, Pruned):
        return pattern.static, pattern.pruning
    if not isinstance(pattern, PerHead) or not any(isinstance(head, Pruned) for head in pattern.heads):
        return pattern, None
    parts = [split(head) for head in pattern.heads]
    ways = dict.fromkeys(pruning for _, pruning in parts)
    if len(ways) > 1:
        names = ", ".join("none" if way is None else str(way) for way in ways)
        raise Unsupported(f"heads are pruned in different ways ({names}): one kernel prunes all heads alike; give all "
                          "the same nm(...), or call attention once for each group of heads")  # fmt: skip
    return pattern.map(lambda head: split(head)[0]), parts[0][1]


def joined(static: Pattern, pruning: Pruning | None) -> Pattern:
    """The pattern of these two parts: what ``split`` takes apart."""
    return static if pruning is None else static & Pruned(Full(), pruning)
