"""Pictures in a file or a notebook (matplotlib, loaded when the first one is drawn)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
FULL, BITS, WASTE, BORDER = "#4C78A8", "#9D5BB5", "#EEE1F3", "#FFFFFF"
FAINT = 0.28  # the shade of the thinnest trace of an element
SIDE, LEFT, TOP, LINE = 4.7, 0.62, 0.98, 0.15  # inches: a panel, the space left of it and above it, a line of legend
MAX_BORDERS = 80  # tiles along a side beyond which borders would hide them


def save(drawing: Drawing, path: str | Path, *, pieces: bool = True, tiles: bool = True) -> None:
    """Write the picture to a .png, .svg or .pdf file. Raises InvalidInput for another kind of file."""
    check_kind(path)
    drawn = figure(drawing, pieces=pieces, tiles=tiles)
    drawn.savefig(path, dpi=150, facecolor="white")


def check_kind(path: str | Path) -> None:
    """InvalidInput unless a picture can be written to a file of this name."""
    suffix = Path(path).suffix
    if suffix.lower() not in KINDS:
        raise InvalidInput(f"{path}: cannot draw a {suffix or 'nameless kind of'} file: use {', '.join(KINDS)}")


def load_figure(**options: Any) -> Any:
    """An empty matplotlib Figure; Unsupported without matplotlib."""
    try:
        import matplotlib  # noqa: F401  (loaded already, or missing)
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise Unsupported(
            "pictures need matplotlib: pip install 'splatc[plot]' (or leave out -o to draw in the terminal)"
        ) from None
    out = Figure(**options)
    FigureCanvasAgg(out)
    return out


def figure(drawing: Drawing, *, pieces: bool = True, tiles: bool = True) -> Any:
    """A matplotlib Figure: the mask coloured by piece, then every pass with its tiles in the order of its views."""
    out = load_figure()
    import matplotlib as mpl
    from matplotlib.patches import Rectangle

    panels = [_pieces_panel(drawing)] if pieces else []
    panels += [_tiles_panel(drawing, i) for i in range(len(drawing.covers) if tiles else 0)]
    lines = max(len(panel.legend) for panel in panels)
    sides = [SIDE * min(1, panel.height / panel.width) for panel in panels]
    wide, high = (SIDE + LEFT) * len(panels) + 0.1, TOP + max(sides) + 0.25 + LINE * lines
    with mpl.rc_context({"font.size": 8, "axes.linewidth": 0.6, "font.family": "sans-serif", "svg.fonttype": "none"}):
        out.set_size_inches(wide, high)
        for i, panel in enumerate(panels):
            w, h = (SIDE * min(1, x / y) for x, y in ((panel.width, panel.height), (panel.height, panel.width)))
            x = LEFT + i * (SIDE + LEFT)
            ax = out.add_axes((x / wide, (high - TOP - h) / high, w / wide, h / high))
            panel.draw(ax)
            _frame(ax, panel)
            for j, (colour, text) in enumerate(panel.legend):
                y = (high - TOP - h - 0.12 - LINE * (j + 0.5)) / high
                if colour:
                    out.patches.append(
                        Rectangle(
                            (x / wide, y - 0.04 / high),
                            0.1 / wide,
                            0.08 / high,
                            facecolor=colour,
                            transform=out.transFigure,
                        )
                    )
                out.text((x + 0.15) / wide, y, text, fontsize=7, va="center")
        out.text(
            LEFT / wide,
            1 - 0.17 / high,
            _shorten(drawing.pattern, 75 * len(panels)),
            fontsize=10,
            fontweight="bold",
            va="center",
        )
    return out


@dataclass(frozen=True)
class Panel:
    """One picture of a figure. height, width: of its axes, in data units; legend: (colour or "", text) lines."""

    title: str
    axes: tuple[str, str]
    height: int
    width: int
    legend: list[tuple[str, str]]
    draw: Callable[[Any], None]


def _pieces_panel(drawing: Drawing) -> Panel:
    e = drawing.explanation
    legend = [(hue, _shorten(text, 84)) for hue, (text, _) in zip(HUES, drawing.named, strict=False)]
    if drawing.others:
        legend.append((OTHERS, f"{drawing.others} more pieces"))
    if e.remainder_nnz:
        legend.append((REMAINDER, f"remainder: {e.remainder_nnz} elements as bits"))

    def draw(ax: Any) -> None:
        image = colour_layers(drawing.layers(*image_size(e.q_len, e.kv_len, SIZE)))
        ax.imshow(image, extent=(0, e.kv_len, e.q_len, 0), interpolation="nearest", aspect="auto")

    title = f"mask {e.q_len} x {e.kv_len}: density {e.density:.2%}, {e.pieces} {'piece' if e.pieces == 1 else 'pieces'}"
    return Panel(title, ("key", "query"), e.q_len, e.kv_len, legend, draw)


def _tiles_panel(drawing: Drawing, number: int) -> Panel:
    e = drawing.explanation
    tables, passes = drawing.tables[number], len(drawing.covers)
    tiles = tile_image(drawing.covers[number], tables, SIZE)
    legend = [(FULL, f"{tables.full_tiles} full tiles")]
    if tables.bit_tiles:
        legend += [
            (BITS, f"{tables.bit_tiles} tiles with bits, {len(tables.bits)} distinct"),
            (WASTE, "computed and masked"),
        ]
    legend += [("", f"rows {tiles.rows}"), *(("", f"columns {view}") for view in tiles.cols[:4])]
    legend.append(("", f"{'all passes: ' if passes > 1 else ''}{e.tiles} tiles, waste {e.waste:.2f}"))

    def draw(ax: Any) -> None:
        ax.imshow(
            colour_tiles(tiles),
            extent=(0, tiles.bounds[-1], tiles.row_tiles, 0),
            interpolation="nearest",
            aspect="auto",
        )
        if max(tiles.bounds[-1], tiles.row_tiles) <= MAX_BORDERS:
            _borders(ax, tiles)
        for bound in tiles.bounds[1:-1]:
            ax.axvline(bound, color="black", linewidth=1.0)

    title = f"tiles{f' of pass {number + 1} of {passes}' if passes > 1 else ''}, in the order of the kernel's views"
    return Panel(title, ("column tile", "row tile"), tiles.row_tiles, tiles.bounds[-1], legend, draw)


def _borders(ax: Any, tiles: TileImage) -> None:
    """A thin line round every visited tile."""
    from matplotlib.collections import LineCollection

    middle = slice(tiles.cells // 2, None, tiles.cells)
    y, x = np.nonzero(tiles.visited[middle, middle] > 0.5)
    corners = np.stack([np.stack([x + dx, y + dy], 1) for dx, dy in ((0, 0), (1, 0), (1, 1), (0, 1), (0, 0))], 1)
    with_bits = tiles.bits[middle, middle][y, x] > 0.5
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


def _frame(ax: Any, panel: Panel) -> None:
    x, y = panel.axes
    ax.set_xlabel(x, labelpad=2)
    ax.set_ylabel(y, labelpad=2)
    ax.xaxis.set_label_position("top")
    ax.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=2.5, width=0.6, labelsize=7)
    ax.set_title(panel.title, fontsize=8.5, loc="left", pad=6)


def _shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
