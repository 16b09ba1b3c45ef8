"""Timing on a machine that others use too: interleaved rounds, medians, and the spread beside them."""

from __future__ import annotations

import gc
import random
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
    """Time functions in turn by the host's clock. Each is called once before, untimed; see ``interleave``."""

    def sampler(function: Callable[[], Any]) -> Callable[[], float]:
        def sample() -> float:
            start = time.perf_counter()
            function()
            return time.perf_counter() - start

        return sample

    for function in functions.values():
        function()
    return interleave({name: sampler(function) for name, function in functions.items()}, rounds, budget)


def interleave(samplers: Mapping[str, Callable[[], float]], rounds: int, budget: float = 20.0) -> dict[str, Timing]:
    """Take samples (seconds) in turn, round by round, so that a disturbance hits all of them alike; each round in an
    order of its own, as what ran just before has set the temperature, the clock rate and the caches.

    Stops early, after 3 rounds or more, when ``budget`` seconds are spent.
    """
    order, shuffled = list(samplers), random.Random(0)
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    collecting = gc.isenabled()
    gc.disable()
    began = time.perf_counter()
    try:
        for done in range(rounds):
            if done >= 3 and time.perf_counter() - began > budget:
                break
            shuffled.shuffle(order)
            for name in order:
                samples[name].append(samplers[name]())
    finally:
        if collecting:
            gc.enable()
    return {name: Timing.of(mine) for name, mine in samples.items()}
