"""Gradients, timed and checked: the backward pass of every contestant, and forward and backward together.

A backward pass is ``torch.autograd.grad(o, (q, k, v), do, retain_graph=True)`` of an o that was computed before; the
forward pass that is timed with one keeps no graph. Both are captured in CUDA graphs as the forward suites are, on one
stream with the forward passes that they belong to; what cannot be captured is timed as a burst of calls, and says so.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from splatc.bench.gpu import check, gradients, passes
from splatc.bench.gpu.backward_tables import HOST
from splatc.bench.gpu.cases import seventeen
from splatc.bench.gpu.clock import GraphClock, HostClock, Inputs, Timed
from splatc.bench.gpu.host import BATCH, CALL_PEERS, CALLS, host_times
from splatc.bench.gpu.measure import WRONG, Job, Record, Session, about, reason, record_of, tflops
from splatc.bench.gpu.peers import Contestant, NotApplicable, boolean_matrix, kind_of
from splatc.bench.gpu.shapes import Shape
from splatc.bench.gpu.suites import Choice, jobs
from splatc.bench.timing import Timing, interleave

STEPS = 20  # steps between two synchronisations, where host times are measured
BOTH = ", forward and backward"


@dataclass(frozen=True)
class Prepared:
    """A contestant made ready: its backward pass, and both passes."""

    backward: Timed
    both: Timed


def count(choice: Choice) -> int:
    """Records that ``run`` yields."""
    return len(jobs("backward", choice)) + 1


def run(choice: Choice, session: Session) -> Iterator[Record]:
    """One record a job, then the host times of calls with gradients."""
    measured = Backward(session)
    for job in jobs("backward", choice):
        yield measured.measure(job)
    shape = Shape(choice.length, max(choice.head_dims), 1, choice.heads, choice.heads, choice.dtype)
    with retaining():  # as what the jobs compiled, which caches would give back
        last = host_record(shape, session, 2 * BATCH if choice.quick else CALLS)
    yield last


class Backward:
    """Measures jobs of the suite: one stream and one dense rate for all of them."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.clock: Any = HostClock() if kind_of(session.device) == "cpu" else GraphClock(_stream())
        self._dense: dict[Shape, tuple[str, Timed] | None] = {}

    def measure(self, job: Job) -> Record:
        """The record of a job: what fails is said there; only DeviceLost is raised."""
        with self._running(), retaining():
            return record_of(job, self.session, self._fill)

    def _running(self) -> AbstractContextManager[Any]:
        return self.clock.running() if isinstance(self.clock, GraphClock) else nullcontext()

    def _fill(self, job: Job, session: Session, record: Record) -> None:
        inputs = [learning_inputs(job.shape, session.device) for _ in range(job.shape.sets)]
        mask = boolean_matrix(job.case, job.shape.seq_len, session.device)
        wanted = gradients.reference(*inputs[0], mask, sorted({0, job.shape.kv_heads - 1}))
        contestants: dict[str, Record] = {}
        ready: dict[str, Prepared] = {}
        for name in ("splatc", *job.peers):
            try:
                contestant = self._enter(name, job, inputs, wanted, record, contestants)
                ready[name] = self._prepare(contestant, inputs)
            except NotApplicable:
                continue
            except Exception as error:
                session.check_alive()
                contestants[name] = {**contestants.get(name, {}), "failed": reason(error)}
        record["contestants"] = contestants
        self._time(job, record, ready)

    def _enter(self, name: str, job: Job, inputs: Inputs, wanted: list[gradients.Wanted], record: Record,
               contestants: dict[str, Record]) -> Contestant:  # fmt: skip
        """A contestant that has run once on the first inputs; its errors and its plan go into the records."""
        device, began = self.session.device, time.perf_counter()
        contestant = self.session.builders[name](job.case, job.shape, device)
        q, k, v, do = inputs[0]

        def call() -> tuple[Any, ...]:
            return both_passes(contestant, q, k, v, do)

        values: Record = {}
        contestants[name] = values
        if contestant.compiled is not None:
            record.update(about(contestant.compiled, job.shape))
            check.poison(q.detach(), device)
        got = call()
        values["setup_s"] = time.perf_counter() - began
        values["errors"] = gradients.errors(got, wanted)
        values["error"] = _largest(values["errors"].values())
        values["exact"] = contestant.exact
        if contestant.compiled is not None:
            values["equal_runs"], values["runs"] = check.equal_runs(call, job.repeats), job.repeats
            record.update(self._look_at(contestant, inputs[0]))
        elif contestant.exact and not values["error"] < WRONG:
            raise ValueError(f"wrong result: relative error {values['error']:.2g}")
        return contestant

    def _look_at(self, contestant: Contestant, given: tuple[Any, ...]) -> Record:
        """Memory and kernels of a backward pass of ours."""
        q, k, v, do = given
        o = forward(contestant, q, k, v)

        def call() -> tuple[Any, ...]:
            return backward_pass(q, k, v, do, o)

        out: Record = {"memory": {"extra_bytes": check.peak_bytes(call, self.session.device)}}
        try:
            out["kernels_us"] = passes.kernels(call, self.session.device)
        except Exception as error:  # the profiler is not there on every machine
            self.session.check_alive()
            out["kernels_failed"] = reason(error)
        out["fixed_share"] = passes.fixed_share(out.get("kernels_us"))
        return out

    def _prepare(self, contestant: Contestant, inputs: Inputs) -> Prepared:
        kept = [(*given, forward(contestant, *given[:3])) for given in inputs]
        return Prepared(
            self.clock.prepare(Contestant(backward_pass, contestant.context), kept),
            self.clock.prepare(Contestant(lambda *given: both_passes(contestant, *given)), inputs),
        )

    def _time(self, job: Job, record: Record, ready: dict[str, Prepared]) -> None:
        dense = self.dense(job.shape)
        samplers = {name: one.backward.sample for name, one in ready.items()}
        samplers |= {name + BOTH: one.both.sample for name, one in ready.items()}
        if dense is not None:
            samplers["dense reference"] = dense[1].sample
        timings = interleave(samplers, self.session.rounds, self.session.job_seconds)
        for name, one in ready.items():
            values = record["contestants"][name]
            values |= timings[name].to_dict() | {"how": one.backward.how}
            values["both"] = timings[name + BOTH].to_dict() | {"how": one.both.how}
            if "nnz" in record:
                values["useful_tflops"] = tflops(job.shape.backward_flops(record["nnz"]), timings[name])
        if dense is not None:
            name, _, flops = dense
            record["dense"] = _dense_values(name, flops, timings["dense reference"])

    def dense(self, shape: Shape) -> tuple[str, Timed, int] | None:
        """(contestant, timing, operations) of the backward pass of full attention by cuDNN, else flash."""
        length, heads = self.session.dense_size
        shape = Shape(length, shape.head_dim, 1, heads, heads, shape.dtype)
        if shape not in self._dense:
            self._dense[shape] = self._prepare_dense(shape)
        found = self._dense[shape]
        return None if found is None else (*found, shape.backward_flops(shape.seq_len**2))

    def _prepare_dense(self, shape: Shape) -> tuple[str, Timed] | None:
        full = seventeen(shape.seq_len)["full"]
        inputs = [learning_inputs(shape, self.session.device) for _ in range(shape.sets)]
        for name in ("cudnn", "flash"):
            try:
                contestant = self.session.builders[name](full, shape, self.session.device)
                return name, self._prepare(contestant, inputs).backward
            except Exception:
                self.session.check_alive()
        return None


def retaining() -> AbstractContextManager[Any]:
    """In it, what torch.compile compiles keeps what a second backward pass over the same graph reads."""
    import torch._functorch.config as config

    patched: AbstractContextManager[Any] = (
        config.patch(donated_buffer=False) if hasattr(config, "donated_buffer") else nullcontext()
    )
    return patched


def learning_inputs(shape: Shape, device: str) -> tuple[Any, Any, Any, Any]:
    """Fresh normal q, k and v that require gradients, and a gradient of o."""
    q, k, v = (x.requires_grad_() for x in shape.inputs(device))
    return q, k, v, shape.inputs(device)[0]


def forward(contestant: Contestant, q: Any, k: Any, v: Any) -> Any:
    """o, with its graph."""
    with contestant.context():
        return contestant.call(q, k, v)


def backward_pass(q: Any, k: Any, v: Any, do: Any, o: Any) -> tuple[Any, ...]:
    """(dq, dk, dv), from an o that has its graph still."""
    import torch

    return torch.autograd.grad(o, (q, k, v), do, retain_graph=True)


def both_passes(contestant: Contestant, q: Any, k: Any, v: Any, do: Any) -> tuple[Any, ...]:
    """(dq, dk, dv), o computed and forgotten."""
    import torch

    return torch.autograd.grad(forward(contestant, q, k, v), (q, k, v), do)


def host_record(shape: Shape, session: Session, calls: int) -> Record:
    """Microseconds of host time, until the call returns: forward with gradients, and forward with backward.

    Of ours also without gradients and, traced by torch.compile, with them. Masks as in ``host.eager_calls``.
    """
    contestants: Record = {}
    for name in CALL_PEERS:
        case = seventeen(shape.seq_len)["causal" if name in ("cudnn", "flash") else "causal_win256"]
        try:
            contestant = session.builders[name](case, shape, session.device)
            times = _host_times(contestant, shape, session, calls)
            contestants[name] = {"case": case.name, "times": times}
        except NotApplicable:
            continue
        except Exception as error:
            session.check_alive()
            contestants[name] = {"failed": reason(error)}
    return {"suite": HOST, "case": "calls with gradients", **shape.to_dict(), "contestants": contestants}


def _host_times(contestant: Contestant, shape: Shape, session: Session, calls: int) -> Record:
    import torch

    q, k, v, do = learning_inputs(shape, session.device)
    traced = torch.compile(contestant.call, fullgraph=True) if contestant.compiled is not None else None

    def without_gradients() -> Any:
        with torch.no_grad():
            return contestant.call(q, k, v)

    timed: dict[str, Callable[[], Any]] = {
        "forward": lambda: contestant.call(q, k, v),
        "forward and backward": lambda: torch.autograd.grad(contestant.call(q, k, v), (q, k, v), do),
    }
    if traced is not None:
        timed |= {"forward, no gradients": without_gradients, "forward, torch.compile": lambda: traced(q, k, v)}
    out: Record = {}
    with contestant.context():
        for what, call in timed.items():
            try:
                samples = host_times(call, calls, session, STEPS)
            except Exception as error:
                session.check_alive()
                out[what] = {"failed": reason(error)}
                continue
            tenths = statistics.quantiles(samples, n=10)
            out[what] = {"median_us": statistics.median(samples) * 1e6, "p10_us": tenths[0] * 1e6,
                         "p90_us": tenths[-1] * 1e6}  # fmt: skip
    return out


def _dense_values(name: str, flops: int, timing: Timing) -> Record:
    return {"contestant": name, "tflops": tflops(flops, timing), **timing.to_dict()}


def _largest(values: Any) -> float:
    """The largest, and NaN once one is."""
    numbers = list(values)
    return math.nan if any(map(math.isnan, numbers)) else max(numbers)


def _stream() -> Any:
    import torch

    return torch.cuda.Stream()  # type: ignore[no-untyped-call]
