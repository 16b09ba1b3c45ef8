"""A mask as the structure of values: where each head's elements lie, and the tables of the kernels over them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from splatc.codegen.kernel import TILE
from splatc.codegen.tables import build_tables, check_nnz
from splatc.codegen.value_tiles import ValueTiles, value_tiles
from splatc.codegen.values import ValueTables, value_tables
from splatc.errors import InvalidInput, Unsupported, VerifyError
from splatc.formats.acsr import ACSR, analyze_heads
from splatc.formats.order import Order
from splatc.formats.strips import Ints
from splatc.ir.passes import UNFUSED, Schedule, lower, run_passes
from splatc.ir.program import Cover, Program
from splatc.patterns.base import Pattern
from splatc.patterns.heads import PerBatch, PerHead
from splatc.runtime.cpu_call import exchange, table_arguments, workers
from splatc.runtime.launch import remember
from splatc.runtime.plan import launches

ROW_COST = 16  # of a softmax, in elements
SCHEDULES = Schedule(*TILE), Schedule(*TILE, views=False)  # the plain one keeps the order of elements for any mask


@dataclass(frozen=True, eq=False)
class Structure:
    """The elements of a mask at fixed lengths in ACSR order (by row, then by column), for all heads alike or for each.

    Values have the shape (batch, heads, nnz) or, with a pattern for each head, (batch, total): those of the heads one
    after the other. ``orders[p]`` is of distinct pattern p; ``of_head[h]`` the pattern of head h, None if all heads
    share pattern 0.
    """

    pattern: Pattern
    q_len: int
    kv_len: int
    patterns: tuple[Pattern, ...]
    orders: tuple[Order, ...]
    of_head: tuple[int, ...] | None

    def head_patterns(self, heads: int) -> tuple[int, ...]:
        """Which of the patterns each of so many heads has."""
        if self.of_head is not None and len(self.of_head) != heads:
            raise InvalidInput(f"the pattern is for {len(self.of_head)} heads, not {heads}: give one pattern a head")
        return self.of_head or (0,) * heads

    def order(self, head: int) -> Order:
        """The order of a head's elements."""
        return self.orders[self.of_head[head] if self.of_head else 0]

    def bases(self, heads: int) -> Ints:
        """int64 (heads + 1): where each head's values begin, counting those of all heads before it, and their end."""
        sizes = [self.orders[p].nnz for p in self.head_patterns(heads)]
        return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

    def values_shape(self, batch: int, heads: int) -> tuple[int, ...]:
        """The shape of values."""
        total = int(self.bases(heads)[-1])
        return (batch, total) if self.of_head else (batch, heads, self.orders[0].nnz)

    @property
    def nbytes(self) -> int:
        """Bytes of the tables made so far, forms of them for calls of different sizes not counted."""
        return sum(t.nbytes for side in ("_rows", "_columns") for t in self.__dict__.get(side, ()))

    # -- what kernels take ---------------------------------------------------------------------------------------------

    def tile_arguments(self, batch: int, heads: int, transposed: bool) -> tuple[Any, ...]:
        """The tables, ``first`` and ``bases`` of the kernels of a product (codegen/cpu_products.py)."""
        key = batch, heads, transposed
        if key not in self.ready:
            used = self.head_patterns(heads)
            sides = self._columns if transposed else self._rows
            (launch,) = launches([(side.tables,) for side in sides], list(used))
            first = np.concatenate([sides[p].first for p in sorted(set(used))])
            arguments = *table_arguments(launch, batch), exchange(first), exchange(self.bases(heads)[:-1])
            remember(self.ready, key, arguments)
        return self.ready[key]

    def row_arguments(self, batch: int, heads: int) -> tuple[Any, ...]:
        """indptr, pattern, bases and chunks of the kernels of a softmax (codegen/cpu_softmax.py)."""
        key = batch, heads, None
        if key not in self.ready:
            used = np.array(self.head_patterns(heads), np.int64)
            indptr = np.stack([order.indptr for order in self.orders])
            ends = np.cumsum(np.tile((np.diff(indptr, axis=1) + ROW_COST)[used].ravel(), batch))
            shares = workers()
            inner = np.searchsorted(ends, np.arange(1, shares) * (ends[-1] / shares))
            chunks = np.concatenate([[0], inner, [len(ends)]]).astype(np.int64)
            remember(self.ready, key, tuple(map(exchange, (indptr, used, self.bases(heads)[:-1], chunks))))
        return self.ready[key]

    @cached_property
    def ready(self) -> dict[tuple[Any, ...], tuple[Any, ...]]:
        """Tables as calls of different sizes take them, on CPUs and on GPUs."""
        return {}

    def tiles(self, transposed: bool) -> tuple[ValueTiles, ...]:
        """The walk over the tiles of each pattern, or over those of the transposed one, for GPUs."""
        sides = self._columns if transposed else self._rows
        return tuple(value_tiles(side, queries_are_rows=not transposed) for side in sides)

    @cached_property
    def _rows(self) -> tuple[ValueTables, ...]:
        return tuple(tile_values(order.acsr, order, queries_are_rows=True)[1] for order in self.orders)

    @cached_property
    def _columns(self) -> tuple[ValueTables, ...]:
        turned = (ACSR.from_pattern(one.transposed(), self.kv_len, self.q_len) for one in self.patterns)
        return tuple(tile_values(acsr, order, queries_are_rows=False)[1]
                     for acsr, order in zip(turned, self.orders, strict=True))  # fmt: skip


@lru_cache(maxsize=64)
def structure_of(pattern: Pattern, q_len: int, kv_len: int) -> Structure:
    """The structure of a mask, remembered. Raises Unsupported for masks that differ between batch entries."""
    if isinstance(pattern, PerBatch):
        raise Unsupported("values of masks that differ between batch entries have no shape in common: compute them for "
                          "each entry, with pattern.entry(b)")  # fmt: skip
    analyses = analyze_heads(pattern, q_len, kv_len)
    distinct, orders = tuple(analyses), tuple(map(Order, analyses.values()))
    of_head = tuple(distinct.index(one) for one in pattern.heads) if isinstance(pattern, PerHead) else None
    return Structure(pattern, q_len, kv_len, distinct, orders, of_head)


def tile_values(acsr: ACSR, order: Order, queries_are_rows: bool) -> tuple[Program, ValueTables]:
    """The unfused program of a mask (of a transposed one where queries are columns) and its tables for ``order``.

    It looks through the views that the cost model likes best, if one walk does and what a tile has of a query is in
    order.
    """
    for schedule in SCHEDULES:
        program = run_passes(lower(acsr), schedule, UNFUSED)
        ((_, domain),) = program.domains
        if not isinstance(domain, Cover):  # more than one row view
            continue
        tables = build_tables(domain)
        check_nnz((tables,), order.nnz)
        found = value_tables(tables, order, queries_are_rows)
        if found is not None:
            return program, found
    raise VerifyError("the tiles of a mask lost the order of its elements; please report this mask")
