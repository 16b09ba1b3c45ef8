"""Run generated CUDA source on the CPU (see cuda_on_cpu.h): checks a kernel's logic without a GPU."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

HEADER = Path(__file__).with_name("cuda_on_cpu.h")
CTYPES = {"int": ctypes.c_int, "float": ctypes.c_float, "int64_t": ctypes.c_int64}


ATTENTION = "splatc_attention_kernel"


def kernel_text(source: str, kernel: str) -> tuple[str, list[tuple[str, str]]]:
    """The definition of a kernel in a generated .cu, and its parameters as (type, name)."""
    start = source.rindex('extern "C" __global__', 0, source.rindex(f" {kernel}("))
    signature = source[start : source.index("{", start)]
    inside = signature[signature.rindex("(") + 1 : signature.rindex(")")]
    parameters = [parameter.strip().rpartition(" ") for parameter in inside.split(",")]
    end = source.index("\n}\n", start) + 3
    return source[start:end], [(kind, name) for kind, _, name in parameters]


def load_cpp(text: str) -> ctypes.CDLL:
    """C++ as a library. Raises CalledProcessError if g++ refuses it."""
    with TemporaryDirectory(prefix="splatc-emulated-") as folder:
        (Path(folder) / "kernel.cpp").write_text(text)
        command = ["g++", "-std=c++20", "-O1", "-w", "-shared", "-fPIC", "kernel.cpp", "-o", "kernel.so"]
        subprocess.run(command, check=True, cwd=folder)
        return ctypes.CDLL(f"{folder}/kernel.so")


def compile_on_cpu(source: str, folder: Path, flags: tuple[str, ...] = (),
                   kernel: str = ATTENTION) -> Callable[..., None]:  # fmt: skip
    """A function launch(grid, **arguments by parameter name); arrays are NumPy (16-bit ones as uint16) or addresses.

    Raises CalledProcessError if g++ refuses the source.
    """
    text, parameters = kernel_text(source, kernel)
    declared = ", ".join(f"{kind.replace('__restrict__', '')} {name}" for kind, name in parameters)
    names = ", ".join(name for _, name in parameters)
    (folder / f"{kernel}.cpp").write_text(
        f'#include "{HEADER}"\n#define uint unsigned int\n#define uchar unsigned char\n'
        "inline void tvm_builtin_cuda_cta_sync() { __syncthreads(); }\n"
        f'{text}\nextern "C" void launch(int grid, {declared}) {{\n'
        f"  run_grid(grid, 256, [=] {{ {kernel}({names}); }});\n}}\n"
    )
    library = folder / f"{kernel}.so"
    command = ["g++", "-std=c++20", "-O1", "-w", "-shared", "-fPIC", *flags]
    subprocess.run(
        [*command, str(folder / f"{kernel}.cpp"), "-o", str(library)], check=True, capture_output=True
    )
    entry = ctypes.CDLL(str(library)).launch

    def launch(grid: int, **arguments: Any) -> None:
        values: list[Any] = [ctypes.c_int(grid)]
        for kind, name in parameters:
            value = arguments[name]
            if "*" in kind:
                values.append(ctypes.c_void_p(value if isinstance(value, int) else value.ctypes.data))
            else:
                values.append(CTYPES[kind](value))
        entry(*values)

    return launch


def to_bits16(x: np.ndarray, dtype: str) -> np.ndarray:
    """x rounded to dtype, in the storage that the emulated kernel reads (bfloat16 as uint16)."""
    if dtype != "bfloat16":
        return x.astype(dtype)
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((u + 0x7FFF + (u >> 16 & 1)) >> 16).astype(np.uint16)


def from_bits16(x: np.ndarray, dtype: str) -> np.ndarray:
    """The inverse: float32 values."""
    if dtype != "bfloat16":
        return x.astype(np.float32)
    return (x.astype(np.uint32) << 16).view(np.float32)
