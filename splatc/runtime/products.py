"""The three kernels: values, softmax and products of one structure, without gradients. On GPUs: products_gpu.py.

q, y: (batch, heads, q_len, dim), k and the keys' y (batch, heads or fewer, kv_len, dim); torch tensors or NumPy arrays,
results are of their kind. values: ``Structure.values_shape``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from splatc.codegen.kernel import (
    SDDMM,
    SDDMM_FUNCTION,
    SOFTMAX,
    SOFTMAX_BACKWARD_FUNCTION,
    SOFTMAX_FUNCTION,
    SPMM,
    SPMM_FUNCTION,
    SPMM_TRANSPOSED_FUNCTION,
    product_spec,
)
from splatc.codegen.target import resolve_target
from splatc.runtime.cpu_call import exchange
from splatc.runtime.kernel import Kernel, find_kernel
from splatc.runtime.structure import Structure
from splatc.runtime.tensors import computed_in, dtype_name, is_torch, last_axis_contiguous

if TYPE_CHECKING:
    from splatc.runtime.products_gpu import GpuProducts


def product_kernel(role: str, dim: int, dtype: str) -> Kernel:
    """The kernel of one of PRODUCTS for this machine."""
    return find_kernel(product_spec(role, dim, dtype, resolve_target("cpu")))


def sddmm(structure: Structure, q: Any, k: Any, factor: float) -> Any:
    """values[q, k] = factor * <q_q, k_k> for every element, in q's dtype."""
    if (gpu := _gpu_of(q)) is not None:
        return gpu.sddmm(structure, q, k, factor)
    batch, heads, _, dim = (int(n) for n in q.shape)
    values = _empty(q, structure.values_shape(batch, heads), dtype_name(q))
    if not _size(values):
        return values
    run = product_kernel(SDDMM, dim, dtype_name(q)).load(SDDMM_FUNCTION)
    tables = structure.tile_arguments(batch, heads, transposed=True)
    run(_strided(q), _strided(k), exchange(values.reshape(batch, -1)), *tables, factor)
    return values


def spmm(structure: Structure, values: Any, heads: int, y: Any, factor: float, transposed: bool = False) -> Any:
    """out[q] = factor * sum over k of values[q, k] y[k] (transposed: out[k], over q of y[q]), (batch, heads, rows, dim)
    in y's dtype; 0 for rows without elements."""
    if (gpu := _gpu_of(y)) is not None:
        return gpu.spmm(structure, values, heads, y, factor, transposed)
    batch, dim = int(y.shape[0]), int(y.shape[3])
    rows = structure.kv_len if transposed else structure.q_len
    out = _empty(y, (batch, heads, rows, dim), dtype_name(y))
    if not _size(values) or not _size(y):
        out[...] = 0
        return out
    run = product_kernel(SPMM, dim, dtype_name(y)).load(SPMM_TRANSPOSED_FUNCTION if transposed else SPMM_FUNCTION)
    run(_flat(values), _strided(y), exchange(out), *structure.tile_arguments(batch, heads, transposed), factor)
    return out


def softmax(structure: Structure, values: Any, heads: int) -> tuple[Any, Any]:
    """(probabilities like values, lse (batch, heads, q_len), -inf for an empty row, in the type of computations)."""
    if (gpu := _gpu_of(values)) is not None:
        return gpu.softmax(structure, values, heads)
    dtype, batch = dtype_name(values), int(values.shape[0])
    p = _empty(values, tuple(values.shape), dtype)
    lse = _empty(values, (batch, heads, structure.q_len), computed_in(dtype))
    if not _size(values):
        lse[...] = -float("inf")
        return p, lse
    run = product_kernel(SOFTMAX, 1, dtype).load(SOFTMAX_FUNCTION)
    run(_flat(values), exchange(p.reshape(batch, -1)), exchange(lse), *structure.row_arguments(batch, heads))
    return p, lse


def softmax_gradient(structure: Structure, p: Any, dp: Any, dlse: Any) -> Any:
    """The gradient of values for those of p, and of lse (batch, heads, q_len), in the type of computations."""
    if (gpu := _gpu_of(p)) is not None:
        return gpu.softmax_gradient(structure, p, dp, dlse)
    ds = _empty(p, tuple(p.shape), dtype_name(p))
    if _size(p):
        batch, heads = (int(n) for n in dlse.shape[:2])
        run = product_kernel(SOFTMAX, 1, dtype_name(p)).load(SOFTMAX_BACKWARD_FUNCTION)
        rows = structure.row_arguments(batch, heads)
        run(_flat(p), _flat(dp), exchange(dlse), exchange(ds.reshape(batch, -1)), *rows)
    return ds


def _gpu_of(x: Any) -> GpuProducts | None:
    """The kernels of the GPU that x lies on, None for a CPU."""
    if not is_torch(x) or x.device.type != "cuda":
        return None
    from splatc.runtime.products_gpu import products_on

    return products_on(x.device.index)


def _flat(values: Any) -> Any:
    """(batch, all heads' elements), contiguous, as kernels take it."""
    whole = values.contiguous() if is_torch(values) else np.ascontiguousarray(values)
    return exchange(whole.reshape(whole.shape[0], -1))


def _strided(x: Any) -> Any:
    return exchange(last_axis_contiguous(x.detach() if is_torch(x) else x))


def _empty(like: Any, shape: tuple[int, ...], dtype: str) -> Any:
    if is_torch(like):
        import torch

        return torch.empty(shape, dtype=getattr(torch, dtype))
    return np.empty(shape, dtype)


def _size(x: Any) -> int:
    return int(np.prod(x.shape))
