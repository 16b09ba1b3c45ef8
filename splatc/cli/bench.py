"""``splatc bench``: the benchmarks, with the stated targets judged."""

from __future__ import annotations

import json as json_module
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from splatc.bench import analysis, attention, cases, report
from splatc.bench.gpu import plot as gpu_plot
from splatc.bench.gpu import results as gpu_results
from splatc.bench.gpu import run as gpu_run
from splatc.bench.gpu import suites as gpu_suites
from splatc.bench.gpu import tables as gpu_tables
from splatc.bench.gpu import targets as gpu_targets
from splatc.bench.gpu import warm as gpu_warm
from splatc.bench.gpu.measure import Record
from splatc.bench.gpu.results import Results
from splatc.cli.output import console, note, progress, table
from splatc.codegen.kernel import DTYPES
from splatc.errors import InvalidInput

EXAMPLES = """\b
Examples:
  splatc bench                                   (with a GPU: all GPU suites; without: attention on the CPU)
  splatc bench --suite patterns --head-dim 128 --json d128.json
  splatc bench --suite dense,host --quick        (small sizes, for which few targets are stated)
  splatc bench --suite cpu,compiler --json cpu.json
  splatc bench --from d128.json --from d64.json --markdown docs/performance.md --plot docs/img/bench.png"""

CPU_SUITES = ("cpu", "compiler")
HELP = (
    f"Comma-separated: {', '.join(gpu_suites.SUITES)}, gpu (all of these), cpu (attention against torch, warm start), "
    "compiler (a million rows, big matrices, tile waste), all. Default: gpu with a GPU, else cpu."
)

# of one section: its table, the rows to come, how many there will be
Task = tuple[report.Section, Iterator[report.Row], int]


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(epilog=EXAMPLES)(bench)


@dataclass
class Report:
    """All that one command measured or read."""

    about: dict[str, Any]
    cpu: list[report.Section] = field(default_factory=list)
    gpu: Results = field(default_factory=Results)

    def to_json(self) -> str:
        """The text of a results file."""
        values = report.to_json(self.cpu, self.about)
        if self.gpu.runs:
            verdicts = gpu_targets.judge(self.gpu)
            values["gpu"] = self.gpu.to_dict() | {"targets": [v.to_dict() for v in verdicts]}
            values["missed"] += gpu_targets.missed(verdicts)
        return json_module.dumps(values, indent=1, allow_nan=False) + "\n"

    def missed(self) -> list[str]:
        """The stated targets that are missed."""
        return report.missed(self.cpu) + gpu_targets.missed(gpu_targets.judge(self.gpu))


def bench(
    suite: Annotated[str | None, typer.Option("--suite", "-s", show_default=False, help=HELP)] = None,
    results: Annotated[
        list[Path] | None,
        typer.Option("--from", show_default=False, help="Measure nothing: use the JSON of earlier runs (repeatable)."),
    ] = None,
    json: Annotated[
        Path | None, typer.Option("--json", show_default=False, help="Write the figures to a file as they come.")
    ] = None,
    markdown: Annotated[
        Path | None,
        typer.Option("--markdown", show_default=False, help="Write tables to a file, or to its marked parts."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", show_default=False, help="Draw the GPU figures: a .png, .svg or .pdf.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, few masks, few rounds.")] = False,
    dtype: Annotated[str, typer.Option("--dtype", help="Of the GPU suites.")] = "bfloat16",
    head_dim: Annotated[str, typer.Option("--head-dim", help="Of the GPU suites, comma-separated.")] = "64,128",
    budget: Annotated[
        float, typer.Option("--budget", help="Seconds after which no GPU measurement begins any more.")
    ] = 480.0,
    jobs: Annotated[
        int, typer.Option("--jobs", "-j", min=0, help="Processes that compile beforehand what the GPU suites time.")
    ] = min((os.cpu_count() or 1) // 2, 8),
) -> None:
    """Time masked attention against what one would use instead. Exit code 1 if a stated target is missed."""
    done = Report(report.environment(["splatc", *sys.argv[1:]]))
    if results:
        if suite is not None:
            raise InvalidInput("--from uses earlier figures and --suite measures new ones: give one of them")
        _read(results, done)
    else:
        chosen = choose_suites(suite)
        choice = (gpu_suites.Choice.small if quick else gpu_suites.Choice)(
            choose_dtype(dtype), choose_head_dims(head_dim)
        )
        for task in _cpu_tasks(chosen, quick):
            _measure(task, done)
        gpu = [name for name in gpu_suites.SUITES if name in chosen]
        if gpu:
            _measure_gpu(gpu, choice, budget, jobs, json, done)
    if done.gpu.runs:
        for section in gpu_tables.sections(done.gpu):
            _print(section)
    if json is not None:
        json.write_text(done.to_json())
        note(f"wrote {json}")
    if plot is not None:
        gpu_plot.save(done.gpu, plot)
        note(f"wrote {plot}")
    if markdown is not None:
        write_markdown(markdown, done, plot)
        note(f"wrote {markdown}")
    missed = done.missed()
    for line in missed:
        note(f"target missed: {line}")
    if missed:
        raise typer.Exit(1)


# -- options -----------------------------------------------------------------------------------------------------------


def choose_suites(text: str | None) -> set[str]:
    """The suites that --suite names. Raises InvalidInput for an unknown name, or for a GPU suite without a GPU."""
    if text is None:
        return set(gpu_suites.SUITES) if has_gpu() else {"cpu"}
    groups = {"gpu": gpu_suites.SUITES, "all": (*CPU_SUITES, *(gpu_suites.SUITES if has_gpu() else ()))}
    chosen: set[str] = set()
    for name in (word.strip() for word in text.split(",") if word.strip()):
        if name not in (*groups, *CPU_SUITES, *gpu_suites.SUITES):
            known = ", ".join((*gpu_suites.SUITES, *CPU_SUITES, *groups))
            raise InvalidInput(f"--suite: {name!r} is none of {known}")
        chosen |= set(groups.get(name, (name,)))
    if not chosen:
        raise InvalidInput("--suite names no suite")
    if chosen & set(gpu_suites.SUITES) and not has_gpu():
        raise InvalidInput("the GPU suites need a CUDA device and torch: `splatc doctor` says what is missing")
    return chosen


def choose_dtype(text: str) -> str:
    """A known dtype, or InvalidInput."""
    if text not in DTYPES:
        raise InvalidInput(f"--dtype is {text!r}: it must be one of {', '.join(DTYPES)}")
    return text


def choose_head_dims(text: str) -> tuple[int, ...]:
    """Head dims "64,128" as numbers, or InvalidInput."""
    try:
        dims = tuple(dict.fromkeys(int(word) for word in text.split(",")))
    except ValueError:
        dims = ()
    if not dims or not all(1 <= dim <= 256 for dim in dims):
        raise InvalidInput(f"--head-dim is {text!r}: write whole numbers from 1 to 256, such as 64,128")
    return dims


def has_gpu() -> bool:
    """Whether torch is installed and sees a CUDA device."""
    try:
        import torch
    except ImportError:
        return False
    return bool(torch.cuda.is_available())


# -- measuring ---------------------------------------------------------------------------------------------------------


def _measure(task: Task, done: Report) -> None:
    """Run one section of the CPU suites and print it."""
    section, rows, total = task
    with progress() as bar:
        shown = bar.add_task(section.title, total=total)
        for row in rows:
            section.rows.append(row)
            bar.advance(shown)
    _print(section)
    done.cpu.append(section)


def _measure_gpu(
    names: Sequence[str], choice: gpu_suites.Choice, budget: float, jobs: int, path: Path | None, done: Report
) -> None:
    """Run GPU suites; every record is a line on stderr and, with a path, in the file at once."""
    with progress() as bar:
        session = gpu_run.session_for(choice, "cuda")
        if jobs:
            compiling = bar.add_task("compiling", total=gpu_warm.count(names, choice))
            gpu_warm.fill(names, choice, session.device, jobs, lambda: bar.advance(compiling))
        shown = bar.add_task("GPU", total=gpu_run.count(names, choice))

        def keep(results: Results, record: Record) -> None:
            done.gpu = results
            bar.advance(shown)
            bar.console.print(gpu_tables.summary(record), soft_wrap=True)
            if path is not None:
                save_text(path, done.to_json())

        done.gpu = gpu_run.run(names, choice, session, ["splatc", *sys.argv[1:]], budget=budget, keep=keep)
    run = done.gpu.runs[0]
    for line in (*run["left_out"], *([run["ended"]] if run["ended"] else [])):
        note(f"not measured: {line}")


def _print(section: report.Section) -> None:
    console().print(table(section.columns, [row.cells for row in section.rows], section.title))
    if section.note:
        console().print(section.note, soft_wrap=True)


def _cpu_tasks(chosen: set[str], quick: bool) -> list[Task]:
    return (_attention(quick) if "cpu" in chosen else []) + (_compiler(quick) if "compiler" in chosen else [])


# -- files -------------------------------------------------------------------------------------------------------------


def _read(paths: Sequence[Path], done: Report) -> None:
    """The figures of earlier runs. The CPU part is that of the last file that has one."""
    parts = []
    for path in paths:
        try:
            values = json_module.loads(path.read_text())
            sections = report.from_json(values)
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidInput(f"{path}: no results of `splatc bench --json` ({error})") from None
        if sections:
            done.cpu, done.about = sections, {name: values[name] for name in done.about}
        if "gpu" in values:
            parts.append(gpu_results.from_dict(values["gpu"], str(path)))
    done.gpu = gpu_results.merge(parts)


def write_markdown(path: Path, done: Report, picture: Path | None) -> None:
    """Write the parts that were measured. A file that has marks for them keeps everything else:

    <!-- bench:gpu begin --> ... <!-- bench:gpu end -->, and the same with cpu.
    """
    shown = None if picture is None else os.path.relpath(picture, path.parent).replace(os.sep, "/")
    parts = {}
    if done.cpu:
        parts["cpu"] = report.to_markdown(done.cpu, done.about)
    if done.gpu.runs:
        parts["gpu"] = gpu_tables.markdown(done.gpu, shown)
    text = path.read_text() if path.exists() else ""
    if "<!-- bench:" not in text:
        save_text(path, "\n".join(parts.values()))
        return
    for name, part in parts.items():
        mark = re.compile(rf"(<!-- bench:{name} begin[^>]*-->\n).*?(<!-- bench:{name} end -->)", re.DOTALL)
        if not mark.search(text):
            raise InvalidInput(f"{path}: it has marks, but no <!-- bench:{name} begin --> with its end")
        text = mark.sub(lambda found: f"{found[1]}\n{part}\n{found[2]}", text)  # noqa: B023 (called at once)
    save_text(path, text)


def save_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(text)
    os.replace(new, path)


# -- the CPU suites ----------------------------------------------------------------------------------------------------


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
