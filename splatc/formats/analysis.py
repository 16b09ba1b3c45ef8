"""An explicit mask to ACSR: find the affine structure, verify it, leave the rest to bits. All vectorised."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from splatc.errors import VerifyError
from splatc.formats.fold import fold_columns, fold_rows, nest, unnest, unnested
from splatc.formats.remainder import BLOCK, BlockBits, split_at_blocks
from splatc.formats.strips import Ints, RowRuns, Runs, element_counts, make, ramp, row_runs, unit_runs

PIECE_BYTES = 80  # what a piece costs in memory, to weigh it against bits
BLOCK_BYTES = 8 * BLOCK + 16
SMALL = (64, 1024, 1 << 62)  # pieces of fewer elements than one of these become bits: whichever is cheapest
MANY = 20_000  # more strips than this are weighed against bits before looking for repetition, which takes longer
CROWDED = 64  # rows that need more strided runs than this on average are irregular: all bits
SAMPLED_ROWS = 64


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


def is_irregular(mask: NDArray[np.bool_]) -> bool:
    """Whether a sample of rows folds so badly that looking for structure in all of them is a waste of time."""
    rows = np.unique(np.linspace(0, max(len(mask) - 1, 0), SAMPLED_ROWS).astype(np.int64))[: len(mask)]
    runs = runs_of_dense(mask[rows])
    return len(fold_columns(runs.row, runs.start, runs.stop - runs.start).row) > CROWDED * len(rows)


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
    strips = fold_rows(folded)
    _check_rows(strips, folded)
    if len(strips) > MANY and _bits_bytes(strips) < len(strips) * PIECE_BYTES:
        return nest(make()), _to_bits(strips)
    pieces = nest(strips)
    if not np.array_equal(_sorted(unnest(pieces)), _sorted(strips)):
        raise VerifyError("nest changed the strips; please report this mask")
    found, owner = unnested(pieces)
    size = np.bincount(owner, element_counts(found), len(pieces)).astype(np.float64)
    bits = _cheaper_as_bits(pieces, size)
    return pieces[~bits], _to_bits(unnest(pieces[bits]))


def _cheaper_as_bits(pieces: Ints, size: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which pieces to keep as bits: all of fewer elements than some limit, or none."""
    best, best_bytes = np.zeros(len(pieces), bool), len(pieces) * PIECE_BYTES
    for limit in SMALL:
        bits = size < limit
        kept = int((~bits).sum()) * PIECE_BYTES
        if kept + size[bits].sum() / BLOCK**2 * BLOCK_BYTES < best_bytes:  # else not even full blocks would pay
            total = kept + _bits_bytes(unnest(pieces[bits]))
            if total < best_bytes:
                best, best_bytes = bits, total
    return best


def _bits_bytes(strips: Ints) -> int:
    row, block, _, _ = split_at_blocks(unit_runs(row_runs(strips)))
    return len(np.unique((row // BLOCK << 32) + block)) * BLOCK_BYTES


def _to_bits(strips: Ints) -> BlockBits:
    remainder = BlockBits.from_runs(unit_runs(row_runs(strips)))
    if remainder.nnz != element_counts(strips).sum():
        raise VerifyError("the remainder lost or repeated elements; please report this mask")
    return remainder


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


def _sorted(strips: Ints) -> Ints:
    return strips[np.lexsort(strips.T)]
