"""ACSR order: the elements of a mask by row, then by column, numbered from 0. No index is stored for an element."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from splatc.formats.acsr import ACSR
from splatc.formats.strips import Ints


class Order:
    """Where the elements of a mask lie in ACSR order."""

    def __init__(self, acsr: ACSR) -> None:
        self.q_len, self.kv_len, self.nnz = acsr.q_len, acsr.kv_len, acsr.nnz
        self.acsr = acsr

    @cached_property
    def indptr(self) -> Ints:
        """int64 (q_len + 1): row q has the elements from indptr[q] on, to below indptr[q + 1]."""
        runs = self.acsr.runs()
        steps = np.zeros(self.q_len + 1, np.int64)
        np.add.at(steps, runs.row + 1, runs.stop - runs.start)
        return np.cumsum(steps)

    def elements(self) -> tuple[Ints, Ints]:
        """(q, k) of every element, in order: made at each call, O(nnz)."""
        return self.acsr.elements()

    def ranks(self, q: Ints, k: Ints) -> Ints:
        """How many elements come before the pair (q, k): its own number if it is one. int64, shaped like q and k."""
        key, ends, width = self._runs
        at = np.searchsorted(key, q * self._pitch + k, side="right")  # runs that begin at or before the pair
        inside = np.minimum(q * self._pitch + k - key[at - 1], width[at - 1])
        return np.asarray(np.where(at > 0, ends[at] - width[at - 1] + inside, 0))

    @property
    def _pitch(self) -> int:
        return self.kv_len + 1

    @cached_property
    def _runs(self) -> tuple[Ints, Ints, Ints]:
        """(where runs begin as q * pitch + k, elements before each and in all, their widths)."""
        runs = self.acsr.runs()
        width = runs.stop - runs.start
        ends = np.concatenate([[0], np.cumsum(width)])
        if not len(width):  # one run of nothing, so that there is something to look at
            return np.zeros(1, np.int64), np.zeros(2, np.int64), np.zeros(1, np.int64)
        return runs.row * self._pitch + runs.start, ends, width
