"""Time of one call. On a GPU: CUDA graphs of calls on different inputs, between events; on a CPU: the host's clock."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from splatc.bench.gpu.peers import Contestant

Inputs = Sequence[tuple[Any, ...]]  # sets of arguments of a contestant


@dataclass(frozen=True)
class Timed:
    """A contestant made ready. sample(): seconds of one call, measured afresh; how: what a sample is, in words.

    eager_s: seconds of one call in a burst of plain calls, launch costs included where they do not hide. graph_of: what
    a graph reads and writes, which has to be there as long as it is replayed.
    """

    sample: Callable[[], float]
    how: str
    eager_s: float | None = None
    graph_of: tuple[Any, ...] = ()


class Clock(Protocol):
    """Makes contestants ready for timing."""

    def prepare(self, contestant: Contestant, inputs: Inputs, settle_s: float = 0.0) -> Timed:
        """Warm the contestant up on the inputs; on a GPU it runs once before each sample, or for ``settle_s`` seconds.

        Raises what the contestant raises.
        """
        ...


class HostClock:
    """For a CPU: one call on the next set of inputs."""

    def prepare(self, contestant: Contestant, inputs: Inputs, settle_s: float = 0.0) -> Timed:
        """See Clock."""
        calls = 0

        def sample() -> float:
            nonlocal calls
            given = inputs[calls % len(inputs)]
            calls += 1
            with contestant.context():
                began = time.perf_counter()
                contestant.call(*given)
                return time.perf_counter() - began

        sample()
        return Timed(sample, "one call")


GRAPH_S, SAMPLE_S, BURST_S = 6e-3, 4e-3, 10e-3  # aims: device time in a graph, in a sample, in a burst of eager calls
GRAPH_CALLS, EAGER_CALLS = 6, 50  # at most


class GraphClock:
    """For a CUDA device: a graph of up to 6 calls, each on another set of inputs and with an output of its own.

    A sample is one replay or more that are not timed and some that are. What cannot be captured is timed as a burst of
    calls.
    """

    def __init__(self, stream: Any = None) -> None:
        """stream: where all that is timed runs; default: the current one, and captures on a stream of torch's.

        Autograd runs a backward pass on the stream of its forward pass: to capture one without the other, both have to
        be on the stream of the capture.
        """
        self.stream = stream

    def running(self) -> AbstractContextManager[Any]:
        """In it the current stream is that of this clock."""
        import torch

        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def prepare(self, contestant: Contestant, inputs: Inputs, settle_s: float = 0.0) -> Timed:
        """See Clock."""
        import torch

        with contestant.context(), self.running():
            side = self.stream or torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # capture runs on a side stream: libraries set themselves up for one
                for given in inputs:
                    contestant.call(*given)
            torch.cuda.current_stream().wait_stream(side)
            torch.cuda.synchronize()
            once = min(_burst(contestant, inputs, 2) for _ in range(2))
            times = _between(BURST_S / once, 3, EAGER_CALLS)
            eager = statistics.median(_burst(contestant, inputs, times) for _ in range(3))
            calls = _between(GRAPH_S / once, 2, GRAPH_CALLS)
            try:
                graph, outputs = self._capture(contestant, inputs, calls)
            except Exception as error:
                torch.cuda.synchronize()
                how = f"{times} calls in a burst, no graph: {type(error).__name__}"
                return Timed(lambda: self._sample_burst(contestant, inputs, times), how, eager)
        replays, settling = _between(SAMPLE_S / (once * calls), 1, 50), max(1, math.ceil(settle_s / (once * calls)))

        def sample() -> float:
            for _ in range(settling):
                graph.replay()
            return _elapsed(graph.replay, replays) / calls

        how = f"graph of {calls} calls, {replays} replays after {settling}"
        return Timed(sample, how, eager, graph_of=(contestant, inputs, outputs))

    def _sample_burst(self, contestant: Contestant, inputs: Inputs, times: int) -> float:
        with contestant.context(), self.running():
            return _burst(contestant, inputs, times)

    def _capture(self, contestant: Contestant, inputs: Inputs, calls: int) -> tuple[Any, list[Any]]:
        import torch

        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, **({} if self.stream is None else {"stream": self.stream})):
            outputs = [contestant.call(*inputs[i % len(inputs)]) for i in range(calls)]
        graph.replay()
        torch.cuda.synchronize()
        return graph, outputs


def _burst(contestant: Contestant, inputs: Inputs, times: int) -> float:
    """Seconds a call of ``times`` calls in a row."""
    calls = iter(range(times))
    return _elapsed(lambda: contestant.call(*inputs[next(calls) % len(inputs)]), times)


def _elapsed(function: Callable[[], Any], times: int) -> float:
    """Seconds of device time for each of ``times`` calls of the function."""
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(times):
        function()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3 / times


def _between(value: float, least: int, most: int) -> int:
    return max(least, min(most, math.ceil(value)))
