"""Timing on a machine that others use too: interleaved rounds, medians, and the spread beside them."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Timing:
    """Seconds of one function over some rounds."""

    median: float
    fastest: float
    slowest: float
    rounds: int

    @staticmethod
    def of(samples: list[float]) -> Timing:
        return Timing(statistics.median(samples), min(samples), max(samples), len(samples))

    def to_dict(self) -> dict[str, float]:
        """JSON values, in milliseconds."""
        return {
            "median_ms": self.median * 1e3,
            "min_ms": self.fastest * 1e3,
            "max_ms": self.slowest * 1e3,
            "rounds": self.rounds,
        }


def interleaved(functions: Mapping[str, Callable[[], Any]], rounds: int, budget: float = 20.0) -> dict[str, Timing]:
    """Time functions in turn, round by round, so that a disturbance hits all of them alike.

    Each is called once before, untimed. Stops early, after 3 rounds or more, when ``budget`` seconds are spent.
    """
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    collecting = gc.isenabled()
    gc.disable()
    began = time.perf_counter()
    try:
        for done in range(rounds):
            if done >= 3 and time.perf_counter() - began > budget:
                break
            for name, function in functions.items():
                start = time.perf_counter()
                function()
                samples[name].append(time.perf_counter() - start)
    finally:
        if collecting:
            gc.enable()
    return {name: Timing.of(mine) for name, mine in samples.items()}
