"""Gradients of biases and sinks on a GPU: what the kernel of dQ sums as integers, and what becomes of the sums.

A sum is of (score gradient * a power of two), rounded (codegen/hopper/backward/bias_sums.py). The power is the largest
for which no sum leaves 62 bits: of a query, with the longest row of dO, that of V and 1 / (1 - p) of dropout,

    sum_j |dS_ij| <= sum_j P_ij (|dP_ij| + |delta_i|) <= 2 |dO_i| max_j |V_j| / (1 - p) + |dLSE_i|
"""

from __future__ import annotations

import math
from typing import Any

from splatc.ir.terms import Terms
from splatc.runtime.tensors import Shape

SLOPES = "slope_sums"
SUMS = {SLOPES: "alibi_slopes", "relative_sums": "relative_bias", "block_sums": "block_bias"}
ABSENT_SUMS: dict[str, float] = dict.fromkeys((*(f"{name}_ptr" for name in SUMS), "powers_ptr"), 0)
BITS = 62
MOST = 100  # of the exponent of a power


class BiasGradients:
    """Of one call. do (batch, heads, q_len, v_head_dim), v, dlse (batch, heads, q_len): torch tensors."""

    def __init__(self, terms: Terms, shape: Shape, do: Any, v: Any, dlse: Any) -> None:
        import torch

        self._terms = terms
        self._sums = {name: torch.zeros(x.shape, dtype=torch.int64, device=x.device) for name, field in SUMS.items()
                      if (x := getattr(terms, field)) is not None}  # fmt: skip
        self.powers: Any = _powers(terms, shape, do, v, dlse) if self._sums else None

    @property
    def values(self) -> dict[str, float]:
        """The kernel's parameters."""
        sums = {f"{name}_ptr": x.data_ptr() for name, x in self._sums.items()}
        return {**ABSENT_SUMS, **sums, **({} if self.powers is None else {"powers_ptr": self.powers.data_ptr()})}

    def results(self, lse: Any, delta: Any) -> list[Any]:
        """The gradients of what there is of ``terms.learnable``, once the kernels run; NaN for heads with a delta that
        is no number. lse, delta: (batch, heads, q_len)."""
        import torch

        found = []
        if self._sums:
            bad = ~torch.isfinite(delta).all(2).all(0)
            for name, sums in self._sums.items():
                power = self.powers[1 if name == SLOPES else 0].double()
                wrong = bad.view(-1, *[1] * (sums.ndim - 1))
                found.append((sums.double() / power).masked_fill(wrong, math.nan).float())
        if self._terms.sinks is not None:
            found.append(_of_sinks(self._terms.sinks.detach(), lse, delta))
        return found


def without_pairs(terms: Terms, lse: Any, dlse: Any) -> list[Any]:
    """The gradients where there are no queries or no keys: a row's LSE is its sink."""
    import torch

    biases = [torch.zeros_like(x) for x in terms.learnable[:-1] if x is not None]
    return biases + ([] if terms.sinks is None else [_of_sinks(terms.sinks.detach(), lse, -dlse)])


def _powers(terms: Terms, shape: Shape, do: Any, v: Any, dlse: Any) -> Any:
    """float32 (2,) on the device: of tables, and of slopes, whose sums are times a distance."""
    import torch

    def longest(x: Any) -> Any:  # what is not finite makes delta so
        return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).nan_to_num(0.0, 0.0, 0.0).amax()

    bound = 2 / (1 - terms.dropout_p) * longest(do) * longest(v) + longest(dlse[..., None])
    exponent = BITS - torch.ceil(torch.log2(bound * (shape.batch * shape.q_len))).clamp(-MOST, MOST)
    distance = math.ceil(math.log2(max(shape.q_len, shape.kv_len) + abs(terms.shift)))
    return torch.exp2(torch.stack([exponent, exponent - distance]).clamp(-MOST, MOST))


def _of_sinks(sinks: Any, lse: Any, delta: Any) -> Any:
    """-delta times the share of a sink in its rows; rows of LSE -inf have none."""
    share = (sinks[:, None] - lse.masked_fill(lse == -math.inf, math.inf)).double().exp()
    return -(share * delta).sum((0, 2)).to(sinks.dtype)
