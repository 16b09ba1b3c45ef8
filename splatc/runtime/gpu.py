"""One GPU as launches see it: its driver, a framework's streams and memory, the kernels loaded on it, queue slots,
uploaded tables."""

from __future__ import annotations

import itertools
import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from splatc.codegen.build import CUBIN, PTX, REPORT
from splatc.codegen.target import arch_of
from splatc.codegen.toolchain import INSTALL
from splatc.errors import CompileError, InvalidInput, Unsupported
from splatc.runtime.arguments import Function
from splatc.runtime.driver import Driver, driver

SLOTS = 1024  # queue slots that eager launches take in turn
CAPTURED_SLOTS = 1 << 16  # those that captured launches keep
ALIGNMENT = 128  # bytes, of each table on a device

_captured: list[Any] = []  # what graphs refer to: kept as long as the process, because a graph may be


class Uploaded(Protocol):
    """Memory on a GPU, kept as long as this is."""

    address: int

    def used(self, stream: int) -> None:
        """A launch on a stream reads it."""


@dataclass(frozen=True)
class Framework:
    """What launches ask the framework whose arrays they compute with.

    stream(ordinal): the current stream's handle; capturing(): whether it is being captured; device(): the current GPU;
    on(ordinal): a context in which that GPU is the current one; upload(words, ordinal): a copy of int32 words there.
    """

    stream: Callable[[int], int]
    capturing: Callable[[], bool]
    device: Callable[[], int]
    on: Callable[[int], AbstractContextManager[Any]]
    upload: Callable[[NDArray[np.int32], int], Uploaded]


@dataclass(eq=False)
class Gpu:
    """A GPU by its number. device: its name for torch, None for other frameworks."""

    ordinal: int
    device: Any
    driver: Driver
    framework: Framework
    _slots: _QueueSlots | None = field(default=None, repr=False)

    def refuse_capture(self, what: str) -> None:
        """Raise Unsupported if a graph is being captured: ``what`` must have happened before."""
        if self.framework.capturing():
            raise Unsupported(
                f"{what} cannot be done while a CUDA graph is captured: call once with the same shapes before"
            )

    @property
    def queue_slots(self) -> _QueueSlots:
        """The counters of work queues on this GPU."""
        if self._slots is None:
            self.refuse_capture("allocating work queues")
            self._slots = _QueueSlots(self)
        return self._slots


FindGpu = Callable[[int], Gpu]


class _QueueSlots:
    """Pairs of int32 counters, zero between launches, so that launches that run at the same time never share one."""

    def __init__(self, on: Gpu, eager: int = SLOTS, captured: int = CAPTURED_SLOTS) -> None:
        self._device = on.device
        self._memory = on.framework.upload(np.zeros(2 * (eager + captured), np.int32), on.ordinal)
        first = self._memory.address
        self._eager = itertools.cycle(range(first, first + 8 * eager, 8))
        self._captured = iter(range(first + 8 * eager, first + 8 * (eager + captured), 8))

    def take(self, captured: bool) -> int:
        """The address of a pair: of the eager ones in turn, or one that nobody else will ever get."""
        if not captured:
            return next(self._eager)
        try:
            return next(self._captured)
        except StopIteration:
            import torch

            _captured.append(torch.zeros(2, dtype=torch.int32, device=self._device))  # zeroed in the graph
            return int(_captured[-1].data_ptr())


class DeviceTables:
    """Arrays of int32 words on a GPU, in one allocation."""

    def __init__(self, gpu: Gpu, arrays: Sequence[Mapping[str, NDArray[Any]]]) -> None:
        """arrays: by name, for each launch. Raises Unsupported under capture: an upload waits for the GPU."""
        gpu.refuse_capture("uploading the tables of a mask")
        self._offsets: dict[tuple[int, str], int] = {}
        end = 0
        for i, one in enumerate(arrays):
            for name, array in one.items():
                self._offsets[i, name] = end
                end += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
        words = np.zeros(max(end, ALIGNMENT) // 4, np.int32)
        for (i, name), offset in self._offsets.items():
            flat = np.ascontiguousarray(arrays[i][name]).view(np.int32).ravel()
            words[offset // 4 : offset // 4 + len(flat)] = flat
        self._memory = gpu.framework.upload(words, gpu.ordinal)
        self.first = self._memory.address
        self._seen: set[int] = set()
        self._kept = False

    def address(self, launch: int, name: str) -> int:
        """Where an array lies."""
        return self.first + self._offsets[launch, name]

    def used(self, stream: int, captured: bool) -> None:
        """A launch on a stream reads the tables: they must outlive it, or the graph that it is captured in."""
        if captured:
            if not self._kept:
                self._kept = True
                _captured.append(self)
        elif stream not in self._seen:
            self._seen.add(stream)
            self._memory.used(stream)


class TorchMemory:
    """Words in a tensor of torch."""

    def __init__(self, words: NDArray[np.int32], device: Any) -> None:
        import torch

        self._tensor = torch.from_numpy(words).to(device)
        self.address = int(self._tensor.data_ptr())

    def used(self, stream: int) -> None:
        """Torch's allocator waits for the stream, which is its current one."""
        if self._tensor.is_cuda:
            import torch

            self._tensor.record_stream(torch.cuda.current_stream(self._tensor.device))


@cache
def gpu(ordinal: int) -> Gpu:
    """A GPU of this process. Raises Unsupported if there is no driver."""
    import torch

    hooks = Framework(
        torch._C._cuda_getCurrentRawStream, torch._C._cuda_isCurrentStreamCapturing, torch._C._cuda_getDevice,
        torch.cuda.device, lambda words, ordinal: TorchMemory(words, torch.device("cuda", ordinal)),
    )  # fmt: skip
    return Gpu(ordinal, torch.device("cuda", ordinal), driver(), hooks)


_loading = threading.Lock()


def load_functions(folder: Path, arch: str, on: Gpu) -> tuple[Function, ...]:
    """The functions of a built folder, loaded and ready on a GPU. Raises InvalidInput if the GPU cannot run them."""
    with _loading:
        return _load_functions(folder, arch, on)


@lru_cache(maxsize=1024)
def _load_functions(folder: Path, arch: str, on: Gpu) -> tuple[Function, ...]:
    suffix = image_for(arch, on.driver.capability(on.ordinal), on.ordinal)
    functions = json.loads((folder / REPORT).read_text())["functions"]
    images = {f["image"]: folder / f"{f['image']}{suffix}" for f in functions}
    if not all(path.exists() for path in images.values()):
        raise CompileError(f"{folder} holds source only: {INSTALL}, then compile again")
    on.refuse_capture("loading a kernel")
    libraries = {image: on.driver.load(path.read_bytes()) for image, path in images.items()}
    return tuple(
        Function(
            f["name"], on.driver.kernel(libraries[f["image"]], f["name"], on.ordinal, f["smem_bytes"]), f["threads"],
            f["smem_bytes"], tuple((kind, parameter) for kind, parameter in f["parameters"]),
        )
        for f in functions
    )  # fmt: skip


def image_for(arch: str, capability: tuple[int, int], ordinal: int = 0) -> str:
    """Which files of a kernel for ``arch`` a GPU runs: cubins, or PTX for the driver to compile.

    A plain sm_NN runs on later GPUs of its generation as it is, on later generations as PTX; sm_NNa only on that very
    GPU, sm_NNf on its generation. Raises InvalidInput for other GPUs.
    """
    match = re.fullmatch(r"sm_(\d+)(\d)([af]?)", arch)
    assert match is not None, arch
    wanted, suffix = (int(match[1]), int(match[2])), match[3]
    if capability == wanted or (suffix != "a" and capability[0] == wanted[0] and capability > wanted):
        return CUBIN
    if not suffix and capability > wanted:
        return PTX
    here = arch_of(capability)
    raise InvalidInput(f"the kernel is compiled for {arch} but GPU {ordinal} is {here}: compile again for {here}")
