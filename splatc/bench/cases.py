"""The patterns that benchmarks and the demo run, by name, for a sequence length."""

from __future__ import annotations

import numpy as np

from splatc import patterns as P
from splatc.patterns.base import Pattern


def attention_cases(n: int) -> dict[str, Pattern]:
    """Patterns for timing attention: the window sizes are those of shorter sequences where n is short."""
    w, far = min(256, n // 8), min(1024, n // 2)
    return {
        "full": P.full(),
        "causal": P.causal(),
        "window": P.window(w, w),
        "dilated4": P.dilated(far, far, 4),
        "strided64": P.strided(64),
        "fixed": P.fixed(128, 16),
        "bigbird": P.bigbird(64),
        "longformer": P.longformer(w, 64),
        "sink_window": P.causal() & (P.sink(4) | P.window(far, 0)),
        "documents": documents(n, 12) & P.causal(),
    }


def library_cases(n: int) -> dict[str, Pattern]:
    """One of every kind of pattern, for tables of tile waste."""
    side = 1 << (n.bit_length() // 2)
    blocks = np.random.default_rng(0).random((-(-n // 64), -(-n // 64))) < 0.1
    return {
        **attention_cases(n),
        "strided8": P.strided(8),
        "sparse_transformer": P.causal() & (P.window(127, 0) | P.strided(128)),
        "fixed_causal": P.causal() & P.fixed(128, 16),
        "prefix_lm": P.causal() | P.prefix(n // 8),
        "blocked": P.blocked(256),
        "global_rows_cols": P.global_rows(64) | P.global_cols(64),
        "random_blocks": P.random_blocks(64, 3),
        "block_mask": P.block_mask(blocks, 64),
        "neighborhood_1d": P.neighborhood((n,), 63, 3),
        "neighborhood_2d": P.neighborhood((n // side, side), 13),
        "neighborhood_3d": P.neighborhood((8, n // 8 // 32, 32), 5),
        "complement": ~P.window(n // 4, n // 4),
    }


def million_cases(n: int) -> dict[str, Pattern]:
    """The patterns that must plan fast at a million rows."""
    return {
        "window": P.window(256, 256),
        "dilated4": P.dilated(1024, 1024, 4),
        "strided64": P.strided(64),
        "fixed": P.fixed(128, 16),
        "documents": documents(n, 1000),
    }


def matrix_cases(n: int) -> dict[str, np.ndarray]:
    """Functions of nothing that make n x n boolean matrices, by name."""
    rng = np.random.default_rng(0)
    return {
        "window": P.window(256, 256).dense(n),
        "strided8": P.strided(8).dense(n),
        "st_fixed": (P.causal() & P.fixed(128, 16)).dense(n),
        "random 5%": rng.random((n, n), np.float32) < 0.05,
    }


def documents(n: int, count: int, seed: int = 0) -> Pattern:
    """``count`` documents of random lengths, n positions in all."""
    lengths = np.random.default_rng(seed).multinomial(n, np.full(count, 1 / count))
    if count <= 64:  # a few: let them differ more
        cuts = np.sort(np.random.default_rng(seed).integers(1, n, count - 1))
        lengths = np.diff([0, *cuts, n])
    return P.documents(lengths.tolist())
