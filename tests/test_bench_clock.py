"""The clocks of benchmarks, on a device that is not there."""

from __future__ import annotations

import contextlib
import gc
import types
import weakref

import pytest

from splatc.bench.gpu.clock import GraphClock, HostClock
from splatc.bench.gpu.peers import Contestant

torch = pytest.importorskip("torch")


def test_the_host_clock_rotates_inputs():
    seen = []
    timed = HostClock().prepare(Contestant(lambda q, k, v: seen.append(q)), [(i, 0, 0) for i in range(3)])
    for _ in range(4):
        assert timed.sample() >= 0
    assert seen == [0, 1, 2, 0, 1]


class VirtualDevice:
    """torch.cuda as far as GraphClock goes, with a clock of its own: captured work takes time when replayed."""

    def __init__(self, capturable=True):
        self.now, self.captured, self.capturable = 0.0, None, capturable

    def work(self, seconds):
        if self.captured is None:
            self.now += seconds
        else:
            self.captured.append(seconds)

    def install(self, monkeypatch):
        device = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = device.now

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return (end.at - self.at) * 1e3

        class Graph:
            def replay(self):
                device.now += sum(self.work)

        class Capture:
            def __init__(self, graph):
                self.graph = graph

            def __enter__(self):
                if not device.capturable:
                    raise RuntimeError("this cannot be captured")
                device.captured = []

            def __exit__(self, *_):
                self.graph.work, device.captured = device.captured, None

        stream = types.SimpleNamespace(wait_stream=lambda other: None)
        for name, value in {"Event": Event, "CUDAGraph": Graph, "graph": Capture, "Stream": lambda: stream,
                            "current_stream": lambda: stream, "stream": lambda s: contextlib.nullcontext(),
                            "synchronize": lambda: None}.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)


@pytest.mark.parametrize(("seconds", "settle", "how"), [
    (50e-6, 0.0, "graph of 6 calls, 14 replays after 1"), (1e-3, 0.1, "graph of 6 calls, 1 replays after 17"),
    (20e-3, 0.0, "graph of 2 calls, 1 replays after 1"),
])  # fmt: skip
def test_the_graph_clock(seconds, settle, how, monkeypatch):
    device, seen = VirtualDevice(), []
    device.install(monkeypatch)

    def call(q, k, v):
        seen.append(q)
        device.work(seconds)

    timed = GraphClock().prepare(Contestant(call), [(i, 0, 0) for i in range(6)], settle)
    assert timed.how == how
    calls = int(timed.how.split()[2])
    assert seen[-calls:] == list(range(calls))  # each captured call has other inputs
    assert timed.sample() == pytest.approx(seconds) and timed.eager_s == pytest.approx(seconds)


def test_what_a_graph_reads_lives_as_long_as_its_timing(monkeypatch):
    device, outputs = VirtualDevice(), []
    device.install(monkeypatch)

    class Tensor:
        pass

    def prepare(mask):
        def call(q, k, v):
            assert mask
            device.work(1e-3)
            made = Tensor()
            outputs.append(weakref.ref(made))
            return made

        return GraphClock().prepare(Contestant(call), [(0, 0, 0)])

    mask = Tensor()
    timed, known = prepare(mask), weakref.ref(mask)
    del mask
    gc.collect()
    assert known() and outputs[-1]()
    del timed
    gc.collect()
    assert not known() and not outputs[-1]()


def test_what_cannot_be_captured_is_timed_call_by_call(monkeypatch):
    device = VirtualDevice(capturable=False)
    device.install(monkeypatch)
    timed = GraphClock().prepare(Contestant(lambda q, k, v: device.work(1e-3)), [(0, 0, 0)] * 2)
    assert timed.how == "10 calls in a burst, no graph: RuntimeError" and timed.sample() == pytest.approx(1e-3)


def test_the_clock_keeps_to_its_stream(monkeypatch):
    """Warm-up, bursts and captures run on the stream that the graph's forward pass ran on."""
    device = VirtualDevice()
    device.install(monkeypatch)
    current, captured = ["default"], []

    @contextlib.contextmanager
    def stream(name):
        current.append(name)
        yield
        current.pop()

    graph = torch.cuda.graph

    def capture(made, stream=None):
        captured.append(stream)
        return graph(made)

    mine = types.SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    seen = set()

    def call(*given):
        seen.add(current[-1] is mine)
        device.work(1e-3)

    timed = GraphClock(mine).prepare(Contestant(call), [(i,) for i in range(3)])
    assert seen == {True} and captured == [mine] and timed.sample() == pytest.approx(1e-3)


def test_a_burst_holds_its_context(monkeypatch):
    device = VirtualDevice(capturable=False)
    device.install(monkeypatch)
    inside = []

    @contextlib.contextmanager
    def context():
        inside.append(1)
        yield
        inside.pop()

    def call(*given):
        assert inside
        device.work(1e-3)

    timed = GraphClock().prepare(Contestant(call, context), [(0,)])
    assert "no graph" in timed.how and timed.sample() == pytest.approx(1e-3)
