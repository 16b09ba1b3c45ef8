"""What the parts of a kernel cost, measured once on a device (`splatc tune --calibrate`) and kept in costs.json, or in
the file that SPLATC_COSTS names."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from splatc.codegen.hopper.shape import WARPGROUP_ROWS, shape_of
from splatc.codegen.kernel import BACKWARD, COLUMNS, DK_ALONE, DV_ALONE, FORWARD, ROWS, KernelSpec
from splatc.config import costs_file
from splatc.errors import InvalidInput

FILE = Path(__file__).with_name("costs.json")
NEEDED = "device", "date", "multiprocessors", "bandwidth_gb_s", "launch_us", "combine_us", "part_us", "kernels"
CURE = "`splatc tune --calibrate -o FILE`"


@dataclass(frozen=True)
class Costs:
    """Microseconds, of one multiprocessor (a CPU core) unless said.

    tile: a full column tile of a row tile; bits: more for a tile with mask bits; gather: more for a tile that
    is a list of keys; item: to start and finish a row tile.
    launch: of the whole device, from start to end of a kernel that does nothing; combine: putting split rows together;
    part: of the whole device too, for each part of those rows, beyond its share of their tiles.
    bandwidth: bytes a microsecond of device memory. workers: multiprocessors (cores). source: where and when measured.
    """

    tile: float
    bits: float
    item: float
    launch: float
    combine: float
    bandwidth: float
    workers: int
    source: str
    gather: float = 0.0
    part: float = 0.0

    def shared(self, blocks: int) -> Costs:
        """The same of one block of so many that share a multiprocessor: as many workers more, as much slower each."""
        return replace(self, tile=self.tile * blocks, bits=self.bits * blocks, item=self.item * blocks,
                       gather=self.gather * blocks, workers=self.workers * blocks)  # fmt: skip


# Sustained rates of the tile loops, a multiply-add counted as two operations (docs/performance.md). CPU: a Zen 4 core;
# portable CUDA: an H200.
CPU_CORE_FLOPS = 90e9
PORTABLE_FLOPS = 18e12
# Tiles of Hopper's gradients in forward tiles, for head dims up to 64 and beyond: five products for two, four, three.
# Estimates, not calibrated, from dense rates in an experiment: 515, 620 and 630 TFLOP/s, and 586, 610 and 720. dV and
# dK alone take two products and three: shares of COLUMNS.
GRADIENT_TILES = {
    BACKWARD: (2.3, 2.3), COLUMNS: (1.5, 1.8), ROWS: (1.1, 1.5), DV_ALONE: (0.8, 0.9), DK_ALONE: (1.1, 1.4),
}  # fmt: skip
LOW_COLUMNS = 1.2  # times as dear, for its area, is a tile of 64 keys in COLUMNS (one H200, head dim 64, 17 masks)
STARTING_TILES = 0.4  # what starting a row tile costs these two kernels, in tiles


def costs_of(spec: KernelSpec, workers: int | None = None) -> Costs:
    """The costs of a kernel; ``workers`` defaults to the calibrated device's (one, for a CPU).

    A Hopper kernel that was not measured is scaled, by its multiply-adds, from one of its kind of dtype (16 bits, or
    float32 by tf32), if there is any, of the nearest head_dim.
    """
    table = _table()
    if spec.kernel != "hopper":
        workers = workers or (1 if spec.kernel == "cpu" else table["multiprocessors"])
        rate = CPU_CORE_FLOPS if spec.kernel == "cpu" else PORTABLE_FLOPS / workers
        tile = _operations(spec.tile_m, spec.tile_n, spec.head_dim, spec.v_head_dim) / rate * 1e6
        return Costs(tile, 0.0, STARTING_TILES * tile, 0.0, 0.0, float("inf"), workers, "fixed rates")
    head_dim = (spec.head_dim + spec.v_head_dim) / 2

    def distance(kernel: dict[str, Any]) -> tuple[float, ...]:
        other = (kernel["dtype"] == "float32") != (spec.dtype == "float32")
        rows, columns = abs(kernel["tile_m"] - spec.tile_m), abs(kernel["tile_n"] - spec.tile_n)
        return other, abs(kernel["head_dim"] - head_dim), -kernel["head_dim"], rows > 0, columns

    near = min(table["kernels"], key=distance)
    scale = _operations(spec.tile_m, spec.tile_n, head_dim, head_dim) / _operations(
        near["tile_m"], near["tile_n"], near["head_dim"], near["head_dim"])  # fmt: skip
    if spec.role in GRADIENT_TILES:
        low = spec.role == COLUMNS and spec.tile_m == WARPGROUP_ROWS
        scale *= GRADIENT_TILES[spec.role][head_dim > 64] * (LOW_COLUMNS if low else 1)
    costs = Costs(near["tile_us"] * scale, near["bits_us"] * scale, near["item_us"], table["launch_us"],
                  table["combine_us"], table["bandwidth_gb_s"] * 1e3, workers or table["multiprocessors"],
                  _source(table), near["gather_us"] * scale, table["part_us"])  # fmt: skip
    return costs.shared(_blocks(spec))


def _blocks(spec: KernelSpec) -> int:
    """Blocks of a Hopper kernel that share a multiprocessor: more than one only where tiles are of 64 rows or keys."""
    if spec.tile_m != WARPGROUP_ROWS or spec.role not in (FORWARD, ROWS, COLUMNS):
        return 1
    if spec.role == FORWARD:
        return shape_of(spec).blocks
    from splatc.codegen.hopper.backward import shape as backward  # gradients are not always asked for

    return (backward.row_shape_of if spec.role == ROWS else backward.shape_of)(spec).blocks


def _operations(tile_m: int, tile_n: int, head_dim: float, v_head_dim: float) -> float:
    return 2 * tile_m * tile_n * (head_dim + v_head_dim)


def source() -> str:
    """Where and when the costs of Hopper kernels were measured: "NVIDIA H200, 2026-11-28"."""
    return _source(_table())


def _source(table: dict[str, Any]) -> str:
    return f"{table['device']}, {table['date']}"


def _table() -> dict[str, Any]:
    return _read(costs_file() or FILE)


@cache
def _read(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text())
        missing = [name for name in NEEDED if name not in table]
    except (OSError, ValueError, TypeError) as error:
        raise InvalidInput(f"SPLATC_COSTS: {path} cannot be read as JSON ({error}): write it anew by {CURE}") from None
    if missing or not table["kernels"]:
        what = f"has no {', '.join(missing) or 'kernels'}"
        raise InvalidInput(f"SPLATC_COSTS: {path} {what}: write it anew by {CURE}")
    return dict(table)
