"""Calls on GPUs for JAX: XLA brings arrays, scratch memory and the stream; tables are uploaded by the driver."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, cached_property

import numpy as np
from numpy.typing import NDArray

from splatc.codegen.hopper.shape import ITEM_BYTES
from splatc.codegen.no_torch import import_tvm_ffi
from splatc.codegen.target import arch_of
from splatc.errors import Unsupported
from splatc.ir.terms import Terms
from splatc.runtime.attention import CompiledAttention
from splatc.runtime.bias_gradients import ABSENT_SUMS
from splatc.runtime.driver import Driver, driver
from splatc.runtime.gpu import FindGpu, Framework, Gpu
from splatc.runtime.gpu_call import GpuCall, Sizes
from splatc.runtime.gradients import Gradients
from splatc.runtime.gradients_gpu import GpuGradients, GradientCall
from splatc.runtime.gradients_portable import PortableGradients
from splatc.runtime.launch import GROUP, output_layout
from splatc.runtime.tensor_map import ALIGNMENT, Layout
from splatc.runtime.tensors import Shape
from splatc.runtime.term_values import term_values

SCRATCH_ALIGNMENT = 256  # bytes
BYTES = {**ITEM_BYTES, "int32": 4}


class DriverMemory:
    """Words on a GPU that the driver has allocated."""

    def __init__(self, words: NDArray[np.int32], by: Driver, ordinal: int) -> None:
        self.address = by.upload(words.ctypes.data, words.nbytes, ordinal)

    def used(self, stream: int) -> None:
        """Nothing: it is kept as long as the process, as calls are."""


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
    _forward: dict[int, GpuCall] = field(default_factory=dict, init=False)
    _backward: dict[int, GradientCall] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        """Raises Unsupported for what has no call here."""
        spec, length = self.compiled.kernel.spec, self.shape.kv_len
        if spec.score.pruning is not None and spec.kernel == "hopper" and length % GROUP:
            raise Unsupported(f"n:m attention in JAX on a GPU takes {GROUP} keys at a time, of which {length} are no "
                              "multiple: append some that the mask excludes")  # fmt: skip
        self._launcher = self.compiled.launcher_on(self.find_gpu)

    @cached_property
    def _layouts(self) -> dict[str, Layout]:
        """Of q, k, v, o and do."""
        queries, size = self.shape, BYTES[self.shape.dtype]
        keys = replace(queries, heads=queries.kv_heads, q_len=queries.kv_len)
        q, k = (output_layout(replace(s, v_head_dim=s.head_dim), "bhsd", size) for s in (queries, keys))
        v, o = (output_layout(s, "bhsd", size) for s in (keys, queries))
        return {"q": q, "k": k, "v": v, "o": o, "do": o}

    def forward(self, ordinal: int) -> GpuCall:
        """The call on a GPU."""
        if ordinal not in self._forward:
            q, k, v, *_ = self._layouts.values()
            self._forward[ordinal] = self._launcher.prepared(self.shape, [q, k, v], ordinal)
        return self._forward[ordinal]

    def attend(self, ordinal: int, arrays: Sequence[int], scratch: int, scale: float, terms: Terms | None) -> None:
        """Into o and lse. arrays: the addresses of q, k, v, o and lse; scratch: of ``scratch_bytes`` of the call's."""
        check_alignment(arrays)
        call = self.forward(ordinal)
        call.start((*arrays, *places(call.scratch, scratch).values()), scale, terms)

    @cached_property
    def _gradients(self) -> GpuGradients | PortableGradients:
        found = self.compiled.gradients_on(self.find_gpu)
        assert not isinstance(found, Gradients)  # of a CPU
        return found

    @property
    def takes(self) -> tuple[str, ...]:
        """The arrays that gradients are computed from. Raises Unsupported where nothing computes them."""
        return self._gradients.takes

    def backward(self, ordinal: int) -> GradientCall:
        """The call of gradients on a GPU."""
        if ordinal not in self._backward:
            self._backward[ordinal] = self._gradients.prepared(self.shape, self._layouts, ordinal)
        return self._backward[ordinal]

    def differentiate(self, ordinal: int, arrays: Mapping[str, int], scratch: int, scale: float,
                      terms: Terms | None) -> None:  # fmt: skip
        """Into dq, dk and dv. arrays: their addresses, and those of what is taken."""
        check_alignment(arrays.values())
        call = self.backward(ordinal)
        values = None if terms is None else {**term_values(terms), **ABSENT_SUMS}
        call.start({**arrays, **places(call.scratch, scratch)}, scale, values)


def scratch_bytes(sizes: Sizes) -> int:
    """Of memory for all of them."""
    return _offsets(sizes)[1]


def places(sizes: Sizes, first: int) -> dict[str, int]:
    """The address of each of them in memory that begins at ``first``."""
    return {name: first + offset for name, offset in _offsets(sizes)[0].items()}


def _offsets(sizes: Sizes) -> tuple[dict[str, int], int]:
    """(where each of them begins, where the last one ends)."""
    offsets, end = {}, 0
    for name, (dtype, shape) in sizes.items():
        offsets[name] = end
        end += -(-math.prod(shape) * BYTES[dtype] // SCRATCH_ALIGNMENT) * SCRATCH_ALIGNMENT
    return offsets, end


def check_alignment(addresses: Iterable[int]) -> None:
    """Raise Unsupported for arrays that the kernels cannot read: XLA's own never are."""
    if any(address % ALIGNMENT for address in addresses):
        raise Unsupported(f"an array does not begin at a multiple of {ALIGNMENT} bytes: copy it (x + 0)")
