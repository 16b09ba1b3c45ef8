"""A plan: the tables of all heads and passes, laid out for a launch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from splatc.codegen.costs import STARTING_TILES
from splatc.codegen.tables import Int32, Tables, Words
from splatc.errors import VerifyError
from splatc.ir.program import GATHERED


@dataclass(frozen=True, eq=False)
class Launch:
    """One kernel call: the arrays of the kernel ABI (codegen/tables.py), for all heads that take part in it.

    merge: whether it starts from the (O, LSE) in memory. work: int32 (w, 2) head, item; cost: of each row, in tiles.
    heads: of a batch entry, where entries have masks of their own and work counts the heads of all; 0: it is the same
    for every entry.
    """

    merge: bool
    work: Int32
    items: Int32
    entries: Int32
    row_views: Int32
    col_views: Int32
    bits: Words
    gather: Int32
    positions: Int32
    cost: NDArray[np.float64]
    heads: int = 0

    @property
    def views(self) -> Int32:
        """The row views, then the column views: one table, for kernels that read ``joined_entries``."""
        return np.concatenate([self.row_views, self.col_views])

    @property
    def joined_entries(self) -> Int32:
        """The entries with column views numbered as in ``views``."""
        entries: Int32 = self.entries.copy()
        entries[:, 5] += len(self.row_views)
        return entries

    def chunks(self, batch: int, workers: int) -> Int32:
        """Bounds of ``workers`` consecutive shares of the batch * len(work) flat work indices, of equal cost."""
        ends = np.concatenate([[0.0], np.cumsum(self.cost)])
        share = np.arange(1, workers) * (ends[-1] * batch / workers)
        whole, rest = np.divmod(share, ends[-1])
        inner = whole * len(self.work) + np.searchsorted(ends, rest)
        bounds: Int32 = np.concatenate([[0], inner, [batch * len(self.work)]]).astype(np.int32)
        return bounds


def launches(tables: list[tuple[Tables, ...]], pattern_of_head: list[int], max_row_views: int | None = None,
             max_col_views: int | None = None) -> list[Launch]:  # fmt: skip
    """The launches of a plan, pass after pass: ``tables[p]`` are the passes of pattern p, heads name their pattern.

    A pass is one launch, or several of different heads if a kernel has fewer views than the patterns need together.
    """
    used = sorted(set(pattern_of_head))
    out = []
    for i in range(max(len(tables[p]) for p in used)):
        groups: list[_Group] = []
        for p in used:
            if len(tables[p]) > i and not any(group.add(p, tables[p][i]) for group in groups):
                groups.append(_Group(max_row_views, max_col_views))
                if not groups[-1].add(p, tables[p][i]):
                    raise VerifyError("one pass of a pattern has more views than its kernel; please report this mask")
        out += [group.launch(pattern_of_head, merge=i > 0) for group in groups]
    return out


class _Group:
    """Patterns whose tables share one launch, and the views that they share."""

    def __init__(self, max_row_views: int | None, max_col_views: int | None) -> None:
        self.limits = max_row_views, max_col_views
        self.views: tuple[dict[tuple[int, ...], int], ...] = ({}, {})  # rows', columns': number of each view
        self.tables: dict[int, Tables] = {}

    def add(self, pattern: int, tables: Tables) -> bool:
        """Take the tables in, unless that makes too many views."""
        both = tuple(
            {view: i for i, view in enumerate(dict.fromkeys([*known, *_rows(mine)]))}
            for known, mine in zip(self.views, (tables.row_views, tables.col_views), strict=True)
        )
        if any(limit is not None and len(views) > limit for views, limit in zip(both, self.limits, strict=True)):
            return False
        self.views = both
        self.tables[pattern] = tables
        return True

    def launch(self, pattern_of_head: list[int], merge: bool) -> Launch:
        """The launch of those heads that have one of the patterns."""
        parts: dict[str, list[Any]] = {name: [] for name in ("items", "entries", "bits", "gather", "positions")}
        first_item: dict[int, int] = {}
        for p, t in self.tables.items():
            size = {name: sum(map(len, arrays)) for name, arrays in parts.items()}
            first_item[p] = size["items"]
            item, entry = t.items.copy(), t.entries.copy()
            gathered = entry[:, 5] == GATHERED
            item[:, 3] += size["entries"]
            item[:, 5] = self._numbers(0, t.row_views)[item[:, 5]]
            entry[~gathered, 5] = self._numbers(1, t.col_views)[entry[~gathered, 5]]
            entry[gathered, 0] += size["gather"]
            entry[:, 4] += np.where(entry[:, 4] > 0, size["bits"], 0)
            for name, array in zip(parts, (item, entry, t.bits, t.gather, t.positions), strict=True):
                parts[name].append(array)
        arrays = {name: np.concatenate(part) for name, part in parts.items()}
        work = [self._work(head, p, first_item[p]) for head, p in enumerate(pattern_of_head) if p in self.tables]
        rows = np.concatenate(work).astype(np.int32)
        row_views, col_views = (np.array(list(views), np.int32) for views in self.views)
        return Launch(merge=merge, heads=0, work=rows, **arrays, row_views=row_views, col_views=col_views,
                      cost=arrays["items"][rows[:, 1], 6] + STARTING_TILES)  # fmt: skip

    def _numbers(self, side: int, views: Int32) -> Int32:
        return np.array([self.views[side][view] for view in _rows(views)], np.int32)

    def _work(self, head: int, pattern: int, first: int) -> NDArray[np.int64]:
        numbers = first + np.arange(len(self.tables[pattern].items))
        return np.stack([np.full_like(numbers, head), numbers], axis=1)


def _rows(views: Int32) -> list[tuple[int, ...]]:
    return [tuple(view) for view in views.tolist()]
