"""The block-sparse attention of transformers' BigBird, with the random blocks that the model draws."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention

from splatc.integrations.transformers.keys import groups_of, keys_at
from splatc.nn.any_length import any_length
from splatc.patterns import Pattern, block_mask, per_head

OF_THE_PAPER = (1024, 3072, 4096)  # lengths for which the model draws otherwise


class SparseBigBirdAttention(BigBirdBlockSparseAttention):  # type: ignore[misc]
    """What ``replace_attention`` makes of a BigBirdBlockSparseAttention, which keeps all that it has.

    The model's softmax is over lists of key blocks, and a block can be in a list more than once: in evaluation all of
    the random blocks are block 0. A key that counts n times is a key with log n added to its score, a block bias.
    """

    def bigbird_block_sparse_attention(
        self, query_layer: torch.Tensor, key_layer: torch.Tensor, value_layer: torch.Tensor, band_mask: Any,
        from_mask: Any, to_mask: torch.Tensor, *others: Any, **plan: Any,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        """query_layer, key_layer, value_layer (batch, heads, seq, dim), to_mask (batch, 1, 1, seq): 0 for padding.
        Returns (batch, seq, heads, dim), 0 at padding, and None for the weights."""
        size, (batch, heads, length, _) = self.block_size, query_layer.shape
        pattern, bias = _blocks(self._counts(length).tobytes(), heads, length // size, size)
        options: dict[str, Any] = {}
        if bias is not None:
            options = {"block_bias": torch.from_numpy(bias).to(query_layer), "block_size": size}
        real = (to_mask.view(batch, length) != 0).cpu().numpy()
        out = value_layer.new_zeros(batch, length, heads, value_layer.shape[3])
        for entries in groups_of(real).values():
            mine = real[entries[0]]
            at = torch.tensor(entries, device=out.device)
            if mine.any():
                attend = any_length(pattern & keys_at(mine), "bshd", None, True, None)
                qkv = (x[at].transpose(1, 2) for x in (query_layer, key_layer, value_layer))
                kept = torch.from_numpy(mine).to(out)[:, None, None]
                out = out.index_copy(0, at, attend(*qkv, **options) * kept)
        return out, None

    def _counts(self, length: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """How often each block of queries counts each block of keys: (heads, blocks, blocks)."""
        n, last, heads = length // self.block_size, length // self.block_size - 1, self.num_attention_heads
        counts = np.zeros((heads, n, n), np.int64)
        i = np.arange(n)
        counts[:, abs(i[:, None] - i) <= 1] = 1
        counts[:, :, [0, last]] = counts[:, [0, last]] = 1
        for h, drawn in enumerate(self._draw(length)):
            for row, blocks in enumerate(drawn, start=1):
                np.add.at(counts[h, row], blocks, 1)
        return counts

    def _draw(self, length: int) -> list[np.ndarray[Any, Any]]:
        """Random blocks of block rows 1 to n - 2, for each head: (n - 2, number), drawn as the model draws them."""
        size, number, heads = self.block_size, self.num_random_blocks, self.num_attention_heads
        if self.training:
            np.random.seed(self.seed)
        if length in OF_THE_PAPER:
            longest = self.max_seqlen
            rows = length // size - 2
            return [self._bigbird_block_rand_mask(longest, longest, size, size, number, last_idx=1024)[:rows]
                    for _ in range(heads)]  # fmt: skip
        until, numbers = self._get_rand_attn_plan(length, size, number)
        drawn: list[np.ndarray[Any, Any]] = self._bigbird_block_rand_mask_with_head(
            from_seq_length=length, to_seq_length=length, from_block_size=size, to_block_size=size, num_heads=heads,
            plan_from_length=until, plan_num_rand_blocks=numbers,
        )  # fmt: skip
        return drawn


@lru_cache(maxsize=64)
def _blocks(counts: bytes, heads: int, n: int, size: int) -> tuple[Pattern, np.ndarray[Any, Any] | None]:
    """The pattern, and log of counts where one is more than 1: float32 (heads, n, n), 0 for blocks of no count."""
    of_heads = np.frombuffer(counts, np.int64).reshape(heads, n, n)
    bias = np.log(np.maximum(of_heads, 1)).astype(np.float32) if of_heads.max() > 1 else None
    masks = [block_mask(one > 0, size) for one in of_heads]
    return (masks[0] if len(set(masks)) == 1 else per_head(masks)), bias
