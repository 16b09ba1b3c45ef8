"""Making the attention of a PyTorch model sparse.

to_nm             N:M attention (DFSS) in the place of what a model has
find_pattern      SPION's blocks, from a map of attention
mean_attention    such a map, of queries and keys
SpionAttention    a layer that is dense until it is switched to blocks
SpionSchedule     when to switch, and the switch
prune_to_zero     the softmax in which pruned entries have the score 0
layer_costs       operations and memory of each layer's attention, beside dense; costs_of: of a pattern
sparsek           SparseK's projection: a differentiable choice of k scores

Importing this package imports nothing else; its names come with their first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from splatc.sparsify.callbacks import lightning_callback as lightning_callback
    from splatc.sparsify.callbacks import trainer_callback as trainer_callback
    from splatc.sparsify.costs import costs_of as costs_of
    from splatc.sparsify.costs import layer_costs as layer_costs
    from splatc.sparsify.layer import SpionAttention as SpionAttention
    from splatc.sparsify.nm import NMAttention as NMAttention
    from splatc.sparsify.nm import to_nm as to_nm
    from splatc.sparsify.projection import sparsek as sparsek
    from splatc.sparsify.schedule import SpionSchedule as SpionSchedule
    from splatc.sparsify.scores import mean_attention as mean_attention
    from splatc.sparsify.spion import find_pattern as find_pattern
    from splatc.sparsify.zero import prune_to_zero as prune_to_zero

HOMES = {  # name: the module that has it
    "NMAttention": "nm",
    "SpionAttention": "layer",
    "SpionSchedule": "schedule",
    "costs_of": "costs",
    "find_pattern": "spion",
    "layer_costs": "costs",
    "lightning_callback": "callbacks",
    "mean_attention": "scores",
    "prune_to_zero": "zero",
    "sparsek": "projection",
    "to_nm": "nm",
    "trainer_callback": "callbacks",
}

__all__ = list(HOMES)


def __getattr__(name: str) -> Any:
    if name in HOMES:
        return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
