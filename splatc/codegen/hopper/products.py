"""Warpgroup matrix products: 64 rows a warpgroup, fp32 accumulators in registers.

Accumulator layout of thread t of a warp (g = lane // 4, q = lane % 4): register 4i + 2r + c is row g + 8r, column
8i + 2q + c. The same registers, packed in pairs, are the A operand of the next product.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as I

from splatc.codegen.hopper.emit import Expr, do, let, named, registers
from splatc.codegen.hopper.shape import ROW_BYTES
from splatc.codegen.hopper.wgmma import issue_product

SWIZZLE_128B = 3
UNIT = 16  # matrix descriptors count in 16 bytes
K16 = 2  # 16 columns of a row, in units
ROW_GROUP = 8 * ROW_BYTES // UNIT  # 8 rows, the height of a swizzle atom
# Reading a register between issue and wait would be a race: these keep the compiler from moving accesses across.
FENCE = ("splatc_fence", '__forceinline__ __device__ void splatc_fence(float& r) '
         '{ asm volatile("" : "+f"(r) :: "memory"); }')  # fmt: skip
PTX_TYPE = {"float16": "f16", "bfloat16": "bf16"}


def descriptor(name: str, tile: Expr, offset: Expr, leading: int) -> Expr:
    """A matrix descriptor of 128-byte swizzled rows from tile[offset] on; ``leading`` in 16 bytes."""
    d = named(name, I.alloc_local((1,), "uint64"))
    do(T.cuda.wgmma.encode_matrix_descriptor(T.address_of(d[0]), tile.ptr_to([offset]), leading, ROW_GROUP,
                                             SWIZZLE_128B))  # fmt: skip
    return d[0]


def at_stage(name: str, base: Expr, stage: Expr, size: int) -> Expr:
    """The descriptor ``stage`` slots of ``size`` bytes on."""
    return let(name, base + T.cast(stage, "uint64") * T.uint64(size // UNIT))


def fence(buffer: Expr, count: int) -> None:
    """Keep accesses to these fp32 registers on their side of this point."""
    name, source = FENCE
    for i in range(count):
        do(T.cuda.func_call(name, buffer[i], source_code=source))


def wait_products(pending: int) -> None:
    """Until at most ``pending`` of the committed groups are unfinished."""
    do(T.ptx.wgmma.wait_group.sync.aligned(pending))


class Scores:
    """S = Q K^T of one tile: 64 x n a warpgroup, both operands in shared memory."""

    def __init__(self, half: str, d: int, n: int, q_rows: int) -> None:
        self.count = n // 2
        self.s = registers("scores", self.count)
        kind = PTX_TYPE[half]
        self._shape = f"m64n{n}k16.f32.{kind}.{kind}"
        self._offsets = [  # of each 16 columns of Q and K
            tuple(kk % 4 * K16 + kk // 4 * rows * ROW_BYTES // UNIT for rows in (q_rows, n))
            for kk in range(-(-d // 16))
        ]

    def issue(self, q: Expr, k: Expr) -> None:
        """Start the product of the tiles at descriptors q and k."""
        s = [self.s[i] for i in range(self.count)]
        at_q, at_k = ([T.uint64(at[i]) for at in self._offsets] for i in range(2))
        issue_product(self._shape, s, [q + at for at in at_q], [k + at for at in at_k], fresh=True, b_transposed=False)

    def fence(self) -> None:
        fence(self.s, self.count)


class Output:
    """O += P V: 64 x dv a warpgroup; P (n columns) in registers as packed halves, V in shared memory."""

    def __init__(self, half: str, dv: int, n: int) -> None:
        width = -(-dv // 16) * 16
        self.count = width // 2
        self.o = registers("out", self.count)
        self.p = registers("probs", n // 4, "uint32")
        kind = PTX_TYPE[half]
        self._pack = T.ptx[f"cvt.rn.{kind}x2.f32"]
        self._shape = f"m64n{width}k16.f32.{kind}.{kind}"
        self._steps = n // 16
        self._packed = n // 4

    def clear(self) -> None:
        for i in range(self.count):
            I.buffer_store(self.o, T.float32(0.0), [i])

    def scale(self, factor: Expr) -> None:
        """Multiply the rows by factor[r]."""
        for i in range(self.count):
            I.buffer_store(self.o, self.o[i] * factor[i // 2 % 2], [i])

    def take(self, s: Expr) -> None:
        """P = the scores' registers, rounded and packed."""
        for j in range(self._packed):
            do(self._pack(self.p[j], s[2 * j + 1], s[2 * j]))

    def issue(self, v: Expr) -> None:
        """Start adding P times the tile at descriptor v."""
        o, p = [self.o[i] for i in range(self.count)], [self.p[i] for i in range(self._packed)]
        steps = [v + T.uint64(kk * 2 * ROW_GROUP) for kk in range(self._steps)]
        issue_product(self._shape, o, p, steps, fresh=False, b_transposed=True)

    def fence(self) -> None:
        fence(self.o, self.count)
