"""Sparse attention as a function, for models that have projections of their own; and the dense one that checks it."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from splatc.errors import InvalidInput
from splatc.nn.any_length import AnyLength, any_length, by_operator
from splatc.nn.dense import dense_attention as dense_attention
from splatc.patterns import Pattern, as_pattern
from splatc.runtime.tensors import check_call
from splatc.runtime.terms import TermOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack


def sparse_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: Any, *, scale: float | None = None,
                     softcap: float | None = None, return_lse: bool = False, enable_gqa: bool = False,
                     layout: str = "bhsd", allow_tf32: bool = True, **options: Unpack[TermOptions]) -> Any:  # fmt: skip
    """Attention of q (batch, heads, q_len, head_dim) to k (batch, kv_heads, kv_len, head_dim) and v (batch, kv_heads,
    kv_len, v_head_dim), where ``pattern`` says so; (batch, seq, heads, dim) with layout="bshd".

    pattern: a pattern of ``splatc.patterns``, its text, or whatever else ``splatc.patterns.as_pattern`` takes, such as
    a list with one for each head. scale: of the scores, default 1/sqrt(head_dim). softcap: scores s become softcap *
    tanh(s / softcap). enable_gqa: allow fewer key/value heads. allow_tf32: as of ``splatc.compile``.
    options: alibi_slopes, relative_bias, block_bias, block_size, sinks, bias_align, dropout_p and seed: see
    ``splatc.runtime.terms.TermOptions``.

    Returns o like q, with v_head_dim; with return_lse also lse (batch, heads, q_len), natural log, float32 (for
    float64: float64). Both are differentiable where the device has gradients. A row that attends to nothing gives 0
    and -inf. A kernel is compiled once for the head dims, dtype and device, with the tile that is best for the first
    length; other lengths find it (``splatc.attention`` chooses for every length anew). Inside ``torch.compile`` give a
    pattern or its text. Raises InvalidInput for tensors that do not fit.
    """
    if torch.compiler.is_compiling():
        if not isinstance(pattern, (Pattern, str)):
            raise InvalidInput("inside torch.compile give a pattern of splatc.patterns (a list: per_head(...)) or text")
        handle = _constant_handle(pattern, layout, softcap, allow_tf32)
        return by_operator(handle, layout, q, k, v, scale, return_lse, enable_gqa, options)
    if not isinstance(pattern, (Pattern, str)):
        s = check_call(q, k, v, layout, enable_gqa)
        pattern = as_pattern(pattern, q_len=s.q_len, kv_len=s.kv_len, heads=s.heads, batch=s.batch)
    attend = _attention(pattern, layout, softcap, allow_tf32)
    return attend(q, k, v, scale=scale, return_lse=return_lse, enable_gqa=enable_gqa, **options)


@lru_cache(maxsize=256)
def _attention(pattern: Pattern | str, layout: str, softcap: float | None, allow_tf32: bool) -> AnyLength:
    return any_length(as_pattern(pattern), layout, softcap, allow_tf32, None)


_traced: dict[str, AnyLength] = {}  # what compiled graphs refer to, by handle: kept as long as the process


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _constant_handle(pattern: Pattern | str, layout: str, softcap: float | None, allow_tf32: bool) -> str:
    """Called while a compiler traces, which keeps the text and not the object."""
    attend = _attention(pattern, layout, softcap, allow_tf32)
    _traced[attend.handle] = attend
    return attend.handle
