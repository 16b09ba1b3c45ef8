"""What a call does on the device: the time of each of its kernels, by PyTorch's profiler."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

CALLS = 5
WALKS = "splatc_gradient_columns", "splatc_gradient_rows"


def kernels(call: Callable[[], Any], device: str) -> dict[str, float] | None:
    """Microseconds of device time of one call by kernel (fills and copies too), the longest first; None on a CPU.

    Launches of one kernel are added up, and the mean of some calls is taken.
    """
    if device == "cpu":
        return None
    import torch
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize()
    spent: dict[str, float] = {}
    for event in found.events() or ():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            spent[event.name] = spent.get(event.name, 0.0) + event.time_range.elapsed_us() / CALLS
    return dict(sorted(spent.items(), key=lambda pair: -pair[1]))


def fixed_share(spent: Mapping[str, float] | None) -> float | None:
    """The share of everything but walks over tiles, one or two kernels; None if no kernel was seen."""
    total = sum((spent or {}).values())
    walks = sum(us for name, us in (spent or {}).items() if name.startswith(WALKS))
    return 1 - walks / total if total else None
