"""The float64 dense reference that defines every result."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray


def attention(q: ArrayLike, k: ArrayLike, v: ArrayLike, mask: NDArray[np.bool_],
              scale: float | None = None,
              softcap: float | None = None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:  # fmt: skip
    """Masked attention in float64.

    q (batch, heads, q_len, d), k (batch, kv_heads, kv_len, d), v (batch, kv_heads, kv_len, dv); heads must be a
    multiple of kv_heads. mask: (q_len, kv_len) or (heads, q_len, kv_len), True = attend. scale defaults to 1/sqrt(d).
    softcap: scores s become softcap * tanh(s / softcap).
    Returns o (batch, heads, q_len, dv) and lse (batch, heads, q_len), natural log. A row that attends to nothing gives
    0 and -inf.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = (np.repeat(x, group, axis=1) for x in (k, v))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = q @ k.swapaxes(-1, -2) * scale
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    scores = np.where(mask, scores, -np.inf)
    top = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    weights = np.exp(scores - np.where(np.isinf(top), 0.0, top))
    total = weights.sum(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (np.where(np.isinf(top), 0.0, top) + np.log(total))[..., 0]
    return weights / np.where(total == 0, 1.0, total) @ v, lse


def gradients(q: ArrayLike, k: ArrayLike, v: ArrayLike, mask: NDArray[np.bool_], do: ArrayLike,
              dlse: ArrayLike | None = None, scale: float | None = None,
              softcap: float | None = None) -> tuple[NDArray[np.float64], ...]:  # fmt: skip
    """(dq, dk, dv) of ``attention`` in float64, shaped like q, k and v.

    do (batch, heads, q_len, dv) and dlse (batch, heads, q_len; None: zeros) are the gradients of o and lse.
    """
    q, k, v, do = (np.asarray(x, np.float64) for x in (q, k, v, do))
    o, lse = attention(q, k, v, mask, scale, softcap)
    batch, kv_heads, kv_len, _ = k.shape
    group = q.shape[1] // kv_heads
    k, v = (np.repeat(x, group, axis=1) for x in (k, v))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores, slope = q @ k.swapaxes(-1, -2) * scale, 1.0
    if softcap is not None:
        tanh = np.tanh(scores / softcap)
        scores, slope = softcap * tanh, 1 - tanh**2
    p = np.exp(np.where(mask, scores, -np.inf) - np.where(np.isinf(lse), 0.0, lse)[..., None])
    delta = (do * o).sum(-1) - (0.0 if dlse is None else np.asarray(dlse, np.float64))
    ds = p * (do @ v.swapaxes(-1, -2) - delta[..., None]) * slope * scale
    dk, dv = ds.swapaxes(-1, -2) @ q, p.swapaxes(-1, -2) @ do
    dk, dv = (x.reshape(batch, kv_heads, group, kv_len, -1).sum(2) for x in (dk, dv))
    return ds @ k, dk, dv


def relative_error(got: ArrayLike, wanted: ArrayLike) -> float:
    """||got - wanted|| / ||wanted|| over all elements (||got|| where wanted is all zero)."""
    a, b = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    size = float(np.linalg.norm(b))
    return float(np.linalg.norm(a - b)) / (size or 1.0)
