"""Gradients of wide heads on a Hopper GPU, whose dV and dK are computed apart, against float64 autograd.

What a kernel does not write is NaN here (``poisoned``), and PyTorch's deterministic mode is on while it runs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from splatc import patterns as P

torch = pytest.importorskip("torch")

from tests.gpu_gradients import (  # noqa: E402  (it imports torch)
    LONG_ROWS,
    MARKS,
    MIXED,
    WINDOW,
    backward,
    check,
    compiled,
    draw,
    draw_dlse,
    same,
)

pytestmark = MARKS
# (dtype, head_dim, v_head_dim): small tiles and larger ones; places for the next keys in both, one or neither of the
# kernels over columns; dV wider than K, through whose place it leaves; dK and dV in one kernel; odd multiples of 8
KINDS = [("bfloat16", 256, 256), ("float16", 192, 192), ("bfloat16", 192, 128), ("float16", 256, 128),
         ("bfloat16", 128, 256), ("float16", 8, 256), ("bfloat16", 192, 64), ("float16", 200, 136)]  # fmt: skip
kinds = pytest.mark.parametrize(("dtype", "dim", "v_dim"), KINDS)
GRAPH = P.mask(np.random.default_rng(0).random((700, 700)) < 2e-3)
PATTERNS = {
    "window": WINDOW, "passes": MIXED, "parts": LONG_ROWS, "full": P.full(), "strided": P.strided(7),
    "grid": P.neighborhood((20, 35), 5), "bigbird": P.bigbird(64), "graph": GRAPH,
    "parts in passes": MIXED | P.global_rows(3) | P.global_cols(3),
}  # fmt: skip


def checked(pattern: Any, q_len: int, kv_len: int, kind: tuple[str, int, int], heads: int = 2, kv_heads: int = 2,
            batch: int = 1, softcap: float | None = None) -> None:  # fmt: skip
    """The gradients of a pattern are right, with a gradient of lse and, for even lengths, without."""
    dtype, dim, v_dim = kind
    attend = compiled(pattern, q_len, kv_len, dim, dtype, v_head_dim=v_dim, softcap=softcap)
    tensors = draw(q_len, kv_len, dim, dtype, heads, kv_heads, batch, v_dim)
    dlse = draw_dlse(tensors[3]) if q_len % 2 else None
    check(attend, pattern, tensors, dlse, softcap, enable_gqa=heads != kv_heads)


@kinds
@pytest.mark.parametrize("name", PATTERNS)
def test_patterns(name: str, dtype: str, dim: int, v_dim: int) -> None:
    checked(PATTERNS[name], 700, 700, (dtype, dim, v_dim))


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("kind", [("bfloat16", 64, 128), ("float16", 104, 64), ("bfloat16", 96, 8),
                                  ("float16", 24, 128)])  # fmt: skip
def test_rows_of_k_and_v_of_unlike_size(kind: tuple[str, int, int], name: str) -> None:
    """No wide ones, but of one and of two times 128 bytes: low tiles and lists of keys among others."""
    checked(PATTERNS[name], 700, 700, kind)


@kinds
def test_odd_sizes(dtype: str, dim: int, v_dim: int) -> None:
    for pattern in (P.causal("bottom_right"), MIXED, P.strided(7)):
        for q_len, kv_len in ((1, 1), (17, 17), (127, 129), (33, 500), (500, 33), (1, 500), (500, 1)):
            checked(pattern, q_len, kv_len, (dtype, dim, v_dim))


@kinds
def test_batch_and_grouped_heads(dtype: str, dim: int, v_dim: int) -> None:
    heads = P.per_head([MIXED, P.full(), P.strided(7), MIXED])
    for pattern in (MIXED, LONG_ROWS, heads):
        for kv_heads in (4, 2, 1):
            checked(pattern, 300, 300, (dtype, dim, v_dim), 4, kv_heads, batch=3)


@kinds
def test_more_row_tiles_than_blocks(dtype: str, dim: int, v_dim: int) -> None:
    """A block computes several, one after the other: of one tile each, of several, in passes, in parts."""
    for pattern in (P.block_mask(np.eye(12, dtype=bool), 128), WINDOW, MIXED, LONG_ROWS):
        checked(pattern, 1500, 1500, (dtype, dim, v_dim), heads=16, kv_heads=8, batch=2)


@kinds
def test_softcap(dtype: str, dim: int, v_dim: int) -> None:
    for pattern in (MIXED, P.full()):
        checked(pattern, 301, 301, (dtype, dim, v_dim), softcap=2.0)


@kinds
def test_rows_without_keys_and_keys_without_rows(dtype: str, dim: int, v_dim: int) -> None:
    pattern = P.causal("bottom_right") & ~P.global_rows(3) & ~P.global_cols(20)
    checked(pattern, 401, 300, (dtype, dim, v_dim), 4, 2)
    checked(P.window(-2000, 2005), 200, 200, (dtype, dim, v_dim))


@kinds
def test_layouts_and_runs_are_bitwise_equal(dtype: str, dim: int, v_dim: int) -> None:
    """bshd, memory that is strided any way, and every run."""
    for pattern in (MIXED, LONG_ROWS):
        attend = compiled(pattern, 1100, 1100, dim, dtype, v_head_dim=v_dim)
        *qkv, do = (x.contiguous() for x in draw(1100, 1100, dim, dtype, 4, 2, v_dim=v_dim))
        wanted = backward(attend, qkv, do, draw_dlse(do), enable_gqa=True)
        for _ in range(5):
            assert same(backward(attend, qkv, do, draw_dlse(do), enable_gqa=True), wanted)
        *moved, moved_do = (x.transpose(1, 2).contiguous() for x in (*qkv, do))
        strided = [x.transpose(1, 2) for x in moved]
        assert same(backward(attend, strided, moved_do.transpose(1, 2), draw_dlse(do), enable_gqa=True), wanted)
        bshd = compiled(pattern, 1100, 1100, dim, dtype, v_head_dim=v_dim, layout="bshd")
        got = backward(bshd, moved, moved_do, draw_dlse(do), enable_gqa=True)
        assert same([x.transpose(1, 2) for x in got], wanted)
