"""The attention function for transformers, and patterns for single layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from splatc.errors import InvalidInput, Unsupported
from splatc.integrations.transformers import few
from splatc.integrations.transformers.masks import Mask, Part, parts_of, splatc_mask
from splatc.integrations.transformers.modules import attentions_of, implementation, is_cross
from splatc.integrations.transformers.packing import packed
from splatc.nn.any_length import any_length
from splatc.patterns import Pattern, as_pattern, causal, full

NAME = "splatc"
_OWN = "_splatc_pattern"  # the attribute of modules that have a pattern of the user's
_REFUSED = ("position_bias", "head_mask")


@dataclass(frozen=True)
class Own:
    """A pattern of the user's, and whether the module attends from one sequence to another."""

    pattern: Pattern
    cross: bool


def register() -> None:
    """Make ``attn_implementation="splatc"`` known to transformers; more calls change nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, splatc_attention)
    AttentionMaskInterface.register(NAME, splatc_mask)


def set_patterns(model: torch.nn.Module, patterns: Mapping[int | str, Any]) -> None:
    """Let layers of a model with attn_implementation="splatc" attend by patterns in place of their own masks.

    patterns: {layer: pattern}. A layer is its index (the first number in the names of its modules) or the name of a
    module, for all attention within; cross-attention is changed only by its own name. A pattern is one of
    ``splatc.patterns``, its text, or a list with one for each head; it counts positions from the first real token of
    each row of the batch and says all that a query attends to (write ``causal & ...`` for a decoder). Padding is cut
    off, and packed documents (told by position_ids) stay apart. In cross-attention queries count from the first of the
    call, keys from the first real one. None gives a layer its own mask back. Raises InvalidInput, with no layer
    changed, for a layer that the model does not have or that more than one of its parts has, for modules without
    attention that transformers lets us replace, and for layers with another attn_implementation.
    """
    chosen: list[tuple[torch.nn.Module, Own | None]] = []
    for layer, given in patterns.items():
        pattern = None if given is None else as_pattern(given)
        for name, module in attentions_of(model, layer).items():
            if pattern is not None and (now := implementation(module)) != NAME:
                raise InvalidInput(f"set_patterns: {name} has attn_implementation={now!r}, which ignores patterns: "
                                   f"call register() and model.set_attn_implementation({NAME!r}) first")  # fmt: skip
            chosen.append((module, None if pattern is None else Own(pattern, is_cross(name, module))))
    for module, own in chosen:
        setattr(module, _OWN, own)


def splatc_attention(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                     attention_mask: Mask | torch.Tensor | None, dropout: float = 0.0, scaling: float | None = None,
                     is_causal: bool | None = None, softcap: float | None = None, s_aux: torch.Tensor | None = None,
                     **kwargs: Any) -> tuple[torch.Tensor, None]:  # fmt: skip
    """The attention function that ``register`` gives to transformers; arguments as of its AttentionInterface.

    query (batch, heads, q_len, head_dim), key and value (batch, kv_heads, kv_len, dim); s_aux: sinks (heads,). Returns
    (batch, q_len, heads, dim), contiguous, and None for the weights. Queries that are padding give 0. Raises
    Unsupported for what cannot be done: masks that are tensors, position biases, weights as an output.
    """
    if kwargs.get("output_attentions"):
        raise Unsupported("splatc computes no matrix of weights: output_attentions needs attn_implementation='eager'")
    for name in _REFUSED:
        if kwargs.get(name) is not None:
            raise Unsupported(f"attn_implementation='splatc' takes no {name}: use 'eager' for this model")
    if isinstance(attention_mask, torch.Tensor):
        raise Unsupported(f"the attention mask is a tensor of shape {tuple(attention_mask.shape)}: give padding as "
                          "(batch, positions), and other masks as patterns by set_patterns")  # fmt: skip
    mask = attention_mask or _without_mask(module, query, key, is_causal)
    if (mask.q_len, mask.kv_len) != (query.shape[2], key.shape[2]):
        raise InvalidInput(f"the attention mask is for {mask.q_len} queries and {mask.kv_len} keys, but the layer has "
                           f"{query.shape[2]} and {key.shape[2]}: give it (batch, positions of all keys)")  # fmt: skip
    own: Own | None = getattr(module, _OWN, None)
    parts = mask.parts if own is None else mask.with_pattern(own.pattern, own.cross)
    options: dict[str, Any] = {"scale": scaling, "enable_gqa": key.shape[1] != query.shape[1]}
    if s_aux is not None:
        options["sinks"] = s_aux
    if dropout:
        options["dropout_p"] = dropout
    return _run(parts, query, key, value, softcap, options), None


def _without_mask(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, is_causal: bool | None) -> Mask:
    """The mask of a call that brings none: all keys, or, for modules that say so, causal from the first key."""
    causally = getattr(module, "is_causal", True) if is_causal is None else is_causal
    batch, q_len, kv_len = query.shape[0], query.shape[2], key.shape[2]
    pattern = causal() if causally and q_len > 1 else full()
    spans = ((0, kv_len),) * batch
    return Mask(q_len, kv_len, 0, False, spans, parts_of([pattern] * batch, spans, q_len, 0))


def _run(parts: tuple[Part, ...], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softcap: float | None,
         options: dict[str, Any]) -> torch.Tensor:  # fmt: skip
    """(batch, q_len, heads, dim), contiguous; zeros for queries in no part."""
    if len(parts) == 1 and len(parts[0].entries) == q.shape[0] and parts[0].q_to - parts[0].q_from == q.shape[2]:
        return _run_part(parts[0], q, k, v, softcap, options)
    several = len(parts) > 1 and q.shape[2] > few.MOST
    if several and (one := packed(parts, q.shape[2], k.shape[2], softcap, q.device)) is not None:
        return one.attend(q, k, v, options)
    out = v.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[3])
    for part in parts:
        at = torch.tensor(part.entries, device=q.device)
        out[at, part.q_from : part.q_to] = _run_part(part, q[at], k[at], v[at], softcap, options)
    return out


def _run_part(part: Part, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softcap: float | None,
              options: dict[str, Any]) -> torch.Tensor:  # fmt: skip
    if (part.q_from, part.q_to) != (0, q.shape[2]):
        q = q[:, :, part.q_from : part.q_to]
    if (part.k_from, part.k_to) != (0, k.shape[2]):
        k, v = (x[:, :, part.k_from : part.k_to] for x in (k, v))
    if q.shape[2] <= few.MOST and "dropout_p" not in options:
        o = few.attend(part.pattern, q, k, v, options["scale"], softcap, options.get("sinks"))
        return o.transpose(1, 2).contiguous()
    attend = any_length(part.pattern, "bshd", softcap, True, None)  # O is written as transformers wants it
    return attend(*(x.transpose(1, 2) for x in (q, k, v)), **options)  # type: ignore[no-any-return]
