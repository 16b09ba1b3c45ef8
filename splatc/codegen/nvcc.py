"""Compiling generated CUDA with nvcc, and reading what ptxas says about registers and spills."""

from __future__ import annotations

import os
import re
import shutil
from functools import lru_cache
from pathlib import Path

from splatc.errors import CompileError

FLAGS = ("-O3", "-std=c++17", "--use_fast_math", "-diag-suppress", "174,177")
_USAGE = re.compile(r"Used (\d+) registers")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


@lru_cache
def find_nvcc() -> str | None:
    """The path of nvcc: on PATH, under CUDA_HOME or CUDA_PATH, or in /usr/local/cuda; None if there is none."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    return shutil.which("nvcc") or next((p for h in homes if h and (p := shutil.which("nvcc", path=f"{h}/bin"))), None)


def nvcc_identity() -> str:
    """What tells one nvcc from another without starting it: path, size and time of the file."""
    nvcc = find_nvcc()
    if nvcc is None:
        return "none"
    stat = os.stat(nvcc)
    return f"{os.path.realpath(nvcc)}:{stat.st_size}:{stat.st_mtime_ns}"


def compile_library(source: Path, library: Path, arch: str) -> dict[str, int]:
    """Compile ``source`` (device code and its host wrapper) to ``library`` and, beside it, a .ptx.

    Returns ptxas's registers and spill bytes. Raises CompileError if nvcc fails or the kernel spills.
    """
    import subprocess

    import tvm_ffi

    nvcc = find_nvcc()
    assert nvcc is not None, "the caller checks find_nvcc()"
    package = Path(tvm_ffi.__file__).parent
    common = [nvcc, *FLAGS, f"-I{package / 'include'}", str(source)]
    code = arch.removeprefix("sm_")
    kinds = (
        arch if code.endswith(("a", "f")) else f"[{arch},compute_{code}]"
    )  # with PTX for later GPUs where it may run
    build = [f"-gencode=arch=compute_{code},code={kinds}", "-Xptxas", "-v,--warn-on-local-memory-usage", "-shared",
             "-Xcompiler", "-fPIC", "-cudart", "static", f"-L{package / 'lib'}", "-ltvm_ffi",
             "-o", str(library)]  # fmt: skip
    listing = [f"-arch=compute_{code}", "-ptx", "-o", str(source.with_suffix(".ptx"))]
    with subprocess.Popen([*common, *listing], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as ptx:
        done = subprocess.run([*common, *build], capture_output=True, text=True, check=False)
        ptx.wait()
    log = done.stdout + done.stderr
    source.with_suffix(".log").write_text(log)
    if done.returncode:
        faults = [line for line in log.splitlines() if "error" in line.lower()] or log.splitlines()[-1:]
        raise CompileError(f"nvcc failed for {arch}: {faults[0] if faults else 'no message'} (source: {source})")
    report = read_report(log)
    if report["stack_bytes"] or report["spill_bytes"]:
        raise CompileError(f"the kernel spills on {arch}: {report}; use a smaller head_dim and report this")
    return report


def read_report(log: str) -> dict[str, int]:
    """Registers a thread, bytes of stack (local memory) and bytes spilled, from ptxas -v."""
    spills = [tuple(map(int, found)) for found in _SPILLS.findall(log)]
    if not spills:
        raise CompileError("ptxas gave no report: its -v output has changed; please report your CUDA version")
    return {
        "registers": max(map(int, _USAGE.findall(log)), default=0),
        "stack_bytes": max(s[0] for s in spills),
        "spill_bytes": max(s[1] + s[2] for s in spills),
    }
