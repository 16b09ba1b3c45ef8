"""SPION's pattern of a layer: the blocks of a map of its attention that matter, found by a diagonal filter, pooling and
flood filling (arXiv:2309.12578)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from splatc.errors import InvalidInput
from splatc.patterns import Pattern, PerHead, block_mask
from splatc.sparsify.pooling import as_numpy, diagonal_sums, pool

Float = NDArray[np.float64]
Bool = NDArray[np.bool_]

VARIANTS = {
    "CF": "diagonal filter, pooling, flood filling",
    "C": "diagonal filter, pooling, the largest blocks",
    "F": "pooling, flood filling",
    "CT": "diagonal filter, pooling, every block above the threshold",
    "T": "pooling, every block above the threshold",
}


@dataclass(frozen=True, eq=False)
class Maps:
    """What `find_pattern` saw on its way from a map of attention to blocks; n = ceil(length / block).

    scores: as given (length, length), of NumPy or torch. filter: the length of the diagonal filter, 1 for none.
    pooled (n, n): means of the filtered map over blocks. threshold: what a block has to exceed; None where the largest
    were counted out. paths (n, n): blocks that a path of the flood filling stepped on; None without one.
    blocks (n, n): the pattern, its diagonal included.
    """

    scores: Any
    block: int
    filter: int
    pooled: Float
    threshold: float | None
    paths: Bool | None
    blocks: Bool

    @cached_property
    def filtered(self) -> Float:
        """The map of which ``pooled`` has the means: each cell the sum along its diagonal. Made when looked at, as the
        pattern does not need it."""
        return diagonal_sums(as_numpy(self.scores), self.filter)

    @property
    def pattern(self) -> Pattern:
        """The blocks as a pattern."""
        return block_mask(self.blocks, self.block)

    @property
    def density(self) -> float:
        """The share of blocks that attend."""
        return float(self.blocks.mean())


@dataclass(frozen=True, eq=False)
class Found:
    """A pattern and the maps that led to it: one, or one for each head."""

    pattern: Pattern
    maps: tuple[Maps, ...]


def find_pattern(scores: Any, block: int = 64, quantile: float = 0.98, filter: int = 31, variant: str = "CF", *,
                 density: float | None = None, per_head: bool = False) -> Found:  # fmt: skip
    """The block pattern of a map of attention, by SPION (arXiv:2309.12578) or a part of it.

    scores: how much each query attends to each key, after the softmax: (length, length), or (heads, length, length),
    whose mean over heads is taken, or with ``per_head`` each for itself; NumPy or torch, on any device. block: the side
    of a block. quantile: of the pooled map, in [0, 1]: its blocks above are candidates. filter: cells along the
    diagonal that are summed, odd. variant: a key of ``VARIANTS``. density: of variant "C" only, the share of blocks to
    take, the diagonal included: the density * n^2 - n largest, and the diagonal; default 1 - quantile + 1/n.

    A length that is no multiple of the block leaves smaller blocks at the end, whose means are over what they have.
    The pattern is for this length; it knows nothing of causality: combine it, ``found.pattern & causal()``. Raises
    InvalidInput for options or maps that do not fit, and for values that are not finite.
    """
    check_options(block, quantile, filter, variant, density)
    shape = tuple(getattr(scores, "shape", ()))
    if len(shape) not in (2, 3) or shape[-1] != shape[-2] or 0 in shape:
        raise InvalidInput(f"scores have shape {shape}: they must be (length, length) or (heads, length, length)")
    if per_head and len(shape) == 2:
        raise InvalidInput("per_head needs the map of each head: scores of shape (heads, length, length)")
    if len(shape) == 3 and not per_head:
        scores = scores.mean(0) if shape[0] > 1 else scores[0]
    maps = tuple(_find(one, block, quantile, filter, variant, density) for one in (scores if per_head else [scores]))
    return Found(PerHead(tuple(one.pattern for one in maps)) if per_head else maps[0].pattern, maps)


def _find(scores: Any, block: int, quantile: float, filter: int, variant: str, density: float | None) -> Maps:
    filter = filter if "C" in variant else 1
    pooled = pool(scores, block, filter)
    if not np.isfinite(pooled).all():
        raise InvalidInput("scores are not all finite: give the attention after the softmax, of a step that is sound")
    n = len(pooled)
    threshold = paths = None
    if variant == "C":
        share = 1 - quantile + 1 / n if density is None else density
        blocks = largest(pooled, int(round(share * n * n, 6)) - n)
    else:
        threshold = float(np.quantile(pooled, quantile))
        blocks = pooled > threshold
        if "F" in variant:
            paths = fill_paths(pooled)
            blocks &= paths
    return Maps(scores, block, filter, pooled, threshold, paths, blocks | np.eye(n, dtype=np.bool_))


def largest(pooled: Float, count: int) -> Bool:
    """The ``count`` largest blocks; of equal ones the first by row, then column. bool (n, n)."""
    order = np.argsort(-pooled, axis=None, kind="stable")
    out = np.zeros(pooled.shape, np.bool_)
    out.reshape(-1)[order[: max(count, 0)]] = True
    return out


def fill_paths(pooled: Float) -> Bool:
    """The blocks that the paths of the flood filling step on, bool (n, n).

    A path starts in each block of the first row and of the first column, and steps down, right or diagonally, to the
    largest of the three (diagonally if the largest are equal; beyond the map is 0), until it leaves the map. Where it
    starts does not count as a step.
    """
    n = len(pooled)
    around = np.zeros((n + 1, n + 1))
    around[:n, :n] = pooled
    down, right, both = around[1:, :-1], around[:-1, 1:], around[1:, 1:]
    goes_down, goes_right = (down > right) & (down > both), (right > down) & (right > both)
    x, y = np.indices((n, n))
    x, y = x + ~goes_right, y + ~goes_down
    outside = n * n
    step = np.append(np.where((x < n) & (y < n), x * n + y, outside), outside)  # of each block, the next one

    reached = np.zeros(n * n + 1, np.bool_)
    at = np.union1d(np.arange(n), np.arange(n) * n)
    while (at := np.unique(step[at]))[0] != outside:
        reached[at] = True
    return reached[:outside].reshape(n, n)


def check_options(block: int, quantile: float, filter: int, variant: str, density: float | None) -> None:
    """InvalidInput for options that `find_pattern` does not take."""
    if variant not in VARIANTS:
        known = "; ".join(f"{name}: {text}" for name, text in VARIANTS.items())
        raise InvalidInput(f"variant is {variant!r}: it must be one of {known}")
    for name, value in (("block", block), ("filter", filter)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InvalidInput(f"{name} is {value!r}: it must be a positive whole number")
    if filter % 2 == 0:
        raise InvalidInput(f"filter is {filter}: it must be odd, to have a middle")
    if not 0 <= quantile <= 1:
        raise InvalidInput(f"quantile is {quantile}: it must be between 0 and 1")
    if density is not None and (variant != "C" or not 0 < density <= 1):
        wrong = "it must be above 0 and at most 1" if variant == "C" else "only variant C has one: choose a quantile"
        raise InvalidInput(f"density is {density}: {wrong}")
