"""Runs suites one after the other, within a time budget, keeping every record as soon as there is one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from splatc.bench.gpu import backward, checks, host, machine
from splatc.bench.gpu.measure import DeviceLost, Record, Session, measure, reason
from splatc.bench.gpu.results import Results
from splatc.bench.gpu.suites import Choice, jobs

Kept = Callable[[Results, Record], None]


def session_for(choice: Choice, device: str) -> Session:
    """The session of a choice."""
    if choice.quick:
        return Session(device, rounds=3, job_seconds=2.0, dense_size=(choice.length, choice.heads))
    return Session(device)


def count(suites: Sequence[str], choice: Choice) -> int:
    """How many records ``run`` makes."""
    return sum(_count(suite, choice) for suite in suites)


def run(
    suites: Sequence[str],
    choice: Choice,
    session: Session,
    command: Sequence[str],
    *,
    budget: float,
    keep: Kept,
) -> Results:
    """The results of suites (of ``SUITES``) after at most about ``budget`` seconds: no measurement begins later.

    keep(results, record) is called after each record. A run that the device's failure ends has its reason under
    "ended", and what was left out under "left_out".
    """
    began = time.monotonic()
    about = machine.describe(command, session.device)
    results = Results([about | {"ceilings": {}, "left_out": [], "ended": None}])
    try:
        results.runs[0]["ceilings"] = machine.ceilings(session.device)
    except Exception as error:
        results.runs[0]["ceilings"] = {"failed": reason(error)}
    for suite in suites:
        left = _count(suite, choice)
        records = _records(suite, choice, session)
        while left and results.runs[0]["ended"] is None and time.monotonic() - began < budget:
            try:
                record = next(records, None)
            except DeviceLost as error:
                results.runs[0]["ended"] = f"{suite}: the device failed: {error}"
                break
            if record is None:
                break
            results.add(record)
            left -= 1
            results.runs[0]["seconds"] = round(time.monotonic() - began, 1)
            keep(results, record)
        records.close()
        if left:
            results.runs[0]["left_out"].append(f"{suite}: {left} of {_count(suite, choice)}")
    results.runs[0]["seconds"] = round(time.monotonic() - began, 1)
    return results


def _records(suite: str, choice: Choice, session: Session) -> Any:
    """A generator of a suite's records."""
    if suite == "host":
        return host.run(choice, session)
    if suite == "checks":
        return checks.run(choice, session)
    if suite == "backward":
        return backward.run(choice, session)
    return _measured(suite, choice, session)


def _measured(suite: str, choice: Choice, session: Session) -> Iterator[Record]:
    yield from map(partial(measure, session=session), jobs(suite, choice))


def _count(suite: str, choice: Choice) -> int:
    counted = {"host": host.count, "checks": checks.count, "backward": backward.count}
    return counted.get(suite, lambda c: len(jobs(suite, c)))(choice)
