"""What a kernel is specialised on: everything else arrives at run time as tensors and int32 tables."""

from __future__ import annotations

from dataclasses import dataclass

from splatc.codegen.target import Target


@dataclass(frozen=True)
class KernelSpec:
    """The identity of one compiled kernel. Lengths, batch, heads and the mask are *not* part of it.

    dtype: "float32", "float16" or "bfloat16" for q, k, v and o (LSE and accumulation are float32).
    tile_m, tile_n: query rows and key columns of a tile.
    """

    head_dim: int
    v_head_dim: int
    dtype: str
    tile_m: int
    tile_n: int
    target: Target
