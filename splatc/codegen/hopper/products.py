"""Warpgroup matrix products: 64 rows a warpgroup, fp32 accumulators in registers.

Accumulator layout of thread t of a warp (g = lane // 4, q = lane % 4): register 4i + 2r + c is row g + 8r, column
8i + 2q + c. The same registers, packed in pairs, are the A operand of the next product.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as I

from splatc.codegen.constants import ceil_div
from splatc.codegen.hopper.emit import Expr, call_source, do, let, named, registers, store
from splatc.codegen.hopper.shape import ITEM_BYTES, ROW_BYTES, Shape, chunk
from splatc.codegen.hopper.wgmma import issue_product

SWIZZLE_128B = 3
UNIT = 16  # matrix descriptors count in 16 bytes
MANY = 16  # places in the rows of Q: so many descriptors are too many to keep
K_UNITS = 2  # the 32 bytes of a row that one wgmma reads: 16 columns of a 16-bit type, 8 of tf32
ROW_GROUP = 8 * ROW_BYTES // UNIT  # 8 rows, the height of a swizzle atom
# Reading a register between issue and wait would be a race: this keeps the compiler from moving accesses across.
FENCES = {
    dtype: (f"splatc_fence_{dtype}", f'__forceinline__ __device__ void splatc_fence_{dtype}({c}& r) '
            f'{{ asm volatile("" : "+{letter}"(r) :: "memory"); }}')
    for dtype, c, letter in (("float32", "float", "f"), ("int32", "int", "r"), ("uint32", "uint32_t", "r"),
                             ("uint64", "uint64_t", "l"))
}  # fmt: skip
PTX_TYPE = {"float16": "f16", "bfloat16": "bf16", "float32": "tf32"}


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
    """Keep accesses to these registers on their side of this point."""
    for i in range(count):
        call_source(FENCES[str(buffer.dtype)], buffer[i])


def wait_products(pending: int) -> None:
    """Until at most ``pending`` of the committed groups are unfinished."""
    do(T.ptx.wgmma.wait_group.sync.aligned(pending))


def depth(dtype: str) -> int:
    """Columns of A (rows of B) of one wgmma."""
    return K_UNITS * UNIT // ITEM_BYTES[dtype]


def instruction(n: int, dtype: str) -> str:
    """The shape and types of the wgmma of 64 rows and n columns."""
    return f"m64n{n}k{depth(dtype)}.f32.{PTX_TYPE[dtype]}.{PTX_TYPE[dtype]}"


def along_row(kk: int, rows: int) -> int:
    """Where the kk-th 32 bytes of the rows of a tile of so many rows begin, in units."""
    return kk % 4 * K_UNITS + kk // 4 * rows * ROW_BYTES // UNIT


def lane_of_block(i: int, base: Expr, row: Expr, lane: Expr, rows: int, width: int) -> Expr:
    """Where a lane's 8 columns of the i-th block of 16 x 16 lie, for the matrix loads and stores of 16-bit values: in a
    row of swizzled chunks from ``base`` on, ``width`` columns each and ``rows`` rows apart."""
    column16 = T.bitwise_xor(i % 4 * 2 + lane // 16, row % 8)  # the swizzle, in 16 bytes
    return base + row * width + i // 4 * (rows * width) + column16 * 8


def hidden(value: Expr, dtype: str = "uint64") -> Expr:
    """A value without its origin: what is made of it cannot be computed ahead and kept in registers through a loop."""
    word = registers("hidden", 1, dtype)
    store(word, 0, value)
    fence(word, 1)
    return word[0]


class Scores:
    """S = Q K^T of one tile: 64 x n a warpgroup, both operands in shared memory."""

    def __init__(self, dtype: str, d: int, n: int, q_rows: int) -> None:
        self.count = n // 2
        self.s = registers("scores", self.count)
        self._instruction = instruction(n, dtype)
        steps = range(ceil_div(d, depth(dtype)))
        self._at_q, self._at_k = ([T.uint64(along_row(kk, rows)) for kk in steps] for rows in (q_rows, n))

    def issue(self, q: Expr, k: Expr) -> None:
        """Start the product of the tiles at descriptors q and k."""
        if len(self._at_q) > MANY:
            q, k = hidden(q), hidden(k)
        s = [self.s[i] for i in range(self.count)]
        a, b = [q + at for at in self._at_q], [k + at for at in self._at_k]
        issue_product(self._instruction, s, a, b, fresh=True, b_transposed=False)

    def fence(self) -> None:
        fence(self.s, self.count)


class ScoresOfKept(Scores):
    """The same with Q in registers: a warpgroup's 64 rows, an A operand for all column tiles of a row tile."""

    def __init__(self, dtype: str, d: int, n: int, q_rows: int) -> None:
        super().__init__(dtype, d, n, q_rows)
        self._dtype, self._rows = dtype, q_rows
        self.q = registers("q_words", 4 * len(self._at_q), "uint32")

    def keep(self, place: Expr, base: Expr, warp: Expr, lane: Expr) -> None:
        """Read this thread's part of the 64 rows at place[base:], swizzled chunks that lie ``q_rows`` rows apart."""
        row = let("q_row", warp * 16 + lane % 16)
        for kk in range(len(self._at_q)):
            at = place.ptr_to([lane_of_block(kk, base, row, lane, self._rows, chunk(self._dtype))])
            do(T.ptx["ldmatrix.sync.aligned.m8n8.x4.shared.b16"](*(self.q[4 * kk + i] for i in range(4)), at))

    def issue(self, q: Expr, k: Expr) -> None:
        s, words = ([x[i] for i in range(n)] for x, n in ((self.s, self.count), (self.q, 4 * len(self._at_q))))
        issue_product(self._instruction, s, words, [k + at for at in self._at_k], fresh=True, b_transposed=False)


def scores_of(s: Shape) -> Scores:
    """The scores for a kernel's sizes."""
    return (ScoresOfKept if s.keeps_q else Scores)(s.dtype, s.d, s.n, s.m)


class Output:
    """O += P V: 64 x dv a warpgroup; P (n columns) in registers, rounded to the type of V, and V in shared memory.

    leading: of V's matrix descriptor.
    """

    transposed = True  # V lies along the head dim

    def __init__(self, dtype: str, dv: int, n: int) -> None:
        width = ceil_div(dv, 16) * 16
        self.count = width // 2
        self.o = registers("out", self.count)
        self.leading = n * ROW_BYTES // UNIT
        self._packed = n * ITEM_BYTES[dtype] // 8
        self.p = registers("probs", self._packed, "uint32")
        self._kind = PTX_TYPE[dtype]
        self._instruction = instruction(width, dtype)
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
        o, p = [self.o[i] for i in range(self.count)], [self.p[i] for i in range(self._packed)]
        steps = [v + T.uint64(at) for at in self._offsets]
        issue_product(self._instruction, o, p, steps, fresh=False, b_transposed=self.transposed)

    def fence(self) -> None:
        fence(self.o, self.count)


def score_of(register: int) -> int:
    """The score register for a register of the A operand in tf32: of its eights, register 2c + r is row g + 8r, column
    q + 4c, which stands for key 2q + c."""
    return register // 4 * 4 + register % 2 * 2 + register % 4 // 2


class TurnedOutput(Output):
    """O += P V in tf32, with V turned over: along the keys, whose order within each eight is that of turning.py."""

    transposed = False

    def __init__(self, dv: int, n: int) -> None:
        super().__init__("float32", dv, n)
        self.leading = 1  # rows of V are whole 128 bytes: not used
        rows = ceil_div(dv, chunk("float32")) * chunk("float32")
        self._offsets = [along_row(kk, rows) for kk in range(n // depth("float32"))]

    def take(self, s: Expr) -> None:
        """P = the scores' registers, rounded."""
        for j in range(self._packed):
            do(T.ptx["cvt.rn.tf32.f32"](self.p[j], s[score_of(j)]))


class SparseOutput(Output):
    """O += P V of a pruned tile (prune.py): P has the kept half of the keys, and ``words`` say which those are."""

    def __init__(self, dtype: str, dv: int, n: int) -> None:
        super().__init__(dtype, dv, n)
        self._packed //= 2
        self.p = registers("kept_probs", self._packed, "uint32")
        self.words = registers("metadata", n // 64, "uint32")
        steps = len(self._offsets) // 2
        self._instruction = self._instruction.replace("k16", "k32")
        self._offsets = [kk * 4 * ROW_GROUP for kk in range(steps)]

    def issue(self, v: Expr) -> None:
        o, p = [self.o[i] for i in range(self.count)], [self.p[i] for i in range(self._packed)]
        steps = [v + T.uint64(at) for at in self._offsets]
        words = [self.words[i] for i in range(ceil_div(len(steps), 2))]
        issue_product(self._instruction, o, p, steps, fresh=False, b_transposed=True, metadata=words)


def output_of(s: Shape) -> Output:
    """The output for a kernel's sizes."""
    if s.pruned:
        return SparseOutput(s.dtype, s.dv, s.n)
    return TurnedOutput(s.dv, s.n) if s.turned else Output(s.dtype, s.dv, s.n)
