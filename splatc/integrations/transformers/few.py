"""Few queries, such as that of a decode step: their rows of the mask are the keys to take, and nothing is planned.

A plan is worth its milliseconds where it serves for many tiles or many calls; here each step has a length of its own,
and a tile of our kernels would hold more empty rows than queries. What is left once the keys are chosen is a dense
product of one row with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch.backends.cuda import SDPAParams, can_use_flash_attention

from splatc.patterns import Pattern, heads_of

MOST = 8  # queries; more are worth a plan
# Operators, as splatc.patch_sdpa would replace the function F.scaled_dot_product_attention, by whatever name.
_sdpa = torch.ops.aten.scaled_dot_product_attention.default
_flash = torch.ops.aten._scaled_dot_product_flash_attention.default
_bmm_to = getattr(torch.ops.aten.bmm, "dtype", None)  # from torch 2.8 on, for CUDA and without gradients


@dataclass(frozen=True)
class Rows:
    """Keys that any of the rows attends to (None: all keys), and mask: bool (1 or heads, q_len, these keys), None if
    all rows do."""

    keys: slice | torch.Tensor | None
    mask: torch.Tensor | None


def attend(pattern: Pattern, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None,
           softcap: float | None, sinks: torch.Tensor | None) -> torch.Tensor:  # fmt: skip
    """Attention of q (batch, heads, q_len, head_dim) to k and v (batch, kv_heads, kv_len, dim) where ``pattern`` says
    so, with options as of ``sparse_attention``; differentiable. A row of nothing gives 0."""
    heads_of(pattern, q.shape[1])  # refuses another number of heads
    rows = _rows(pattern, q.shape[2], k.shape[2], q.device)
    if rows.keys is not None:  # a slice takes PyTorch as long as all else here
        k, v = k[:, :, rows.keys], v[:, :, rows.keys]
    if k.shape[2] and rows.mask is None and softcap is None and sinks is None:
        return _to_all(q, k, v, scale)
    return _by_hand(q, k, v, rows.mask, scale, softcap, sinks)


def _to_all(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> torch.Tensor:
    """Attention to all keys. On a GPU PyTorch would choose cuDNN, which plans for 40 to 60 ms at each new length."""
    gqa = q.shape[1] != k.shape[1]
    if q.device.type != "cuda":
        return _sdpa(q, k, v, scale=scale, enable_gqa=gqa)  # type: ignore[no-any-return]
    if q.shape[3] % 8 == 0 and can_use_flash_attention(SDPAParams(q, k, v, None, 0.0, False, gqa)):
        return _flash(q, k, v, scale=scale)[0]  # type: ignore[no-any-return]
    return _by_hand(q, k, v, None, scale, None, None)


def _by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float | None,
             softcap: float | None, sinks: torch.Tensor | None) -> torch.Tensor:  # fmt: skip
    dtype, exact = q.dtype, torch.promote_types(q.dtype, torch.float32)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        q, k, v = (x.to(exact) for x in (q, k, v))  # so that gradients are not rounded on their way
    batch, heads, q_len, head_dim = q.shape
    kv_heads, kv_len, v_head_dim = v.shape[1:]
    rows = heads // kv_heads * q_len  # the query heads of a key head are rows like its queries
    s = _scores(q.reshape(batch, kv_heads, rows, head_dim), k, exact).view(batch, heads, q_len, kv_len)
    s = s * (head_dim**-0.5 if scale is None else scale)
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    if mask is not None:
        s = s.masked_fill(~mask, -float("inf"))
    if sinks is not None:
        s = torch.cat([s, sinks.to(s.dtype)[:, None, None].expand(batch, heads, q_len, 1)], -1)
    p = torch.softmax(s, -1)
    if sinks is not None:
        p = p[..., :-1]
    if mask is not None:
        p = p.masked_fill(~mask, 0.0)  # a row of nothing is NaN before
    p = p.to(v.dtype).reshape(batch, kv_heads, rows, kv_len)
    return (p @ v).view(batch, heads, q_len, v_head_dim).to(dtype)


def _scores(q: torch.Tensor, k: torch.Tensor, exact: torch.dtype) -> torch.Tensor:
    """q k^T in float32 at least: rounded to bfloat16, large scores would be a percent and more off."""
    if q.dtype == exact or q.device.type != "cuda" or _bmm_to is None:
        return q.to(exact) @ k.to(exact).mT
    return _bmm_to(q.flatten(0, 1), k.flatten(0, 1).mT, exact).unflatten(0, q.shape[:2])  # type: ignore[no-any-return]


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is remembered serves passes with gradients too
def _rows(pattern: Pattern, q_len: int, kv_len: int, device: torch.device) -> Rows:
    mask = pattern.dense(q_len, kv_len).reshape(-1, q_len, kv_len)
    seen = np.flatnonzero(mask.any((0, 1)))
    mask = mask[..., seen]
    given = None if mask.all() else torch.from_numpy(mask).to(device)
    if len(seen) == kv_len:
        return Rows(None, given)
    step = int(seen[1] - seen[0]) if len(seen) > 1 else 1
    if not len(seen) or (np.diff(seen) == step).all():
        start = int(seen[0]) if len(seen) else 0
        return Rows(slice(start, start + step * len(seen), step), given)
    return Rows(torch.from_numpy(seen).to(device), given)
