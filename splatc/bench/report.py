"""Results as rows, tables, JSON and Markdown, with what they were measured on."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """One measurement: cells for people, values for machines, and the stated targets it misses."""

    cells: tuple[str, ...]
    values: dict[str, Any]
    missed: tuple[str, ...] = ()


@dataclass
class Section:
    """One table."""

    title: str
    columns: tuple[str, ...]
    note: str = ""
    rows: list[Row] = field(default_factory=list)


def environment(command: Sequence[str]) -> dict[str, Any]:
    """Versions, machine, date and command: what makes figures repeatable."""
    versions = {"python": platform.python_version()}
    for name in ("splatc", "numpy", "scipy", "torch", "apache-tvm"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(command),
        "versions": versions,
        "machine": {
            "cpu": _cpu(),
            "cores": len(os.sched_getaffinity(0)),
            "system": platform.platform(),
            "load": [round(x, 2) for x in os.getloadavg()],
        },
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def to_json(sections: Sequence[Section], about: dict[str, Any]) -> dict[str, Any]:
    """Everything as JSON values."""
    tables = [
        {
            "title": s.title,
            "note": s.note,
            "columns": s.columns,
            "rows": [{"cells": r.cells, "missed": r.missed, **r.values} for r in s.rows],
        }
        for s in sections
    ]
    return {**about, "missed": missed(sections), "tables": tables}


def from_json(values: dict[str, Any]) -> list[Section]:
    """The sections in what ``to_json`` made. Raises KeyError or TypeError for anything else."""
    return [
        Section(t["title"], tuple(t["columns"]), t["note"], [_row(r) for r in t["rows"]]) for t in values["tables"]
    ]


def _row(values: dict[str, Any]) -> Row:
    rest = {name: x for name, x in values.items() if name not in ("cells", "missed")}
    return Row(tuple(values["cells"]), rest, tuple(values["missed"]))


def to_markdown(sections: Sequence[Section], about: dict[str, Any]) -> str:
    """The tables in Markdown, after a paragraph on what they were measured on."""
    machine = about["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [
        f"`{about['command']}` on {about['date'][:10]}: {machine['cpu']}, {machine['cores']} cores; {versions}.",
        "",
    ]
    for section in sections:
        lines += [f"## {section.title}", ""] + ([section.note, ""] if section.note else [])
        lines += [*table_lines(section), ""]
    gone = missed(sections)
    lines += ["Targets missed:", "", *(f"- {line}" for line in gone)] if gone else ["All stated targets are met."]
    return "\n".join(lines) + "\n"


def table_lines(section: Section) -> list[str]:
    """The Markdown of one table, without its title."""
    lines = ["| " + " | ".join(section.columns) + " |"]
    lines.append("|" + "|".join(["---"] + ["---:"] * (len(section.columns) - 1)) + "|")
    return lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row.cells) + " |" for row in section.rows]


def missed(sections: Sequence[Section]) -> list[str]:
    """Every stated target that a row misses."""
    return [f"{section.title}: {line}" for section in sections for row in section.rows for line in row.missed]
