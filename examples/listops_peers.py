"""What else computes the attention of listops_model.py: plain matrix products, PyTorch's fused kernels, FlexAttention.

Each is a `SpionAttention` with the same parameters and another function between the projections.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from splatc.errors import Unsupported
from splatc.patterns.blocks import BlockMatrix
from splatc.sparsify import SpionAttention


def matmuls(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(Q K^T) V, unfused, in the dtype of q: what SPION was compared with. Tensors are (batch, heads, length,
    dim)."""
    with torch.autocast(q.device.type, enabled=False):  # which would have the softmax in float32, for twice the bytes
        return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1) @ v


def block_mask(pattern: BlockMatrix, device: str) -> Any:
    """The blocks of a pattern as FlexAttention's BlockMask: whole blocks, none with a mask inside."""
    from torch.nn.attention.flex_attention import BlockMask

    matrix = pattern.matrix
    count = torch.from_numpy(matrix.sum(1).astype(np.int32)).to(device)[None, None]
    index = torch.from_numpy(np.argsort(~matrix, axis=1, kind="stable").astype(np.int32)).to(device)[None, None]
    lengths = tuple(n * side for n, side in zip(pattern.shape, pattern.size, strict=True))
    return BlockMask.from_kv_blocks(torch.zeros_like(count), torch.zeros_like(index), count, index, pattern.size,
                                    seq_lengths=lengths)  # fmt: skip


@cache
def compiled_flex() -> Any:
    """FlexAttention, compiled: once for all layers of one length. What cannot be compiled is an error."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


class Matmuls(SpionAttention):
    """By `matmuls`, dense."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return matmuls(q, k, v)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        q, k, v = (one(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
                   for one in (self.q_proj, self.k_proj, self.v_proj))  # fmt: skip
        return self.out_proj(self.attend(q, k, v).transpose(1, 2).flatten(2))


class Sdpa(Matmuls):
    """By PyTorch's choice of fused kernels, dense."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(q, k, v)


class Flex(Matmuls):
    """Dense as `SpionAttention`, and by FlexAttention once it has blocks."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if not isinstance(self.blocks, BlockMatrix) or not q.is_cuda:
            raise Unsupported("FlexAttention computes gradients on GPUs only; here it takes one pattern for all heads")
        return compiled_flex()(q, k, v, block_mask=_mask_of(self.blocks, str(q.device)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x) if self.blocks is not None else SpionAttention.forward(self, x)


@cache
def _mask_of(pattern: BlockMatrix, device: str) -> Any:
    return block_mask(pattern, device)
