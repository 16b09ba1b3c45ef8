"""Some rows and some columns of a pattern, in any order, as a pattern again: what one rank computes.

Positions are runs of one step: 4096, 4097, ... (step 1), or 5, 133, 261, ... (step 128, a residue class). Between a run
of rows and a run of columns a diagonal stays a diagonal and a column a column, so the lines of the whole pattern, if
moved, are those of the part, and no matrix is needed.
"""

# ruff: noqa: D102 (member, lines and check are documented once, on Pattern)

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import gcd

import numpy as np

from splatc.errors import InvalidInput
from splatc.patterns.base import Bool, Int, Lines, Mod, Pattern, first_lengths
from splatc.patterns.heads import PerHead


@dataclass(frozen=True)
class Places:
    """Positions as runs (first position, how many), ``step`` apart inside a run; place i is the i-th of them."""

    step: int
    runs: tuple[tuple[int, int], ...]

    @staticmethod
    def of(positions: Int, step: int) -> Places:
        """Places from positions (int64, not empty) in their order."""
        first = np.flatnonzero(np.diff(positions, prepend=positions[0] - step - 1) != step)
        count = np.diff(first, append=len(positions))
        return Places(step, tuple(zip(positions[first].tolist(), count.tolist(), strict=True)))

    def __len__(self) -> int:
        return sum(count for _, count in self.runs)

    @cached_property
    def table(self) -> Int:
        """int64 (3, runs): first position, first place and number of places of each run."""
        first, count = np.array(self.runs, np.int64).T
        return np.stack([first, np.cumsum(count) - count, count])

    @cached_property
    def positions(self) -> Int:
        return np.concatenate([np.arange(count) * self.step + first for first, count in self.runs])

    def cuts(self, position: Int) -> Int:
        """In each run the place before which `position` would be: int64 (positions, runs), clipped to the run."""
        first, place, count = self.table
        out: Int = place + np.clip(-((first - position[:, None]) // self.step), 0, count)
        return out


@dataclass(frozen=True, repr=False)
class Taken(Pattern):
    """Row i, column j is element (rows[i], cols[j]) of `part`, a pattern at `lengths` (q_len, kv_len). Rows and columns
    have the same step."""

    part: Pattern
    rows: Places
    cols: Places
    lengths: tuple[int, int]

    def member(self, q: Int, k: Int, q_len: int, kv_len: int) -> Bool:
        return self.part.member(self.rows.positions[q], self.cols.positions[k], *self.lengths)

    def lines(self, q_len: int, kv_len: int) -> Lines | None:
        whole = self.part.lines(*self.lengths)
        if whole is None:
            return None
        borders, diags = self.cols.table[1], self._diags(whole.diags)
        col_mod, diff_mod = self._mods(whole)
        return Lines.of(
            q_len,
            kv_len,
            rows=np.concatenate([self.rows.table[1], self.rows.cuts(whole.rows).ravel(), diags[:, 0]]),
            cols=np.concatenate([_everywhere(borders, q_len), self._cols(whole.cols)]),
            diags=diags,
            col_mod=col_mod,
            diff_mod=diff_mod,
        )

    def _cols(self, cols: Int) -> Int:
        """Column lines inside runs, for each run of rows."""
        places = self.cols.cuts(cols[:, 2])
        _, start, count = self.cols.table
        line, run = np.nonzero((places > start) & (places < start + count))
        lo, hi = self.rows.cuts(cols[line, 0]), self.rows.cuts(cols[line, 1])
        at = np.broadcast_to(places[line, run][:, None], lo.shape)
        return np.stack([lo, hi, at], -1).reshape(-1, 3)

    def _diags(self, diags: Int) -> Int:
        """Diagonals between each run of rows and each run of columns, in the rows where they cross both. One that
        passes a single column between two rows has no row of its own; where it begins, rows change all the same."""
        q, q_place, q_count = self.rows.table[:, None, :, None]
        k, k_place, k_count = self.cols.table[:, None, None, :]
        d = -((k - q - diags[:, 2, None, None]) // self.rows.step)  # between columns i + d - 1 and i + d, in runs
        lo = np.maximum(self.rows.cuts(diags[:, 0])[:, :, None], q_place + np.clip(1 - d, 0, q_count))
        hi = np.minimum(self.rows.cuts(diags[:, 1])[:, :, None], q_place + np.clip(k_count - d, 0, q_count))
        return np.stack(np.broadcast_arrays(lo, hi, d + k_place - q_place), -1).reshape(-1, 3)

    def _mods(self, whole: Lines) -> tuple[list[Mod], list[Mod]]:
        """Residues of places. Inside a run of a step that is a multiple of the modulus, all have the same one."""
        k_shift = np.unique(self.cols.table[0] - self.cols.table[1])
        q_shift = np.unique(self.rows.table[0] - self.rows.table[1])
        shifts = np.unique(k_shift[:, None] - q_shift)
        return _moved(whole.col_mod, k_shift, self.rows.step), _moved(whole.diff_mod, shifts, self.rows.step)

    def transposed(self) -> Pattern:
        return Taken(self.part.transposed(), self.cols, self.rows, self.lengths[::-1])

    def own_lengths(self) -> tuple[int, int] | None:
        return len(self.rows), len(self.cols)

    def check(self, q_len: int, kv_len: int) -> None:
        super().check(q_len, kv_len)
        if (q_len, kv_len) != (len(self.rows), len(self.cols)):
            raise InvalidInput(
                f"this part of {self.part} has {len(self.rows)} rows and {len(self.cols)} columns, "
                f"not {q_len} and {kv_len}"
            )
        self.part.check(*self.lengths)

    def __repr__(self) -> str:
        runs = f"step={self.rows.step}, rows={self.rows.runs}, cols={self.cols.runs}"
        return f"taken({self.part!r}, {self.lengths}, {runs})"


def take(pattern: Pattern, rows: Int, cols: Int, lengths: tuple[int, int], step: int = 1) -> Pattern:
    """The rows and columns at these positions (int64, not empty) of a pattern at lengths (q_len, kv_len), the pattern
    itself if that is all of it. step: that most neighbouring positions differ by."""
    if isinstance(pattern, PerHead):
        return pattern.map(lambda one: take(one, rows, cols, lengths, step))
    if first_lengths([pattern]) in (None, lengths) and all(
        np.array_equal(x, np.arange(n)) for x, n in zip((rows, cols), lengths, strict=True)
    ):
        return pattern
    return Taken(pattern, Places.of(rows, step), Places.of(cols, step), lengths)


def _everywhere(at: Int, q_len: int) -> Int:
    return np.stack([np.zeros_like(at), np.full_like(at, q_len), at], 1)


def _moved(mods: tuple[Mod, ...], shifts: Int, step: int) -> list[Mod]:
    """Thresholds of places whose positions are place * step + one of the shifts."""
    out: list[Mod] = []
    for m, thresholds in mods:
        if step == 1:
            at = (np.array(thresholds)[:, None] - shifts) % m
            out.append((m, tuple(np.unique(at).tolist())))
        elif step % m:
            period = m // gcd(m, step)
            out.append((period, tuple(range(period))))
    return out
