"""A small GPT for train_gpt.py, whose layers attend through a window and along strides by turns.

What attends is a module without parameters, so that splatc, dense attention and FlexAttention start from the same
weights and load each other's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gpt_text import ALPHABET
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from splatc import patterns as P
from splatc.nn import SparseAttention
from splatc.patterns import Pattern


@dataclass(frozen=True)
class Size:
    """context: positions of a sequence. window: keys that every second layer sees; stride: of the others, which see the
    last ``stride`` keys and every stride-th before them."""

    layers: int = 8
    width: int = 512
    heads: int = 8
    context: int = 4096
    window: int = 256
    stride: int = 64
    vocabulary: int = len(ALPHABET)

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


@dataclass(frozen=True)
class Mask:
    """One mask, for splatc and as a FlexAttention mask_mod."""

    pattern: Pattern
    mask_mod: Callable[[Any, Any, Any, Any], Any]


def masks(size: Size) -> tuple[Mask, Mask]:
    """Of even layers, of odd layers."""
    w, s = size.window, size.stride
    return (
        Mask(P.causal() & P.window(w - 1, 0), lambda b, h, q, k: (q >= k) & (q - k < w)),
        Mask(P.causal() & (P.window(s - 1, 0) | P.strided(s)),
             lambda b, h, q, k: (q >= k) & ((q - k < s) | ((q - k) % s == 0))),
    )  # fmt: skip


# -- what attends: (q, k, v), each (batch, heads, seq, head_dim), to o -------------------------------------------------


class Dense(nn.Module):
    """PyTorch's attention with the boolean matrix."""

    def __init__(self, mask: Mask, size: Size) -> None:
        super().__init__()
        matrix = torch.from_numpy(mask.pattern.dense(size.context))
        self.register_buffer("mask", matrix, persistent=False)

    def forward(self, q: Any, k: Any, v: Any) -> Any:
        return scaled_dot_product_attention(q, k, v, attn_mask=self.mask)


class Flex(nn.Module):
    """Compiled FlexAttention, its block mask made beforehand."""

    def __init__(self, mask: Mask, size: Size) -> None:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        super().__init__()
        n = size.context
        self.blocks = create_block_mask(mask.mask_mod, None, None, n, n, device="cuda")
        self.attend = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def forward(self, q: Any, k: Any, v: Any) -> Any:
        return self.attend(q, k, v, block_mask=self.blocks)


def splatc(mask: Mask, size: Size) -> nn.Module:
    """The layer of splatc; those with the same mask share what is compiled."""
    return SparseAttention(size.width, size.heads, mask.pattern, projections=False)


KINDS: dict[str, Callable[[Mask, Size], nn.Module]] = {"splatc": splatc, "dense": Dense, "flex": Flex}


# -- the model ---------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Attention and a perceptron, each after a norm and added to what came in."""

    def __init__(self, size: Size, attend: nn.Module) -> None:
        super().__init__()
        self.heads, self.attend = size.heads, attend
        self.norm1, self.norm2 = nn.LayerNorm(size.width), nn.LayerNorm(size.width)
        self.qkv, self.out = nn.Linear(size.width, 3 * size.width), nn.Linear(size.width, size.width)
        self.mlp = nn.Sequential(
            nn.Linear(size.width, 4 * size.width), nn.GELU(), nn.Linear(4 * size.width, size.width)
        )

    def forward(self, x: Any) -> Any:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Tokens (batch, seq) to logits (batch, seq, vocabulary)."""

    def __init__(self, size: Size, kind: str) -> None:
        """kind: of KINDS. Parameters are drawn from torch's generator on the CPU, alike for every kind."""
        super().__init__()
        each = masks(size)
        self.token = nn.Embedding(size.vocabulary, size.width)
        self.position = nn.Embedding(size.context, size.width)
        self.blocks = nn.Sequential(*(Block(size, KINDS[kind](each[i % 2], size)) for i in range(size.layers)))
        self.norm, self.head = nn.LayerNorm(size.width), nn.Linear(size.width, size.vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Any) -> Any:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.norm(self.blocks(self.token(tokens) + self.position(places))))

    def loss(self, tokens: Any) -> Any:
        """Mean cross-entropy in nats of each token (batch, seq + 1) after the first, given those before it."""
        logits = self(tokens[:, :-1])
        return cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
