"""Who holds what, who needs what, and so who sends what to whom: from the ACSR of a pattern, in NumPy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from splatc.distributed.layout import CONTIGUOUS, ZIGZAG, Layout
from splatc.errors import InvalidInput, Unsupported
from splatc.formats.acsr import ACSR, analyze_heads
from splatc.formats.strips import COUNT, STRIDE, Ints, row_runs
from splatc.patterns.base import Pattern
from splatc.patterns.heads import PerBatch, PerHead
from splatc.patterns.taken import take

ROW_COST = 2048  # elements of the mask that take as long as fetching a row of K and V: 400 TFLOP/s beside 200 GB/s
MAX_STRIDES = 4  # residue layouts that are tried: those of the strides with most elements


@dataclass(frozen=True, eq=False)
class Share:
    """What one rank does: attention to the keys that it holds, and to those that it fetches.

    rows: the positions of its queries, keys and values. send[r]: the places in `rows` of what rank r gets. receive[r]:
    how many rows come from rank r. fetched: the positions of these, those of rank 0 first. asking: the places in `rows`
    of the queries that attend to any of them. own: the mask of rows x rows. beyond: of asking x fetched, None where
    nothing is fetched. elements: of both.
    """

    rows: Ints
    send: tuple[Ints, ...]
    receive: tuple[int, ...]
    fetched: Ints
    asking: Ints
    own: Pattern
    beyond: Pattern | None
    elements: int

    @property
    def sent(self) -> int:
        return sum(map(len, self.send))

    @property
    def received(self) -> int:
        return sum(self.receive)


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends and receives in a forward and in a backward pass."""

    forward_sent: int
    forward_received: int
    backward_sent: int
    backward_received: int


@dataclass(frozen=True, eq=False)
class Plan:
    """A pattern of seq_len x seq_len over ranks, the same on each of them."""

    pattern: Pattern
    seq_len: int
    layout: Layout
    shares: tuple[Share, ...]

    @property
    def exchanges(self) -> bool:
        """Whether any rank needs rows of another one."""
        return any(share.received for share in self.shares)

    def traffic(self, rank: int, row_bytes: int) -> Traffic:
        """row_bytes: of one position of K and V together, all batches and heads. What comes forward goes back."""
        sent, received = (n * row_bytes for n in (self.shares[rank].sent, self.shares[rank].received))
        return Traffic(sent, received, received, sent)


@lru_cache(maxsize=64)
def plan_of(pattern: Pattern, seq_len: int, ranks: int, layout: Layout | None = None) -> Plan:
    """The plan for a layout, by default that of the least cost among contiguous, zig-zag and residues of the pattern's
    own strides. Remembered."""
    if isinstance(pattern, PerBatch):
        raise Unsupported("context parallel attention has the same masks for all batch entries: shard one at a time")
    acsrs = analyze_heads(pattern, seq_len, seq_len)
    each = [acsrs[one] for one in (pattern.heads if isinstance(pattern, PerHead) else (pattern,))]
    layouts = [CONTIGUOUS, ZIGZAG, *map(Layout, _strides(each, ranks))] if layout is None else [layout]
    held = {one: one.positions(seq_len, ranks) for one in layouts}
    fitting = [one for one in layouts if all(map(len, held[one]))]
    if not fitting:
        raise InvalidInput(
            f"{seq_len} positions leave one of {ranks} ranks without any ({layouts[-1]}): "
            "use fewer ranks, a longer sequence or another layout"
        )
    row_elements = _row_elements(each, seq_len)
    needs = [_Needs.of(list(acsrs.values()), one, held[one], row_elements) for one in fitting]
    best = min(needs, key=lambda one: one.cost)
    return Plan(pattern, seq_len, best.layout, _shares(pattern, best, seq_len))


@dataclass(frozen=True, eq=False)
class _Needs:
    """What a layout comes to. held: the positions of each rank. wanted[r][owner]: the keys of a rank that rank r needs.
    elements: of each rank."""

    layout: Layout
    held: list[Ints]
    wanted: list[list[Ints]]
    elements: list[int]

    @staticmethod
    def of(acsrs: list[ACSR], layout: Layout, held: list[Ints], row_elements: Ints) -> _Needs:
        owner = np.empty(len(row_elements), np.int64)
        for rank, rows in enumerate(held):
            owner[rows] = rank
        wanted = []
        for rank, rows in enumerate(held):
            keys = layout.ordered(np.flatnonzero(_needed(acsrs, rows) & (owner != rank)))
            wanted.append([keys[owner[keys] == r] for r in range(len(held))])
        return _Needs(layout, held, wanted, [int(row_elements[rows].sum()) for rows in held])

    @property
    def cost(self) -> int:
        """Of the slowest rank, in elements of the mask."""
        received = [sum(map(len, one)) for one in self.wanted]
        return max(n + ROW_COST * rows for n, rows in zip(self.elements, received, strict=True))


def _shares(pattern: Pattern, needs: _Needs, seq_len: int) -> tuple[Share, ...]:
    lengths, step, nothing = (seq_len, seq_len), needs.layout.modulus, np.zeros(0, np.int64)
    place = np.empty(seq_len, np.int64)
    for rows in needs.held:
        place[rows] = np.arange(len(rows))
    every_fetched = [np.concatenate(wanted) for wanted in needs.wanted]
    fetches = any(map(len, every_fetched))
    transposed = list(analyze_heads(pattern.transposed(), seq_len, seq_len).values()) if fetches else []
    shares = []
    for rank, (rows, fetched) in enumerate(zip(needs.held, every_fetched, strict=True)):
        asking, beyond = nothing, None
        if len(fetched):
            asking = np.flatnonzero(_needed(transposed, fetched)[rows])
            beyond = take(pattern, rows[asking], fetched, lengths, step)
        send = tuple(place[wanted[rank]] for wanted in needs.wanted)
        receive = tuple(map(len, needs.wanted[rank]))
        own = take(pattern, rows, rows, lengths, step)
        shares.append(Share(rows, send, receive, fetched, asking, own, beyond, needs.elements[rank]))
    return tuple(shares)


def _needed(acsrs: Iterable[ACSR], rows: Ints) -> NDArray[np.bool_]:
    """bool (kv_len): which keys any of the rows attends to in any head."""
    out: NDArray[np.bool_] = np.any([needed_keys(acsr, np.sort(rows)) for acsr in acsrs], axis=0)
    return out


def needed_keys(acsr: ACSR, rows: Ints) -> NDArray[np.bool_]:
    """bool (kv_len): which keys any of the rows (sorted) attends to. O(rows + kv_len) for each strip and each (width,
    stride)."""
    runs = row_runs(acsr.strips, rows)
    once = runs.times == 1
    rest = acsr.remainder.runs()
    listed = np.isin(rest.row, rows)
    starts, widths = [runs.start[once], rest.start[listed]], [runs.width[once], (rest.stop - rest.start)[listed]]
    many = np.unique(np.stack([x[~once] for x in (runs.width, runs.stride, runs.start, runs.times)], 1), axis=0)
    for width, stride in np.unique(many[:, :2], axis=0):
        same = many[(many[:, 0] == width) & (many[:, 1] == stride)]
        begins = _progressions(same[:, 2], same[:, 3], int(stride), acsr.kv_len)
        starts.append(begins)
        widths.append(np.full(len(begins), width))
    start, width = np.concatenate(starts), np.concatenate(widths)
    steps = np.bincount(start, minlength=acsr.kv_len + 1) - np.bincount(start + width, minlength=acsr.kv_len + 1)
    return np.cumsum(steps)[: acsr.kv_len] > 0


def _progressions(start: Ints, times: Ints, stride: int, kv_len: int) -> Ints:
    """All of start, start + stride, ... (times of them), each once: marked in a matrix of a row for each stride."""
    size = (kv_len // stride + 2) * stride
    steps = np.bincount(start, minlength=size) - np.bincount(start + stride * times, minlength=size)
    return np.flatnonzero(np.cumsum(steps.reshape(-1, stride), axis=0).ravel() > 0)


def _row_elements(acsrs: Sequence[ACSR], seq_len: int) -> Ints:
    """Elements of each row, of all heads: int64 (seq_len)."""
    total = np.zeros(seq_len, np.int64)
    for acsr in acsrs:
        runs, rest = row_runs(acsr.strips), acsr.remainder.runs()
        np.add.at(total, runs.row, runs.width * runs.times)
        np.add.at(total, rest.row, rest.stop - rest.start)
    return total


def _strides(acsrs: Sequence[ACSR], ranks: int) -> list[int]:
    """The strides of most strips, of those that give each rank a class."""
    strips = np.concatenate([acsr.strips for acsr in acsrs])
    stride, count = np.unique(strips[strips[:, COUNT] > 1, STRIDE], return_counts=True)
    best = stride[np.argsort(-count, kind="stable")]
    return [int(s) for s in best if s >= ranks and s > 1][:MAX_STRIDES]
