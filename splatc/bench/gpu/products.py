"""sddmm and spmm on a GPU against cuSPARSE (torch.sparse) and against dense products.

    python -m splatc.bench.gpu.products --json products.json

A time is of one call for all heads of a batch entry. cuSPARSE gets the best of its types, and of heads one by one or
as a batch; the dense product has our type.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import splatc
from splatc import patterns as P
from splatc.bench.gpu import machine
from splatc.bench.gpu.clock import GraphClock, Inputs, Timed
from splatc.bench.gpu.measure import reason
from splatc.bench.gpu.peers import Contestant
from splatc.bench.timing import interleave
from splatc.patterns.base import Pattern
from splatc.runtime.structure import Structure, structure_of

LENGTHS = (1024, 2048, 4096, 8192)
DENSITIES = (0.1, 0.25, 0.5)
HEAD_DIM, HEADS = 64, 16
CUSPARSE_DTYPES = ("float32", "float16", "bfloat16")
TARGETS = {"sddmm": 2.46, "spmm": 2.81}  # over cuSPARSE: the published figures
SETS, ROUNDS = 4, 5

Contestants = Iterator[tuple[str, Callable[[], tuple[Contestant, Inputs]]]]


@dataclass(frozen=True)
class Record:
    """A product over a mask. seconds: of each contestant; failed: why one has none; error: of ours, relative."""

    product: str
    mask: str
    seq_len: int
    density: float
    heads: int
    dtype: str
    seconds: dict[str, float]
    failed: dict[str, str]
    error: float

    def over(self, peer: str) -> float:
        """How many times faster ours is than the fastest of the contestants whose names begin so."""
        found = [seconds for name, seconds in self.seconds.items() if name.startswith(peer)]
        return min(found, default=math.nan) / self.seconds.get("splatc", math.nan)

    def __str__(self) -> str:
        ours = self.seconds.get("splatc", math.nan)
        missed = self.over("cusparse") < TARGETS[self.product] or self.over("dense") < 1
        return (f"{self.product:6} {self.mask:18} S={self.seq_len:5} {self.density:5.1%} {ours * 1e6:8.1f} us  "
                f"x{self.over('cusparse'):6.2f} cuSPARSE  x{self.over('dense'):5.2f} dense  error {self.error:.1e}"
                f"{'  missed' if missed else ''}")  # fmt: skip


def masks(length: int, density: float) -> Iterator[Pattern]:
    """A window, blocks and a stride that keep about this share of the pairs."""
    reach = round(length * (1 - math.sqrt(1 - density)))
    yield P.window(reach, reach)
    yield P.blocked(round(length * density))
    yield P.strided(round(1 / density))


class Csr:
    """A mask's elements on the GPU, as torch.sparse takes them. places: of each, in the dense matrix."""

    def __init__(self, structure: Structure) -> None:
        import torch

        order = structure.orders[0]
        rows, columns = (torch.from_numpy(x).cuda() for x in order.elements())
        self.shape = structure.q_len, structure.kv_len
        self.places = rows * structure.kv_len + columns
        self.crow, self.columns = torch.from_numpy(order.indptr).int().cuda(), columns.int()

    def matrix(self, values: Any) -> Any:
        """Of values (nnz), or (heads, nnz) for a batch."""
        import torch

        heads = values.shape[:-1]
        return torch.sparse_csr_tensor(self.crow.expand(*heads, -1), self.columns.expand(*heads, -1), values,
                                       size=(*heads, *self.shape), check_invariants=False)  # fmt: skip


def sddmm_contestants(structure: Structure, csr: Csr, heads: int, dtype: str) -> Contestants:
    """Functions of (q, k, None), each (heads, seq, dim)."""
    import torch

    q, k = (_normal(SETS, heads, structure.q_len, HEAD_DIM, dtype=dtype) for _ in range(2))
    pattern = structure.pattern

    def inputs(kind: str) -> Inputs:
        return [(a.to(getattr(torch, kind)), b.to(getattr(torch, kind)), None) for a, b in zip(q, k, strict=True)]

    yield "splatc", lambda: (Contestant(lambda a, b, _: splatc.sddmm(a[None], b[None], pattern, scale=1.0).values[0]),
                             inputs(dtype))  # fmt: skip
    yield "dense", lambda: (Contestant(lambda a, b, _: a @ b.mT), inputs(dtype))
    for kind in CUSPARSE_DTYPES:
        def batched(kind: str = kind) -> tuple[Contestant, Inputs]:
            zero = csr.matrix(torch.zeros(heads, len(csr.columns), dtype=getattr(torch, kind), device="cuda"))
            return Contestant(lambda a, b, _: torch.sparse.sampled_addmm(zero, a, b.mT, beta=0.0)), inputs(kind)

        def one_by_one(kind: str = kind) -> tuple[Contestant, Inputs]:
            zero = csr.matrix(torch.zeros(len(csr.columns), dtype=getattr(torch, kind), device="cuda"))
            return Contestant(lambda a, b, _: [torch.sparse.sampled_addmm(zero, x, y.mT, beta=0.0)
                                               for x, y in zip(a, b, strict=True)]), inputs(kind)  # fmt: skip

        yield f"cusparse {kind}", one_by_one
        yield f"cusparse {kind} batch", batched


def spmm_contestants(structure: Structure, csr: Csr, heads: int, dtype: str) -> Contestants:
    """Functions of (p, v, None): values or a matrix for each head, and (heads, seq, dim)."""
    import torch

    values = _normal(SETS, heads, len(csr.columns), dtype=dtype)
    v = _normal(SETS, heads, structure.kv_len, HEAD_DIM, dtype=dtype)

    def ours() -> tuple[Contestant, Inputs]:
        return Contestant(lambda p, y, _: splatc.spmm(p, y[None])[0]), [
            (splatc.SparseScores(p[None], structure), y, None) for p, y in zip(values, v, strict=True)
        ]

    def dense() -> tuple[Contestant, Inputs]:
        return Contestant(lambda p, y, _: p @ y), [(_dense(csr, p), y, None) for p, y in zip(values, v, strict=True)]

    yield "splatc", ours
    yield "dense", dense
    for kind in CUSPARSE_DTYPES:
        def batched(kind: str = kind) -> tuple[Contestant, Inputs]:
            wide = getattr(torch, kind)
            return Contestant(lambda p, y, _: torch.bmm(p, y)), [
                (csr.matrix(p.to(wide)), y.to(wide), None) for p, y in zip(values, v, strict=True)
            ]

        def one_by_one(kind: str = kind) -> tuple[Contestant, Inputs]:
            wide = getattr(torch, kind)
            return Contestant(lambda p, y, _: [a @ b for a, b in zip(p, y, strict=True)]), [
                ([csr.matrix(head) for head in p.to(wide)], y.to(wide), None) for p, y in zip(values, v, strict=True)
            ]

        yield f"cusparse {kind}", one_by_one
        yield f"cusparse {kind} batch", batched


CONTESTANTS = {"sddmm": sddmm_contestants, "spmm": spmm_contestants}


def measure(pattern: Pattern, length: int, heads: int, dtype: str, clock: GraphClock) -> Iterator[Record]:
    """Both products over a mask."""
    structure = structure_of(pattern, length, length)
    csr = Csr(structure)
    density = structure.orders[0].nnz / length**2
    for product, contestants in CONTESTANTS.items():
        ready: dict[str, Timed] = {}
        failed: dict[str, str] = {}
        error = math.nan
        for name, make in contestants(structure, csr, heads, dtype):
            try:
                contestant, inputs = make()
                if name == "splatc":
                    error = _error(product, csr, contestant, inputs[0])
                ready[name] = clock.prepare(contestant, inputs)
            except Exception as problem:
                failed[name] = reason(problem)
        timings = interleave({name: one.sample for name, one in ready.items()}, ROUNDS, budget=5.0)
        seconds = {name: one.median for name, one in timings.items()}
        yield Record(product, str(pattern), length, density, heads, dtype, seconds, failed, error)


def _error(product: str, csr: Csr, contestant: Contestant, given: tuple[Any, ...]) -> float:
    """||got - wanted|| / ||wanted|| of the first head, against float64."""
    x, y, _ = given
    got = contestant.call(*given)[0].double()
    if product == "sddmm":
        wanted = (x[0].double() @ y[0].double().mT).view(-1)[csr.places]
    else:
        wanted = _dense(csr, x.values[0, :1].double())[0] @ y[0].double()
    return float((got - wanted).norm() / wanted.norm())


def _dense(csr: Csr, values: Any) -> Any:
    """(heads, seq, seq) of values (heads, nnz)."""
    out = values.new_zeros(len(values), csr.shape[0] * csr.shape[1])
    out[:, csr.places] = values
    return out.view(len(values), *csr.shape)


def _normal(*sizes: int, dtype: str) -> Any:
    import torch

    return torch.randn(*sizes, device="cuda", dtype=getattr(torch, dtype))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a line for each product and mask, and write them as JSON as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="a file")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--densities", type=float, nargs="+", default=DENSITIES)
    parser.add_argument("--heads", type=int, default=HEADS)
    parser.add_argument("--dtype", default="bfloat16", choices=("float16", "bfloat16"))
    chosen = parser.parse_args(arguments)
    about, records, clock = machine.describe(["products"], "cuda"), [], GraphClock()
    print(f"{about['gpu']['name']}, {chosen.heads} heads of {HEAD_DIM}, {chosen.dtype}")
    for length in chosen.lengths:
        for density in chosen.densities:
            for pattern in masks(length, density):
                for record in measure(pattern, length, chosen.heads, chosen.dtype, clock):
                    print(record, flush=True)
                    records.append(asdict(record))
                    if chosen.json:
                        chosen.json.write_text(json.dumps({"about": about, "records": records}, indent=1))


if __name__ == "__main__":
    main()
