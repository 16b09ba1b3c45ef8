"""Masks and tilings as small images of bounded size, whatever the sequence length."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from splatc.codegen.kernel import kernel_spec
from splatc.codegen.tables import Tables, table_rows
from splatc.codegen.target import Target
from splatc.compile import make_plan
from splatc.formats.acsr import ACSR
from splatc.formats.fold import unnest, unnested
from splatc.formats.strips import Ints, RowRuns, element_counts, ramp, row_runs
from splatc.ir.cover import Grid, tile_count
from splatc.ir.program import Cover, Mask, Program
from splatc.ir.views import View
from splatc.patterns.base import Pattern
from splatc.runtime.explain import Explanation

NAMED = 8  # pieces that get a layer of their own, largest first; the others share one
SAMPLED_ROWS = 4096  # mask rows looked at, at most

Image = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Drawing:
    """All that a picture of one mask shows. pieces: the largest first, at most NAMED."""

    pattern: str
    acsr: ACSR
    covers: tuple[Cover, ...]
    tables: tuple[Tables, ...]
    explanation: Explanation
    order: Ints

    @staticmethod
    def of(pattern: Pattern, q_len: int, kv_len: int | None = None, *, head: int = 0) -> Drawing:
        """The drawing of a pattern at a length; ``head`` chooses one if every head has its own mask."""
        if hasattr(pattern, "heads"):
            pattern = pattern.heads[min(max(head, 0), len(pattern.heads) - 1)]
        found: list[ACSR] = []

        def after(name: str, program: Program) -> None:
            found.extend(domain.acsr for _, domain in program.domains if isinstance(domain, Mask) and name == "lower")

        spec = kernel_spec(64, None, "float32", Target("cpu", "native"))
        plan = make_plan(pattern, q_len, q_len if kv_len is None else kv_len, spec, after)
        covers = tuple(domain for _, domain in plan.programs[0].domains if isinstance(domain, Cover))
        return Drawing(
            str(pattern),
            found[0],
            covers,
            plan.tables[0],
            plan.explanation,
            np.argsort(-piece_sizes(found[0]), kind="stable"),
        )

    @property
    def named(self) -> list[tuple[str, int]]:
        """(text, elements) of the pieces with a layer of their own."""
        sizes = piece_sizes(self.acsr)
        return [(str(self.acsr.pieces[int(i)]), int(sizes[i])) for i in self.order[:NAMED]]

    @property
    def others(self) -> int:
        """Pieces that share the layer after the named ones."""
        return max(len(self.acsr.pieces) - NAMED, 0)

    def layers(self, height: int, width: int) -> Image:
        """Coverage of each cell of an image: (NAMED + 2, height, width), in [0, 1].

        A layer for each named piece, one for the others and one for the remainder.
        """
        table = self.acsr.pieces.table
        groups = [table[[i]] for i in self.order[:NAMED]]
        groups += [table[:0]] * (NAMED - len(groups)) + [table[self.order[NAMED:]]]
        rows = _sample(self.acsr.q_len, height)
        rest = self.acsr.remainder.runs()
        runs = [row_runs(unnest(group), rows) for group in groups]
        one = np.ones_like(rest.row)
        runs.append(RowRuns(rest.row, rest.start, rest.stop - rest.start, one, one))
        return np.stack([self._coverage(r, rows, height, width) for r in runs])

    def _coverage(self, runs: RowRuns, rows: Ints, height: int, width: int) -> Image:
        """The share of each cell that runs cover, among the sampled rows."""
        keep = np.isin(runs.row, rows)
        row, start, wide, stride, times = (column[keep] for column in runs)
        fine = (times > 1) & (stride * width <= self.acsr.kv_len)  # several to a cell: one long run, thinned
        weight = np.where(fine, wide / np.maximum(stride, 1), 1.0)
        wide, times = np.where(fine, stride * times, wide), np.where(fine, 1, times)
        owner, k = ramp(times)
        start = start[owner] + stride[owner] * k
        scale = width / self.acsr.kv_len
        y = row[owner] * height // self.acsr.q_len
        image = accumulate(y, start * scale, (start + wide[owner]) * scale, weight[owner], height, width)
        count = np.bincount(rows * height // self.acsr.q_len, minlength=height)
        return np.clip(image / np.maximum(count, 1)[:, None], 0, 1)


def accumulate(
    y: Ints, x0: NDArray[np.floating], x1: NDArray[np.floating], weight: Image, height: int, width: int
) -> Image:
    """The sum of spans [x0, x1) of rows y, times their weight, as an image; x in cells, edges anti-aliased."""
    steps = np.zeros((height, width + 1))
    for x, sign in ((x0, 1.0), (x1, -1.0)):
        cell = np.minimum(x.astype(np.int64), width)
        inside = x - cell
        np.add.at(steps, (y, cell), sign * weight * (1 - inside))
        np.add.at(steps, (y, np.minimum(cell + 1, width)), sign * weight * inside)
    image: Image = np.cumsum(steps, axis=1)[:, :width]
    return image


def piece_sizes(acsr: ACSR) -> Ints:
    """Elements of each piece."""
    table = acsr.pieces.table
    sizes = np.zeros(len(table), np.int64)
    strips, owner = unnested(table)
    np.add.at(sizes, owner, element_counts(strips))
    return sizes


def _sample(length: int, height: int) -> Ints:
    """Rows to look at: all of a short mask, else some in every row of the image."""
    each = max(SAMPLED_ROWS // height, 1)
    if length <= height * each:
        return np.arange(length)
    edges = np.arange(height * each + 1) * length // (height * each)
    jitter = np.random.default_rng(0).random(height * each)  # even steps would beat with the mask's own period
    return np.unique((edges[:-1] + jitter * np.diff(edges)).astype(np.int64))


# -- tiles -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TileImage:
    """A pass in the coordinates of its views: row tiles down, the column tiles of every column view across.

    kept: share of each cell that attends; visited: share that lies in a tile; bits: share in a tile with bits.
    cells: image cells to a tile (one number; 1 if several tiles share a cell). bounds: first column tile of each view.
    """

    rows: View
    cols: tuple[View, ...]
    kept: Image
    visited: Image
    bits: Image
    cells: int
    bounds: tuple[int, ...]
    row_tiles: int


def tile_image(cover: Cover, tables: Tables, size: int) -> TileImage:
    """The tiles of a pass as an image of about size x size cells at most; column views without tiles are left out."""
    owner, i = ramp(tables.items[:, 4].astype(np.int64))
    entry = tables.entries[tables.items[owner, 3] + i].astype(np.int64)
    number_of = {row: v for v, view in enumerate(cover.cols) for row in table_rows(view)}
    view_of = np.array([number_of[tuple(row)] for row in tables.col_views.tolist()])
    view, repeat, kind = view_of[entry[:, 5]], entry[:, 3], entry[:, 4]
    used = [v for v in range(len(cover.cols)) if (view == v).any()] or [0]
    bounds = np.concatenate([[0], np.cumsum([tile_count(cover.cols[v]) for v in used])])
    n_rows, n_cols = tile_count(cover.rows), int(bounds[-1])
    cells = int(np.clip(size // max(n_rows, n_cols), 1, min(cover.rows.lanes, cover.cols[0].lanes)))
    height, width = min(n_rows, size), n_cols * cells if n_cols <= size else size

    row = _numbers(cover.rows, tables.items[:, :3].astype(np.int64))[owner]
    col = np.zeros(len(entry), np.int64)
    for v, base in zip(used, bounds[:-1], strict=True):
        mine = view == v
        col[mine] = base + _numbers(cover.cols[v], entry[mine, :3])
    scale = width / n_cols
    images = []
    for m in (kind == 0, kind > 0):
        weight = np.full(int(m.sum()), height / n_rows)  # row tiles that share a cell add up
        image = accumulate(
            row[m] * height // n_rows, col[m] * scale, (col[m] + repeat[m]) * scale, weight, height, width
        )
        images.append(np.clip(np.repeat(image, cells, axis=0), 0, 1))
    full, bits = images
    partly = kind > 0
    if height == n_rows and width == n_cols * cells:
        kept = np.zeros((n_rows, n_cols, cells, cells))
        np.add.at(kept, (row[partly], col[partly]), _shares(tables.bits, cells)[kind[partly] - 1])
        kept = full + kept.transpose(0, 2, 1, 3).reshape(full.shape)
    else:
        kept = full + bits * 0.5  # too small to tell
    views = tuple(cover.cols[v] for v in used)
    return TileImage(
        cover.rows,
        views,
        np.clip(kept, 0, 1),
        np.clip(full + bits, 0, 1),
        bits,
        cells,
        tuple(int(b) for b in bounds),
        n_rows,
    )


def _numbers(view: View, origin: Ints) -> Ints:
    """The number of the tile at an origin (the inverse of ir.cover.origins)."""
    grid = Grid.of(view)
    if view.kind == "blocks":
        return origin[:, 1] // view.box[1]
    return origin[:, 0] // grid.b1 + grid.across * grid.place(origin[:, 1])[0]


def _shares(bits: NDArray[np.uint32], cells: int) -> Image:
    """Each distinct tile of bits as cells x cells shares."""
    octets = np.ascontiguousarray(bits).view(np.uint8).reshape(len(bits), bits.shape[1], -1)
    lanes_k, lanes_q = octets.shape[1], octets.shape[2] * 8
    y, x = np.arange(lanes_q) * cells // lanes_q, np.arange(lanes_k) * cells // lanes_k
    fold_rows, fold_cols = np.zeros((lanes_q, cells)), np.zeros((cells, lanes_k))
    fold_rows[np.arange(lanes_q), y], fold_cols[x, np.arange(lanes_k)] = 1, 1
    fold_rows /= fold_rows.sum(0)
    fold_cols /= fold_cols.sum(1, keepdims=True)
    out = np.zeros((len(bits), cells, cells))
    for first in range(0, len(bits), 512):  # as many as fit in little memory
        dense = np.unpackbits(octets[first : first + 512], axis=2, bitorder="little")
        out[first : first + 512] = (fold_cols @ dense @ fold_rows).transpose(0, 2, 1)
    return out
