"""Pieces seen through a view: the same strips in view coordinates, where a strided piece has become an interval.

In view coordinates a position is (line, u): contiguous views have one line; a residue view has one line a residue and u
counts inside the class; a blocks view has one line whose u runs over the chosen positions of block after block.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from splatc.formats.fold import MAX_LEVELS, unnested
from splatc.formats.strips import (
    COL,
    COUNT,
    DCOL,
    DCOUNT,
    DWIDTH,
    FIELDS,
    ROW,
    ROWS,
    STRIDE,
    WIDTH,
    Ints,
    ramp,
)
from splatc.ir.views import View


@dataclass(frozen=True)
class Seen:
    """Strips in view coordinates (int64 (n, 9), row and col are u), the lines they lie on, and each one's piece."""

    strips: Ints
    row_line: Ints
    col_line: Ints
    piece: Ints


def see(pieces: Ints, rows: View, cols: View) -> Seen | None:
    """The pieces in the coordinates of a row view and a column view; None if the column view cannot show them."""
    if (rows.kind == "patches") != (cols.kind == "patches"):
        return None
    if rows.kind == "patches":
        return _see_lines(pieces, rows, cols)
    shown, seen = see_some(pieces, rows, cols)
    return seen if len(shown) == len(pieces) else None


def see_some(pieces: Ints, rows: View, cols: View) -> tuple[Ints, Seen]:
    """(the pieces that both views can show, what they look like); neither is a view of patches."""
    visible = _rows_fit(pieces, rows) if rows.kind == "blocks" else np.arange(len(pieces))
    strips, row_line, piece = _see_rows(pieces[visible], rows)
    if cols.kind == "contiguous":
        return visible, Seen(strips, row_line, np.zeros(len(strips), np.int64), piece)
    fits = _residues_fit(strips, cols) if cols.kind == "residue" else _blocks_fit(strips, cols)
    shown = np.ones(len(visible), bool)
    shown[piece[~fits]] = False
    some = shown[piece]
    out, col_line = (_see_residues if cols.kind == "residue" else _see_blocks)(strips[some], cols)
    return visible[shown], Seen(out, row_line[some], col_line, (np.cumsum(shown) - 1)[piece[some]])


def _see_lines(pieces: Ints, rows: View, cols: View) -> Seen | None:
    """Rows cut at the lines of the grid, and every run a strip of its own, on one line of keys."""
    strips, piece = unnested(pieces)
    if (strips[:, DCOUNT] != 0).any():
        return None
    line0, line1 = strips[:, ROW] // rows.step, (strips[:, ROW] + strips[:, ROWS] - 1) // rows.step
    owner, i = ramp((line1 - line0 + 1) * strips[:, COUNT])
    s, piece = strips[owner].copy(), piece[owner]
    line, k = line0[owner] + i // s[:, COUNT], i % s[:, COUNT]
    t0 = np.maximum(line * rows.step - s[:, ROW], 0)
    s[:, ROWS] = np.minimum((line + 1) * rows.step - s[:, ROW], s[:, ROWS]) - t0
    s[:, COL] += s[:, DCOL] * t0 + s[:, STRIDE] * k
    s[:, WIDTH] += s[:, DWIDTH] * t0
    s[:, ROW] += t0 - line * rows.step
    s[:, COUNT], s[:, STRIDE] = 1, 0
    key_line = s[:, COL] // cols.step
    s[:, COL] -= key_line * cols.step
    last = s[:, ROWS] - 1
    low = np.minimum(s[:, COL], s[:, COL] + s[:, DCOL] * last)
    end = s[:, COL] + s[:, WIDTH]
    high = np.maximum(end, end + (s[:, DCOL] + s[:, DWIDTH]) * last)
    if ((low < 0) | (high > cols.step)).any():
        return None
    return Seen(s, line, key_line, piece)


def _see_rows(pieces: Ints, view: View) -> tuple[Ints, Ints, Ints]:
    """(strips, row line, piece) with rows in view coordinates."""
    if view.kind == "contiguous":
        strips, owner = unnested(pieces)
        return strips, np.zeros(len(owner), np.int64), owner
    step = view.step
    if view.kind == "blocks":
        strips, owner = unnested(pieces)
        strips[:, ROW] = strips[:, ROW] // step * view.box[0] + strips[:, ROW] % step - view.offset
        return strips, np.zeros(len(owner), np.int64), owner
    width = len(FIELDS)
    # a repetition with this row step already walks down one residue class: it becomes the rows of the new strips
    kept = np.zeros((len(pieces), 1 + width), np.int64)
    kept[:, 0] = 1
    pieces = pieces.copy()
    for level in range(MAX_LEVELS):
        at = width + level * (1 + width)
        walks = (pieces[:, at] > 1) & (pieces[:, at + 1 + ROW] == step) & (pieces[:, at + 1 + ROWS] == 0)
        walks &= (pieces[:, ROWS] <= step) & (kept[:, 0] == 1)
        kept[walks] = pieces[walks, at : at + 1 + width]
        pieces[walks, at] = 1
    strips, piece = unnested(pieces)
    kept = kept[piece]
    owner, i = ramp(np.minimum(strips[:, ROWS], step))
    strips, kept, piece = strips[owner], kept[owner], piece[owner]
    walking = kept[:, 0] > 1
    row = strips[:, ROW] + i
    out = strips.copy()
    out[:, ROW] = row // step
    out[:, ROWS] = np.where(walking, kept[:, 0], -(-(strips[:, ROWS] - i) // step))
    for field, slope in ((COL, DCOL), (WIDTH, DWIDTH), (COUNT, DCOUNT)):
        out[:, field] += strips[:, slope] * i
        out[:, slope] = np.where(walking, kept[:, 1 + field], strips[:, slope] * step)
    return out, row % step, piece


def _rows_fit(pieces: Ints, view: View) -> Ints:
    """The pieces whose every strip lies on the chosen rows of one block."""
    strips, piece = unnested(pieces)
    inside = strips[:, ROW] % view.step - view.offset
    fits = (inside >= 0) & (view.offset + inside + strips[:, ROWS] <= view.extents[0])
    fits &= strips[:, ROW] // view.step < view.extents[1]
    return np.setdiff1d(np.arange(len(pieces)), piece[~fits])


def _residues_fit(strips: Ints, view: View) -> NDArray[np.bool_]:
    step = view.step
    lone = (strips[:, COUNT] == 1) & (strips[:, DCOUNT] == 0)
    thin = (strips[:, WIDTH] == 1) & (strips[:, DWIDTH] == 0) & (lone | (strips[:, STRIDE] % step == 0))
    return np.asarray(thin & ((strips[:, DCOL] % step == 0) | (strips[:, ROWS] == 1)))


def _see_residues(strips: Ints, view: View) -> tuple[Ints, Ints]:
    step = view.step
    out = strips.copy()
    line = strips[:, COL] % step
    for field in (COL, DCOL, STRIDE):
        out[:, field] //= step
    solid = out[:, STRIDE] == 1
    out[solid, WIDTH], out[solid, DWIDTH] = strips[solid, COUNT], strips[solid, DCOUNT]
    out[solid, COUNT], out[solid, DCOUNT], out[solid, STRIDE] = 1, 0, 0
    return out, line


def _blocks_fit(strips: Ints, view: View) -> NDArray[np.bool_]:
    size = view.step
    inside = strips[:, COL] % size - view.offset
    most = np.maximum(strips[:, COUNT], strips[:, COUNT] + strips[:, DCOUNT] * (strips[:, ROWS] - 1))
    last = strips[:, COL] // size + np.maximum(most - 1, 0) * (strips[:, STRIDE] // size)
    widest = np.maximum(strips[:, WIDTH], strips[:, WIDTH] + strips[:, DWIDTH] * (strips[:, ROWS] - 1))
    lone = (strips[:, COUNT] == 1) & (strips[:, DCOUNT] == 0)
    fits = (inside >= 0) & (view.offset + inside + widest <= view.extents[0]) & (last < view.extents[1])
    return np.asarray(fits & (lone | (strips[:, STRIDE] % size == 0)) & (strips[:, DCOL] == 0))


def _see_blocks(strips: Ints, view: View) -> tuple[Ints, Ints]:
    size, lanes = view.step, view.box[0]
    out = strips.copy()
    out[:, COL] = strips[:, COL] // size * lanes + strips[:, COL] % size - view.offset
    out[:, STRIDE] = strips[:, STRIDE] // size * lanes
    solid = (strips[:, WIDTH] == lanes) & (strips[:, DWIDTH] == 0) & (out[:, STRIDE] == lanes)
    out[solid, WIDTH], out[solid, DWIDTH] = strips[solid, COUNT] * lanes, strips[solid, DCOUNT] * lanes
    out[solid, COUNT], out[solid, DCOUNT], out[solid, STRIDE] = 1, 0, 0
    return out, np.zeros(len(strips), np.int64)
