"""The whole IR on one page: frozen dataclasses with named fields.

A program computes masked attention. It starts as three operations over a mask and ends as fused operations over tiles:

    s = sddmm(q, k) over m            scores where the mask holds
    p, lse = softmax(s)               ->         o, lse = attend(q, k, v) over t0
    o = spmm(p, v)                               o, lse = attend(q, k, v) over t1 merging (o, lse)

What else is done to scores and probabilities (ir/score.py) stands behind bars:

    s = sddmm(q, k) over m | softcap(cap) | alibi(slopes)
    p, lse = softmax(s, sinks) | dropout(seed)
    o = spmm(p, v)

Where a dynamic pattern prunes scores, s = prune(s, 2, 4) stands before the softmax.

What an operation runs over is a domain: a Mask (ACSR), Regions (its pieces, each with the view it is seen through) or a
Cover (tiles). Every domain describes the same set of (query, key) pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from splatc.formats.acsr import ACSR
from splatc.formats.remainder import BlockBits
from splatc.formats.strips import Ints
from splatc.ir.score import NO_SCORE, Score, Step
from splatc.ir.views import View
from splatc.patterns.pruned import Pruning


@dataclass(frozen=True)
class Mask:
    """The mask itself."""

    acsr: ACSR


@dataclass(frozen=True, eq=False)
class Region:
    """Pieces of a mask seen through one row view and one column view (pieces: the int64 table of formats/fold.nest)."""

    rows: View
    cols: View
    pieces: Ints
    remainder: BlockBits


@dataclass(frozen=True)
class Regions:
    """Disjoint regions that make up a mask; those with the same row view are computed in one pass."""

    q_len: int
    kv_len: int
    regions: tuple[Region, ...]


@dataclass(frozen=True, eq=False)
class Shapes:
    """The distinct partly filled tiles, as spans: the compressed form of their bits.

    spans: int64 (n, 10): shape, lane, lanes, then col, dcol, width, dwidth, stride, count, dcount as in a strip, in
    the tile. blocks: int64 (m, 4): shape, index into ``bits``, and the lane and column of the tile it lies at.
    """

    count: int
    spans: Ints
    blocks: Ints
    bits: NDArray[np.uint64]


GATHERED = -1  # in place of a column view's number


@dataclass(frozen=True, eq=False)
class Cover:
    """Tiles of one pass: items (row tiles) and, for each, its entries (column tiles), int64 arrays.

    items: (n, 5): origin x1, x2, x3 in the row view, first entry, entry count.
    entries: (m, 6): origin x1, x2, x3 in a column view, the view's number, repeat (how many full tiles, each the view's
    ``advance`` on), shape (0: full, else 1 + index into ``shapes``). With GATHERED for the view, x1 is a row of gather.
    gather: (g, tile_n): the keys of gathered column tiles by position, -1 where there is none.
    """

    q_len: int
    kv_len: int
    rows: View
    cols: tuple[View, ...]
    items: Ints
    entries: Ints
    shapes: Shapes
    gather: Ints

    @property
    def tiles(self) -> int:
        return int(self.entries[:, 4].sum())

    @property
    def tile_area(self) -> int:
        return self.tiles * self.rows.lanes * (self.cols[0].lanes if self.cols else 0)


Domain = Mask | Regions | Cover


@dataclass(frozen=True)
class Sddmm:
    """out[q, k] = scale * <q_q, k_k> for the pairs of the domain, then every step in turn."""

    out: str
    q: str
    k: str
    over: str
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True)
class Prune:
    """out = the pairs of x that ``pruning`` keeps, row by row."""

    out: str
    x: str
    pruning: Pruning


@dataclass(frozen=True)
class Softmax:
    """out = softmax along k over the pairs that x has; lse = its log-sum-exp. An empty row gives nothing and -inf.

    sinks: a logit more in every row, without a column. dropout: of out; lse is that of before.
    """

    out: str
    lse: str
    x: str
    sinks: bool = False
    dropout: bool = False


@dataclass(frozen=True)
class Spmm:
    """out[q] = sum over k of p[q, k] v[k]."""

    out: str
    p: str
    v: str


@dataclass(frozen=True)
class Attend:
    """All of the above in one, over tiles; merging: combined with the (out, lse) already there, so that sinks are
    of the first only."""

    out: str
    lse: str
    q: str
    k: str
    v: str
    over: str
    merging: bool
    score: Score = NO_SCORE


Operation = Sddmm | Prune | Softmax | Spmm | Attend


@dataclass(frozen=True)
class Program:
    """Masked attention of q, k, v over named domains."""

    q_len: int
    kv_len: int
    domains: tuple[tuple[str, Domain], ...]
    body: tuple[Operation, ...]

    def domain(self, name: str) -> Domain:
        return dict(self.domains)[name]

    @property
    def score(self) -> Score:
        """All that is done to scores and probabilities."""
        parts = [_score(op) for op in self.body]
        steps = next((part.steps for part in parts if part.steps), ())
        pruning = next((part.pruning for part in parts if part.pruning), None)
        return Score(steps, any(part.sinks for part in parts), any(part.dropout for part in parts), pruning)


def _score(op: Operation) -> Score:
    match op:
        case Sddmm():
            return Score(op.steps)
        case Prune():
            return Score(pruning=op.pruning)
        case Softmax():
            return Score((), op.sinks, op.dropout)
        case Attend():
            return op.score
        case Spmm():
            return NO_SCORE
