"""The three kernels that fused attention is made of, for those who need the parts: scores, their softmax, the sum.

    scores = splatc.sddmm(q, k, "causal & window(256, 0)")
    probs = splatc.softmax(scores)
    o = splatc.spmm(probs, v)                 # = splatc.attention(q, k, v, "causal & window(256, 0)")

They are R-SDDMM, R-softmax and R-SpMM of SPLAT (arXiv 2407.16847), on CPUs and Hopper GPUs. Values take memory
for every element, which fused attention does not: where only o is wanted, it is the way.
"""

from __future__ import annotations

from typing import Any

from splatc.errors import InvalidInput, Unsupported
from splatc.patterns.importers import as_pattern
from splatc.runtime import products
from splatc.runtime.scores import SparseScores
from splatc.runtime.structure import structure_of
from splatc.runtime.tensors import (
    NO_TRANSFORMS,
    check_call,
    check_scale,
    dtype_name,
    for_autocast,
    is_torch,
    refuse_compilation,
)


def sddmm(q: Any, k: Any, pattern: Any, *, scale: float | None = None, enable_gqa: bool = False) -> SparseScores:
    """scale * <q_i, k_j> for the pairs (i, j) of a pattern: O(nnz) values in ACSR order.

    q (batch, heads, q_len, dim), k (batch, kv_heads, kv_len, dim): torch tensors, differentiable, or NumPy arrays;
    float32, float64, float16 or (torch) bfloat16. The values have their dtype and are summed in float32 (float64).
    pattern: what ``splatc.compile`` takes, one for all heads or one for each. scale: default 1/sqrt(dim). enable_gqa:
    allow fewer key heads. On a GPU float32 is rounded to tf32 where it enters a product. Raises InvalidInput for what
    does not fit, Unsupported for a GPU that is not sm_90a, and there for dims that are no multiples of 8.
    """
    refuse_compilation(q, "splatc.sddmm", "leave it outside, or disable it there (torch.compiler.disable)")
    if is_torch(q) and is_torch(k):
        q, k, _ = for_autocast(q, k, k)
    shape = check_call(q, k, k, "bhsd", enable_gqa)
    structure = structure_of(as_pattern(pattern, q_len=shape.q_len, kv_len=shape.kv_len, heads=shape.heads),
                             shape.q_len, shape.kv_len)  # fmt: skip
    return SparseScores(_of(q).sddmm(structure, q, k, check_scale(scale, shape.head_dim)), structure)


def softmax(scores: SparseScores, *, return_lse: bool = False) -> Any:
    """The softmax of each row over its elements: SparseScores; with return_lse also lse (batch, heads, q_len).

    lse: natural log, float32 (for float64: float64), -inf for a row without elements, which has no probabilities. Both
    are differentiable, once.
    """
    _check_scores(scores)
    p, lse = _of(scores.values).softmax(scores.structure, scores.values, scores.heads)
    probs = scores.with_values(p)
    return (probs, lse) if return_lse else probs


def spmm(probs: SparseScores, v: Any, *, enable_gqa: bool = False) -> Any:
    """o[i] = sum over j of probs[i, j] v[j]: (batch, heads, q_len, v_head_dim), 0 for rows without elements.

    v: (batch, kv_heads, kv_len, v_head_dim), of the kind and dtype of the values; summed in float32 (float64).
    Differentiable in both. enable_gqa: allow fewer value heads. Under autocast both are converted, as by torch.matmul.
    """
    _check_scores(probs)
    if is_torch(v) and is_torch(probs.values):
        v, values, _ = for_autocast(v, probs.values, v)
        probs = probs.with_values(values)
    if is_torch(v) != is_torch(probs.values) or not hasattr(v, "dtype"):
        kinds = type(v).__name__, type(probs.values).__name__
        raise InvalidInput(f"v is a {kinds[0]} but the values are a {kinds[1]}: give both of one kind")
    if is_torch(v) and v.device != probs.values.device:
        raise InvalidInput(f"v is on {v.device} but the values are on {probs.values.device}: move them to one")
    if dtype_name(v) != probs.dtype:
        raise InvalidInput(f"v is {dtype_name(v)} but the values are {probs.dtype}: convert them to one")
    if v.ndim != 4 or (v.shape[0], v.shape[2]) != (probs.batch, probs.kv_len) or 0 in (v.shape[1], v.shape[3]):
        wanted = f"({probs.batch}, heads, {probs.kv_len}, v_head_dim)"
        raise InvalidInput(f"v has shape {tuple(v.shape)}: it must be {wanted}")
    if probs.heads != v.shape[1] and (not enable_gqa or probs.heads % v.shape[1]):
        raise InvalidInput(f"v has {v.shape[1]} heads but the values {probs.heads}: give as many or, with "
                           "enable_gqa=True, a divisor")  # fmt: skip
    return _of(v).spmm(probs.structure, probs.values, probs.heads, v, 1.0)


def _check_scores(scores: Any) -> None:
    if not isinstance(scores, SparseScores):
        raise InvalidInput(f"scores are a {type(scores).__name__}: give SparseScores, as splatc.sddmm makes them")
    if is_torch(scores.values) and scores.values.device.type not in ("cpu", "cuda"):
        raise InvalidInput(f"the values are on {scores.values.device}: move them to the CPU or a CUDA GPU")


def _of(x: Any) -> Any:
    """The functions for tensors like x: those of PyTorch's autograd, or those without gradients."""
    if not is_torch(x):
        return products
    import torch

    from splatc.runtime import torch_products

    if torch._C._are_functorch_transforms_active():
        raise Unsupported(NO_TRANSFORMS)
    return torch_products
