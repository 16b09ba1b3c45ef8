"""What commands print: tables and text to stdout, progress to stderr, numbers as people read them."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

PIPED_WIDTH = 140  # columns when stdout is no terminal and COLUMNS says nothing


def console(stderr: bool = False) -> Console:
    """A console on the present stdout (or stderr). Text is printed as it is: no markup, no highlighting."""
    stream = sys.stderr if stderr else sys.stdout
    piped = not stream.isatty() and not os.environ.get("COLUMNS", "").isdigit()
    return Console(file=stream, width=PIPED_WIDTH if piped else None, markup=False, highlight=False, emoji=False)


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str | None = None, left: int = 1) -> Table:
    """A table whose first ``left`` columns are aligned left and the others right. Cells: text, rich Text, or str()."""
    out = Table(box=SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False)
    for i, name in enumerate(columns):
        out.add_column(name, justify="left" if i < left else "right", overflow="fold", no_wrap=i >= left)
    for row in rows:
        out.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    return out


def fields(pairs: Iterable[tuple[str, Any]]) -> Table:
    """Names and values, one pair a line."""
    out = Table.grid(padding=(0, 2))
    out.add_column(style="bold", no_wrap=True)
    out.add_column(overflow="fold")
    for name, value in pairs:
        out.add_row(Text(name), value if isinstance(value, Text) else Text(str(value)))
    return out


def progress() -> Progress:
    """Progress bars on stderr that vanish when done; nothing at all where stderr is no terminal."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )


def note(text: str) -> None:
    """A line for people on stderr."""
    console(stderr=True).print(text, soft_wrap=True)


def print_json(value: Any) -> None:
    """One JSON value on stdout and nothing else."""
    print(json.dumps(value, indent=2))


def write_or_print(text: str, path: Path | None) -> None:
    """Text into a file, saying so on stderr; to stdout for None or "-"."""
    if path is None or str(path) == "-":
        sys.stdout.write(text if text.endswith("\n") else text + "\n")
        return
    path.write_text(text, encoding="utf-8")
    note(f"wrote {path} ({size(path.stat().st_size)})")


def size(count: int) -> str:
    """Bytes as 812 B, 4.1 KiB, 2.0 GiB."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):  # noqa: B007 (used after the loop)
        if value < 1024:
            break
        value /= 1024
    else:
        unit = "TiB"
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"


def plural(count: int, thing: str) -> str:
    """1 kernel, 2,000 kernels."""
    return f"{count:,} {thing}" + ("" if count == 1 else "s")


def seconds(value: float) -> str:
    """A duration as 12 us, 3.40 ms, 1.20 s."""
    for factor, unit in ((1e6, "us"), (1e3, "ms")):
        if value * factor < 1000:
            return f"{value * factor:.3g} {unit}"
    return f"{value:.2f} s"


def ago(moment: float) -> str:
    """A time (seconds since the epoch) as "5 min ago"."""
    passed = max(time.time() - moment, 0)
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if passed >= length:
            return f"{int(passed // length)} {unit} ago"
    return "just now"


def percent(share: float) -> str:
    """A share as 12.1%, with enough digits for small ones."""
    return f"{share:.1%}" if share >= 0.01 or share == 0 else f"{share:.2g}" if share < 1e-4 else f"{share:.2%}"
