"""How the portable CUDA kernel is launched: one block for each batch entry and work row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from splatc.runtime.arguments import Arguments
from splatc.runtime.gpu_call import Request, Step
from splatc.runtime.plan import Launch

HOLDERS = {"q": "q_flat_ptr", "k": "k_flat_ptr", "v": "v_flat_ptr", "o": "o_flat_ptr", "lse": "lse_ptr"}


def portable_tables(launch: Launch) -> Mapping[str, NDArray[Any]]:
    """The arrays of a launch that the kernel reads."""
    return {"work": launch.work, "items": launch.items, "entries": launch.joined_entries, "views": launch.views,
            "bits": launch.bits}  # fmt: skip


def portable_steps(request: Request) -> list[Step]:
    """The kernel, once for each launch."""
    shape, (function,) = request.shape, request.functions
    sizes = {"batch": shape.batch, "q_heads": shape.heads, "kv_heads": shape.kv_heads, "q_len": shape.q_len,
             "kv_len": shape.kv_len, "scale": 0.0, "cap": request.cap}  # fmt: skip
    for name, one in request.layouts.items():
        strides = one.batch_stride, one.head_stride, one.seq_stride
        sizes |= {f"{name}{i}": stride for i, stride in enumerate(strides)}
    steps = []
    for i, launch in enumerate(request.launches):
        pointers = {f"{name}_ptr": request.tables.address(i, name) for name in portable_tables(launch)}
        values = {**sizes, **pointers, **dict.fromkeys(HOLDERS.values(), 0), "n_work": len(launch.work),
                  "merge": int(launch.merge)}  # fmt: skip
        grid = shape.batch * len(launch.work), 1, 1
        steps.append(Step(function, Arguments(function, values, {}), grid, HOLDERS))
    return steps
