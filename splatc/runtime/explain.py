"""explain(): what the compiler found in a mask, and what it will cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from splatc.codegen.kernel import KernelSpec
from splatc.codegen.tables import Tables
from splatc.formats.acsr import ACSR
from splatc.ir.program import Cover, Program
from splatc.runtime.plan import ITEM_TILES

KERNELS = {"cpu": "LLVM, vectors of queries", "cuda": "portable CUDA, fp32 multiply-adds, no tensor cores"}
# Sustained rates of the tile loops, a multiply-add counted as two operations (docs/performance.md). CPU: a Zen 4 core;
# CUDA: the portable kernel on an H200.
CPU_CORE_FLOPS = 90e9
CUDA_FLOPS = 18e12


@dataclass(frozen=True)
class Explanation:
    """One head of a mask (the sum over distinct patterns for per-head masks). Areas are in elements.

    waste: tile_area / nnz. views: "rows / columns" of each pass. seconds: predicted for one head of batch 1.
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
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        kinds = f"{self.full_tiles} full, {self.bit_tiles} with bits, {self.distinct_bits} distinct"
        lines = [
            f"pattern      {self.pattern}",
            f"mask         {self.q_len} x {self.kv_len}, {self.nnz} elements attend ({self.density:.2%})",
            f"ACSR         {self.pieces} pieces, remainder of {self.remainder_nnz} elements",
            f"tiles        {self.tiles} ({kinds})",
            f"waste        {self.waste:.3f} (tile area / elements)",
            f"tables       {self.table_bytes / 1024:.0f} KiB",
        ]
        lines += [f"pass {i}       {view}" for i, view in enumerate(self.views)]
        lines.append(f"kernel       {KERNELS[self.target.partition(':')[0]]}")
        lines.append(
            f"predicted    {self.seconds * 1e3:.3f} ms a head (d={self.head_dim}, {self.dtype}, {self.target})"
        )
        return "\n".join(lines)


def explain(
    pattern: str,
    acsrs: list[ACSR],
    programs: list[Program],
    tables: list[tuple[Tables, ...]],
    spec: KernelSpec,
    cores: int,
) -> Explanation:
    """The explanation of a plan."""
    every = [t for passes in tables for t in passes]
    area = sum(t.tiles for t in every) * spec.tile_m * spec.tile_n
    starts = ITEM_TILES * sum(len(t.items) for t in every) * spec.tile_m * spec.tile_n
    nnz = sum(a.nnz for a in acsrs)
    covers = [d for program in programs for _, d in program.domains if isinstance(d, Cover)]
    size = sum(a.q_len * a.kv_len for a in acsrs)
    rate = CPU_CORE_FLOPS * cores if spec.target.kind == "cpu" else CUDA_FLOPS
    return Explanation(
        pattern=pattern, q_len=acsrs[0].q_len, kv_len=acsrs[0].kv_len, nnz=nnz, density=nnz / max(size, 1),
        pieces=sum(len(a.pieces) for a in acsrs), remainder_nnz=sum(a.remainder.nnz for a in acsrs),
        tiles=sum(t.tiles for t in every), full_tiles=sum(t.full_tiles for t in every),
        bit_tiles=sum(t.bit_tiles for t in every), distinct_bits=sum(len(t.bits) for t in every if t.bit_tiles),
        tile_area=area, waste=area / max(nnz, 1), passes=max(len(p) for p in tables),
        views=tuple(f"{c.rows} / {'; '.join(map(str, c.cols))}" for c in covers),
        table_bytes=sum(t.nbytes for t in every), head_dim=spec.head_dim, dtype=spec.dtype, target=str(spec.target),
        seconds=2 * (area + starts) * (spec.head_dim + spec.v_head_dim) / rate,
    )  # fmt: skip
