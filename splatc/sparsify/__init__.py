"""Making the attention of a PyTorch model sparse.

to_nm    N:M attention (DFSS) in the place of what a model has

Importing this package imports nothing else; its names come with their first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from splatc.sparsify.nm import NMAttention as NMAttention
    from splatc.sparsify.nm import to_nm as to_nm

HOMES = {"NMAttention": "nm", "to_nm": "nm"}  # name: the module that has it


def __getattr__(name: str) -> Any:
    if name in HOMES:
        return getattr(import_module(f"splatc.sparsify.{HOMES[name]}"), name)
    raise AttributeError(f"module 'splatc.sparsify' has no attribute {name!r}")
