"""Views: the sequence axis in mixed radix, so that a strided piece becomes a contiguous one. No data moves.

What a view shows is a box of integers, or two of them: the extents of a tensor map. Every position inside them exists,
so a load that is zero-filled outside the extents, and a store that is clipped there, needs no other check.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from splatc.formats.strips import Ints

Triple = tuple[int, int, int]
PART = 64  # query rows of a tensor-core part of a tile: row boxes can be cut into parts of as many lanes


@dataclass(frozen=True)
class View:
    """The axis as (x1, x2, x3): position = sum of x_i * strides_i.

    A tile side is a box of the view: lane i is at x = origin + (i % b1, i // b1 % b2, i // (b1 b2)).
    kind: "contiguous"; "residue" (x1 steps over a residue class, x2 is the residue); "blocks" (x1 inside a block of
    ``strides[1]``, x2 the block; only x1 from ``offset`` on counts); "patches" (a 2-D or 3-D grid).
    ``shown`` has the extents within which positions exist.
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

    @property
    def seam(self) -> int:
        """Residues from here on have one position fewer; tiles of several residues do not reach across. 0: no seam."""
        return self.length % self.step if self.kind == "residue" else 0

    @property
    def shown(self) -> tuple[Triple, ...]:
        """The extents in which positions exist, of one table view or, where there is a seam, of two."""
        if self.kind != "residue":
            return (self.extents,)
        whole, seam = self.length // self.step, self.seam
        longer, others = (whole + 1, seam, 1), (whole, self.step, 1)
        return (others,) if not seam else (longer, others) if whole else (longer,)

    def part(self, origin: Ints) -> Ints:
        """Which of ``shown`` the tiles at ``origin`` (n, 3) lie in: int64 (n,)."""
        if len(self.shown) == 1:
            return np.zeros(len(origin), np.int64)
        return np.asarray((origin[:, 1] >= self.seam).astype(np.int64))

    def positions(self, origin: Ints) -> Ints:
        """Positions of every lane of boxes at ``origin`` (n, 3): int64 (n, lanes), -1 where there is none."""
        b1, b2, b3 = self.box
        lane = np.arange(self.lanes)
        offset = (lane % b1, lane // b1 % b2, lane // (b1 * b2))
        extents = np.array(self.shown)[self.part(origin)]
        position = np.zeros((len(origin), self.lanes), np.int64)
        valid: NDArray[np.bool_] = np.ones((len(origin), 1), bool)
        for d, side in enumerate((b1, b2, b3)):
            x = origin[:, d, None] + (offset[d][None] if side > 1 else 0)
            valid = valid & (x >= 0) & (x < extents[:, d, None])
            position += x * self.strides[d]
        return np.where(valid, position, -1)

    def sub_box(self, parts: int) -> tuple[Triple, Triple]:
        """(box, step) of ``parts`` equal parts of a tile, in the order of its lanes: part i lies i * step further."""
        d = max((d for d in range(3) if self.box[d] > 1), default=0)
        if self.box[d] % parts:
            raise ValueError(f"a tile of {self} has no {parts} equal parts: {self.box[d]} does not divide")
        box, step = list(self.box), [0, 0, 0]
        box[d] = step[d] = self.box[d] // parts
        return (box[0], box[1], box[2]), (step[0], step[1], step[2])

    def __str__(self) -> str:
        dims = ", ".join(f"{n}:{s}" for n, s in zip(self.extents, self.strides, strict=True) if n > 1) or "1:1"
        box = "x".join(str(b) for b in self.box if b > 1) or "1"
        at = f" from {self.offset}" if self.offset else ""
        return f"{self.kind}({dims}){at} box {box}"


def contiguous(length: int, lanes: int) -> View:
    """Positions in order."""
    return View("contiguous", length, (length, 1, 1), (1, length, length), (lanes, 1, 1))


def residue(length: int, step: int, lanes: int) -> View:
    """Position step*t + r seen as (t, r); short classes share a tile, as far as a tile still has parts.

    The side of a box is that which makes the fewest pairs of tiles of one class.
    """
    whole, seam = divmod(length, step)

    def pairs(b1: int) -> int:
        along = ((whole + 1, seam), (whole, step - seam))
        return sum((-(-n // b1)) ** 2 * -(-lines // (lanes // b1)) for n, lines in along)

    sides = [b for b in range(lanes, 0, -1) if b == lanes or (lanes % b == 0 and PART % b == 0)]
    b1 = min(sides, key=pairs)
    return View("residue", length, (-(-length // step), step, 1), (step, 1, length), (b1, lanes // b1, 1))


def blocks(length: int, size: int, offset: int, width: int, lanes: int, parts: int = 1) -> View:
    """Positions size*a + offset + j, 0 <= j < width, seen as (offset + j, a), of blocks that hold all of them.

    The side of a box is the width rounded up to divide a tile, or its ``parts``; lanes beyond the width lie outside the
    extents.
    """
    b1 = next(b for b in range(width, lanes + 1) if lanes // parts % b == 0)
    number = max((length - offset - width) // size + 1, 0)
    return View("blocks", length, (offset + width, number, 1), (1, size, length), (b1, lanes // b1, 1), offset)


def patches(length: int, grid: Triple, box: Triple) -> View:
    """Position x + W*y + W*H*z of a grid (W, H, Z) of ``length`` positions seen as (x, y, z)."""
    width, height, _ = grid
    return View("patches", length, grid, (1, width, width * height), box)
