"""nn.MultiheadAttention by a pattern: the same module, with the same parameters under the same names."""

from __future__ import annotations

import torch
from torch.nn import functional

from splatc.errors import InvalidInput, Unsupported
from splatc.integrations.torch.call import Ways, attend, real_keys, refuse
from splatc.patterns import Pattern

WAYS, DROP_WEIGHTS = "_splatc_ways", "_splatc_drop_weights"  # attributes of patched modules


class PatternedMultiheadAttention(torch.nn.MultiheadAttention):
    """What ``splatc.patch`` makes of an nn.MultiheadAttention, which keeps all that it has."""

    @property
    def _qkv_same_embed_dim(self) -> bool:  # type: ignore[override]
        """What torch's encoder layers ask before they leave this module out and compute dense attention themselves."""
        return False

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                key_padding_mask: torch.Tensor | None = None, need_weights: bool = True,
                attn_mask: torch.Tensor | None = None, average_attn_weights: bool = True,
                is_causal: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        """As of nn.MultiheadAttention, but for what ``splatc.patch`` refuses. With is_causal, attn_mask is what torch
        says it is then, the causal mask."""
        refuse("a patched nn.MultiheadAttention", [
            ("a nested tensor", query.is_nested, "pad it, and say so by key_padding_mask"),
            ("need_weights=True", need_weights and not getattr(self, DROP_WEIGHTS),
             "splatc makes no matrix of weights: pass need_weights=False, or patch(..., drop_weights=True) to give "
             "None to callers that do not look at it"),
            ("attn_mask is given", attn_mask is not None and not is_causal,
             "say it by the pattern (causal & ...), or pass is_causal=True if it is the causal mask"),
        ])  # fmt: skip
        batched = query.ndim == 3
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        real = None if key_padding_mask is None else real_keys("key_padding_mask", key_padding_mask, kept=False)
        if real is not None and real.shape != key.shape[:2]:
            raise InvalidInput(f"key_padding_mask has shape {real.shape}: here it must be {tuple(key.shape[:2])}")
        heads = (x.view(*x.shape[:2], self.num_heads, -1) for x in self._project(query, key, value))
        options = {"dropout_p": self.dropout} if self.training and self.dropout else {}
        ways: Ways = getattr(self, WAYS)
        o = attend(ways.causal if is_causal else ways.plain, *heads, real=real, layout="bshd", **options)
        y = self.out_proj(o.flatten(-2))
        return (y.squeeze(0) if not batched else y if self.batch_first else y.transpose(0, 1)), None

    def _project(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
        packed, bias = self.in_proj_weight, self.in_proj_bias
        if packed is not None and query is key and key is value:
            return functional.linear(query, packed, bias).chunk(3, -1)
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight) if packed is None else packed.chunk(3)
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        return tuple(functional.linear(*each) for each in zip((query, key, value), weights, biases, strict=True))


def patch_multihead(module: torch.nn.MultiheadAttention, pattern: Pattern | None, drop_weights: bool) -> None:
    """Let a module attend by a pattern; None: as it did."""
    if type(module) not in (torch.nn.MultiheadAttention, PatternedMultiheadAttention):
        raise Unsupported(f"patch: {type(module).__name__} is a kind of nn.MultiheadAttention that we do not know")
    refuse("patch: an nn.MultiheadAttention", [
        ("add_bias_kv", module.bias_k is not None, "its key has no position in a pattern"),
        ("add_zero_attn", module.add_zero_attn, "its key has no position in a pattern"),
    ])  # fmt: skip
    setattr(module, WAYS, None if pattern is None else Ways.of(pattern))
    setattr(module, DROP_WEIGHTS, drop_weights)
    module.__class__ = torch.nn.MultiheadAttention if pattern is None else PatternedMultiheadAttention
