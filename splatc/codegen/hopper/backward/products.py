"""The matrix products of a tile, 64 keys (or, of dQ, queries) a warpgroup, with fp32 accumulators in registers.

    S^T = K Q^T    dP^T = V dO^T    dV += P^T dO    dK += dS^T Q    dQ = dS K

The accumulators of S^T and dP^T are the A fragments of dV and dK; dS goes to dQ through shared memory, because a
warpgroup's dQ sums over the keys of both. Everything in shared memory is addressed from one 32-bit word, and a
product's steps are sums inside its asm statement: nothing of it takes registers.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as I

from splatc.codegen.constants import ceil_div
from splatc.codegen.hopper.backward.shape import RowShape, Shape
from splatc.codegen.hopper.emit import Expr, do, let, named
from splatc.codegen.hopper.products import K_UNITS, PTX_TYPE, ROW_GROUP, SWIZZLE_128B, UNIT, along_row
from splatc.codegen.hopper.shape import ROW_BYTES, WARPGROUP_ROWS

HIGH_WORD = ROW_GROUP | 1 << 30  # of every matrix descriptor here: 8 rows on, and the 128-byte swizzle
LEADING = 1 << 16  # the unit of a descriptor's other stride, in its low word
A_WORDS = 4  # registers of A that a thread gives to an instruction
STEP_DOWN = 16 * ROW_BYTES // UNIT  # 16 rows of a tile whose rows are summed over
HALF_CHUNK = 2 * K_UNITS  # 32 columns of a 16-bit type


@dataclass(frozen=True)
class Product:
    """An asm statement of wgmmas, m64n<n>k16, one for each entry of ``b_steps``.

    kind: of A and B, such as "bf16". a_steps: where A lies in each, in units from its descriptor; None for A in
    registers. down: which of A and B are summed along their rows, instead of along their columns. fresh: the first
    one overwrites the accumulators.
    """

    n: int
    kind: str
    a_steps: tuple[int, ...] | None
    b_steps: tuple[int, ...]
    down: tuple[bool, bool]
    fresh: bool

    @property
    def accumulators(self) -> int:
        return self.n // 2

    @property
    def name(self) -> str:
        """Of the device function: another one for other instructions."""
        steps = "_".join(f"{a}_{b}" for a, b in zip(self.a_steps or ["r"] * len(self.b_steps), self.b_steps,
                                                    strict=True))  # fmt: skip
        flags = "".join(str(int(flag)) for flag in (*self.down, self.fresh))
        return f"splatc_product_n{self.n}_{self.kind}_{flags}_{steps}"

    @property
    def source(self) -> str:
        """The device function: accumulators by reference, A (registers, or its descriptor's low word), B's low word."""
        words = 1 if self.a_steps else A_WORDS * len(self.b_steps)
        names = [*(f"a{i}" for i in range(words)), "b"]
        accumulators = [f"d{i}" for i in range(self.accumulators)]
        parameters = ", ".join([*(f"float& {d}" for d in accumulators), *(f"uint32_t {x}" for x in names)])
        outputs, inputs = ", ".join(f'"+f"({d})' for d in accumulators), ", ".join(f'"r"({x})' for x in names)
        return (f"__forceinline__ __device__ void {self.name}({parameters}) {{\n"
                f'  asm volatile("{self.assembly}" : {outputs} : {inputs} : "memory");\n}}\n')  # fmt: skip

    @property
    def assembly(self) -> str:
        """PTX; its operands are the parameters of the device function."""
        lines = [".reg .pred add, fresh;", ".reg .b32 low;", ".reg .b64 a, b;", "setp.eq.u32 add, 0, 0;",
                 "setp.ne.u32 fresh, 0, 0;", "wgmma.fence.sync.aligned;"]  # fmt: skip
        for step in range(len(self.b_steps)):
            lines += self._step(step)
        return "{ " + " ".join([*lines, "wgmma.commit_group.sync.aligned;"]) + " }"

    def _step(self, step: int) -> list[str]:
        n = self.accumulators
        result = ", ".join(f"%{i}" for i in range(n))
        options = f"1, 1, {', '.join(str(int(x)) for x in (self.down if self.a_steps else self.down[1:]))}"
        lines = []
        if self.a_steps:
            lines += _descriptor("a", f"%{n}", self.a_steps[step])
            a, at_b = "a", n + 1
        else:
            a = "{" + ", ".join(f"%{n + A_WORDS * step + i}" for i in range(A_WORDS)) + "}"
            at_b = n + A_WORDS * len(self.b_steps)
        lines += _descriptor("b", f"%{at_b}", self.b_steps[step])
        shape = f"m64n{self.n}k16.f32.{self.kind}.{self.kind}"
        add = "fresh" if self.fresh and step == 0 else "add"
        return [*lines, f"wgmma.mma_async.sync.aligned.{shape} {{{result}}}, {a}, b, {add}, {options};"]

    def issue(self, accumulators: Expr, a: Expr, b: Expr) -> None:
        """Start the product and commit it as a group. a: registers, or the low word of a descriptor, as b."""
        words = [a] if self.a_steps else [a[i] for i in range(A_WORDS * len(self.b_steps))]
        do(T.cuda.func_call(self.name, *(accumulators[i] for i in range(self.accumulators)), *words, b,
                            source_code=self.source))  # fmt: skip


def _descriptor(name: str, low: str, offset: int) -> list[str]:
    return [f"add.u32 low, {low}, {offset};", f"mov.b64 {name}, {{low, {HIGH_WORD}}};"]


class Products:
    """The products of a consumer warpgroup (its number: ``me``), over the tiles of one block.

    Each method starts one and commits it; the accumulators of S^T, dP^T and dQ are overwritten, dV and dK added to.
    """

    def __init__(self, s: Shape, places: Places, me: Expr) -> None:
        self._s, self._places = s, places
        kind = PTX_TYPE[s.dtype]
        d, dv = ceil_div(s.d, 16), ceil_div(s.dv, 16)
        queries, keys = s.n // 16, s.keys // 16
        self._scores = Product(s.n, kind, along(d, s.keys), along(d, s.n), (False, False), True)
        self._dp = Product(s.n, kind, along(dv, s.keys), along(dv, s.n), (False, False), True)
        self._dv = Product(16 * dv, kind, None, downward(queries), (False, True), False)
        self._dk = Product(16 * d, kind, None, downward(queries), (False, True), False)
        number = T.cast(me, "uint32")
        self._mine = let("my_rows", number * T.uint32(WARPGROUP_ROWS * ROW_BYTES // UNIT))
        if not s.makes("dq"):
            return
        self._dq = Product(s.sum_width, kind, downward(keys), downward(keys), (True, True), True)
        # dQ: of my half of the queries (the next block of 64 in dS), or in my columns of K.
        half = s.keys * ROW_BYTES // UNIT if s.halves_queries or s.d_chunks > 1 else HALF_CHUNK
        share = let("my_share", number * T.uint32(half))
        zero = T.uint32(0)
        self._dq_a, self._dq_b = (share, zero) if s.halves_queries else (zero, share)

    def scores(self, out: Expr, keys: Expr, stage: Expr) -> None:
        """keys: the stage of K."""
        self._scores.issue(out, self._at("k", keys) + self._mine, self._at("q", stage))

    def score_gradients(self, out: Expr, keys: Expr, stage: Expr) -> None:
        """keys: the stage of V."""
        self._dp.issue(out, self._at("v", keys) + self._mine, self._at("do", stage))

    def value_gradients(self, out: Expr, p: Expr, stage: Expr) -> None:
        self._dv.issue(out, p, self._at("do", stage, self._s.n))

    def key_gradients(self, out: Expr, ds: Expr, stage: Expr) -> None:
        self._dk.issue(out, ds, self._at("q", stage, self._s.n))

    def query_gradients(self, out: Expr, stage: Expr) -> None:
        keys = self._s.keys
        self._dq.issue(out, self._at("ds", stage, keys) + self._dq_a, self._at("k", None, keys) + self._dq_b)

    def _at(self, name: str, stage: Expr | None = None, rows: int = 0) -> Expr:
        return self._places.low(name, stage, rows)


class RowProducts:
    """The products of a consumer warpgroup of the row kernel, 64 queries: S = Q K^T, dP = dO V^T and dQ += dS K."""

    def __init__(self, s: RowShape, places: Places, me: Expr) -> None:
        self._n, self._places = s.n, places
        kind, d, dv = PTX_TYPE[s.dtype], ceil_div(s.d, 16), ceil_div(s.dv, 16)
        self._scores = Product(s.n, kind, along(d, s.m), along(d, s.n), (False, False), True)
        self._dp = Product(s.n, kind, along(dv, s.m), along(dv, s.n), (False, False), True)
        self._dq = Product(16 * d, kind, None, downward(s.n // 16), (False, True), False)
        self._mine = let("my_rows", T.cast(me, "uint32") * T.uint32(WARPGROUP_ROWS * ROW_BYTES // UNIT))

    def scores(self, out: Expr, q_stage: Expr, k_stage: Expr) -> None:
        low = self._places.low
        self._scores.issue(out, low("q", q_stage) + self._mine, low("k", k_stage))

    def score_gradients(self, out: Expr, q_stage: Expr, v_stage: Expr) -> None:
        low = self._places.low
        self._dp.issue(out, low("do", q_stage) + self._mine, low("v", v_stage))

    def query_gradients(self, out: Expr, ds: Expr, k_stage: Expr) -> None:
        self._dq.issue(out, ds, self._places.low("k", k_stage, self._n))


def along(steps: int, rows: int) -> tuple[int, ...]:
    """Where the steps of a sum along the rows of a tile of so many rows begin."""
    return tuple(along_row(kk, rows) for kk in range(steps))


def downward(steps: int) -> tuple[int, ...]:
    """The same for a sum along its columns."""
    return tuple(kk * STEP_DOWN for kk in range(steps))


class Places:
    """Where the tiles of a block lie in shared memory, as low words of matrix descriptors."""

    def __init__(self, first: Expr, offsets: Mapping[str, int], sizes: Mapping[str, int]) -> None:
        """first: a buffer; offsets: in bytes from there, where each buffer of tiles begins; sizes: of its stages."""
        self._offsets, self._sizes = offsets, sizes
        word = named("first_tile", I.alloc_local((1,), "uint64"))
        do(T.cuda.wgmma.encode_matrix_descriptor(T.address_of(word[0]), first.ptr_to([0]), 0, ROW_GROUP, SWIZZLE_128B))
        self._base = let("base", T.cast(T.bitwise_and(word[0], T.uint64(0x3FFF)), "uint32"))

    def low(self, name: str, stage: Expr | None, rows: int = 0) -> Expr:
        """Of a tile (in a stage); rows: of the tile, if it is summed along them."""
        leading = rows * ROW_BYTES // UNIT if rows else 1  # from one 128-byte column of chunks to the next
        low = self._base + T.uint32(self._offsets[name] // UNIT + leading * LEADING)
        return low if stage is None else low + T.cast(stage, "uint32") * T.uint32(self._sizes[name] // UNIT)

