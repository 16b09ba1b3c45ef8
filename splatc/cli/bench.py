"""``splatc bench``: the benchmarks, with the stated targets judged."""

from __future__ import annotations

import json as json_module
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from splatc.bench import analysis, attention, cases, report
from splatc.cli.output import console, note, progress, table

EXAMPLES = """\b
Examples:
  splatc bench                                  (attention against torch, warm start)
  splatc bench --analysis --json analysis.json  (the compiler: a million rows, big matrices, tile waste)
  splatc bench --all --markdown results.md
  splatc bench --quick                          (small sizes, for which few targets are stated)"""

# of one section: its table, the rows to come, how many there will be
Task = tuple[report.Section, Iterator[report.Row], int]


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(epilog=EXAMPLES)(bench)


def bench(
    compiler: Annotated[bool, typer.Option("--analysis", help="Measure the compiler instead.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="Both.")] = False,
    json: Annotated[
        Path | None, typer.Option("--json", show_default=False, help="Write the figures to a file.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", show_default=False, help="Write tables to a file.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, few rounds.")] = False,
) -> None:
    """Time attention on this CPU against torch. Exit code 1 if a stated target is missed."""
    tasks = [] if compiler and not everything else _attention(quick)
    tasks += _compiler(quick) if compiler or everything else []
    about = report.environment(["splatc", *sys.argv[1:]])
    done: list[report.Section] = []
    for section, rows, total in tasks:
        with progress() as bar:
            task = bar.add_task(section.title, total=total)
            for row in rows:
                section.rows.append(row)
                bar.advance(task)
        console().print(table(section.columns, [row.cells for row in section.rows], section.title))
        if section.note:
            console().print(section.note, soft_wrap=True)
        done.append(section)
    if json is not None:
        json.write_text(json_module.dumps(report.to_json(done, about), indent=2) + "\n")
        note(f"wrote {json}")
    if markdown is not None:
        markdown.write_text(report.to_markdown(done, about))
        note(f"wrote {markdown}")
    missed = report.missed(done)
    for line in missed:
        note(f"target missed: {line}")
    if missed:
        raise typer.Exit(1)


def _attention(quick: bool) -> list[Task]:
    setting = attention.Setting(seq_len=1024, heads=2, rounds=3) if quick else attention.Setting()
    sizes = f"S={setting.seq_len}, {setting.heads} heads, D={setting.head_dim}, float32, batch 1"
    how = (
        f"Medians of interleaved rounds. Errors are relative, against float64 on {attention.SAMPLED_ROWS} random rows "
        "of each head. Predicted: by the cost model, not fitted to this run."
    )
    return [
        (
            report.Section(f"CPU attention: {sizes}", attention.COLUMNS, how),
            attention.run(setting),
            attention.count(setting),
        ),
        (
            report.Section(
                "Warm start: a new process, cached kernel",
                analysis.START_COLUMNS,
                "From after `import torch, tvm` to the first result.",
            ),
            analysis.warm_start(),
            1,
        ),
    ]


def _compiler(quick: bool) -> list[Task]:
    million, matrix, length = (1 << 16, 2048, 2048) if quick else (analysis.MILLION, analysis.MATRIX, analysis.WASTE)
    return [
        (
            report.Section(
                f"Analysis and tables at S={million:,}",
                analysis.PLAN_COLUMNS,
                "Each in a fresh process; memory is the peak above that after all imports.",
            ),
            analysis.plans(million),
            len(cases.million_cases(4096)),
        ),
        (
            report.Section(
                f"Analysis of a {matrix:,} x {matrix:,} boolean matrix", analysis.MATRIX_COLUMNS, "Medians of 3."
            ),
            analysis.matrices(matrix),
            4,
        ),
        (
            report.Section(
                f"Tile waste at S={length:,}", analysis.WASTE_COLUMNS, "Waste: tile area / elements that attend."
            ),
            analysis.waste(length),
            len(cases.library_cases(length)),
        ),
    ]
