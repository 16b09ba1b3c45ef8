"""Patterns that are data: a dense boolean matrix, held as packed bits, and a sparse one, held as CSR."""

# ruff: noqa: D102 (member, lines and check are documented once, on Pattern)

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from splatc.errors import InvalidInput
from splatc.patterns.base import MAX_DENSE, Bool, Int, Leaf, Pattern
from splatc.patterns.blocks import as_bool

_ROWS_BYTES = 2**24  # rows unpacked at a time


@dataclass(frozen=True, repr=False)
class _Data(Leaf):
    """A leaf that holds a q_len x kv_len mask. Two are equal if their contents are (by SHA-256)."""

    shape: tuple[int, int]
    digest: str

    def own_lengths(self) -> tuple[int, int] | None:
        return self.shape

    def check(self, q_len: int, kv_len: int) -> None:
        super().check(q_len, kv_len)
        if (q_len, kv_len) != self.shape:
            raise InvalidInput(
                f"{self.name}: the matrix is {self.shape[0]} x {self.shape[1]}, but q_len is {q_len} and"
                f" kv_len is {kv_len}"
            )

    def __repr__(self) -> str:
        return f"{self.name}(<{self.shape[0]} x {self.shape[1]}, sha256 {self.digest[:16]}>)"


@dataclass(frozen=True, repr=False)
class Matrix(_Data):
    """A dense boolean mask; see `mask`. `data` holds each row's bits packed eight to a byte, first bit
    highest.
    """

    data: bytes = field(compare=False)

    name: ClassVar[str] = "mask"

    @cached_property
    def packed(self) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        """uint8[q_len, ceil(kv_len / 8)], as numpy.packbits(mask, axis=1)."""
        return np.frombuffer(self.data, np.uint8).reshape(self.shape[0], -1)

    def rows(self, lo: int, hi: int) -> Bool:
        """bool[hi - lo, kv_len]: the rows lo .. hi-1 of the mask."""
        return np.unpackbits(self.packed[lo:hi], axis=1, count=self.shape[1]).view(np.bool_)

    def member(self, q: Int, k: Int, q_len: int, kv_len: int) -> Bool:
        out: Bool = (self.packed[q, k >> 3] >> (7 - (k & 7)).astype(np.uint8)) & np.uint8(1) != 0
        return out

    def dense(self, q_len: int, kv_len: int | None = None) -> Bool:
        self.check(q_len, q_len if kv_len is None else kv_len)
        return self.rows(0, q_len)

    def transposed(self) -> Pattern:
        rows, cols = self.shape
        step = max(8, _ROWS_BYTES // rows // 8 * 8)  # whole bytes of columns
        octets = (self.packed[:, lo // 8 : (lo + step) // 8] for lo in range(0, cols, step))
        columns = (np.unpackbits(x, axis=1).view(np.bool_) for x in octets)
        chunks = (x.T[: cols - lo] for lo, x in zip(range(0, cols, step), columns, strict=True))
        return mask_from_rows(chunks, rows)


@dataclass(frozen=True, repr=False)
class Sparse(_Data):
    """A sparse mask in CSR form; `columns` of row r are indices[indptr[r]:indptr[r+1]], ascending and
    distinct.
    """

    indptr: bytes = field(compare=False)
    columns: bytes = field(compare=False)

    name: ClassVar[str] = "sparse"

    @cached_property
    def csr(self) -> tuple[Int, Int]:
        """int64 (indptr[q_len + 1], column indices[nnz])."""
        return np.frombuffer(self.indptr, np.int64), np.frombuffer(self.columns, np.int32).astype(np.int64)

    @cached_property
    def _keys(self) -> Int:
        indptr, columns = self.csr
        rows = np.repeat(np.arange(self.shape[0]), np.diff(indptr))
        return rows * self.shape[1] + columns

    def member(self, q: Int, k: Int, q_len: int, kv_len: int) -> Bool:
        key = q * self.shape[1] + k
        if len(self._keys) == 0:
            return np.zeros(key.shape, np.bool_)
        at = np.minimum(np.searchsorted(self._keys, key), len(self._keys) - 1)
        out: Bool = self._keys[at] == key
        return out

    def dense(self, q_len: int, kv_len: int | None = None) -> Bool:
        kv_len = q_len if kv_len is None else kv_len
        self.check(q_len, kv_len)
        refuse_large(q_len, kv_len)
        out = np.zeros((q_len, kv_len), np.bool_)
        out.reshape(-1)[self._keys] = True
        return out

    def transposed(self) -> Pattern:
        indptr, columns = self.csr
        rows, cols = self.shape
        return sparse_from_pairs(columns, np.repeat(np.arange(rows), np.diff(indptr)), cols, rows)


def mask(array: Any) -> Matrix:
    """The mask itself, bool[q_len, kv_len] (NumPy, torch or nested lists), True = attend.

    It has no text form beyond its shape and digest. Up to 2**32 elements, held as bits; `splatc.patterns`
    functions describe longer masks without a matrix.
    """
    if np.ndim(array) == 2 and hasattr(array, "shape"):
        refuse_large(*array.shape)
    out = as_bool("mask", "array", array)
    if out.ndim != 2 or out.size == 0:
        raise InvalidInput(
            f"mask: the array has shape {out.shape}, but it must be a non-empty (q_len, kv_len)"
        )
    step = max(1, _ROWS_BYTES // out.shape[1])
    return mask_from_rows((out[lo : lo + step] for lo in range(0, out.shape[0], step)), out.shape[1])


def mask_from_rows(chunks: Iterable[Bool], kv_len: int) -> Matrix:
    """A Matrix from consecutive chunks bool[n, kv_len] of its rows."""
    packed = [np.packbits(np.ascontiguousarray(c), axis=1) for c in chunks]
    data = b"".join(p.tobytes() for p in packed)
    shape = (sum(len(p) for p in packed), kv_len)
    return Matrix(shape, _digest(shape, data), data)


def sparse_from_pairs(rows: Any, cols: Any, q_len: int, kv_len: int) -> Pattern:
    """The mask that is True at (rows[i], cols[i]), two integer vectors in any order, duplicates allowed."""
    shape = (int(q_len), int(kv_len))
    if min(shape) < 1:
        raise InvalidInput(f"sparse: the matrix has shape {shape}, but it must not be empty")
    if shape[0] * shape[1] >= 2**63 or shape[1] >= 2**31:
        raise InvalidInput(f"sparse: a matrix of shape {shape} is too large")
    keys = np.unique(np.asarray(rows, np.int64) * kv_len + np.asarray(cols, np.int64))
    indptr = np.zeros(shape[0] + 1, np.int64)
    np.cumsum(np.bincount(keys // kv_len, minlength=shape[0]), out=indptr[1:])
    ptr, col = indptr.tobytes(), (keys % kv_len).astype(np.int32).tobytes()
    return Sparse(shape, _digest(shape, ptr + col), ptr, col)


def refuse_large(q_len: int, kv_len: int) -> None:
    """InvalidInput if a mask of this size is too large to be evaluated element by element."""
    if q_len * kv_len > MAX_DENSE:
        raise InvalidInput(
            f"a {q_len} x {kv_len} mask has more than 2**32 elements, too many to evaluate one by one: write"
            " it with splatc.patterns (causal, window, documents, ...) or as a scipy.sparse array"
        )


def _digest(shape: tuple[int, int], data: bytes) -> str:
    return hashlib.sha256(repr(shape).encode() + data).hexdigest()
