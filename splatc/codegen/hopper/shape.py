"""Sizes of one Hopper kernel: what is fixed at compile time."""

from __future__ import annotations

from dataclasses import dataclass

from splatc.codegen.constants import ceil_div
from splatc.codegen.kernel import FORWARD, ROWS, KernelSpec
from splatc.errors import Unsupported
from splatc.ir.score import Score

SMEM_BYTES = 227 * 1024  # dynamic shared memory of one block on sm_90
RESERVED_BYTES = 1024  # of a multiprocessor's, for each block
WARPGROUP_ROWS = 64  # rows of one wgmma
ROW_BYTES = 128  # of a swizzled row
WARPGROUP = 128  # threads
TEAM = WARPGROUP  # of the producer
TURNERS = 3  # its warps that turn tiles of V over, where V needs it
ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
# A row of the table of columns: three strides and 0, then for each lane of a column tile how far its position is from
# that of the origin. There is one for each column view, up to MAX_VIEWS, then one for each list of keys.
STRIDES = 4
MAX_VIEWS = (2, 4)  # row views and column views that one launch can hold: each is a tensor map
KEYS_AHEAD = 512  # of a ring of K or V, where there is room: docs/decisions/34-rows-in-turn.md


@dataclass(frozen=True)
class Shape:
    """A tile of m query rows (64 a consumer warpgroup) by n key columns; d, dv: head dims of q/k and v/o."""

    d: int
    dv: int
    m: int
    n: int
    dtype: str  # "float16", "bfloat16", or "float32" for products of tf32
    score: Score
    gather: bool
    stages: int  # of the K and V rings
    q_stages: int
    staged: int  # stages of the ring in which chunks of V wait to be turned over
    blocks: int = 1  # that share a multiprocessor: those of 64 rows do, each with its own row tile

    @property
    def softcap(self) -> bool:
        return self.score.softcap

    @property
    def positional(self) -> bool:
        """Whether consumers have to know the positions of keys."""
        return self.score.positional

    @property
    def pruned(self) -> bool:
        """Whether half of the scores are kept: two of four, or one of two."""
        return self.score.pruning is not None

    @property
    def kept(self) -> int:
        """Columns of a tile of P."""
        return self.n // 2 if self.pruned else self.n

    @property
    def item_bytes(self) -> int:
        """Of a value of q, k, v and o."""
        return ITEM_BYTES[self.dtype]

    @property
    def chunk(self) -> int:
        """Columns of a 128-byte swizzled row."""
        return chunk(self.dtype)

    @property
    def keeps_q(self) -> bool:
        """Whether a thread keeps its part of Q (docs/decisions/42-q-in-registers.md): where that is faster, and fits.

        Beside it come scores, O and P, and 40 registers for addresses, statistics and mask bits.
        """
        if self.item_bytes != 2 or self.positional or self.gather or self.blocks > 1 or self.d <= 64:
            return False
        return 4 * ceil_div(self.d, 16) + self.live_registers + 40 <= self.registers[1]

    @property
    def turned(self) -> bool:
        """Whether V is turned over before the products: tf32 operands are read along the keys."""
        return self.dtype == "float32"

    @property
    def warpgroups(self) -> int:
        """Consumer warpgroups."""
        return self.m // WARPGROUP_ROWS

    @property
    def threads(self) -> int:
        return 128 * (self.warpgroups + 1)

    @property
    def d_chunks(self) -> int:
        return ceil_div(self.d, self.chunk)

    @property
    def dv_chunks(self) -> int:
        return ceil_div(self.dv, self.chunk)

    @property
    def out_dim(self) -> int:
        """Columns of the result of a row."""
        return self.dv

    @property
    def out_chunks(self) -> int:
        """128-byte columns of it."""
        return ceil_div(self.out_dim, self.chunk)

    @property
    def writers(self) -> int:
        """Arrivals that fill a stage of K or V: the bulk copies', and with lists of keys every producer thread's."""
        return 1 + (TEAM if self.gather else 0)

    @property
    def turns(self) -> bool:
        """Whether warpgroups take turns at issuing products: 4 % faster with three of them, not with two, unless what
        they do in between is as long as the products, as in pruning."""
        return self.warpgroups == 3 or (self.warpgroups == 2 and self.pruned)

    @property
    def bit_words(self) -> int:
        """32-bit words of a thread's mask bits."""
        return ceil_div(self.n, 64)

    @property
    def bits_bytes(self) -> int:
        """Mask bits of one tile."""
        return self.warpgroups * 128 * self.bit_words * 4

    @property
    def q_bytes(self) -> int:
        return self.m * ROW_BYTES * self.d_chunks

    @property
    def q_slot(self) -> int:
        """Bytes of a Q stage: O leaves through it too."""
        return self.m * ROW_BYTES * max(self.d_chunks, self.dv_chunks)

    @property
    def k_bytes(self) -> int:
        return self.n * ROW_BYTES * self.d_chunks

    @property
    def v_bytes(self) -> int:
        """A tile of V; the same turned over: a row for each column of V's chunks."""
        return self.n * ROW_BYTES * self.dv_chunks

    @property
    def staged_bytes(self) -> int:
        """A chunk of V as it arrives."""
        return self.n * ROW_BYTES

    @property
    def smem_bytes(self) -> int:
        """Dynamic shared memory: tiles, mask bits, and a page for barriers and messages."""
        rings = self.stages * (self.k_bytes + self.v_bytes + self.bits_bytes)
        return self.q_stages * self.q_slot + rings + self.staged * self.staged_bytes + 1024

    @property
    def most_registers(self) -> int:
        """Live registers up to which ptxas was seen to spill nothing: expressions on scores take some."""
        own = [name for name in self.score.names if name != "sinks"]
        return min(self.registers[1] - 24, 192) - (8 + 8 * len(own) if own else 0)

    @property
    def wide(self) -> bool:
        """Whether a consumer's registers are scarce: with head dims beyond 192, in tf32 beyond 128."""
        return self.live_registers > 160 or (self.turned and max(self.d, self.dv) > 128)

    @property
    def registers(self) -> tuple[int, int]:
        """(producer, consumer) registers a thread, as setmaxnreg takes them.

        A block starts with equal shares of 64 K registers; what consumers gain must be what the producer's warpgroup
        gives up, or they wait for ever: ``register_pool`` says what is left.
        """
        if self.gather or self.turned:  # all of the producer's warpgroup is at work
            return {1: (72, 240), 2: (56, 224), 3: (56, 152)}[self.warpgroups]
        if self.warpgroups == 1:
            return {1: (40, 240), 2: (40, 216), 3: (24, 136)}[self.blocks]
        return {2: (24, 240) if self.wide else (40, 232), 3: (32, 160)}[self.warpgroups]

    @property
    def start_registers(self) -> int:
        """Registers that a thread starts with."""
        return min(65536 // (self.threads * self.blocks) // 8 * 8, 240)

    @property
    def product_registers(self) -> int:
        """What ptxas wants a thread to start with, or it compiles no product as wide as scores and O: accumulators, and
        what it was seen to ask for beside them, more where P comes in registers."""
        return max(self.n // 2 + 26, ceil_div(self.dv, 16) * 8 + 30)

    @property
    def register_pool(self) -> int:
        """Registers of a block left over after setmaxnreg, a thread of a warpgroup: not negative."""
        producer, consumer = self.registers
        return self.start_registers * (self.warpgroups + 1) - producer - consumer * self.warpgroups

    @property
    def live_registers(self) -> int:
        """Registers that a consumer thread holds through the loop: fp32 scores and O, and P in the type of V."""
        return self.n // 2 + self.kept * self.item_bytes // 8 + ceil_div(self.dv, 16) * 8


def chunk(dtype: str) -> int:
    """Columns of a type in a 128-byte swizzled row."""
    return ROW_BYTES // ITEM_BYTES[dtype]


def slot_keys(n: int) -> list[int]:
    """Of each row of a pruned kernel's tile of K in shared memory, which of the tile's n keys it is (prune.py)."""
    return [4 * c + 2 * h + e for h in range(2) for c in range(n // 4) for e in range(2)]


def can_gather(spec: KernelSpec) -> bool:
    """Whether there is a kernel with lists of keys for these sizes: blocks that share a multiprocessor have no
    registers for copying them, nor have taller ones; nor has that of dQ with scores and dQ at their widest, where rows
    of K and V are of different size (docs/decisions/40-listed-keys.md)."""
    if not_gathered(spec) is not None or spec.tile_m != 128:
        return False
    k_chunks, v_chunks = (ceil_div(dim, chunk(spec.dtype)) for dim in (spec.head_dim, spec.v_head_dim))
    widest = spec.role == ROWS and spec.tile_n + ceil_div(spec.head_dim, 16) * 8 > 184
    return not widest or k_chunks == v_chunks


def check_gather(spec: KernelSpec) -> None:
    """Raise Unsupported for lists of keys where there is no kernel with them."""
    if spec.gather and not can_gather(spec):
        raise Unsupported(f"{spec.name}: consumers leave a producer of listed keys too few registers")


def not_gathered(spec: KernelSpec) -> str | None:
    """Why no kernel of this kind has lists of keys, whatever its tiles; None if one has. Copying them takes registers,
    and threads that tf32 needs for turning V over."""
    if spec.kernel != "hopper" or spec.role not in (FORWARD, ROWS):
        return "only Hopper's kernels over rows have them"
    if spec.dtype == "float32":
        return "they are for 16-bit types"
    if max(spec.head_dim, spec.v_head_dim) > 128:
        return "they are for head dims up to 128"
    if spec.score.pruning is not None:
        return "they are for scores that are not pruned"
    crowded = spec.score.positional and len(spec.score.names) > (2 if spec.role == FORWARD else 1)
    return "there are too many expressions on scores" if crowded else None


def smem_limit(blocks: int) -> int:
    """Dynamic shared memory of each of so many blocks of a multiprocessor."""
    return (SMEM_BYTES + RESERVED_BYTES) // blocks - RESERVED_BYTES


def ring_stages(tile_n: int, turned: bool) -> tuple[tuple[int, int, int], ...]:
    """(stages, q_stages, staged), the best first: the most keys under way up to KEYS_AHEAD."""
    deepest = 2 if turned else max(2, KEYS_AHEAD // tile_n)
    depths = [*((stages, 2) for stages in range(deepest, 1, -1)), (2, 1), (1, 1)]
    return tuple((*two, staged) for two in depths for staged in ((8, 4, 3, 2) if turned else (0,)))


def shape_of(spec: KernelSpec) -> Shape:
    """The sizes that a spec asks for, with the deepest rings that fit; raises Unsupported if none does."""
    if spec.head_dim % 8 or spec.v_head_dim % 8:
        raise Unsupported(f"the Hopper kernel takes head dims that are multiples of 8: {spec.name}")
    turned = spec.dtype == "float32"
    if spec.tile_m not in (64, 128, 192) or spec.tile_n % (32 if turned else 16) or not 16 <= spec.tile_n <= 256:
        raise Unsupported(f"the Hopper kernel has no tile of {spec.tile_m} x {spec.tile_n}")
    check_gather(spec)
    if spec.score.pruning is not None and spec.tile_n % 64:
        raise Unsupported(f"{spec.name}: metadata words are of 64 keys, so tiles must be of a multiple of them")
    for blocks in (3, 2, 1) if spec.tile_m == WARPGROUP_ROWS and not turned else (1,):
        for stages, q_stages, staged in ring_stages(spec.tile_n, turned):
            shape = Shape(spec.head_dim, spec.v_head_dim, spec.tile_m, spec.tile_n, spec.dtype, spec.score, spec.gather,
                          stages, q_stages, staged, blocks)  # fmt: skip
            fits = (shape.smem_bytes <= smem_limit(blocks) and shape.live_registers <= shape.most_registers
                    and shape.product_registers <= shape.start_registers)  # fmt: skip
            crowded = q_stages > 1 and shape.wide and not turned  # a second Q stage takes a register
            if fits and not crowded and (blocks == 1 or stages > 1):
                return shape
    raise Unsupported(
        f"head dims {spec.head_dim} and {spec.v_head_dim} with tiles of {spec.tile_m} x {spec.tile_n} fit neither the "
        "shared memory nor the registers of sm_90a: use smaller tiles, or less that is done to scores"
    )
