"""What the examples that time whole models share: a clock, and a table."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def milliseconds(call: Callable[[], Any], device: torch.device, repeats: int, warm: int = 2) -> float:
    """The median time of one call of several, each waited for."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    times = []
    for i in range(warm + repeats):
        wait()
        began = time.perf_counter()
        call()
        wait()
        if i >= warm:
            times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times)


def attempt(call: Callable[[], float]) -> float | str:
    """What call() gives, or what went wrong: a peer that cannot do something is part of the table."""
    try:
        return call()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:90]


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """||ours - theirs|| / ||theirs||, in float32."""
    ours, theirs = ours.float(), theirs.float()
    return float(torch.linalg.norm(ours - theirs) / torch.linalg.norm(theirs))


def report(name: str, rows: list[dict[str, Any]]) -> None:
    """Print rows as a table; write them to $OUT_DIR/name.json if there is an OUT_DIR."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns] + [[_cell(row.get(key, "")) for key in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))
    if folder := os.environ.get("OUT_DIR"):
        (Path(folder) / f"{name}.json").write_text(json.dumps(rows, indent=1))


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
