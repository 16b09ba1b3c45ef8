"""The CUDA driver (libcuda) by ctypes: only what loading and launching a kernel needs.

Handles are plain ints. Every call raises CudaError with the driver's own words and what to do about them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_uint, c_uint32, c_uint64, c_void_p
from functools import cache
from typing import Any

from splatc.errors import CompileError, CudaError, Unsupported

MAP_BYTES = 128  # of a CUtensorMap, which lies at a multiple of as many
MAP_TYPES = {"int32": 3, "float16": 6, "float32": 7, "bfloat16": 9, "tfloat32": 11}  # CUtensorMapDataType
_MULTIPROCESSORS, _CAPABILITY_MAJOR, _CAPABILITY_MINOR = 16, 75, 76  # CUdevice_attribute
_MAX_DYNAMIC_SMEM = 8  # CUfunction_attribute
_NO_INTERLEAVE, _NO_SWIZZLE, _SWIZZLE_128B, _PROMOTE_128B, _ZERO_FILL = 0, 0, 3, 2, 0
INVALID_CONTEXT = 201
_ADVICE = {
    200: "report this kernel", 209: "compile it again for this GPU", 218: "report this kernel",
    222: "update the NVIDIA driver, or pass target='sm_..' of this GPU", 2: "free GPU memory",
    700: "report this mask; the process must be restarted", 716: "report this mask; the process must be restarted",
}  # fmt: skip


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        *((name, c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "smem_bytes")),
        ("stream", c_void_p), ("attributes", c_void_p), ("attribute_count", c_uint),
    )  # fmt: skip


class LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute, with a number as its value."""

    _fields_ = (("id", c_uint), ("_", c_uint), ("value", c_int), ("_rest", c_uint * 15))


# The kernel may start while the one before it in the stream still runs: it waits for it by itself (griddepcontrol).
_PROGRAMMATIC_SERIALIZATION = 6
EARLY_START = LaunchAttribute(_PROGRAMMATIC_SERIALIZATION, 0, 1)


class Driver:
    """The functions of one libcuda. Thread-safe, as the driver itself is."""

    def __init__(self, library: Any) -> None:
        """library: what ctypes loaded. Raises Unsupported if it is older than CUDA 12."""
        self._library = library
        try:
            self._declare()
        except AttributeError as error:
            raise Unsupported(f"the NVIDIA driver is older than CUDA 12 ({error}): update it") from None
        self.launch_raw = library.cuLaunchKernelEx
        self.replace_address_raw = library.cuTensorMapReplaceAddress

    def _declare(self) -> None:
        signatures: dict[str, tuple[Any, ...]] = {
            "cuGetErrorName": (c_int, POINTER(c_char_p)), "cuGetErrorString": (c_int, POINTER(c_char_p)),
            "cuDeviceGet": (POINTER(c_int), c_int), "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
            "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int), "cuCtxSetCurrent": (c_void_p,),
            "cuLibraryLoadData": (POINTER(c_void_p), c_char_p, c_void_p, c_void_p, c_uint, c_void_p, c_void_p, c_uint),
            "cuLibraryGetKernel": (POINTER(c_void_p), c_void_p, c_char_p),
            "cuKernelSetAttribute": (c_int, c_int, c_void_p, c_int),
            "cuOccupancyMaxActiveBlocksPerMultiprocessor": (POINTER(c_int), c_void_p, c_int, c_size_t),
            "cuTensorMapEncodeTiled": (c_void_p, c_int, c_uint32, c_void_p, POINTER(c_uint64), POINTER(c_uint64),
                                       POINTER(c_uint32), POINTER(c_uint32), c_int, c_int, c_int, c_int),
            "cuTensorMapReplaceAddress": (c_void_p, c_void_p),
            "cuLaunchKernelEx": (c_void_p, c_void_p, c_void_p, c_void_p),
            "cuMemAlloc_v2": (POINTER(c_uint64), c_size_t), "cuMemcpyHtoD_v2": (c_uint64, c_void_p, c_size_t),
            "cuStreamSynchronize": (c_void_p,),
        }  # fmt: skip
        for name, arguments in signatures.items():
            getattr(self._library, name).argtypes = arguments

    def check(self, status: int, doing: str) -> None:
        """Raise CudaError if status, of a call made while ``doing`` something, is an error."""
        if status:
            name, words = (self._text(f, status) for f in ("cuGetErrorName", "cuGetErrorString"))
            advice = f": {_ADVICE[status]}" if status in _ADVICE else ""
            raise CudaError(f"{doing} failed: {words} ({name}){advice}")

    def _text(self, function: str, status: int) -> str:
        text = c_char_p()
        getattr(self._library, function)(status, ctypes.byref(text))
        return (text.value or b"unknown error").decode()

    def _device(self, ordinal: int) -> int:
        device = c_int()
        self.check(self._library.cuDeviceGet(ctypes.byref(device), ordinal), f"finding GPU {ordinal}")
        return device.value

    def _attribute(self, ordinal: int, attribute: int) -> int:
        value = c_int()
        status = self._library.cuDeviceGetAttribute(ctypes.byref(value), attribute, self._device(ordinal))
        self.check(status, f"asking about GPU {ordinal}")
        return value.value

    def capability(self, ordinal: int) -> tuple[int, int]:
        """The compute capability of a GPU: (9, 0) for sm_90."""
        return self._attribute(ordinal, _CAPABILITY_MAJOR), self._attribute(ordinal, _CAPABILITY_MINOR)

    def multiprocessors(self, ordinal: int) -> int:
        return self._attribute(ordinal, _MULTIPROCESSORS)

    def make_current(self, ordinal: int) -> None:
        """Make a GPU's primary context, the one that torch uses, current in this thread."""
        context = c_void_p()
        status = self._library.cuDevicePrimaryCtxRetain(ctypes.byref(context), self._device(ordinal))
        self.check(status or self._library.cuCtxSetCurrent(context), f"using GPU {ordinal}")

    def upload(self, source: int, size: int, ordinal: int) -> int:
        """The address of a copy, on a GPU, of ``size`` bytes of this computer's memory; it is never freed."""
        self.make_current(ordinal)
        copy = c_uint64()
        self.check(self._library.cuMemAlloc_v2(ctypes.byref(copy), size), f"allocating {size} bytes on GPU {ordinal}")
        status = self._library.cuMemcpyHtoD_v2(copy, source, size)
        status = status or self._library.cuStreamSynchronize(None)  # other streams do not wait for a copy under way
        self.check(status, f"copying {size} bytes to GPU {ordinal}")
        return copy.value

    def load(self, image: bytes) -> int:
        """A library from a cubin, or from PTX, which the driver then compiles. It is never unloaded."""
        library = c_void_p()
        status = self._library.cuLibraryLoadData(ctypes.byref(library), image + b"\0", None, None, 0, None, None, 0)
        self.check(status, "loading a kernel")
        return library.value or 0

    def kernel(self, library: int, name: str, ordinal: int, smem_bytes: int) -> int:
        """A function of a library, allowed smem_bytes of dynamic shared memory on a GPU."""
        kernel = c_void_p()
        self.check(self._library.cuLibraryGetKernel(ctypes.byref(kernel), library, name.encode()), f"finding {name}")
        status = self._library.cuKernelSetAttribute(_MAX_DYNAMIC_SMEM, smem_bytes, kernel, self._device(ordinal))
        self.check(status, f"giving {name} {smem_bytes} bytes of shared memory")
        return kernel.value or 0

    def blocks_per_multiprocessor(self, kernel: int, threads: int, smem_bytes: int, ordinal: int) -> int:
        """How many blocks of a kernel one multiprocessor of a GPU, the current one, holds. CompileError if none."""
        blocks = c_int()
        arguments = ctypes.byref(blocks), kernel, threads, smem_bytes
        status = self._library.cuOccupancyMaxActiveBlocksPerMultiprocessor(*arguments)
        if status == INVALID_CONTEXT:
            self.make_current(ordinal)
            status = self._library.cuOccupancyMaxActiveBlocksPerMultiprocessor(*arguments)
        self.check(status, "asking how many blocks fit a multiprocessor")
        if blocks.value < 1:
            raise CompileError(f"a block of {threads} threads and {smem_bytes} bytes does not fit this GPU")
        return blocks.value

    def encode_map(self, target: int, dtype: str, address: int, dims: Sequence[int], strides: Sequence[int],
                   box: Sequence[int], swizzled: bool = True) -> None:  # fmt: skip
        """Write a CUtensorMap to the memory at ``target``: 128-byte swizzle or none, zeros outside.

        dims, box: elements, the contiguous dimension first; strides: bytes, one fewer.
        """
        rank = len(dims)
        status = self._library.cuTensorMapEncodeTiled(
            target, MAP_TYPES[dtype], rank, address, (c_uint64 * rank)(*dims), (c_uint64 * (rank - 1))(*strides),
            (c_uint32 * rank)(*box), (c_uint32 * rank)(*[1] * rank),
            _NO_INTERLEAVE, _SWIZZLE_128B if swizzled else _NO_SWIZZLE, _PROMOTE_128B, _ZERO_FILL,
        )  # fmt: skip
        self.check(status, f"describing a tensor of {tuple(dims)} with strides {tuple(strides)} to the GPU")

    def replace_address(self, target: int, address: int) -> None:
        """Point the CUtensorMap at ``target`` elsewhere."""
        if status := self.replace_address_raw(target, address):
            self.check(status, "pointing a tensor map at a tensor")

    def launch(self, config: int, kernel: int, parameters: int, ordinal: int) -> None:
        """Start a kernel. The address of a LaunchConfig, and of an array of pointers to the parameters' values."""
        status = self.launch_raw(config, kernel, parameters, None)
        if status == INVALID_CONTEXT:  # a thread that has not used this GPU yet
            self.make_current(ordinal)
            status = self.launch_raw(config, kernel, parameters, None)
        if status:
            self.check(status, "starting a kernel")


@cache
def driver() -> Driver:
    """The driver of this machine. Raises Unsupported if there is none."""
    try:
        return Driver(ctypes.CDLL("libcuda.so.1"))
    except OSError:
        raise Unsupported("no NVIDIA driver (libcuda.so.1) here: kernels for a GPU compile but do not run") from None
