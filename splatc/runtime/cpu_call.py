"""Calling CPU kernels: what both directions need."""

from __future__ import annotations

import os
import sys
from typing import Any

from splatc.codegen.no_torch import import_tvm_ffi
from splatc.ir.dropout import threshold_of
from splatc.ir.score import Score
from splatc.ir.terms import Terms
from splatc.runtime.plan import Launch
from splatc.runtime.tensors import is_torch


def table_arguments(launch: Launch, batch: int, shares: int | None = None) -> tuple[Any, ...]:
    """The tables of a launch as a CPU kernel takes them; shares: of the work, default: one for each thread."""
    arrays = launch.work, launch.items, launch.joined_entries, launch.views, launch.bits
    return tuple(exchange(x) for x in (*arrays, launch.chunks(batch, shares or workers())))


def term_arguments(score: Score, terms: Terms | None) -> tuple[Any, ...]:
    """What a CPU kernel takes for its Score, after all else (codegen/cpu_score.py)."""
    if terms is None:
        return ()
    blocks = None if terms.block_bias is None else terms.block_bias.reshape(len(terms.block_bias), -1)
    tensors = terms.alibi_slopes, terms.relative_bias, blocks, terms.sinks, terms.seed
    numbers: list[int | float] = [terms.shift] if score.biases else []
    if blocks is not None:
        numbers += [terms.block_size, terms.block_bias.shape[2]]
    if score.dropout:
        numbers += [threshold_of(terms.dropout_p), 1 / (1 - terms.dropout_p)]
    return (*(exchange(x) for x in tensors if x is not None), *numbers)


def exchange(x: Any) -> Any:
    """A NumPy array or torch tensor as tvm_ffi takes it, without a copy."""
    if is_torch(x):
        return x.detach()
    if not x.flags.writeable:  # DLPack refuses to export read-only memory; the kernel only reads it
        x = x.view()
        try:
            x.flags.writeable = True
        except ValueError:
            x = x.copy()
    return import_tvm_ffi().from_dlpack(x)


def workers() -> int:
    """Threads that a CPU kernel uses: torch's setting if torch is loaded, else the CPUs we may run on."""
    torch = sys.modules.get("torch")
    return int(torch.get_num_threads()) if torch else len(os.sched_getaffinity(0))
