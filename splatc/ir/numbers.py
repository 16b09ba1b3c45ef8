"""What a Score does, in NumPy and slowly: for the interpreter."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from splatc.ir.dropout import pair_words, query_words, threshold_of
from splatc.ir.score import Alibi, BlockBias, RelativeBias, Softcap, Step
from splatc.ir.terms import NO_TERMS, Terms

Float = NDArray[np.float64]
Positions = NDArray[np.int64]


@dataclass(frozen=True)
class Numbers:
    """What comes with a call, of one head of one batch entry. terms: NumPy arrays of all heads. cap: the softcap."""

    cap: float = 0.0
    terms: Terms = NO_TERMS
    head: int = 0
    batch: int = 0

    @property
    def sink(self) -> float:
        """The logit of this head."""
        return float(self.terms.sinks[self.head])

    def scores(self, steps: tuple[Step, ...], s: Float, q: Positions, k: Positions) -> tuple[Float, Float]:
        """(every step in turn on scores s of the queries at q and the keys at k, the slope of the softcap there)."""
        slope = np.ones_like(s)
        for step in steps:
            match step:
                case Softcap():
                    bent = np.tanh(s / self.cap)
                    s, slope = self.cap * bent, 1 - bent**2
                case Alibi():
                    s = s - self.terms.alibi_slopes[self.head] * self.distance(q, k)
                case RelativeBias():
                    s = s + self.terms.relative_bias[self.head][self.offset(q, k)]
                case BlockBias():
                    s = s + self.terms.block_bias[self.head][self.block(q, k)]
        return s, slope

    def distance(self, q: Positions, k: Positions) -> Positions:
        """(queries, keys): what Alibi multiplies slopes by."""
        return np.asarray(abs(k - q[:, None] - self.terms.shift))

    def offset(self, q: Positions, k: Positions) -> Positions:
        """(queries, keys): places in the table of RelativeBias."""
        reach = self.terms.relative_bias.shape[1] // 2
        return np.asarray(np.clip(k - q[:, None] - self.terms.shift, -reach, reach) + reach)

    def block(self, q: Positions, k: Positions) -> tuple[Positions, Positions]:
        """Places in the table of BlockBias."""
        return q[:, None] // self.terms.block_size, k // self.terms.block_size

    def dropped(self, q: Positions, k: Positions) -> Float:
        """(queries, keys): what probabilities are multiplied by, 0 or 1 / (1 - p)."""
        p, seed = self.terms.dropout_p, int(self.terms.seed[0])
        words = pair_words(query_words(seed, np.array(self.batch), np.array(self.head), q)[:, None], k)
        return np.asarray((words >= np.uint32(threshold_of(p))) / (1 - p))
