"""One case at one shape: every contestant built, checked against float64, and timed in interleaved rounds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from splatc.bench.gpu import check
from splatc.bench.gpu.cases import Case, seventeen
from splatc.bench.gpu.clock import Clock, GraphClock, HostClock, Inputs, Timed
from splatc.bench.gpu.peers import BUILDERS, Builder, Contestant, NotApplicable, kind_of
from splatc.bench.gpu.shapes import Shape
from splatc.bench.timing import Timing, interleave

Record = dict[str, Any]  # JSON values of one measurement
WRONG = 0.05  # relative error from which a contestant computes something else


class DeviceLost(Exception):
    """An error after which the device answers no more in this process."""


@dataclass(frozen=True)
class Job:
    """A case to measure at a shape against peers (names of ``BUILDERS``)."""

    suite: str
    case: Case
    shape: Shape
    peers: tuple[str, ...] = ()
    repeats: int = 50  # runs compared bit by bit
    settle_s: float = 0.0  # how long each contestant runs before it is timed, for ratios between jobs


@dataclass
class Session:
    """What all measurements of a process share. dense_size: positions and heads of the dense rate of the run."""

    device: str = "cuda"
    rounds: int = 9
    job_seconds: float = 6.0  # for the rounds of one job
    dense_size: tuple[int, int] = (8192, 16)
    builders: Mapping[str, Builder] = field(default_factory=lambda: BUILDERS)
    clock: Clock = field(init=False)
    _dense: dict[Shape, tuple[str, Timed] | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.clock = HostClock() if kind_of(self.device) == "cpu" else GraphClock()

    def dense(self, shape: Shape) -> tuple[str, Timed, int] | None:
        """(contestant, timing, operations) of full attention by cuDNN, else flash: the dense rate of the run."""
        length, heads = self.dense_size
        shape = Shape(length, shape.head_dim, 1, heads, heads, shape.dtype)
        if shape not in self._dense:
            self._dense[shape] = self._prepare_dense(shape)
        found = self._dense[shape]
        return None if found is None else (*found, shape.flops(shape.seq_len**2))

    def _prepare_dense(self, shape: Shape) -> tuple[str, Timed] | None:
        full = seventeen(shape.seq_len)["full"]
        inputs = [shape.inputs(self.device) for _ in range(shape.sets)]
        for name in ("cudnn", "flash"):
            try:
                return name, self.clock.prepare(self.builders[name](full, shape, self.device), inputs)
            except Exception:
                self.check_alive()
        return None

    def synchronize(self) -> None:
        """Wait for the device."""
        if kind_of(self.device) != "cpu":
            import torch

            torch.cuda.synchronize()

    def check_alive(self) -> None:
        """Raise DeviceLost if the device has had an error from which this process cannot recover."""
        try:
            self.synchronize()
        except Exception as error:
            raise DeviceLost(reason(error)) from error


def reason(error: BaseException) -> str:
    """An exception in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def measure(job: Job, session: Session) -> Record:
    """The record of a job. What fails is said in the record, contestant by contestant; only DeviceLost is raised."""
    import torch

    with torch.no_grad():
        return record_of(job, session, _measure)


def record_of(job: Job, session: Session, fill: Callable[[Job, Session, Record], None]) -> Record:
    """The record that ``fill`` completes, or its failure."""
    import torch

    record: Record = {"suite": job.suite, "case": job.case.name, "formula": job.case.formula, **job.shape.to_dict()}
    try:
        fill(job, session, record)
    except DeviceLost:
        raise
    except Exception as error:
        session.check_alive()
        record["failed"] = reason(error)
    if kind_of(session.device) != "cpu":
        torch.cuda.empty_cache()
    return record


def _measure(job: Job, session: Session, record: Record) -> None:
    inputs = [job.shape.inputs(session.device) for _ in range(job.shape.sets)]
    sample = check.sample_rows(job.case.pattern, job.shape.seq_len, job.shape.heads)
    contestants: dict[str, Record] = {}
    ready: dict[str, Timed] = {}
    for name in ("splatc", *job.peers):
        try:
            contestant, values = _enter(name, job, session, inputs, sample)
            contestants[name] = values
            if contestant.compiled is not None:
                record.update(about(contestant.compiled, job.shape))
                record["memory"] = memory(contestant, inputs, session.device)
            ready[name] = session.clock.prepare(contestant, inputs, job.settle_s)
        except NotApplicable:
            continue
        except Exception as error:
            session.check_alive()
            contestants[name] = {**contestants.get(name, {}), "failed": reason(error)}
    record["contestants"] = contestants
    record["least_bytes"] = job.shape.least_bytes
    _time(job, session, record, ready)


def _enter(name: str, job: Job, session: Session, inputs: Inputs, sample: check.Sample) -> tuple[Contestant, Record]:
    """A contestant that has run once on the first inputs, with its errors."""
    began = time.perf_counter()
    contestant = session.builders[name](job.case, job.shape, session.device)
    q, k, v = inputs[0]
    values: Record = {}
    with contestant.context():
        if contestant.compiled is not None:
            check.poison(q, session.device)
            gqa = job.shape.heads != job.shape.kv_heads

            def call() -> tuple[Any, Any]:
                o, lse = contestant.compiled(q, k, v, return_lse=True, enable_gqa=gqa)
                return o, lse

            o, lse = call()
            values["setup_s"] = time.perf_counter() - began
            values["equal_runs"], values["runs"] = check.equal_runs(call, job.repeats), job.repeats
        else:
            o, lse = contestant.call(q, k, v), None
            values["setup_s"] = time.perf_counter() - began
        found = check.errors(o, lse, q, k, v, sample)
    values["error"], values["lse_error"] = found.o, found.lse if lse is not None else None
    values["exact"] = contestant.exact and (name == "splatc" or not job.case.pruned)
    if values["exact"] and name != "splatc" and not found.o < WRONG:
        raise ValueError(f"wrong result: relative error {found.o:.2g}")
    return contestant, values


def _time(job: Job, session: Session, record: Record, ready: Mapping[str, Timed]) -> None:
    dense = session.dense(job.shape)
    samplers = {name: timed.sample for name, timed in ready.items()}
    if dense is not None:
        samplers["dense reference"] = dense[1].sample
    timings = interleave(samplers, session.rounds, session.job_seconds)
    for name, timed in ready.items():
        values = record["contestants"][name]
        values |= timings[name].to_dict() | {"how": timed.how}
        if timed.eager_s is not None:
            values["eager_ms"] = timed.eager_s * 1e3
        if "nnz" in record:
            values["useful_tflops"] = tflops(job.shape.flops(record["nnz"]), timings[name])
    if dense is not None:
        name, _, flops = dense
        timing = timings["dense reference"]
        record["dense"] = {"contestant": name, "tflops": tflops(flops, timing), **timing.to_dict()}


def tflops(flops: int, timing: Timing) -> float:
    """10**12 operations a second."""
    return flops / timing.median / 1e12


def predicted_us(compiled: Any, batch: int, heads: int) -> float:
    """What the cost model says of one call, in microseconds."""
    return float(compiled.predict(batch, heads)) * 1e6


def about(compiled: Any, shape: Shape) -> Record:
    """What the compiler says about a compiled mask."""
    e = compiled.explain()
    spec = getattr(getattr(compiled, "kernel", None), "spec", None)
    return {
        "pattern": e.pattern if len(e.pattern) < 300 else e.pattern[:297] + "...",
        "nnz": e.nnz, "density": e.density, "pieces": e.pieces, "passes": e.passes, "views": list(e.views),
        "tiles": e.tiles, "bit_tiles": e.bit_tiles, "waste": e.waste, "table_bytes": e.table_bytes,
        "tile_m": getattr(spec, "tile_m", None), "tile_n": getattr(spec, "tile_n", None),
        "kernel": getattr(spec, "kernel", None) or getattr(spec, "name", None),
        "predicted_us": predicted_us(compiled, shape.batch, shape.heads),
    }  # fmt: skip


def memory(contestant: Contestant, inputs: Inputs, device: str) -> Record:
    """Bytes of a call: inputs, and the peak beyond inputs and outputs (None on a CPU)."""
    q, k, v = inputs[0]
    return {
        "input_bytes": sum(x.numel() * x.element_size() for x in (q, k, v)),
        "extra_bytes": check.peak_bytes(lambda: contestant.call(q, k, v), device),
    }
