"""The queue of a launch: who gets which row tile when, and which row tiles are cut into parts."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from splatc import patterns as P
from splatc.codegen.costs import Costs, costs_of
from splatc.codegen.kernel import kernel_spec, tile_shapes
from splatc.codegen.target import Target
from splatc.compile import best_plan
from splatc.patterns import as_pattern
from splatc.runtime.plan import Launch
from splatc.runtime.work import AHEAD, LATE, LEAST, TOGETHER, cut_rows, finish, queue_order, work_of

COSTS = Costs(tile=1.6, bits=0.1, item=1.7, launch=4.5, combine=4.0, bandwidth=4e6, workers=132, source="a test",
              part=0.02)  # fmt: skip
HOPPER = Target("cuda", "sm_90a")


def launch_of(text: str, q_len: int, heads: int = 4, kv_len: int | None = None, head_dim: int = 128) -> Launch:
    spec = kernel_spec(head_dim, None, "bfloat16", HOPPER)
    plan = best_plan(as_pattern(text), q_len, kv_len or q_len, spec)
    return plan.launches(1, heads)[0]


def tiles_of(entries: np.ndarray, first: int, count: int) -> list[tuple[int, ...]]:
    """Column tiles of entries, repetitions written out: origin, view and bits of each."""
    return [(x1 + r * d1, x2 + r * d2, x3, bits, view)
            for x1, x2, x3, repeat, bits, view, d1, d2 in entries[first : first + count].tolist()
            for r in range(repeat)]  # fmt: skip


def test_finish_is_a_queue() -> None:
    rng = np.random.default_rng()
    for _ in range(50):
        cost, workers = rng.uniform(0.1, 5, rng.integers(1, 60)), int(rng.integers(1, 9))
        free = [0.0] * workers
        wanted = []
        for c in cost:
            at = int(np.argmin(free))
            free[at] += c
            wanted.append(free[at])
        np.testing.assert_allclose(finish(cost, workers), wanted)
        at = int(rng.integers(0, len(cost)))
        assert np.array_equal(finish(cost[at:], workers, finish(cost[:at], workers)), finish(cost, workers)[at:])


def test_some_heads_together_the_longest_rows_first_but_none_too_late() -> None:
    """Each row once; those of the same cost and heads in the order given; what would begin late has moved forward."""
    rng = np.random.default_rng()
    for _ in range(50):
        cost, workers = rng.integers(1, 9, rng.integers(0, 300)).astype(float), int(rng.integers(1, 9))
        head, together = np.sort(rng.integers(0, 12, len(cost))), int(rng.integers(1, 6))
        order = queue_order(cost, head, workers, together)
        assert sorted(order.tolist()) == list(range(len(cost)))
        place, group = np.argsort(order), head // together
        wanted = sorted(range(len(cost)), key=lambda i: (group[i], -cost[i], i))
        begins = np.cumsum(cost[wanted]) - cost[wanted]
        latest = cost[wanted].sum() - AHEAD * cost[wanted] * workers
        early = np.array(wanted, np.int64)[begins <= latest]
        assert (np.diff(place[early]) > 0).all()  # rows that begin early enough are in that order
        for c, g in {*zip(cost.tolist(), group.tolist(), strict=True)}:
            assert (np.diff(place[(cost == c) & (group == g)]) > 0).all()
        for g in set(group.tolist()):
            assert (np.diff(cost[order][group[order] == g]) <= 0).all()


@pytest.mark.parametrize("text", ["causal", "causal | prefix(1024)", "causal & window(1023, 0)"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_rows_of_unequal_length_end_together(text: str, head_dim: int) -> None:
    """Whole rows do, where heads one after the other would leave multiprocessors waiting."""
    launch = launch_of(text, 8192, heads=16, head_dim=head_dim)
    head, item = launch.work.T
    items = launch.items[item]
    cost = COSTS.item + COSTS.tile * items[:, 6] + COSTS.bits * items[:, 7]
    work = work_of(launch, 1, COSTS)
    end = work.microseconds - COSTS.launch
    assert not work.part_tiles
    assert end < finish(cost, COSTS.workers).max() and end < 1.08 * cost.sum() / COSTS.workers
    assert end == pytest.approx(finish(cost[queue_order(cost, head, COSTS.workers, TOGETHER)], COSTS.workers).max())


@pytest.mark.parametrize(
    ("text", "length", "heads", "batch"),
    [("full", 8192, 16, 1), ("longformer(256, 64)", 4096, 4, 2), ("causal", 2048, 3, 1),
     ("full", 128, 2, 1), ("residue(8)", 1000, 2, 3)],
)  # fmt: skip
def test_parts_hold_every_tile_once(text: str, length: int, heads: int, batch: int) -> None:
    if text == "residue(8)":
        text = "strided(8)"
    launch = launch_of(text, length, heads, kv_len=16384 if length == 128 else None)
    work = work_of(launch, batch, COSTS)
    wanted: Counter[tuple[int, ...]] = Counter()
    for b in range(batch):
        for head, item in launch.work.tolist():
            first, count = launch.items[item, 3:5].tolist()
            wanted.update((b, head, item, *tile) for tile in tiles_of(launch.entries, first, count))
    got: Counter[tuple[int, ...]] = Counter()
    for b, head, item, _part, x1, x2, x3, first, count, view, tiles, masked in work.rows.tolist():
        assert [x1, x2, x3, view] == launch.items[item, [0, 1, 2, 5]].tolist()
        mine = tiles_of(work.entries, first, count)
        assert len(mine) == tiles > 0
        assert [tile[3] > 0 for tile in mine] == [i < masked for i in range(tiles)]  # those with bits first
        got.update((b, head, item, *tile) for tile in mine)
    assert got == wanted
    parts = work.rows[work.rows[:, 3] > 0]
    assert sorted(parts[:, 3].tolist()) == list(range(1, work.part_tiles + 1))  # each scratch tile written once
    for b, head, item, first, count, *_ in work.combine.tolist():
        mine = parts[(parts[:, :3] == [b, head, item]).all(1)]
        assert sorted(mine[:, 3].tolist()) == list(range(first + 1, first + 1 + count))


def test_cutting_saves_time() -> None:
    """What it is for: a last wave of few rows, a global token's long row, one row tile of many keys."""
    cases = {
        "last wave": np.full(688, 64),
        "long rows": np.tile(np.concatenate([[64], np.full(63, 6)]), 16),
        "decoding": np.full(8, 256),
    }
    for name, tiles in cases.items():
        cost = COSTS.item + COSTS.tile * tiles
        parts, end = cut_rows(cost, tiles, COSTS)
        assert (parts > 1).any(), name
        assert (tiles // parts >= LEAST).all()
        before = finish(cost, COSTS.workers).max()
        after = finish(np.repeat((cost - COSTS.item) / parts + COSTS.item, parts), COSTS.workers).max()
        extra = COSTS.combine + COSTS.part * parts[parts > 1].sum()
        assert after + extra < before, name
        assert end == pytest.approx(after + extra)


def test_rows_that_are_not_much_too_late_may_stay_whole() -> None:
    """Of a global token's long row and a last wave that ends a little later than even work would: the row alone is cut,
    because parts cost something too."""
    tiles = np.repeat([128, 10], [16, 16 * 127])
    costs = replace(COSTS, tile=0.9, workers=396)
    cost = costs.item + costs.tile * tiles
    parts, _ = cut_rows(cost, tiles, costs)
    assert (parts[tiles == 128] > 1).all() and (parts[tiles == 10] == 1).all()
    assert (finish(cost, costs.workers)[tiles == 10] > cost.sum() / costs.workers * (1 + min(LATE))).any()


def test_even_work_stays_whole() -> None:
    for tiles in (np.full(132 * 8, 64), np.full(1024, 1), np.repeat(np.arange(64, 0, -1), 33)):
        assert (cut_rows(COSTS.item + COSTS.tile * tiles, tiles, COSTS)[0] == 1).all()


def test_many_rows_are_not_simulated() -> None:
    tiles = np.full(1 << 17, 5)
    tiles[7] = 1 << 18
    parts, _ = cut_rows(COSTS.item + COSTS.tile * tiles, tiles, COSTS)
    assert parts[7] > 1
    assert (np.delete(parts, 7) == 1).all()


def test_costs_scale_with_work() -> None:
    """Kernels that were not measured are scaled from one that was."""
    spec = kernel_spec(128, None, "bfloat16", HOPPER)
    half = kernel_spec(96, None, "bfloat16", HOPPER)
    assert costs_of(half).tile == pytest.approx(costs_of(spec).tile * 96 / 128)
    for head_dim, dtype in itertools.product((16, 64, 128, 192, 256), ("bfloat16", "float32")):
        one = kernel_spec(head_dim, None, dtype, HOPPER)
        assert (one.tile_m, one.tile_n) in tile_shapes(one)
        assert 0 < costs_of(one).tile < 10


def test_costs_of_dtypes() -> None:
    """16-bit types cost the same; float32 has costs of its own, by which full attention takes what was measured."""
    half, other = (costs_of(kernel_spec(128, None, dtype, HOPPER)) for dtype in ("bfloat16", "float16"))
    assert half == other
    for head_dim, microseconds in ((64, 866.3), (128, 2014.8), (192, 3858.9), (256, 5756.7)):  # of another run
        spec = kernel_spec(head_dim, None, "float32", HOPPER)
        plan = best_plan(P.full(), 8192, 8192, spec)
        assert plan.predict(1, 16, 16) * 1e6 == pytest.approx(microseconds, rel=0.15)
    far = costs_of(kernel_spec(96, None, "float32", HOPPER))
    near = costs_of(kernel_spec(128, None, "float32", HOPPER))
    assert far.tile == pytest.approx(near.tile * 96 / 128)
    assert far.tile / (128 * 64) > 2 * costs_of(kernel_spec(96, None, "bfloat16", HOPPER)).tile / (128 * 128)


def half_in_one_row(n: int, tile: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """Whole tiles: all of one row block and one in every other; two in each."""
    rows = -(-n // tile)
    even = np.eye(rows, dtype=bool) | np.roll(np.eye(rows, dtype=bool), 1, axis=1)
    uneven = np.eye(rows, dtype=bool)
    uneven[rows // 3] = True
    return uneven, even


@pytest.mark.parametrize("n", [8192, 16384])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_half_of_the_work_in_one_row_block(n: int, head_dim: int) -> None:
    """Predicted for 16 heads: within 1.3 of as many tiles evenly, as the row is cut into parts."""
    times = []
    for blocks in half_in_one_row(n):
        spec = kernel_spec(head_dim, None, "bfloat16", HOPPER)
        plan = best_plan(P.block_mask(blocks, 128), n, n, spec)
        work = work_of(plan.launches(1, 16)[0], 1, costs_of(plan.spec, 132))
        times.append(work.microseconds)
        assert len(work.combine) == (0 if times[1:] else 16 * 128 // plan.spec.tile_m)
    assert times[0] <= 1.3 * times[1]


@pytest.mark.parametrize("workers", [2, 4, 8])
def test_half_of_the_work_in_one_row_block_on_a_cpu(workers: int) -> None:
    """Whole rows, in shares of equal cost: with as many heads as workers or more none has 1.3 times its part."""
    spec = kernel_spec(64, None, "float32", Target("cpu", "native"))
    launch = best_plan(P.block_mask(half_in_one_row(4096)[0], 128), 4096, 4096, spec).launches(1, 8)[0]
    ends = np.concatenate([[0], np.cumsum(launch.cost)])
    shares = np.diff(ends[launch.chunks(1, workers)])
    assert shares.max() <= 1.3 * shares.mean()
