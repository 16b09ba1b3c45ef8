"""Neighbourhood attention on a 1-D, 2-D or 3-D grid laid out row-major along the sequence, also behind class tokens."""

# ruff: noqa: D102 (member, lines and check are documented once, on Pattern)

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np

from splatc.errors import InvalidInput
from splatc.patterns.base import Bool, Int, Leaf, Lines, Pattern, Transposed, choice, show, whole
from splatc.patterns.heads import PerHead

BORDERS = ("cut", "clamp")
Bounds = tuple[Int, Int]  # of each position of an axis, the first and last of its window, which may lie outside


@dataclass(frozen=True, repr=False)
class Neighborhood(Leaf):
    """See `neighborhood`. All fields but the last have one entry per axis of the grid."""

    grid: tuple[int, ...]
    size: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: tuple[bool, ...]
    border: str = "cut"

    name: ClassVar[str] = "neighborhood"

    @cached_property
    def _bounds(self) -> list[Bounds]:
        """Of each axis, in grid positions."""
        axes = zip(self.grid, self.size, self.dilation, self.causal, strict=True)
        return [_bounds(n, size, step, causal, self.border) for n, size, step, causal in axes]

    def member(self, q: Int, k: Int, q_len: int, kv_len: int) -> Bool:
        out: Bool | None = None
        for n, (first, last), step in reversed(list(zip(self.grid, self._bounds, self.dilation, strict=True))):
            x, y = q % n, k % n
            q, k = q // n, k // n
            near = (y >= first[x]) & (y <= last[x])
            if step > 1:
                near &= (y - x) % step == 0
            out = near if out is None else out & near
        assert out is not None
        return out

    def lines(self, q_len: int, kv_len: int) -> Lines:
        return self._window_lines(self._bounds, q_len, kv_len)

    def transposed(self) -> Pattern:
        return Transposed(self) if any(self.causal) or self.border == "clamp" else self

    def transposed_lines(self, q_len: int, kv_len: int) -> Lines:
        axes = zip(self._bounds, self.dilation, self.causal, strict=True)
        turned = [_turned(bounds, step, self.border == "clamp" and not causal) for bounds, step, causal in axes]
        return self._window_lines(turned, q_len, kv_len)

    def _window_lines(self, bounds: list[Bounds], q_len: int, kv_len: int) -> Lines:
        # A grid line is a run of the fastest axis. Inside one the mask is a (dilated) window against each
        # grid line in reach, so each pair of lines contributes the visited line's two ends and the window's
        # two sides: diagonals where it moves with the query, columns where it is clamped and stands still.
        wide, step = self.grid[-1], self.dilation[-1]
        src, dst = self._line_pairs(bounds)
        lo, shift = src * wide, (dst - src) * wide
        cols, diags = [np.stack([lo, lo + wide, at * wide], 1) for at in (dst, dst + 1)], [np.zeros((0, 3), np.int64)]
        for side in (bounds[-1][0], bounds[-1][1] + 1):
            for begin, end, moves in _runs(side):
                at = side[begin] - begin + shift if moves else side[begin] + dst * wide
                (diags if moves else cols).append(np.stack([lo + begin, lo + end, at], 1))
        hit = np.unique(shift % step).tolist()
        return Lines.of(
            q_len,
            kv_len,
            rows=np.arange(0, q_len, wide, dtype=np.int64),
            cols=np.concatenate(cols),
            diags=np.concatenate(diags),
            diff_mod=[(step, tuple(hit) + tuple(h + 1 for h in hit))],
        )

    def _line_pairs(self, bounds: list[Bounds]) -> tuple[Int, Int]:
        """Indices of the (query, key) grid lines in reach of one another along all axes but the last."""
        src = dst = np.zeros(1, np.int64)
        for n, (first, last), step in list(zip(self.grid, bounds, self.dilation, strict=True))[:-1]:
            to = first[:, None] + np.arange(0, int((last - first).max()) + 1, step, dtype=np.int64)[None, :]
            inside = (to >= 0) & (to < n) & (to <= last[:, None])
            y, to = np.nonzero(inside)[0], to[inside]
            src = (src[:, None] * n + y[None, :]).reshape(-1)
            dst = (dst[:, None] * n + to[None, :]).reshape(-1)
        return src, dst

    def own_lengths(self) -> tuple[int, int] | None:
        return math.prod(self.grid), math.prod(self.grid)

    def check(self, q_len: int, kv_len: int) -> None:
        total = math.prod(self.grid)
        if q_len != total or kv_len != total:
            raise InvalidInput(
                f"neighborhood: the grid {show(self.grid)} has {total} positions, but q_len is {q_len} and"
                f" kv_len is {kv_len}"
            )

    def __repr__(self) -> str:
        size: object = self.size[0] if len(set(self.size)) == 1 else self.size
        out = f"neighborhood({show(self.grid)}, {show(size)}"
        if set(self.dilation) != {1}:
            out += f", dilation={show(self.dilation[0] if len(set(self.dilation)) == 1 else self.dilation)}"
        if any(self.causal):
            out += f", causal={show(True if all(self.causal) else self.causal)}"
        return out + (f", border={show(self.border)})" if self.border != "cut" else ")")


def _bounds(n: int, size: int, step: int, causal: bool, border: str) -> Bounds:
    """Windows along an axis of n positions. Those of a residue class are clamped as those of an axis of its own."""
    x = np.arange(n, dtype=np.int64)
    place, members = x // step, (n - 1 - x % step) // step + 1  # of x in its class, and of the class
    first = place - (size - 1 if causal else size // 2)
    if border == "clamp" and not causal:
        first = np.clip(first, 0, members - size)
    return x % step + step * first, x % step + step * (place if causal else first + size - 1)


def _turned(bounds: Bounds, step: int, clamped: bool) -> Bounds:
    """Of each key, the first and last query that attends to it."""
    first, last = bounds
    x = np.arange(len(first), dtype=np.int64)
    if not clamped:  # a window that moves with its query, seen from the key
        return 2 * x - last, 2 * x - first
    begin, end = x.copy(), x.copy()
    for r in range(step):  # both sides of windows rise with the queries of a class
        mine = x[r::step]
        begin[mine] = r + step * np.searchsorted(last[mine], mine)
        end[mine] = r + step * (np.searchsorted(first[mine], mine, side="right") - 1)
    return begin, end


def _runs(side: Int) -> list[tuple[int, int, bool]]:
    """A side of the windows of a line's queries as runs [begin, end) in which it moves with the query, or stands."""
    change = np.diff(side)
    breaks = (change != 0) & (change != 1)
    breaks[1:] |= change[1:] != change[:-1]
    cuts = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(side)]
    return [(a, b, b - a > 1 and bool(change[a] == 1)) for a, b in pairwise(cuts)]


def neighborhood(grid: Any, size: Any, dilation: Any = 1, causal: Any = False, border: str = "cut") -> Neighborhood:
    """Neighbourhood attention (NATTEN, arXiv:2204.07143).

    grid: (W,), (H, W) or (D, H, W); position (z, y, x) is (z*H + y)*W + x, and q_len == kv_len == prod(grid).
    size, dilation, causal: one value, or one per axis. Along each axis a query attends to the offsets that
    are multiples of `dilation` from -(size//2)*dilation to (size//2)*dilation (`size` odd), or, on a causal
    axis, from -(size-1)*dilation to 0. border: what becomes of a window that sticks out of the grid along an axis
    that is not causal: "cut", it has fewer keys there; "clamp", as in NATTEN, it is moved inwards, by whole steps, and
    keeps `size` keys: the axis must have size * dilation positions at least.
    """
    choice("neighborhood", "border", border, BORDERS)
    axes = tuple(grid) if isinstance(grid, (tuple, list)) else (grid,)
    if not 1 <= len(axes) <= 3:
        raise InvalidInput(f"neighborhood: grid is {grid!r}, but it must have 1 to 3 axes")
    axes = tuple(whole("neighborhood", "grid", n, at_least=1) for n in axes)
    causals = _per_axis("causal", causal, len(axes))
    for c in causals:
        if not isinstance(c, (bool, np.bool_)):
            raise InvalidInput(
                f"neighborhood: causal is {causal!r}, but it must be True or False, or one per axis"
            )
    sizes = tuple(whole("neighborhood", "size", s, at_least=1) for s in _per_axis("size", size, len(axes)))
    for s, c in zip(sizes, causals, strict=True):
        if s % 2 == 0 and not c:
            raise InvalidInput(
                f"neighborhood: size is {size!r}, but it must be odd on an axis that is not causal"
            )
    steps = _per_axis("dilation", dilation, len(axes))
    dilations = tuple(whole("neighborhood", "dilation", d, at_least=1) for d in steps)
    for n, s, d, c in zip(axes, sizes, dilations, causals, strict=True):
        if border == "clamp" and not c and s * d > n:
            raise InvalidInput(
                f"neighborhood: an axis of {n} positions has no room for a clamped window of {s} keys,"
                f" {d} apart: {s * d} positions are needed"
            )
    return Neighborhood(axes, sizes, dilations, tuple(bool(c) for c in causals), border)


def _per_axis(name: str, value: Any, axes: int) -> tuple[Any, ...]:
    if not isinstance(value, (tuple, list)):
        return (value,) * axes
    if len(value) != axes:
        raise InvalidInput(f"neighborhood: {name} is {value!r}, but the grid has {axes} axes")
    return tuple(value)


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
        return pattern.map(lambda one: after(n, one))
    return After(n, pattern) if n else pattern
