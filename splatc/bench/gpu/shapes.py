"""Sizes of one attention call, and fresh random tensors of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from splatc.codegen.hopper.shape import ITEM_BYTES

SETS, LARGE_SETS, LARGE = 6, 2, 1 << 30  # input sets to rotate over, and how many of those above LARGE bytes


@dataclass(frozen=True)
class Shape:
    """q: (batch, heads, seq_len, head_dim); k, v: (batch, kv_heads, seq_len, head_dim), all of ``dtype``."""

    seq_len: int
    head_dim: int
    batch: int = 1
    heads: int = 16
    kv_heads: int = 16
    dtype: str = "bfloat16"

    @staticmethod
    def of(record: Mapping[str, Any]) -> Shape:
        """The shape among the values of a record."""
        return Shape(**{f.name: record[f.name] for f in fields(Shape)})

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    @property
    def q_bytes(self) -> int:
        """Bytes of q, and of o."""
        return self.batch * self.heads * self.seq_len * self.head_dim * ITEM_BYTES[self.dtype]

    @property
    def input_bytes(self) -> int:
        """Bytes of q, k and v."""
        return self.q_bytes + 2 * self.q_bytes * self.kv_heads // self.heads

    @property
    def least_bytes(self) -> int:
        """What no kernel can avoid moving: q, k and v read once, o written once."""
        return self.input_bytes + self.q_bytes

    @property
    def sets(self) -> int:
        """How many sets of inputs a timing rotates over, so that the L2 cache holds none of the next one."""
        return SETS if self.input_bytes < LARGE else LARGE_SETS

    def flops(self, nnz: int) -> int:
        """Useful operations of a forward pass over a mask of nnz elements a head: only what the mask keeps counts."""
        return 4 * nnz * self.head_dim * self.heads * self.batch

    def backward_flops(self, nnz: int) -> int:
        """Useful operations of a backward pass: five products of the scores' size, where a forward pass has two."""
        return self.flops(nnz) * 5 // 2

    def inputs(self, device: str) -> tuple[Any, Any, Any]:
        """Fresh normal q, k, v."""
        import torch

        dtype = getattr(torch, self.dtype)
        q = torch.randn(self.batch, self.heads, self.seq_len, self.head_dim, device=device, dtype=dtype)
        k, v = (torch.randn(self.batch, self.kv_heads, self.seq_len, self.head_dim, device=device, dtype=dtype)
                for _ in range(2))  # fmt: skip
        return q, k, v
