"""The irregular remainder of a mask: 64 x 64 blocks of bits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from splatc.formats.strips import Ints, Runs, ramp

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
    def from_runs(runs: Runs) -> BlockBits:
        """From disjoint runs of adjacent columns, in any order."""
        row, block, low, high = split_at_blocks(runs)
        key, where = np.unique((row // BLOCK << 32) + block, return_inverse=True)
        bits = np.zeros((len(key), BLOCK), np.uint64)
        ones = np.uint64(0xFFFFFFFFFFFFFFFF)
        word = (ones >> (BLOCK - (high - low)).astype(np.uint64)) << low.astype(np.uint64)
        np.add.at(bits, (where, row % BLOCK), word)
        return BlockBits(key >> 32, key & 0xFFFFFFFF, bits)

    @staticmethod
    def from_dense(mask: NDArray[np.bool_]) -> BlockBits:
        """From a boolean matrix."""
        rows, cols = (-(-n // BLOCK) for n in mask.shape)
        octets = np.zeros((rows * BLOCK, cols * BLOCK // 8), np.uint8)
        packed = np.packbits(mask, axis=1, bitorder="little")
        octets[: packed.shape[0], : packed.shape[1]] = packed
        words = octets.view(np.uint64).reshape(rows, BLOCK, cols).transpose(0, 2, 1)
        row, col = np.nonzero(words.any(axis=2))
        return BlockBits(row, col, np.ascontiguousarray(words[row, col]))

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
        return unpack(self.bits)

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


def unpack(words: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """uint64 (..., n) to bool (..., n, 64): bit j of a word is column j."""
    octets = np.ascontiguousarray(words)[..., None].view(np.uint8)
    return np.unpackbits(octets, axis=-1, bitorder="little").view(np.bool_)


def split_at_blocks(runs: Runs) -> tuple[Ints, Ints, Ints, Ints]:
    """Runs cut at block borders: (row, block column, first and one past the last column inside the block)."""
    first, last = runs.start // BLOCK, (runs.stop - 1) // BLOCK
    owner, i = ramp(last - first + 1)
    block = first[owner] + i
    low = np.maximum(runs.start[owner] - block * BLOCK, 0)
    high = np.minimum(runs.stop[owner] - block * BLOCK, BLOCK)
    return runs.row[owner], block, low, high
