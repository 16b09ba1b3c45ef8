"""What is measured in a process of its own, which prints one JSON object."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from splatc.errors import SplatcError

MEMORY = 6 << 30  # bytes of address space; also keeps a runaway plan from taking the machine down


STARTUP = """
import json, sys, time
import torch, tvm
q = torch.zeros((1, int(sys.argv[2]), int(sys.argv[1]), 64))
began = time.perf_counter()
import splatc
imported = time.perf_counter()
splatc.attention(q, q, q, "window(256, 256)")
first = time.perf_counter()
splatc.attention(q, q, q, "window(256, 256)")
second = time.perf_counter()
print(json.dumps({"seconds": first - began, "import_s": imported - began, "second_call_s": second - first}))
"""


def startup(length: int, heads: int) -> dict[str, Any]:
    """Seconds of a new process from after the imports of torch and tvm to the first result of a cached kernel."""
    return measure_python("-c", STARTUP, str(length), str(heads))


def plan_in_child(name: str, length: int) -> dict[str, Any]:
    """``plan`` in a new process."""
    return measure_python("-m", "splatc.bench.child", name, str(length))


def measure_python(*arguments: str, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run Python, with ``environment`` beside ours, and read the JSON it prints. Raises SplatcError if it fails.

    Bytecode is kept, as an installed package has it, whatever PYTHONDONTWRITEBYTECODE says.
    """
    here = str(Path(__file__).parents[2])
    path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "", **(environment or {})},
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise SplatcError(f"the measuring process failed: {reason}")
    result: dict[str, Any] = json.loads(done.stdout.strip().rpartition("\n")[2])
    return result


def plan(name: str, length: str) -> dict[str, Any]:
    """Seconds and extra peak memory (MiB) of analysis and tables for one of ``million_cases``.

    The baseline is the peak after all imports. A plan that takes more than MEMORY fails.
    """
    import networkx  # noqa: F401  (part of the baseline)
    import scipy.sparse  # noqa: F401

    from splatc.bench.cases import million_cases
    from splatc.codegen.kernel import kernel_spec
    from splatc.codegen.target import Target
    from splatc.compile import make_plan

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    n = int(length)
    pattern = million_cases(n)[name]
    spec = kernel_spec(64, None, "float32", Target("cpu", "native"))
    before = _peak()
    began = time.perf_counter()
    made = make_plan(pattern, n, n, spec)
    seconds = time.perf_counter() - began
    e = made.explanation
    return {
        "seconds": seconds,
        "extra_mib": (_peak() - before) / 1024,
        "pieces": e.pieces,
        "remainder_nnz": e.remainder_nnz,
        "nnz": e.nnz,
        "tiles": e.tiles,
        "waste": e.waste,
        "table_mib": e.table_bytes / 2**20,
    }


def _peak() -> int:
    """Peak resident memory of this program so far, KiB."""
    try:  # getrusage would count what the process that started us held, too
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return usage // 1024 if sys.platform == "darwin" else usage


if __name__ == "__main__":
    print(json.dumps(plan(*sys.argv[1:])))
