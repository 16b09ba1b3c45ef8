"""What attention by a pattern costs beside dense attention: operations and memory, by counting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from splatc.errors import InvalidInput
from splatc.formats.acsr import analyze_heads
from splatc.patterns import Pattern, heads_of

if TYPE_CHECKING:
    import torch

DENSE_PRODUCTS = 6  # S and O; dV, dP, dQ and dK
FUSED_PRODUCTS = 7  # and S once more, as probabilities are not kept
LSE_BYTES = 4


@dataclass(frozen=True)
class Costs:
    """Attention of one layer on one sequence, in a step of training, dense and unfused beside a pattern and fused.

    pairs: of queries and keys, over all heads. multiply_adds: of the products of attention, forward and backward (six
    dense; seven fused, which computes scores twice); projections and the softmax are not counted, nor is what tiles
    compute beyond the pattern (``splatc.compile(...).explain().waste``). bytes: what the backward pass needs beside q,
    k, v and o: dense the probabilities, fused a float32 a row, its log-sum-exp.
    """

    dense_pairs: int
    pairs: int
    dense_multiply_adds: int
    multiply_adds: int
    dense_bytes: int
    bytes: int

    @property
    def fewer_operations(self) -> float:
        """How many times."""
        return self.dense_multiply_adds / max(self.multiply_adds, 1)

    @property
    def less_memory(self) -> float:
        """How many times."""
        return self.dense_bytes / self.bytes

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return vars(self) | {"fewer_operations": self.fewer_operations, "less_memory": self.less_memory}


def costs_of(pattern: Pattern, length: int, heads: int, head_dim: int, itemsize: int = 2) -> Costs:
    """The costs of a pattern for sequences of ``length``. itemsize: bytes of a number of q, k and v."""
    for name, value in (("length", length), ("heads", heads), ("head_dim", head_dim), ("itemsize", itemsize)):
        if value < 1:
            raise InvalidInput(f"{name} is {value}: it must be at least 1")
    each = heads_of(pattern, heads)
    known = {one: acsr.nnz for one, acsr in analyze_heads(pattern, length, length).items()}
    pairs, every = sum(known[one] for one in each), heads * length**2
    return Costs(every, pairs, DENSE_PRODUCTS * head_dim * every, FUSED_PRODUCTS * head_dim * pairs,
                 every * itemsize, heads * length * LSE_BYTES)  # fmt: skip


def layer_costs(model: torch.nn.Module, length: int, itemsize: int = 2) -> dict[str, Costs]:
    """The costs of every `splatc.nn.SparseAttention` of a model (a `SpionAttention` is one), by the layers' names, with
    the patterns that they have now. Raises InvalidInput for a model without one."""
    from splatc.nn import SparseAttention

    layers = {name: one for name, one in model.named_modules() if isinstance(one, SparseAttention)}
    if not layers:
        raise InvalidInput(f"{type(model).__name__} has no SparseAttention: there is nothing to count")
    return {name: costs_of(one.pattern, length, one.num_heads, one.head_dim, itemsize) for name, one in layers.items()}
