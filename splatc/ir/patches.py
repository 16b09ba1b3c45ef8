"""Covering N-D neighbourhoods: a row tile is a patch of the grid, its keys are boxes placed where the patch needs them.

A strip in patch coordinates lies on one line of the grid (x runs along it). Patches whose strips look alike, relative
to the corner of what they touch, are one kind: boxes and bits are worked out once a kind.
"""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np

from splatc.errors import VerifyError
from splatc.formats.strips import COL, DCOL, DWIDTH, ROW, ROWS, WIDTH, Ints, ramp
from splatc.ir.program import Cover, Region, Shapes
from splatc.ir.see import Seen, see
from splatc.ir.views import Triple, View, patches


def boxes_of(lanes: int, grid: Triple) -> list[Triple]:
    """The boxes of ``lanes`` positions, in powers of two, that a grid of this many dimensions can use."""

    def fits(box: Triple) -> bool:
        return box[0] >= 4 and all(side == 1 or side < 2 * extent for side, extent in zip(box, grid, strict=True))

    powers = [1 << i for i in range(lanes.bit_length())]
    found = [(x, y, lanes // (x * y)) for x in powers for y in powers if x * y <= lanes]
    return [box for box in found if fits(box)]


def patch_region(pieces: Ints, region: Region, grid: Triple, tile_m: int, tile_n: int) -> Region | None:
    """The pieces as a region of patches with the best boxes; None if the lines of the grid cannot show them."""
    q_len, kv_len = region.rows.length, region.cols.length
    seen = see(pieces, patches(q_len, grid, (tile_m, 1, 1)), patches(kv_len, grid, (tile_n, 1, 1)))
    boxes = list(product(boxes_of(tile_m, grid), boxes_of(tile_n, grid)))
    if seen is None or not boxes:
        return None
    reach = _reach(seen, grid)
    extent = np.array(grid)

    def tiles(boxes: tuple[Triple, Triple]) -> int:
        q_box, k_box = (np.array(box) for box in boxes)
        touched = np.minimum(reach + q_box - 1, extent)
        return int(np.prod(-(-extent // q_box)) * np.prod(-(-touched // k_box)))

    q_box, k_box = min(boxes, key=tiles)
    return Region(patches(q_len, grid, q_box), patches(kv_len, grid, k_box), pieces, region.remainder)


def _reach(seen: Seen, grid: Triple) -> Ints:
    """How far the keys of one query spread along x, y and z."""
    s = seen.strips
    last = s[:, ROWS] - 1
    offset, slope = s[:, COL] - s[:, ROW], s[:, DCOL] - 1
    begin = np.minimum(offset, offset + slope * last)
    end = np.maximum(offset + s[:, WIDTH], offset + s[:, WIDTH] + (slope + s[:, DWIDTH]) * last)
    y = seen.col_line % grid[1] - seen.row_line % grid[1]
    z = seen.col_line // grid[1] - seen.row_line // grid[1]
    return np.array([end.max() - begin.min(), y.max() - y.min() + 1, z.max() - z.min() + 1])


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
    none = np.zeros((0, 4), np.int64)
    return Cover(
        q_len, kv_len, rows, (cols,), items, entries, Shapes(len(tile_kind), spans, none, np.zeros((0, 64), np.uint64))
    )


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
    key = np.stack([kind, z // c3, y // c2, j], axis=1)
    tiles, which = np.unique(key, axis=0, return_inverse=True)
    which = which.ravel()
    inside = c1 * (y % c2 + c2 * (z % c3))
    begin = np.clip(start[again] - j * c1, 0, c1)
    end = np.clip(stop[again] - j * c1, 0, c1)
    one, none = np.ones_like(j), np.zeros_like(j)
    spans = np.stack([which, f[:, 1] + t, one, begin + inside, none, end - begin, none, none, one, none], axis=1)
    offset = tiles[:, [3, 2, 1]] * np.array(cols.box)
    return tiles[:, 0], offset, spans[np.argsort(which, kind="stable")]
