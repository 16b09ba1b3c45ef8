"""A call on a GPU, prepared once for tensors of the same shapes, strides and device; then it only moves and starts."""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from splatc.codegen.kernel import KernelSpec
from splatc.runtime.arguments import Arguments, Bound, Function
from splatc.runtime.driver import EARLY_START, LaunchConfig
from splatc.runtime.gpu import DeviceTables, Gpu
from splatc.runtime.plan import Launch
from splatc.runtime.tensor_map import Layout
from splatc.runtime.tensors import Shape
from splatc.runtime.work import Work


@dataclass(frozen=True)
class Request:
    """What a kernel family makes steps of.

    functions: the kernel's, the attention first. tables: of ``launches``, uploaded. works: of each launch, for kernels
    that hand it out (hopper). layouts: of q, k, v and o. address: of some memory on the GPU. cap: the softcap, or 0.
    """

    gpu: Gpu
    spec: KernelSpec
    shape: Shape
    functions: tuple[Function, ...]
    launches: tuple[Launch, ...]
    works: tuple[Work, ...]
    tables: DeviceTables
    layouts: Mapping[str, Layout]
    address: int
    cap: float = 0.0

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
        import torch

        gpu, shape, spec = request.gpu, request.shape, request.spec
        self._gpu, self._ordinal, self._tables = gpu, gpu.ordinal, request.tables
        self._torch, self._launch = gpu.torch, gpu.driver.launch
        self._lock = threading.Lock()
        rows = (shape.batch, shape.heads, shape.q_len)
        order = rows if layout == "bhsd" else (shape.batch, shape.q_len, shape.heads)
        self._o = contiguous(*order, shape.v_head_dim)
        self._lse = contiguous(*rows)
        self._empty, self._float32 = torch.empty_strided, torch.float32  # half a microsecond faster than torch.empty
        self._dtype = getattr(torch, spec.dtype)
        self._part_rows = request.part_tiles * spec.tile_m
        self._part_o = contiguous(self._part_rows * shape.v_head_dim)
        self._part_lse = contiguous(self._part_rows)
        names = ("q", "k", "v", "o", "lse", "queue", "part_o", "part_lse")
        self._bounds = [self._bound(name, steps, request.address) for name in names]
        self._queued = any("queue" in step.holders for step in steps)
        self._scales = [slot for step in steps if (slot := step.arguments.slot("scale")) is not None]
        self._scale: float | None = None
        self._stream = 0
        self._configs = [config_of(step) for step in steps]
        self._steps = steps  # what the pointers below point into
        self._starts = [
            (ctypes.byref(config), step.function.kernel, step.arguments.array)
            for config, step in zip(self._configs, steps, strict=True)
        ]

    def _bound(self, name: str, steps: list[Step], address: int) -> Bound:
        slots = [step.arguments.slot(step.holders[name]) for step in steps if name in step.holders]
        maps = [one for step in steps for one in step.arguments.maps.values() if one.tensor == name]
        return Bound(self._gpu.driver, slots, maps, address)

    def __call__(self, q: int, k: int, v: int, scale: float) -> tuple[Any, Any]:
        """(o, lse) of tensors at these addresses that are as this call was prepared for."""
        if self._torch.device() != self._ordinal:
            with self._torch.on(self._ordinal):
                return self._run(q, k, v, scale)
        return self._run(q, k, v, scale)

    def _run(self, q: int, k: int, v: int, scale: float) -> tuple[Any, Any]:
        empty, device = self._empty, self._gpu.device
        o = empty(*self._o, dtype=self._dtype, device=device)
        lse = empty(*self._lse, dtype=self._float32, device=device)
        stream, captured = self._torch.stream(self._ordinal), self._torch.capturing()
        queue = self._gpu.queue_slots.take(captured) if self._queued else 0
        addresses = [q, k, v, o.data_ptr(), lse.data_ptr(), queue]
        if self._part_rows:
            part_o = empty(*self._part_o, dtype=self._dtype, device=device)
            part_lse = empty(*self._part_lse, dtype=self._float32, device=device)
            addresses += [part_o.data_ptr(), part_lse.data_ptr()]
        with self._lock:
            for bound, address in zip(self._bounds, addresses):  # noqa: B905  (without scratch there are fewer)
                if bound.address != address:
                    bound.move(address)
            if scale != self._scale:
                for slot in self._scales:
                    slot.value = scale
                self._scale = scale
            if stream != self._stream:
                for config in self._configs:
                    config.stream = stream
                self._stream = stream
            self._tables.used(stream, captured)
            for start in self._starts:
                self._launch(*start, self._ordinal)
        return o, lse


def contiguous(*sizes: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(sizes, strides) of a contiguous tensor."""
    return sizes, tuple(math.prod(sizes[i + 1 :]) for i in range(len(sizes)))


def config_of(step: Step) -> LaunchConfig:
    """How the driver is to start a step; the stream is set at each call."""
    config = LaunchConfig(*step.grid, step.function.threads, 1, 1, step.function.smem_bytes)
    if step.early:
        config.attributes, config.attribute_count = ctypes.addressof(EARLY_START), 1
    return config
