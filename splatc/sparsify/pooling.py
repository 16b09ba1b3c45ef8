"""Sums of a map along its diagonals, and their means over blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]


def diagonal_sums(scores: NDArray[np.floating[Any]], length: int) -> Float:
    """Each cell of a (q_len, kv_len) map as the sum of ``length`` (odd) cells round it on its diagonal; beyond the map
    are zeros."""
    rows, cols = scores.shape
    reach = length // 2
    padded = np.pad(np.asarray(scores, np.float64), reach)
    out = np.zeros((rows, cols))
    for t in range(length):
        out += padded[t : t + rows, t : t + cols]
    return out


def pool(scores: Any, block: int, filter: int) -> Float:
    """Means over blocks of the diagonal sums of a square map, in float64: (n, n), n = ceil(length / block). A map on a
    GPU is pooled there."""
    if getattr(getattr(scores, "device", None), "type", "cpu") != "cpu":
        return _pool_on_device(scores, block, filter)
    return pool_on_cpu(as_numpy(scores), block, filter)


def as_numpy(scores: Any) -> NDArray[np.floating[Any]]:
    """A map as a NumPy array of floats, without a copy where there need be none."""
    if hasattr(scores, "detach"):
        scores = scores.detach().cpu()
        scores = (scores if str(scores.dtype) == "torch.float64" else scores.float()).numpy()
    out = np.asarray(scores)
    return out if out.dtype in (np.float32, np.float64) else out.astype(np.float64)


def pool_on_cpu(scores: NDArray[np.floating[Any]], block: int, filter: int) -> Float:
    """`pool` in one reading of the map, a strip of blocks at a time.

    The diagonal sums of a strip of h rows, summed over these, are h rows of the map from t on, shifted by t, summed
    over t in [0, filter). Such h rows are the end of one run of h rows and the beginning of the next, and both are
    running sums. Nothing is subtracted, so that zeros stay zeros.
    """
    length, reach = len(scores), filter // 2
    edges = np.arange(0, length, block)
    sizes = np.minimum(block, length - edges)
    out = np.empty((len(edges), len(edges)))
    strip = np.empty((int(sizes[0]) + 2 * reach, length + 2 * reach))
    for i, (lo, height) in enumerate(zip(edges.tolist(), sizes.tolist(), strict=True)):
        strip[:] = 0
        first, last = max(lo - reach, 0), min(lo + height + reach, length)
        strip[first - lo + reach : last - lo + reach, reach : reach + length] = scores[first:last]
        total = np.zeros(length)
        for run in range(0, filter, height):
            starts = range(run, min(run + height, filter))
            end = strip[starts.stop : run + height].sum(0)
            for t in reversed(starts):
                end += strip[t]
                total += end[t : t + length]
            begin = np.zeros_like(end)
            for t in starts[1:]:
                begin += strip[t + height - 1]
                total += begin[t : t + length]
        out[i] = np.add.reduceat(total, edges)
    out /= sizes[:, None] * sizes
    return out


def _pool_on_device(scores: Any, block: int, filter: int) -> Float:
    import torch
    from torch.nn.functional import pad

    length, reach = len(scores), filter // 2
    n = -(-length // block)
    padded = pad(scores.detach(), (reach, reach, reach, reach))
    out = torch.zeros(n, n, dtype=torch.float64, device=scores.device)
    for t in range(filter):
        whole = pad(padded[t : t + length, t : t + length], (0, n * block - length, 0, n * block - length))
        out += whole.view(n, block, n, block).sum((1, 3), dtype=torch.float64)
    sizes = torch.full((n,), block, dtype=torch.float64)
    sizes[-1] = length - (n - 1) * block
    return as_numpy(out.cpu() / (sizes[:, None] * sizes)).astype(np.float64)
