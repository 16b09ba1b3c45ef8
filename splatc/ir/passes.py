"""The passes, in order. Each is a pure function (program, schedule) -> program; ``run_passes`` calls ``after``
between.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from splatc.formats.acsr import ACSR
from splatc.ir.choose import choose_regions
from splatc.ir.cover import cover
from splatc.ir.gather import gather_tiles
from splatc.ir.program import Attend, Cover, Mask, Program, Prune, Regions, Sddmm, Softmax, Spmm
from splatc.ir.score import NO_SCORE, Score


@dataclass(frozen=True)
class Schedule:
    """What passes need to know of the kernel.

    tile_m, tile_n: query rows and keys of a tile. views: whether it can look through strided views; max_row_views,
    max_col_views: how many views of tables a pass may have (None: any number). gather: a column tile can be a list of
    keys.
    fill_empty: the kernel takes no row tile without column tiles (for build_tables; passes do not need it).
    """

    tile_m: int = 64
    tile_n: int = 64
    views: bool = True
    max_row_views: int | None = None
    max_col_views: int | None = None
    gather: bool = False
    fill_empty: bool = False


Pass = Callable[[Program, Schedule], Program]


def lower(acsr: ACSR, score: Score = NO_SCORE) -> Program:
    """Masked attention as three operations over the mask, with what a Score adds to them."""
    prune = (Prune("s", "s", score.pruning),) if score.pruning else ()
    body = (Sddmm("s", "q", "k", "m", score.steps), *prune, Softmax("p", "lse", "s", score.sinks, score.dropout),
            Spmm("o", "p", "v"))  # fmt: skip
    return Program(acsr.q_len, acsr.kv_len, (("m", Mask(acsr)),), body)


def choose_views(program: Program, schedule: Schedule) -> Program:
    """
    mask m = acsr(...)  ->  regions m = [pieces seen through (row view, column view), ...]

    The views are the cheapest set under the cost model of ir/choose.py; where scores are pruned, the contiguous ones,
    in which groups of keys are whole. Requires a mask domain.
    """
    views = schedule.views and program.score.pruning is None
    domains = []
    for name, domain in program.domains:
        if isinstance(domain, Mask):
            domain = choose_regions(domain.acsr, schedule.tile_m, schedule.tile_n, views,
                                    schedule.max_row_views, schedule.max_col_views)  # fmt: skip
        domains.append((name, domain))
    return replace(program, domains=tuple(domains))


def fuse_attention(program: Program, schedule: Schedule) -> Program:
    """
    s = sddmm(q, k) over m
    p, lse = softmax(s)     ->   o, lse = attend(q, k, v) over m0
    o = spmm(p, v)               o, lse = attend(q, k, v) over m1 merging (o, lse)

    One attend for each row view of m, sinks in the first. Requires regions.
    """
    match tuple(op for op in program.body if not isinstance(op, Prune)):
        case (Sddmm(s, q, k, over), Softmax(p, lse, x), Spmm(o, probs, v)) if (s, p) == (x, probs):
            score = program.score
        case _:
            return program
    domain = program.domain(over)
    if not isinstance(domain, Regions):
        return program
    views = tuple(dict.fromkeys(region.rows for region in domain.regions))
    kept = tuple(item for item in program.domains if item[0] != over)
    domains, body = [], []
    for i, view in enumerate(views):
        part = tuple(region for region in domain.regions if region.rows == view)
        domains.append((f"{over}{i}", Regions(domain.q_len, domain.kv_len, part)))
        mine = replace(score, sinks=score.sinks and i == 0)
        body.append(Attend(o, lse, q, k, v, over=f"{over}{i}", merging=i > 0, score=mine))
    return replace(program, domains=kept + tuple(domains), body=tuple(body))


def cover_with_tiles(program: Program, schedule: Schedule) -> Program:
    """
    regions m0 = [...]  ->  cover m0 = tiles: items (row tiles) and entries (column tiles, full or partly filled)

    The first operation covers every row, so that empty rows are written too. Requires one row view a domain.
    """
    first = next((op.over for op in program.body if isinstance(op, Attend | Sddmm)), None)
    domains = []
    for name, domain in program.domains:
        if isinstance(domain, Regions) and len({region.rows for region in domain.regions}) == 1:
            domain = cover(domain.q_len, domain.kv_len, domain.regions, every_row=name == first)
        domains.append((name, domain))
    return replace(program, domains=tuple(domains))


def gather_columns(program: Program, schedule: Schedule) -> Program:
    """
    rows[0]: cols0[0] shape0, cols0[64] shape1, ...  ->  rows[0]: keys[0] shape0

    Where a row tile has many sparse tiles, the keys that they touch, in lists. Needs schedule.gather, and
    no pruning: lists of keys break its groups.
    """
    return _each_cover(program, gather_tiles) if schedule.gather and program.score.pruning is None else program


def order_longest_first(program: Program, schedule: Schedule) -> Program:
    """Items of a cover by falling number of tiles, so that a dynamic queue ends evenly; equal ones keep their place."""

    def order(cover: Cover) -> Cover:
        ends = np.concatenate([[0], np.cumsum(cover.entries[:, 4])])
        tiles = ends[cover.items[:, 3] + cover.items[:, 4]] - ends[cover.items[:, 3]]
        return replace(cover, items=cover.items[np.argsort(-tiles, kind="stable")])

    return _each_cover(program, order)


def _each_cover(program: Program, change: Callable[[Cover], Cover]) -> Program:
    domains = tuple((name, change(d) if isinstance(d, Cover) else d) for name, d in program.domains)
    return replace(program, domains=domains)


PASSES: tuple[Pass, ...] = (choose_views, fuse_attention, cover_with_tiles, gather_columns, order_longest_first)
UNFUSED: tuple[Pass, ...] = (choose_views, cover_with_tiles, order_longest_first)


def run_passes(program: Program, schedule: Schedule, passes: tuple[Pass, ...] = PASSES,
               after: Callable[[str, Program], None] | None = None) -> Program:  # fmt: skip
    """Run passes in order; ``after(name, program)`` is called before the first (as "lower") and after each one:
    verification, dumps and timings are uses of it."""
    if after:
        after("lower", program)
    for one in passes:
        program = one(program, schedule)
        if after:
            after(one.__name__, program)
    return program
