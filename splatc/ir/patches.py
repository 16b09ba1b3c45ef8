"""Covering N-D neighbourhoods: a row tile is a patch of the grid, its keys are boxes placed where the patch needs them.

A strip in patch coordinates lies on one line of the grid (x runs along it). Patches whose strips look alike, relative
to the corner of what they touch, are one kind: boxes and bits are worked out once a kind.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from splatc.errors import VerifyError
from splatc.formats.strips import COL, DCOL, DWIDTH, ROW, ROWS, WIDTH, Ints, ramp
from splatc.ir.program import Cover, Region, Shapes
from splatc.ir.see import Seen, see
from splatc.ir.views import PART, Triple, View, patches


def boxes_of(lanes: int, grid: Triple, parts: int = 1) -> Ints:
    """The boxes of exactly ``lanes`` positions that a grid of this many dimensions can use: int64 (n, 3).

    With ``parts``, a box can be cut into as many equal parts along its last side (View.sub_box).
    """
    sides = [n for n in range(1, lanes + 1) if lanes % n == 0]
    found = np.array([(x, y, lanes // (x * y)) for x in sides for y in sides if lanes % (x * y) == 0])
    fits = (found[:, 0] >= 4) & ((found == 1) | (found < 2 * np.array(grid))).all(1)
    last = np.where(found[:, 2] > 1, found[:, 2], np.where(found[:, 1] > 1, found[:, 1], found[:, 0]))
    return np.asarray(found[fits & (last % parts == 0)])


def patch_region(pieces: Ints, region: Region, grid: Triple, tile_m: int, tile_n: int) -> Region | None:
    """The pieces as a region of patches with the best boxes; None if the lines of the grid cannot show them."""
    q_len, kv_len = region.rows.length, region.cols.length
    seen = see(pieces, patches(q_len, grid, (tile_m, 1, 1)), patches(kv_len, grid, (tile_n, 1, 1)))
    q_boxes, k_boxes = boxes_of(tile_m, grid, max(tile_m // PART, 1)), boxes_of(tile_n, grid)
    if seen is None or not len(q_boxes) or not len(k_boxes):
        return None
    extent = np.array(grid)
    touched = np.minimum(_reach(seen, grid) + q_boxes - 1, extent)
    per_patch = np.prod(-(-touched[:, None] // k_boxes[None]), axis=2)  # (row boxes, column boxes)
    tiles = np.prod(-(-extent // q_boxes), axis=1)[:, None] * per_patch
    q, k = np.unravel_index(tiles.argmin(), tiles.shape)
    q_box, k_box = ((int(box[0]), int(box[1]), int(box[2])) for box in (q_boxes[q], k_boxes[k]))
    return Region(patches(q_len, grid, q_box), patches(kv_len, grid, k_box), pieces, region.remainder)


def _reach(seen: Seen, grid: Triple) -> Ints:
    """How far the keys of one query spread along x, y and z; strips of the same queries count together."""
    s = seen.strips
    ends = np.stack([np.zeros_like(s[:, ROWS]), s[:, ROWS] - 1], 1)  # the first query of a strip, and the last
    begin = s[:, COL, None] + s[:, DCOL, None] * ends
    end = begin + s[:, WIDTH, None] + s[:, DWIDTH, None] * ends
    queries = np.unique(np.stack([seen.row_line, s[:, ROW], s[:, ROWS]], 1), axis=0, return_inverse=True)[1]
    y, z = seen.col_line % grid[1], seen.col_line // grid[1]
    x = _spread(queries, begin, end).max()
    return np.array([x, _spread(seen.row_line, y, y + 1).max(), _spread(seen.row_line, z, z + 1).max()])


def _spread(group: Ints, begin: Ints, end: Ints) -> Ints:
    """From the least ``begin`` to the greatest ``end`` of each group."""
    order = np.argsort(group, kind="stable")
    first = np.flatnonzero(np.diff(group[order], prepend=-1))
    return np.asarray(np.maximum.reduceat(end[order], first) - np.minimum.reduceat(begin[order], first))


def _fragments(pieces: Ints, rows: View, cols: View) -> tuple[Ints, Ints, Ints, Ints]:
    """(patch numbers, fragments, corner and far corner of what each patch touches).

    fragments: (index of patch, lane, lanes, x, dx, width, dwidth, y, z), each on one line of keys; x y z
    are relative to the corner.
    """
    seen = see(pieces, rows, cols)
    if seen is None:
        raise VerifyError(f"the view {cols} cannot show its region's pieces")
    b1, b2, b3 = rows.box
    s, (n1, n2, _) = seen.strips, rows.extents
    k0, k1 = s[:, ROW] // b1, (s[:, ROW] + s[:, ROWS] - 1) // b1
    owner, i = ramp(k1 - k0 + 1)
    s, k, line, key_line = s[owner], k0[owner] + i, seen.row_line[owner], seen.col_line[owner]
    t0 = np.maximum(k * b1 - s[:, ROW], 0)
    lanes = np.minimum((k + 1) * b1 - s[:, ROW], s[:, ROWS]) - t0
    y, z = line % n2, line // n2
    lane = s[:, ROW] + t0 - k * b1 + b1 * (y % b2 + b2 * (z % b3))
    across, down = -(-n1 // b1), -(-n2 // b2)
    number = k + across * (y // b2 + down * (z // b3))
    col, width = s[:, COL] + s[:, DCOL] * t0, s[:, WIDTH] + s[:, DWIDTH] * t0
    col_last = col + s[:, DCOL] * (lanes - 1)
    end, end_last = col + width, col_last + width + s[:, DWIDTH] * (lanes - 1)
    patch, which = np.unique(number, return_inverse=True)
    low = np.stack([np.minimum(col, col_last), key_line % n2, key_line // n2], axis=1)
    high = np.stack([np.maximum(end, end_last), key_line % n2 + 1, key_line // n2 + 1], axis=1)
    corner = np.full((len(patch), 3), np.iinfo(np.int64).max)
    far = np.zeros((len(patch), 3), np.int64)
    np.minimum.at(corner, which, low)
    np.maximum.at(far, which, high)
    at = corner[which]
    fragment = np.stack([which, lane, lanes, col - at[:, 0], s[:, DCOL], width, s[:, DWIDTH], low[:, 1] - at[:, 1],
                         low[:, 2] - at[:, 2]], axis=1)  # fmt: skip
    return patch, fragment, corner, far


def cover_patches(q_len: int, kv_len: int, region: Region, every_row: bool) -> Cover:
    """The tiles of one region of patches."""
    rows, cols = region.rows, region.cols
    patch, fragment, corner, _ = _fragments(region.pieces, rows, cols)
    fragment = fragment[np.argsort(fragment[:, 0], kind="stable")]
    kind = _kinds(fragment, len(patch))
    kinds, first, which = np.unique(kind, return_index=True, return_inverse=True)
    chosen = np.full(len(patch), -1)
    chosen[first] = np.arange(len(kinds))
    model = fragment[chosen[fragment[:, 0]] >= 0]
    tile_kind, tile_at, spans = _tiles(chosen[model[:, 0]], model, cols)
    # every patch has the tiles of its kind, moved to its corner
    per_kind = np.bincount(tile_kind, minlength=len(kinds))
    begin = np.cumsum(per_kind) - per_kind
    owner, i = ramp(per_kind[which])
    tile = begin[which[owner]] + i
    numbers = (
        np.arange(int(np.prod([-(-n // b) for n, b in zip(rows.extents, rows.box, strict=True)])))
        if every_row
        else patch
    )
    ones, zeros = np.ones_like(tile), np.zeros_like(tile)
    entries = np.concatenate([corner[owner] + tile_at[tile], np.stack([zeros, ones, 1 + tile], axis=1)], axis=1)
    at = np.searchsorted(patch[owner], numbers)
    count = np.searchsorted(patch[owner], numbers, "right") - at
    across, down = (-(-rows.extents[d] // rows.box[d]) for d in (0, 1))
    place = np.stack([numbers % across, numbers // across % down, numbers // (across * down)], axis=1) * np.array(
        rows.box
    )
    items = np.concatenate([place, at[:, None], count[:, None]], axis=1)
    shapes = Shapes(len(tile_kind), spans, np.zeros((0, 4), np.int64), np.zeros((0, 64), np.uint64))
    return Cover(q_len, kv_len, rows, (cols,), items, entries, shapes, np.zeros((0, cols.lanes), np.int64))


def _kinds(fragment: Ints, patches: int) -> Ints:
    """A number for each patch, the same for patches whose fragments are equal and in the same order."""
    bounds = np.searchsorted(fragment[:, 0], np.arange(patches + 1))
    seen: dict[bytes, int] = {}
    body = np.ascontiguousarray(fragment[:, 1:])
    return np.array([seen.setdefault(body[a:b].tobytes(), len(seen)) for a, b in pairwise(bounds)], np.int64)


def _tiles(kind: Ints, fragment: Ints, cols: View) -> tuple[Ints, Ints, Ints]:
    """(kind, offset from the corner, spans) of the boxes that the model patches need; spans are cut lane by lane."""
    c1, c2, c3 = cols.box
    owner, t = ramp(fragment[:, 2])
    f = fragment[owner]
    start, stop = f[:, 3] + f[:, 4] * t, f[:, 3] + f[:, 4] * t + f[:, 5] + f[:, 6] * t
    j0, j1 = start // c1, -(-stop // c1)
    again, i = ramp(np.maximum(j1 - j0, 0))
    f, t, kind, j = f[again], t[again], kind[owner][again], j0[again] + i
    y, z = f[:, 7], f[:, 8]
    place = np.stack([z // c3, y // c2, j])
    n3, n2, n1 = place.max(axis=1, initial=0) + 1
    _, first, which = np.unique(((kind * n3 + place[0]) * n2 + place[1]) * n1 + place[2], return_index=True,
                                return_inverse=True)  # fmt: skip
    inside = c1 * (y % c2 + c2 * (z % c3))
    begin = np.clip(start[again] - j * c1, 0, c1)
    end = np.clip(stop[again] - j * c1, 0, c1)
    one, none = np.ones_like(j), np.zeros_like(j)
    spans = np.stack([which, f[:, 1] + t, one, begin + inside, none, end - begin, none, none, one, none], axis=1)
    offset = place[::-1, first].T * np.array(cols.box)
    return kind[first], offset, spans[np.argsort(which, kind="stable")]
