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
from splatc.ir.program import Attend, Cover, Mask, Program, Regions, Sddmm, Softmax, Spmm


@dataclass(frozen=True)
class Schedule:
    """What passes need to know of the target: the tile side lengths, and whether it can look through strided views."""

    tile_m: int = 64
    tile_n: int = 64
    views: bool = True


Pass = Callable[[Program, Schedule], Program]


def lower(acsr: ACSR) -> Program:
    """Masked attention as three operations over the mask."""
    body = (Sddmm("s", "q", "k", over="m"), Softmax("p", "lse", "s"), Spmm("o", "p", "v"))
    return Program(acsr.q_len, acsr.kv_len, (("m", Mask(acsr)),), body)


def choose_views(program: Program, schedule: Schedule) -> Program:
    """
    mask m = acsr(...)  ->  regions m = [pieces seen through (row view, column view), ...]

    The views are the cheapest set under the cost model of ir/choose.py. Requires a mask domain.
    """
    domains = []
    for name, domain in program.domains:
        if isinstance(domain, Mask):
            domain = choose_regions(domain.acsr, schedule.tile_m, schedule.tile_n, schedule.views)
        domains.append((name, domain))
    return replace(program, domains=tuple(domains))


def fuse_attention(program: Program, schedule: Schedule) -> Program:
    """
    s = sddmm(q, k) over m
    p, lse = softmax(s)     ->   o, lse = attend(q, k, v) over m0
    o = spmm(p, v)               o, lse = attend(q, k, v) over m1 merging (o, lse)

    One attend for each row view of m. Requires regions.
    """
    match program.body:
        case (Sddmm(s, q, k, over), Softmax(p, lse, x), Spmm(o, probs, v)) if (s, p) == (x, probs):
            pass
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
        body.append(Attend(o, lse, q, k, v, over=f"{over}{i}", merging=i > 0))
    return replace(program, domains=kept + tuple(domains), body=tuple(body))


def cover_with_tiles(program: Program, schedule: Schedule) -> Program:
    """
    regions m0 = [...]  ->  cover m0 = tiles: items (row tiles) and entries (column tiles, full or partly filled)

    The first attend covers every row, so that empty rows are written too. Requires one row view a domain.
    """
    first = next((op.over for op in program.body if isinstance(op, Attend)), None)
    domains = []
    for name, domain in program.domains:
        if isinstance(domain, Regions) and len({region.rows for region in domain.regions}) == 1:
            domain = cover(domain.q_len, domain.kv_len, domain.regions, every_row=name == first)
        domains.append((name, domain))
    return replace(program, domains=tuple(domains))


def order_longest_first(program: Program, schedule: Schedule) -> Program:
    """Items of a cover by falling number of tiles, so that a dynamic queue ends evenly; equal ones keep their place."""
    domains = []
    for name, domain in program.domains:
        if isinstance(domain, Cover):
            ends = np.concatenate([[0], np.cumsum(domain.entries[:, 4])])
            tiles = ends[domain.items[:, 3] + domain.items[:, 4]] - ends[domain.items[:, 3]]
            domain = replace(domain, items=domain.items[np.argsort(-tiles, kind="stable")])
        domains.append((name, domain))
    return replace(program, domains=tuple(domains))


PASSES: tuple[Pass, ...] = (choose_views, fuse_attention, cover_with_tiles, order_longest_first)
UNFUSED: tuple[Pass, ...] = (choose_views,)


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
