"""explain(): what the compiler found in a mask, and what it will cost."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

from splatc.codegen.constants import ceil_div
from splatc.codegen.costs import Costs, costs_of
from splatc.codegen.hopper.shape import not_gathered
from splatc.codegen.kernel import KernelSpec
from splatc.codegen.tables import Tables
from splatc.formats.acsr import ACSR
from splatc.ir.program import Cover, Program
from splatc.runtime.cpu_call import workers

WASTEFUL = 8  # waste of scattered elements
KERNELS = {
    "cpu": "LLVM, vectors of queries",
    "portable": "portable CUDA, fp32 multiply-adds, no tensor cores",
    "hopper": "Hopper: TMA, tensor cores (wgmma)",
}


@dataclass(frozen=True)
class Explanation:
    """One head of a mask (the sum over distinct patterns for per-head masks). Areas are in elements.

    waste: tile_area / nnz. not_gathered: why scattered elements (much waste, few equal tiles) cannot become lists of
    keys on Hopper, None where they can or there are none. views: "rows / columns" of each pass. seconds: predicted for
    one head of batch 1 on a device kept busy by others (CompiledAttention.predict says it for a whole call); costs:
    where that was measured.
    """

    pattern: str
    q_len: int
    kv_len: int
    nnz: int
    density: float
    pieces: int
    remainder_nnz: int
    tiles: int
    full_tiles: int
    bit_tiles: int
    distinct_bits: int
    tile_area: int
    waste: float
    passes: int
    views: tuple[str, ...]
    table_bytes: int
    head_dim: int
    dtype: str
    target: str
    kernel: str
    tile: tuple[int, int]
    gathered_tiles: int
    not_gathered: str | None
    seconds: float
    costs: str
    pruning: str | None

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        kinds = f"{self.full_tiles} full, {self.bit_tiles} with bits, {self.distinct_bits} distinct"
        kinds += f", {self.gathered_tiles} gathered" if self.gathered_tiles else ""
        lines = [
            f"pattern      {self.pattern}",
            f"mask         {self.q_len} x {self.kv_len}, {self.nnz} elements attend ({self.density:.2%})",
            f"ACSR         {self.pieces} pieces, remainder of {self.remainder_nnz} elements",
            f"tiles        {self.tiles} ({kinds})",
            f"waste        {self.waste:.3f} (tile area / elements)",
            f"tables       {self.table_bytes / 1024:.0f} KiB",
        ]
        lines += [f"pass {i}       {view}" for i, view in enumerate(self.views)]
        rounded = ", products in tf32" if self.kernel == "hopper" and self.dtype == "float32" else ""
        if self.not_gathered:
            lines.append(f"no lists     of scattered keys: {self.not_gathered}")
        if self.pruning:
            lines.append(f"pruned       {self.pruning}: by scores, among the elements of the mask")
        lines.append(f"kernel       {KERNELS[self.kernel]}{rounded}, tiles of {self.tile[0]} x {self.tile[1]}")
        ms = f"{self.seconds * 1e3:.{3 if self.seconds >= 1e-4 else 5}f} ms"
        lines.append(f"predicted    {ms} a head (d={self.head_dim}, {self.dtype}, {self.target})")
        return "\n".join(lines)


def explain(
    pattern: str,
    acsrs: list[ACSR],
    programs: list[Program],
    tables: list[tuple[Tables, ...]],
    spec: KernelSpec,
) -> Explanation:
    """The explanation of a plan."""
    every = [t for passes in tables for t in passes]
    area = sum(t.tiles for t in every) * spec.tile_m * spec.tile_n
    nnz = sum(a.nnz for a in acsrs)
    distinct = sum(len(t.bits) for t in every if t.bit_tiles)
    scattered = area > WASTEFUL * nnz and 2 * distinct > sum(t.tiles for t in every)
    covers = [d for program in programs for _, d in program.domains if isinstance(d, Cover)]
    size = sum(a.q_len * a.kv_len for a in acsrs)
    costs = _costs(spec)
    busy = sum(costs.tile * t.tiles + costs.bits * t.bit_tiles + costs.gather * len(t.gather)
               + costs.item * len(t.items) for t in every)  # fmt: skip
    return Explanation(
        pattern=pattern, q_len=acsrs[0].q_len, kv_len=acsrs[0].kv_len, nnz=nnz, density=nnz / max(size, 1),
        pieces=sum(len(a.pieces) for a in acsrs), remainder_nnz=sum(a.remainder.nnz for a in acsrs),
        tiles=sum(t.tiles for t in every), full_tiles=sum(t.full_tiles for t in every),
        bit_tiles=sum(t.bit_tiles for t in every), distinct_bits=distinct,
        tile_area=area, waste=area / max(nnz, 1), passes=max(len(p) for p in tables),
        views=tuple(f"{c.rows} / {'; '.join(map(str, c.cols))}" for c in covers),
        table_bytes=sum(t.nbytes for t in every), head_dim=spec.head_dim, dtype=spec.dtype, target=str(spec.target),
        kernel=spec.kernel, tile=(spec.tile_m, spec.tile_n), gathered_tiles=sum(len(t.gather) for t in every),
        not_gathered=not_gathered(spec) if spec.kernel == "hopper" and scattered else None,
        seconds=busy / costs.workers * 1e-6, costs=costs.source,
        pruning=str(spec.score.pruning) if spec.score.pruning else None,
    )  # fmt: skip


def least_seconds(acsrs: Collection[ACSR], spec: KernelSpec) -> float:
    """What a plan of these masks takes at least, as ``Explanation.seconds``: full tiles and as few row tiles as there
    can be."""
    costs = _costs(spec)
    tiles = sum(a.nnz for a in acsrs) / (spec.tile_m * spec.tile_n)
    items = sum(ceil_div(a.q_len, spec.tile_m) for a in acsrs)
    return (costs.tile * tiles + costs.item * items) / costs.workers * 1e-6


def _costs(spec: KernelSpec) -> Costs:
    return costs_of(spec, workers() if spec.kernel == "cpu" else None)
