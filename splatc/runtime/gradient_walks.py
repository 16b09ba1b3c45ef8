"""The two ways to gradients on a Hopper GPU, and which is faster for a mask: what they walk over, and predicted times.

one walk     over the transposed mask's tiles, five products each: dK, dV, and dQ in sums of integers. Passes over all
             rows of q, k and v find bounds, clear the sums and round them.
two walks    over the mask's tiles, three products each, for dQ, and the transposed mask's, four each, for dK and dV.

Seven products are dearer than five, but the fewer tiles there are the more those passes count. Wide heads take two
walks, the second of them twice: dV takes two products, dK three.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from splatc.codegen.costs import Costs, costs_of
from splatc.codegen.hopper.backward.shape import STATISTICS_BYTES
from splatc.codegen.hopper.shape import ITEM_BYTES, MAX_VIEWS
from splatc.codegen.kernel import KernelSpec
from splatc.runtime.plan import Launch
from splatc.runtime.tensors import Shape
from splatc.runtime.work import Work, work_of

if TYPE_CHECKING:
    from splatc.runtime.attention import Plan

PASS_BANDWIDTH = 3e6  # bytes a microsecond that passes over rows move
TOGETHER = 8  # heads whose walks are handed out side by side, measured: docs/decisions/38-queue-order.md

Planner = Callable[[int, int], "Plan"]


@dataclass(frozen=True)
class Sources:
    """What gradients of one mask are made from: plans by lengths.

    Of two walks: rows(q_len, kv_len), of the mask, for the kernel of dQ, and columns(kv_len, q_len), of the transposed
    mask, for the kernels ``two``; each chooses their tiles. Of one: one_walk(kv_len, q_len), of the transposed mask,
    for the kernel ``one``. judged_by: those of a mask that stands for this one where ways are compared.
    """

    rows: Planner
    columns: Planner
    one_walk: Planner
    one: KernelSpec
    two: tuple[KernelSpec, ...]
    judged_by: Sources | None = None


@dataclass(frozen=True)
class Walk:
    """A launch of a kernel that walks over tiles: of column tiles, every key head's query heads ``member`` ... of those
    that share it. height: rows of a row tile, keys of a column tile."""

    launch: Launch
    work: Work
    height: int
    member: int = 0
    members: int = 1


@dataclass(frozen=True)
class Way:
    """How gradients are computed: the walks of the kernel ``rows``, if there is one, and of ``columns``, which all go
    the same ones.

    microseconds: predicted for a call.
    """

    rows: KernelSpec | None
    columns: tuple[KernelSpec, ...]
    row_walks: tuple[Walk, ...]
    column_walks: tuple[Walk, ...]
    microseconds: float

    @property
    def walks(self) -> tuple[tuple[KernelSpec, Walk], ...]:
        """All of them in order, and a kernel of each."""
        rows = [(self.rows, one) for one in self.row_walks if self.rows is not None]
        return (*rows, *((self.columns[0], one) for one in self.column_walks))


def way_of(sources: Sources, shape: Shape, workers: int, wanted: str | None = None) -> Way:
    """The faster way for calls of these sizes on so many multiprocessors; or the one that is wanted, "one" or "two"."""
    if wanted is None and sources.judged_by is not None:
        wanted = "one" if way_of(sources.judged_by, shape, workers).rows is None else "two"
    makers = {"one": in_one_walk, "two": in_two_walks}
    ways = [make(sources, shape, workers) for name, make in makers.items() if wanted in (name, None)]
    return min(ways, key=lambda way: way.microseconds)


def in_one_walk(sources: Sources, shape: Shape, workers: int) -> Way:
    """dQ is summed on the way: K and V are read for bounds; zeros written, sums read and dQ written."""
    s, costs = shape, costs_of(sources.one, workers)
    item = ITEM_BYTES[s.dtype]
    moved = s.batch * s.kv_heads * s.kv_len * (s.head_dim + s.v_head_dim) * item
    moved += s.batch * s.heads * s.q_len * s.head_dim * (4 + 4 + item)
    columns = column_walks(sources.one_walk(s.kv_len, s.q_len), sources.one, s, workers)
    time = predicted(columns) + passes(moved + prepared(s), 3, costs)
    return Way(None, (sources.one,), (), columns, time)


def in_two_walks(sources: Sources, shape: Shape, workers: int) -> Way:
    """Each gradient has one writer."""
    s, plan = shape, sources.rows(shape.q_len, shape.kv_len)
    costs = costs_of(plan.spec, workers)
    rows = tuple(Walk(one, work_of(one, s.batch, costs, TOGETHER), plan.spec.tile_m)
                 for one in plan.launches(s.batch, s.heads, *MAX_VIEWS))  # fmt: skip
    transposed = sources.columns(s.kv_len, s.q_len)
    tile_m, tile_n = transposed.spec.tile_m, transposed.spec.tile_n
    kernels = tuple(replace(one, tile_m=tile_m, tile_n=tile_n) for one in sources.two)
    each = [column_walks(transposed, one, s, workers) for one in kernels]
    columns = each[-1]  # tables serve all kernels: long columns are cut for the last, which costs most
    time = predicted(rows) + sum(map(predicted, each)) + passes(prepared(s), 1, costs)
    return Way(plan.spec, kernels, rows, columns, time)


def predicted(walks: Sequence[Walk]) -> float:
    """Microseconds of launches, one after the other."""
    return sum(one.work.microseconds for one in walks)


def passes(moved: int, count: int, costs: Costs) -> float:
    """Microseconds of so many passes over rows that move so many bytes."""
    return moved / PASS_BANDWIDTH + count * costs.launch


def prepared(s: Shape) -> int:
    """Bytes that every way moves before it walks: O and dO, and statistics."""
    return s.batch * s.heads * s.q_len * (2 * s.v_head_dim * ITEM_BYTES[s.dtype] + STATISTICS_BYTES)


def column_walks(plan: Plan, spec: KernelSpec, shape: Shape, workers: int) -> tuple[Walk, ...]:
    """The launches of a column kernel: a tile is one for each query head that shares the key head."""
    costs, walks = costs_of(spec, workers), []
    for launch, member, members in column_launches(plan, shape):
        dearer = replace(costs, tile=costs.tile * members, bits=costs.bits * members)
        walks.append(Walk(launch, work_of(launch, shape.batch, dearer, TOGETHER), spec.tile_m, member, members))
    return tuple(walks)


def column_launches(plan: Plan, shape: Shape) -> list[tuple[Launch, int, int]]:
    """(launch, first member, members): one for all query heads of a key head where they have the same mask."""
    group = shape.heads // shape.kv_heads
    patterns = plan.patterns_of(shape.batch, shape.heads)
    same = all(p == patterns[i - i % group] for i, p in enumerate(patterns))
    found = []
    for member in range(1 if same else group):
        for launch in plan.launches(shape.batch, shape.heads, *MAX_VIEWS, members=slice(member, None, group)):
            merged = replace(launch, merge=launch.merge or member > 0)
            found.append((merged, member, group if same else 1))
    return found
