"""Trains SPION's model on ListOps, or on files of another task of the Long Range Arena: dense, dense and then by the
patterns found in it, and with fixed patterns.

    python examples/listops.py                    # a GPU: the published sizes, 30,000 steps a mode; hours
    python examples/listops.py --modes dense,spion-CF --steps 3000
    python examples/listops.py --small            # a CPU: short expressions, minutes
    python examples/listops.py --speed 2048,8192  # no training: steps timed at these lengths (listops_speed.py)
    python examples/listops.py --task text --data ~/data   # also retrieval, image: files that you have (lra_data.py)

Data is made from the grammar (listops_data.py) once and kept in --out, as are checkpoints: a run that was cut short, by
--budget-seconds or by hand, is continued by the same command. Figures go to listops.json, curves to listops.png, maps
behind patterns to listops_maps/ (or another task's name). Exit code 1: a run failed.

Published for ListOps (arXiv:2309.12578; other tasks: PLANS): L 2048, batch 256, AdamW 7e-4, OneCycle that starts again
at the change, values of gradients cut at 1, an evaluation every 500 steps, blocks of 64, quantile 0.98 (C: density
0.04), change below 15%.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import listops_speed
import lra_data
import numpy as np
import torch
from listops_data import Grammar, dataset
from listops_model import MODES, PEERS, Classifier, Size
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table
from torch.nn.functional import cross_entropy

from splatc.sparsify import SpionSchedule, layer_costs

WARM = 3  # steps after a start or a change that are not timed


@dataclass(frozen=True)
class Plan:
    """What is trained, and on how much (files of a task: all they have). filter: of SPION's maps."""

    task: str = "listops"
    size: Size = Size()  # noqa: RUF009 (frozen)
    grammar: Grammar = Grammar()  # noqa: RUF009
    examples: int = 96_000
    tests: int = 2_000
    batch: int = 256
    steps: int = 30_000
    evaluate: int = 500
    rate: float = 7e-4
    quantile: float = 0.98
    density: float = 0.04
    filter: int = 31
    change: float = 0.15
    prune_to: str = "-inf"
    seed: int = 0


PLANS = {  # as published
    "listops": Plan(),
    "text": Plan("text", Size(4096, 2, words=lra_data.WORDS, classes=2), batch=32, evaluate=200, rate=1e-4,
                 quantile=0.99, density=0.03),
    "retrieval": Plan("retrieval", Size(4096, 2, words=lra_data.WORDS, classes=2, pairs=True), batch=32, steps=40_000,
                      evaluate=200, rate=3e-4, quantile=0.99, density=0.021),
    "image": Plan("image", Size(1024, 2, block=32, words=lra_data.WORDS), batch=128, steps=10_000, rate=1e-4,
                  quantile=0.96),
}  # fmt: skip
SMALL = Plan("listops", Size(length=64, layers=2, block=8), Grammar(4, 60, 4, 4), examples=1000, tests=100, batch=8,
             steps=48, evaluate=8, rate=2e-3, quantile=0.8, density=0.3, filter=7, change=0.5)  # fmt: skip


@dataclass
class Run:
    """One training. seconds: of each step. accuracy: (steps done, share of tests that are right). changed: the step of
    the change to patterns; densities: shares of blocks, of each layer, since then. costs: of attention, at the end, by
    layer (``splatc.sparsify.costs.Costs``)."""

    mode: str
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    accuracy: list[tuple[int, float]] = field(default_factory=list)
    changed: int | None = None
    densities: list[float] = field(default_factory=list)
    costs: dict[str, dict[str, float]] = field(default_factory=dict)
    failed: str | None = None

    def step_ms(self, changed: bool) -> float:
        """The median before or after the change; NaN if there is none."""
        at = len(self.seconds) if self.changed is None else self.changed
        some = self.seconds[at + WARM :] if changed else self.seconds[WARM:at]
        return statistics.median(some) * 1e3 if some else math.nan

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        each = {"step_ms": self.step_ms(False), "step_ms_changed": self.step_ms(True)}
        return asdict(self) | {name: None if math.isnan(x) else x for name, x in each.items()}


# -- data --------------------------------------------------------------------------------------------------------------


def load_data(plan: Plan, source: Path, folder: Path, progress: Progress) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(tokens, values) to train and to test on: of ListOps made, or found in a file of these settings."""
    if plan.task != "listops":
        return lra_data.load(plan.task, source, plan.size.length)
    settings = json.dumps([asdict(plan.grammar), plan.size.length, plan.examples, plan.tests, plan.seed])
    path = folder / "listops_data.npz"
    if path.exists():
        with np.load(path) as saved:
            if str(saved["settings"]) == settings:
                return {name: (saved[f"{name}_tokens"], saved[f"{name}_values"]) for name in ("train", "test")}
    out = {}
    for name, count, seed in (("train", plan.examples, 2 * plan.seed), ("test", plan.tests, 2 * plan.seed + 1)):
        bar = progress.add_task(f"expressions to {name}", total=count)
        processes = 1 if count < 10_000 else os.cpu_count() or 1
        out[name] = dataset(plan.grammar, count, plan.size.length, seed, processes,
                            lambda done, bar=bar: progress.update(bar, completed=done))  # fmt: skip
    arrays = {f"{name}_tokens": pair[0] for name, pair in out.items()}
    arrays |= {f"{name}_values": pair[1] for name, pair in out.items()}
    np.savez_compressed(path.with_suffix(".new.npz"), settings=settings, **arrays)
    path.with_suffix(".new.npz").replace(path)
    return out


# -- one training ------------------------------------------------------------------------------------------------------


class Trainer:
    """A model of one mode, what changes it, and a run to go on with."""

    def __init__(self, mode: str, plan: Plan, device: str, folder: Path) -> None:
        torch.manual_seed(plan.seed)
        self.plan, self.device, self.run = plan, device, Run(mode)
        self.checkpoint = folder / f"{plan.task}_{mode}.pt"
        self.model = Classifier(plan.size, mode, plan.prune_to).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), plan.rate)
        self.rate = self._one_cycle()
        self.schedule = None
        family, _, variant = mode.partition("-")
        if family in ("spion", "flex"):
            self.schedule = SpionSchedule(
                self.model, block=plan.size.block, quantile=plan.quantile, filter=plan.filter, variant=variant,
                density=plan.density if variant == "C" else None, change=plan.change, on_switch=self._changed,
                pictures=folder / f"{plan.task}_maps" / mode,
            )  # fmt: skip
        self.settings = json.dumps(asdict(plan) | {"device": device.partition(":")[0]}, sort_keys=True)

    def _one_cycle(self) -> Any:
        """A cycle over the steps that are left."""
        left = self.plan.steps - (self.run.changed or 0)
        return torch.optim.lr_scheduler.OneCycleLR(self.optimizer, self.plan.rate, total_steps=left + 1)

    def _changed(self, found: Any) -> None:
        self.run.changed = len(self.run.losses) + 1  # the step under way is still dense
        self.run.densities = [one.maps[0].density for one in found.values()]

    def resume(self) -> bool:
        """Continue from the checkpoint, if there is one of these settings."""
        if not self.checkpoint.exists():
            return False
        saved = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        if saved["settings"] != self.settings:
            return False
        self.run = Run(**saved["run"])
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.rate = self._one_cycle()
        self.rate.load_state_dict(saved["rate"])
        self.optimizer.load_state_dict(saved["optimizer"])  # a new cycle has set the rate
        if self.schedule is not None:
            self.schedule.load_state_dict(saved["schedule"])
        return True

    def save(self) -> None:
        """Write the checkpoint whole or not at all."""
        new = self.checkpoint.with_suffix(".new")
        torch.save({"settings": self.settings, "run": asdict(self.run), "model": self.model.state_dict(),
                    "optimizer": self.optimizer.state_dict(), "rate": self.rate.state_dict(),
                    "schedule": None if self.schedule is None else self.schedule.state_dict()}, new)  # fmt: skip
        new.replace(self.checkpoint)

    def step(self, tokens: np.ndarray, values: np.ndarray) -> None:
        """One step of training; every plan.evaluate-th is an evaluation of attention, until the change."""
        number = len(self.run.losses)
        torch.manual_seed(self.plan.seed + number)  # dropout does not depend on where a run was cut
        rows = np.random.default_rng((self.plan.seed, number)).integers(0, len(tokens), self.plan.batch)
        x, y = self._on_device(tokens[rows]), self._on_device(values[rows])
        watched = self.schedule is not None and not self.schedule.switched and (number + 1) % self.plan.evaluate == 0
        self._wait()
        began = time.perf_counter()
        if watched and self.schedule is not None:
            self.schedule.start()
        with self._autocast():
            loss = cross_entropy(self.model(x).float(), y)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_value_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.rate.step()
        if watched and self.schedule is not None and self.schedule.finish():
            self.rate = self._one_cycle()
        self._wait()
        self.run.seconds.append(time.perf_counter() - began)
        self.run.losses.append(float(loss.detach()))

    def test(self, tokens: np.ndarray, values: np.ndarray) -> None:
        """Note the share of tests that the model gets right."""
        self.model.eval()
        right = 0
        with torch.no_grad(), self._autocast():
            for lo in range(0, len(tokens), self.plan.batch):
                part = slice(lo, lo + self.plan.batch)
                guess = self.model(self._on_device(tokens[part])).argmax(-1)
                right += int((guess == self._on_device(values[part])).sum())
        self.model.train()
        self.run.accuracy.append((len(self.run.losses), right / len(tokens)))

    def costs(self) -> dict[str, dict[str, float]]:
        """Of each layer's attention, as it is now, on one sequence."""
        itemsize = 2 if self.device.startswith("cuda") else 4
        found = layer_costs(self.model, self.plan.size.length, itemsize)
        return {name: one.to_dict() for name, one in found.items()}

    def _autocast(self) -> Any:
        return torch.autocast("cuda", torch.bfloat16, enabled=self.device.startswith("cuda"))

    def _on_device(self, x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(x.astype(np.int64)).to(self.device)

    def _wait(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()


def train(trainer: Trainer, data: Any, deadline: float, shown: Callable[[Run], None]) -> bool:
    """Go on until the steps are done; False if the deadline came before."""
    plan = trainer.plan
    for number in range(len(trainer.run.losses) + 1, plan.steps + 1):
        if time.monotonic() > deadline:
            trainer.save()
            return False
        trainer.step(*data["train"])
        if number % plan.evaluate == 0 or number == plan.steps:
            trainer.test(*data["test"])
            trainer.save()
        shown(trainer.run)
    return True


# -- the command -------------------------------------------------------------------------------------------------------


def table(runs: list[Run]) -> Table:
    """What each run came to."""
    out = Table(Column("mode", no_wrap=True), "steps", "loss", "accuracy", "changed at", "density", "fewer ops",
                "ms a step", "then", caption="fewer ops: of attention; then: after the change")  # fmt: skip
    for run in runs:
        if run.failed:
            out.add_row(run.mode, str(len(run.losses)), f"failed: {run.failed}")
            continue
        tail = f"{statistics.fmean(run.losses[-20:]):.3f}" if run.losses else "-"
        right = f"{run.accuracy[-1][1]:.1%}" if run.accuracy else "-"
        density = f"{statistics.fmean(run.densities):.1%}" if run.densities else "-"
        fewer = f"{statistics.fmean(one['fewer_operations'] for one in run.costs.values()):.1f}x" if run.costs else "-"
        out.add_row(run.mode, str(len(run.losses)), tail, right, str(run.changed or "-"), density, fewer,
                    f"{run.step_ms(False):.1f}", f"{run.step_ms(True):.1f}")  # fmt: skip
    return out


def draw(runs: list[Run], path: Path) -> None:
    """Losses (means of 1/50 of the steps) and accuracies by step; a dot where a run changed to its patterns."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    out = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(out)
    left, right = out.subplots(1, 2)
    for run in runs:
        if not run.losses:
            continue
        edges = np.unique(np.linspace(0, len(run.losses), 51).astype(int))
        means = [statistics.fmean(run.losses[a:b]) for a, b in pairwise(edges)]
        (line,) = left.plot(edges[1:], means, label=run.mode)
        if run.changed is not None:
            left.plot([run.changed], [np.interp(run.changed, edges[1:], means)], "o", color=line.get_color())
        right.plot(*zip(*run.accuracy, strict=True) if run.accuracy else ((), ()), color=line.get_color())
    left.set_xlabel("step")
    left.set_ylabel("loss, nats")
    left.legend(frameon=False, fontsize=8)
    right.set_xlabel("step")
    right.set_ylabel("accuracy on tests")
    out.savefig(path, dpi=130)


def numbers(text: str) -> list[int]:
    """ "2048,8192" as whole numbers."""
    return [int(word) for word in text.split(",")]


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=PLANS, default="listops")
    parser.add_argument("--data", type=Path, help="folder with the files of a task other than ListOps")
    parser.add_argument("--small", action="store_true", help="ListOps with 2 layers, 64 tokens, 48 steps: for a CPU")
    parser.add_argument("--modes", default=",".join(MODES),
                        help=f"comma-separated, by default {','.join(MODES)}; also {', '.join(PEERS)}")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="folder for results")
    for name in ("steps", "batch", "evaluate", "examples", "tests", "seed"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--prune-to", choices=("-inf", "zero"), help="what pruned scores become")
    parser.add_argument("--budget-seconds", type=float, default=math.inf, help="stop, and save, after so long")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--speed", type=numbers, metavar="LENGTHS", help="time steps of untrained models instead")
    parser.add_argument("--tokens", type=int, default=65536, help="of a batch, with --speed")
    parser.add_argument("--fresh", action="store_true", help="forget earlier checkpoints")
    return parser.parse_args()


def one_run(mode: str, plan: Plan, chosen: argparse.Namespace, data: Any, deadline: float,
            progress: Progress) -> tuple[Run, bool]:  # fmt: skip
    """(the run, whether it is complete). A failure is the run's, and the others go on."""
    bar, trainer = progress.add_task(mode, total=plan.steps), None

    def shown(run: Run) -> None:
        progress.update(bar, completed=len(run.losses), description=f"{mode:<8} loss {run.losses[-1]:.3f}")

    try:
        trainer = Trainer(mode, plan, chosen.device, chosen.out)
        if not chosen.fresh and trainer.resume():
            progress.console.print(f"{mode}: continued after step {len(trainer.run.losses)}")
        complete = train(trainer, data, deadline, shown)
        trainer.run.costs = trainer.costs()
        return trainer.run, complete
    except Exception as error:
        run = trainer.run if trainer else Run(mode)
        run.failed = f"{type(error).__name__}: {error}"[:300]
        return run, True


def main() -> int:
    """0, or 1 if a run failed."""
    chosen = options()
    modes = [word for word in chosen.modes.split(",") if word]
    if unknown := [mode for mode in modes if mode not in (*MODES, *PEERS)]:
        sys.exit(f"--modes: {unknown[0]!r} is none of {', '.join((*MODES, *PEERS))}")
    names = "steps", "batch", "evaluate", "examples", "tests", "seed", "prune_to"
    given = {name: getattr(chosen, name) for name in names}
    if chosen.task != "listops" and (chosen.small or chosen.data is None):
        sys.exit(f"--task {chosen.task} needs --data, a folder with its files, and has no --small")
    base = SMALL if chosen.small else PLANS[chosen.task]
    plan = replace(base, **{name: x for name, x in given.items() if x is not None})
    chosen.out.mkdir(parents=True, exist_ok=True)
    if chosen.speed:
        return listops_speed.main(plan.size, chosen.speed, chosen.tokens, chosen.device, chosen.out)
    deadline = time.monotonic() + chosen.budget_seconds
    times = TimeElapsedColumn(), TimeRemainingColumn()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *times
    with Progress(*columns, console=Console(stderr=True)) as progress:
        try:
            data = load_data(plan, chosen.data, chosen.out, progress)
        except lra_data.DataError as error:
            sys.exit(f"--data: {error}")
        done = [one_run(mode, plan, chosen, data, deadline, progress) for mode in modes]
    runs = [run for run, _ in done]
    console = Console()
    console.print(table(runs))
    found: dict[str, Any] = {"plan": asdict(plan), "device": chosen.device, "torch": torch.__version__}
    if chosen.device != "cpu":
        found["gpu"] = torch.cuda.get_device_name()
    found["runs"] = [run.to_dict() for run in runs]
    (chosen.out / f"{plan.task}.json").write_text(json.dumps(found, indent=1) + "\n")
    draw(runs, chosen.out / f"{plan.task}.png")
    console.print(f"wrote {plan.task}.json and {plan.task}.png to {chosen.out}")
    if not all(complete for _, complete in done):
        console.print("out of time: the same command goes on from here")
    return int(any(run.failed for run in runs))


if __name__ == "__main__":
    sys.exit(main())
