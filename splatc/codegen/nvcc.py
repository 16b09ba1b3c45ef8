"""Compiling generated CUDA with the nvcc of a CUDA toolkit."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

from splatc.codegen.ptxas import Compiled, first_error
from splatc.errors import CompileError

FLAGS = (
    "-O3", "-std=c++17", "--use_fast_math", "--expt-relaxed-constexpr", "-diag-suppress", "174,177,1046",
    "-Xptxas", "-v,--warn-on-local-memory-usage",
)  # fmt: skip


def toolkits() -> tuple[str, ...]:
    """Folders where a CUDA toolkit may lie: CUDA_HOME, CUDA_PATH, /usr/local/cuda."""
    return tuple(x for x in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda") if x)


@lru_cache
def find_nvcc() -> str | None:
    """The path of nvcc: on PATH, under CUDA_HOME or CUDA_PATH, or in /usr/local/cuda; None if there is none."""
    return shutil.which("nvcc") or next((p for h in toolkits() if (p := shutil.which("nvcc", path=f"{h}/bin"))), None)


def compile_nvcc(source: str, arch: str, more: tuple[str, ...] = ()) -> Compiled:
    """Compile device source to a cubin and PTX for ``arch`` ("sm_90a"), with ``more`` options.

    Raises CompileError with the first error.
    """
    nvcc = find_nvcc()
    assert nvcc is not None, "the caller checks find_nvcc()"
    with tempfile.TemporaryDirectory(prefix="splatc-nvcc-") as name:
        folder = Path(name)
        (folder / "kernel.cu").write_text(source)
        code = f"arch=compute_{arch.removeprefix('sm_')},code={arch}"
        command = [nvcc, "-cubin", "-gencode", code, *FLAGS, *more, "-keep", "-keep-dir", name, "-o", "kernel.cubin"]
        done = subprocess.run([*command, "kernel.cu"], cwd=folder, capture_output=True, text=True, check=False)
        log = done.stdout + done.stderr
        if done.returncode:
            raise CompileError(f"nvcc failed for {arch}: {first_error(log)}")
        return Compiled((folder / "kernel.cubin").read_bytes(), (folder / "kernel.ptx").read_text(), log)
