"""Which cases are measured at which shapes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from splatc.bench.gpu.cases import (
    Case,
    causal_window,
    half_in_one_row,
    neighborhood_2d,
    random_tiles,
    seventeen,
    tile_lists,
)
from splatc.bench.gpu.measure import Job
from splatc.bench.gpu.peers import PACKAGES
from splatc.bench.gpu.shapes import Shape

# In the order in which they run.
SUITES = ("dense", "patterns", "shapes", "short", "pruned", "growth", "host", "checks", "backward")
HEAD_DIMS = (64, 128)
LENGTH = 8192
GROWTH = tuple(1 << n for n in range(12, 19))  # 4K to 256K
MILLION = 1 << 20
SHORT, SHORT_CASES = (256, 1024, 2048), ("full", "causal", "causal_win256")
ODD_LENGTHS = (1, 17, 127, 1000, 8191, 8192)
CHECK_DIMS, CHECK_DTYPES = (64, 128, 256), ("bfloat16", "float16")
QUICK_CASES = ("full", "causal", "win_pm256", "strided64", "st_fixed128_16", "longformer")
SHORT_PEERS = ("cudnn", "flash", "flex", *PACKAGES)
PEERS = ("flex", "cudnn", "flash", "masked", *PACKAGES)
PRUNED_PEERS = ("unpruned", "cudnn", "flash")
PRUNED_CASES = ("causal_win1024", "blocked256")  # besides the full mask
BACKWARD_PEERS = ("flex", "cudnn", "flash", "flash_attn", "flash_attn_3")
SETTLE_S = 0.1  # of growth, whose lengths are compared: a GPU at work slows down, and what ran before decides how soon
BACKWARD_REPEATS = 20  # runs compared bit by bit


@dataclass(frozen=True)
class Choice:
    """What of the suites to run. quick: few cases. length, heads: of all but growth and the long context."""

    dtype: str = "bfloat16"
    head_dims: tuple[int, ...] = HEAD_DIMS
    quick: bool = False
    length: int = LENGTH
    heads: int = 16
    repeats: int = 50  # runs compared bit by bit

    @staticmethod
    def small(dtype: str = "bfloat16", head_dims: tuple[int, ...] = HEAD_DIMS) -> Choice:
        """Small sizes, for which no target is stated."""
        return Choice(dtype, head_dims, quick=True, length=2048, heads=4, repeats=5)


def jobs(suite: str, choice: Choice) -> list[Job]:
    """The timed jobs of "dense", "patterns", "shapes", "short", "pruned", "growth" or "backward"."""
    makers = {"dense": _dense, "patterns": _patterns, "shapes": _shapes, "short": _short, "pruned": _pruned,
              "growth": _growth, "backward": _backward}  # fmt: skip
    return list(makers[suite](choice))


def _shape(choice: Choice, length: int, head_dim: int) -> Shape:
    return Shape(length, head_dim, 1, choice.heads, choice.heads, choice.dtype)


def _dense(choice: Choice) -> Iterator[Job]:
    for head_dim in choice.head_dims:
        for length in (choice.length, 2 * choice.length):
            for name in ("full", "causal"):
                shape = _shape(choice, length, head_dim)
                yield Job("dense", seventeen(length)[name], shape, ("cudnn", "flash", *PACKAGES), choice.repeats)


def _patterns(choice: Choice) -> Iterator[Job]:
    # Head dims inside: the matrices and block masks of a case are made once.
    for case in seventeen(choice.length).values():
        if not choice.quick or case.name in QUICK_CASES:
            for head_dim in choice.head_dims:
                yield Job("patterns", case, _shape(choice, choice.length, head_dim), PEERS, choice.repeats)


def _shapes(choice: Choice) -> Iterator[Job]:
    for head_dim in choice.head_dims:
        shape, double = (_shape(choice, times * choice.length, head_dim) for times in (1, 2))
        yield Job("shapes", neighborhood_2d(choice.length), shape, ("flex", "masked", "natten"), choice.repeats)
        yield Job("shapes", random_tiles(choice.length), shape, ("flex",), choice.repeats)
        for case in half_in_one_row(2 * choice.length):
            yield Job("shapes", case, double, (), choice.repeats)
    length, heads, kv_heads = (2 * choice.length, 8, 2) if choice.quick else (32768, 64, 8)
    if 128 in choice.head_dims:
        shape = Shape(length, 128, 1, heads, kv_heads, choice.dtype)
        yield Job("shapes", causal_window(1024), shape, ("flex", *PACKAGES), min(choice.repeats, 10))


def _short(choice: Choice) -> Iterator[Job]:
    """Launches that fill a GPU once or not at all: what each costs besides its tiles."""
    for head_dim in choice.head_dims:
        for length in SHORT[:1] if choice.quick else SHORT:
            cases, shape = seventeen(length), _shape(choice, length, head_dim)
            for name in SHORT_CASES:
                yield Job("short", cases[name], shape, SHORT_PEERS, choice.repeats)


def _pruned(choice: Choice) -> Iterator[Job]:
    """2:4 attention, alone at several lengths and with static patterns."""
    for head_dim in choice.head_dims:
        for length in (choice.length // 2, choice.length, 2 * choice.length):
            cases, shape = seventeen(length), _shape(choice, length, head_dim)
            names = ("full", *(PRUNED_CASES if length == choice.length else ()))
            for name in names:
                yield Job("pruned", cases[name].pruned_by(2, 4), shape, PRUNED_PEERS, choice.repeats)


def _growth(choice: Choice) -> Iterator[Job]:
    lengths: Sequence[int] = (choice.length, 2 * choice.length) if choice.quick else (*GROWTH, MILLION)
    head_dim = max(choice.head_dims)
    for name in ("win_pm256", "strided64"):
        for length in lengths:
            yield Job("growth", seventeen(length)[name], _shape(choice, length, head_dim), (), 3, SETTLE_S)


def _backward(choice: Choice) -> Iterator[Job]:
    repeats = min(choice.repeats, BACKWARD_REPEATS)
    every = [*seventeen(choice.length).values(), tile_lists(choice.length)]
    for case in every:
        if not choice.quick or case.name in (*QUICK_CASES, every[-1].name):
            for head_dim in choice.head_dims:
                yield Job("backward", case, _shape(choice, choice.length, head_dim), BACKWARD_PEERS, repeats)
    for head_dim in choice.head_dims:  # twice as long, where attention has no mask but the diagonal
        for name in ("full", "causal"):
            shape = _shape(choice, 2 * choice.length, head_dim)
            yield Job("backward", seventeen(2 * choice.length)[name], shape, BACKWARD_PEERS[1:], repeats)


def checked_cases(length: int, quick: bool) -> list[Case]:
    """The masks whose results are checked at odd lengths."""
    cases = [*seventeen(length).values(), neighborhood_2d(length)]
    return [case for case in cases if not quick or case.name in QUICK_CASES]
