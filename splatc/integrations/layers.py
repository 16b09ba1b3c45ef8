"""Layers of a model by index or name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

from splatc.errors import InvalidInput

Module = TypeVar("Module")


def layer_of(modules: Mapping[str, Module], layer: int | str) -> dict[str, Module]:
    """The modules of a layer, by name: all within the module of that name, or all whose names have this number first.
    Raises InvalidInput if there are none."""
    within = {name: module for name, module in modules.items() if _belongs(name, layer)}
    if not within:
        raise InvalidInput(f"the model has no layer {layer!r}: give an index or the name of a module")
    return within


def _belongs(name: str, layer: int | str) -> bool:
    if isinstance(layer, str):
        return name == layer or name.startswith(layer + ".")
    first = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return first is not None and int(first[1]) == layer
