"""Which modules of a model get which pattern."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, TypeVar

import torch

from splatc.errors import InvalidInput
from splatc.integrations.layers import layer_of
from splatc.integrations.torch.multihead import patch_multihead
from splatc.integrations.torch.sdpa import patch_sdpa
from splatc.patterns import Pattern, as_pattern

Model = TypeVar("Model", bound=torch.nn.Module)
_PATTERN, _HOOKS = "_splatc_calls_by", "_splatc_hooks"  # attributes of modules whose calls are replaced


class _Entered(threading.local):
    """The contexts of modules that run in this thread, the innermost last."""

    def __init__(self) -> None:
        self.contexts: list[patch_sdpa] = []


_entered = _Entered()


def patch(model: Model, patterns: Any, *, drop_weights: bool = False) -> Model:
    """Let a model attend by patterns, in place; returns it. Parameters and their names stay.

    patterns: a pattern (of ``splatc.patterns``, its text, or a list with one for each head) for every
    nn.MultiheadAttention in the model; or {layer: pattern} with layers by index (the first number in the names of
    modules) or by name. Of a layer, each nn.MultiheadAttention is patched; in one that has none, calls of
    F.scaled_dot_product_attention are replaced while it runs (``patch_sdpa``). None: as it was.

    The function is the model's own with the pattern as a mask: key_padding_mask, is_causal, dropout and all projections
    as they are; torch's fused encoder layers are left out. Queries without a key give 0, where torch gives NaN.
    drop_weights: give None where callers ask for the matrix of weights (the default of nn.MultiheadAttention), which is
    refused otherwise. Raises InvalidInput for layers that the model does not have, Unsupported for attn_mask without
    is_causal, add_bias_kv and add_zero_attn.
    """
    modules = dict(model.named_modules())
    if not isinstance(patterns, Mapping):
        found = _attentions(modules)
        if patterns is not None and not found:
            raise InvalidInput("patch: the model has no nn.MultiheadAttention: give {layer: pattern} for layers that "
                               "call F.scaled_dot_product_attention, or use splatc.patch_sdpa")  # fmt: skip
        chosen = [(found, patterns)]
    else:
        chosen = [(_attentions(layer := layer_of(modules, name)) or _outermost(layer), given)
                  for name, given in patterns.items()]  # fmt: skip
    for group, given in chosen:
        pattern = None if given is None else as_pattern(given)
        for module in group:
            if isinstance(module, torch.nn.MultiheadAttention):
                patch_multihead(module, pattern, drop_weights)
            else:
                _replace_calls(module, pattern)
    for module in modules.values():
        if isinstance(module, torch.nn.TransformerEncoder):
            module.use_nested_tensor = False  # it would pass ragged tensors to layers, for its fused ones
    return model


def _attentions(modules: Mapping[str, torch.nn.Module]) -> list[torch.nn.Module]:
    return [module for module in modules.values() if isinstance(module, torch.nn.MultiheadAttention)]


def _outermost(modules: Mapping[str, torch.nn.Module]) -> list[torch.nn.Module]:
    """Those of modules that are in no other of them."""
    return [m for name, m in modules.items() if not any(name.startswith(f"{other}.") for other in modules)]


def _replace_calls(module: torch.nn.Module, pattern: Pattern | None) -> None:
    for hook in module.__dict__.pop(_HOOKS, ()):
        hook.remove()
    setattr(module, _PATTERN, pattern)
    if pattern is not None:
        hooks = module.register_forward_pre_hook(_enter), module.register_forward_hook(_leave, always_call=True)
        setattr(module, _HOOKS, hooks)


def _enter(module: torch.nn.Module, args: Any) -> None:
    context = patch_sdpa(getattr(module, _PATTERN))
    context.__enter__()  # type: ignore[no-untyped-call]
    _entered.contexts.append(context)


def _leave(module: torch.nn.Module, args: Any, output: Any) -> None:
    _entered.contexts.pop().__exit__(None, None, None)
