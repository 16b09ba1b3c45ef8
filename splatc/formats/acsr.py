"""ACSR: a mask as exact affine pieces over rows plus an irregular remainder (SPLAT, arXiv 2407.16847, extended).

The paper's row is ``start + stride*k, 0 <= k < count``. Here rows are unions of such progressions, consecutive rows
whose progressions are affine in the row are one strip, and strips that repeat at a constant offset are one piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from random import Random
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from splatc.errors import InvalidInput, VerifyError
from splatc.formats.analysis import analyze_runs, fold_dense, is_irregular
from splatc.formats.fold import MAX_LEVELS, fold_columns, nest, unnest
from splatc.formats.remainder import BlockBits
from splatc.formats.strips import (
    FIELDS,
    Ints,
    Runs,
    element_counts,
    make,
    row_runs,
    unit_runs,
)
from splatc.formats.symbolic import strips_of
from splatc.patterns.base import Pattern
from splatc.patterns.heads import PerHead
from splatc.patterns.matrix import Sparse

if TYPE_CHECKING:
    import scipy.sparse
    import torch

CHECK_ALL = 1 << 20  # elements up to which a symbolic pattern is compared with its ACSR everywhere
CHECK_SOME = 1 << 19  # above that, this many elements, in whole random rows
CHECK_AGAIN = 1 << 17  # this many, where the same pattern was compared at another length before
MAX_MIXED = 1 << 26  # elements up to which a pattern with residues of both k and k - q is evaluated as a matrix


@dataclass(frozen=True)
class Piece:
    """One affine piece: a strip and how it repeats.

    Row ``row+t`` holds ``count + dcount*t`` runs of ``width + dwidth*t`` columns from ``col + dcol*t``, ``stride``
    apart; repetition i of a level adds i times its step to the named fields.
    """

    row: int
    rows: int
    col: int
    dcol: int
    width: int
    dwidth: int
    stride: int
    count: int
    dcount: int
    repeats: tuple[tuple[int, tuple[tuple[str, int], ...]], ...] = ()

    def __str__(self) -> str:
        def affine(base: int, slope: int) -> str:
            return f"{base}" + (f"{slope:+}t" if slope else "")

        text = f"rows {self.row}+t, t<{self.rows}: cols {affine(self.col, self.dcol)}"
        if (self.width, self.dwidth) != (1, 0):
            text += f" width {affine(self.width, self.dwidth)}"
        if (self.count, self.dcount) != (1, 0) or any("count" in dict(steps) for _, steps in self.repeats):
            text += f" count {affine(self.count, self.dcount)} stride {self.stride}"
        for extent, steps in self.repeats:
            text += f", {extent} times " + " ".join(f"{name}{step:+}" for name, step in steps)
        return text


class Pieces(Sequence[Piece]):
    """The pieces of an ACSR as a read-only sequence; ``table`` is the int64 array behind it."""

    def __init__(self, table: Ints) -> None:
        self.table = table

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        line = [int(x) for x in self.table[index]]
        width = len(FIELDS)
        repeats = []
        for level in range(MAX_LEVELS):
            extent, *steps = line[width + level * (1 + width) : width + (level + 1) * (1 + width)]
            if extent != 1:
                repeats.append((extent, tuple((n, s) for n, s in zip(FIELDS, steps, strict=True) if s)))
        return Piece(**dict(zip(FIELDS, line[:width], strict=True)), repeats=tuple(repeats))

    def __iter__(self) -> Iterator[Piece]:
        return (self[i] for i in range(len(self)))


@dataclass(frozen=True, eq=False)
class ACSR:
    """A mask of ``q_len`` x ``kv_len``: disjoint affine pieces and a remainder of bits; True means attend.

    Make one with ``from_pattern``, ``from_dense``, ``from_scipy``, ``from_torch``, ``from_elements``.
    """

    q_len: int
    kv_len: int
    pieces: Pieces
    remainder: BlockBits = field(default_factory=BlockBits.none)

    # -- making one ----------------------------------------------------------------------------------------------------

    @staticmethod
    def from_pattern(pattern: Pattern, q_len: int, kv_len: int | None = None, *, among: int = 1) -> ACSR:
        """From a symbolic pattern, without S x S memory; one with an explicit matrix in it is analysed densely.

        among: how many masks are analysed together, which share what elements are compared at the end."""
        kv_len = q_len if kv_len is None else kv_len
        pattern.check(q_len, kv_len)
        if isinstance(pattern, Sparse):
            indptr, columns = pattern.csr
            return ACSR.from_elements(np.repeat(np.arange(q_len), np.diff(indptr)), columns, q_len, kv_len)
        lines = pattern.lines(q_len, kv_len)
        mixed = lines is not None and lines.col_mod and lines.diff_mod  # exact either way; the matrix is quicker
        if lines is None or (mixed and q_len * kv_len <= MAX_MIXED):
            return ACSR.from_dense(pattern.dense(q_len, kv_len))
        strips = strips_of(pattern, q_len, kv_len, lines)
        acsr = ACSR(q_len, kv_len, Pieces(nest(strips)))
        acsr._check_against(pattern, among)
        return acsr

    @staticmethod
    def from_dense(mask: NDArray[np.bool_]) -> ACSR:
        """From a boolean matrix (q_len, kv_len): finds the affine structure, verified exactly."""
        if mask.ndim != 2 or mask.dtype != np.bool_:
            raise InvalidInput(
                f"a mask must be a boolean matrix (q_len, kv_len), got {mask.dtype} of shape {mask.shape}; "
                "convert with mask.astype(bool)"
            )
        if is_irregular(mask):
            return ACSR(mask.shape[0], mask.shape[1], Pieces(nest(make())), BlockBits.from_dense(mask))
        pieces, remainder = analyze_runs(fold_dense(mask))
        return ACSR(mask.shape[0], mask.shape[1], Pieces(pieces), remainder)

    @staticmethod
    def from_elements(q: Ints, k: Ints, q_len: int, kv_len: int) -> ACSR:
        """From coordinates (q, k) of the elements that attend (int arrays of one length; duplicates count once)."""
        key = np.unique(np.asarray(q, np.int64) * kv_len + np.asarray(k, np.int64))
        if len(key) and not (key[0] >= 0 and key[-1] < q_len * kv_len and np.min(k) >= 0 and np.max(k) < kv_len):
            raise InvalidInput(f"element coordinates must lie inside {q_len} x {kv_len}; check q_len and kv_len")
        return ACSR._from_sorted_keys(key, q_len, kv_len)

    @staticmethod
    def _from_sorted_keys(key: Ints, q_len: int, kv_len: int) -> ACSR:
        row, col = key // max(kv_len, 1), key % max(kv_len, 1)
        begins = np.ones(len(key), bool)
        begins[1:] = (key[1:] != key[:-1] + 1) | (col[1:] == 0)
        first = np.flatnonzero(begins)
        last = np.append(first[1:], len(key))[: len(first)] - 1
        return ACSR._from_runs(Runs(row[first], col[first], col[last] + 1), q_len, kv_len)

    @staticmethod
    def _from_runs(runs: Runs, q_len: int, kv_len: int) -> ACSR:
        pieces, remainder = analyze_runs(fold_columns(runs.row, runs.start, runs.stop - runs.start))
        return ACSR(q_len, kv_len, Pieces(pieces), remainder)

    @staticmethod
    def from_scipy(matrix: scipy.sparse.sparray) -> ACSR:
        """From a scipy.sparse matrix or array: its non-zero entries attend."""
        coo = matrix.tocoo()
        stored = coo.data != 0
        return ACSR.from_elements(coo.row[stored], coo.col[stored], *coo.shape)

    @staticmethod
    def from_torch(matrix: torch.Tensor) -> ACSR:
        """From a 2-D torch tensor, dense boolean or sparse (COO, CSR, CSC, BSR): its non-zero entries attend."""
        if str(matrix.layout) == "torch.strided":
            return ACSR.from_dense(matrix.detach().cpu().bool().numpy())
        coo = matrix.detach().cpu().to_sparse_coo().coalesce()  # type: ignore[no-untyped-call]
        q, k = coo.indices()[:, coo.values() != 0].numpy()
        return ACSR.from_elements(q, k, *matrix.shape)

    # -- what it holds -------------------------------------------------------------------------------------------------

    @cached_property
    def strips(self) -> Ints:
        """The pieces without their nesting: int64 (n, 9), see formats/strips.py."""
        return unnest(self.pieces.table)

    @cached_property
    def nnz(self) -> int:
        """Elements that attend."""
        return int(element_counts(self.strips).sum()) + self.remainder.nnz

    @property
    def density(self) -> float:
        """nnz / (q_len * kv_len); 0 for an empty mask."""
        return self.nnz / max(self.q_len * self.kv_len, 1)

    @property
    def nbytes(self) -> int:
        """Bytes of this representation."""
        return int(self.pieces.table.nbytes) + self.remainder.nbytes

    def statistics(self) -> dict[str, float]:
        """nnz, density, pieces, strips, remainder_nnz, nbytes, empty_rows, row_min, row_mean, row_max (elements)."""
        per_row = self.row_counts()
        rows = {"empty_rows": int((per_row == 0).sum()), "row_min": int(per_row.min(initial=self.kv_len)),
                "row_mean": self.nnz / max(self.q_len, 1), "row_max": int(per_row.max(initial=0))}  # fmt: skip
        return {"nnz": self.nnz, "density": self.density, "pieces": len(self.pieces), "strips": len(self.strips),
                "remainder_nnz": self.remainder.nnz, "nbytes": self.nbytes, **rows}  # fmt: skip

    def row_counts(self) -> Ints:
        """Elements of each row (q_len,)."""
        row, start, stop = self.runs()
        return np.bincount(row, stop - start, self.q_len).astype(np.int64)

    def __str__(self) -> str:
        head = (
            f"acsr {self.q_len} x {self.kv_len}: nnz {self.nnz}, density {self.density:.4f}, {len(self.pieces)} pieces"
        )
        tail = f"remainder {self.remainder.nnz} in {len(self.remainder.rows)} blocks"
        return f"{head}, {tail}"

    def runs(self) -> Runs:
        """Every maximal run of adjacent columns, sorted by row and column."""
        parts = [unit_runs(row_runs(self.strips)), self.remainder.runs()]
        row, start, stop = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        return _sweep([Runs(row, start, stop)], self.kv_len, lambda a: a > 0)

    # -- conversions ---------------------------------------------------------------------------------------------------

    def to_dense(self) -> NDArray[np.bool_]:
        """Boolean matrix (q_len, kv_len)."""
        runs = self.runs()
        steps = np.zeros((self.q_len, self.kv_len + 1), np.int8)
        steps[runs.row, runs.start] += 1
        steps[runs.row, runs.stop] -= 1
        return np.cumsum(steps, axis=1, dtype=np.int8)[:, : self.kv_len].astype(bool)

    def to_scipy(self) -> scipy.sparse.csr_array:
        """scipy.sparse.csr_array of booleans, indices sorted."""
        import scipy.sparse

        row, col = self.elements()
        indptr = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=self.q_len))])
        return scipy.sparse.csr_array((np.ones(len(col), bool), col, indptr), shape=(self.q_len, self.kv_len))

    def to_torch(self) -> torch.Tensor:
        """torch sparse CSR tensor of booleans (q_len, kv_len), on the CPU."""
        import torch

        csr = self.to_scipy()
        indptr, indices, data = (torch.from_numpy(np.asarray(x)) for x in (csr.indptr, csr.indices, csr.data))
        return torch.sparse_csr_tensor(indptr, indices, data, size=csr.shape, check_invariants=True)

    def elements(self) -> tuple[Ints, Ints]:
        """(q, k) of every element, sorted by row and column; O(nnz) memory."""
        runs = self.runs()
        width = runs.stop - runs.start
        row = np.repeat(runs.row, width)
        first = np.cumsum(width) - width
        return row, np.arange(len(row)) - np.repeat(first - runs.start, width)

    # -- algebra -------------------------------------------------------------------------------------------------------

    def transpose(self) -> ACSR:
        """The mask with queries and keys exchanged; O(nnz)."""
        q, k = self.elements()
        key = k * self.q_len + q
        key.sort()
        return ACSR._from_sorted_keys(key, self.kv_len, self.q_len)

    def __or__(self, other: ACSR) -> ACSR:
        return self._combine(other, lambda a, b: (a + b) > 0)

    def __and__(self, other: ACSR) -> ACSR:
        return self._combine(other, lambda a, b: (a + b) == 2)

    def __sub__(self, other: ACSR) -> ACSR:
        return self._combine(other, lambda a, b: (a == 1) & (b == 0))

    def __invert__(self) -> ACSR:
        everything = make(row=np.zeros(1, np.int64), rows=self.q_len, width=self.kv_len)
        return ACSR(self.q_len, self.kv_len, Pieces(nest(everything))) - self

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ACSR):
            return NotImplemented
        if (self.q_len, self.kv_len, self.nnz) != (other.q_len, other.kv_len, other.nnz):
            return False
        return all(np.array_equal(a, b) for a, b in zip(self.runs(), other.runs(), strict=True))

    __hash__ = None  # type: ignore[assignment]

    def _combine(self, other: ACSR, keep: Any) -> ACSR:
        if (self.q_len, self.kv_len) != (other.q_len, other.kv_len):
            raise InvalidInput(
                f"cannot combine masks of {self.q_len} x {self.kv_len} and {other.q_len} x {other.kv_len}; "
                "make both for the same lengths"
            )
        runs = _sweep([self.runs(), other.runs()], self.kv_len, keep)
        return ACSR._from_runs(runs, self.q_len, self.kv_len)

    # -- checks --------------------------------------------------------------------------------------------------------

    def _check_against(self, pattern: Pattern, among: int = 1) -> None:
        """Raise VerifyError unless the strips are disjoint and equal to the pattern: everywhere when the mask is small,
        else in whole random rows (the cells' corners were all compared before). A new length of a pattern that passed
        takes fewer rows: planning it must be quick."""
        size = self.q_len * self.kv_len
        if not size:
            return
        everywhere, elements = (CHECK_AGAIN, CHECK_AGAIN) if pattern in _compared else (CHECK_ALL, CHECK_SOME)
        rows = np.arange(self.q_len)
        if size > everywhere // among:
            count = max(elements // among // self.kv_len, 2)
            rows = np.array(sorted(set(Random().choices(range(self.q_len), k=count))))  # numpy.random is slow to import
        wanted = pattern.contains(rows[:, None], np.arange(self.kv_len)[None, :], self.q_len, self.kv_len)
        wanted = np.broadcast_to(wanted, (len(rows), self.kv_len))
        runs = unit_runs(row_runs(self.strips, rows))
        if not _are_runs_of(wanted, np.searchsorted(rows, runs.row), runs):
            _say_difference(pattern, wanted, rows, runs)
        _compared.add(pattern)


@lru_cache(maxsize=4)  # for each shape of tiles that is considered, and for the walk of gradients over the same mask
def analyze_heads(pattern: Pattern, q_len: int, kv_len: int) -> Mapping[Pattern, ACSR]:
    """The ACSR of each distinct pattern of the heads."""
    distinct = dict.fromkeys(pattern.heads if isinstance(pattern, PerHead) else (pattern,))
    return {one: ACSR.from_pattern(one, q_len, kv_len, among=len(distinct)) for one in distinct}


_compared: WeakSet[Pattern] = WeakSet()  # patterns whose strips were compared with them in this process


def _are_runs_of(mask: NDArray[np.bool_], row: Ints, runs: Runs) -> bool:
    """Whether runs, each in a row of a mask, are disjoint and where the mask is true."""
    width = mask.shape[1] + 2
    base, some = row * width, runs.stop > runs.start
    start, stop = np.sort((base + runs.start)[some]), np.sort((base + runs.stop)[some])
    if (start[1:] < stop[:-1]).any():
        return False
    apart = start[1:] > stop[:-1]
    framed = np.zeros((len(mask), width), bool)  # in a row, neighbours that differ begin or end a run
    framed[:, 1:-1] = mask
    turns = np.flatnonzero(framed.ravel()[1:] != framed.ravel()[:-1])
    begins, ends = np.concatenate([[True], apart])[: len(start)], np.concatenate([apart, [True]])[: len(stop)]
    return np.array_equal(turns[0::2], start[begins]) and np.array_equal(turns[1::2], stop[ends])


def _say_difference(pattern: Pattern, wanted: NDArray[np.bool_], rows: Ints, runs: Runs) -> None:
    """Raise VerifyError for the first element of some rows that the runs hold otherwise than the mask."""
    width = wanted.shape[1] + 1
    base = np.searchsorted(rows, runs.row) * width
    steps = np.bincount(base + runs.start, minlength=len(rows) * width)
    steps -= np.bincount(base + runs.stop, minlength=len(rows) * width)
    covered = np.cumsum(steps.reshape(-1, width), axis=1)[:, :-1]
    i, k = np.argwhere(covered != wanted)[0]
    raise VerifyError(f"pattern {pattern}: element (q={rows[i]}, k={k}) is held by {covered[i, k]} pieces but the mask "
                      f"says {bool(wanted[i, k])}; please report this pattern")  # fmt: skip


def _sweep(sets: Sequence[Runs], kv_len: int, keep: Any) -> Runs:
    """Sweep over run ends: the runs where keep(coverage of each set) is true."""
    keys, steps = [], []
    for i, runs in enumerate(sets):
        base = runs.row * (kv_len + 1)
        for ends, sign in ((runs.start, 1), (runs.stop, -1)):
            keys.append(base + ends)
            step = np.zeros((len(base), len(sets)), np.int64)
            step[:, i] = sign
            steps.append(step)
    key = np.concatenate(keys)
    order = np.argsort(key, kind="stable")
    key, step = key[order], np.concatenate(steps)[order]
    last = np.ones(len(key), bool)
    last[:-1] = key[1:] != key[:-1]
    cover = np.cumsum(step, axis=0)[last]
    key = key[last]
    held = keep(*cover.T) if len(key) else np.zeros(0, bool)
    turns = np.flatnonzero(np.diff(np.concatenate([[False], held])))
    if len(turns) % 2:
        raise VerifyError("a run has no end: the strips overlap the mask's border; please report this mask")
    start, stop = key[turns[0::2]], key[turns[1::2]]
    row = start // (kv_len + 1)
    return Runs(row, start - row * (kv_len + 1), stop - row * (kv_len + 1))
