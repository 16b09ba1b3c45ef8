"""Compiles what suites will ask for in processes beside each other, before anything is timed.

Compiling takes FlexAttention some 4 s a mask, more than timing it. Our kernels, Inductor's graphs and Triton's kernels
are kept on disk, where the measuring process finds them.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from splatc.bench.gpu.suites import Choice, jobs

TIMED = ("dense", "patterns", "shapes", "short", "pruned", "backward")  # suites of jobs that have masks of their own
COMPILING = ("splatc", "unpruned", "flex")  # contestants that compile


def count(suites: Sequence[str], choice: Choice) -> int:
    """How many calls ``fill`` makes of its ``done``."""
    return len(_todo(suites, choice))


def fill(suites: Sequence[str], choice: Choice, device: str, processes: int, done: Callable[[], Any]) -> None:
    """Build and call once, in so many processes, what compiles; done() after each job.

    What fails here is left to the suites, which say so.
    """
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _begin) as pool:
        running = [pool.submit(_compile, *job, choice, device) for job in _todo(suites, choice)]
        for one in as_completed(running):
            with contextlib.suppress(BrokenProcessPool):
                one.result()
            done()


def _todo(suites: Sequence[str], choice: Choice) -> list[tuple[str, int]]:
    """(suite, number of a job there)."""
    return [(suite, i) for suite in suites if suite in TIMED for i in range(len(jobs(suite, choice)))]


def _begin() -> None:
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # there are enough processes


def _compile(suite: str, number: int, choice: Choice, device: str) -> None:
    """In a process of the pool."""
    import torch

    from splatc.bench.gpu.backward import both_passes, learning_inputs, retaining
    from splatc.bench.gpu.peers import BUILDERS

    job = jobs(suite, choice)[number]
    for name in (name for name in ("splatc", *job.peers) if name in COMPILING):
        with contextlib.suppress(Exception):
            contestant = BUILDERS[name](job.case, job.shape, device)
            if suite == "backward":
                with retaining():
                    both_passes(contestant, *learning_inputs(job.shape, device))
            else:
                with torch.no_grad():
                    contestant.call(*job.shape.inputs(device))
