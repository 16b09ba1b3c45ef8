"""Draws docs/img: one small PNG for each pattern, and the pictures of the README and of docs/architecture.md.

    make docs-pictures            (or: python docs/pictures.py)

A square of pixels is one (query, key) pair, queries down, keys across: no text, no axes, a kilobyte or two each. For a
picture of any mask with axes and a legend use `splatc show` or splatc.draw.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import splatc
from splatc import patterns as P
from splatc.draw import Drawing
from splatc.draw import save as save_drawing
from splatc.formats.acsr import ACSR
from splatc.formats.fold import unnest
from splatc.formats.strips import paint
from splatc.ir.interpret import tiles
from splatc.ir.passes import Schedule, lower, run_passes
from splatc.ir.program import Cover
from splatc.ir.views import View

FOLDER = Path(__file__).parent / "img"
WHITE, LINE, REST = (255, 255, 255), (40, 40, 40), (150, 150, 150)
COLOURS = [(31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40),
           (148, 103, 189), (140, 86, 75), (227, 119, 194), (188, 189, 34)]  # fmt: skip

N = 64
PATTERNS: dict[str, tuple[Any, int]] = {
    "full": (P.full(), N),
    "causal": (P.causal(), N),
    "window": (P.window(8, 4), N),
    "dilated": (P.dilated(16, 16, 4), N),
    "strided": (P.strided(8), N),
    "fixed": (P.fixed(16, 3), N),
    "blocked": (P.blocked(16), N),
    "block_window": (P.block_window(8, 1, 1), N),
    "global_rows": (P.global_rows(4), N),
    "global_cols": (P.global_cols(4), N),
    "random_blocks": (P.random_blocks(8, 2), N),
    "bigbird": (P.bigbird(4, window=3, global_blocks=1, random=2), N),
    "longformer": (P.longformer(6, 3), N),
    "sink": (P.causal() & (P.sink(4) | P.window(8, 0)), N),
    "prefix": (P.prefix(12), N),
    "documents": (P.documents([20, 9, 27, 8]) & P.causal(), N),
    "neighborhood_2d": (P.neighborhood((8, 8), 3), N),
    "neighborhood_clamped": (P.neighborhood((8, 8), 5, border="clamp"), N),
    "neighborhood_dilated": (P.neighborhood((8, 8), 3, dilation=2), N),
    "neighborhood_3d": (P.neighborhood((4, 4, 4), 3, causal=(True, False, False)), N),
    "block_mask": (P.block_mask(["1000", "1100", "0010", "1011"], 16), N),
    "sparse_transformer": (P.causal() & (P.window(7, 0) | P.strided(8)), N),
}


def by_piece(acsr: ACSR) -> np.ndarray:
    """uint8 (q_len, kv_len, 3): each piece in its colour, the remainder grey."""
    picture = np.full((acsr.q_len, acsr.kv_len, 3), WHITE, np.uint8)
    picture[acsr.to_dense()] = REST
    for i in range(len(acsr.pieces)):
        strips = unnest(acsr.pieces.table[i : i + 1])
        picture[paint(strips, acsr.q_len, acsr.kv_len) > 0] = COLOURS[i % len(COLOURS)]
    return picture


def by_tile(acsr: ACSR, picture: np.ndarray, tile: int, scale: int) -> Iterator[np.ndarray]:
    """For each pass: the picture, enlarged, in the order of the pass's views, with its tiles outlined.

    What a tile covers but does not compute is light grey; the elements of other passes are left out.
    """
    program = run_passes(lower(acsr), Schedule(tile, tile))
    for _, cover in program.domains:
        assert isinstance(cover, Cover)
        rows, cols = order_of(cover.rows), order_of(cover.cols[0])
        row_of, col_of = np.argsort(rows), np.argsort(cols)
        shown = np.full_like(picture, 255)
        boxes = []
        for q, k, held in tiles(cover):
            here = np.ix_(q[q >= 0], k[k >= 0])
            shown[here] = np.where(held[q >= 0][:, k >= 0, None], picture[here], np.uint8(225))
            y, x = row_of[q[q >= 0]], col_of[k[k >= 0]]
            boxes.append((y.min(), y.max() + 1, x.min(), x.max() + 1))
        big = enlarge(shown[rows][:, cols], scale)
        for top, bottom, left, right in boxes:
            outline(big, top * scale, bottom * scale, left * scale, right * scale)
        yield big


def order_of(view: View) -> np.ndarray:
    """All positions of a view, line after line: the order in which its boxes are adjacent."""
    n1, n2, n3 = view.extents
    x = np.stack([a.ravel() for a in np.meshgrid(np.arange(n3), np.arange(n2), np.arange(n1), indexing="ij")][::-1], 1)
    position = x @ np.array(view.strides)
    return position[position < view.length]


def enlarge(picture: np.ndarray, scale: int) -> np.ndarray:
    """Every pair as a square of scale x scale pixels."""
    return picture.repeat(scale, 0).repeat(scale, 1)


def outline(picture: np.ndarray, top: int, bottom: int, left: int, right: int) -> None:
    """A dark rectangle, one pixel wide, in place."""
    for y in (top, bottom - 1):
        picture[y, left:right] = LINE
    for x in (left, right - 1):
        picture[top:bottom, x] = LINE


def side_by_side(*pictures: np.ndarray) -> np.ndarray:
    """Pictures of one height in a row, with white between."""
    gap = np.full((pictures[0].shape[0], 24, 3), 255, np.uint8)
    return np.concatenate([part for p in pictures for part in (p, gap)][:-1], axis=1)


def save(name: str, picture: np.ndarray) -> None:
    """Frame a picture and write it to docs/img."""
    from matplotlib.image import imsave

    outline(picture, 0, picture.shape[0], 0, picture.shape[1])
    imsave(FOLDER / f"{name}.png", picture, metadata={"Software": None})


def main() -> None:
    """Draw everything."""
    FOLDER.mkdir(exist_ok=True)
    for name, (pattern, length) in PATTERNS.items():
        save(name, enlarge(by_piece(splatc.analyze(pattern, length)), 4))
    pattern = P.causal() & (P.window(7, 0) | P.strided(16))
    acsr = splatc.analyze(pattern, 128)
    pieces = by_piece(acsr)
    passes = list(by_tile(acsr, pieces, tile=8, scale=3))
    save("tiles", side_by_side(enlarge(pieces, 3), *passes))
    drawing = Drawing.of(P.causal() & P.fixed(128, 16), 2048)
    save_drawing(drawing, FOLDER / "views.png")
    sizes = [path.stat().st_size for path in FOLDER.glob("*.png")]
    print(f"{len(sizes)} pictures, {sum(sizes) // 1024} KiB in {FOLDER}")


if __name__ == "__main__":
    main()
