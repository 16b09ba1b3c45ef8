"""Calls on GPUs for JAX: XLA brings arrays, scratch memory and the stream; tables are uploaded by the driver."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from splatc.codegen.hopper.shape import ITEM_BYTES
from splatc.codegen.no_torch import import_tvm_ffi
from splatc.codegen.target import arch_of
from splatc.errors import Unsupported
from splatc.ir.score import NO_SCORE
from splatc.ir.terms import Terms
from splatc.runtime.attention import CompiledAttention
from splatc.runtime.bias_gradients import ABSENT_SUMS
from splatc.runtime.driver import Driver, driver
from splatc.runtime.gpu import FindGpu, Framework, Gpu
from splatc.runtime.gpu_call import GpuCall
from splatc.runtime.gradients_gpu import GpuGradients, GradientCall
from splatc.runtime.gradients_portable import PortableGradients
from splatc.runtime.launch import GROUP
from splatc.runtime.tensor_map import ALIGNMENT, Layout
from splatc.runtime.tensors import Shape
from splatc.runtime.term_values import term_values

SCRATCH_ALIGNMENT = 256  # bytes
BYTES = {**ITEM_BYTES, "int32": 4}
OF_HOPPER = "q", "k", "v", "o", "do", "lse", "dlse"  # what gradients take
OF_PORTABLE = "q", "k", "v", "do", "lse", "delta"
RESULTS = "dq", "dk", "dv"

Sizes = Mapping[str, tuple[str, tuple[int, ...]]]  # (dtype, shape) by name


class DriverMemory:
    """Words on a GPU that the driver has allocated."""

    def __init__(self, words: NDArray[np.int32], by: Driver, ordinal: int) -> None:
        self.address = by.upload(words.ctypes.data, words.nbytes, ordinal)
        weakref.finalize(self, by.free, self.address, ordinal).atexit = False

    def used(self, stream: int) -> None:
        """Nothing: the driver frees memory when all work on the GPU has ended."""


@cache
def jax_gpu(ordinal: int) -> Gpu:
    """A GPU by its number in CUDA. Raises Unsupported if there is no driver."""
    ffi = import_tvm_ffi()
    here = driver()
    framework = Framework(
        stream=lambda n: int(ffi.get_raw_stream(ffi.device("cuda", n))), capturing=lambda: False,
        device=lambda: ordinal, on=lambda n: nullcontext(), upload=lambda words, n: DriverMemory(words, here, n),
    )  # fmt: skip
    return Gpu(ordinal, None, here, framework)


def arch_here(ordinal: int) -> str:
    """What to compile for."""
    return arch_of(driver().capability(ordinal))


@dataclass(eq=False)
class GpuCalls:
    """The calls of a compiled mask for arrays of certain sizes, contiguous and (batch, heads, seq, dim), prepared once
    for each GPU."""

    compiled: CompiledAttention
    shape: Shape
    find_gpu: FindGpu = jax_gpu
    _forward: dict[int, GpuCall] = field(default_factory=dict)
    _backward: dict[int, GradientCall] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises Unsupported for what has no call here."""
        spec, length = self.compiled.kernel.spec, self.shape.kv_len
        if spec.score.pruning is not None and spec.kernel == "hopper" and length % GROUP:
            raise Unsupported(f"n:m attention in JAX on a GPU takes {GROUP} keys at a time, of which {length} are no "
                              "multiple: append some that the mask excludes")  # fmt: skip
        self._launcher = self.compiled.launcher_on(self.find_gpu)

    # -- forward -------------------------------------------------------------------------------------------------------

    def forward(self, ordinal: int) -> GpuCall:
        """The call on a GPU."""
        if ordinal not in self._forward:
            s = self.shape
            keys = dense_layout(s.batch, s.kv_heads, s.kv_len, s.head_dim, s.dtype)
            layouts = [dense_layout(s.batch, s.heads, s.q_len, s.head_dim, s.dtype), keys,
                       dense_layout(s.batch, s.kv_heads, s.kv_len, s.v_head_dim, s.dtype)]  # fmt: skip
            self._forward[ordinal] = self._launcher.prepared(s, layouts, ordinal)
        return self._forward[ordinal]

    def attend(self, ordinal: int, arrays: Sequence[int], scratch: int, scale: float, terms: Terms | None) -> None:
        """Into o and lse. arrays: the addresses of q, k, v, o and lse; scratch: of ``scratch_bytes`` of the call's."""
        check_alignment(arrays)
        call = self.forward(ordinal)
        call.start((*arrays, *places(call.scratch, scratch).values()), scale, terms)

    # -- backward ------------------------------------------------------------------------------------------------------

    @property
    def takes(self) -> tuple[str, ...]:
        """The arrays that gradients are computed from. Raises Unsupported where nothing computes them."""
        return OF_HOPPER if isinstance(self._gradients, GpuGradients) else OF_PORTABLE

    def backward(self, ordinal: int) -> GradientCall:
        """The call on a GPU."""
        if ordinal not in self._backward:
            s, how = self.shape, self._gradients
            queries, keys = (s.batch, s.heads, s.q_len), (s.batch, s.kv_heads, s.kv_len)
            layouts = {"q": dense_layout(*queries, s.head_dim, s.dtype), "k": dense_layout(*keys, s.head_dim, s.dtype),
                       "v": dense_layout(*keys, s.v_head_dim, s.dtype),
                       "do": dense_layout(*queries, s.v_head_dim, s.dtype)}  # fmt: skip
            if isinstance(how, GpuGradients):
                layouts["o"] = layouts["do"]
                self._backward[ordinal] = how.prepared(s, layouts, ordinal, NO_SCORE)
            else:
                self._backward[ordinal] = how.prepared(s, layouts, ordinal)
        return self._backward[ordinal]

    def differentiate(self, ordinal: int, arrays: Mapping[str, int], scratch: int, scale: float,
                      terms: Terms | None) -> None:  # fmt: skip
        """Into dq, dk and dv. arrays: their addresses, and those of what is taken."""
        check_alignment(arrays.values())
        call = self.backward(ordinal)
        values = None if terms is None or self.takes == OF_PORTABLE else {**term_values(terms), **ABSENT_SUMS}
        call.start({**arrays, **places(scratch_of(call), scratch)}, scale, values)

    @cached_property
    def _gradients(self) -> GpuGradients | PortableGradients:
        return self.compiled.gradients_on(self.find_gpu)


def scratch_of(call: GradientCall) -> Sizes:
    """What a call needs beside its results."""
    return {name: size for name, size in call.sizes.items() if name not in RESULTS}


def scratch_bytes(sizes: Sizes) -> int:
    """Of memory for all of them."""
    return _end(sizes)[1]


def places(sizes: Sizes, first: int) -> dict[str, int]:
    """The address of each of them in memory that begins at ``first``."""
    return {name: first + offset for name, offset in _end(sizes)[0].items()}


def _end(sizes: Sizes) -> tuple[dict[str, int], int]:
    offsets, end = {}, 0
    for name, (dtype, shape) in sizes.items():
        offsets[name] = end
        end += -(-math.prod(shape) * BYTES[dtype] // SCRATCH_ALIGNMENT) * SCRATCH_ALIGNMENT
    return offsets, end


def dense_layout(batch: int, heads: int, length: int, dim: int, dtype: str) -> Layout:
    """Of a contiguous array."""
    return Layout(batch, heads, length, dim, heads * length * dim, length * dim, dim, BYTES[dtype])


def check_alignment(addresses: Any) -> None:
    """Raise Unsupported for arrays that the kernels cannot read: XLA's own never are."""
    if any(address % ALIGNMENT for address in addresses):
        raise Unsupported(f"an array does not begin at a multiple of {ALIGNMENT} bytes: copy it (x + 0)")
