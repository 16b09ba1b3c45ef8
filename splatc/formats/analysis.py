"""An explicit mask to ACSR: find the affine structure, verify it, leave the rest to bits. All vectorised."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from splatc.errors import VerifyError
from splatc.formats.fold import fold_columns, fold_rows, nest, unnest
from splatc.formats.remainder import BLOCK, BlockBits
from splatc.formats.strips import Ints, RowRuns, Runs, element_counts, make, ramp, row_runs, unit_runs

PIECE_BYTES = 80  # what a piece costs in memory, to weigh it against bits
BLOCK_BYTES = 8 * BLOCK + 16
SMALL = 64  # a piece of fewer elements may be cheaper as bits
CROWDED = 64  # more row runs than this times the rows: the mask is irregular, only long runs are worth folding


def runs_of_dense(mask: NDArray[np.bool_]) -> Runs:
    """Runs of adjacent True of a boolean matrix, sorted by row and column."""
    rows, cols = mask.shape
    edges = np.zeros((rows, cols + 1), bool)
    if cols:
        edges[:, 0] = mask[:, 0]
        np.not_equal(mask[:, 1:], mask[:, :-1], out=edges[:, 1:cols])
        edges[:, cols] = mask[:, -1]
    at = np.flatnonzero(edges)
    start, stop = at[0::2], at[1::2]
    row = start // (cols + 1)
    base = row * (cols + 1)
    return Runs(row, start - base, stop - base)


def fold_dense(mask: NDArray[np.bool_]) -> RowRuns:
    """The strided runs of every row of a boolean matrix; equal rows are analysed once."""
    packed = np.packbits(mask, axis=1)
    _, first, which = np.unique(_row_hashes(packed), return_index=True, return_inverse=True)
    if len(first) > len(mask) // 2 or not np.array_equal(packed[first][which], packed):
        return _fold_checked(runs_of_dense(mask))
    unique = _fold_checked(runs_of_dense(mask[first]))
    per_row = np.bincount(unique.row, minlength=len(first))
    begin = np.cumsum(per_row) - per_row
    row, i = ramp(per_row[which])
    source = begin[which[row]] + i
    return RowRuns(row, *(column[source] for column in unique[1:]))


def _row_hashes(packed: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """A 64-bit hash of every row (equality is checked afterwards)."""
    padded = np.zeros((len(packed), -(-packed.shape[1] // 8) * 8), np.uint8)
    padded[:, : packed.shape[1]] = packed
    words = padded.view(np.uint64)
    odd = np.random.default_rng(0).integers(0, 2**63, words.shape[1], dtype=np.uint64) * 2 + 1
    mixed = words * odd
    mixed ^= mixed >> np.uint64(29)
    return np.asarray((mixed * odd[::-1]).sum(axis=1, dtype=np.uint64))


def _fold_checked(runs: Runs) -> RowRuns:
    """fold_columns, and the proof that it lost nothing: unfolding (and joining runs that touch) gives the same runs."""
    folded = fold_columns(runs.row, runs.start, runs.stop - runs.start)
    back = unit_runs(folded)
    if len(back.row) != len(runs.row):
        apart = np.ones(len(back.row) + 1, bool)
        apart[1:-1] = (back.row[1:] != back.row[:-1]) | (back.start[1:] != back.stop[:-1])
        back = Runs(back.row[apart[:-1]], back.start[apart[:-1]], back.stop[apart[1:]])
    if any(not np.array_equal(a, b) for a, b in zip(back, runs, strict=True)):
        raise VerifyError("fold_columns changed the mask; please report this mask")
    return folded


def analyze_runs(folded: RowRuns) -> tuple[Ints, BlockBits]:
    """Row runs (sorted by row, start) to nested pieces and a remainder, verified against the row runs."""
    scattered: list[RowRuns] = []
    rows = len(np.unique(folded.row)) if len(folded.row) else 0
    if len(folded.row) > CROWDED * max(rows, 1):
        long = folded.width * folded.times >= SMALL
        scattered.append(RowRuns(*(column[~long] for column in folded)))
        folded = RowRuns(*(column[long] for column in folded))
    strips = fold_rows(folded)
    _check_rows(strips, folded)
    strips, loose = _split_small(strips)
    if len(loose):
        scattered.append(row_runs(loose))
    elements = [_elements(runs) for runs in scattered]
    remainder = BlockBits.none()
    if elements:
        remainder = BlockBits.from_elements(*(np.concatenate(parts) for parts in zip(*elements, strict=True)))
        if remainder.nnz != sum(len(q) for q, _ in elements):
            raise VerifyError("the remainder holds an element twice; please report this mask")
    pieces = nest(strips)
    if not np.array_equal(_sorted(unnest(pieces)), _sorted(strips)):
        raise VerifyError("nest changed the strips; please report this mask")
    return pieces, remainder


def _check_rows(strips: Ints, folded: RowRuns) -> None:
    """The strips unfold to the very same row runs (a lone run has no stride, so strides of those are not compared)."""
    back = row_runs(strips)
    order = np.lexsort((back.start, back.row))
    for name, a, b in zip(RowRuns._fields, back, folded, strict=True):
        a = a[order]
        if name == "stride":
            a, b = a[folded.times > 1], b[folded.times > 1]
        if not np.array_equal(a, b):
            raise VerifyError(f"fold_rows changed the mask ({name}); please report this mask")


def _split_small(strips: Ints) -> tuple[Ints, Ints]:
    """(strips to keep, strips that are cheaper as bits): many small ones in the same 64 x 64 blocks."""
    if not len(strips):
        return strips, make()
    pieces = nest(strips)
    counts = element_counts(pieces[:, :9])
    repeats = pieces[:, 9] * pieces[:, 19] * pieces[:, 29]
    small = counts * repeats < SMALL
    if not small.any():
        return strips, make()
    loose = unnest(pieces[small])
    q, k = _elements(row_runs(loose))
    blocks = len(np.unique(q // BLOCK * (int(k.max()) // BLOCK + 1) + k // BLOCK))
    if small.sum() * PIECE_BYTES <= blocks * BLOCK_BYTES:
        return strips, make()
    return unnest(pieces[~small]), loose


def _elements(runs: RowRuns) -> tuple[Ints, Ints]:
    units = unit_runs(runs)
    owner, j = ramp(units.stop - units.start)
    return units.row[owner], units.start[owner] + j


def _sorted(strips: Ints) -> Ints:
    return strips[np.lexsort(strips.T)]
