"""The pattern of queries that come last in their sequence: those of a decode step or a chunk, with keys in a cache."""

# ruff: noqa: D102 (member, lines and check are documented once, on Pattern)

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from splatc.patterns import Pattern
from splatc.patterns.base import Bool, Int, Lines, Mod
from splatc.patterns.heads import PerHead


@dataclass(frozen=True, repr=False)
class Tail(Pattern):
    """The last q_len rows of ``part`` on kv_len x kv_len positions; it needs q_len <= kv_len."""

    part: Pattern

    def member(self, q: Int, k: Int, q_len: int, kv_len: int) -> Bool:
        return self.part.member(q + (kv_len - q_len), k, kv_len, kv_len)

    def lines(self, q_len: int, kv_len: int) -> Lines | None:
        whole, before = self.part.lines(kv_len, kv_len), kv_len - q_len
        if whole is None:
            return None
        cols = whole.cols + np.array([-before, -before, 0])  # row r of the whole is row r - before here
        diags = whole.diags + np.array([-before, -before, before])
        diff_mod = [_turned(mod, before) for mod in whole.diff_mod]
        return Lines.of(q_len, kv_len, rows=whole.rows - before, cols=cols, diags=diags,
                        col_mod=whole.col_mod, diff_mod=diff_mod)  # fmt: skip

    def transposed_lines(self, q_len: int, kv_len: int) -> Lines | None:
        whole, before = self.part.transposed().lines(q_len, q_len), q_len - kv_len
        if whole is None:
            return None
        shift = np.array([0, 0, -before])  # column c of the whole is column c - before here
        mods = [[_turned(mod, -before) for mod in mods] for mods in (whole.col_mod, whole.diff_mod)]
        return Lines.of(q_len, kv_len, rows=whole.rows, cols=whole.cols + shift, diags=whole.diags + shift,
                        col_mod=mods[0], diff_mod=mods[1])  # fmt: skip

    def check(self, q_len: int, kv_len: int) -> None:
        super().check(q_len, kv_len)
        self.part.check(kv_len, kv_len)

    def __repr__(self) -> str:
        return f"tail({self.part})"


def tail(pattern: Pattern) -> Pattern:
    """``Tail``, head by head."""
    return pattern.map(Tail) if isinstance(pattern, PerHead) else Tail(pattern)


def _turned(mod: Mod, before: int) -> Mod:
    m, thresholds = mod
    return m, tuple((t + before) % m for t in thresholds)
