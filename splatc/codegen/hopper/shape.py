"""Sizes of one Hopper kernel: what is fixed at compile time."""

from __future__ import annotations

from dataclasses import dataclass

from splatc.codegen.constants import ceil_div
from splatc.codegen.kernel import KernelSpec
from splatc.errors import Unsupported

SMEM_BYTES = 227 * 1024  # dynamic shared memory of one block on sm_90
CHUNK = 64  # columns of a 16-bit type in a 128-byte swizzled row
WARPGROUP_ROWS = 64  # rows of one wgmma
ROW_BYTES = 128
TEAM = 128  # threads of the producer's warpgroup
MAX_VIEWS = (2, 4)  # row views and column views that one launch can hold: each is a tensor map


@dataclass(frozen=True)
class Shape:
    """A tile of m query rows (64 a consumer warpgroup) by n key columns; d, dv: head dims of q/k and v/o."""

    d: int
    dv: int
    m: int
    n: int
    half: str  # "float16" or "bfloat16"
    softcap: bool
    gather: bool
    stages: int  # of the K and V rings
    q_stages: int

    @property
    def warpgroups(self) -> int:
        """Consumer warpgroups."""
        return self.m // WARPGROUP_ROWS

    @property
    def threads(self) -> int:
        return 128 * (self.warpgroups + 1)

    @property
    def d_chunks(self) -> int:
        return ceil_div(self.d, CHUNK)

    @property
    def dv_chunks(self) -> int:
        return ceil_div(self.dv, CHUNK)

    @property
    def writers(self) -> int:
        """Arrivals that fill a stage of K or V: the bulk copies', and with lists of keys every producer thread's."""
        return 1 + (TEAM if self.gather else 0)

    @property
    def turns(self) -> bool:
        """Whether warpgroups take turns at issuing products: 4 % faster with three of them, not with two."""
        return self.warpgroups == 3

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
        return self.n * ROW_BYTES * self.dv_chunks

    @property
    def smem_bytes(self) -> int:
        """Dynamic shared memory: tiles, mask bits, and a page for barriers and messages."""
        rings = self.stages * (self.k_bytes + self.v_bytes + self.bits_bytes)
        return self.q_stages * self.q_slot + rings + 1024

    @property
    def most_registers(self) -> int:
        """Live registers up to which ptxas was seen to spill nothing: a softcap takes some for itself."""
        return min(self.registers[1] - 24, 192) - (16 if self.softcap else 0)

    @property
    def wide(self) -> bool:
        """Whether a consumer's registers are scarce: with head dims beyond 192."""
        return self.live_registers > 160

    @property
    def registers(self) -> tuple[int, int]:
        """(producer, consumer) registers a thread, as setmaxnreg takes them.

        A block starts with equal shares of 64 K registers; what consumers gain must be what the producer's warpgroup
        gives up, or they wait for ever: ``register_pool`` says what is left.
        """
        if self.gather:
            return {1: (72, 240), 2: (56, 224)}[self.warpgroups]
        return {1: (40, 240), 2: (24, 240) if self.wide else (40, 232), 3: (32, 160)}[self.warpgroups]

    @property
    def register_pool(self) -> int:
        """Registers of a block left over after setmaxnreg, a thread of a warpgroup: not negative."""
        start = min(65536 // self.threads // 8 * 8, 240)
        producer, consumer = self.registers
        return start * (self.warpgroups + 1) - producer - consumer * self.warpgroups

    @property
    def live_registers(self) -> int:
        """fp32 and packed registers that a consumer thread holds through the loop: scores, P and O."""
        return self.n // 2 + self.n // 4 + ceil_div(self.dv, 16) * 8


def can_gather(spec: KernelSpec) -> bool:
    """Whether there is a kernel with lists of keys for these sizes: copying them takes registers."""
    return spec.kernel == "hopper" and spec.tile_m <= 128 and max(spec.head_dim, spec.v_head_dim) <= 128


def shape_of(spec: KernelSpec) -> Shape:
    """The sizes that a spec asks for, with the deepest rings that fit; raises Unsupported if none does."""
    if spec.dtype not in ("float16", "bfloat16") or spec.head_dim % 8 or spec.v_head_dim % 8:
        raise Unsupported(f"the Hopper kernel takes float16 and bfloat16 and head dims that are multiples of 8: {spec}")
    if spec.tile_m not in (64, 128, 192) or spec.tile_n % 16 or not 16 <= spec.tile_n <= 256:
        raise Unsupported(f"the Hopper kernel has no tile of {spec.tile_m} x {spec.tile_n}")
    if spec.gather and not can_gather(spec):
        raise Unsupported(f"{spec.name}: consumers leave a producer of listed keys too few registers")
    for stages, q_stages in ((2, 2), (2, 1), (1, 1)):
        shape = Shape(spec.head_dim, spec.v_head_dim, spec.tile_m, spec.tile_n, spec.dtype, spec.softcap, spec.gather,
                      stages, q_stages)  # fmt: skip
        if shape.smem_bytes <= SMEM_BYTES and shape.live_registers <= shape.most_registers:
            return shape
    raise Unsupported(
        f"head dims {spec.head_dim} and {spec.v_head_dim} with tiles of {spec.tile_m} x {spec.tile_n} fit neither the "
        "shared memory nor the registers of sm_90a: use smaller tiles"
    )
