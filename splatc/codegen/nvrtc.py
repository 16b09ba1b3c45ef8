"""Compiling generated CUDA in this process with NVRTC: needs neither a GPU nor a driver.

The library and its headers come from the pip packages nvidia-cuda-nvrtc, -runtime and -cccl, or from a CUDA toolkit.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

from splatc.codegen.nvcc import toolkits
from splatc.codegen.ptxas import Compiled, first_error
from splatc.errors import CompileError

OPTIONS = (
    "-std=c++17", "--use_fast_math", "--device-as-default-execution-space", "-diag-suppress=174,177,1046",
    "--ptxas-options=-v", "--ptxas-options=--warn-on-local-memory-usage", "--pre-include=splatc_nvrtc.h",
    "--no-cache",  # a result from NVRTC's own cache comes without ptxas's report
)  # fmt: skip
# What TVM's sources include of libcu++, at a tenth of the compile time, and what they take from <cuda.h>.
HEADERS = {
    "splatc_nvrtc.h": """
struct alignas(128) CUtensorMap_st { unsigned long long opaque[16]; };
typedef struct CUtensorMap_st CUtensorMap;
""",
    "cuda/std/cstdint": """#pragma once
namespace cuda { namespace std {
typedef signed char int8_t; typedef short int16_t; typedef int int32_t; typedef long long int64_t;
typedef unsigned char uint8_t; typedef unsigned short uint16_t; typedef unsigned uint32_t;
typedef unsigned long long uint64_t;
} }
""",
    "cuda/std/type_traits": """#pragma once
namespace cuda { namespace std {
template <bool B> struct bool_constant { static constexpr bool value = B; };
template <class A, class B> struct is_same : bool_constant<false> {};
template <class A> struct is_same<A, A> : bool_constant<true> {};
template <class A, class B> inline constexpr bool is_same_v = is_same<A, B>::value;
template <class T, class... Ts> inline constexpr bool is_one_of = (is_same_v<T, Ts> || ...);
template <class T> struct is_floating_point : bool_constant<is_one_of<T, float, double>> {};
template <class T> struct is_integral : bool_constant<is_one_of<T, bool, char, signed char, unsigned char, short,
    unsigned short, int, unsigned, long, unsigned long, long long, unsigned long long>> {};
template <class T> struct is_signed : bool_constant<(T(-1) < T(0))> {};
template <class T> struct is_unsigned : bool_constant<(T(0) < T(-1))> {};
template <bool B, class T = void> struct enable_if {};
template <class T> struct enable_if<true, T> { typedef T type; };
template <bool B, class T, class F> struct conditional { typedef T type; };
template <class T, class F> struct conditional<false, T, F> { typedef F type; };
} }
""",
}


@dataclass(frozen=True)
class Nvrtc:
    """An installation: the library, and the folders of the headers."""

    library: Path
    includes: tuple[Path, ...]


@lru_cache
def find_nvrtc() -> Nvrtc | None:
    """NVRTC and the headers that it needs: from pip's packages, else from a CUDA toolkit; None if there is none."""
    roots = [*_packages(), *(Path(home) for home in toolkits())]
    library = next((path for root in roots for path in _libraries(root)), None)
    if library is None:
        return None
    near_first = sorted(roots, key=lambda root: root not in library.parents)
    folders = [folder for root in near_first for folder in _includes(root)]
    wanted = [next((f for f in folders if (f / name).is_file()), None) for name in ("cuda_fp16.h", "nv/target")]
    return Nvrtc(library, tuple(dict.fromkeys(f for f in wanted if f))) if all(wanted) else None


def compile_nvrtc(source: str, arch: str, more: tuple[str, ...] = ()) -> Compiled:
    """Compile device source to a cubin and PTX for ``arch`` ("sm_90a"), with ``more`` options.

    Raises CompileError with the first error.
    """
    found = find_nvrtc()
    assert found is not None, "the caller checks find_nvrtc()"
    nvrtc = _load(found.library)
    program = ctypes.c_void_p()
    texts, names = (_strings(x) for x in (HEADERS.values(), HEADERS))
    _check(nvrtc, nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), source.encode(), b"kernel.cu", len(HEADERS), texts, names
    ))  # fmt: skip
    try:
        options = [f"--gpu-architecture={arch}", *OPTIONS, *more, *(f"-I{folder}" for folder in found.includes)]
        status = nvrtc.nvrtcCompileProgram(program, len(options), _strings(options))
        log = _fetch(nvrtc, program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
        if status:
            raise CompileError(f"NVRTC failed for {arch}: {first_error(log)}")
        ptx = _fetch(nvrtc, program, "PTX").rstrip(b"\0").decode()
        return Compiled(_fetch(nvrtc, program, "CUBIN"), ptx, log)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _packages() -> Iterator[Path]:
    spec = importlib.util.find_spec("nvidia")  # a namespace package: nothing is imported
    for base in (spec.submodule_search_locations or ()) if spec else ():
        yield from sorted(Path(base).glob("cu[0-9][0-9]"), reverse=True)  # CUDA 13: one tree
        yield Path(base)  # CUDA 12: a tree for each package


def _libraries(root: Path) -> list[Path]:
    places = ("lib", "lib64", "targets/*/lib", "cuda_nvrtc/lib")
    return [path for place in places for path in sorted(root.glob(f"{place}/libnvrtc.so.*"))]


def _includes(root: Path) -> Iterator[Path]:
    for place in ("include", "include/cccl", "targets/*/include", "targets/*/include/cccl", "*/include"):
        yield from sorted(root.glob(place))


@cache
def _load(library: Path) -> ctypes.CDLL:
    for path in sorted(library.parent.glob("libnvrtc-builtins.so*")):  # it looks for them on the library path alone
        ctypes.CDLL(str(path))
    nvrtc = ctypes.CDLL(str(library))
    nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
    return nvrtc


def _strings(texts: object) -> ctypes.Array[ctypes.c_char_p]:
    encoded = [text.encode() for text in texts]  # type: ignore[attr-defined]
    return (ctypes.c_char_p * len(encoded))(*encoded)


def _fetch(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(nvrtc, nvrtc[f"nvrtcGet{what}Size"](program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(nvrtc, nvrtc[f"nvrtcGet{what}"](program, buffer))
    return buffer.raw


def _check(nvrtc: ctypes.CDLL, status: int) -> None:
    if status:
        raise CompileError(f"NVRTC failed: {nvrtc.nvrtcGetErrorString(status).decode()}")
