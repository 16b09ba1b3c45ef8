"""The float64 dense reference that defines every result."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from splatc.formats.nm import prune
from splatc.ir.dropout import kept
from splatc.ir.terms import NO_TERMS, Terms
from splatc.patterns.pruned import Pruning

Float = NDArray[np.float64]


def attention(q: ArrayLike, k: ArrayLike, v: ArrayLike, mask: NDArray[np.bool_], scale: float | None = None,
              softcap: float | None = None, terms: Terms = NO_TERMS,
              pruning: Pruning | None = None) -> tuple[Float, Float]:  # fmt: skip
    """Masked attention in float64.

    q (batch, heads, q_len, d), k (batch, kv_heads, kv_len, d), v (batch, kv_heads, kv_len, dv); heads must be a
    multiple of kv_heads. mask: (q_len, kv_len) or (heads, q_len, kv_len), True = attend. scale defaults to 1/sqrt(d).
    softcap, terms (NumPy arrays): see ir/score.py and ir/terms.py. pruning: of a dynamic pattern, whose static part the
    mask is (patterns/pruned.py).
    Returns o (batch, heads, q_len, dv) and lse (batch, heads, q_len), natural log. A row that attends to nothing gives
    0 and -inf, with a sink 0 and the sink.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    p, lse, _ = _probabilities(q, k, mask, scale, softcap, terms, pruning)
    return p * _dropped(terms, p.shape) @ np.repeat(v, q.shape[1] // k.shape[1], axis=1), lse


def gradients(q: ArrayLike, k: ArrayLike, v: ArrayLike, mask: NDArray[np.bool_], do: ArrayLike,
              dlse: ArrayLike | None = None, scale: float | None = None, softcap: float | None = None,
              terms: Terms = NO_TERMS, pruning: Pruning | None = None) -> tuple[Float, ...]:  # fmt: skip
    """(dq, dk, dv) of ``attention`` in float64, shaped like q, k and v, and of what there is of ``terms.learnable``.

    do (batch, heads, q_len, dv) and dlse (batch, heads, q_len; None: zeros) are the gradients of o and lse. Which keys
    a pruning keeps is constant almost everywhere: gradients go through those.
    """
    q, k, v, do = (np.asarray(x, np.float64) for x in (q, k, v, do))
    batch, kv_heads, kv_len, _ = k.shape
    group = q.shape[1] // kv_heads
    p, lse, slope = _probabilities(q, k, mask, scale, softcap, terms, pruning)
    k, v = (np.repeat(x, group, axis=1) for x in (k, v))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    dropped = _dropped(terms, p.shape)
    delta = (do * (p * dropped @ v)).sum(-1) - (0.0 if dlse is None else np.asarray(dlse, np.float64))
    ds = p * (do @ v.swapaxes(-1, -2) * dropped - delta[..., None])
    dqk = ds * slope * scale
    dk, dv = dqk.swapaxes(-1, -2) @ q, (p * dropped).swapaxes(-1, -2) @ do
    dk, dv = (x.reshape(batch, kv_heads, group, kv_len, -1).sum(2) for x in (dk, dv))
    return dqk @ k, dk, dv, *_of_terms(terms, ds.sum(0), lse, delta)


def _probabilities(q: Float, k: Float, mask: NDArray[np.bool_], scale: float | None, softcap: float | None,
                   terms: Terms, pruning: Pruning | None) -> tuple[Float, Float, Float]:  # fmt: skip
    """(probabilities before dropout (batch, heads, q_len, kv_len), lse, the slope of the softcap)."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = q @ np.repeat(k, q.shape[1] // k.shape[1], axis=1).swapaxes(-1, -2) * scale
    slope = np.ones_like(scores)
    if softcap is not None:
        tanh = np.tanh(scores / softcap)
        scores, slope = softcap * tanh, 1 - tanh**2
    at = _Places(terms, *scores.shape[-2:])
    if terms.alibi_slopes is not None:
        scores = scores - np.asarray(terms.alibi_slopes, np.float64)[:, None, None] * at.distance
    if terms.relative_bias is not None:
        scores = scores + np.asarray(terms.relative_bias, np.float64)[:, at.offset]
    if terms.block_bias is not None:
        scores = scores + np.asarray(terms.block_bias, np.float64)[:, at.blocks[0], at.blocks[1]]
    scores = np.where(mask, scores, -np.inf)
    if pruning is not None:
        scores = prune(scores, pruning)
    top = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    top = np.where(np.isinf(top), 0.0, top)
    with np.errstate(divide="ignore"):
        lse = top[..., 0] + np.log(np.exp(scores - top).sum(axis=-1))
    if terms.sinks is not None:
        lse = np.logaddexp(lse, np.asarray(terms.sinks, np.float64)[:, None])
    return np.exp(scores - np.where(np.isinf(lse), 0.0, lse)[..., None]), lse, slope


class _Places:
    """Where pairs (q_len, kv_len) lie: their distance, their place in the relative table, in the table of blocks."""

    def __init__(self, terms: Terms, q_len: int, kv_len: int) -> None:
        q, k = np.ogrid[:q_len, :kv_len]
        away = k - q - terms.shift
        reach = 0 if terms.relative_bias is None else terms.relative_bias.shape[1] // 2
        self.distance, self.offset = abs(away), np.clip(away, -reach, reach) + reach
        self.blocks = q // (terms.block_size or 1), k // (terms.block_size or 1)


def _dropped(terms: Terms, shape: tuple[int, ...]) -> Float:
    """What probabilities are multiplied by: 0, or 1 / (1 - p)."""
    if terms.seed is None:
        return np.ones(shape)
    return np.asarray(kept(int(terms.seed[0]), terms.dropout_p, *shape) / (1 - terms.dropout_p))


def _of_terms(terms: Terms, ds: Float, lse: Float, delta: Float) -> list[Float]:
    """The gradients of what there is of ``terms.learnable``; ds: of scores (heads, q_len, kv_len), of all batches."""
    at, out = _Places(terms, *ds.shape[1:]), []
    head = np.arange(len(ds))[:, None, None]
    if terms.alibi_slopes is not None:
        out.append(-(ds * at.distance).sum((1, 2)))
    if terms.relative_bias is not None:
        out.append(np.zeros(terms.relative_bias.shape))
        np.add.at(out[-1], (head, at.offset), ds)
    if terms.block_bias is not None:
        out.append(np.zeros(terms.block_bias.shape))
        np.add.at(out[-1], (head, *at.blocks), ds)
    if terms.sinks is not None:
        sinks = np.asarray(terms.sinks, np.float64)[:, None]
        out.append(-(np.exp(sinks - np.where(np.isinf(lse), 0.0, lse)) * delta).sum((0, 2)))
    return out


def relative_error(got: ArrayLike, wanted: ArrayLike) -> float:
    """||got - wanted|| / ||wanted|| over all elements (||got|| where wanted is all zero)."""
    a, b = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    size = float(np.linalg.norm(b))
    return float(np.linalg.norm(a - b)) / (size or 1.0)
