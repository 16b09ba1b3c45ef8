"""Sizes of the kernels, and what they share: items of work, roles of warps.

A block is ``warpgroups`` warpgroups that compute 64 rows each and one warp that copies for them. Blocks stay: each
takes every ``blocks``-th item, a tile of rows of a head, and walks over its tiles of keys.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as I

from splatc.codegen.constants import ceil_div
from splatc.codegen.hopper.block import int_arg
from splatc.codegen.hopper.combine import wide
from splatc.codegen.hopper.emit import Cell, Expr, let, when
from splatc.codegen.hopper.shape import ITEM_BYTES, ROW_BYTES, SMEM_BYTES, WARPGROUP_ROWS, chunk
from splatc.codegen.kernel import KernelSpec
from splatc.errors import Unsupported
from splatc.formats.nm import TILE_KEYS, TILE_WORDS
from splatc.patterns.pruned import Pruning

MOST_STAGES = 4
WARP_ROWS = 16
PAGE = 2048  # of shared memory, for barriers


@dataclass(frozen=True)
class Sizes:
    """Of one kernel. dim: head dim of q and k, or of v and o. pruning: of an sddmm."""

    dim: int
    dtype: str
    warpgroups: int
    pruning: Pruning | None

    @property
    def rows(self) -> int:
        """Of a tile."""
        return WARPGROUP_ROWS * self.warpgroups

    @property
    def threads(self) -> int:
        return 128 * self.warpgroups + 32

    @property
    def warps(self) -> int:
        """That compute."""
        return 4 * self.warpgroups

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]

    @property
    def chunk(self) -> int:
        """Values of 128 bytes, a row in shared memory: as many as a tile keeps."""
        return chunk(self.dtype)

    @property
    def chunks(self) -> int:
        return ceil_div(self.dim, self.chunk)

    @property
    def key_bytes(self) -> int:
        """Of a tile of K or V."""
        return TILE_KEYS * ROW_BYTES * self.chunks

    @property
    def row_bytes(self) -> int:
        """Of a tile of Q or O."""
        return self.rows * ROW_BYTES * self.chunks

    @property
    def value_bytes(self) -> int:
        """Of the kept values of a tile."""
        return self.rows * ROW_BYTES

    def stages(self, fixed: int, each: int) -> int:
        """How many stages of ``each`` bytes fit beside ``fixed``. Raises Unsupported for less than two."""
        most = (SMEM_BYTES - PAGE - fixed) // each
        if most < 2:
            raise Unsupported(f"head dim {self.dim} in {self.dtype} does not fit the shared memory of sm_90a twice")
        return min(most, MOST_STAGES)


def sizes_of(spec: KernelSpec) -> Sizes:
    """The sizes of a kernel."""
    return Sizes(spec.v_head_dim, spec.dtype, spec.tile_m // WARPGROUP_ROWS, spec.score.pruning)


@dataclass(frozen=True)
class Item:
    """What a block works at: a row tile of a head; row: its first."""

    pair: Expr
    batch: Expr
    head: Expr
    kv_head: Expr
    row: Expr


class Walk:
    """Parameters: items = batch * heads * row_tiles; group: query heads to a key head; row_blocks: of 64 rows."""

    def __init__(self, s: Sizes) -> None:
        self.s = s
        names = ("items", "blocks", "heads", "group", "row_tiles", "row_blocks", "key_tiles")
        self.items, self.blocks, self.heads, self.group, self.row_tiles, self.row_blocks, self.key_tiles = map(
            int_arg, names
        )

    def start(self) -> None:
        """Where this thread is."""
        self.index = I.cta_id([self.blocks])
        self.thread = I.thread_id([self.s.threads])
        self.lane = let("lane", self.thread % 32)
        self.warp = let("warp", self.thread // 32)
        self.me = let("consumer", self.thread // 128)  # warpgroup

    def split(self, copy: Callable[[], None], compute: Callable[[], None]) -> None:
        """copy() by one thread of the last warp, compute() by the others."""
        with I.If(T.EQ(self.warp, self.s.warps)):
            with I.Then():
                with when(T.EQ(self.lane, 0)):
                    copy()
            with I.Else():
                compute()

    @contextmanager
    def each(self) -> Iterator[Item]:
        """The block's items."""
        number = Cell("item", self.index)
        with I.While(number() < self.items):
            pair = let("pair", T.truncdiv(number(), self.row_tiles))
            head = let("head", T.truncmod(pair, self.heads))
            row = let("row", (number() - pair * self.row_tiles) * self.s.rows)
            yield Item(pair, let("batch", T.truncdiv(pair, self.heads)), head,
                       let("kv_head", T.truncdiv(head, self.group)), row)  # fmt: skip
            number.set(number() + self.blocks)

    def first_word(self, item: Item, key_tile: Expr, row_block: Expr) -> Expr:
        """Where the metadata of 64 rows of a tile begins (formats/nm.py)."""
        return ((wide(item.pair) * wide(self.key_tiles) + wide(key_tile)) * wide(self.row_blocks) + wide(row_block)
                ) * TILE_WORDS  # fmt: skip
