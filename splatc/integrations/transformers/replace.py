"""Models that bring a sparse attention of their own: Longformer and BigBird."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

from splatc.errors import InvalidInput

Model = TypeVar("Model", bound=torch.nn.Module)


def replace_attention(model: Model) -> Model:
    """Let the Longformer or BigBird layers of a model compute their own sparse attention by our kernels, in place.

    The same function on the same parameters; what is padding gives 0, as there. Returns the model. Raises InvalidInput
    if it has no such layer; calls that ask for weights (output_attentions) raise Unsupported in Longformer, and give
    None in BigBird.
    """
    from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    from splatc.integrations.transformers.big_bird import SparseBigBirdAttention
    from splatc.integrations.transformers.longformer import SparseLongformerSelfAttention

    ours: dict[type, Any] = {
        LongformerSelfAttention: SparseLongformerSelfAttention,
        BigBirdBlockSparseAttention: SparseBigBirdAttention,
    }
    found = [module for module in model.modules() if type(module) in {*ours, *ours.values()}]
    if not found:
        raise InvalidInput("replace_attention: the model has no block-sparse BigBird layer and no Longformer layer: "
                           "for other models use attn_implementation='splatc' and set_patterns")  # fmt: skip
    for module in found:
        module.__class__ = ours.get(type(module), type(module))
    return model
