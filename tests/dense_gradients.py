"""Gradients of masked attention by float64 autograd through the whole matrix of scores, on any device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

NAMES = ("dq", "dk", "dv")
CANCELLED = 1e-2  # of what was added up: a gradient smaller than that is measured against what was added up


@dataclass(frozen=True)
class Dense:
    """o, lse, and for each of dq, dk and dv: the gradient, and the sum of the magnitudes that it is made of."""

    o: Any
    lse: Any
    gradients: tuple[Any, Any, Any]
    magnitudes: tuple[Any, Any, Any]

    def errors(self, got: Any) -> dict[str, float]:
        """Relative error of each of (dq, dk, dv) in the norm of all elements; NaN where a result is not finite.

        Where terms cancel (a row of one key has dq = 0, of which rounding is left) the error is relative to them.
        """
        return {name: error(x, y, z) for name, x, y, z in zip(NAMES, got, self.gradients, self.magnitudes, strict=True)}

    def row_errors(self, got: Any) -> dict[str, Any]:
        """The same for each row (batch, heads, seq) by itself."""
        out = {}
        for name, x, y, z in zip(NAMES, got, self.gradients, self.magnitudes, strict=True):
            away, size, terms = ((x.double() - y).norm(dim=-1), y.norm(dim=-1), z.norm(dim=-1))
            size = torch.where(size > CANCELLED * terms, size, terms)
            out[name] = torch.where(size > 0, away / size, away)  # nothing was added: the result has to be 0
        return out


def error(got: Any, wanted: Any, magnitude: Any) -> float:
    """See ``Dense.errors``."""
    assert got.shape == wanted.shape
    size, terms = float(wanted.norm()), float(magnitude.norm())
    size = size if size > CANCELLED * terms else terms
    return float((got.double() - wanted).norm()) / (size or 1.0)


def dense_attention(q: Any, k: Any, v: Any, mask: Any, scale: float, softcap: float | None = None) -> Any:
    """(o, lse, weights, slope of the softcap) of tensors (batch, heads, seq, dim) with a boolean mask."""
    scores, slope = q @ k.mT * scale, torch.ones((), dtype=q.dtype, device=q.device)
    if softcap is not None:
        bent = torch.tanh(scores / softcap)
        scores, slope = softcap * bent, 1 - bent**2
    scores = scores.masked_fill(~mask, -1e300)
    lse = scores.logsumexp(-1).masked_fill(~mask.any(-1), -math.inf)
    weights = scores.softmax(-1) * mask
    return weights @ v, lse, weights, slope


def dense_gradients(q: Any, k: Any, v: Any, mask: Any, do: Any, dlse: Any = None, scale: float | None = None,
                    softcap: float | None = None) -> Dense:  # fmt: skip
    """Of attention of q (batch, heads, q_len, d) to k and v (batch, kv_heads, kv_len, d), for gradients do of o and
    dlse (batch, heads, q_len; None: zeros) of lse. mask: boolean, broadcast to (heads, q_len, kv_len)."""
    q, k, v, do = (x.detach().double() for x in (q, k, v, do))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[1] // k.shape[1]
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    all_k, all_v = (x.repeat_interleave(group, 1) for x in leaves[1:])
    o, lse, weights, slope = dense_attention(leaves[0], all_k, all_v, mask, scale, softcap)
    dlse = torch.zeros_like(lse) if dlse is None else dlse.detach().double()
    dlse = dlse.masked_fill(~mask.any(-1), 0.0)  # of -inf, a constant
    gradients = torch.autograd.grad([o, lse], leaves, [do, dlse])
    with torch.no_grad():
        products = do @ all_v.mT
        delta = (do * o).sum(-1) - dlse
        terms = weights * (products.abs() + delta.abs()[..., None]) * slope * abs(scale)
        sums = [terms @ all_k.abs(), terms.mT @ q.abs(), weights.mT @ do.abs()]
        magnitudes = [sums[0], *(x.unflatten(1, (-1, group)).sum(2) for x in sums[1:])]
    return Dense(o.detach(), lse.detach(), gradients, (magnitudes[0], magnitudes[1], magnitudes[2]))
