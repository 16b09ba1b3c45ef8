"""The order and the cut of work: which row tiles one launch hands out, and which of them in parts.

A device that hands out row tiles one by one ends unevenly: the last ones, or a global token's long row, keep a few
multiprocessors busy while the others wait. So long rows do not begin late; and those that still end late are cut into
parts, which run side by side; a second kernel puts their results together by (O, LSE).
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heapify, heapreplace
from itertools import product

import numpy as np
from numpy.typing import NDArray

from splatc.codegen.costs import Costs
from splatc.codegen.tables import Int32
from splatc.ir.program import GATHERED
from splatc.runtime.plan import Launch

PARTS = (2, 3, 4, 6, 8, 12, 16, 32)  # that a row tile may be cut into
LEAST = 2  # column tiles in a part
TOGETHER = 16  # heads whose row tiles are handed out side by side
AHEAD = 2  # times that a row takes: how long before the end of all it begins at the latest
GAIN = 0.02  # of the time that cutting must save
LATE = (0.1, 0.02)  # of the time of even work: rows that end so much later are cut
SIMULATED = 1 << 15  # rows up to which the queue is simulated; more end evenly anyway, but for very long rows
LONG = 1 / 8  # of the whole time: no row of a larger share stays whole then

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Work:
    """The tables of one launch that depend on batch, heads and device (int32).

    rows (w, 12), in the order of the queue: batch, head, item, part (0: all of the row tile, else 1 + scratch tile), q
    x1 x2 x3, first entry, entries, row view, tiles, tiles with bits. entries: those of the launch, then those of cut
    items.
    combine (c, 8): of each row tile in parts: batch, head, item, first scratch tile, parts, 0, 0, 0.
    microseconds: predicted for the launch.
    """

    rows: Int32
    entries: Int32
    combine: Int32
    microseconds: float

    @property
    def part_tiles(self) -> int:
        """Scratch tiles that partial results take."""
        return int(self.combine[:, 4].sum())


def work_of(launch: Launch, batch: int, costs: Costs, together: int = TOGETHER) -> Work:
    """The work of a launch for a batch, on costs.workers multiprocessors; together: see ``queue_order``."""
    if launch.heads:
        (entry, head), item = np.divmod(launch.work[:, 0], launch.heads), launch.work[:, 1]
    else:
        head, item = np.tile(launch.work, (batch, 1)).T
        entry = np.repeat(np.arange(batch), len(launch.work))
    bits, gathered = launch.items[:, 7], launch.entries[:, 5] == GATHERED
    tiles = launch.items[item, 6]
    cost = costs.item + costs.tile * tiles + costs.bits * bits[item] + costs.gather * _per_item(launch, gathered)[item]
    heads = int(head.max(initial=0)) + 1
    order = queue_order(cost, entry * heads + head, costs.workers, together)
    entry, head, item, tiles = entry[order], head[order], item[order], tiles[order]
    parts, end = cut_rows(cost[order], tiles, costs)
    work = np.zeros((len(item), 12), np.int32)
    work[:, :3] = np.stack([entry, head, item], axis=1)
    work[:, 4:11] = launch.items[item][:, [0, 1, 2, 3, 4, 5, 6]]
    work[:, 11] = bits[item]
    return Work(*_cut(launch, work, parts), end + costs.launch)


def _per_item(launch: Launch, chosen: NDArray[np.bool_]) -> NDArray[np.int64]:
    """How many of the chosen entries each item has."""
    ends = np.concatenate([[0], np.cumsum(chosen)])
    first, count = launch.items[:, 3], launch.items[:, 4]
    return np.asarray(ends[first + count] - ends[first])


def queue_order(cost: Floats, head: NDArray[np.integer], workers: int, together: int) -> NDArray[np.int64]:
    """Which row tile is handed out first, second and so on, of costs and heads (numbered through the batch).

    So many heads together, and of these the longest rows first: at any time rows are of few heads, whose keys are in
    the cache, and of few lengths, which walk over keys in step. Yet a row that would begin late moves forward, so that
    short ones are left for the end of all.
    """
    order = np.lexsort((-cost, head // together))
    cost = cost[order]
    ends = np.cumsum(cost) / workers
    begins, latest = ends - cost / workers, ends[-1:] - AHEAD * cost
    found: NDArray[np.int64] = order[np.argsort(np.minimum(begins, latest), kind="stable")]
    return found


def finish(cost: Floats, workers: int, before: Floats | None = None) -> Floats:
    """When each piece of work ends, if ``workers`` take them in order, after pieces that end at ``before``."""
    free = [0.0] * workers if before is None else free_after(before, workers)
    heapify(free)
    ends = []
    for c in cost.tolist():
        end = free[0] + c
        heapreplace(free, end)
        ends.append(end)
    return np.array(ends)


def free_after(ends: Floats, workers: int) -> list[float]:
    """When the workers are free again: at the latest ends, because each piece began at the earliest there was."""
    first = max(len(ends) - workers, 0)
    latest: list[float] = np.partition(ends, first)[first:].tolist() if first else ends.tolist()
    return [0.0] * (workers - len(latest)) + latest


def cut_rows(cost: Floats, tiles: NDArray[np.integer], costs: Costs) -> tuple[NDArray[np.int64], float]:
    """(Into how many parts each row tile goes, given in the order of the queue: mostly 1; when all have ended)."""
    parts = np.ones(len(cost), np.int64)
    even = float(cost.sum()) / costs.workers
    if len(cost) > SIMULATED:
        wanted = np.ceil(cost / (LONG * even)).astype(np.int64)
        parts = np.maximum(np.minimum(wanted, tiles // LEAST), parts)
        return parts, even + costs.combine * bool((parts > 1).any())
    ends = finish(cost, costs.workers)
    end = float(ends.max())
    worth = end * (1 - GAIN)
    if worth <= even + costs.combine:  # no cut can be so fast
        return parts, end
    for later, count in product(LATE, PARTS):
        late = (ends > even * (1 + later)) & (tiles >= 2 * LEAST)
        cut = np.where(late, np.minimum(count, tiles // LEAST), 1)
        extra = costs.combine + costs.part * int(cut[late].sum())
        if not late.any() or even + extra >= min(worth, end):  # it cannot be so fast
            continue
        same = int(late.argmax())  # rows before the first that is cut: they are not simulated again
        before = ends[:same]
        after = finish(_pieces(cost[same:], cut[same:], costs), costs.workers, before)
        time = float(max(before.max(initial=0), after.max())) + extra
        if time < min(worth, end):
            parts, end = cut, time
    return parts, end


def _pieces(cost: Floats, parts: NDArray[np.int64], costs: Costs) -> Floats:
    """The costs of all parts."""
    each = (cost - costs.item) / parts + costs.item
    return np.repeat(each, parts)


def _cut(launch: Launch, work: Int32, parts: NDArray[np.int64]) -> tuple[Int32, Int32, Int32]:
    """(work, entries, combine) with rows in parts."""
    if (parts == 1).all():
        return work, launch.entries, np.zeros((0, 8), np.int32)
    rows: list[NDArray[np.int32]] = []
    entries, combine = [launch.entries], []
    known: dict[tuple[int, int], list[tuple[int, int, int, int]]] = {}
    total, scratch, begin = len(launch.entries), 0, 0
    for i in np.flatnonzero(parts > 1):
        item, count = int(work[i, 2]), int(parts[i])
        if (item, count) not in known:
            pieces, found = _cut_item(launch, item, count, total)
            known[item, count] = found
            entries.append(pieces)
            total += len(pieces)
        part = np.repeat(work[i : i + 1], count, axis=0)
        part[:, 3] = 1 + scratch + np.arange(count)
        part[:, [7, 8, 10, 11]] = known[item, count]
        rows += [work[begin:i], part]
        combine.append([*work[i, :3], scratch, count, 0, 0, 0])
        scratch += count
        begin = i + 1
    return np.concatenate([*rows, work[begin:]]), np.concatenate(entries), np.array(combine, np.int32)


def _cut_item(launch: Launch, item: int, parts: int, at: int) -> tuple[Int32, list[tuple[int, int, int, int]]]:
    """(entries of an item cut into parts, which will lie from ``at`` on; of each part first entry, entries, tiles and
    tiles with bits)."""
    first, count, tiles = launch.items[item, [3, 4, 6]]
    mine = launch.entries[first : first + count]
    ends = np.concatenate([[0], np.cumsum(mine[:, 3])])
    bounds = tiles * np.arange(parts + 1) // parts
    cuts = np.union1d(ends[:-1], bounds[:-1])
    owner = np.searchsorted(ends, cuts, "right") - 1
    pieces = mine[owner].copy()
    pieces[:, :2] += (cuts - ends[owner])[:, None].astype(np.int32) * pieces[:, 6:8]
    pieces[:, 3] = np.diff(np.append(cuts, tiles))
    starts = np.searchsorted(cuts, bounds)
    bits = np.concatenate([[0], np.cumsum(pieces[:, 4] > 0)])
    found = [(at + int(a), int(b - a), int(hi - lo), int(bits[b] - bits[a]))
             for a, b, lo, hi in zip(starts[:-1], starts[1:], bounds[:-1], bounds[1:], strict=True)]  # fmt: skip
    return pieces, found
