"""Views: the sequence axis in mixed radix, so that a strided piece becomes a contiguous one. No data moves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from splatc.formats.strips import Ints

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class View:
    """The axis as (x1, x2, x3): position = sum of x_i * strides_i.

    A position exists where 0 <= x_i < extents_i and it is less than length.

    A tile side is a box of the view: lane i is at x = origin + (i % b1, i // b1 % b2, i // (b1 b2)).
    kind: "contiguous"; "residue" (x1 steps over a residue class, x2 is the residue); "blocks" (x1 inside a block of
    ``strides[1]``, x2 the block; only x1 from ``offset`` on, box[0] wide, counts); "patches" (a 2-D or 3-D grid).
    """

    kind: str
    length: int
    extents: Triple
    strides: Triple
    box: Triple
    offset: int = 0

    @property
    def lanes(self) -> int:
        return self.box[0] * self.box[1] * self.box[2]

    @property
    def step(self) -> int:
        """The modulus of the view (the length of a line of a grid); 1 for the contiguous one."""
        return (
            self.strides[0] if self.kind == "residue" else self.strides[1] if self.kind in ("blocks", "patches") else 1
        )

    @property
    def advance(self) -> Triple:
        """How far a repeated entry moves on from one full tile to the next."""
        return (0, self.box[1], 0) if self.kind == "blocks" else (self.box[0], 0, 0)

    def positions(self, origin: Ints) -> Ints:
        """Positions of every lane of boxes at ``origin`` (n, 3): int64 (n, lanes), -1 where there is none."""
        b1, b2, _ = self.box
        lane = np.arange(self.lanes)
        x = origin[:, None, :] + np.stack([lane % b1, lane // b1 % b2, lane // (b1 * b2)], axis=1)[None]
        position = x @ np.array(self.strides)
        valid = ((x >= 0) & (x < np.array(self.extents))).all(2) & (position < self.length)
        return np.where(valid, position, -1)

    def __str__(self) -> str:
        dims = ", ".join(f"{n}:{s}" for n, s in zip(self.extents, self.strides, strict=True) if n > 1) or "1:1"
        box = "x".join(str(b) for b in self.box if b > 1) or "1"
        at = f" from {self.offset}" if self.offset else ""
        return f"{self.kind}({dims}){at} box {box}"


def contiguous(length: int, lanes: int) -> View:
    """Positions in order."""
    return View("contiguous", length, (length, 1, 1), (1, length, length), (lanes, 1, 1))


def residue(length: int, step: int, lanes: int) -> View:
    """Position step*t + r seen as (t, r); classes shorter than a tile share one."""
    extent = -(-length // step)
    b1 = min(lanes, 1 << (extent - 1).bit_length())
    return View("residue", length, (extent, step, 1), (step, 1, length), (b1, lanes // b1, 1))


def blocks(length: int, size: int, offset: int, width: int, lanes: int) -> View:
    """Positions size*a + offset + j, 0 <= j < width, seen as (offset + j, a); width is rounded up to divide a tile."""
    b1 = next(b for b in range(width, lanes + 1) if lanes % b == 0)
    reach = max(size, offset + b1)  # columns that recur may begin in one block and end in the next
    return View("blocks", length, (reach, -(-length // size), 1), (1, size, length), (b1, lanes // b1, 1), offset)


def patches(length: int, grid: Triple, box: Triple) -> View:
    """Position x + W*y + W*H*z of a grid (W, H, Z) seen as (x, y, z)."""
    width, height, _ = grid
    return View("patches", length, grid, (1, width, width * height), box)
