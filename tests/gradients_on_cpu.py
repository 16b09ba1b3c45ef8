"""The kernels of gradients on Hopper in NumPy, as docs/architecture.md has them: of their parameters and tables.

For tests of everything around the kernels: tensor maps, tables, splits, merging, scratch memory. float16; addresses are
the host's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from splatc.codegen.hopper.backward.shape import bound_rows, rows_of
from tests.hopper_on_cpu import ROWS, array, load, store, unpack_bits

LOG2E = 1.4426950408889634
F16 = np.float16


@dataclass(frozen=True)
class Tile:
    """What a row tile meets: the view and coordinates of a tile, the head of its tensors, its bits or None."""

    view: int
    at: tuple[int, int, int]
    head: int
    bits: Any


class Kernels:
    """All functions, by the name that they have in the generated source; d, dv: head dims."""

    def __init__(self, d: int, dv: int) -> None:
        self.d, self.dv = d, dv

    def functions(self, m: int, n: int) -> dict[str, Callable[..., None]]:
        """m, n: rows and columns of the tiles of the kernel's walk."""
        walks = {"rows": partial(self.rows, m, n), "columns": partial(self.columns, m, n),
                 "combine": partial(self.combine, m)}  # fmt: skip
        others = {name: getattr(self, name) for name in ("bounds", "prepare", "finish")}
        return {f"splatc_gradient_{name}_kernel": one for name, one in (walks | others).items()}

    # -- passes over rows ----------------------------------------------------------------------------------------------

    def bounds(self, grid: Any, **a: Any) -> None:
        assert a["rows"] == bound_rows(a["kv_len"], max(self.d, self.dv))
        assert a["blocks_a_head"] * a["rows"] >= a["kv_len"]
        out = array(a["bounds_ptr"], np.float32, grid[0], 2)
        for i in range(grid[0]):
            pair, block = divmod(i, a["blocks_a_head"])
            at = divmod(pair, a["kv_heads"])
            chosen = slice(block * a["rows"], (block + 1) * a["rows"])
            k, v = (head_rows(a, name, at, a["kv_len"], dim)[chosen] for name, dim in (("k", self.d), ("v", self.dv)))
            out[i] = np.abs(k).max(), np.linalg.norm(v.astype(np.float64), axis=1).max()

    def prepare(self, grid: Any, **a: Any) -> None:
        assert a["blocks_a_head"] == -(-a["q_len"] // rows_of(max(self.d, self.dv)))
        for pair in range(grid[0] // a["blocks_a_head"]):
            at = divmod(pair, a["heads"])
            o, do = (head_rows(a, name, at, a["q_len"], self.dv).astype(np.float64) for name in ("o", "do"))
            lse, dlse = (array(a[f"{name}_ptr"], np.float32, pair + 1, a["q_len"])[pair] for name in ("lse", "dlse"))
            out = array(a["statistics_ptr"], np.float32, pair + 1, a["q_len"], 4)[pair]
            delta = (o * do).sum(1) - dlse
            out[:, 0], out[:, 1], out[:, 2:] = np.where(np.isneginf(lse), 0, lse * LOG2E), delta, 0
            if "bounds_ptr" in a:
                kv_pair = at[0] * (a["heads"] // a["group"]) + at[1] // a["group"]
                both = array(a["bounds_ptr"], np.float32, kv_pair + 1, a["bound_blocks"], 2)[kv_pair].max(0)
                most = (np.linalg.norm(do, axis=1) * both[1] + np.abs(delta)) * both[0]
                out[:, 2] = 2.0 ** np.floor(np.log2(2.0**30 / np.maximum(most, 1e-20)))
                out[:, 3] = a["scale"] / out[:, 2]
                array(a["sums_ptr"], np.int32, pair + 1, a["q_len"], self.d)[pair] = 0

    def finish(self, grid: Any, **a: Any) -> None:
        for pair in range(grid[0] // a["blocks_a_head"]):
            dq = head_rows(a, "dq", divmod(pair, a["heads"]), a["q_len"], self.d)
            sums = array(a["sums_ptr"], np.int32, pair + 1, a["q_len"], self.d)[pair]
            dq[...] = sums * array(a["statistics_ptr"], np.float32, pair + 1, a["q_len"], 4)[pair, :, 3:]

    def combine(self, m: int, grid: Any, **a: Any) -> None:
        for batch, head, item, first, count, *_ in array(a["combine_ptr"], np.int32, grid[0] * 8 // m, 8).tolist():
            positions = array(a["positions_ptr"], np.int32, item + 1, m)[item]
            there = positions >= 0
            for name, dim in (("dq", self.d), ("dk", self.d), ("dv", self.dv)):
                if f"{name}_ptr" not in a:
                    continue
                parts = array(a[f"part_{name[1:]}_ptr"], F16, first + count, m, dim)[first:].astype(np.float64)
                out = head_rows(a, name, (batch, head), int(positions.max()) + 1, dim)
                old = out[positions[there]].astype(np.float64) if a["merge"] else 0
                out[positions[there]] = parts.sum(0)[there] + old

    # -- walks over tiles ----------------------------------------------------------------------------------------------

    def rows(self, m: int, n: int, grid: Any, **a: Any) -> None:
        assert grid == (a["blocks"], 1, 1) and not array(a["queue_ptr"], np.int32, 2).any()
        for row in array(a["work_ptr"], np.int32, a["total"], 12).tolist():
            batch, head, _, part, *at, _, _, view, _, _ = row

            def of_rows(name: str, dim: int) -> Any:
                return load(a[f"{name}_map{view}"], (*at, batch * a[f"{name}_step"] + head), dim)  # noqa: B023

            q, do, statistics = of_rows("q", self.d), of_rows("do", self.dv), of_rows("statistics", 4)
            assert len(q) == len(do) == len(statistics) == m
            dq = np.zeros((m, self.d))
            for tile in tiles(a, row, (m, n), [head // a["group"]]):
                k, v = (self.keys(a, name, tile, batch, n) for name in ("k", "v"))
                p = np.exp2(q @ k.T * a["scale"] * LOG2E - statistics[:, :1])
                ds = p * (do @ v.T - statistics[:, 1:2])
                dq += (ds if tile.bits is None else np.where(tile.bits, ds, 0)) @ k
            write(a, "dq", row, dq * a["scale"], part)

    def keys(self, a: dict[str, Any], name: str, tile: Tile, batch: int, n: int) -> Any:
        dim, last = self.d if name == "k" else self.dv, batch * a[f"{name}_step"] + tile.head
        if tile.view >= 0:
            return load(a[f"{name}_map{tile.view}"], (*tile.at, last), dim)
        rows = np.zeros((n, dim))
        for i, key in enumerate(array(a["gather_ptr"], np.int32, tile.at[0] + 1, n)[tile.at[0]].tolist()):
            if key >= 0:
                at = a[f"{name}_ptr"] + 2 * (last * a[f"{name}_last"] + key * a[f"{name}_row"])
                rows[i] = array(at, F16, dim)
        return rows

    def columns(self, m: int, n: int, grid: Any, **a: Any) -> None:
        assert grid == (a["blocks"], 1, 1) and not array(a["queue_ptr"], np.int32, 2).any()
        for row in array(a["work_ptr"], np.int32, a["total"], 12).tolist():
            batch, head, _, part, *at, _, _, view, _, _ = row
            dims = {"k": self.d, "v": self.dv, "dk": self.d, "dv": self.dv}
            assert ("v_map0" in a) == ("dk_map0" in a)  # dV alone is made without V
            keys = {name: load(a[f"{name}_map{view}"], (*at, batch * a[f"{name}_step"] + head), dims[name])
                    for name in ("k", "v") if f"{name}_map0" in a}  # fmt: skip
            made = {name: np.zeros((m, dims[name])) for name in ("dk", "dv") if f"{name}_map0" in a}
            first = head * a["group"] + a["member"]
            for tile in tiles(a, row, (m, n), range(first, first + a["members"])):
                q, do, statistics = (
                    load(a[f"{name}_map{tile.view}"], (*tile.at, batch * a[f"{name}_step"] + tile.head), dim)
                    for name, dim in (("q", self.d), ("do", self.dv), ("statistics", 4)))  # fmt: skip
                p = np.exp2(keys["k"] @ q.T * a["scale"] * LOG2E - statistics[:, 0])
                p = p if tile.bits is None else np.where(tile.bits, p, 0)
                if "dv" in made:
                    made["dv"] += p @ do
                if "dk" in made:
                    ds = p * (keys["v"] @ do.T - statistics[:, 1])
                    made["dk"] += ds @ q
                if "sums_map0" in a:
                    add(a, tile, batch, n, np.rint(ds.T @ keys["k"] * statistics[:, 2:3]).astype(np.int32))
            for name, values in made.items():
                write(a, name, row, values * a["scale"] if name == "dk" else values, part)


def tiles(a: dict[str, Any], row: list[int], size: tuple[int, int], heads: Any) -> Iterator[Tile]:
    """What a row of the work table meets, for each of the heads."""
    first, count, _, tiles, masked = row[7:]
    entries = array(a["entries_ptr"], np.int32, first + count, 8)[first:]
    assert tiles == entries[:, 3].sum() > 0 and masked == (entries[:, 4] > 0).sum()
    for head in heads:
        for x1, x2, x3, repeat, bits, view, d1, d2 in entries.tolist():
            shape = bits, size[0] // ROWS, 128, -(-size[1] // 64)
            mask = unpack_bits(array(a["bits_ptr"], np.uint32, *shape)[bits - 1], *size) if bits else None
            for r in range(repeat):
                yield Tile(view, (x1 + r * d1, x2 + r * d2, x3), head, mask)


def write(a: dict[str, Any], name: str, row: list[int], values: np.ndarray, part: int) -> None:
    """A result of a row tile to where it belongs, a warpgroup's rows at a time."""
    batch, head, _, _, *at, _, _, view, _, _ = row
    for w in range(len(values) // ROWS):
        half = values[w * ROWS : (w + 1) * ROWS]
        if part:
            store(a[f"part_{name[1:]}_map0"], ((part - 1) * len(values) + w * ROWS, 0, 0, 0), half)
            continue
        here = *(x + w * a[f"row_step{view}_{axis}"] for axis, x in enumerate(at, 1)), batch * a[f"{name}_step"] + head
        maps = a[f"{name}_map{view}"]
        store(maps, here, half + load(maps, here, values.shape[1]) if a["merge"] else half)


def add(a: dict[str, Any], tile: Tile, batch: int, n: int, values: np.ndarray) -> None:
    """Add to the sums of a tile's queries, 64 at a time, 32 columns at a time."""
    maps, last = a[f"sums_map{tile.view}"], batch * a["sums_step"] + tile.head
    for w in range(n // ROWS):
        steps = [a[f"sum_step{tile.view}_{axis}"] for axis in (1, 2, 3)] if w else [0, 0, 0]
        at = [x + step for x, step in zip(tile.at, steps)]
        for c in range(0, values.shape[1], maps.box[0]):
            old = maps.load((c, *at, last)).view(np.int32)
            old[:, : values.shape[1] - c] += values[w * ROWS : (w + 1) * ROWS, c : c + maps.box[0]]
            maps.store((c, *at, last), old.view(np.uint32))


def head_rows(a: dict[str, Any], name: str, of: tuple[int, int], count: int, dim: int) -> np.ndarray:
    """The rows of a batch entry and head, to read and write."""
    at = a[f"{name}_ptr"] + 2 * (of[0] * a[f"{name}_batch"] + of[1] * a[f"{name}_head"])
    step = a[f"{name}_seq"]
    flat = array(at, F16, (count - 1) * step + dim)
    return np.lib.stride_tricks.as_strided(flat, (count, dim), (2 * step, 2))
