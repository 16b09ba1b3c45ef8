"""A pattern behind some first positions: patches behind class tokens, text behind a prompt."""

# ruff: noqa: D102 (member, lines and check are documented once, on Pattern)

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from splatc.errors import InvalidInput
from splatc.patterns.base import Bool, Int, Lines, Pattern, whole
from splatc.patterns.heads import PerHead


@dataclass(frozen=True, repr=False)
class After(Pattern):
    """See `after`."""

    first: int
    part: Pattern

    def member(self, q: Int, k: Int, q_len: int, kv_len: int) -> Bool:
        n = self.first
        there = (q >= n) & (k >= n)
        if min(q_len, kv_len) <= n:
            return there
        return there & self.part.member(np.maximum(q - n, 0), np.maximum(k - n, 0), q_len - n, kv_len - n)

    def lines(self, q_len: int, kv_len: int) -> Lines | None:
        n = self.first
        if min(q_len, kv_len) <= n:
            return Lines.of(q_len, kv_len)
        inner = self.part.lines(q_len - n, kv_len - n)
        if inner is None:
            return None
        cols = np.concatenate([inner.cols + n, np.array([[n, q_len, n]], np.int64)])
        diags = inner.diags + np.array([n, n, 0])
        col_mod = [(m, tuple((t + n) % m for t in thresholds)) for m, thresholds in inner.col_mod]
        return Lines.of(q_len, kv_len, rows=np.concatenate([inner.rows + n, [n]]), cols=cols, diags=diags,
                        col_mod=col_mod, diff_mod=inner.diff_mod)  # fmt: skip

    def transposed(self) -> Pattern:
        return After(self.first, self.part.transposed())

    def own_lengths(self) -> tuple[int, int] | None:
        lengths = self.part.own_lengths()
        return None if lengths is None else (lengths[0] + self.first, lengths[1] + self.first)

    def check(self, q_len: int, kv_len: int) -> None:
        super().check(q_len, kv_len)
        if min(q_len, kv_len) > self.first:
            self.part.check(q_len - self.first, kv_len - self.first)

    def __repr__(self) -> str:
        return f"after({self.first}, {self.part!r})"


def after(first: int, pattern: Pattern) -> Pattern:
    """``pattern`` among the positions behind the ``first`` ones, which attend to nothing and nothing attends to.

    With class tokens that see all and are seen by all: after(1, neighborhood((14, 14), 7)) | global_rows(1) |
    global_cols(1).
    """
    n = whole("after", "first", first, at_least=0)
    if not isinstance(pattern, Pattern):
        raise InvalidInput(f"after: expected a pattern, not a {type(pattern).__name__}")
    if isinstance(pattern, PerHead):
        return PerHead(tuple(after(n, one) for one in pattern.heads))
    return After(n, pattern) if n else pattern
