"""Hand-made work tables for kernel tests, pure NumPy; each case carries the dense mask that its tables cover.

A case has one or more passes (several passes are merged by the kernel). Tables are made by brute force from
the dense mask: every box of the column grid that meets the mask becomes a full tile or a tile with bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

Origin = tuple[int, int, int]


@dataclass(frozen=True)
class View:
    """A sequence axis as up to three (extent, stride, box) dimensions, the first one running fastest."""

    n: tuple[int, int, int]
    s: tuple[int, int, int]
    box: tuple[int, int, int]

    def positions(self, origin: tuple[int, int, int], length: int) -> np.ndarray:
        """int64[b1*b2*b3] sequence positions of the box's lanes; -1 where a lane is outside."""
        b1, b2, b3 = self.box
        lane = np.arange(b1 * b2 * b3)
        x = np.array(origin)[:, None] + np.stack([lane % b1, lane // b1 % b2, lane // (b1 * b2)])
        position = (x * np.array(self.s)[:, None]).sum(0)
        inside = ((x >= 0) & (x < np.array(self.n)[:, None])).all(0) & (position < length)
        return np.where(inside, position, -1)

    def origins(self, shift: tuple[int, int, int] = (0, 0, 0)) -> list[tuple[int, int, int]]:
        """Box origins that tile the view from `shift` on, the first dimension running fastest."""
        a, b, c = (range(shift[i], self.n[i], self.box[i]) for i in range(3))
        return [(x, y, z) for z in c for y in b for x in a]


def contiguous(length: int, box: int) -> View:
    """The plain sequence."""
    return View((length, 1, 1), (1, length, length), (box, 1, 1))


def residues(length: int, step: int, box: int) -> View:
    """The sequence by residue class: position = x1 * step + x2."""
    return View((-(-length // step), step, 1), (step, 1, length), (box, 1, 1))


@dataclass
class Tables:
    """One pass in the kernel ABI; `covered` counts how often each (row, column) is attended to."""

    m: int
    n: int
    q_len: int
    kv_len: int
    views: np.ndarray = field(default_factory=lambda: np.zeros((0, 12), np.int32))
    items: np.ndarray = field(default_factory=lambda: np.zeros((0, 8), np.int32))
    entries: np.ndarray = field(default_factory=lambda: np.zeros((0, 8), np.int32))
    bits: np.ndarray = field(init=False)
    covered: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.bits = np.zeros((1, self.n, self.m // 32), np.uint32)
        self.covered = np.zeros((self.q_len, self.kv_len), np.int64)

    def add_view(self, view: View) -> int:
        """The id of `view`, appended to the table."""
        row = np.array([[*view.n, *view.s, *view.box, view.box[0], 0, 0]], np.int32)
        self.views = np.concatenate([self.views, row])
        return len(self.views) - 1

    def add_bits(self, bits: np.ndarray) -> int:
        """1 + the index of the bit tile for bool[m, n] `bits`, each distinct tile stored once."""
        packed = np.packbits(np.ascontiguousarray(bits.T), axis=1, bitorder="little")
        words = np.ascontiguousarray(packed).view("<u4").astype(np.uint32)
        for index in range(1, len(self.bits)):
            if (self.bits[index] == words).all():
                return index + 1
        self.bits = np.concatenate([self.bits, words[None]])
        return len(self.bits)

    def add_item(
        self, row_view: int, origin: Origin, columns: list[tuple[int, View, list[Origin]]], mask: np.ndarray
    ) -> None:
        """A row tile and its entries: every box of `columns` (view id, view, origins) that meets the mask."""
        rows = self._view(row_view).positions(origin, self.q_len)
        first = len(self.entries)
        made: list[list[int]] = []
        for view_id, view, origins in columns:
            for at in origins:
                cols = view.positions(at, self.kv_len)
                inside = (rows >= 0)[:, None] & (cols >= 0)
                want = mask[np.ix_(np.maximum(rows, 0), np.maximum(cols, 0))] & inside
                if not want.any():
                    continue
                np.add.at(self.covered, (rows[:, None] + 0 * cols, cols + 0 * rows[:, None]), want)
                full = bool((cols >= 0).all() and want[rows >= 0].all())
                last = made[-1] if made else None
                if full and last and last[4] == 0 and last[5] == view_id and last[1:3] == [at[1], at[2]] \
                        and last[0] + last[3] * view.box[0] == at[0]:  # fmt: skip
                    last[3] += 1
                else:
                    made.append([*at, 1, 0 if full else self.add_bits(want), view_id, 0, 0])
        self.entries = np.concatenate([self.entries, np.array(made, np.int32).reshape(-1, 8)])
        item = np.array([[*origin, first, len(made), row_view, 0, 0]], np.int32)
        self.items = np.concatenate([self.items, item])

    def _view(self, index: int) -> View:
        n, s, box = self.views[index, :9].reshape(3, 3).tolist()
        return View(tuple(n), tuple(s), tuple(box))

    def work(self, heads: int) -> np.ndarray:
        """int32[heads * items, 2]: every (head, item)."""
        head, item = np.meshgrid(np.arange(heads), np.arange(len(self.items)), indexing="ij")
        return np.stack([head.ravel(), item.ravel()], 1).astype(np.int32)

    def padded_entries(self) -> np.ndarray:
        """The entries, with one dummy row if there are none (kernels refuse empty tensors)."""
        return self.entries if len(self.entries) else np.zeros((1, 8), np.int32)


@dataclass(frozen=True)
class Case:
    """A named mask, bool[q_len, kv_len], and the passes that cover it exactly."""

    name: str
    mask: np.ndarray
    passes: tuple[Tables, ...]


def cover(
    mask: np.ndarray, row_view: View, col_view: View, shift: tuple[int, int, int] = (0, 0, 0)
) -> Tables:
    """Tables of `mask` with one row view and one column view; column boxes start at `shift`."""
    m, n = (int(np.prod(view.box)) for view in (row_view, col_view))
    tables = Tables(m, n, *mask.shape)
    rows, cols = tables.add_view(row_view), tables.add_view(col_view)
    for origin in row_view.origins():
        tables.add_item(rows, origin, [(cols, col_view, col_view.origins(shift))], mask)
    return tables


def _index(q_len: int, kv_len: int) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(q_len)[:, None], np.arange(kv_len)[None, :]


def _plain(name: str, mask: np.ndarray, m: int, n: int) -> Case:
    q_len, kv_len = mask.shape
    return Case(name, mask, (cover(mask, contiguous(q_len, m), contiguous(kv_len, n)),))


def full(m: int, n: int, q_len: int = 100, kv_len: int = 210) -> Case:
    """Everything: runs of full tiles (repeat > 1) and a ragged last tile."""
    return _plain("full", np.ones((q_len, kv_len), bool), m, n)


def aligned(m: int, n: int, q_len: int = 128, kv_len: int = 256) -> Case:
    """Everything, lengths that fit the tiles: one repeated entry an item and no bits."""
    return _plain("aligned", np.ones((q_len, kv_len), bool), m, n)


def window(m: int, n: int, length: int = 300, left: int = 150, right: int = 5) -> Case:
    """A sliding window: bits at both edges, full tiles between."""
    q, k = _index(length, length)
    return _plain("window", (k >= q - left) & (k <= q + right), m, n)


def empty_rows(m: int, n: int, length: int = 200) -> Case:
    """Rows 0-63 and every third row attend to nothing; the first items have no entries."""
    q, k = _index(length, length)
    return _plain("empty_rows", (q >= 64) & (q % 3 != 0) & (k <= q), m, n)


def nothing(m: int, n: int) -> Case:
    """No row attends to anything; there are no entries at all."""
    return _plain("nothing", np.zeros((70, 90), bool), m, n)


def strided(m: int, n: int, length: int = 61, step: int = 4) -> Case:
    """(q - k) % step == 0 in the residue view; length is no multiple of step, so classes differ in length."""
    q, k = _index(length, length)
    mask = (q - k) % step == 0
    tables = cover(mask, residues(length, step, m), residues(length, step, n))
    return Case(f"strided{length}_{step}", mask, (tables,))


def patch(m: int, n: int, width: int = 21, height: int = 14, radius: int = 3) -> Case:
    """A 2-D neighbourhood: (m/4 x 4) patches of queries; key patches start at (-radius, -radius)."""
    y, x = np.divmod(np.arange(width * height), width)
    mask = (abs(y[:, None] - y) <= radius) & (abs(x[:, None] - x) <= radius)
    extent, stride = (width, height, 1), (1, width, width * height)
    rows, cols = View(extent, stride, (m // 4, 4, 1)), View(extent, stride, (n // 4, 4, 1))
    return Case("patch", mask, (cover(mask, rows, cols, shift=(-radius, -radius, 0)),))


def two_passes(m: int, n: int, length: int = 150, left: int = 20, step: int = 8) -> Case:
    """A causal window, then the strided columns beyond it in the residue view, merged by (O, LSE)."""
    q, k = _index(length, length)
    near = (k <= q) & (k >= q - left)
    far = (k < q - left) & ((q - k) % step == 0)
    first = cover(near, contiguous(length, m), contiguous(length, n))
    second = cover(far, residues(length, step, m), residues(length, step, n))
    return Case("two_passes", near | far, (first, second))


def empty_then_some(m: int, n: int, length: int = 100) -> Case:
    """Two passes, the first leaving most rows empty (LSE -inf): the second starts there from nothing."""
    q, k = _index(length, length)
    first, second = (q >= 80) & (k < 10), (k >= 10) & (q % 2 == 0)
    view = contiguous(length, m), contiguous(length, n)
    return Case("empty_then_some", (first | second), (cover(first, *view), cover(second, *view)))


CASES: tuple[Callable[[int, int], Case], ...] = (
    full, aligned, window, empty_rows, nothing, strided, lambda m, n: strided(m, n, 301, 4), patch,
    two_passes, empty_then_some,
)  # fmt: skip


def all_cases(m: int = 64, n: int = 64) -> list[Case]:
    """Every case for tiles of m rows and n columns, each checked to cover its mask exactly once."""
    cases = [make(m, n) for make in CASES]
    for case in cases:
        covered = np.sum([tables.covered for tables in case.passes], axis=0)
        assert np.array_equal(covered, case.mask), f"the tables of {case.name} do not cover its mask exactly"
    return cases


def reference(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """float64 (O, LSE) of q [B,Hq,Sq,D], k [B,Hkv,Sk,D], v [B,Hkv,Sk,Dv]; empty rows give 0 and -inf."""
    group = q.shape[1] // k.shape[1]
    k, v = (np.repeat(x.astype(np.float64), group, axis=1) for x in (k, v))
    scores = np.where(mask, q.astype(np.float64) @ k.swapaxes(-1, -2) * scale, -np.inf)
    top = scores.max(-1, keepdims=True)
    weight = np.exp(scores - np.where(np.isneginf(top), 0.0, top))
    total = weight.sum(-1, keepdims=True)
    out = weight @ v / np.where(total == 0, 1.0, total)
    with np.errstate(divide="ignore"):
        return out, (np.log(total) + top)[..., 0]
