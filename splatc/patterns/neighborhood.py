"""Neighbourhood attention on a 1-D, 2-D or 3-D grid laid out row-major along the sequence."""

# ruff: noqa: D102 (member, lines and check are documented once, on Pattern)

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from splatc.errors import InvalidInput
from splatc.patterns.base import Bool, Int, Leaf, Lines, Pattern, Transposed, show, whole


@dataclass(frozen=True, repr=False)
class Neighborhood(Leaf):
    """See `neighborhood`. All fields have one entry per axis of the grid."""

    grid: tuple[int, ...]
    size: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: tuple[bool, ...]

    name: ClassVar[str] = "neighborhood"

    @property
    def _reach(self) -> list[tuple[int, int]]:
        """Per axis (left, right): -left <= offset <= right, in grid positions."""
        return [
            ((s - 1) * d, 0) if c else (s // 2 * d, s // 2 * d)
            for s, d, c in zip(self.size, self.dilation, self.causal, strict=True)
        ]

    def member(self, q: Int, k: Int, q_len: int, kv_len: int) -> Bool:
        out: Bool | None = None
        axes = list(zip(self.grid, self._reach, self.dilation, strict=True))
        for i, (n, (left, right), step) in reversed(list(enumerate(axes))):
            # The slowest axis needs no reduction mod n.
            away = (k % n - q % n) if i else (k - q)
            q, k = q // n, k // n
            near = (away >= -left) & (away <= right)
            if step > 1:
                near &= away % step == 0
            out = near if out is None else out & near
        assert out is not None
        return out

    def lines(self, q_len: int, kv_len: int) -> Lines:
        return self._window_lines(self._reach, q_len, kv_len)

    def transposed(self) -> Pattern:
        return Transposed(self) if any(self.causal) else self

    def transposed_lines(self, q_len: int, kv_len: int) -> Lines:
        return self._window_lines([(right, left) for left, right in self._reach], q_len, kv_len)

    def _window_lines(self, reach: list[tuple[int, int]], q_len: int, kv_len: int) -> Lines:
        # A grid line is a run of the fastest axis. Inside one the mask is a (dilated) window against each
        # grid line in reach, so each pair of lines contributes the visited line's two ends and the window's
        # two diagonals.
        wide, step = self.grid[-1], self.dilation[-1]
        left, right = reach[-1]
        src, dst = self._line_pairs(reach)
        lo, hi, shift = src * wide, (src + 1) * wide, (dst - src) * wide
        cols = [np.stack([lo, hi, dst * wide], 1), np.stack([lo, hi, (dst + 1) * wide], 1)]
        diags = [np.stack([lo, hi, shift - left], 1), np.stack([lo, hi, shift + right + 1], 1)]
        hit = np.unique(shift % step).tolist()
        return Lines.of(
            q_len,
            kv_len,
            rows=np.arange(0, q_len, wide, dtype=np.int64),
            cols=np.concatenate(cols),
            diags=np.concatenate(diags),
            diff_mod=[(step, tuple(hit) + tuple(h + 1 for h in hit))],
        )

    def _line_pairs(self, reach: list[tuple[int, int]]) -> tuple[Int, Int]:
        """Indices of the (query, key) grid lines in reach of one another along all axes but the last."""
        src = dst = np.zeros(1, np.int64)
        axes = list(zip(self.grid, reach, self.dilation, strict=True))[:-1]
        for n, (left, right), step in axes:
            y = np.arange(n, dtype=np.int64)[:, None]
            to = y + np.arange(-left, right + 1, step, dtype=np.int64)[None, :]
            inside = (to >= 0) & (to < n)
            y, to = np.broadcast_to(y, to.shape)[inside], to[inside]
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
        return out + ")"


def neighborhood(grid: Any, size: Any, dilation: Any = 1, causal: Any = False) -> Neighborhood:
    """Neighbourhood attention (NATTEN, arXiv:2204.07143).

    grid: (W,), (H, W) or (D, H, W); position (z, y, x) is (z*H + y)*W + x, and q_len == kv_len == prod(grid).
    size, dilation, causal: one value, or one per axis. Along each axis a query attends to the offsets that
    are multiples of `dilation` from -(size//2)*dilation to (size//2)*dilation (`size` odd), or, on a causal
    axis, from -(size-1)*dilation to 0. The window is cut at the border of the grid; NATTEN instead shifts a
    non-causal window inwards so that it keeps `size` keys, so queries near the border differ from it.
    """
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
    return Neighborhood(axes, sizes, dilations, tuple(bool(c) for c in causals))


def _per_axis(name: str, value: Any, axes: int) -> tuple[Any, ...]:
    if not isinstance(value, (tuple, list)):
        return (value,) * axes
    if len(value) != axes:
        raise InvalidInput(f"neighborhood: {name} is {value!r}, but the grid has {axes} axes")
    return tuple(value)
