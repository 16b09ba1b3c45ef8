"""A call on a GPU, prepared once for tensors of the same shapes, strides and device; then it only moves and starts."""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from splatc.codegen.kernel import KernelSpec
from splatc.runtime.arguments import Arguments, Bound, Function
from splatc.runtime.driver import EARLY_START, LaunchConfig
from splatc.runtime.gpu import DeviceTables, Gpu
from splatc.runtime.plan import Launch
from splatc.runtime.tensor_map import Layout
from splatc.runtime.tensors import Shape
from splatc.runtime.term_values import ABSENT, Slots, term_values
from splatc.runtime.work import Work

if TYPE_CHECKING:
    from splatc.ir.terms import Terms

Allocate = Callable[[], Any]
Sizes = Mapping[str, tuple[str, tuple[int, ...]]]  # (dtype, shape) by name


@dataclass(frozen=True)
class Request:
    """What a kernel family makes steps of.

    functions: the kernel's, the attention first. tables: of ``launches``, uploaded. works: of each launch, for kernels
    that hand it out (hopper). layouts: of q, k, v and o. cap: the softcap, or 0. lse_rows: 0, or of an (O, LSE) that
    the results are merged into how far one head's LSE is from the next (hopper).
    """

    gpu: Gpu
    spec: KernelSpec
    shape: Shape
    functions: tuple[Function, ...]
    launches: tuple[Launch, ...]
    works: tuple[Work, ...]
    tables: DeviceTables
    layouts: Mapping[str, Layout]
    cap: float = 0.0
    lse_rows: int = 0

    @property
    def address(self) -> int:
        """Of some memory on the GPU, for what is described before there is a call."""
        return self.tables.first

    @property
    def part_tiles(self) -> int:
        """Scratch tiles: as many as the launch that needs most."""
        return max((work.part_tiles for work in self.works), default=0)


@dataclass(frozen=True)
class Step:
    """One function to start. holders: the parameter that takes the address of a tensor. early: the function waits by
    itself for the kernels before, and may start before they end."""

    function: Function
    arguments: Arguments
    grid: tuple[int, int, int]
    holders: Mapping[str, str]
    early: bool = False


class GpuCall:
    """Steps, and what each call puts into them: addresses, the scale, the stream."""

    def __init__(self, request: Request, steps: list[Step], layout: str) -> None:
        gpu = request.gpu
        self._ordinal, self._tables = gpu.ordinal, request.tables
        self._framework, self._launch = gpu.framework, gpu.driver.launch
        self._lock = threading.Lock()
        self.scratch = _scratch_of(request)
        if gpu.device is not None:  # torch allocates results
            self._new_o, self._new_lse, *self._new_parts = _allocations(request, self.scratch, layout)
        names = ("q", "k", "v", "o", "lse", *self.scratch)
        self._bounds = [self._bound(gpu, name, steps, request.address) for name in names]
        self._addresses: tuple[int, ...] = ()  # of the last call
        self._queues = [slot for step in steps if "queue" in step.holders
                        if (slot := step.arguments.slot(step.holders["queue"])) is not None]  # fmt: skip
        self._take_queue = gpu.queue_slots.take if self._queues else None
        self._scales = [slot for step in steps if (slot := step.arguments.slot("scale")) is not None]
        self._scale: float | None = None
        self._terms = Slots(steps, ABSENT)
        self._stream: int | None = None
        self._configs = [config_of(step) for step in steps]
        self._steps = steps  # what the addresses below are of
        self._starts = [start_of(config, step) for config, step in zip(self._configs, steps, strict=True)]

    @staticmethod
    def _bound(gpu: Gpu, name: str, steps: list[Step], address: int) -> Bound:
        slots = [step.arguments.slot(step.holders[name]) for step in steps if name in step.holders]
        maps = [one for step in steps for one in step.arguments.maps.values() if one.tensor == name]
        return Bound(gpu.driver, slots, maps, address)

    def __call__(self, q: int, k: int, v: int, scale: float, terms: Terms | None = None) -> tuple[Any, Any]:
        """(o, lse), torch tensors, of q, k and v at these addresses that are as this call was prepared for."""
        ask, ordinal = self._framework, self._ordinal
        if ask.device() != ordinal:
            with ask.on(ordinal):
                return self(q, k, v, scale, terms)
        o, lse = self._new_o(), self._new_lse()
        addresses: tuple[int, ...] = (q, k, v, o.data_ptr(), lse.data_ptr())
        if self._new_parts:
            parts = [new() for new in self._new_parts]
            addresses += tuple(part.data_ptr() for part in parts)
        self.start(addresses, scale, terms)
        return o, lse

    def into(self, q: int, k: int, v: int, o: int, lse: int, scale: float) -> None:
        """Compute into o and lse at these addresses, on the current stream of the GPU."""
        ask, ordinal = self._framework, self._ordinal
        if ask.device() != ordinal:
            with ask.on(ordinal):
                return self.into(q, k, v, o, lse, scale)
        parts = [new() for new in self._new_parts]
        self.start((q, k, v, o, lse, *(part.data_ptr() for part in parts)), scale)

    def start(self, addresses: tuple[int, ...], scale: float, terms: Terms | None = None) -> None:
        """Compute for q, k, v, o, lse and ``scratch`` at these addresses, on the current stream of the GPU, which is
        the current one."""
        ask, ordinal = self._framework, self._ordinal
        stream, captured = ask.stream(ordinal), ask.capturing()
        with self._lock:
            if addresses != self._addresses:
                self._move(addresses)
            if scale != self._scale:
                self._rescale(scale)
            if terms is not None:
                self._terms.fill(term_values(terms))
            if stream != self._stream or captured:
                self._follow(stream, captured)
            if self._take_queue:
                queue = self._take_queue(captured)
                for slot in self._queues:
                    slot.value = queue
            for config, kernel, parameters in self._starts:
                self._launch(config, kernel, parameters, ordinal)

    def _move(self, addresses: tuple[int, ...]) -> None:
        for bound, address in zip(self._bounds, addresses, strict=True):
            if bound.address != address:
                bound.move(address)
        self._addresses = addresses

    def _rescale(self, scale: float) -> None:
        for slot in self._scales:
            slot.value = scale
        self._scale = scale

    def _follow(self, stream: int, captured: bool) -> None:
        """Start the next kernels on this stream, or in the graph that is captured on it."""
        for config in self._configs:
            config.stream = stream
        self._tables.used(stream, captured)
        self._stream = stream


def _scratch_of(request: Request) -> Sizes:
    """What a call needs beside its results: part_o and part_lse, if any rows are in parts."""
    rows = request.part_tiles * request.spec.tile_m
    if not rows:
        return {}
    return {"part_o": (request.spec.dtype, (rows * request.shape.v_head_dim,)), "part_lse": ("float32", (rows,))}


def _allocations(request: Request, scratch: Sizes, layout: str) -> tuple[Allocate, ...]:
    """Of o, lse and scratch, by torch."""
    import torch

    shape, device = request.shape, request.gpu.device
    rows = (shape.batch, shape.heads, shape.q_len)
    order = rows if layout == "bhsd" else (shape.batch, shape.q_len, shape.heads)
    o = allocation(device, getattr(torch, request.spec.dtype), *order, shape.v_head_dim)
    parts = (allocation(device, getattr(torch, dtype), *sizes) for dtype, sizes in scratch.values())
    return o, allocation(device, torch.float32, *rows), *parts


def allocation(device: Any, dtype: Any, *sizes: int) -> Allocate:
    """What allocates a contiguous tensor of these sizes, not initialised, on ``device``, which is current then.

    By the function that programs of torch.compile call: it goes around PyTorch's dispatcher, in 0.6 us. Where a PyTorch
    has none, by torch.empty_like of one value that stands for the tensor, in 1.0 us; functions that are given sizes
    take longer.
    """
    import torch

    direct = getattr(torch._C._dynamo.guards, f"_empty_strided_{device.type}", None)
    if direct is None:
        return partial(torch.empty_like, torch.empty(1, dtype=dtype, device=device).expand(sizes))
    return partial(direct, *contiguous(*sizes), dtype)


def contiguous(*sizes: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(sizes, strides) of a contiguous tensor."""
    return sizes, tuple(math.prod(sizes[i + 1 :]) for i in range(len(sizes)))


def config_of(step: Step) -> LaunchConfig:
    """How the driver is to start a step; the stream is set at each call."""
    config = LaunchConfig(*step.grid, step.function.threads, 1, 1, step.function.smem_bytes)
    if step.early:
        config.attributes, config.attribute_count = ctypes.addressof(EARLY_START), 1
    return config


def start_of(config: LaunchConfig, step: Step) -> tuple[int, int, int]:
    """What the driver's launch takes of a step: addresses, good as long as ``config`` and ``step`` are."""
    return ctypes.addressof(config), step.function.kernel, ctypes.addressof(step.arguments.array)
