"""Tensor-core instructions of one product, many to an asm statement.

Each statement takes every accumulator in and out, and NVVM's time goes with their number: with one for each 16 columns
it was more than half of NVRTC's (head_dim 128). The machine code is as good. A statement also orders registers: whoever
wrote the accumulators and A did so before it, so that nobody has to fence them before an issue.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm.script import tirx as T

from splatc.codegen.constants import ceil_div
from splatc.codegen.hopper.emit import Expr, do

A_WORDS = 4  # registers of A that a thread gives to an instruction
STEPS = 8  # instructions in a statement at most, an even number: their descriptors are in registers together


@dataclass(frozen=True)
class Statement:
    """``steps`` instructions ``wgmma.mma_async.sync.aligned.<shape>`` on the same fp32 accumulators.

    a_registers: A is in registers, A_WORDS uint32 a step, else in shared memory, a descriptor a step. b_transposed: B
    lies with its columns contiguous. first: it follows other accesses to registers; last: it commits; fresh: its first
    step overwrites the accumulators, else all add to them. sparse: A is compressed 2:4, and there is a word of metadata
    for every two steps (a lane's is of the first one in the lower half of each quad, of the second one in the upper).
    """

    shape: str
    steps: int
    a_registers: bool
    b_transposed: bool
    first: bool
    last: bool
    fresh: bool
    sparse: bool = False

    @property
    def accumulators(self) -> int:
        """Registers of a thread that hold the result: n columns of 64 rows, over 128 threads."""
        return int(self.shape.split("k")[0].split("n")[1]) // 2

    @property
    def a_size(self) -> int:
        """Operands that are A."""
        return self.steps * (A_WORDS if self.a_registers else 1)

    @property
    def words(self) -> int:
        """Operands that are metadata."""
        return ceil_div(self.steps, 2) if self.sparse else 0

    @property
    def name(self) -> str:
        """Of the device function: another one for other instructions."""
        features = "".join(f"_{name}" for name in ("a_registers", "b_transposed", "first", "last", "fresh", "sparse")
                           if getattr(self, name))  # fmt: skip
        return f"splatc_wgmma_{self.shape.replace('.', '_')}_x{self.steps}{features}"

    @property
    def source(self) -> str:
        """The device function: accumulators by reference, then A, the descriptors of B, and metadata."""
        kind, letter = ("uint32_t", "r") if self.a_registers else ("uint64_t", "l")
        operands = [*((f"a{i}", kind, letter) for i in range(self.a_size)),
                    *((f"b{i}", "uint64_t", "l") for i in range(self.steps)),
                    *((f"e{i}", "uint32_t", "r") for i in range(self.words))]  # fmt: skip
        accumulators = [f"d{i}" for i in range(self.accumulators)]
        parameters = ", ".join([*(f"float& {d}" for d in accumulators), *(f"{kind} {x}" for x, kind, _ in operands)])
        outputs = ", ".join(f'"+f"({d})' for d in accumulators)
        inputs = ", ".join(f'"{letter}"({x})' for x, _, letter in operands)
        return (f"__forceinline__ __device__ void {self.name}({parameters}) {{\n"
                f'  asm volatile("{self.assembly}" : {outputs} : {inputs} : "memory");\n}}\n')  # fmt: skip

    @property
    def assembly(self) -> str:
        """PTX; its operands are the parameters of the device function."""
        lines = [".reg .pred add, fresh;", "setp.eq.u32 add, 0, 0;", "setp.ne.u32 fresh, 0, 0;"]
        lines += ["wgmma.fence.sync.aligned;"] * self.first
        lines += map(self._instruction, range(self.steps))
        lines += ["wgmma.commit_group.sync.aligned;"] * self.last
        return "{ " + " ".join(lines) + " }"

    def _instruction(self, step: int) -> str:
        n = self.accumulators
        result = ", ".join(f"%{i}" for i in range(n))
        words = ", ".join(f"%{n + A_WORDS * step + i}" for i in range(A_WORDS))
        a, b = f"{{{words}}}" if self.a_registers else f"%{n + step}", f"%{n + self.a_size + step}"
        keep = "fresh" if self.fresh and step == 0 else "add"
        majors = [0] * (not self.a_registers) + [int(self.b_transposed)]  # of A, if in memory, and B
        options = ", ".join(map(str, [1, 1] if "tf32" in self.shape else [1, 1, *majors]))  # tf32 has but one order
        if self.sparse:
            keep = f"%{n + self.a_size + self.steps + step // 2}, {step % 2}, {keep}"
        kind = "sp.sync" if self.sparse else "sync"
        return f"wgmma.mma_async.{kind}.aligned.{self.shape} {{{result}}}, {a}, {b}, {keep}, {options};"


def issue_product(shape: str, accumulators: Sequence[Expr], a: Sequence[Expr], b: Sequence[Expr], *, fresh: bool,
                  b_transposed: bool, metadata: Sequence[Expr] = ()) -> None:  # fmt: skip
    """Start the product of A and B and commit it as one group; wait before touching any of these registers.

    shape: such as "m64n128k16.f32.bf16.bf16". a: a descriptor a step, or A_WORDS uint32 of registers a step; b: a
    descriptor a step (uint64). fresh: the accumulators are overwritten, not added to. metadata: of a compressed A, in
    registers, a uint32 for every two steps.
    """
    steps = len(b)
    size = len(a) // steps
    for at in range(0, steps, STEPS):
        end = min(at + STEPS, steps)
        one = Statement(shape, end - at, size == A_WORDS, b_transposed, at == 0, end == steps, fresh and at == 0,
                        bool(metadata))  # fmt: skip
        assert (len(accumulators), size * one.steps) == (one.accumulators, one.a_size)
        operands = *accumulators, *a[size * at : size * end], *b[at:end], *metadata[at // 2 : at // 2 + one.words]
        do(T.cuda.func_call(one.name, *operands, source_code=one.source))
