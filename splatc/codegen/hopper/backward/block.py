"""What all threads of a gradient block share: parameters, tables, places, shared memory, rings."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

from tvm.tirx.script.builder import ir as I

from splatc.codegen.hopper.backward.products import Places
from splatc.codegen.hopper.backward.shape import STAGES, Shape
from splatc.codegen.hopper.block import BATCH, ENTRIES, FIRST, HEAD, MESSAGE, int_arg, start_block, table
from splatc.codegen.hopper.copies import Maps, Point
from splatc.codegen.hopper.emit import Expr, let, loop
from splatc.codegen.hopper.ring import Cursor, Ring, of_warpgroups, of_warps
from splatc.codegen.hopper.shape import MAX_VIEWS
from splatc.codegen.hopper.shared_memory import SharedMemory
from splatc.codegen.hopper.terms import TermArguments


class Arguments:
    """The kernel's parameters (docs/architecture.md says what each holds). Rows are keys, columns are queries."""

    def __init__(self, s: Shape) -> None:
        rows, cols = MAX_VIEWS
        keys = ("k", "v") if s.makes("dk") else ("k",)
        self.keys, self.ends = ({name: Maps(name, rows) for name in names} for names in (keys, s.ends))
        self.q, self.do, self.statistics = (Maps(name, cols) for name in ("q", "do", "statistics"))
        self.walked = [*self.keys.values(), self.q, self.do, self.statistics]
        if s.makes("dq"):
            self.sums = Maps("sums", cols)
            self.walked.append(self.sums)
        self.parts = {name: Maps(f"part_{name[1:]}", 1) for name in s.ends}
        self.row_steps = [[int_arg(f"row_step{view}_{axis}") for axis in (1, 2, 3)] for view in range(rows)]
        if s.makes("dq") and s.halves_queries:
            self.sum_steps = [[int_arg(f"sum_step{view}_{axis}") for axis in (1, 2, 3)] for view in range(cols)]
        names = ("total", "blocks", "group", "member", "members", "merge")
        self.total, self.blocks, self.group, self.member, self.members, self.merge = map(int_arg, names)
        if not s.makes("dq"):
            self.follow = int_arg("follow")
        self.scale = I.arg("scale", I.float32())
        self.cap = I.arg("cap", I.float32())
        self.work = table("work", "int32", MESSAGE)
        self.entries = table("entries", "int32", 8)
        self.bits = table("bits", "uint32", s.bits_bytes // 4)
        self.counter = table("queue", "int32", 1)
        self.terms = TermArguments(s.score, table)
        if s.positional:
            self.positions = table("positions", "int32", s.keys)
        for maps in (*self.walked, *self.ends.values(), *self.parts.values()):
            maps.declare()


class Block:
    """What all threads of a block share: their places, shared memory, rings."""

    def __init__(self, s: Shape, a: Arguments) -> None:
        self.s, self.a = s, a
        self.index = I.cta_id([a.blocks])
        self.warpgroup = I.warpgroup_id([s.warpgroups + 1])
        self.warp = I.warp_id_in_wg([4])
        self.lane = I.lane_id([32])
        self.thread = I.thread_id([s.threads])
        pool = SharedMemory()
        counts = {**dict.fromkeys(a.keys, s.key_stages), "q": STAGES, "do": STAGES}
        if s.makes("dq"):
            counts["ds"] = STAGES
        stages = {"k": s.k_slot, "v": s.v_bytes, "q": s.q_bytes, "do": s.do_bytes, "ds": s.ds_bytes}
        self.stage_bytes = stages
        sizes = {name: count * stages[name] for name, count in counts.items()}
        ends = list(accumulate(sizes.values(), initial=0))  # multiples of 1024: these lie one after the other
        offsets = dict(zip(sizes, ends[:-1], strict=True))
        tiles = {name: pool.alloc((size // s.item_bytes,), s.dtype, align=1024) for name, size in sizes.items()}
        self.keys, self.q, self.do = {name: tiles[name] for name in a.keys}, tiles["q"], tiles["do"]
        self.tile_places = partial(Places, tiles["k"], offsets, stages)
        if s.makes("dq"):
            self.ds = tiles["ds"]
            self.sums = pool.alloc((s.warpgroups * s.sum_bytes // 4,), "int32", align=1024)
        self.statistics = pool.alloc((STAGES * s.statistics_bytes // 4,), "float32", align=128)
        self.bits = pool.alloc((STAGES * s.bits_bytes // 4,), "uint32", align=128)
        self.messages = pool.alloc((s.key_stages * MESSAGE,), "int32", align=16)  # rows of the work table
        self.masked = pool.alloc((STAGES,), "int32", align=8)  # whether the tile in a stage has mask bits
        if s.positional:
            self.heads = pool.alloc((STAGES,), "int32", align=8)  # the query head of the tile in a stage
        warps = of_warps(4 * s.warpgroups)
        groups = of_warpgroups(s.warpgroups)
        self.k_ring = Ring(pool, s.key_stages, readers=groups + s.makes("dq"))  # one more: who sends dQ
        self.key_rings = {"k": self.k_ring}
        if s.makes("dk"):
            self.v_ring = self.key_rings["v"] = Ring(pool, s.key_stages, readers=groups)
        self.q_ring = Ring(pool, STAGES, readers=warps)
        self.do_ring = Ring(pool, STAGES, readers=warps)
        self.rings = [*self.key_rings.values(), self.q_ring, self.do_ring]
        if s.makes("dq"):
            self.ds_ring = Ring(pool, STAGES, readers=warps, writers=warps)
            self.sums_ring = Ring(pool, s.warpgroups, readers=1, writers=of_warps(4))  # a stage a warpgroup
            self.rings += [self.ds_ring, self.sums_ring]
        self.old_ring = Ring(pool, s.warpgroups, readers=1)  # the earlier pass's results, a stage a warpgroup
        self.rings.append(self.old_ring)
        pool.commit()
        self.smem_bytes = pool.size

    def start(self) -> None:
        """Set up what the block shares. A walk without dQ may run beside the end of the walk over rows before it."""
        start_block(self.thread, self.a.walked, self.rings, None if self.s.makes("dq") else self.a.follow)

    def slot(self, at: Cursor) -> Expr:
        """The stage of K and V that a cursor is at."""
        return at.stage() if self.s.key_stages > 1 else 0

    def message(self, at: Cursor, *words: tuple[str, int]) -> list[Expr]:
        """Words about the column tile that a cursor is at, by name."""
        return [let(name, self.messages[self.slot(at) * MESSAGE + word]) for name, word in words]

    def tiles(self, at: Cursor) -> Iterator[Tile]:
        """Emit what follows for every tile of queries of the column tile that a cursor is at: one query head after the
        other, of those that share the keys' head."""
        a = self.a
        batch, head, first, entries = self.message(
            at, ("batch", BATCH), ("kv_head", HEAD), ("first", FIRST), ("entries", ENTRIES))  # fmt: skip
        with loop(a.members) as m:
            q_head = let("q_head", head * a.group + a.member + m)
            with loop(entries) as e:
                x1, x2, x3, repeat, bits, view, d1, d2 = (
                    let(name, a.entries[first + e, i])
                    for i, name in enumerate(("q1", "q2", "q3", "repeat", "bits", "q_view", "d1", "d2")))  # fmt: skip
                with loop(repeat) as r:
                    yield Tile(view, Point(x1 + r * d1, x2 + r * d2, x3, batch, q_head), bits)


@dataclass(frozen=True)
class Tile:
    """A tile of queries. bits: 0, or 1 + the index of its mask bits."""

    view: Expr
    at: Point
    bits: Expr
