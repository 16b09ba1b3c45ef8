"""F.scaled_dot_product_attention by a pattern, within a context."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from splatc.errors import InvalidInput, Unsupported
from splatc.integrations.torch.call import Ways, attend, real_keys
from splatc.patterns import as_pattern

Where = Callable[[torch.Tensor, torch.Tensor], bool]
_SDPA = torch.nn.functional.scaled_dot_product_attention
_MULTIHEAD = (torch.nn.functional.multi_head_attention_forward, torch._native_multi_head_attention)


class patch_sdpa(TorchFunctionMode):  # noqa: N801 (used as a function)
    """In this context calls of ``F.scaled_dot_product_attention`` attend by a pattern, however they were imported.

        with splatc.patch_sdpa("causal & window(256, 0)"):
            y = model(x)

    pattern: of ``splatc.patterns``, its text, or a list with one for each head. where(query, key): which calls it is
    for (default: all); others run as they are: ``lambda q, k: q.shape[-2] == k.shape[-2]`` leaves cross-attention.

    dropout_p, is_causal (no later key, in addition to the pattern), scale and enable_gqa are PyTorch's.
    attn_mask may say which keys are padding, (batch, 1, 1, kv_len) or less, boolean or 0 and -inf; other masks raise
    Unsupported, and so does nn.MultiheadAttention, which ``splatc.patch`` is for. A query without a key gives 0.
    A context in which nothing was replaced raises InvalidInput when it is left: the model does not attend by this
    function. It holds for the thread that entered it. A backward pass needs no context, unless it computes forward
    passes again (gradient checkpointing): use ``splatc.patch`` with names of modules there.
    """

    def __init__(self, pattern: Any, where: Where | None = None) -> None:
        super().__init__()
        self.ways = Ways.of(as_pattern(pattern))
        self.where = where
        self.seen = self.replaced = 0

    def __torch_function__(self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:  # fmt: skip
        kwargs = kwargs or {}
        if func in _MULTIHEAD:
            raise Unsupported("nn.MultiheadAttention attends by a function of its own: splatc.patch(model, pattern)")
        if func is not _SDPA:
            return func(*args, **kwargs)
        self.seen += 1
        if self.where is not None and not self.where(*_query_and_key(*args, **kwargs)):
            return func(*args, **kwargs)
        self.replaced += 1
        return sparse_sdpa(self.ways, *args, **kwargs)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        if error is None and not self.replaced:
            raise InvalidInput(f"patch_sdpa: {self.seen} calls of F.scaled_dot_product_attention, none replaced: the "
                               "model attends otherwise (timm can), or `where` leaves all out")  # fmt: skip


def sparse_sdpa(ways: Ways, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                attn_mask: torch.Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
                scale: float | None = None, enable_gqa: bool = False) -> torch.Tensor:  # fmt: skip
    """``F.scaled_dot_product_attention`` by a pattern; see ``patch_sdpa``. Tensors (..., heads, seq, dim) or (batch,
    seq, dim), one head."""
    if query.is_nested:
        raise Unsupported("query is a nested tensor: pad it, and say so by attn_mask")
    if not query.ndim == key.ndim == value.ndim >= 3:
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
        raise Unsupported(f"query, key and value have shapes {shapes}: splatc takes (batch, heads, seq, dim)")
    q, k, v = (x.unsqueeze(1) if x.ndim == 3 else x.flatten(0, -4) for x in (query, key, value))
    options: dict[str, Any] = {"dropout_p": dropout_p} if dropout_p else {}
    real = None if attn_mask is None else _padding(attn_mask, query, key.shape[-2])
    pattern = ways.causal if is_causal else ways.plain
    o = attend(pattern, q, k, v, real=real, scale=scale, enable_gqa=enable_gqa, **options)
    return o.view(*query.shape[:-1], value.shape[-1])


def _padding(mask: torch.Tensor, query: torch.Tensor, kv_len: int) -> Any:
    """bool (batch or 1, kv_len) of a mask that is the same for all heads and queries."""
    scores = torch.Size((*query.shape[:-1], kv_len))
    if mask.ndim > len(scores) or any(n not in (1, m) for n, m in zip(mask.shape[::-1], scores[::-1], strict=False)):
        raise InvalidInput(f"attn_mask has shape {tuple(mask.shape)}: scores have {tuple(scores)}")
    mask = mask[tuple(slice(1 if stride == 0 else None) for stride in mask.stride()[:-1])]  # what expand() repeats
    same = mask.shape[max(-mask.ndim, -3) : -1] if query.ndim > 3 else mask.shape[-2:-1]
    if mask.shape[-1] != kv_len or mask.ndim > 4 or any(n != 1 for n in same):
        raise Unsupported(f"attn_mask has shape {tuple(mask.shape)}: splatc.patch_sdpa takes padding, (batch, 1, 1, "
                          "kv_len); say all else by the pattern (causal & ...)")  # fmt: skip
    return real_keys("attn_mask", mask, kept=True).reshape(-1, mask.shape[-1])


def _query_and_key(query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
    return query, key
