"""A plan: the tables of all heads and passes, laid out for a launch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from splatc.codegen.tables import Tables

ITEM_TILES = 0.4  # what starting a row tile costs, in tiles


@dataclass(frozen=True, eq=False)
class Launch:
    """One kernel call: the arrays of the kernel ABI (codegen/tables.py), for all heads.

    work: int32 (w, 2) head, item. cost: of each of its rows, in tiles.
    """

    work: NDArray[np.int32]
    items: NDArray[np.int32]
    entries: NDArray[np.int32]
    views: NDArray[np.int32]
    bits: NDArray[np.uint32]
    cost: NDArray[np.float64]

    def chunks(self, batch: int, workers: int) -> NDArray[np.int32]:
        """Bounds of ``workers`` consecutive shares of the batch * len(work) flat work indices, of equal cost."""
        ends = np.concatenate([[0.0], np.cumsum(self.cost)])
        share = np.arange(1, workers) * (ends[-1] * batch / workers)
        whole, rest = np.divmod(share, ends[-1])
        inner = whole * len(self.work) + np.searchsorted(ends, rest)
        return np.concatenate([[0], inner, [batch * len(self.work)]]).astype(np.int32)


def launches(tables: list[tuple[Tables, ...]], pattern_of_head: list[int]) -> list[Launch]:
    """The launches of a plan, one a pass: ``tables[p]`` are the passes of pattern p, heads name their pattern."""
    passes = max(len(t) for t in tables)
    return [_launch([t[i] if i < len(t) else None for t in tables], pattern_of_head) for i in range(passes)]


def _launch(tables: list[Tables | None], pattern_of_head: list[int]) -> Launch:
    items: list[Any] = []
    entries: list[Any] = []
    views: list[Any] = []
    bits: list[Any] = []
    first_item: dict[int, int] = {}
    offset = np.zeros(4, np.int32)  # items, entries, views and bits so far
    for p, t in enumerate(tables):
        if t is None or p not in pattern_of_head:
            continue
        item, entry = t.items.copy(), t.entries.copy()
        item[:, 3] += offset[1]
        item[:, 5] += offset[2]
        entry[:, 5] += offset[2]
        entry[:, 4] += np.where(entry[:, 4] > 0, offset[3], 0)
        first_item[p] = int(offset[0])
        for parts, part in zip((items, entries, views, bits), (item, entry, t.views, t.bits), strict=True):
            parts.append(part)
        offset += [len(item), len(entry), len(t.views), len(t.bits)]
    item = np.concatenate(items)
    work = []
    for head, p in enumerate(pattern_of_head):
        if (t := tables[p]) is not None:
            numbers = first_item[p] + np.arange(len(t.items))
            work.append(np.stack([np.full_like(numbers, head), numbers], axis=1))
    rows = np.concatenate(work).astype(np.int32)
    cost = item[rows[:, 1], 6] + ITEM_TILES
    return Launch(rows, item, np.concatenate(entries), np.concatenate(views), np.concatenate(bits), cost)
