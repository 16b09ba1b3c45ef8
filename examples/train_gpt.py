"""Trains a small GPT with splatc in bfloat16 and with dense attention in float32, from the same weights on the same
text, and compares the loss curves; on a GPU also the time and the memory of a step, with FlexAttention beside it.

    python examples/train_gpt.py                  # a GPU: 8 layers, 4,096 tokens, 300 steps; a few minutes
    python examples/train_gpt.py --small          # a CPU: under a minute

Half of the layers attend through a window, half along strides (gpt_model.py); the text is made up (gpt_text.py).
Figures go to train_gpt.json and curves to train_gpt.png in --out. A run that was cut short, by --budget-seconds or by
hand, is continued from its last checkpoint by the same command. Exit code 1: the curves disagree, or a run failed.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpt_model import GPT, KINDS, Size
from gpt_text import corpus
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

WARM = 5  # steps that are not timed
SMOOTH = 20  # steps that a point of a smoothed curve is the mean of
TITLES = {"splatc": "splatc, bfloat16", "dense": "dense with mask, float32", "flex": "FlexAttention, bfloat16"}
LINES = {"splatc": ("#0072B2", "-"), "dense": ("#D55E00", "--"), "flex": ("#009E73", ":")}  # colour, style


@dataclass(frozen=True)
class Plan:
    """What is trained. batch: sequences a step. flex_steps: FlexAttention is only timed. text: characters in all."""

    size: Size = Size()  # noqa: RUF009 (frozen)
    steps: int = 300
    flex_steps: int = 40
    batch: int = 4
    rate: float = 1e-3
    text: int = 4_000_000
    seed: int = 0
    save_every: int = 50
    compiled: bool = False

    def of(self, kind: str) -> int:
        """The steps of a run."""
        return min(self.flex_steps, self.steps) if kind == "flex" else self.steps


SMALL = Plan(Size(layers=4, width=64, heads=4, context=256, window=32, stride=16), steps=120, rate=3e-3,
             text=200_000)  # fmt: skip


@dataclass
class Run:
    """One training: losses in nats and seconds, a step each, and peak bytes on the GPU."""

    kind: str
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    failed: str | None = None

    @property
    def step_ms(self) -> float:
        """The median of the steps after the first ones."""
        late = self.seconds[WARM:] or self.seconds
        return statistics.median(late) * 1e3 if late else math.nan

    @property
    def final_loss(self) -> float:
        """The mean of the last losses."""
        return statistics.fmean(self.losses[-SMOOTH:]) if self.losses else math.nan

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self) | ({"step_ms": self.step_ms, "final_loss": self.final_loss} if self.losses else {})


# -- one training ------------------------------------------------------------------------------------------------------


def batch(text: np.ndarray, plan: Plan, step: int, device: str) -> Any:
    """Tokens (batch, context + 1) of a step: a function of the seed and the step alone."""
    rng = np.random.default_rng((plan.seed, step))
    starts = rng.integers(0, len(text) - plan.size.context, plan.batch)
    rows = np.stack([text[start : start + plan.size.context + 1] for start in starts])
    return torch.from_numpy(rows.astype(np.int64)).to(device)


def learning_rate(plan: Plan, step: int) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    warm = max(1, plan.steps // 15)
    done = (step - warm) / max(1, plan.steps - warm)
    return plan.rate * (min(1.0, (step + 1) / warm) if step < warm else 0.55 + 0.45 * math.cos(math.pi * done))


class Trainer:
    """A model, its optimizer, and a run to go on with."""

    def __init__(self, kind: str, plan: Plan, device: str, checkpoint: Path) -> None:
        torch.manual_seed(plan.seed)
        self.kind, self.plan, self.device, self.checkpoint = kind, plan, device, checkpoint
        self.model = GPT(plan.size, kind).to(device)
        self.loss: Callable[[Any], Any] = self.model.loss
        if plan.compiled:
            self.loss = torch.compile(self.loss, fullgraph=kind != "flex")
        self.optimizer = torch.optim.AdamW(self.model.parameters(), plan.rate, betas=(0.9, 0.95), weight_decay=0.1)
        self.run = Run(kind)
        self.settings = json.dumps(asdict(plan) | {"device": device.partition(":")[0]}, sort_keys=True)

    def resume(self) -> bool:
        """Continue from the checkpoint, if there is one of these settings."""
        if not self.checkpoint.exists():
            return False
        saved = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        if saved["settings"] != self.settings:
            return False
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.run = Run(**saved["run"])
        return True

    def save(self) -> None:
        """Write the checkpoint whole or not at all."""
        new = self.checkpoint.with_suffix(".new")
        torch.save({"settings": self.settings, "model": self.model.state_dict(), "run": asdict(self.run),
                    "optimizer": self.optimizer.state_dict()}, new)  # fmt: skip
        new.replace(self.checkpoint)

    def step(self, tokens: Any, step: int) -> None:
        """One step of training."""
        self._wait()
        began = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.plan, step)
        kind = self.device.partition(":")[0]
        with torch.autocast(kind, torch.bfloat16, enabled=self.kind != "dense"):
            loss = self.loss(tokens)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self._wait()
        self.run.seconds.append(time.perf_counter() - began)
        self.run.losses.append(float(loss.detach()))
        if kind == "cuda":
            self.run.peak_bytes = max(self.run.peak_bytes, torch.cuda.max_memory_allocated())

    def _wait(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()


def train(trainer: Trainer, text: np.ndarray, deadline: float, shown: Callable[[Run], None]) -> bool:
    """Go on until the steps are done; False if the deadline came before."""
    total = trainer.plan.of(trainer.kind)
    if trainer.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    for step in range(len(trainer.run.losses), total):
        if time.monotonic() > deadline:
            trainer.save()
            return False
        trainer.step(batch(text, trainer.plan, step, trainer.device), step)
        if (step + 1) % trainer.plan.save_every == 0 or step + 1 == total:
            trainer.save()
        shown(trainer.run)
    return True


# -- comparing ---------------------------------------------------------------------------------------------------------


def smooth(losses: Sequence[float]) -> np.ndarray:
    """The running mean over SMOOTH steps (fewer at the start)."""
    sums = np.concatenate([[0.0], np.cumsum(losses)])
    ends = np.arange(1, len(losses) + 1)
    starts = np.maximum(0, ends - SMOOTH)
    return (sums[ends] - sums[starts]) / (ends - starts)


def differences(a: Run, b: Run) -> dict[str, float]:
    """Of the smoothed curves over the steps that both have, in nats: mean, largest, and at the end."""
    n = min(len(a.losses), len(b.losses))
    if not n:
        return dict.fromkeys(("mean", "largest", "final"), math.nan)
    away = np.abs(smooth(a.losses[:n]) - smooth(b.losses[:n]))
    return {"mean": float(away.mean()), "largest": float(away.max()), "final": float(away[-1])}


def table(runs: Sequence[Run], plan: Plan) -> Table:
    """What each run came to."""
    out = Table("attention", "steps", "final loss", "ms a step", "tokens/s", "peak MiB")
    for run in runs:
        if run.failed:
            out.add_row(run.kind, str(len(run.losses)), f"failed: {run.failed}")
            continue
        rate = plan.batch * plan.size.context / run.step_ms * 1e3
        memory = f"{run.peak_bytes / 2**20:,.0f}" if run.peak_bytes else "-"
        cells = f"{run.final_loss:.4f}", f"{run.step_ms:.1f}", f"{rate:,.0f}", memory
        out.add_row(TITLES[run.kind], str(len(run.losses)), *cells)
    return out


def draw(runs: Sequence[Run], path: Path) -> bool:
    """The loss curves, smoothed, over the raw ones; False without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    out = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(out)
    axes = out.subplots()
    for run in runs:
        if run.losses:
            colour, style = LINES[run.kind]
            axes.plot(run.losses, style, color=colour, alpha=0.3, linewidth=0.6)
            axes.plot(smooth(run.losses), style, color=colour, linewidth=1.4, label=TITLES[run.kind])
    axes.set_xlabel(f"step (thick: mean of {SMOOTH} steps)")
    axes.set_ylabel("loss, nats a character")
    if any(run.losses for run in runs):
        axes.legend(frameon=False)
    out.savefig(path, dpi=130)
    return True


# -- the command -------------------------------------------------------------------------------------------------------


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="4 layers, 256 tokens, 120 steps: for a CPU")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="folder for results")
    parser.add_argument("--runs", default="", help=f"of {', '.join(KINDS)}, comma-separated (default: what works here)")
    parser.add_argument("--steps", type=int, help="of training")
    parser.add_argument("--flex-steps", type=int, help="of FlexAttention, which is only timed")
    parser.add_argument("--batch", type=int, help="sequences a step")
    parser.add_argument("--seed", type=int, help="of weights, text and batches")
    parser.add_argument("--save-every", type=int, help="steps between two checkpoints")
    parser.add_argument("--budget-seconds", type=float, default=math.inf, help="stop, and save, after so long")
    parser.add_argument("--tolerance", type=float, default=0.05,
                        help="nats by which the smoothed curves may differ in the mean and at the end")  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--fresh", action="store_true", help="forget earlier checkpoints")
    return parser.parse_args()


def plan_of(chosen: argparse.Namespace) -> Plan:
    """The plan that options ask for."""
    plan = SMALL if chosen.small else Plan()
    given = {name: getattr(chosen, name) for name in ("steps", "flex_steps", "batch", "seed", "save_every")}
    return replace(plan, **{name: x for name, x in given.items() if x is not None}, compiled=chosen.compile)


def kinds_of(chosen: argparse.Namespace) -> list[str]:
    """The runs that options ask for: FlexAttention has no gradients on a CPU."""
    kinds = [word for word in chosen.runs.split(",") if word]
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        sys.exit(f"--runs: {unknown[0]!r} is none of {', '.join(KINDS)}")
    return kinds or (["splatc", "dense"] if chosen.device == "cpu" else list(KINDS))


def one_run(kind: str, plan: Plan, chosen: argparse.Namespace, text: np.ndarray, deadline: float,
            progress: Progress) -> tuple[Run, bool]:  # fmt: skip
    """(the run, whether it is complete). A failure is the run's, and the others go on."""
    bar = progress.add_task(kind, total=plan.of(kind))

    def shown(run: Run) -> None:
        step = len(run.losses)
        progress.update(bar, completed=step, description=f"{kind:<6} loss {run.losses[-1]:.3f}")
        if not progress.console.is_terminal and (step % plan.save_every == 0 or step == plan.of(kind)):
            progress.console.print(f"{kind:<6} step {step:4d}  loss {run.losses[-1]:.4f}  {run.step_ms:8.1f} ms a step")

    trainer = None
    try:
        trainer = Trainer(kind, plan, chosen.device, chosen.out / f"train_gpt_{kind}.pt")
        if not chosen.fresh and trainer.resume():
            progress.console.print(f"{kind}: continued after step {len(trainer.run.losses)}")
            progress.update(bar, completed=len(trainer.run.losses))
        return trainer.run, train(trainer, text, deadline, shown)
    except Exception as error:
        lines = str(error).strip().splitlines()
        run = trainer.run if trainer else Run(kind)
        run.failed = f"{type(error).__name__}: {lines[0][:200] if lines else ''}"
        return run, True


def report(runs: Sequence[Run], plan: Plan, chosen: argparse.Namespace, console: Console) -> bool:
    """Print and write everything; whether the curves agree and nothing failed."""
    by_kind = {run.kind: run for run in runs}
    found: dict[str, Any] = {"plan": asdict(plan), "device": chosen.device, "torch": torch.__version__}
    found["runs"] = {run.kind: run.to_dict() for run in runs}
    if chosen.device != "cpu":
        found["gpu"] = torch.cuda.get_device_name()
    console.print(table(runs, plan))
    good = not any(run.failed for run in runs)
    if good and all(kind in by_kind and by_kind[kind].losses for kind in ("splatc", "dense")):
        away = differences(by_kind["splatc"], by_kind["dense"])
        agree = away["mean"] < chosen.tolerance and away["final"] < chosen.tolerance
        good, found["differences"], found["agree"] = agree, away, agree
        words = ", ".join(f"{name} {x:.4f}" for name, x in away.items())
        console.print(f"splatc and dense: curves differ by {words} nats: {'they agree' if agree else 'they DISAGREE'}")
    (chosen.out / "train_gpt.json").write_text(json.dumps(found, indent=1) + "\n")
    pictured = draw(runs, chosen.out / "train_gpt.png")
    console.print(f"wrote train_gpt.json{' and train_gpt.png' if pictured else ''} to {chosen.out}")
    return good


def main() -> int:
    """0: the curves agree; 1: they do not, or a run failed."""
    chosen = options()
    plan, kinds = plan_of(chosen), kinds_of(chosen)
    chosen.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + chosen.budget_seconds
    text = corpus(plan.text, plan.seed)
    runs, complete = [], True
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    console = Console(width=None if sys.stdout.isatty() else 110)
    with Progress(*columns, console=Console(stderr=True)) as progress:
        for kind in kinds:
            run, done = one_run(kind, plan, chosen, text, deadline, progress)
            runs.append(run)
            complete = complete and done
            if chosen.device != "cpu":
                torch.cuda.empty_cache()
    good = report(runs, plan, chosen, console)
    if not complete:
        console.print("out of time: the same command goes on from here")
        return int(any(run.failed for run in runs))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
