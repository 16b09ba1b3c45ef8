"""The way from a map of attention to a pattern, as pictures side by side (matplotlib, loaded when one is drawn)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from splatc.draw.figure import SIZE, check_kind, load_figure
from splatc.draw.raster import Image
from splatc.errors import InvalidInput

if TYPE_CHECKING:
    from splatc.sparsify.spion import Maps

PALER = 0.4  # the power of shares that colours show: a few large ones would leave the rest black


def save_maps(maps: Maps, path: str | Path, *, title: str = "") -> None:
    """Write score map, filtered map, pooled map, fill paths and pattern to a .png, .svg or .pdf file."""
    check_kind(path)
    maps_figure(maps, title).savefig(path, dpi=150, facecolor="white")


def maps_figure(maps: Maps, title: str = "") -> Any:
    """A matplotlib Figure of one row of panels; without a filter or paths, of those that there are."""
    from splatc.sparsify.pooling import as_numpy

    scores = as_numpy(maps.scores)
    panels = [(f"scores, {len(scores)} x {len(scores)}", shrink(scores))]
    if maps.filter > 1:
        panels.append((f"sums along {maps.filter} of the diagonal", shrink(maps.filtered)))
    panels.append((f"means of blocks of {maps.block}", maps.pooled))
    if maps.paths is not None:
        panels.append((f"fill paths: {maps.paths.mean():.1%} of blocks", maps.paths.astype(np.float64)))
    above = "" if maps.threshold is None else f", threshold {maps.threshold:.3g}"
    panels.append((f"pattern: {maps.density:.1%} of blocks{above}", maps.blocks.astype(np.float64)))

    out = load_figure(figsize=(3.1 * len(panels), 3.4), layout="constrained")
    for axes, (text, image) in zip(out.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        binary = image is panels[-1][1] or text.startswith("fill paths")
        axes.imshow(image if binary else np.abs(image) ** PALER, cmap="Greys" if binary else "viridis",
                    interpolation="nearest", extent=(0, len(scores), len(scores), 0))  # fmt: skip
        axes.set_title(text, fontsize=8.5, loc="left")
        axes.tick_params(labelsize=7)
    if title:
        out.suptitle(title, fontsize=10, x=0.01, ha="left")
    return out


def load_scores(path: Path) -> Image:
    """A map of attention from a .npy file: floats (length, length) or (heads, length, length)."""
    try:
        out = np.load(path, allow_pickle=False)
    except (ValueError, EOFError):
        raise InvalidInput(f"{path} is no .npy file of numbers: save a map of attention by numpy.save") from None
    if not isinstance(out, np.ndarray) or out.dtype.kind != "f":
        raise InvalidInput(f"{path} holds no floats: give a map of attention after the softmax")
    return out


def shrink(image: NDArray[np.floating[Any]]) -> Image:
    """At most SIZE x SIZE cells: means of what they cover."""
    step = -(-len(image) // SIZE)
    edges = np.arange(0, len(image), step)
    sizes = np.diff(np.append(edges, len(image)))
    sums = np.add.reduceat(np.add.reduceat(np.asarray(image, np.float64), edges, 0), edges, 1)
    return np.asarray(sums / (sizes[:, None] * sizes))
