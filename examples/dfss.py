"""The recipe of DFSS (arXiv 2203.00091): train with dense attention, swap in N:M attention, train a little more.

    python examples/dfss.py                  # a CPU: about three minutes on one core

The task is made up: the first symbol of a sequence asks how often it occurs in the rest, out of four symbols. Attention
has to count, so keys are missed where a group has more of them than stay: a hard task for pruning, harder than one with
a few important keys. The model is one of torch's own encoder layers. Dense attention is trained for the same further
steps, too, so that what those are worth is not taken for what fine-tuning is worth. Everything follows from --seed.
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from splatc.sparsify import to_nm

SYMBOLS = 4
CONSOLE = Console()


@dataclass(frozen=True)
class Plan:
    """Sizes. steps: with dense attention; tuning: those after the swap, at a quarter of the rate."""

    length: int = 32
    width: int = 64
    heads: int = 4
    batch: int = 64
    steps: int = 1500
    tuning: int = 150
    rate: float = 2e-3
    tests: int = 4096
    seed: int = 0


class Counter(nn.Module):
    """Logits (batch, length) of how often the first symbol of (batch, length) occurs in the rest."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.symbols = nn.Embedding(SYMBOLS, plan.width)
        self.positions = nn.Parameter(torch.randn(plan.length, plan.width) / 4)
        self.layer = nn.TransformerEncoderLayer(plan.width, plan.heads, 2 * plan.width, 0.0, batch_first=True,
                                                norm_first=True)  # fmt: skip
        self.out = nn.Linear(plan.width, plan.length)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.out(self.layer(self.symbols(x) + self.positions)[:, 0])
        return logits


def sequences(plan: Plan, count: int, source: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(x, how often x[:, 0] occurs in x[:, 1:])."""
    x = torch.randint(SYMBOLS, (count, plan.length), generator=source)
    return x, (x[:, 1:] == x[:, :1]).sum(1)


def train(model: nn.Module, plan: Plan, steps: int, rate: float, seed: int, title: str) -> None:
    """Adam with a rate that rises and falls, on sequences that never recur."""
    source = torch.Generator().manual_seed(seed)
    adam = torch.optim.Adam(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, rate, total_steps=steps)
    for _ in track(range(steps), title, console=CONSOLE, transient=True):
        x, y = sequences(plan, plan.batch, source)
        adam.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        adam.step()
        schedule.step()


def accuracy(model: nn.Module, plan: Plan) -> float:
    """The share of right answers, of sequences that are the same for every model."""
    x, y = sequences(plan, plan.tests, torch.Generator().manual_seed(plan.seed + 1000))
    model.eval()
    with torch.no_grad():
        right = (model(x).argmax(1) == y).float().mean()
    model.train()
    return float(right)


def run(plan: Plan) -> dict[str, tuple[float, float]]:
    """The accuracies of each kind of attention, before and after further training."""
    torch.manual_seed(plan.seed)
    trained = Counter(plan)
    train(trained, plan, plan.steps, plan.rate, plan.seed + 1, "dense")
    found = {}
    for name, ratio in (("dense", None), ("2:4", (2, 4)), ("1:2", (1, 2))):
        model = copy.deepcopy(trained)
        if ratio is not None:
            to_nm(model, *ratio)
        before = accuracy(model, plan)
        train(model, plan, plan.tuning, plan.rate / 4, plan.seed + 2, name)
        found[name] = before, accuracy(model, plan)
    return found


def main() -> dict[str, tuple[float, float]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("steps", "tuning", "tests", "seed"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Plan, name))
    plan = Plan(**vars(parser.parse_args()))
    began = time.perf_counter()
    found = run(plan)
    table = Table("attention", "as it is", f"after {plan.tuning} more steps")
    for name, accuracies in found.items():
        table.add_row(name, *(f"{100 * one:.1f} %" for one in accuracies))
    CONSOLE.print(table)
    CONSOLE.print(f"{plan.steps} steps with dense attention, seed {plan.seed}, {plan.tests} test sequences, "
                  f"{time.perf_counter() - began:.0f} s")  # fmt: skip
    return found


if __name__ == "__main__":
    main()
