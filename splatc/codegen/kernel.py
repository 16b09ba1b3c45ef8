"""What a kernel is specialised on: everything else arrives at run time as tensors and int32 tables."""

from __future__ import annotations

from dataclasses import dataclass

from splatc.codegen.target import Target

DTYPES = ("float32", "float16", "bfloat16")


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

    @property
    def name(self) -> str:
        """A readable name: attention_d64_float32_m64n64."""
        dims = f"d{self.head_dim}" + (f"v{self.v_head_dim}" if self.v_head_dim != self.head_dim else "")
        return f"attention_{dims}_{self.dtype}_m{self.tile_m}n{self.tile_n}"
