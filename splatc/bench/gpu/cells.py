"""Cells of the tables: times, rates and errors as people read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from splatc.bench.gpu.measure import Record
from splatc.bench.gpu.peers import TITLES


def title(name: str) -> str:
    """The name of a contestant for people."""
    return TITLES.get(name, name)


def present(records: Sequence[Record], names: Sequence[str]) -> list[str]:
    """Those of the contestants that took part in any of the records."""
    return [name for name in names if any(name in r.get("contestants", {}) for r in records)]


def shared_sizes(records: Sequence[Record]) -> str:
    """', 16 heads, bfloat16' where all records agree."""
    found = dict.fromkeys(f", {r['heads']} heads, {r['dtype']}" for r in records)
    return next(iter(found)) if len(found) == 1 else ""


def values_of(record: Record, name: str) -> dict[str, Any]:
    """The values of a contestant; none where it took no part."""
    found: dict[str, Any] = record.get("contestants", {}).get(name, {})
    return found


def us(values: dict[str, Any]) -> str:
    """Microseconds as median (min-max), n/a where it failed, nothing where it took no part."""
    if not values:
        return ""
    if "failed" in values or "median_ms" not in values:
        return "n/a"
    return "{} ({}-{})".format(*(number(values[name] * 1e3) for name in ("median_ms", "min_ms", "max_ms")))


def number(value: float | None) -> str:
    """Three digits or so."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def times(value: float | None) -> str:
    """A ratio."""
    return f"{value:.2f}x" if value else ""


def mib(value: float | None) -> str:
    """Bytes in MiB."""
    return "" if value is None else f"{value / 2**20:.1f}"


def error_of_ours(record: Record) -> str:
    """The relative error of splatc."""
    error = values_of(record, "splatc").get("error")
    return "n/a" if error is None else f"{error:.1e}"
