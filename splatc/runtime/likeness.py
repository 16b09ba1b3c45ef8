"""Whether tensors are like those of the call before: by the check of torch.compile's guards, which takes less than half
the time of looking up a key made of the same properties."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Like = Callable[..., bool]


def likeness(*tensors: Any) -> Like:
    """Whether as many objects are torch tensors with the types, sizes, strides, dtypes, devices and requires_grad of
    these, in a call that autocast and the like treat as this one. False may always be said, and is where this PyTorch
    has no such check. The tensors are not kept.
    """
    import torch

    properties: Any = {
        "dynamic_dims_sizes": [list(x.shape) for x in tensors],
        "dynamic_dims_strides": [list(x.stride()) for x in tensors],
    }
    try:
        guards: Any = torch._C._dynamo.guards.TensorGuards
        check: Like = guards(*tensors, **properties).check
    except (AttributeError, TypeError, SystemError):  # private to PyTorch: it may change
        return unlike
    return check


def unlike(*objects: Any) -> bool:
    """That nothing is known to be like anything."""
    return False
