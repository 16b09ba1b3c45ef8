"""Patterns for models in plain PyTorch, by the two calls that attention goes through there.

Importing this package imports torch.

    splatc.patch(model, "window(128, 128)")          # every nn.MultiheadAttention in it
    with splatc.patch_sdpa(pattern):                 # every F.scaled_dot_product_attention: diffusers, timm
        y = model(x)

call        a pattern in place of all keys, with the padding and flags that such calls bring
sdpa        F.scaled_dot_product_attention within a context
multihead   nn.MultiheadAttention by a pattern
modules     which modules of a model get which pattern
"""

from splatc.integrations.torch.modules import patch
from splatc.integrations.torch.sdpa import patch_sdpa

__all__ = ["patch", "patch_sdpa"]
