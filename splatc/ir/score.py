"""What happens to a score between the product of q and k and the sum over values, as expressions in their order.

    s = scale * <q, k>  ->  every step of the Score in turn  ->  mask  ->  pruning  ->  softmax (sinks: one more logit)
    ->  dropout

A Score says *which* expressions there are; it is part of what kernels are compiled for. Their numbers and tensors come
with each call. h: query head, q and k: positions in the sequences, counted from 0.
"""

from __future__ import annotations

from dataclasses import dataclass

from splatc.patterns.pruned import Pruning


@dataclass(frozen=True)
class Softcap:
    """s -> cap * tanh(s / cap)."""


@dataclass(frozen=True)
class Alibi:
    """s -> s - slopes[h] * |k - q - shift|; slopes (heads,). shift: 0, or kv_len - q_len to count from the ends."""


@dataclass(frozen=True)
class RelativeBias:
    """s -> s + table[h, clip(k - q - shift, -r, r) + r]; table (heads, 2 r + 1)."""


@dataclass(frozen=True)
class BlockBias:
    """s -> s + table[h, q // size, k // size]; table (heads, ceil(q_len / size), ceil(kv_len / size))."""


Step = Softcap | Alibi | RelativeBias | BlockBias
ORDER: tuple[type[Step], ...] = (Softcap, Alibi, RelativeBias, BlockBias)


@dataclass(frozen=True)
class Score:
    """steps: in the order of ORDER, each at most once. sinks: a logit of each head that takes its share of every row's
    softmax and has no value. dropout: of probabilities (ir/dropout.py). pruning: N:M of a dynamic pattern."""

    steps: tuple[Step, ...] = ()
    sinks: bool = False
    dropout: bool = False
    pruning: Pruning | None = None

    def __bool__(self) -> bool:
        """Whether there is anything but the scale."""
        return bool(self.steps) or self.sinks or self.dropout or self.pruning is not None

    def has(self, step: type) -> bool:
        """Whether there is a step of this kind."""
        return any(isinstance(one, step) for one in self.steps)

    @property
    def softcap(self) -> bool:
        """Whether scores are capped."""
        return self.has(Softcap)

    @property
    def biases(self) -> tuple[Step, ...]:
        """The steps that add something which depends on positions."""
        return tuple(one for one in self.steps if not isinstance(one, Softcap))

    @property
    def positional(self) -> bool:
        """Whether pairs are told apart by their positions."""
        return bool(self.biases) or self.dropout

    @property
    def names(self) -> tuple[str, ...]:
        """All that there is, for names of kernels: ("softcap", "alibi", "relative", "block", "sinks", "dropout",
        "nm24")."""
        short = {Softcap: "softcap", Alibi: "alibi", RelativeBias: "relative", BlockBias: "block"}
        others = [name for name in ("sinks", "dropout") if getattr(self, name)]
        others += [f"nm{self.pruning.n}{self.pruning.m}"] if self.pruning else []
        return (*(short[type(one)] for one in self.steps), *others)


NO_SCORE = Score()


def score_of(softcap: bool = False, alibi: bool = False, relative: bool = False, block: bool = False,
             sinks: bool = False, dropout: bool = False) -> Score:  # fmt: skip
    """The Score with these parts."""
    wanted = (softcap, alibi, relative, block)
    return Score(tuple(kind() for kind, want in zip(ORDER, wanted, strict=True) if want), sinks, dropout)
