"""A GPU without a GPU: the driver's calls on tensors in this computer's memory; kernels are Python functions."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from splatc import oracle
from splatc.codegen.build import CUBIN, PTX, REPORT
from splatc.codegen.tables import build_tables
from splatc.errors import CudaError
from splatc.formats.acsr import ACSR
from splatc.ir.passes import PASSES, Schedule, lower, run_passes
from splatc.ir.program import Cover
from splatc.ir.score import NO_SCORE, Score
from splatc.patterns.pruned import Pruning
from splatc.runtime.driver import MAP_TYPES, LaunchConfig
from splatc.runtime.gpu import Framework, Gpu, TorchMemory
from splatc.runtime.plan import Launch, launches
from splatc.runtime.tensors import Shape

CTYPES = {"pointer": ctypes.c_uint64, "int64": ctypes.c_int64, "int32": ctypes.c_int32, "float32": ctypes.c_float}
WORDS: dict[int, Any] = {2: np.uint16, 4: np.uint32}
ITEM_BYTES = {"int32": 4, "float16": 2, "bfloat16": 2, "float32": 4, "tfloat32": 4}
Kernel = Callable[..., None]  # kernel(grid, **arguments by parameter name); maps arrive as TensorMap


@dataclass
class TensorMap:
    """What cuTensorMapEncodeTiled was told."""

    dtype: str
    address: int
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]

    def __post_init__(self) -> None:
        """What the real one refuses."""
        assert self.dtype in MAP_TYPES and len(self.dims) == len(self.box) == len(self.strides) + 1 == 5
        assert self.address % 16 == 0 and self.address > 0
        assert all(0 < s < 1 << 40 and s % 16 == 0 for s in self.strides), self.strides
        assert all(0 < n <= 1 << 32 for n in self.dims), self.dims
        assert all(0 < b <= 256 for b in self.box), self.box
        assert self.box[0] * ITEM_BYTES[self.dtype] <= 128, "a row of a box is at most the swizzle's 128 bytes"

    def offsets(self, at: tuple[int, ...]) -> np.ndarray:
        """Byte offsets of the box at ``at``, int64 with one axis a dimension, the first dimension last; -1 outside."""
        offset, inside = np.zeros((), np.int64), np.ones((), bool)
        for d in range(4, -1, -1):
            x = at[d] + np.arange(self.box[d])
            offset = offset[..., None] + x * (ITEM_BYTES[self.dtype] if d == 0 else self.strides[d - 1])
            inside = inside[..., None] & (x >= 0) & (x < self.dims[d])
        return np.where(inside, offset, -1)

    def load(self, at: tuple[int, ...]) -> np.ndarray:
        """Values of the box as unsigned words, zero outside: shape (rows of the box, columns)."""
        offset = self.offsets(at)
        out = np.zeros(offset.shape, WORDS[ITEM_BYTES[self.dtype]])
        out[offset >= 0] = self.words()[offset[offset >= 0] // out.itemsize]
        out = out.reshape(-1, self.box[0])
        return tf32(out.view(np.float32)).view(np.uint32) if self.dtype == "tfloat32" else out

    def store(self, at: tuple[int, ...], values: np.ndarray) -> None:
        """Write unsigned words (rows, columns); what lies outside is dropped."""
        offset = self.offsets(at).ravel()
        assert self.dtype != "tfloat32", "a store through such a map rounds"
        assert offset.size == values.size
        inside = offset >= 0
        self.words()[offset[inside] // values.itemsize] = values.ravel()[inside]

    def words(self) -> np.ndarray:
        """The memory that the map reaches, to read and write, as one line of unsigned words."""
        last = ITEM_BYTES[self.dtype] * (self.dims[0] - 1) + sum(
            (n - 1) * s for n, s in zip(self.dims[1:], self.strides))  # fmt: skip
        memory = (ctypes.c_char * (last + ITEM_BYTES[self.dtype])).from_address(self.address)
        return np.frombuffer(memory, WORDS[ITEM_BYTES[self.dtype]])  # type: ignore[call-overload, no-any-return]


def tf32(x: np.ndarray) -> np.ndarray:
    """float32 rounded to the nearest with 11 significant bits."""
    words = x.astype(np.float32).view(np.uint32)
    return ((words + 0xFFF + (words >> 13 & 1)) & 0xFFFFE000).astype(np.uint32).view(np.float32)


@dataclass
class FakeDriver:
    """Has the methods of splatc.runtime.driver.Driver. kernels: what a function's launch does, by name."""

    kernels: dict[str, Kernel]
    parameters: dict[str, list[tuple[str, str]]]
    arch: tuple[int, int] = (9, 0)
    sms: int = 3
    names: list[str] = field(default_factory=list)
    loaded: list[bytes] = field(default_factory=list)
    maps: dict[int, TensorMap] = field(default_factory=dict)
    moved: int = 0  # how often the address of a map was replaced
    launched: list[tuple[str, int, dict[str, Any]]] = field(default_factory=list)  # name, stream, arguments

    def capability(self, ordinal: int) -> tuple[int, int]:
        return self.arch

    def multiprocessors(self, ordinal: int) -> int:
        return self.sms

    def load(self, image: bytes) -> int:
        self.loaded.append(image)
        return len(self.loaded)

    def kernel(self, library: int, name: str, ordinal: int, smem_bytes: int) -> int:
        self.names.append(name)
        return len(self.names)

    def blocks_per_multiprocessor(self, kernel: int, threads: int, smem_bytes: int, ordinal: int) -> int:
        return 1

    def encode_map(self, target: int, dtype: str, address: int, dims: Any, strides: Any, box: Any,
                   swizzled: bool = True) -> None:  # fmt: skip
        assert target % 128 == 0
        self.maps[target] = TensorMap(dtype, address, tuple(dims), tuple(strides), tuple(box))

    def replace_address(self, target: int, address: int) -> None:
        assert address % 16 == 0
        self.moved += 1
        self.maps[target].address = address

    def launch(self, config: int, kernel: int, parameters: int, ordinal: int) -> None:
        settings, name = LaunchConfig.from_address(config), self.names[kernel - 1]
        values: dict[str, Any] = {}
        addresses = (ctypes.c_void_p * len(self.parameters[name])).from_address(parameters)
        for address, (kind, parameter) in zip(addresses, self.parameters[name], strict=True):
            if kind == "map":
                values[parameter] = self.maps[address]
            else:
                values[parameter] = CTYPES[kind].from_address(address).value
        if not all((settings.grid_x, settings.grid_y, settings.grid_z)):
            raise CudaError("an empty grid")
        self.launched.append((name, settings.stream or 0, values))
        self.kernels[name]((settings.grid_x, settings.grid_y, settings.grid_z), **values)


@dataclass
class FakeTorch:
    """What a Gpu asks torch; set the fields to change the answers."""

    stream: int = 7
    capturing: bool = False
    device: int = 0
    entered: list[int] = field(default_factory=list)
    uploads: int = 0

    @contextmanager
    def on(self, ordinal: int) -> Iterator[None]:
        before, self.device = self.device, ordinal
        self.entered.append(ordinal)
        yield
        self.device = before

    def upload(self, words: Any, ordinal: int) -> TorchMemory:
        self.uploads += 1
        return TorchMemory(words, "cpu")

    def hooks(self) -> Framework:
        return Framework(lambda ordinal: self.stream, lambda: self.capturing, lambda: self.device, self.on,
                         self.upload)  # fmt: skip


def fake_gpu(driver: FakeDriver, torch_: FakeTorch, ordinal: int = 0) -> Gpu:
    """A GPU whose memory is the computer's."""
    import torch

    return Gpu(ordinal, torch.device("cpu"), driver, torch_.hooks())  # type: ignore[arg-type]


def write_built(folder: Path, functions: list[dict[str, Any]]) -> None:
    """A built folder as codegen/build.py leaves it, with binaries that no driver would take; an "image" for all
    functions that do not name theirs."""
    functions = [{"image": "kernel", **one} for one in functions]
    (folder / REPORT).write_text(json.dumps({"functions": functions}))
    for name in {f"{one['image']}{suffix}" for one in functions for suffix in (CUBIN, PTX)}:
        (folder / name).write_bytes(name.encode())


def plan(patterns: Sequence[Any], shape: Shape, schedule: Schedule, limits: Any,
         score: Score = NO_SCORE) -> list[Launch]:  # fmt: skip
    """The launches of a pattern for all heads, or of one for each."""
    programs = [
        run_passes(lower(ACSR.from_pattern(pattern, shape.q_len, shape.kv_len), score), schedule, PASSES)
        for pattern in patterns
    ]
    tables = [
        tuple(build_tables(d, schedule.fill_empty) for _, d in program.domains if isinstance(d, Cover))
        for program in programs
    ]
    return launches(tables, [0] * shape.heads if len(tables) == 1 else list(range(shape.heads)), *limits)


def draw(q_len: int = 100, kv_len: int | None = None, heads: int = 2, kv_heads: int | None = None, batch: int = 1,
         dim: int = 16) -> list[Any]:  # fmt: skip
    """Random q, k, v on the CPU."""
    import torch

    generator = torch.Generator().manual_seed(q_len)
    kv_len, kv_heads = kv_len or q_len, kv_heads or heads
    shapes = (batch, heads, q_len, dim), (batch, kv_heads, kv_len, dim), (batch, kv_heads, kv_len, dim)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


def check(got: Any, qkv: Any, dense: np.ndarray, scale: float | None, most: tuple[float, float],
          pruning: Pruning | None = None) -> None:  # fmt: skip
    """(o, lse) are those of the oracle: most: relative error of o, absolute error of lse."""
    q, k, v = (x.double().numpy() for x in qkv)
    want, want_lse = oracle.attention(q, k, v, dense, scale, pruning=pruning)
    o, lse = (x.double().numpy() for x in got)
    assert oracle.relative_error(o, want) < most[0]
    assert np.array_equal(np.isneginf(lse), np.isneginf(want_lse))
    finite = np.isfinite(want_lse)
    assert np.abs(lse[finite] - want_lse[finite]).max(initial=0) < most[1]
