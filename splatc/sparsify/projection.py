"""SparseK (arXiv:2406.16747): a differentiable choice of k scores, and of the k of every prefix."""

from __future__ import annotations

from typing import Any

import torch

from splatc.errors import InvalidInput

LIMIT = 2**24  # elements compared at a time


def sparsek(z: torch.Tensor, k: float, *, causal: bool = False) -> torch.Tensor:
    """The Euclidean projection of scores onto {p: 0 <= p <= 1, sum p = k}: p = clip(z - tau, 0, 1), where tau is such
    that p sums to k. k = 1 is sparsemax. Where there are no more than k scores, all of p is 1.

    z (..., n): float32 or float64; -inf is never chosen, its p and gradient are 0. Returns p (..., n); with ``causal``
    (..., n, n): row i projects z[..., :i+1] and is 0 after that (thresholds alone, without the matrix: `thresholds`).
    Differentiable: with F the places where 0 < p < 1, the gradient of p is 1_F - 1_F 1_F^T / |F|; scores that are taken
    or left whole get none. Raises InvalidInput.
    """
    tau = thresholds(z, k, causal=causal)
    if not causal:
        return shares(z, tau[..., None])
    return shares(z[..., None, :], tau[..., None]).tril()


def shares(z: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
    """p of scores and thresholds, broadcast: clip(z - tau, 0, 1), and 0 where z is -inf, whatever tau is."""
    return (z - tau).clamp(0, 1).masked_fill(z == -torch.inf, 0)


def thresholds(z: torch.Tensor, k: float, *, causal: bool = False) -> torch.Tensor:
    """tau of `sparsek`: (...), or with ``causal`` (..., n), one for each prefix, which never falls; -inf where all of p
    is 1 (or 0, of -inf), NaN where a score is. Differentiable: the gradient is 1_F / |F|. Holds no n x n matrix."""
    if z.dtype not in (torch.float32, torch.float64) or z.ndim == 0 or z.shape[-1] == 0:
        raise InvalidInput(f"z is {z.dtype} {tuple(z.shape)}: it must be float32 or float64, (..., n) with n > 0")
    if not k > 0:
        raise InvalidInput(f"k is {k}: it must be above 0")
    tau: torch.Tensor = _Thresholds.apply(z, float(k), causal)  # type: ignore[no-untyped-call]
    return tau if causal else tau[..., 0]


class _Thresholds(torch.autograd.Function):
    """Thresholds (..., rows) of the prefixes of z, all of them or the last one."""

    @staticmethod
    def forward(ctx: Any, z: torch.Tensor, k: float, causal: bool) -> torch.Tensor:
        rows = range(z.shape[-1]) if causal else range(z.shape[-1] - 1, z.shape[-1])
        tau = torch.cat([_solve(z, k, chunk) for chunk in _chunks(z, rows)], -1).to(z.dtype)
        ctx.save_for_backward(z, tau)
        ctx.rows = rows
        return tau

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        z, tau = ctx.saved_tensors
        out, first = torch.zeros_like(z), 0
        for chunk in _chunks(z, ctx.rows):
            part = slice(first, first + len(chunk))
            away = z[..., None, :] - tau[..., part, None]
            free = (away > 0) & (away < 1) & _prefixes(z, chunk)
            share = grad[..., part] / free.sum(-1).clamp_min(1)
            out += (free * share[..., None]).sum(-2)
            first += len(chunk)
        return out, None, None


def _chunks(z: torch.Tensor, rows: range) -> list[range]:
    """Rows in parts of which all elements can be held."""
    step = max(LIMIT // max(z.numel(), 1), 1)
    return [rows[lo : lo + step] for lo in range(0, len(rows), step)]


def _prefixes(z: torch.Tensor, rows: range) -> torch.Tensor:
    """bool (rows, n): the scores of each prefix."""
    n = torch.arange(z.shape[-1], device=z.device)
    return n <= torch.arange(rows.start, rows.stop, device=z.device)[:, None]


def _solve(z: torch.Tensor, k: float, rows: range) -> torch.Tensor:
    """Thresholds (..., rows). Between neighbours of all z and z - 1 the sum of p is linear in tau, with the number of
    scores between 0 and 1 for its slope: a sort and two running sums give the sum at each, and so the place of tau.
    The scores that are then taken whole, and those between, give it exactly."""
    inside = _prefixes(z, rows) & (z != -torch.inf)[..., None, :]
    each = z.double().masked_fill(z == -torch.inf, 0)[..., None, :]
    ends, order = torch.cat([each, each - 1], -1).sort(-1, descending=True)
    ends, order = (x.expand(*each.shape[:-2], len(rows), -1) for x in (ends, order))
    sign = torch.cat([inside, inside], -1).double()
    sign[..., z.shape[-1] :] *= -1
    sign = sign.expand_as(ends).gather(-1, order)
    slope, weighed = sign.cumsum(-1), (sign * ends).cumsum(-1)
    reached = weighed - ends * slope >= k
    at = (reached.int().argmax(-1, keepdim=True) - 1).clamp_min(0)
    slope, weighed = (x.gather(-1, at)[..., 0] for x in (slope, weighed))
    tau = torch.where(slope > 0.5, (weighed - k) / slope.clamp_min(1), ends.gather(-1, at)[..., 0])

    away, dust = each - tau[..., None], 1e-12 * (1 + tau.abs())[..., None]
    taken = (away >= 1 - dust) & inside
    free = (away > dust) & inside & ~taken
    count = free.sum(-1)
    exact = ((each * free).sum(-1) + taken.sum(-1) - k) / count.clamp_min(1)
    # Nothing between 0 and 1: any number will do from the largest left to the smallest taken - 1.
    left = torch.where(inside & ~taken, each, -torch.inf).amax(-1)
    some = (left + torch.where(taken, each, torch.inf).amin(-1) - 1) / 2
    return torch.where(inside.sum(-1) <= k, -torch.inf, torch.where(count > 0, exact, some))
