"""Every pattern of splatc.patterns at a given size, and random patterns and masks: what tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st

from splatc import patterns as P
from splatc.patterns import Pattern

Make = Callable[[int, int], Pattern]


def grid_of(n: int, axes: int) -> tuple[int, ...]:
    """n as a product of `axes` factors, as equal as can be, the largest last."""
    if axes == 1:
        return (n,)
    first = max(d for d in range(1, round(n ** (1 / axes)) + 1) if n % d == 0)
    return (first, *grid_of(n // first, axes - 1))


def split(n: int, parts: int) -> list[int]:
    """n as `parts` lengths, not equal ones."""
    cuts = sorted(int(x) for x in np.random.default_rng(n).integers(0, n + 1, parts - 1))
    return np.diff([0, *cuts, n]).tolist()


def _blocks(q: int, kv: int, bq: int, bk: int) -> Pattern:
    shape = -(-q // bq), -(-kv // bk)
    return P.block_mask(np.random.default_rng(q + kv).random(shape) < 0.3, (bq, bk))


def _matrix(q: int, kv: int) -> Pattern:
    rng = np.random.default_rng(q * 1009 + kv)
    return P.mask(P.window(9, 3).dense(q, kv) ^ (rng.random((q, kv)) < 0.02))


# name: the pattern for (q_len, kv_len). Every name of splatc.patterns, and usual combinations of them.
LIBRARY: dict[str, Make] = {
    "full": lambda q, kv: P.full(),
    "causal": lambda q, kv: P.causal(),
    "causal_bottom": lambda q, kv: P.causal("bottom_right"),
    "window": lambda q, kv: P.window(37, 20),
    "window_bottom": lambda q, kv: P.window(37, 20, "bottom_right"),
    "beside": lambda q, kv: P.window(-5, 30),
    "causal_window": lambda q, kv: P.causal() & P.window(64, 64),
    "dilated": lambda q, kv: P.dilated(60, 60, 4),
    "dilated_bottom": lambda q, kv: P.dilated(60, 0, 3, "bottom_right"),
    "strided": lambda q, kv: P.strided(8),
    "strided_many": lambda q, kv: P.strided(61),
    "sparse_transformer": lambda q, kv: P.causal() & (P.window(31, 0) | P.strided(32)),
    "fixed": lambda q, kv: P.fixed(32, 5),
    "fixed_wide": lambda q, kv: P.fixed(32, 16),
    "fixed_causal": lambda q, kv: P.causal() & P.fixed(16, 2),
    "blocked": lambda q, kv: P.blocked(48),
    "block_window": lambda q, kv: P.block_window(24, 1, 2),
    "global_rows": lambda q, kv: P.global_rows(7),
    "global_cols": lambda q, kv: P.global_cols(9),
    "random_blocks": lambda q, kv: P.random_blocks(16, 3, seed=1),
    "bigbird": lambda q, kv: P.bigbird(16, 3, 2, 2),
    "longformer": lambda q, kv: P.longformer(20, 6),
    "sink_window": lambda q, kv: P.causal() & (P.sink(4) | P.window(50, 0)),
    "prefix": lambda q, kv: P.prefix(40),
    "documents": lambda q, kv: P.documents(split(q, 5), kv_lengths=split(kv, 5)) & P.causal("bottom_right"),
    "block_mask": lambda q, kv: _blocks(q, kv, 20, 12),
    "mask": _matrix,
    "complement": lambda q, kv: ~(P.window(15, 15) | P.global_cols(3)),
    "after": lambda q, kv: P.after(3, P.dilated(20, 8, 4) | P.fixed(9, 2)) | P.global_cols(3),
    "two_residues": lambda q, kv: P.strided(6) | P.fixed(9, 2),
    "empty": lambda q, kv: P.window(-2000, 2005),
    "empty_rows": lambda q, kv: P.causal() & P.window(-10, 60) | P.causal("bottom_right") & P.global_cols(0),
}


def _clamped(grid: tuple[int, ...]) -> Pattern:
    return P.neighborhood(grid, tuple(5 if n >= 5 else 1 for n in grid), border="clamp")


# those that need q_len == kv_len
SQUARE: dict[str, Make] = {
    "document_ids": lambda q, kv: P.documents(ids=np.arange(q) // 13 % 4),
    "neighborhood_1d": lambda q, kv: P.neighborhood((q,), 7, 2),
    "neighborhood_2d": lambda q, kv: P.neighborhood(grid_of(q, 2), 5),
    "neighborhood_2d_causal": lambda q, kv: P.neighborhood(grid_of(q, 2), (3, 4), (1, 2), (False, True)),
    "neighborhood_2d_clamped": lambda q, kv: _clamped(grid_of(q, 2)),
    "patches": lambda q, kv: P.after(1, P.neighborhood(grid_of(max(q - 1, 1), 2), 3)) | P.global_rows(1),
    "neighborhood_3d": lambda q, kv: P.neighborhood(grid_of(q, 3), 3, (1, 1, 2)),
}
ALL = {**LIBRARY, **SQUARE}
NAMES = sorted(ALL)


def pattern(name: str, q_len: int, kv_len: int | None = None) -> Pattern | None:
    """The pattern of that name at that size; None if it does not exist there."""
    kv_len = q_len if kv_len is None else kv_len
    if name in SQUARE and q_len != kv_len:
        return None
    return ALL[name](q_len, kv_len)


# -- random patterns ---------------------------------------------------------------------------------------------------

ALIGN = st.sampled_from(["top_left", "bottom_right"])


@st.composite
def leaves(draw: Any, q_len: int, kv_len: int) -> Pattern:
    """A leaf with parameters that are often extreme: wider than the mask, beside it, of width one."""
    far = max(q_len, kv_len) + 5
    bound = st.one_of(st.integers(0, 4), st.integers(0, far))
    step = st.one_of(st.integers(1, 9), st.sampled_from([4, 8, 16, 32]), st.integers(1, far))
    kind = draw(st.integers(0, 16))
    if kind == 0:
        return P.causal(draw(ALIGN))
    if kind in (1, 2):
        left, width = draw(st.one_of(bound, st.integers(-far, far))), draw(st.one_of(st.just(0), bound))
        if kind == 1:
            return P.window(left, width - left, draw(ALIGN))
        return P.dilated(left, width - left, draw(step), draw(ALIGN))
    if kind == 3:
        return P.strided(draw(step))
    if kind == 4:
        block = draw(step)
        return P.fixed(block, draw(st.one_of(st.integers(1, block), st.just(-(-block // 2)))))
    if kind == 5:
        return P.blocked(draw(step))
    if kind == 6:
        return P.block_window(draw(step), draw(st.integers(0, 2)), draw(st.integers(0, 2)))
    if kind == 7:
        return P.global_rows(draw(bound))
    if kind == 8:
        return P.global_cols(draw(bound))
    if kind == 9:
        return P.random_blocks(draw(step), draw(st.integers(1, 4)), seed=draw(st.integers(0, 99)))
    if kind == 10:
        n = draw(st.integers(1, 5))
        return P.documents(_cuts(draw, q_len, n), kv_lengths=_cuts(draw, kv_len, n))
    if kind == 11 and q_len == kv_len:
        return P.documents(ids=draw(st.lists(st.integers(0, 3), min_size=q_len, max_size=q_len)))
    if kind == 12:
        bq, bk = draw(st.integers(5, 40)), draw(st.integers(5, 40))
        shape = -(-q_len // bq), -(-kv_len // bk)
        return P.block_mask(np.random.default_rng(draw(st.integers(0, 99))).random(shape) < 0.5, (bq, bk))
    if kind == 13 and q_len == kv_len:
        w = draw(st.sampled_from([d for d in range(1, q_len + 1) if q_len % d == 0]))
        size = tuple(2 * draw(st.integers(0, 2)) + 1 for _ in range(2))
        dilation = draw(st.integers(1, 3)), draw(st.integers(1, 3))
        return P.neighborhood((q_len // w, w), size, dilation, draw(st.tuples(st.booleans(), st.booleans())))
    if kind == 14:
        return P.longformer(draw(bound), draw(bound))
    return P.prefix(draw(bound)) if kind == 15 else P.full()


def _cuts(draw: Any, total: int, parts: int) -> list[int]:
    cuts = sorted(draw(st.lists(st.integers(0, total), min_size=parts - 1, max_size=parts - 1)))
    return np.diff([0, *cuts, total]).tolist()


def combinations(q_len: int, kv_len: int, leaf_count: int = 4) -> st.SearchStrategy[Pattern]:
    """Random compositions of leaves under & | ~."""
    return st.recursive(
        leaves(q_len, kv_len),
        lambda inner: st.one_of(
            st.builds(lambda a, b: a & b, inner, inner),
            st.builds(lambda a, b: a | b, inner, inner),
            st.builds(lambda a: ~a, inner),
        ),
        max_leaves=leaf_count,
    )


@st.composite
def sized_patterns(draw: Any, longest: int = 150, leaf_count: int = 4) -> tuple[Pattern, int, int]:
    """(pattern, q_len, kv_len), square or not, often tiny."""
    length = st.one_of(st.integers(1, 8), st.integers(1, longest))
    q_len = draw(length)
    kv_len = q_len if draw(st.booleans()) else draw(length)
    return draw(combinations(q_len, kv_len, leaf_count)), q_len, kv_len


@st.composite
def strided_patterns(draw: Any, longest: int = 300) -> tuple[Pattern, int, int]:
    """(pattern, q_len, kv_len) of small steps in long sequences: masks that views other than the plain one suit."""
    q_len = draw(st.integers(100, longest))
    kv_len = q_len if draw(st.booleans()) else draw(st.integers(100, longest))
    step = st.sampled_from([2, 3, 4, 5, 7, 8, 11, 16, 24, 32])

    def leaf() -> Pattern:
        kind = draw(st.integers(0, 3))
        if kind == 0:
            return P.strided(draw(step))
        if kind == 1:
            left, right, m = draw(st.integers(-40, 200)), draw(st.integers(40, 200)), draw(step)
            return P.dilated(left, right, m, draw(ALIGN))
        if kind == 2 or q_len != kv_len:
            block = draw(step)
            return P.fixed(block, draw(st.integers(1, block)))
        grid = grid_of(q_len, draw(st.integers(2, 3)))
        dilation = tuple(draw(st.integers(1, 2)) for _ in grid)
        return P.neighborhood(grid, draw(st.sampled_from([3, 5])), dilation, draw(st.booleans()))

    other = draw(leaves(q_len, kv_len))
    ways: list[Callable[[], Pattern]] = [
        leaf,
        lambda: leaf() & other,
        lambda: leaf() | other,
        lambda: leaf() & ~other,
        lambda: leaf() | leaf() & other,
        lambda: (leaf() & P.window(500, -30)) | (leaf() & P.window(29, 500)),
        lambda: ~leaf() & other,
    ]
    return draw(st.sampled_from(ways))(), q_len, kv_len


@st.composite
def masks(draw: Any, longest: int = 96) -> np.ndarray:
    """A random boolean matrix: noise, structure with noise, repeated rows or columns, unions of progressions."""
    length = st.one_of(st.integers(1, 6), st.integers(1, longest))
    q_len, kv_len = draw(length), draw(length)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["noise", "structure", "flipped", "rows", "columns", "progressions"]))
    density = draw(st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.9, 1.0]))
    noise = rng.random((q_len, kv_len)) < density
    if kind == "noise":
        return noise
    if kind == "rows":
        return noise[rng.integers(0, q_len, q_len)[np.sort(rng.integers(0, q_len, q_len))]]
    if kind == "columns":
        return noise[:, rng.integers(0, kv_len, kv_len)[np.sort(rng.integers(0, kv_len, kv_len))]]
    if kind == "progressions":
        mask = np.zeros((q_len, kv_len), bool)
        for _ in range(int(rng.integers(0, 3 * q_len + 1))):
            mask[rng.integers(0, q_len), rng.integers(0, kv_len) :: rng.integers(1, 9)] = True
        return mask
    structure = draw(combinations(q_len, kv_len, 2)).dense(q_len, kv_len)
    return structure if kind == "structure" else structure ^ (rng.random((q_len, kv_len)) < 0.03)
