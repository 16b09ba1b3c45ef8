"""Patterns that are found in a model, and models that change to them.

find_pattern    SPION's blocks, from a map of attention
"""

from importlib import import_module
from typing import Any

_HOME = {"find_pattern": "spion"}  # loaded when asked for: some of them import torch

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
