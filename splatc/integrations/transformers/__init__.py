"""Hugging Face transformers with our kernels: ``attn_implementation="splatc"``. Importing this package imports torch.

    from splatc.integrations.transformers import register, set_patterns
    register()
    model = AutoModelForCausalLM.from_config(config, attn_implementation="splatc")
    set_patterns(model, {0: "causal & window(256, 0)"})    # if a layer should attend otherwise than its model says

tail         a pattern for the last queries of a sequence, whose keys are in a cache
masks        transformers' mask functions, read as patterns
few          a few queries, such as a decode step's: the keys of their rows, and no plan
modules      attention modules by the index or the name of a layer
attention    the attention function, and patterns for layers
replace      models with a sparse attention of their own: longformer, big_bird
keys         keys at some positions, as a pattern
"""

from splatc.integrations.transformers.attention import register, set_patterns
from splatc.integrations.transformers.replace import replace_attention

__all__ = ["register", "replace_attention", "set_patterns"]
