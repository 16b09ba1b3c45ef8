"""``splatc tune --calibrate``: what the parts of the Hopper kernel cost on the GPU here, fitted to measured calls.

The fitted masks keep all multiprocessors equally busy to the end: equal row tiles, in whole waves. A call then takes
launch + (item * row tiles + tile * column tiles + bits * those with bits) / multiprocessors, which is linear in what is
sought. Masks whose rows differ are measured too, to see how the cost model does on what it was not fitted to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

import splatc
from splatc import patterns as P
from splatc.bench.gpu.clock import GraphClock
from splatc.bench.gpu.machine import ceilings, describe
from splatc.bench.gpu.tune import PREPARATIONS, Sizes, Tell, contestant, multiprocessors, told
from splatc.bench.timing import interleave
from splatc.codegen.costs import Costs, costs_of
from splatc.codegen.hopper.shape import MAX_VIEWS, shape_of
from splatc.codegen.kernel import HOPPER_TILES, KernelSpec, kernel_spec, tile_shapes
from splatc.codegen.target import Target
from splatc.patterns.base import Pattern
from splatc.runtime.attention import Plan
from splatc.runtime.work import finish, work_of

DTYPES = ("bfloat16", "float32")  # bfloat16 stands for float16: the same products, bytes and registers
HEAD_DIMS = (64, 128, 256)
HOPPER = Target("cuda", "sm_90a")
LENGTH = 6144  # a multiple of all tiles and blocks
BLOCKS = (384, 768, 1536)  # multiples of all tiles
RING = 1024  # keys of a query, half of them before it
HOLES = 96  # every so many diagonals one is missing, so that every tile has bits
LONG_ROW = 512  # column tiles of the row that is put together from parts
SECONDS = 10.0  # of timing a head_dim of a dtype, unless 3 rounds take longer

Timed = tuple["Case", Plan, float]  # microseconds
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Kernel:
    """What tells measured kernels apart; dtype: one of DTYPES."""

    dtype: str
    head_dim: int
    tile_m: int
    tile_n: int

    @staticmethod
    def of(spec: KernelSpec) -> Kernel:
        """The kernel of a spec."""
        return Kernel(spec.dtype, spec.head_dim, spec.tile_m, spec.tile_n)

    @property
    def spec(self) -> KernelSpec:
        """The kernel with no features."""
        return kernel_spec(self.head_dim, None, self.dtype, HOPPER, tile=self.tile)

    @property
    def tile(self) -> tuple[int, int]:
        """(query rows, key columns)."""
        return self.tile_m, self.tile_n

    def __str__(self) -> str:
        """Such as "bfloat16, D=64, 192 x 128"."""
        return f"{self.dtype}, D={self.head_dim}, {self.tile_m} x {self.tile_n}"


@dataclass(frozen=True)
class Case:
    """A mask to time with a kernel. role: "fit"; "check": compared only; "combine": a row in parts."""

    name: str
    kernel: Kernel
    pattern: Pattern
    sizes: Sizes
    role: str = "fit"


@dataclass(frozen=True)
class Observed:
    """A call of equal row tiles. tiles: all column tiles; bits: those with mask bits; workers: multiprocessors busy."""

    name: str
    kernel: Kernel
    launches: int
    rows: int
    tiles: int
    bits: int
    workers: int
    microseconds: float


@dataclass(frozen=True)
class Fit:
    """Microseconds. launch: of the device; kernels: (tile, bits, item) of one multiprocessor (see codegen/costs.py)."""

    launch: float
    kernels: Mapping[Kernel, tuple[float, float, float]]

    def predict(self, one: Observed) -> float:
        """Microseconds of an observed call."""
        tile, bits, item = self.kernels[one.kernel]
        return self.launch * one.launches + (tile * one.tiles + bits * one.bits + item * one.rows) / one.workers

    def costs(self, kernel: Kernel, combine: float, workers: int) -> Costs:
        """The constants of a kernel as the cost model takes them."""
        tile, bits, item = self.kernels[kernel]
        costs = Costs(tile, bits, item, self.launch, combine, math.inf, workers, "this run")
        return costs.shared(shape_of(kernel.spec).blocks)


@dataclass(frozen=True)
class Residual:
    """A measured call and what the fitted constants say of it."""

    kernel: Kernel
    name: str
    fitted: bool
    measured_us: float
    predicted_us: float

    @property
    def gap(self) -> float:
        """Prediction over measurement, less one."""
        return self.predicted_us / self.measured_us - 1


@dataclass(frozen=True)
class Calibration:
    """costs: the content of costs.json. residuals: of every case."""

    costs: dict[str, Any]
    residuals: list[Residual]


# -- what to measure ---------------------------------------------------------------------------------------------------


def kernels() -> list[KernelSpec]:
    """One spec of each kernel that the cost model has to tell apart."""
    default = [kernel_spec(d, None, dtype, HOPPER) for dtype in DTYPES for d in HEAD_DIMS]
    return [replace(spec, tile_m=m, tile_n=n) for spec in default for m, n in tile_shapes(spec)]


def cases(spec: KernelSpec, workers: int) -> list[Case]:
    """What to time with a kernel on a GPU of so many multiprocessors."""
    kernel, heads = Kernel.of(spec), whole_waves(workers)

    def case(name: str, pattern: Pattern, q_len: int = LENGTH, kv_len: int = LENGTH, heads: int = heads,
             role: str = "fit") -> Case:  # fmt: skip
        sizes = Sizes(q_len, kv_len, spec.head_dim, spec.head_dim, heads=heads, kv_heads=heads, dtype=spec.dtype)
        return Case(name, kernel, pattern, sizes, role)

    holes = ~P.strided(HOLES)
    alone = [case("one tile", P.full(), spec.tile_m, spec.tile_n, 1)]  # as blocks that share a multiprocessor never are
    return [
        *(alone if shape_of(spec).blocks == 1 else []),
        *(case(f"blocks of {b}", P.blocked(b)) for b in BLOCKS),
        case("full", P.full()),
        *(case(f"blocks of {b}, bits", P.blocked(b) & holes) for b in BLOCKS[:2]),
        case(f"ring of {RING}", ring(LENGTH, RING)),
        case("causal", P.causal(), role="check"),
        case("window of 1024", P.window(512, 512), role="check"),
        case("a long row", P.full(), spec.tile_m, LONG_ROW * spec.tile_n, 1, "combine"),
    ]


def ring(length: int, width: int) -> Pattern:
    """A window whose ends meet: rows as equal as blocks', of which neighbours share keys."""
    half = width // 2
    wrapped = P.window(half - length, length + half - 1) | P.window(length + half, half - 1 - length)
    return P.window(half, half - 1) | wrapped


def whole_waves(workers: int) -> int:
    """The fewest heads for which row tiles of every height come in multiples of the multiprocessors."""
    rows = {LENGTH // m for m, _ in HOPPER_TILES}
    return math.lcm(*(workers // math.gcd(workers, n) for n in rows))


def steps(workers: int, rounds: int) -> int:
    """How often ``calibrate`` tells a step, at most."""
    return (PREPARATIONS + rounds) * sum(len(cases(spec, workers)) for spec in kernels())


# -- measuring ---------------------------------------------------------------------------------------------------------


def calibrate(command: Sequence[str], rounds: int, tell: Tell) -> Calibration:
    """The costs of all kernels on the GPU here. command: what asked for them."""
    import torch

    workers = multiprocessors("cuda")
    every = [case for spec in kernels() for case in cases(spec, workers)]
    timed: list[Timed] = []
    for shape in dict.fromkeys((case.kernel.dtype, case.kernel.head_dim) for case in every):
        timed += _time([case for case in every if (case.kernel.dtype, case.kernel.head_dim) == shape], rounds, tell)
        torch.cuda.empty_cache()
    bandwidth = ceilings("cuda")["copy_tb_s"] * 1e3
    return conclude(timed, workers, bandwidth, describe(command, "cuda"))


def _time(mine: Sequence[Case], rounds: int, tell: Tell) -> list[Timed]:
    """Cases timed in turn."""
    import torch

    clock = GraphClock()
    inputs: dict[Sizes, list[Any]] = {}
    plans, samplers = {}, {}
    with torch.no_grad():
        for case in mine:
            label, sizes = f"{case.kernel}: {case.name}", case.sizes
            tell(f"compile {label}")
            compiled = splatc.compile(case.pattern, seq_len=sizes.q_len, kv_len=sizes.kv_len, head_dim=sizes.head_dim,
                                      dtype=sizes.dtype, target="cuda", tile=case.kernel.tile)  # fmt: skip
            if sizes not in inputs:
                inputs[sizes] = sizes.input_sets("cuda")
            tell(f"prepare {label}")
            plans[label] = compiled.plan()
            samplers[label] = told(f"time {label}", clock.prepare(contestant(compiled), inputs[sizes]), tell)
        timings = interleave(samplers, rounds, SECONDS)
    return [(case, plan, timing.median * 1e6)
            for case, plan, timing in zip(mine, plans.values(), timings.values(), strict=True)]  # fmt: skip


# -- concluding --------------------------------------------------------------------------------------------------------


def conclude(timed: Sequence[Timed], workers: int, bandwidth: float,
             about: Mapping[str, Any]) -> Calibration:  # fmt: skip
    """The calibration of timed cases (microseconds each). bandwidth: GB/s; about: as machine.describe gives it."""
    observed = [observe(case, plan, us, workers) for case, plan, us in timed if case.role == "fit"]
    found = fit(observed)
    combine = [combine_cost(case, plan, us, found, workers) for case, plan, us in timed if case.role == "combine"]
    known = [us for us in combine if us is not None]
    combined = float(np.median(known)) if known else costs_of(kernels()[0]).combine
    residuals = [Residual(one.kernel, one.name, True, one.microseconds, found.predict(one)) for one in observed]
    residuals += [
        Residual(case.kernel, case.name, False, us,
                 case.sizes.predict(plan, found.costs(case.kernel, combined, workers)) * 1e6)
        for case, plan, us in timed if case.role != "fit"
    ]  # fmt: skip
    return Calibration(to_json(found, combined, workers, bandwidth, about), residuals)


def observe(case: Case, plan: Plan, microseconds: float, workers: int) -> Observed:
    """A timed case by the numbers of its tables."""
    passes, heads = plan.tables[0], case.sizes.heads
    rows = heads * sum(len(t.items) for t in passes)
    return Observed(case.name, case.kernel, len(passes), rows, heads * sum(t.tiles for t in passes),
                    heads * sum(t.bit_tiles for t in passes), min(workers, rows), microseconds)  # fmt: skip


def fit(observed: Sequence[Observed]) -> Fit:
    """The constants, none below 0, with the least squares of relative gaps.

    Raises ValueError if the observations do not determine them.
    """
    names = list(dict.fromkeys(one.kernel for one in observed))
    design = np.zeros((len(observed), 1 + 3 * len(names)))
    for row, one in zip(design, observed, strict=True):
        first = 1 + 3 * names.index(one.kernel)
        row[0] = one.launches
        row[first : first + 3] = np.array([one.tiles, one.bits, one.rows]) / one.workers
        row /= one.microseconds
    found = least_squares(design, np.ones(len(observed)))
    per_kernel = found[1:].reshape(-1, 3).tolist()
    return Fit(float(found[0]), {name: (t, b, i) for name, (t, b, i) in zip(names, per_kernel, strict=True)})


def least_squares(design: Floats, wanted: Floats) -> Floats:
    """x >= 0 of the least ||design @ x - wanted||; an x that no equation has is 0.

    What comes out negative is set to 0, the worst first: enough for a few constants that are positive but for noise.
    """
    free: NDArray[np.bool_] = np.asarray(design.any(0))
    while True:
        x = np.zeros(design.shape[1])
        x[free], _, rank, _ = np.linalg.lstsq(design[:, free], wanted, rcond=None)
        if rank < free.sum():
            raise ValueError(f"{len(wanted)} measurements of rank {rank} do not determine {free.sum()} constants")
        if (x >= 0).all():
            return x
        free[x.argmin()] = False


def combine_cost(case: Case, plan: Plan, microseconds: float, found: Fit, workers: int) -> float | None:
    """What putting rows together adds to a call, by a call that does; None if its rows stay whole."""
    costs = found.costs(case.kernel, 0.0, workers)
    end = combines = 0.0
    for launch in plan.launches(case.sizes.batch, case.sizes.heads, *MAX_VIEWS):
        earlier = costs_of(plan.spec, workers)
        work = work_of(launch, case.sizes.batch, earlier)  # cut as the call was
        pieces = costs.item + costs.tile * work.rows[:, 10] + costs.bits * work.rows[:, 11]
        end += costs.launch + float(finish(pieces, costs.workers).max()) + earlier.part * work.part_tiles
        combines += len(work.combine) > 0
    return max(microseconds - end, 0.0) / combines if combines else None


def to_json(found: Fit, combine: float, workers: int, bandwidth: float, about: Mapping[str, Any]) -> dict[str, Any]:
    """The content of costs.json. What lists of keys and parts add is not measured: constants that are there stay."""
    versions = about["versions"]
    return {
        "device": about["gpu"]["name"],
        "date": about["date"][:10],
        "versions": {name: versions[name] for name in ("splatc", "torch", "cuda", "driver") if name in versions},
        "multiprocessors": workers,
        "bandwidth_gb_s": round(bandwidth),
        "launch_us": round(found.launch, 2),
        "combine_us": round(combine, 2),
        "part_us": costs_of(kernels()[0]).part,
        "kernels": [
            {**asdict(kernel), "tile_us": round(tile, 4), "bits_us": round(bits, 4),
             "gather_us": round(costs_of(kernel.spec, workers).gather, 4), "item_us": round(item, 3)}
            for kernel, (tile, bits, item) in found.kernels.items()
        ],
    }  # fmt: skip
