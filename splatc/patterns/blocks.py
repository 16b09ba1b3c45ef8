"""Patterns made of blocks: a band, random blocks, BigBird, any boolean matrix of blocks."""

# ruff: noqa: D102 (member, lines and check are documented once, on Pattern)

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, ClassVar

import numpy as np

from splatc.errors import InvalidInput
from splatc.patterns.base import Bool, Derived, Int, Leaf, Lines, Pattern, show, whole
from splatc.patterns.library import GlobalCols, GlobalRows

_PRINTED_BLOCKS = 4096  # a larger block matrix is printed as its digest


@dataclass(frozen=True, repr=False)
class BlockWindow(Leaf):
    """block_window(size, left, right): -left <= k // size - q // size <= right, a window of blocks."""

    size: int
    left: int
    right: int

    name: ClassVar[str] = "block_window"

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", whole(self.name, "size", self.size, at_least=1))
        for f in ("left", "right"):
            object.__setattr__(self, f, whole(self.name, f, getattr(self, f), at_least=0))

    def member(self, q: Int, k: Int, q_len: int, kv_len: int) -> Bool:
        away = k // self.size - q // self.size
        return (away >= -self.left) & (away <= self.right)

    def lines(self, q_len: int, kv_len: int) -> Lines:
        lo = np.arange(0, q_len, self.size, dtype=np.int64)
        hi = lo + self.size
        begin = np.stack([lo, hi, lo - self.left * self.size], 1)
        end = np.stack([lo, hi, hi + self.right * self.size], 1)
        return Lines.of(q_len, kv_len, rows=lo, cols=np.concatenate([begin, end]))

    def transposed(self) -> Pattern:
        return BlockWindow(self.size, self.right, self.left)


@dataclass(frozen=True, repr=False)
class Blocked(Derived):
    """blocked(size): q // size == k // size, block-diagonal ("blockwise", "chunked") attention."""

    size: int

    name: ClassVar[str] = "blocked"

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", whole(self.name, "size", self.size, at_least=1))

    def body(self) -> Pattern:
        return BlockWindow(self.size, 0, 0)


@dataclass(frozen=True, repr=False)
class RandomBlocks(Leaf):
    """random_blocks(size, per_row, seed=0): every row of blocks attends to `per_row` distinct random key
    blocks.

    Drawn from the raw 64-bit stream of numpy.random.PCG64(seed), whose values NumPy guarantees across
    versions and machines. Block row i uses numbers i*per_row .. (i+1)*per_row - 1 of the stream, so it
    depends on the seed and on the number of key blocks, not on q_len. All blocks are taken where there are no
    more than `per_row` of them.
    """

    size: int
    per_row: int
    seed: int = 0

    name: ClassVar[str] = "random_blocks"

    def __post_init__(self) -> None:
        for f, least in (("size", 1), ("per_row", 1), ("seed", 0)):
            object.__setattr__(self, f, whole(self.name, f, getattr(self, f), at_least=least))

    def table(self, q_len: int, kv_len: int) -> Int:
        """int64[block rows, min(per_row, key blocks)]: the key blocks of each row of blocks, ascending."""
        return _draw(self.per_row, self.seed, -(-q_len // self.size), -(-kv_len // self.size))

    def member(self, q: Int, k: Int, q_len: int, kv_len: int) -> Bool:
        drawn = self.table(q_len, kv_len)[q // self.size]
        block = k // self.size
        out: Bool = drawn[..., 0] == block
        for i in range(1, drawn.shape[-1]):
            out = out | (drawn[..., i] == block)
        return out

    def lines(self, q_len: int, kv_len: int) -> Lines:
        drawn = self.table(q_len, kv_len)
        return self._block_lines(np.repeat(np.arange(len(drawn)), drawn.shape[1]), drawn.reshape(-1), q_len, kv_len)

    def transposed_lines(self, q_len: int, kv_len: int) -> Lines:
        drawn = self.table(kv_len, q_len)
        return self._block_lines(drawn.reshape(-1), np.repeat(np.arange(len(drawn)), drawn.shape[1]), q_len, kv_len)

    def _block_lines(self, rows: Int, cols: Int, q_len: int, kv_len: int) -> Lines:
        """The sides of blocks, given by their block row and block column."""
        row, col = rows * self.size, cols * self.size
        begin = np.stack([row, row + self.size, col], 1)
        end = np.stack([row, row + self.size, col + self.size], 1)
        every = np.arange(0, q_len, self.size, dtype=np.int64)
        return Lines.of(q_len, kv_len, rows=every, cols=np.concatenate([begin, end]))


@lru_cache(maxsize=64)
def _draw(per_row: int, seed: int, rows: int, blocks: int) -> Int:
    raw = np.random.PCG64(seed).random_raw(rows * per_row).reshape(rows, per_row)
    chosen = np.zeros((rows, 0), np.int64)
    for i in range(min(per_row, blocks)):
        # The x-th of the blocks not chosen yet: step over each chosen one, in ascending order.
        x = (raw[:, i] % np.uint64(blocks - i)).astype(np.int64)
        for j in range(i):
            x += x >= chosen[:, j]
        chosen = np.sort(np.concatenate([chosen, x[:, None]], axis=1), axis=1)
    chosen.setflags(write=False)
    return chosen


@dataclass(frozen=True, repr=False)
class BigBird(Derived):
    """bigbird(block=64, window=3, global_blocks=2, random=3, seed=0): arXiv:2007.14062, block-sparse form.

    A band of `window` blocks (odd) round the diagonal, `global_blocks` blocks of global rows and columns at
    the start, and `random` random blocks in each row of blocks (see `random_blocks`).
    """

    block: int = 64
    window: int = 3
    global_blocks: int = 2
    random: int = 3
    seed: int = 0

    name: ClassVar[str] = "bigbird"

    def __post_init__(self) -> None:
        for f, least in (("block", 1), ("window", 1), ("global_blocks", 0), ("random", 0), ("seed", 0)):
            object.__setattr__(self, f, whole(self.name, f, getattr(self, f), at_least=least))
        if self.window % 2 == 0:
            raise InvalidInput(
                f"bigbird: window is {self.window}, but it must be odd (blocks round the diagonal)"
            )

    def body(self) -> Pattern:
        side, wide = self.window // 2, self.global_blocks * self.block
        out: Pattern = BlockWindow(self.block, side, side)
        if wide:
            out = out | GlobalRows(wide) | GlobalCols(wide)
        return out | RandomBlocks(self.block, self.random, self.seed) if self.random else out


@dataclass(frozen=True, repr=False)
class BlockMatrix(Leaf):
    """A boolean matrix of blocks; see `block_mask`. `data` holds its bits, row-major, eight to a byte."""

    data: bytes
    shape: tuple[int, int]
    size: tuple[int, int]

    name: ClassVar[str] = "block_mask"

    @cached_property
    def matrix(self) -> Bool:
        """bool[block rows, block columns]."""
        r, c = self.shape
        bits = np.unpackbits(np.frombuffer(self.data, np.uint8), count=r * c)
        return bits.view(np.bool_).reshape(r, c)

    def member(self, q: Int, k: Int, q_len: int, kv_len: int) -> Bool:
        out: Bool = self.matrix[q // self.size[0], k // self.size[1]]
        return out

    def lines(self, q_len: int, kv_len: int) -> Lines:
        m, (bq, bk) = self.matrix, self.size
        new_row = 1 + np.flatnonzero((m[1:] != m[:-1]).any(axis=1))
        i, j = np.nonzero(m[:, 1:] != m[:, :-1])
        cols = np.stack([i * bq, (i + 1) * bq, (j + 1) * bk], 1).astype(np.int64)
        return Lines.of(q_len, kv_len, rows=new_row * bq, cols=cols)

    def check(self, q_len: int, kv_len: int) -> None:
        super().check(q_len, kv_len)
        need = (-(-q_len // self.size[0]), -(-kv_len // self.size[1]))
        if need != self.shape:
            raise InvalidInput(
                f"block_mask: the matrix is {self.shape[0]} x {self.shape[1]} blocks of {show(self._size)},"
                f" but q_len {q_len} and kv_len {kv_len} need {need[0]} x {need[1]}"
            )

    def transposed(self) -> Pattern:
        rows, cols = self.shape
        return BlockMatrix(np.packbits(self.matrix.T).tobytes(), (cols, rows), (self.size[1], self.size[0]))

    @property
    def _size(self) -> int | tuple[int, int]:
        return self.size[0] if self.size[0] == self.size[1] else self.size

    def __repr__(self) -> str:
        r, c = self.shape
        if r * c > _PRINTED_BLOCKS:
            digest = hashlib.sha256(self.data).hexdigest()[:16]
            return f"block_mask(<{r} x {c} blocks, sha256 {digest}>, {show(self._size)})"
        rows = ["".join("01"[b] for b in row) for row in self.matrix.astype(int)]
        return f"block_mask({show(rows)}, {show(self._size)})"


def block_mask(matrix: Any, size: int | tuple[int, int]) -> BlockMatrix:
    """A query attends to a key where matrix[q // size, k // size] is true.

    matrix: 2-D array (NumPy, torch, nested lists) of booleans or of 0 and 1, or a list of strings such as
    "0110". size: positions in a block, an int or (query side, key side). The matrix must cover the lengths
    exactly: the last row and column of blocks may be cut short by the end of the sequence.
    """
    if isinstance(matrix, (list, tuple)) and matrix and all(isinstance(r, str) for r in matrix):
        if len({len(r) for r in matrix}) != 1 or set("".join(matrix)) - set("01"):
            raise InvalidInput(
                'block_mask: matrix as strings must be rows of 0 and 1 of equal length: ["01", "10"]'
            )
        matrix = [[c == "1" for c in r] for r in matrix]
    m = as_bool("block_mask", "matrix", matrix)
    if m.ndim != 2 or m.size == 0:
        raise InvalidInput(
            f"block_mask: matrix has shape {m.shape}, but it must be a non-empty 2-D matrix of blocks"
        )
    sizes = size if isinstance(size, (tuple, list)) else (size, size)
    if len(sizes) != 2:
        raise InvalidInput(f"block_mask: size is {size!r}, but it must be an int or (query side, key side)")
    bq, bk = (whole("block_mask", "size", s, at_least=1) for s in sizes)
    return BlockMatrix(np.packbits(m).tobytes(), (m.shape[0], m.shape[1]), (bq, bk))


def as_bool(owner: str, name: str, value: Any) -> Bool:
    """A boolean array from booleans, or from whole numbers that are all 0 or 1; InvalidInput otherwise."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":
            value = value.float()
        value = value.numpy()
    try:
        out = np.asarray(value)
    except ValueError:
        raise InvalidInput(f"{owner}: {name} is not a rectangular array") from None
    if out.dtype.kind == "b":
        return out
    if out.dtype.kind in "iu" and (out.size == 0 or (out.min() >= 0 and out.max() <= 1)):
        return out.astype(np.bool_)
    hint = "; for an additive mask of 0 and -inf pass mask == 0" if out.dtype.kind == "f" else ""
    what = "holds numbers other than 0 and 1" if out.dtype.kind in "iu" else f"has dtype {out.dtype}"
    raise InvalidInput(f"{owner}: {name} {what}, but it must be boolean, True = attend{hint}")
