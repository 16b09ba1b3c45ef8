"""The GPU and the software that figures were measured on, and two ceilings of the same run."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from splatc.bench.gpu.clock import GraphClock
from splatc.bench.gpu.measure import tflops
from splatc.bench.gpu.peers import Contestant, kind_of
from splatc.bench.report import environment
from splatc.bench.timing import Timing, interleave

COPY_BYTES, MATRIX = 1 << 30, 8192  # of one copied tensor; side of the matrices of the product


def describe(command: Sequence[str], device: str) -> dict[str, Any]:
    """Date, command, machine, versions and the GPU's name, driver, multiprocessors and memory."""
    import torch

    about = environment(command)
    about["versions"] |= {"torch": torch.__version__, "triton": _version("triton")}
    if kind_of(device) == "cpu":
        return about
    properties = torch.cuda.get_device_properties(device)
    cudnn = str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]
    about["versions"] |= {"cuda": torch.version.cuda, "cudnn": cudnn, "driver": _driver()}
    about["gpu"] = {
        "name": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
    }
    return about


def ceilings(device: str, rounds: int = 9) -> dict[str, Any]:
    """Measured rates: copy_tb_s, a device copy in 10**12 bytes read plus written a second; matmul_tflops, bfloat16."""
    import torch

    if kind_of(device) == "cpu":
        return {}
    source, sink = (torch.randn(COPY_BYTES // 2, device=device, dtype=torch.bfloat16) for _ in range(2))
    a, b = (torch.randn(MATRIX, MATRIX, device=device, dtype=torch.bfloat16) for _ in range(2))
    clock = GraphClock()
    # by a kernel: in a graph a copy is left to the copy engines, which are slower
    copied = clock.prepare(Contestant(lambda x, y, z: torch.neg(source, out=sink)), [(None, None, None)])
    product = clock.prepare(Contestant(lambda x, y, z: a @ b), [(None, None, None)])
    timings: dict[str, Timing] = interleave({"copy": copied.sample, "product": product.sample}, rounds)
    return {
        "copy_tb_s": 2 * COPY_BYTES / timings["copy"].median / 1e12,
        "matmul_tflops": tflops(2 * MATRIX**3, timings["product"]),
    }


def _driver() -> str:
    try:
        done = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
                              capture_output=True, text=True, check=True, timeout=20)  # fmt: skip
        return done.stdout.splitlines()[0].strip()
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
