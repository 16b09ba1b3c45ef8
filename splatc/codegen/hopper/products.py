"""Warpgroup matrix products: 64 rows a warpgroup, fp32 accumulators in registers.

Accumulator layout of thread t of a warp (g = lane // 4, q = lane % 4): register 4i + 2r + c is row g + 8r, column
8i + 2q + c. The same registers, packed in pairs, are the A operand of the next product; unpacked, they are that of a
product of tf32 whose eight columns are in another order (turning.py).
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as I

from splatc.codegen.hopper.emit import Expr, do, registers, store
from splatc.codegen.hopper.shape import ITEM_BYTES, ROW_BYTES, Shape, chunk

UNIT = 16  # matrix descriptors count in 16 bytes
K_UNITS = 2  # the 32 bytes of a row that one wgmma reads: 16 columns of a 16-bit type, 8 of tf32
ROW_GROUP = 8 * ROW_BYTES // UNIT  # 8 rows, the height of a swizzle atom
HIGH = ROW_GROUP | 1 << 30  # of a matrix descriptor: rows in groups of 8 this far apart, 128-byte swizzle
# Reading a register between issue and wait would be a race: these keep the compiler from moving accesses across.
FENCES = {
    "float32": ("splatc_fence_f32", '__forceinline__ __device__ void splatc_fence_f32(float& r) '
                '{ asm volatile("" : "+f"(r) :: "memory"); }'),
    "uint32": ("splatc_fence_u32", '__forceinline__ __device__ void splatc_fence_u32(uint32_t& r) '
               '{ asm volatile("" : "+r"(r) :: "memory"); }'),
}  # fmt: skip
PTX_TYPE = {"float16": "f16", "bfloat16": "bf16", "float32": "tf32"}


def descriptor(tile: Expr, offset: Expr, leading: int) -> Expr:
    """Low word of the matrix descriptor of tile[offset:]: its address and ``leading``, both in 16 bytes.

    The high word is the same for all tiles of 128-byte swizzled rows: HIGH.
    """
    address = T.cuda.cvta_generic_to_shared(tile.ptr_to([offset]))
    return T.bitwise_or(T.shift_right(address, T.uint32(4)), T.uint32(leading << 16))


def at_stage(name: str, base: Expr, stage: Expr, size: int) -> Expr:
    """The low word ``stage`` slots of ``size`` bytes on.

    The compiler is not to know it: it would keep a register pair for every sum with a constant.
    """
    word = registers(name, 1, "uint32")
    store(word, 0, base + T.cast(stage, "uint32") * T.uint32(size // UNIT))
    fence(word, 1)
    return word[0]


def whole(low: Expr, offset: int) -> Expr:
    """The descriptor ``offset`` times 16 bytes on."""
    return T.bitwise_or(T.cast(low + T.uint32(offset), "uint64"), T.uint64(HIGH << 32))


def fence(buffer: Expr, count: int) -> None:
    """Keep accesses to these registers on their side of this point."""
    name, source = FENCES[str(buffer.dtype)]
    for i in range(count):
        do(T.cuda.func_call(name, buffer[i], source_code=source))


def wait_products(pending: int) -> None:
    """Until at most ``pending`` of the committed groups are unfinished."""
    do(T.ptx.wgmma.wait_group.sync.aligned(pending))


def depth(dtype: str) -> int:
    """Columns of A (rows of B) of one wgmma."""
    return K_UNITS * UNIT // ITEM_BYTES[dtype]


def product(n: int, dtype: str) -> Expr:
    """The wgmma of 64 rows and n columns."""
    kind = PTX_TYPE[dtype]
    return T.ptx[f"wgmma.mma_async.sync.aligned.m64n{n}k{depth(dtype)}.f32.{kind}.{kind}"]


def along_row(kk: int, rows: int) -> int:
    """Where the kk-th 32 bytes of the rows of a tile of so many rows begin, in units."""
    return kk % 4 * K_UNITS + kk // 4 * rows * ROW_BYTES // UNIT


class Scores:
    """S = Q K^T of one tile: 64 x n a warpgroup, both operands in shared memory."""

    def __init__(self, dtype: str, d: int, n: int, q_rows: int) -> None:
        self.count = n // 2
        self.s = registers("scores", self.count)
        self._issue = product(n, dtype)
        self._layout = () if dtype == "float32" else (0, 0)  # both along the head dim, as tf32 always is
        self._offsets = [tuple(along_row(kk, rows) for rows in (q_rows, n)) for kk in range(-(-d // depth(dtype)))]

    def issue(self, q: Expr, k: Expr) -> None:
        """Start the product of the tiles at descriptors q and k."""
        fence(self.s, self.count)
        do(T.ptx.wgmma.fence.sync.aligned())
        s = [self.s[i] for i in range(self.count)]
        for kk, (at_q, at_k) in enumerate(self._offsets):
            do(self._issue(*s, whole(q, at_q), whole(k, at_k), T.bool(kk > 0), 1, 1, *self._layout))
        do(T.ptx.wgmma.commit_group.sync.aligned())

    def fence(self) -> None:
        fence(self.s, self.count)


class Output:
    """O += P V: 64 x dv a warpgroup; P (n columns) in registers, rounded to the type of V, and V in shared memory.

    leading: of V's matrix descriptor.
    """

    def __init__(self, dtype: str, dv: int, n: int) -> None:
        width = -(-dv // 16) * 16
        self.count = width // 2
        self.o = registers("out", self.count)
        self.leading = n * ROW_BYTES // UNIT
        self._packed = n * ITEM_BYTES[dtype] // 8
        self.p = registers("probs", self._packed, "uint32")
        self._kind = PTX_TYPE[dtype]
        self._issue = product(width, dtype)
        self._layout: tuple[int, ...] = (1,)  # of V: along the head dim
        self._offsets = [kk * 2 * ROW_GROUP for kk in range(n // depth(dtype))]

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
            do(T.ptx[f"cvt.rn.{self._kind}x2.f32"](self.p[j], s[2 * j + 1], s[2 * j]))

    def issue(self, v: Expr) -> None:
        """Start adding P times the tile at descriptor v."""
        fence(self.o, self.count)
        fence(self.p, self._packed)
        do(T.ptx.wgmma.fence.sync.aligned())
        o = [self.o[i] for i in range(self.count)]
        for kk, at in enumerate(self._offsets):
            p = [self.p[4 * kk + i] for i in range(4)]
            do(self._issue(*o, *p, whole(v, at), T.bool(True), 1, 1, *self._layout))
        do(T.ptx.wgmma.commit_group.sync.aligned())

    def fence(self) -> None:
        fence(self.o, self.count)


def score_of(register: int) -> int:
    """The score register for a register of the A operand in tf32: of its eights, register 2c + r is row g + 8r, column
    q + 4c, which stands for key 2q + c."""
    return register // 4 * 4 + register % 2 * 2 + register % 4 // 2


class TurnedOutput(Output):
    """O += P V in tf32, with V turned over: along the keys, whose order within each eight is that of turning.py."""

    def __init__(self, dv: int, n: int) -> None:
        super().__init__("float32", dv, n)
        self.leading = 1  # rows of V are whole 128 bytes: not used
        self._layout = ()
        rows = -(-dv // chunk("float32")) * chunk("float32")
        self._offsets = [along_row(kk, rows) for kk in range(n // depth("float32"))]

    def take(self, s: Expr) -> None:
        """P = the scores' registers, rounded."""
        for j in range(self._packed):
            do(T.ptx["cvt.rn.tf32.f32"](self.p[j], s[score_of(j)]))


def output_of(s: Shape) -> Output:
    """The output for a kernel's sizes."""
    return TurnedOutput(s.dv, s.n) if s.turned else Output(s.dtype, s.dv, s.n)
