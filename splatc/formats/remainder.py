"""The irregular remainder of a mask: 64 x 64 blocks of bits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from splatc.formats.strips import Ints, Runs

BLOCK = 64


@dataclass(frozen=True, eq=False)
class BlockBits:
    """Block-sparse bits.

    rows, cols: int64 (n,) block coordinates, sorted by (row, col); bits: uint64 (n, 64), bit j of bits[b, i] is element
    (64*rows[b] + i, 64*cols[b] + j).
    """

    rows: Ints
    cols: Ints
    bits: NDArray[np.uint64]

    @staticmethod
    def none() -> BlockBits:
        return BlockBits(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, BLOCK), np.uint64))

    @staticmethod
    def from_elements(q: Ints, k: Ints) -> BlockBits:
        """From element coordinates, each at most once (int64 arrays of one length)."""
        if not len(q):
            return BlockBits.none()
        width = int(k.max()) // BLOCK + 1
        key = q // BLOCK * width + k // BLOCK
        blocks, where = np.unique(key, return_inverse=True)
        dense = np.zeros((len(blocks), BLOCK, BLOCK), bool)
        dense[where, q % BLOCK, k % BLOCK] = True
        return BlockBits(blocks // width, blocks % width, pack_rows(dense))

    @cached_property
    def nnz(self) -> int:
        """Elements that are set."""
        return int(np.unpackbits(self.bits.view(np.uint8)).sum())

    @property
    def nbytes(self) -> int:
        return int(self.bits.nbytes + self.rows.nbytes + self.cols.nbytes)

    def elements(self) -> tuple[Ints, Ints]:
        """(q, k) of every set element, by blocks."""
        block, i, j = np.nonzero(self.dense_blocks())
        return self.rows[block] * BLOCK + i, self.cols[block] * BLOCK + j

    def dense_blocks(self) -> NDArray[np.bool_]:
        """bool (n, 64, 64)."""
        octets = self.bits.view(np.uint8).reshape(-1, BLOCK, 8)
        return np.unpackbits(octets, axis=2, bitorder="little").astype(bool)

    def runs(self) -> Runs:
        """Runs of adjacent set elements inside each block row, sorted by row and column."""
        dense = np.zeros((len(self.rows), BLOCK, BLOCK + 2), np.int8)
        dense[:, :, 1:-1] = self.dense_blocks()
        step = np.diff(dense, axis=2)
        block, i, start = np.nonzero(step == 1)
        stop = np.nonzero(step == -1)[2]
        row, base = self.rows[block] * BLOCK + i, self.cols[block] * BLOCK
        order = np.lexsort((base + start, row))
        return Runs(row[order], (base + start)[order], (base + stop)[order])


def pack_rows(blocks: NDArray[np.bool_]) -> NDArray[np.uint64]:
    """bool (n, 64, 64) to uint64 (n, 64), bit j of a word is column j."""
    packed: NDArray[np.uint64] = np.packbits(blocks, axis=2, bitorder="little").view(np.uint64)[:, :, 0]
    return packed
