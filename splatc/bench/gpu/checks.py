"""Every mask at odd lengths, several head dims and both 16-bit dtypes against float64. Nothing is timed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from splatc.bench.gpu import check
from splatc.bench.gpu.cases import Case
from splatc.bench.gpu.measure import Record, Session, reason
from splatc.bench.gpu.shapes import Shape
from splatc.bench.gpu.suites import CHECK_DIMS, CHECK_DTYPES, ODD_LENGTHS, Choice, checked_cases

HEADS = 3


@dataclass
class Worst:
    """The worst over all lengths of one mask, dtype and head dim. differing_runs: runs that are not bitwise the first;
    failed: what raised an exception, with its length."""

    dtype: str
    head_dim: int
    error: float = 0.0
    lse_error: float = 0.0
    differing_runs: int = 0
    failed: list[str] = field(default_factory=list)


def count(choice: Choice) -> int:
    """Records that ``run`` yields."""
    return len(checked_cases(8, choice.quick))


def run(choice: Choice, session: Session) -> Iterator[Record]:
    """One record a mask."""
    lengths = (17, 127) if choice.quick else ODD_LENGTHS
    each = [checked_cases(length, choice.quick) for length in lengths]
    dims = choice.head_dims if choice.quick else CHECK_DIMS
    for cases in zip(*each, strict=True):  # one mask at every length
        results = [Worst(dtype, dim) for dtype in CHECK_DTYPES for dim in dims]
        for length, case in zip(lengths, cases, strict=True):
            sample = check.sample_rows(case.pattern, length, HEADS)
            for worst in results:
                _check(case, length, sample, worst, choice.repeats, session)
        name = cases[0].name
        yield {"suite": "checks", "case": name, "lengths": list(lengths), "heads": HEADS, "runs": choice.repeats,
               "results": [asdict(worst) for worst in results]}  # fmt: skip


def _check(case: Case, length: int, sample: check.Sample, worst: Worst, runs: int, session: Session) -> None:
    """Run one case and fold what is found into ``worst``."""
    import torch

    shape = Shape(length, worst.head_dim, 1, HEADS, HEADS, worst.dtype)
    try:
        compiled = session.builders["splatc"](case, shape, session.device).compiled
        q, k, v = shape.inputs(session.device)
        with torch.no_grad():
            check.poison(q, session.device)
            o, lse = compiled(q, k, v, return_lse=True)
            found = check.errors(o, lse, q, k, v, sample)
            same = check.equal_runs(lambda: compiled(q, k, v, return_lse=True), runs)
    except Exception as error:
        session.check_alive()
        worst.failed.append(f"S={length}: {reason(error)}")
        return
    worst.error, worst.lse_error = _larger(worst.error, found.o), _larger(worst.lse_error, found.lse)
    worst.differing_runs += runs - same


def _larger(a: float, b: float) -> float:
    """The larger of two, and NaN once either is."""
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)
