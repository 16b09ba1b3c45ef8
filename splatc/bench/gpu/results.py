"""The figures of one or more runs: records as they come, saved after each, merged with those of other runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from splatc.bench.gpu.measure import Record
from splatc.errors import InvalidInput

FORMAT = 1
_IDENTITY = ("suite", "case", "dtype", "batch", "heads", "kv_heads", "seq_len", "head_dim")


@dataclass
class Results:
    """runs: what each process ran on (``machine.describe``), its ceilings and what it left out; records: the
    measurements, each with the index of its run."""

    runs: list[dict[str, Any]] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)

    def add(self, record: Record) -> None:
        """A record of the latest run."""
        self.records.append({**record, "run": len(self.runs) - 1})

    def of(self, *suites: str) -> list[Record]:
        """The records of some suites that did not fail as a whole."""
        return [r for r in self.records if r["suite"] in suites and "failed" not in r]

    def run_of(self, record: Record) -> dict[str, Any]:
        """The run that a record belongs to."""
        return self.runs[record["run"]]

    def to_dict(self) -> dict[str, Any]:
        """JSON values: NaN and infinities, which JSON has not, as text."""
        values: dict[str, Any] = _without_nan({"format": FORMAT, "runs": self.runs, "records": self.records})
        return values


def from_dict(values: Any, where: str = "results") -> Results:
    """The results in JSON values. Raises InvalidInput, naming ``where``, if they are none of ours."""
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise InvalidInput(f"{where}: no GPU results of `splatc bench --json` (format {FORMAT})")
    return Results(_with_nan(values["runs"]), _with_nan(values["records"]))


def merge(parts: Sequence[Results]) -> Results:
    """All runs and records; of two records of the same thing the later one, in the place of the first."""
    runs: list[dict[str, Any]] = []
    records: dict[tuple[Any, ...], Record] = {}
    for part in parts:
        for record in part.records:
            records[tuple(record.get(name) for name in _IDENTITY)] = {**record, "run": record["run"] + len(runs)}
        runs += part.runs
    return Results(runs, list(records.values()))


_SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(x) for x in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _with_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_nan(x) for key, x in value.items()}
    if isinstance(value, list):
        return [_with_nan(x) for x in value]
    return _SPECIAL.get(value, value) if isinstance(value, str) else value
