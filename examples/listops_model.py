"""The Transformer that SPION trained on the Long Range Arena: layers of 64, two heads, means over positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from listops_data import CLASSES, WORDS
from listops_peers import Flex, Matmuls, Sdpa
from torch import nn

from splatc import patterns as P
from splatc.sparsify import SpionAttention

MODES = ("dense", "spion-C", "spion-F", "spion-CF", "spion-T", "window", "bigbird")
PEERS = {"unfused": Matmuls, "sdpa": Sdpa, "flex-C": Flex, "flex-F": Flex, "flex-CF": Flex, "flex-T": Flex}


@dataclass(frozen=True)
class Size:
    """length: positions of a sequence. block: the side of blocks of every pattern. words, classes: that a task has.
    pairs: whether its examples are two sequences."""

    length: int = 2048
    layers: int = 4
    width: int = 64
    heads: int = 2
    hidden: int = 128
    dropout: float = 0.1
    block: int = 64
    words: int = len(WORDS)
    classes: int = CLASSES
    pairs: bool = False


def pattern_of(mode: str, size: Size) -> P.Pattern:
    """What a mode begins with."""
    if mode == "window":
        return P.block_window(size.block, 1, 1)
    return P.bigbird(size.block) if mode == "bigbird" else P.full()


class Layer(nn.Module):
    """Attention and a hidden layer, each added to its input."""

    def __init__(self, size: Size, mode: str, prune_to: str) -> None:
        super().__init__()
        kind = PEERS.get(mode, SpionAttention)
        self.attention = kind(size.width, size.heads, pattern_of(mode, size), prune_to=prune_to)
        self.before, self.between = nn.LayerNorm(size.width), nn.LayerNorm(size.width)
        self.hidden = nn.Sequential(nn.Linear(size.width, size.hidden), nn.GELU(), nn.Dropout(size.dropout),
                                    nn.Linear(size.hidden, size.width))  # fmt: skip
        self.dropout = nn.Dropout(size.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.dropout(self.attention(self.before(x)))
        return x + self.dropout(self.hidden(self.between(x)))


class Classifier(nn.Module):
    """Tokens (batch, length), or (batch, 2, length) for pairs, to logits of classes. Padding takes part in attention as
    a word of its own, in every mode, and in no mean."""

    def __init__(self, size: Size, mode: str, prune_to: str = "-inf") -> None:
        super().__init__()
        self.pairs = size.pairs
        self.words, self.places = nn.Embedding(size.words, size.width), nn.Embedding(size.length, size.width)
        self.layers = nn.ModuleList([Layer(size, mode, prune_to) for _ in range(size.layers)])
        self.norm, self.out = nn.LayerNorm(size.width), nn.Linear(size.width * (4 if size.pairs else 1), size.classes)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if not self.pairs:
            return self.out(self._mean(tokens))
        a, b = self._mean(tokens.flatten(0, 1)).unflatten(0, (-1, 2)).unbind(1)
        return self.out(torch.cat([a, b, a * b, a - b], -1))

    def _mean(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.words(tokens) + self.places.weight[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        real = (tokens > 0)[..., None]
        return (self.norm(x) * real).sum(1) / real.sum(1).clamp_min(1)
