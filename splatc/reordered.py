"""Attention over an irregular mask with queries and keys in an order of which the tiles are fewer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from splatc.codegen.costs import costs_of
from splatc.codegen.hopper.shape import ITEM_BYTES
from splatc.codegen.kernel import KernelSpec, kernel_spec
from splatc.codegen.target import resolve_target
from splatc.compile import attention, best_plan, resolve_mask
from splatc.errors import InvalidInput
from splatc.formats.reorder import band, band_both, cluster_both, clusters
from splatc.formats.strips import Ints
from splatc.patterns import Pattern, PerHead, as_pattern
from splatc.patterns.pruned import Pruned
from splatc.runtime.tensors import is_torch

GAIN = 0.03  # of the predicted time that an order must save
LARGEST = 2**30  # elements of a mask that is looked at as a matrix
BYTES = {**ITEM_BYTES, "float64": 8}  # of a value


@dataclass(frozen=True, eq=False)
class Reordered:
    """A mask with queries and keys in another order.

    pattern: the reordered mask. queries int64 (q_len,), keys int64 (kv_len,): which position comes at each place.
    method: how the order was found; "none" if the first one was best. before, after: predicted seconds of one head; but
    for symmetric orders, after includes those to move q, k, v and o.
    """

    pattern: Pattern
    queries: Ints
    keys: Ints
    method: str
    before: float
    after: float

    def attention(self, q: Any, k: Any, v: Any, *, scale: float | None = None, return_lse: bool = False,
                  enable_gqa: bool = False, softcap: float | None = None) -> Any:  # fmt: skip
        """What ``splatc.attention(q, k, v, mask)`` gives for the mask as it was: arguments and results in its order,
        (batch, heads, seq, dim). Biases and dropout, which are of positions, are not taken."""
        for name, x, order in (("q", q, self.queries), ("k", k, self.keys), ("v", v, self.keys)):
            if x.ndim != 4 or x.shape[2] != len(order):
                raise InvalidInput(f"{name} has shape {tuple(x.shape)}: it must be (batch, heads, {len(order)}, dim)")
        q, k, v = _moved(q, self.queries), _moved(k, self.keys), _moved(v, self.keys)
        o, lse = attention(q, k, v, self.pattern, scale=scale, return_lse=True, enable_gqa=enable_gqa, softcap=softcap)
        back = np.argsort(self.queries)
        return (_moved(o, back), _moved(lse, back)) if return_lse else _moved(o, back)


def reorder(mask: Any, *, seq_len: int | None = None, kv_len: int | None = None, head_dim: int = 64,
            dtype: Any = "float32", target: Any = None, symmetric: bool = False) -> Reordered:  # fmt: skip
    """The order of queries and keys for which this mask is cheapest: as it is, clusters of rows that attend alike (by
    Jaccard distance, as in SMaT, arXiv:2408.11551), or reverse Cuthill-McKee.

    mask, seq_len, kv_len, head_dim, dtype, target: as of ``splatc.compile``, by whose predicted time orders are
    compared. symmetric: only orders that are the same for queries and keys (of a square mask), so that a model can put
    its whole sequence in that order once, and attend by ``pattern``. It takes seconds for some thousand positions: for
    masks that are used often. Needs scipy. Raises InvalidInput.
    """
    pattern, q_len, kv_len = resolve_mask(mask, seq_len, kv_len)
    if isinstance(pattern, Pruned | PerHead):
        raise InvalidInput(f"reorder takes the mask of one head, and no {type(pattern).__name__}")
    if symmetric and q_len != kv_len:
        raise InvalidInput(f"symmetric orders are for square masks, and this one is {q_len} x {kv_len}")
    if q_len * kv_len > LARGEST:
        raise InvalidInput(f"the mask has {q_len} x {kv_len} elements: reorder looks at up to {LARGEST}")
    spec = kernel_spec(head_dim, None, dtype, resolve_target(target))
    matrix = pattern.dense(q_len, kv_len)
    before = _seconds(pattern, q_len, kv_len, spec)
    best = Reordered(pattern, np.arange(q_len), np.arange(kv_len), "none", before, before)
    moving = 0.0 if symmetric else _moving_seconds(q_len, kv_len, spec)
    for method, queries, keys in _orders(matrix, spec, symmetric):
        other = as_pattern(np.ascontiguousarray(matrix[queries][:, keys]))
        after = _seconds(other, q_len, kv_len, spec) + moving
        if after < min(best.after, before * (1 - GAIN)):
            best = Reordered(other, queries, keys, method, before, after)
    return best


def _orders(matrix: NDArray[np.bool_], spec: KernelSpec, symmetric: bool) -> list[tuple[str, Ints, Ints]]:
    out = []
    if matrix.shape[0] == matrix.shape[1]:
        same = {"clusters": clusters(matrix | matrix.T, spec.tile_m), "band": band(matrix)}
        out += [(name, order, order) for name, order in same.items()]
    if not symmetric:
        out.append(("clusters of each", *cluster_both(matrix, spec.tile_m, spec.tile_n)))
        out.append(("bands of each", *band_both(matrix)))
    return out


def _seconds(pattern: Pattern, q_len: int, kv_len: int, spec: KernelSpec) -> float:
    """Predicted for one head."""
    return best_plan(pattern, q_len, kv_len, spec).explanation.seconds


def _moving_seconds(q_len: int, kv_len: int, spec: KernelSpec) -> float:
    """To read and write q, k, v and o of one head."""
    numbers = (q_len + kv_len) * (spec.head_dim + spec.v_head_dim)
    return 2 * numbers * BYTES[spec.dtype] / costs_of(spec).bandwidth * 1e-6


def _moved(x: Any, order: Ints) -> Any:
    """x with the positions of ``order`` along its axis 2, whatever library it is of."""
    if not is_torch(x):
        return np.take(x, order, axis=2)
    import torch

    return x.index_select(2, torch.from_numpy(order).to(x.device))
