"""SparseK attention (arXiv:2406.16747): a window, and beyond it the k keys that a learned score finds worth keeping."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import pad

from splatc.errors import InvalidInput
from splatc.nn.functional import sparse_attention
from splatc.sparsify.projection import shares, thresholds

QUERIES = 64  # that share gathered keys


def sparsek_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: torch.Tensor, keep: int, window: int,
                      *, scale: float | None = None) -> torch.Tensor:  # fmt: skip
    """Causal attention of each query to the last ``window`` keys and to at most ``keep`` of those before.

    q (batch, heads, seq, head_dim); k and v (batch, kv_heads, seq, dim), kv_heads a divisor of heads; scores (batch,
    kv_heads, seq): how much a key is worth, to whatever query. scale: of q k, default 1/sqrt(head_dim). Returns
    (batch, heads, seq, dim of v), differentiable in all four where `sparse_attention` is. Raises InvalidInput.

    Keys older than the window compete: p = sparsek(their scores, keep), and those of the ``keep`` largest p that are
    above 0 stay; none with a score of -inf does. A key counts by p, so that it leaves smoothly and the scores learn:

        o_i = sum_j p_ij exp(s_ij) v_j / sum_j p_ij exp(s_ij),  p_ij = 1 in the window

    The window is a compiled kernel. A key that has been dropped never returns, as thresholds never fall: so a block of
    queries needs the keys kept before it and its own length of new ones, which are gathered once for all of it. That
    part is computed by torch, in seq * (keep + 64) numbers a head.
    """
    _check(q, k, v, scores, keep, window)
    heads, length, kv_heads = q.shape[1], q.shape[2], k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    pattern = f"causal() & window({window - 1}, 0)"  # text, which traces under torch.compile
    near, lse = sparse_attention(q, k, v, pattern, scale=scale, return_lse=True, enable_gqa=heads != kv_heads)
    if length <= window:
        return near  # type: ignore[no-any-return]
    with torch.autocast(q.device.type, enabled=False):
        numbers = scores if scores.dtype == torch.float64 else scores.float()
        return _with_kept(q * scale, k, v, numbers, near, lse, keep, window).to(q.dtype)


def _with_kept(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: torch.Tensor, near: torch.Tensor,
               lse: torch.Tensor, keep: int, window: int) -> torch.Tensor:  # fmt: skip
    """Attention of which (near, lse) is the part in the window, and the kept keys the rest; in the dtype of scores."""
    (_, heads, length, _), kv_heads = q.shape, k.shape[1]
    index, share = _kept(scores, keep, window)

    def blocks(x: torch.Tensor) -> torch.Tensor:
        """(batch, heads, seq, dim) as (batch, kv_heads, group, blocks, QUERIES, dim)."""
        x = pad(x.to(scores.dtype), (0, 0, 0, -length % QUERIES))
        return x.reshape(x.shape[0], kv_heads, heads // kv_heads, -1, QUERIES, x.shape[-1])

    keys, values = (_gather(x.to(scores.dtype), index)[:, :, None] for x in (k, v))
    s, share = blocks(q) @ keys.mT, share[:, :, None]
    near, lse = blocks(near), blocks(lse[..., None])
    top = torch.maximum(s.detach().masked_fill(share == 0, -torch.inf).amax(-1, keepdim=True), lse.detach())
    far, in_window = share * (s - top).clamp(max=0).exp(), (lse - top).exp()
    o = (in_window * near + far @ values) / (in_window + far.sum(-1, keepdim=True))
    return o.flatten(3, 4).flatten(1, 2)[:, :, :length]


def _kept(scores: torch.Tensor, keep: int, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What each block of queries gathers: positions (batch, kv_heads, blocks, keep + QUERIES); and the share p of them
    in each query, (batch, kv_heads, blocks, QUERIES, keep + QUERIES), 0 where it does not keep one."""
    length, device = scores.shape[-1], scores.device
    first = torch.arange(0, length, QUERIES, device=device)
    place = torch.arange(length, device=device)
    allowed = first[:, None] + torch.arange(QUERIES, device=device) - window  # the newest key that competes
    with torch.no_grad():
        before = scores[..., None, :].masked_fill(place > allowed[:, :1], -torch.inf)
        old = _largest(before, keep)
        new = (allowed[:, :1] + 1 + torch.arange(QUERIES, device=device)).expand(*old.shape[:-1], -1)
        index = torch.cat([old, new], -1)
    is_old = torch.arange(index.shape[-1], device=device) < old.shape[-1]
    index = index[..., None, :]
    exists = (index >= 0) & (index <= torch.where(is_old, allowed[:, :1], allowed[:, -1:])[:, None])
    seen = exists & (index <= allowed[..., None])
    index = index.clamp(0, length - 1)
    each = _gather(scores[..., None], index[..., 0, :])[..., 0][..., None, :]
    tau = pad(thresholds(scores, keep, causal=True), (window, 0))[..., :length]  # rows in the window see no other key
    tau = pad(tau, (0, -length % QUERIES)).reshape(*tau.shape[:-1], -1, QUERIES, 1)
    best = _largest(each.detach().masked_fill(~seen, -torch.inf), keep)
    seen = seen & torch.zeros_like(seen).scatter_(-1, best, True)
    return index[..., 0, :], shares(each, tau).masked_fill(~seen, 0)


def _largest(x: torch.Tensor, count: int) -> torch.Tensor:
    """Where the largest along the last axis are; of equal ones the first, so that what was dropped stays so."""
    return x.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def _gather(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x (batch, kv_heads, seq, dim) at index (batch, kv_heads, blocks, n): (batch, kv_heads, blocks, n, dim)."""
    flat = index.flatten(2)[..., None].expand(-1, -1, -1, x.shape[-1])
    return x.gather(2, flat).reshape(*index.shape, -1)


class SparseKAttention(torch.nn.Module):
    """Causal self-attention to a window and to ``keep`` older keys of each key head, chosen by a learned score.

        layer = SparseKAttention(512, 8, keep=64, window=128)
        y = layer(x)                    # x, y: (batch, seq, 512)

    Whether a key stays depends on the key alone and not on the query: what is dropped once is never needed again. The
    score is ``score_proj(x)``, one number a key head; it learns through `splatc.sparsify.sparsek`.
    """

    def __init__(self, embed_dim: int, num_heads: int, *, keep: int, window: int, num_kv_heads: int | None = None,
                 bias: bool = True, scale: float | None = None, device: Any = None,
                 dtype: Any = None) -> None:  # fmt: skip
        """embed_dim: of x, a multiple of num_heads. keep, window: at least 1. num_kv_heads: a divisor of num_heads,
        default as many. bias: of the projections but the score's, which a constant would not change. scale: of the
        scores of attention, default 1/sqrt(head_dim). Raises InvalidInput for sizes that do not fit."""
        super().__init__()
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        for name, size in (("num_heads", num_heads), ("num_kv_heads", kv_heads), ("keep", keep), ("window", window)):
            if size < 1:
                raise InvalidInput(f"{name} is {size}: it must be at least 1")
        if embed_dim % num_heads or num_heads % kv_heads:
            raise InvalidInput(f"embed_dim {embed_dim}, {num_heads} heads, {kv_heads} key heads: each must be a "
                               "multiple of the next")  # fmt: skip
        self.head_dim, self.keep, self.window, self.scale = embed_dim // num_heads, keep, window, scale

        def linear(outputs: int, bias: bool) -> torch.nn.Linear:
            return torch.nn.Linear(embed_dim, outputs, bias, device, dtype)

        self.q_proj = linear(embed_dim, bias)
        self.k_proj, self.v_proj = (linear(kv_heads * self.head_dim, bias) for _ in range(2))
        self.score_proj, self.out_proj = linear(kv_heads, False), linear(embed_dim, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See the class."""
        if x.ndim != 3:
            raise InvalidInput(f"the input has shape {tuple(x.shape)}: it must be (batch, seq, embed_dim)")
        q, k, v = (one(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                   for one in (self.q_proj, self.k_proj, self.v_proj))  # fmt: skip
        o = sparsek_attention(q, k, v, self.score_proj(x).transpose(1, 2), self.keep, self.window, scale=self.scale)
        out: torch.Tensor = self.out_proj(o.transpose(1, 2).flatten(2))
        return out

    def extra_repr(self) -> str:
        return f"keep={self.keep}, window={self.window}, head_dim={self.head_dim}"


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: torch.Tensor, keep: int, window: int) -> None:
    if keep < 1 or window < 1:
        raise InvalidInput(f"keep is {keep} and window {window}: both must be at least 1")
    if q.ndim != 4 or k.ndim != 4 or q.shape[2] != k.shape[2]:
        raise InvalidInput(f"q {tuple(q.shape)} and k {tuple(k.shape)}: they must be (batch, heads, seq, head_dim), of "
                           "one sequence")  # fmt: skip
    if scores.shape != k.shape[:3]:
        raise InvalidInput(f"scores have shape {tuple(scores.shape)}: they must be {tuple(k.shape[:3])}, one a key")
