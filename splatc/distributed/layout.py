"""Which positions of a sequence each rank holds."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from splatc.errors import InvalidInput
from splatc.formats.strips import Ints


@dataclass(frozen=True)
class Layout:
    """Contiguous shares, zig-zag ones (two chunks a rank: the r-th and the r-th from the end) or residue classes of
    ``modulus``, one class after the other."""

    modulus: int = 1
    zigzag: bool = False

    def positions(self, seq_len: int, ranks: int) -> list[Ints]:
        """The positions of each rank, int64, in the order in which it holds them."""
        if self.modulus > 1:
            ends = [self.modulus * r // ranks for r in range(ranks + 1)]
            everything = self.ordered(np.arange(seq_len))
            first = np.searchsorted(everything % self.modulus, ends)
            return [everything[lo:hi] for lo, hi in pairwise(first)]
        everything = np.arange(seq_len)
        if not self.zigzag:
            return _slices(everything, ranks)
        chunks = _slices(everything, 2 * ranks)
        return [np.concatenate([chunks[r], chunks[-1 - r]]) for r in range(ranks)]

    def ordered(self, positions: Ints) -> Ints:
        """Positions in the order in which a rank reads keys: class by class, ascending."""
        return positions[np.lexsort((positions, positions % self.modulus))]

    def __str__(self) -> str:
        return f"residues({self.modulus})" if self.modulus > 1 else "zigzag" if self.zigzag else "contiguous"


CONTIGUOUS = Layout()
ZIGZAG = Layout(zigzag=True)


def residues(modulus: int) -> Layout:
    """Rank r of n holds the positions whose residue is in the r-th of n equal shares of 0 .. modulus - 1."""
    if modulus < 2:
        raise InvalidInput(f"residues: the modulus is {modulus}, but it must be at least 2")
    return Layout(modulus)


def _slices(positions: Ints, parts: int) -> list[Ints]:
    ends = [len(positions) * r // parts for r in range(parts + 1)]
    return [positions[lo:hi] for lo, hi in pairwise(ends)]
