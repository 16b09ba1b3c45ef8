"""The contestants: each builds, for a case and a shape, a function of (q, k, v) that gives o.

A builder raises NotApplicable where the contestant has no such mask or is not installed, and anything else where it
fails: both are facts about it and never end a run.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import splatc
from splatc.bench.gpu.cases import Case
from splatc.bench.gpu.shapes import Shape

MASK_LIMIT = 16384  # positions beyond which no boolean matrix is made


class NotApplicable(Exception):
    """A contestant has nothing to say about a case, or is not installed here."""


@dataclass(frozen=True)
class Contestant:
    """call(q, k, v) gives o (batch, heads, seq, dim). context() holds while it is called; compiled: splatc's object."""

    call: Callable[..., Any]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    compiled: Any = None
    exact: bool = True  # it computes this very mask: its result is checked


Builder = Callable[[Case, Shape, str], Contestant]


def kind_of(device: str) -> str:
    """The kind of a device: "cuda:1" is "cuda"."""
    return device.partition(":")[0]


def build_splatc(case: Case, shape: Shape, device: str) -> Contestant:
    """Ours, by the public interface."""
    compiled = splatc.compile(case.pattern, seq_len=shape.seq_len, head_dim=shape.head_dim, dtype=shape.dtype,
                              target=kind_of(device))  # fmt: skip
    if shape.heads == shape.kv_heads:
        return Contestant(compiled, compiled=compiled)
    return Contestant(lambda q, k, v: compiled(q, k, v, enable_gqa=True), compiled=compiled)


def build_unpruned(case: Case, shape: Shape, device: str) -> Contestant:
    """Ours for the static part of a mask that scores prune."""
    if not case.pruned:
        raise NotApplicable
    return Contestant(build_splatc(replace(case, pattern=case.static), shape, device).call, exact=False)


def build_flex(case: Case, shape: Shape, device: str) -> Contestant:
    """FlexAttention, compiled for this mask and shape (eager on a CPU, for tests)."""
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    blocks = _block_mask(case, shape.seq_len, device)
    attend: Any = flex_attention
    if kind_of(device) != "cpu":
        torch._dynamo.reset()  # else masks of earlier cases count as recompilations, which are limited
        # fullgraph: whatever cannot be compiled is an error and never a silent eager fallback
        attend = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    gqa = shape.heads != shape.kv_heads
    return Contestant(lambda q, k, v: attend(q, k, v, block_mask=blocks, enable_gqa=gqa))


@lru_cache(maxsize=1)
def _block_mask(case: Case, seq_len: int, device: str) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    mod = case.mask_mod(device)
    return create_block_mask(mod, None, None, seq_len, seq_len, device=device, _compile=kind_of(device) != "cpu")


def build_cudnn(case: Case, shape: Shape, device: str) -> Contestant:
    """SDPA's cuDNN backend: full or causal."""
    return _sdpa(case, shape, device, "CUDNN_ATTENTION")


def build_flash(case: Case, shape: Shape, device: str) -> Contestant:
    """SDPA's flash backend (FlashAttention 2): full or causal."""
    return _sdpa(case, shape, device, "FLASH_ATTENTION")


def _sdpa(case: Case, shape: Shape, device: str, backend: str) -> Contestant:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    causal = case.causal_flag
    if causal is None:
        raise NotApplicable
    gqa = shape.heads != shape.kv_heads

    def context() -> AbstractContextManager[Any]:
        # A CPU (tests) has neither backend: whatever torch takes there.
        return nullcontext() if kind_of(device) == "cpu" else sdpa_kernel(getattr(SDPBackend, backend))

    return Contestant(
        lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa), context
    )


def build_masked(case: Case, shape: Shape, device: str) -> Contestant:
    """SDPA with the boolean matrix, torch's choice of backend: what people fall back to."""
    from torch.nn.functional import scaled_dot_product_attention

    if shape.seq_len > MASK_LIMIT or case.causal_flag is False:
        raise NotApplicable
    mask = boolean_matrix(case, shape.seq_len, device)
    gqa = shape.heads != shape.kv_heads
    return Contestant(lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa))


@lru_cache(maxsize=1)
def boolean_matrix(case: Case, seq_len: int, device: str) -> Any:
    """The mask of a case, bool (seq_len, seq_len); the last one is remembered."""
    import torch

    return torch.from_numpy(case.pattern.dense(seq_len)).to(device)


def build_flash_attn(case: Case, shape: Shape, device: str) -> Contestant:
    """The flash-attn package: bands."""
    return _flash_package("flash_attn", case)


def build_flash_attn_3(case: Case, shape: Shape, device: str) -> Contestant:
    """FlashAttention 3's package: bands."""
    return _flash_package("flash_attn_interface", case)


def _flash_package(package: str, case: Case) -> Contestant:
    if case.band is None:
        raise NotApplicable
    attend = _installed(package).flash_attn_func
    left, right = case.band
    options: dict[str, Any] = {"causal": right == 0}
    if left >= 0:
        options["window_size"] = (left, right)

    def call(q: Any, k: Any, v: Any) -> Any:
        o = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), **options)
        return (o[0] if isinstance(o, tuple) else o).transpose(1, 2)

    return Contestant(call)


def build_flashinfer(case: Case, shape: Shape, device: str) -> Contestant:
    """FlashInfer's prefill of one sequence: full, causal and causal windows."""
    if case.band is None or case.band[1] > 0 or (case.band[0] >= 0 and case.band[1] != 0) or shape.batch != 1:
        raise NotApplicable
    attend = _installed("flashinfer").single_prefill_with_kv_cache
    left, right = case.band

    def call(q: Any, k: Any, v: Any) -> Any:
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        return attend(q, k, v, causal=right == 0, window_left=left).transpose(0, 1)[None]

    return Contestant(call)


def build_natten(case: Case, shape: Shape, device: str) -> Contestant:
    """NATTEN's 2-D neighbourhood. At the borders it shifts its window inwards, so the result differs there."""
    grid, size = getattr(case.pattern, "grid", ()), getattr(case.pattern, "size", ())
    if len(grid) != 2:
        raise NotApplicable
    attend = _installed("natten").na2d

    def call(q: Any, k: Any, v: Any) -> Any:
        q, k, v = (x.unflatten(2, grid).permute(0, 2, 3, 1, 4) for x in (q, k, v))
        return attend(q, k, v, kernel_size=size).permute(0, 3, 1, 2, 4).flatten(2, 3)

    return Contestant(call, exact=False)


def _installed(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise NotApplicable from None


BUILDERS: Mapping[str, Builder] = {
    "splatc": build_splatc,
    "unpruned": build_unpruned,
    "flex": build_flex,
    "cudnn": build_cudnn,
    "flash": build_flash,
    "masked": build_masked,
    "flash_attn": build_flash_attn,
    "flash_attn_3": build_flash_attn_3,
    "flashinfer": build_flashinfer,
    "natten": build_natten,
}
TITLES = {
    "splatc": "splatc",
    "unpruned": "splatc, not pruned",
    "flex": "FlexAttention",
    "cudnn": "cuDNN",
    "flash": "SDPA flash",
    "masked": "SDPA with mask",
    "flash_attn": "flash-attn",
    "flash_attn_3": "FlashAttention 3",
    "flashinfer": "FlashInfer",
    "natten": "NATTEN",
}
PACKAGES = ("flash_attn", "flash_attn_3", "flashinfer", "natten")  # contestants that are there only if installed
