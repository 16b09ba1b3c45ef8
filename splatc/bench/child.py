"""What is measured in a process of its own: ``python -m splatc.bench.child NAME ...`` prints one JSON object."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from typing import Any

from splatc.errors import SplatcError


def measure(*arguments: str) -> dict[str, Any]:
    """Run a measurement in a fresh process. Raises SplatcError if it fails."""
    command = [sys.executable, "-m", "splatc.bench.child", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise SplatcError(f"measuring {' '.join(arguments)} failed: {reason}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def plan(name: str, length: str) -> dict[str, Any]:
    """Seconds and extra peak memory (MiB) of analysis and tables for one of ``million_cases``."""
    import networkx  # noqa: F401  (part of the baseline, as are the modules below)
    import scipy.sparse  # noqa: F401

    from splatc.bench.cases import million_cases
    from splatc.codegen.kernel import KernelSpec
    from splatc.codegen.target import Target
    from splatc.compile import make_plan

    n = int(length)
    pattern = million_cases(n)[name]
    spec = KernelSpec(64, 64, "float32", 64, 64, Target("cpu", "native"))
    make_plan(pattern if name != "documents" else million_cases(4096)["window"], min(n, 4096) if name != "documents" else 4096,
              min(n, 4096) if name != "documents" else 4096, spec)  # fmt: skip
    before = _peak()
    began = time.perf_counter()
    made = make_plan(pattern, n, n, spec)
    seconds = time.perf_counter() - began
    e = made.explanation
    return {"seconds": seconds, "extra_mib": (_peak() - before) / 1024, "pieces": e.pieces, "remainder_nnz": e.remainder_nnz,
            "nnz": e.nnz, "tiles": e.tiles, "waste": e.waste, "table_mib": e.table_bytes / 2**20}  # fmt: skip


def startup(length: str, heads: str) -> dict[str, Any]:
    """Seconds from after the imports of torch and tvm to the first result of a cached kernel."""
    import torch
    import tvm  # type: ignore[import-not-found,unused-ignore]

    assert torch.__version__ and tvm.__version__
    q = torch.zeros((1, int(heads), int(length), 64))
    began = time.perf_counter()
    import splatc

    imported = time.perf_counter()
    splatc.attention(q, q, q, "window(256, 256)")
    first = time.perf_counter()
    splatc.attention(q, q, q, "window(256, 256)")
    return {"seconds": first - began, "import_s": imported - began, "second_call_s": time.perf_counter() - first}


def _peak() -> int:
    """Peak resident memory so far, KiB."""
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage // 1024 if sys.platform == "darwin" else usage


if __name__ == "__main__":
    print(json.dumps({"plan": plan, "startup": startup}[sys.argv[1]](*sys.argv[2:])))
