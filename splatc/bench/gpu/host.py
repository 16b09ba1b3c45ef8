"""What the CPU side of a GPU call costs: eager calls, new lengths, new processes with and without a cached kernel."""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from splatc.bench.child import measure_python
from splatc.bench.gpu.cases import seventeen
from splatc.bench.gpu.measure import Record, Session, reason
from splatc.bench.gpu.peers import Contestant, NotApplicable
from splatc.bench.gpu.shapes import Shape
from splatc.bench.gpu.suites import Choice

CALLS, BATCH = 2000, 100  # calls timed, and calls between two synchronisations: the queue of launches never fills up
NEW_LENGTHS = 8
COLD, WARM = 2, 3  # processes
CALL_PEERS = ("splatc", "cudnn", "flash", "flex")
STARTUPS = ("cold, NVRTC", "cold, nvcc", "warm")


def count(choice: Choice) -> int:
    """Records that ``run`` yields."""
    return 2 + len(STARTUPS)


def run(choice: Choice, session: Session) -> Iterator[Record]:
    """Eager calls, new lengths, then the start of new processes."""
    shape = Shape(choice.length, max(choice.head_dims), 1, choice.heads, choice.heads, choice.dtype)
    yield _guarded("eager call", session, eager_calls, shape, session, 2 * BATCH if choice.quick else CALLS)
    yield _guarded("new length", session, new_lengths, shape, session)
    with tempfile.TemporaryDirectory(prefix="splatc-bench-") as folder:
        for name in STARTUPS:
            times = 1 if choice.quick else WARM if name == "warm" else COLD
            yield _guarded(name, session, startups, name, shape, session.device, Path(folder), times)


def _guarded(name: str, session: Session, measure: Callable[..., Record], *arguments: Any) -> Record:
    """The record of a measurement, or of its failure."""
    record: Record = {"suite": "host", "case": name}
    try:
        return record | measure(*arguments)
    except Exception as error:
        session.check_alive()
        return record | {"failed": reason(error)}


def eager_calls(shape: Shape, session: Session, calls: int) -> Record:
    """Microseconds of host time of one call: nothing waits for the device and its queue is not full.

    Contestants without masks compute the causal mask, the others a causal window, whose calls are short.
    """
    import torch

    cases = seventeen(shape.seq_len)
    contestants: Record = {}
    with torch.no_grad():
        for name in CALL_PEERS:
            case = cases["causal" if name in ("cudnn", "flash") else "causal_win256"]
            try:
                contestant = session.builders[name](case, shape, session.device)
                contestants[name] = {"case": case.name, **_eager(contestant, shape, session, calls)}
            except NotApplicable:
                continue
            except Exception as error:
                session.check_alive()
                contestants[name] = {"failed": reason(error)}
    return {**shape.to_dict(), "contestants": contestants}


def _eager(contestant: Contestant, shape: Shape, session: Session, calls: int) -> Record:
    inputs = shape.inputs(session.device)
    with contestant.context():
        samples = host_times(lambda: contestant.call(*inputs), calls, session)
    tenths = statistics.quantiles(samples, n=10)
    return {"median_us": statistics.median(samples) * 1e6, "p10_us": tenths[0] * 1e6, "p90_us": tenths[-1] * 1e6,
            "calls": len(samples)}  # fmt: skip


def host_times(call: Callable[[], Any], calls: int, session: Session, batch: int | None = None) -> list[float]:
    """Seconds until each call returned, with a synchronisation after every ``batch`` (default BATCH) of them, outside
    the times."""
    samples: list[float] = []
    for _ in range(10):
        call()
    session.synchronize()
    collecting = gc.isenabled()
    gc.disable()
    try:
        while len(samples) < calls:
            for _ in range(batch or BATCH):
                began = time.perf_counter()
                call()
                samples.append(time.perf_counter() - began)
            session.synchronize()
    finally:
        if collecting:
            gc.enable()
    return samples


def new_lengths(shape: Shape, session: Session) -> Record:
    """A compiled window at lengths it has not seen: planning, then the first call and a later one, to their ends.

    plan_ms is host time; added_ms, what the first call takes more than later ones, is the cost of a planned length.
    """
    import torch

    case = seventeen(shape.seq_len)["win_pm256"]
    compiled = session.builders["splatc"](case, shape, session.device).compiled
    step = shape.seq_len // 256 + 1  # odd at the stated length, so that tiles are cut short
    with torch.no_grad():
        compiled(*shape.inputs(session.device))
        samples = [_new_length(compiled, replace(shape, seq_len=shape.seq_len - step * i), session)
                   for i in range(1, NEW_LENGTHS + 1)]  # fmt: skip
    plans, firsts, laters = ([sample[i] for sample in samples] for i in range(3))
    added = [first - later for first, later in zip(firsts, laters, strict=True)]
    return {
        **shape.to_dict(), "mask": case.name, "lengths": NEW_LENGTHS, "plan_ms": statistics.median(plans),
        "plan_max_ms": max(plans), "first_call_ms": statistics.median(firsts),
        "later_call_ms": statistics.median(laters), "added_ms": statistics.median(added), "added_max_ms": max(added),
    }  # fmt: skip


def _new_length(compiled: Any, shape: Shape, session: Session) -> tuple[float, float, float]:
    """Milliseconds of planning, of the first call and of a later call at one length."""

    def timed(function: Callable[..., Any], *arguments: Any) -> float:
        session.synchronize()
        began = time.perf_counter()
        function(*arguments)
        session.synchronize()
        return (time.perf_counter() - began) * 1e3

    inputs = shape.inputs(session.device)
    plan = timed(compiled.plan, shape.seq_len)
    spare = [x.clone() for x in inputs]  # the allocator's growth is not the first call's cost
    del spare
    first = timed(compiled, *inputs)
    return plan, first, statistics.median(timed(compiled, *inputs) for _ in range(5))


# argv: device, seq_len, heads, head_dim, dtype, 1 to import tvm before the clock starts
STARTUP = """
import json, sys, time
device, length, heads, dim, dtype, early = sys.argv[1:]
began = time.perf_counter()
import torch
shape = (1, int(heads), int(length), int(dim))
q, k, v = (torch.randn(shape, device=device, dtype=getattr(torch, dtype)) for _ in range(3))
wait = torch.cuda.synchronize if device != "cpu" else lambda: None
wait()
torch_s = time.perf_counter() - began
began = time.perf_counter()
if early == "1":
    import tvm
tvm_s = time.perf_counter() - began
marks = [time.perf_counter()]
import splatc
marks.append(time.perf_counter())
attend = splatc.compile("window(256, 256)", seq_len=int(length), head_dim=int(dim), dtype=dtype,
                        target=device.partition(":")[0])
marks.append(time.perf_counter())
attend(q, k, v)
wait()
marks.append(time.perf_counter())
attend(q, k, v)
wait()
marks.append(time.perf_counter())
steps = [b - a for a, b in zip(marks, marks[1:])]
report = json.loads(attend.kernel.file("report.json"))
print(json.dumps({
    "torch_s": torch_s, "tvm_s": tvm_s, "import_s": steps[0], "compile_s": steps[1], "first_call_s": steps[2],
    "second_call_s": steps[3], "seconds": marks[3] - marks[0], "tvm_loaded": "tvm" in sys.modules,
    "compiler": report.get("compiler"),
}))
"""


def startups(name: str, shape: Shape, device: str, folder: Path, times: int) -> Record:
    """New processes: seconds from after the import of torch (and, where a kernel is compiled, of tvm) and the first
    CUDA call to the end of the first call of a window. ``folder`` holds the caches: cold ones are new each time."""
    compiler = {"cold, NVRTC": "nvrtc", "cold, nvcc": "nvcc"}.get(name)
    runs = []
    for i in range(times):
        cache = folder / ("warm" if name == "warm" else f"{name}-{i}")
        if name == "warm" and i == 0:
            _start(shape, device, cache, compiler)  # it fills the cache
        runs.append(_start(shape, device, cache, compiler))
    middle = sorted(runs, key=lambda r: r["seconds"])[(len(runs) - 1) // 2]
    return {**shape.to_dict(), **middle, "all_seconds": [r["seconds"] for r in runs]}


def _start(shape: Shape, device: str, cache: Path, compiler: str | None) -> dict[str, Any]:
    sizes = map(str, (shape.seq_len, shape.heads, shape.head_dim))
    environment = {"SPLATC_CACHE_DIR": str(cache)} | ({"SPLATC_CUDA_COMPILER": compiler} if compiler else {})
    return measure_python("-c", STARTUP, device, *sizes, shape.dtype, str(int(compiler is not None)),
                          environment=environment)  # fmt: skip
