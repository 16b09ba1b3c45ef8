"""Calling CPU kernels: what both directions need."""

from __future__ import annotations

import os
import sys
from typing import Any

from splatc.runtime.plan import Launch
from splatc.runtime.tensors import is_torch


def table_arguments(launch: Launch, batch: int) -> tuple[Any, ...]:
    """The tables of a launch as a CPU kernel takes them."""
    arrays = launch.work, launch.items, launch.joined_entries, launch.views, launch.bits
    return tuple(exchange(x) for x in (*arrays, launch.chunks(batch, workers())))


def exchange(x: Any) -> Any:
    """A NumPy array or torch tensor as tvm_ffi takes it, without a copy."""
    if is_torch(x):
        return x.detach()
    import tvm_ffi

    if not x.flags.writeable:  # DLPack refuses to export read-only memory; the kernel only reads it
        x = x.view()
        try:
            x.flags.writeable = True
        except ValueError:
            x = x.copy()
    return tvm_ffi.from_dlpack(x)


def workers() -> int:
    """Threads that a CPU kernel uses: torch's setting if torch is loaded, else the CPUs we may run on."""
    torch = sys.modules.get("torch")
    return int(torch.get_num_threads()) if torch else len(os.sched_getaffinity(0))
