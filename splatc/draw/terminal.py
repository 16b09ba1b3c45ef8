"""Pictures in a terminal: braille dots for the mask, one block a tile for the tiles. They also work in a pipe."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.text import Text

from splatc.draw.figure import BITS, FULL, HUES, OTHERS, REMAINDER, image_size
from splatc.draw.raster import Drawing, TileImage, tile_image

WIDEST = 72  # characters; a square mask is then 36 lines high
_DOTS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])
# The order in which the dots of a 4 x 4 square appear as it gets darker (Bayer), in (0, 1).
_BAYER = (np.array([[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]]) + 0.5) / 16
_SHADES = " ░▒▓█"


def print_to(console: Console, drawing: Drawing, *, pieces: bool = True, tiles: bool = True) -> None:
    """Print a mask with its pieces, then each pass with its tiles."""
    e = drawing.explanation
    columns = min(console.width, WIDEST)
    ascii_only = not (console.encoding or "").lower().startswith("utf")
    console.print(Text(drawing.pattern, "bold"), soft_wrap=True)
    if pieces:
        pieces_found = "1 piece" if e.pieces == 1 else f"{e.pieces} pieces"
        console.print(
            f"mask {e.q_len} x {e.kv_len}: {e.nnz} attend, density {e.density:.2%}, {pieces_found}",
            soft_wrap=True,
        )
        console.print(_boxed(mask_text(drawing, columns - 2, ascii_only), ascii_only), soft_wrap=True)
        for hue, (text, _) in zip(HUES, drawing.named, strict=False):
            console.print(Text.assemble(("# " if ascii_only else "■ ", hue), text), soft_wrap=True)
        if drawing.others:
            console.print(Text.assemble(("# " if ascii_only else "■ ", OTHERS), f"{drawing.others} more pieces"))
        if e.remainder_nnz:
            console.print(
                Text.assemble(("# " if ascii_only else "■ ", REMAINDER), f"remainder of {e.remainder_nnz} elements")
            )
    if tiles:
        for i, (cover, tables) in enumerate(zip(drawing.covers, drawing.tables, strict=True)):
            console.print(
                f"\npass {i + 1} of {len(drawing.covers)}: {tables.tiles} tiles, rows {cover.rows}", soft_wrap=True
            )
            image = tile_image(cover, tables, columns // 2 - 1)
            console.print(_boxed(tiles_text(image, ascii_only), ascii_only), soft_wrap=True)
        shades = ("#", "+") if ascii_only else ("█", "▒")
        console.print(
            Text.assemble(
                (f"{shades[0]} ", FULL),
                f"{e.full_tiles} full  ",
                (f"{shades[1]} ", BITS),
                f"{e.bit_tiles} with bits  tiles {e.tiles}  waste {e.waste:.3f}",
            )
        )


def mask_text(drawing: Drawing, columns: int, ascii_only: bool = False) -> Text:
    """The mask in lines of at most ``columns`` characters: a dot an element or, if shrunk, dots as it is dense."""
    e = drawing.explanation
    dots = columns * 2
    height, width = image_size(e.q_len, e.kv_len, dots)
    layers = drawing.layers(height, width)
    grow = max(min(dots // max(height, width), 4), 1)
    layers = layers.repeat(grow, axis=1).repeat(grow, axis=2)
    layers = np.pad(layers, ((0, 0), (0, -layers.shape[1] % 4), (0, -layers.shape[2] % 2)))
    total = layers.sum(0)
    threshold = np.tile(_BAYER, (total.shape[0] // 4 + 1, total.shape[1] // 4 + 1))[: total.shape[0], : total.shape[1]]
    shrunk = max(e.q_len, e.kv_len) > dots
    on = total**0.5 > threshold if shrunk else total > 0.5
    cells = on.reshape(on.shape[0] // 4, 4, on.shape[1] // 2, 2).transpose(0, 2, 1, 3)
    per_cell = layers.reshape(len(layers), len(cells), 4, -1, 2).sum((2, 4))
    hues = np.array([*HUES, OTHERS, REMAINDER])[per_cell.argmax(0)]
    if ascii_only:
        characters = np.array(list(" .:+#"))[-(-cells.sum((2, 3)) // 2)]
    else:
        characters = np.vectorize(chr, otypes=["U1"])(0x2800 + (cells * _DOTS).sum((2, 3)))
    return _coloured(characters, hues)


def tiles_text(image: TileImage, ascii_only: bool = False) -> Text:
    """A tile, or several, as two characters: dark for full ones, lighter for those with bits."""
    middle = slice(image.cells // 2, None, image.cells)
    visited, bits = image.visited[middle, middle], image.bits[middle, middle]
    shades = " .:+#" if ascii_only else _SHADES
    dark = np.where(bits > visited / 2, np.where(visited > 0.5, 2, 1), np.ceil(visited * 4).astype(int))
    if ascii_only:
        dark = np.where((bits > visited / 2) & (visited > 0), 3, dark)
    characters = np.array(list(shades))[np.where(visited > 0, dark, 0)]
    hues = np.where(bits > visited / 2, BITS, FULL)
    return _coloured(characters.repeat(2, axis=1), hues.repeat(2, axis=1))


def _coloured(characters: NDArray[np.str_], hues: NDArray[np.str_]) -> Text:
    out = Text()
    for y, line in enumerate(characters):
        starts = np.flatnonzero(np.concatenate([[True], hues[y][1:] != hues[y][:-1]]))
        for a, b in zip(starts, [*starts[1:], len(line)], strict=True):
            out.append("".join(line[a:b]), str(hues[y][a]))
        if y + 1 < len(characters):
            out.append("\n")
    return out


def _boxed(text: Text, ascii_only: bool) -> Text:
    """A frame of one line round it."""
    lines = text.split("\n")
    width = max(len(line) for line in lines)
    corners, across, down = ("++++", "-", "|") if ascii_only else ("┌┐└┘", "─", "│")
    out = Text(corners[0] + across * width + corners[1] + "\n")
    for line in lines:
        out.append(down).append_text(line).append(" " * (width - len(line)) + down + "\n")
    return out.append(corners[2] + across * width + corners[3])
