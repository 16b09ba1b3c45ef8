"""What a kernel is specialised on: everything else arrives at run time as tensors and int32 tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from splatc.codegen.target import Target
from splatc.errors import InvalidInput

DTYPES = ("float32", "float16", "bfloat16")
TILE_M = TILE_N = 64  # of the CPU and the portable CUDA kernel: see docs/decisions/3-tiles-and-lanes.md


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


def kernel_spec(head_dim: int, v_head_dim: int | None, dtype: Any, target: Target) -> KernelSpec:
    """The spec that a user's options name; dtype may be torch's. Raises InvalidInput."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise InvalidInput(f"dtype is {dtype}: it must be one of {', '.join(DTYPES)}")
    for what, value in (("head_dim", head_dim), ("v_head_dim", v_head_dim)):
        if value is not None and (not isinstance(value, int) or not 1 <= value <= 256):
            raise InvalidInput(f"{what} is {value!r}: it must be a whole number from 1 to 256")
    return KernelSpec(head_dim, v_head_dim or head_dim, name, TILE_M, TILE_N, target)
