"""Gradients of biases and sinks on a GPU: what the kernel of dQ sums as integers, and what becomes of the sums.

A sum is of (score gradient * a power of two), rounded (codegen/hopper/backward/bias_sums.py). The power is the largest
for which no sum leaves 62 bits: of a query, with the longest row of dO, that of V and 1 / (1 - p) of dropout,

    sum_j |dS_ij| <= sum_j P_ij (|dP_ij| + |delta_i|) <= 2 |dO_i| max_j |V_j| / (1 - p) + |dLSE_i|

Gradients of slopes are corrected for the rounding of O, of which delta = rowsum(dO * O) - dLSE was made. With an error
e_i of delta, and p_i the share of the sink in row i (0 without sinks),

    sum_j dS_ij = p_i delta_i + dLSE_i - e_i    of a row with pairs, whose probabilities sum to 1 - p_i
    sum_j dS_ij |k - q|_ij    is off by    -e_i sum_j P_ij |k - q|_ij
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from splatc.codegen.hopper.backward.shape import DISTANCE_BITS
from splatc.ir.terms import Terms
from splatc.runtime.tensors import Shape

SLOPES, ROWS = "slope_sums", "row_sums"
SUMS = {SLOPES: "alibi_slopes", "relative_sums": "relative_bias", "block_sums": "block_bias"}
ABSENT_SUMS: dict[str, float] = dict.fromkeys((*(f"{name}_ptr" for name in (*SUMS, ROWS)), "powers_ptr"), 0)
BITS = 62
MOST = 100  # of the exponent of a power


class BiasGradients:
    """Of one call, of those terms whose fields are ``learning``. do (batch, heads, q_len, v_head_dim), v, dlse (batch,
    heads, q_len): torch tensors."""

    def __init__(self, terms: Terms, learning: Collection[str], shape: Shape, do: Any, v: Any, dlse: Any) -> None:
        self._sinks = terms.sinks.detach() if terms.sinks is not None else None
        self._sinks_learn = "sinks" in learning
        self._dlse = dlse
        self.sums = {name: _zeros(getattr(terms, field), *getattr(terms, field).shape) for name, field in SUMS.items()
                      if field in learning}  # fmt: skip
        self.rows: Any = _zeros(dlse, *dlse.shape, 2) if SLOPES in self.sums else None
        self.powers: Any = _powers(terms, shape, do, v, dlse) if self.sums else None

    @property
    def values(self) -> dict[str, float]:
        """The kernel's parameters."""
        all_sums = self.sums if self.rows is None else {**self.sums, ROWS: self.rows}
        sums = {f"{name}_ptr": x.data_ptr() for name, x in all_sums.items()}
        return {**ABSENT_SUMS, **sums, **({} if self.powers is None else {"powers_ptr": self.powers.data_ptr()})}

    def results(self, lse: Any, delta: Any) -> list[Any]:
        """The gradients of what is learning, in the order of LEARNABLE, once the kernels run; NaN for heads with a
        delta that is no number. lse, delta: (batch, heads, q_len)."""
        import torch

        found = []
        if self.sums:
            bad = ~torch.isfinite(delta).all(2).all(0)
            for name, sums in self.sums.items():
                value = sums.double() / self.powers[1 if name == SLOPES else 0]
                if name == SLOPES:
                    value = value - self._of_rounding(lse, delta)
                wrong = bad.view(-1, *[1] * (sums.ndim - 1))
                found.append(value.masked_fill(wrong, math.nan).float())
        if self._sinks_learn:
            found.append(of_sinks(self._sinks, lse, delta))
        return found

    def _of_rounding(self, lse: Any, delta: Any) -> Any:
        """(heads,): what the rounding of O adds to the gradients of slopes."""
        gradients, distances = self.rows[..., 0] / self.powers[0].double(), self.rows[..., 1] / 2.0**DISTANCE_BITS
        of_sink = 0.0 if self._sinks is None else _share(self._sinks, lse) * delta
        return ((of_sink + self._dlse - gradients) * distances).sum((0, 2))


def _zeros(like: Any, *sizes: int) -> Any:
    import torch

    return torch.zeros(sizes, dtype=torch.int64, device=like.device)


def without_pairs(terms: Terms, learning: Collection[str], lse: Any, dlse: Any) -> list[Any]:
    """The gradients where there are no queries or no keys: a row's LSE is its sink."""
    import torch

    biases = [torch.zeros_like(getattr(terms, name)) for name in learning if name != "sinks"]
    return biases + ([of_sinks(terms.sinks.detach(), lse, -dlse)] if "sinks" in learning else [])


def _powers(terms: Terms, shape: Shape, do: Any, v: Any, dlse: Any) -> Any:
    """float32 (2,) on the device: of tables, and of slopes, whose sums are times a distance."""
    import torch

    def longest(x: Any) -> Any:  # what is not finite makes delta so
        return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).nan_to_num(0.0, 0.0, 0.0).amax()

    bound = 2 / (1 - terms.dropout_p) * longest(do) * longest(v) + longest(dlse[..., None])
    exponent = BITS - torch.ceil(torch.log2(bound * (shape.batch * shape.q_len))).clamp(-MOST, MOST)
    distance = math.ceil(math.log2(max(shape.q_len, shape.kv_len) + abs(terms.shift)))
    return torch.exp2(torch.stack([exponent, exponent - distance]).clamp(-MOST, MOST))


def of_sinks(sinks: Any, lse: Any, delta: Any) -> Any:
    """Of sinks (heads,), -delta times their share in the rows. lse, delta: (batch, heads, q_len)."""
    return -(_share(sinks, lse) * delta).sum((0, 2)).to(sinks.dtype)


def _share(sinks: Any, lse: Any) -> Any:
    """Of a sink in each row, float64; rows of LSE -inf have none."""
    return (sinks[:, None] - lse.masked_fill(lse == -math.inf, math.inf)).double().exp()
