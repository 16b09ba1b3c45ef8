"""N:M attention in trained models, as DFSS does it (arXiv 2203.00091): swap the attention, keep the weights, and train
for a few steps more."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch.nn import functional as F

from splatc.errors import InvalidInput, Unsupported
from splatc.nn.dense import dense_attention
from splatc.nn.functional import sparse_attention
from splatc.nn.module import SparseAttention
from splatc.patterns import Pattern, causal, nm


def to_nm(model: torch.nn.Module, n: int = 2, m: int = 4, *, dense: bool = False) -> torch.nn.Module:
    """The model with its attention pruned to n:m (2:4 or 1:2), changed in place and returned.

    Every ``nn.MultiheadAttention`` gives its place, and its parameters, to an ``NMAttention``, in and outside torch's
    transformer layers; every ``splatc.nn.SparseAttention`` keeps the n:m largest scores of its pattern. Names in
    ``state_dict`` stay, so checkpoints fit before and after. dense: compute it densely, by ``dense_attention``: needed
    for training on a device without an N:M kernel and for masks that come with a call; for MultiheadAttention only.
    Raises InvalidInput where there is nothing to swap, Unsupported for options that N:M attention does not have.
    """
    pruned = nm(n, m)
    parents = list(model.modules())
    places = [(parent, name, child) for parent in parents for name, child in parent._modules.items()
              if isinstance(child, torch.nn.MultiheadAttention)]  # fmt: skip
    sparse = [module for module in parents if isinstance(module, SparseAttention)]
    found = [model] if isinstance(model, torch.nn.MultiheadAttention) else [child for *_, child in places]
    if not found and not sparse:
        raise InvalidInput(f"{type(model).__name__} has neither a torch.nn.MultiheadAttention nor a "
                           "splatc.nn.SparseAttention: there is nothing to swap; where it calls attention itself, call "
                           "splatc.attention there, with a pattern & nm(2, 4)")  # fmt: skip
    if dense and sparse:
        raise Unsupported("dense=True is for torch.nn.MultiheadAttention: a SparseAttention has kernels only")
    made = {one: NMAttention(one, pruned, dense) for one in dict.fromkeys(found)}
    patterns = [(module, module.pattern & pruned) for module in sparse]
    for module, pattern in patterns:
        module.set_pattern(pattern)
    for parent, name, child in places:
        setattr(parent, name, made[child])
    for parent in parents:
        if isinstance(parent, torch.nn.TransformerEncoder):
            parent.use_nested_tensor = False  # its short cut for padding is for dense attention
    return made[model] if isinstance(model, torch.nn.MultiheadAttention) else model


class NMAttention(torch.nn.Module):
    """What stands in the place of an ``nn.MultiheadAttention``, with its parameters under its names, and is called like
    one: the same projections, and scores pruned to n:m in between. It returns (o, None): weights are never formed.

    Masks: ``is_causal=True`` says that attn_mask is the causal one, as PyTorch does. Other masks, and padding, need
    dense=True; they must be boolean, or floats of 0 and -inf.
    """

    _qkv_same_embed_dim = False  # keeps torch's fused encoder layers away, which know dense attention only

    def __init__(self, of: torch.nn.MultiheadAttention, pattern: Pattern, dense: bool = False) -> None:
        """of: whose parameters to share. pattern: with nm(...) in it. dense: compute it by ``dense_attention``."""
        super().__init__()
        if of.bias_k is not None or of.add_zero_attn:
            raise Unsupported("add_bias_kv and add_zero_attn put keys beside the sequence: N:M attention has no place "
                              "for them")  # fmt: skip
        self.embed_dim, self.num_heads, self.head_dim = of.embed_dim, of.num_heads, of.head_dim
        self.dropout, self.batch_first = of.dropout, of.batch_first
        for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias"):
            self.register_parameter(name, getattr(of, name))
        self.out_proj = of.out_proj
        self.pattern, self.dense = pattern, dense
        self.train(of.training)

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                key_padding_mask: torch.Tensor | None = None, need_weights: bool = True,
                attn_mask: torch.Tensor | None = None, average_attn_weights: bool = True,
                is_causal: bool = False) -> tuple[torch.Tensor, None]:  # fmt: skip
        """As of ``nn.MultiheadAttention``; need_weights and average_attn_weights change nothing."""
        if query.is_nested:
            raise Unsupported("N:M attention takes no nested tensors: pad them")
        batched = query.ndim == 3
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        turned = batched and not self.batch_first
        if turned:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        pattern = self.pattern & causal() if is_causal else self.pattern
        mask = self._mask(None if is_causal else attn_mask, key_padding_mask)
        q, k, v = (x.reshape(*x.shape[:2], self.num_heads, self.head_dim) for x in self._project(query, key, value))
        dropout_p = self.dropout if self.training else 0.0
        if self.dense:
            o = dense_attention(q, k, v, pattern, layout="bshd", mask=mask, dropout_p=dropout_p)
        else:
            options: Any = {"dropout_p": dropout_p} if dropout_p else {}
            o = sparse_attention(q, k, v, pattern, layout="bshd", **options)
        y = self.out_proj(o.flatten(-2))
        y = y.transpose(0, 1) if turned else y
        return y if batched else y.squeeze(0), None

    def _project(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        """q, k and v, (batch, seq, embed_dim)."""
        names = "q_proj_weight", "k_proj_weight", "v_proj_weight"
        whole, bias = self._parameters["in_proj_weight"], self._parameters["in_proj_bias"]
        weights = [self.get_parameter(name) for name in names] if whole is None else whole.chunk(3)
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        return [F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True)]

    def _mask(self, attn_mask: torch.Tensor | None, padding: torch.Tensor | None) -> torch.Tensor | None:
        """Where keys count, to broadcast to (batch, heads, q_len, kv_len); None: everywhere."""
        out = None
        if attn_mask is not None:
            out = self._counts("attn_mask", attn_mask)
            out = out.reshape(-1, self.num_heads, *out.shape[1:]) if out.ndim == 3 else out
        if padding is not None:
            there = self._counts("key_padding_mask", padding)[:, None, None]
            out = there if out is None else out & there
        return out

    def _counts(self, name: str, mask: torch.Tensor) -> torch.Tensor:
        if not self.dense:
            _refuse(name)
        if mask.dtype == torch.bool:
            return ~mask
        off = mask == -torch.inf
        if not (off | (mask == 0)).all():
            raise Unsupported(f"{name} adds to scores: N:M attention takes masks only, of booleans or of 0 and -inf")
        return ~off

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, {self.num_heads}, pattern={self.pattern}" + (", dense=True" if self.dense else "")


def _refuse(name: str) -> NoReturn:
    raise Unsupported(f"{name} comes with the call, and kernels are made for patterns: pass is_causal=True if it is "
                      "the causal mask, use to_nm(model, dense=True), or splatc.nn.SparseAttention with a pattern")
