"""Sizes of one gradient kernel: what is fixed at compile time."""

from __future__ import annotations

from dataclasses import dataclass

from splatc.codegen.constants import ceil_div
from splatc.codegen.hopper.shape import ROW_BYTES, WARPGROUP_ROWS, check_gather, chunk, ring_stages, smem_limit
from splatc.codegen.hopper.shape import Shape as TileShape
from splatc.codegen.kernel import GRADIENTS, WIDEST_IN_ONE_WALK, KernelSpec
from splatc.errors import Unsupported
from splatc.ir.score import NO_SCORE, BlockBias, RelativeBias, Score

ONE_WALK_TILES = (128, 64), (128, 128)  # keys by queries
COLUMN_TILES = *ONE_WALK_TILES, (128, 32), (64, 64)
STAGES = 2  # of Q, dO and dS
SUM_CHUNK = ROW_BYTES // 4  # columns of a 128-byte row of int32 sums
STATISTICS = 4  # 32-bit words of a query; what they are: rows.py
STATISTICS_BYTES = 4 * STATISTICS
DISTANCE_BITS = 24  # of the fraction of a mean distance, as sums of biases have it

# Of the kernels over rows (rows.py):
THREADS = 256
WARPS = THREADS // 32
VALUES = 8  # of a row, a lane: 16 bytes
PASSES = 2  # rows of a lane, one after the other: their loads are under way together
MOST_BLOCKS = 64  # of a head's rows of K and V
LEAST_ROWS = 256  # of such a block


def lanes_of(dim: int) -> int:
    """Lanes that share a row: a power of two."""
    return 1 << max(ceil_div(dim, VALUES) - 1, 0).bit_length()


def rows_of(dim: int) -> int:
    """Rows of a block of THREADS."""
    return WARPS * PASSES * (32 // lanes_of(dim))


def bound_rows(kv_len: int, dim: int) -> int:
    """Rows of K and V of one head that a block finds the largest values of."""
    step = rows_of(dim)
    return ceil_div(max(ceil_div(kv_len, MOST_BLOCKS), LEAST_ROWS), step) * step


@dataclass(frozen=True)
class Shape:
    """A column tile of keys (64 a warpgroup) by n queries; d, dv: head dims of q/k and v/o; float16 or bfloat16.

    results: what the column kernel computes, of ("dq", "dk", "dv"): dQ besides the other two only, by 128 keys.
    """

    keys: int
    d: int
    dv: int
    n: int
    dtype: str
    score: Score
    results: tuple[str, ...]

    item_bytes = 2

    @property
    def warpgroups(self) -> int:
        """That compute."""
        return self.keys // WARPGROUP_ROWS

    @property
    def blocks(self) -> int:
        """That share a multiprocessor: those of 64 keys do, each with its own column tile."""
        return 2 if self.warpgroups == 1 else 1

    def makes(self, *names: str) -> bool:
        """Whether all of these are among the results."""
        return set(names) <= set(self.results)

    @property
    def ends(self) -> dict[str, int]:
        """Results that a column tile ends with, and their head dims."""
        return {name: dim for name, dim in (("dk", self.d), ("dv", self.dv)) if self.makes(name)}

    @property
    def places(self) -> dict[str, str]:
        """Through whose place in shared memory they leave."""
        own = {"dv": "v" if self.makes("dk") else "k", "dk": "k"}
        return {name: place for name, place in own.items() if self.makes(name)}

    @property
    def softcap(self) -> bool:
        return self.score.softcap

    @property
    def positional(self) -> bool:
        """Whether consumers have to know positions."""
        return self.score.positional

    @property
    def threads(self) -> int:
        return 128 * (self.warpgroups + 1)

    @property
    def d_chunks(self) -> int:
        """128-byte columns of rows of q and k."""
        return ceil_div(self.d, chunk(self.dtype))

    @property
    def dv_chunks(self) -> int:
        return ceil_div(self.dv, chunk(self.dtype))

    @property
    def k_bytes(self) -> int:
        return self.keys * ROW_BYTES * self.d_chunks

    @property
    def v_bytes(self) -> int:
        return self.keys * ROW_BYTES * self.dv_chunks

    @property
    def k_slot(self) -> int:
        """Bytes of a K stage: dV leaves through it too where there is no V."""
        return self.k_bytes if self.makes("dk") else max(self.k_bytes, self.v_bytes)

    @property
    def key_bytes(self) -> int:
        """Of a stage of K and, which dK alone takes, V."""
        return self.k_slot + (self.v_bytes if self.makes("dk") else 0)

    @property
    def key_stages(self) -> int:
        """Stages of K and V: where there is room, those of the next column tile are copied in early."""
        return 2 if not self.makes("dq") and self.tile_bytes + 2 * self.key_bytes <= smem_limit(self.blocks) else 1

    @property
    def q_bytes(self) -> int:
        return self.n * ROW_BYTES * self.d_chunks

    @property
    def do_bytes(self) -> int:
        return self.n * ROW_BYTES * self.dv_chunks

    @property
    def ds_bytes(self) -> int:
        """The gradients of a tile's scores, 64 queries side by side in a row of a key."""
        return self.keys * self.n * self.item_bytes

    @property
    def statistics_bytes(self) -> int:
        return self.n * STATISTICS_BYTES

    @property
    def bit_words(self) -> int:
        """32-bit words of a thread's mask bits."""
        return ceil_div(self.n, 64)

    @property
    def bits_bytes(self) -> int:
        """Mask bits of one tile."""
        return self.warpgroups * 128 * self.bit_words * 4

    @property
    def halves_queries(self) -> bool:
        """Whether a warpgroup computes dQ of half of the queries, or for all of them half of the columns."""
        return self.n == 2 * WARPGROUP_ROWS

    @property
    def sum_width(self) -> int:
        """Columns of dQ that a warpgroup computes, for 64 queries."""
        columns = self.d_chunks * chunk(self.dtype)
        return columns if self.halves_queries else columns // self.warpgroups

    @property
    def sum_chunks(self) -> int:
        """128-byte columns of int32 among them."""
        return self.sum_width // SUM_CHUNK

    @property
    def sum_bytes(self) -> int:
        """A warpgroup's share of dQ on its way out."""
        return WARPGROUP_ROWS * ROW_BYTES * self.sum_chunks

    @property
    def tile_bytes(self) -> int:
        """Dynamic shared memory besides that of keys: tiles of queries, and a page for barriers and messages."""
        stage = self.q_bytes + self.do_bytes + self.statistics_bytes + self.bits_bytes
        of_dq = STAGES * self.ds_bytes + self.warpgroups * self.sum_bytes if self.makes("dq") else 0
        return STAGES * stage + of_dq + 1024

    @property
    def smem_bytes(self) -> int:
        return self.key_stages * self.key_bytes + self.tile_bytes

    @property
    def registers(self) -> tuple[int, int]:
        """(producer, consumer) registers a thread, as setmaxnreg takes them: 168 for each of a block's three
        warpgroups, or 128 for each of two blocks' two."""
        return (40, 232) if self.blocks == 1 else (40, 216)

    @property
    def most_registers(self) -> int:
        """Live registers up to which ptxas was seen to spill nothing: expressions on scores take some."""
        return 192 if len(self.score.names) <= 1 and self.blocks == 1 else 160

    @property
    def live_registers(self) -> int:
        """Registers that a consumer thread holds through the loop: the results, scores, and dP or, for dV alone, P."""
        scores = self.n if self.makes("dk") else self.n * 3 // 4
        return scores + sum(ceil_div(dim, 16) * 8 for dim in self.ends.values())


def shape_of(spec: KernelSpec) -> Shape:
    """The sizes that a spec asks for; raises Unsupported for what there is no kernel for."""
    s = Shape(spec.tile_m, spec.head_dim, spec.v_head_dim, spec.tile_n, spec.dtype, spec.score, GRADIENTS[spec.role])
    if s.makes("dq") and (s.positional or max(s.d, s.dv) > WIDEST_IN_ONE_WALK):
        raise Unsupported(f"{spec.name}: gradients of wide heads, with biases or dropout take two walks")
    if (spec.tile_m, spec.tile_n) not in (ONE_WALK_TILES if s.makes("dq") else COLUMN_TILES):
        raise Unsupported(f"{spec.name}: there is no such tile in gradients")
    if s.smem_bytes > smem_limit(s.blocks) or s.live_registers > s.most_registers:
        raise Unsupported(f"{spec.name}: a tile fits neither the shared memory nor the registers of sm_90a")
    return s


@dataclass(frozen=True)
class RowShape(TileShape):
    """A tile of m queries by n keys, of the kernel that computes dQ: Q, dO and statistics of the queries stay.

    A Q stage holds Q, through whose place dQ leaves, and after it dO. learning: the biases of the score that learn.
    """

    learning: Score = NO_SCORE

    @property
    def out_dim(self) -> int:
        return self.d

    @property
    def do_bytes(self) -> int:
        return self.m * ROW_BYTES * self.dv_chunks

    @property
    def q_slot(self) -> int:
        return self.q_bytes + self.do_bytes

    @property
    def statistics_bytes(self) -> int:
        """Of the queries of a row tile."""
        return self.m * STATISTICS_BYTES

    @property
    def smem_bytes(self) -> int:
        return super().smem_bytes + self.q_stages * self.statistics_bytes

    @property
    def registers(self) -> tuple[int, int]:
        if self.warpgroups == 1:
            return super().registers
        return (56, 224) if self.gather else (40, 232)

    @property
    def live_registers(self) -> int:
        """S, dP and dQ: when dQ of a tile has arrived, its dS is done with."""
        return self.n + ceil_div(self.d, 16) * 8

    @property
    def most_registers(self) -> int:
        """With two tables of biases what is summed up for gradients of any takes more than other expressions do. And of
        three blocks that share a multiprocessor ptxas serialises the products with more."""
        both = self.score.has(RelativeBias) and self.score.has(BlockBias)
        if both and self.learning:
            return min(super().most_registers - 24, 128)
        return min(super().most_registers, 96) if self.blocks == 3 else super().most_registers


def row_shape_of(spec: KernelSpec) -> RowShape:
    """The sizes of the kernel for dQ that a spec asks for; raises Unsupported for what there is no kernel for."""
    if spec.tile_m not in (64, 128) or spec.tile_n % 16 or not 16 <= spec.tile_n <= 128:
        raise Unsupported(f"{spec.name}: gradients of queries are computed by tiles of 64 or 128 queries")
    check_gather(spec)
    for blocks in (3, 2) if spec.tile_m == WARPGROUP_ROWS else (1,):
        for stages, q_stages, _ in ring_stages(spec.tile_n, turned=False):
            shape = RowShape(spec.head_dim, spec.v_head_dim, spec.tile_m, spec.tile_n, spec.dtype, spec.score,
                             spec.gather, stages, q_stages, 0, blocks, spec.learning)  # fmt: skip
            fits = shape.smem_bytes <= smem_limit(blocks) and shape.live_registers <= shape.most_registers
            if fits and stages > 1:  # K of a tile is still in use when the next one is
                return shape
    raise Unsupported(f"{spec.name}: a tile fits neither the shared memory nor the registers of sm_90a")
