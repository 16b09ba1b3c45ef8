"""Which attention modules of a model a layer's index or name means."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping

import torch

from splatc.errors import InvalidInput
from splatc.integrations.layers import layer_of

_CROSS = re.compile(r"cross_?att|encoder_attn|enc_?dec_?att|encoder_decoder_att", re.IGNORECASE)
_SHOWN = 6  # names in a message


def attentions_of(model: torch.nn.Module, layer: int | str) -> dict[str, torch.nn.Module]:
    """The modules of a layer whose attention goes through transformers' attention interface, by name.

    Cross-attention is among them only if ``layer`` is its name. Raises InvalidInput if there are none, and for an
    index that is of a layer in more than one stack.
    """
    modules = dict(model.named_modules())
    within = layer_of(modules, layer)
    found = {name: module for name, module in within.items() if _by_interface(module)}
    if not found:
        raise InvalidInput(_nothing(model, modules, layer))
    chosen = {name: module for name, module in found.items() if _named(layer, name) or not is_cross(name, module)}
    if not chosen:
        raise InvalidInput(f"set_patterns: all attention of layer {layer!r} is cross-attention, which is changed only "
                           f"by its own name: {_listed(found)}")  # fmt: skip
    if not isinstance(layer, str) and len(stacks := dict.fromkeys(map(_to_number, chosen))) > 1:
        raise InvalidInput(f"set_patterns: {len(stacks)} parts of {type(model).__name__} have a layer {layer}: give "
                           f"names in place of the index: {_listed(stacks)}")  # fmt: skip
    return chosen


def is_cross(name: str, module: torch.nn.Module) -> bool:
    """Whether a module attends from one sequence to another, by what it is called."""
    told = getattr(module, "is_cross_attention", False) is True or "CrossAtt" in type(module).__name__
    return told or _CROSS.search(name) is not None


def implementation(module: torch.nn.Module) -> str | None:
    """The attn_implementation that a module will look up."""
    return getattr(getattr(module, "config", None), "_attn_implementation", None)


def _by_interface(module: torch.nn.Module) -> bool:
    """Whether the forward function looks for its attention among the registered ones."""
    from transformers import AttentionInterface

    forward = inspect.unwrap(type(module).forward)
    code, known = getattr(forward, "__code__", None), getattr(forward, "__globals__", {})
    return code is not None and any(isinstance(known.get(name), AttentionInterface) for name in code.co_names)


def _named(layer: int | str, name: str) -> bool:
    """Whether ``layer`` is the name of this attention, or of a module that is all cross-attention."""
    return isinstance(layer, str) and (layer == name or _CROSS.search(layer) is not None)


def _to_number(name: str) -> str:
    """A module's name up to its first number, the name of the layer."""
    found = re.match(r"(?:.*?\.)??\d+(?=\.|$)", name)
    return found[0] if found else name


def _nothing(model: torch.nn.Module, modules: Mapping[str, torch.nn.Module], layer: int | str) -> str:
    others = [name for name, module in modules.items() if _by_interface(module)]
    if not others:
        return (f"set_patterns: no attention of {type(model).__name__} goes through transformers' attention interface, "
                "so patterns cannot change it: replace_attention is for Longformer and BigBird, splatc.nn for modules "
                "of your own")  # fmt: skip
    return (f"set_patterns: there is no attention to change in {layer!r}: attention of {type(model).__name__} is in "
            f"{_listed(others)}")  # fmt: skip


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
