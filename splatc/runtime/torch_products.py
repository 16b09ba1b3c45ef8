"""Gradients of the three kernels by PyTorch's autograd: each product's are the other products.

    values = sddmm(q, k)            dq = spmm(dvalues, k)        dk = spmm_transposed(dvalues, q)
    o = spmm(values, v)             dvalues = sddmm(do, v)       dv = spmm_transposed(values, do)
    o = spmm_transposed(values, y)  dvalues = sddmm(y, do)       dy = spmm(values, do)

so that these can be differentiated again. Where query heads share a key head, its gradient is summed over them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from splatc.runtime import products
from splatc.runtime.structure import Structure
from splatc.runtime.tensors import computed_in, dtype_name


def sddmm(structure: Structure, q: Any, k: Any, factor: float) -> Any:
    """As ``products.sddmm``, differentiable in q and k."""
    return _Sddmm.apply(structure, q, k, factor)  # type: ignore[no-untyped-call]


def spmm(structure: Structure, values: Any, heads: int, y: Any, factor: float, transposed: bool = False) -> Any:
    """As ``products.spmm``, differentiable in values and y."""
    return _Spmm.apply(structure, values, heads, y, factor, transposed)  # type: ignore[no-untyped-call]


def softmax(structure: Structure, values: Any, heads: int) -> tuple[Any, Any]:
    """As ``products.softmax``, differentiable, once, by way of both results."""
    p, lse = _Softmax.apply(structure, values, heads)  # type: ignore[no-untyped-call]
    return p, lse


class _Sddmm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, structure: Structure, q: Any, k: Any, factor: float) -> Any:
        ctx.save_for_backward(q, k)
        ctx.options = structure, factor
        return products.sddmm(structure, q, k, factor)

    @staticmethod
    def backward(ctx: Any, dvalues: Any) -> tuple[Any, ...]:
        (q, k), (structure, factor), (_, of_q, of_k, _) = ctx.saved_tensors, ctx.options, ctx.needs_input_grad
        heads = q.shape[1]
        dq = spmm(structure, dvalues, heads, k, factor) if of_q else None
        dk = _shared(spmm(structure, dvalues, heads, q, factor, True), k.shape[1]) if of_k else None
        return None, dq, dk, None


class _Spmm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, structure: Structure, values: Any, heads: int, y: Any, factor: float, turned: bool) -> Any:
        ctx.save_for_backward(values, y)
        ctx.options = structure, factor, turned
        return products.spmm(structure, values, heads, y, factor, turned)

    @staticmethod
    def backward(ctx: Any, do: Any) -> tuple[Any, ...]:
        (values, y), (structure, factor, turned) = ctx.saved_tensors, ctx.options
        of_values, of_y, heads = ctx.needs_input_grad[1], ctx.needs_input_grad[3], do.shape[1]
        pair = (y, do) if turned else (do, y)
        dvalues = sddmm(structure, *pair, factor) if of_values else None
        dy = _shared(spmm(structure, values, heads, do, factor, not turned), y.shape[1]) if of_y else None
        return None, dvalues, None, dy, None, None


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, structure: Structure, values: Any, heads: int) -> tuple[Any, Any]:
        p, lse = products.softmax(structure, values, heads)
        ctx.save_for_backward(p)
        ctx.structure = structure
        return p, lse

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dp: Any, dlse: Any) -> tuple[Any, ...]:
        (p,) = ctx.saved_tensors
        return None, products.softmax_gradient(ctx.structure, p, dp, dlse.contiguous()), None


def _shared(x: Any, heads: int) -> Any:
    """x (batch, query heads, seq, dim) summed over the query heads that share each of so many heads."""
    if x.shape[1] == heads:
        return x
    wide = x.to(getattr(torch, computed_in(dtype_name(x))))
    return wide.unflatten(1, (heads, -1)).sum(2).to(x.dtype)
