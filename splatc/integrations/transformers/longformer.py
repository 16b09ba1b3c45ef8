"""The attention of transformers' Longformer: a window, global tokens, and projections of their own for the latter."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

from splatc.errors import Unsupported
from splatc.integrations.transformers import few
from splatc.integrations.transformers.keys import groups_of, keys_at
from splatc.nn.any_length import any_length
from splatc.patterns import Pattern, window


class SparseLongformerSelfAttention(LongformerSelfAttention):  # type: ignore[misc]
    """What ``replace_attention`` makes of a LongformerSelfAttention, which keeps all that it has.

    Local queries attend to the window around them and to global tokens, global ones to all, by query_global, key_global
    and value_global. Padding is attended by none, and gives 0.
    """

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor,
                is_index_masked: torch.Tensor | None = None, is_index_global_attn: torch.Tensor | None = None,
                is_global_attn: bool | None = None,
                output_attentions: bool = False) -> tuple[torch.Tensor]:  # fmt: skip
        """hidden_states (batch, seq, embed_dim); attention_mask (batch, seq): negative for padding, 0, positive for
        global tokens. Returns (batch, seq, embed_dim) alone in a tuple."""
        if output_attentions:
            raise Unsupported("splatc computes no matrix of weights: call the model without output_attentions")
        real, everywhere = ((attention_mask >= 0).cpu().numpy(), (attention_mask > 0).cpu().numpy())
        out = torch.zeros_like(hidden_states)
        for entries in groups_of(real, everywhere).values():
            mine, special = real[entries[0]], everywhere[entries[0]]
            if not mine.any():
                continue
            at = torch.tensor(entries, device=out.device)
            out = out.index_copy(0, at, self._attend(hidden_states[at], mine, special))
        return (out,)

    def _attend(self, x: torch.Tensor, real: Any, special: Any) -> torch.Tensor:
        """Of entries with the same padding and global tokens."""
        side = self.one_sided_attn_window_size
        near = window(side, side) | keys_at(special) if special.any() else window(side, side)
        out = self._run(near & keys_at(real), self.query(x), self.key(x), self.value(x))
        out = out * torch.from_numpy(real).to(out.device)[:, None]
        if special.any():
            at = torch.from_numpy(np.flatnonzero(special)).to(out.device)
            answers = self._run(keys_at(real), self.query_global(x[:, at]), self.key_global(x), self.value_global(x))
            out = out.index_copy(1, at, answers)
        return out

    def _run(self, pattern: Pattern, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """(batch, q_len, embed_dim) of projections (batch, seq, embed_dim)."""
        q, k, v = (y.view(*y.shape[:2], self.num_heads, self.head_dim).transpose(1, 2) for y in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        if q.shape[2] <= few.MOST and not dropout:
            o = few.attend(pattern, q, k, v, None, None, None)
        else:
            options: dict[str, Any] = {"dropout_p": dropout} if dropout else {}
            o = any_length(pattern, "bhsd", None, True, None)(q, k, v, **options)
        return o.transpose(1, 2).flatten(2)
