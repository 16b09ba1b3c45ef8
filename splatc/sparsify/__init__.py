"""Patterns that are found in a model, and models that change to them.

find_pattern      SPION's blocks, from a map of attention
mean_attention    such a map, of queries and keys
SpionAttention    a layer that is dense until it is switched to blocks
SpionSchedule     when to switch, and the switch
prune_to_zero     the softmax in which pruned entries have the score 0
sparsek           SparseK's projection: a differentiable choice of k scores
"""

from importlib import import_module
from typing import Any

_HOME = {  # loaded when asked for: some of them import torch
    "SpionAttention": "layer",
    "SpionSchedule": "schedule",
    "find_pattern": "spion",
    "lightning_callback": "callbacks",
    "mean_attention": "scores",
    "prune_to_zero": "zero",
    "sparsek": "projection",
    "trainer_callback": "callbacks",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
