"""Which probabilities are dropped: a function of (seed, batch, head, q, k) alone, so no tiling or order changes it.

A query's word is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) of the counter
(q, head, batch, 0) under the key (low, high half of the seed), its first output. A pair's word mixes that with k:

    word(q, k) = mix(word(q) ^ k * GOLDEN)        dropped where word(q, k) < threshold = round(p * 2**32)

mix is Chris Wellons's "lowbias32", a bijection in which each bit of x changes every bit of the result about half the
time. Everything is in 32-bit unsigned arithmetic.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

PHILOX_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
PHILOX_STEPS = 0x9E3779B9, 0xBB67AE85  # that the key grows by each round
ROUNDS = 10
GOLDEN = 0x9E3779B9
MIX = (16, 0x7FEB352D, 15, 0x846CA68B, 16)  # shift, factor, shift, factor, shift

Words = NDArray[np.uint32]
_WORD = np.uint64(0xFFFFFFFF)


def threshold_of(p: float) -> int:
    """Below it words are dropped: 0 ... 2**32 - 1."""
    return min(round(p * 2**32), 2**32 - 1)


def query_words(seed: int, batch: NDArray[np.integer], head: NDArray[np.integer], q: NDArray[np.integer]) -> Words:
    """The words of queries; arguments broadcast."""
    x0, x1, x2 = (np.asarray(x).astype(np.uint64) for x in np.broadcast_arrays(q, head, batch))
    x3 = np.zeros_like(x0)
    k0, k1 = np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32 & 0xFFFFFFFF)
    for _ in range(ROUNDS):
        a, b = (x * np.uint64(m) for x, m in zip((x0, x2), PHILOX_MULTIPLIERS, strict=True))
        x0, x1, x2, x3 = b >> np.uint64(32) ^ x1 ^ k0, b & _WORD, a >> np.uint64(32) ^ x3 ^ k1, a & _WORD
        k0, k1 = ((k + np.uint64(step)) & _WORD for k, step in zip((k0, k1), PHILOX_STEPS, strict=True))
    return x0.astype(np.uint32)


def pair_words(of_query: Words, k: NDArray[np.integer]) -> Words:
    """The words of (query, key) pairs; arguments broadcast."""
    x = np.asarray(of_query, np.uint32) ^ (np.asarray(k).astype(np.uint32) * np.uint32(GOLDEN))
    first, factor1, second, factor2, third = (np.uint32(x) for x in MIX)
    x = (x ^ x >> first) * factor1
    x = (x ^ x >> second) * factor2
    return np.asarray(x ^ x >> third, np.uint32)


def kept(seed: int, p: float, batch: int, heads: int, q_len: int, kv_len: int) -> NDArray[np.bool_]:
    """(batch, heads, q_len, kv_len): True where a probability stays (and is divided by 1 - p)."""
    b, h, q = np.ogrid[:batch, :heads, :q_len]
    words = pair_words(query_words(seed, b, h, q)[..., None], np.arange(kv_len))
    return np.asarray(words >= np.uint32(threshold_of(p)))
