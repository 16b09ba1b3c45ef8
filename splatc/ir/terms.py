"""The tensors and numbers that a Score asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

LEARNABLE = "alibi_slopes", "relative_bias", "block_bias", "sinks"  # what has gradients, in the order of operators


@dataclass(frozen=True)
class Terms:
    """What a Score asks for at a call: torch tensors (NumPy arrays where q is one) or numbers, None where it does not.

    Tensors are contiguous, on q's device and, but for the seed, in the type of computations: float32, float64 for
    float64.
    """

    alibi_slopes: Any = None  # (heads,)
    relative_bias: Any = None  # (heads, 2 r + 1)
    block_bias: Any = None  # (heads, ceil(q_len / block_size), ceil(kv_len / block_size))
    sinks: Any = None  # (heads,)
    seed: Any = None  # int64 (1,): torch.compile and CUDA graphs see a tensor
    block_size: int = 0
    shift: int = 0  # 0, or kv_len - q_len: what k - q is measured from
    dropout_p: float = 0.0

    @property
    def learnable(self) -> tuple[Any, ...]:
        """What has gradients, None where there is none."""
        return self.alibi_slopes, self.relative_bias, self.block_bias, self.sinks

    def learning(self, flags: Sequence[bool] | None = None) -> tuple[str, ...]:
        """Of LEARNABLE what is there and has its flag set; None: all that is there."""
        there = zip(LEARNABLE, self.learnable, flags or (True,) * len(LEARNABLE), strict=True)
        return tuple(name for name, x, flag in there if flag and x is not None)

    @property
    def requires_grad(self) -> bool:
        """Whether any torch tensor does."""
        return any(x is not None and x.requires_grad for x in self.learnable)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """All fields in their order: what the operators take."""
        return *self.learnable, self.seed, self.block_size, self.shift, self.dropout_p


NO_TERMS = Terms()
