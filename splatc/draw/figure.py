"""Pictures in a file or a notebook (matplotlib, loaded when the first one is drawn)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from splatc.draw.raster import NAMED, Drawing, Image, TileImage, tile_image
from splatc.errors import InvalidInput, Unsupported

SIZE = 840  # image cells along a side
KINDS = (".png", ".svg", ".pdf")
# Eight hues that colour-blind readers tell apart (Okabe and Ito, 2008, black replaced), then the shared layers.
HUES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#6A51A3")
OTHERS, REMAINDER = "#8A8D93", "#3B3B3B"
FULL, BITS, WASTE, BORDER = "#2F6DB5", "#E08A1E", "#FBE6C8", "#FFFFFF"
FAINT = 0.28  # the shade of the thinnest trace of an element
MAX_BORDERS = 80  # tiles along a side beyond which borders would hide them


def save(drawing: Drawing, path: str | Path, *, pieces: bool = True, tiles: bool = True) -> None:
    """Write the picture to a .png, .svg or .pdf file. Raises InvalidInput for another kind of file."""
    path = Path(path)
    if path.suffix.lower() not in KINDS:
        raise InvalidInput(f"{path}: cannot draw a {path.suffix or 'nameless kind of'} file: use {', '.join(KINDS)}")
    drawn = figure(drawing, pieces=pieces, tiles=tiles)
    drawn.savefig(path, dpi=150, facecolor="white")


def figure(drawing: Drawing, *, pieces: bool = True, tiles: bool = True) -> Any:
    """A matplotlib Figure: the mask coloured by piece, then every pass with its tiles in the order of its views."""
    try:
        import matplotlib as mpl
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise Unsupported("pictures need matplotlib: pip install 'splatc[plot]' (or leave out -o to draw in the terminal)") from None
    panels = [lambda ax: _draw_pieces(ax, drawing)] if pieces else []
    covers = drawing.covers if tiles else ()
    panels += [lambda ax, i=i, cover=cover: _draw_tiles(ax, drawing, tile_image(cover, SIZE), i) for i, cover in enumerate(covers)]
    with mpl.rc_context({"font.size": 8, "axes.linewidth": 0.6, "font.family": "sans-serif", "svg.fonttype": "none"}):
        out = Figure(figsize=(5.2 * len(panels), 6.4), layout="constrained")
        FigureCanvasAgg(out)
        axes = out.subplots(1, len(panels), squeeze=False)[0]
        for ax, panel in zip(axes, panels, strict=True):
            panel(ax)
        out.suptitle(_shorten(drawing.pattern, 60 * len(panels)), fontsize=10, fontweight="bold", x=0.01, ha="left")
    return out


def _draw_pieces(ax: Any, drawing: Drawing) -> None:
    e = drawing.explanation
    height, width = image_size(e.q_len, e.kv_len, SIZE)
    ax.imshow(colour_layers(drawing.layers(height, width)), extent=(0, e.kv_len, e.q_len, 0), interpolation="nearest")
    _frame(ax, "key", "query")
    ax.set_title(f"mask {e.q_len} x {e.kv_len}: density {e.density:.2%}, {e.pieces} pieces", fontsize=8.5, loc="left")
    lines = [(hue, _shorten(text, 64)) for hue, (text, _) in zip(HUES, drawing.named, strict=False)]
    if drawing.others:
        lines.append((OTHERS, f"{drawing.others} more pieces"))
    if e.remainder_nnz:
        lines.append((REMAINDER, f"remainder: {e.remainder_nnz} elements as bits"))
    _legend(ax, lines)


def _draw_tiles(ax: Any, drawing: Drawing, tiles: TileImage, number: int) -> None:
    e = drawing.explanation
    height, width = tiles.kept.shape
    ax.imshow(colour_tiles(tiles), extent=(0, tiles.bounds[-1], tiles.row_tiles, 0), interpolation="nearest")
    if max(tiles.bounds[-1], tiles.row_tiles) <= MAX_BORDERS:
        _borders(ax, tiles)
    for bound in tiles.bounds[1:-1]:
        ax.axvline(bound, color="black", linewidth=1.2)
    _frame(ax, "column tile", "row tile")
    many = len(drawing.covers) > 1
    title = f"pass {number + 1} of {len(drawing.covers)}" if many else f"{e.tiles} tiles, waste {e.waste:.2f}"
    ax.set_title(f"{title}, rows seen as {tiles.rows.kind}", fontsize=8.5, loc="left")
    cover = drawing.covers[number]
    partly = int((cover.entries[:, 5] > 0).sum())
    lines = [(FULL, f"{cover.tiles - partly} full tiles"),
             (BITS, f"{partly} tiles with bits ({cover.shapes.count} distinct); pale: computed and masked")]  # fmt: skip
    lines += [("white", f"rows {tiles.rows}")] + [("white", f"columns {view}") for view in tiles.cols[:4]]
    if many:
        lines.append(("white", f"all passes: {e.tiles} tiles, waste {e.waste:.2f}"))
    _legend(ax, lines)


def _borders(ax: Any, tiles: TileImage) -> None:
    """A thin line round every visited tile."""
    from matplotlib.collections import LineCollection

    cells = tiles.cells
    visited = tiles.visited[cells // 2 :: cells, cells // 2 :: cells] > 0.5
    y, x = np.nonzero(visited)
    corners = np.stack([np.stack([x + dx, y + dy], 1) for dx, dy in ((0, 0), (1, 0), (1, 1), (0, 1), (0, 0))], 1)
    with_bits = tiles.bits[cells // 2 :: cells, cells // 2 :: cells][y, x] > 0.5
    for mask, colour in ((~with_bits, BORDER), (with_bits, BITS)):
        ax.add_collection(LineCollection(list(corners[mask]), colors=colour, linewidths=0.5))


def image_size(q_len: int, kv_len: int, size: int) -> tuple[int, int]:
    """(height, width) of an image of a mask: at most ``size``, one cell an element or fewer."""
    longest = max(q_len, kv_len)
    shrink = min(1.0, size / longest)
    return max(round(q_len * shrink), 1), max(round(kv_len * shrink), 1)


def colour_layers(layers: Image) -> Image:
    """Coverage by layer to colours (height, width, 3): the hue of what covers most, paler where little is covered."""
    hues = np.array([rgb(h) for h in (*HUES, OTHERS, REMAINDER)])
    assert len(hues) == NAMED + 2
    total = np.clip(layers.sum(0), 0, 1)
    share = layers / np.maximum(layers.sum(0), 1e-12)
    hue = np.einsum("lyx,lc->yxc", share, hues)
    strength = np.where(total > 1e-9, FAINT + (1 - FAINT) * total**0.7, 0)[..., None]
    out: Image = 1 - strength * (1 - hue)
    return out


def colour_tiles(tiles: TileImage) -> Image:
    """Tiles to colours: full ones in one hue, the elements of others in a second on a pale ground."""
    full, bits, waste = (np.array(rgb(c)) for c in (FULL, BITS, WASTE))
    share = np.clip(tiles.bits, 0, 1)[..., None]
    visited = tiles.visited[..., None]
    inside = np.clip(tiles.kept / np.maximum(tiles.visited, 1e-9), 0, 1)[..., None]
    ground = np.where(visited > 0, 1 - visited * (1 - waste), 1.0)
    hue = full * (1 - share) + bits * share
    out: Image = ground * (1 - inside * visited) + hue * inside * visited
    return np.clip(out, 0, 1)


def rgb(colour: str) -> tuple[float, float, float]:
    """A "#rrggbb" as three numbers in [0, 1]."""
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return red, green, blue


def _frame(ax: Any, x: str, y: str) -> None:
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.xaxis.set_label_position("top")
    ax.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=2.5, width=0.6)
    ax.set_aspect("equal")


def _legend(ax: Any, lines: list[tuple[str, str]]) -> None:
    from matplotlib.patches import Patch

    if not lines:
        return
    handles = [Patch(facecolor=colour, edgecolor="none", label=text) for colour, text in lines]
    ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(0, -0.01), frameon=False, fontsize=7, borderaxespad=0.2,
              handlelength=1.0, handleheight=0.9, labelspacing=0.35)  # fmt: skip


def _shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
