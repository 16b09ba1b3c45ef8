"""splatc: compiles the geometry of an attention mask into fused kernels.

    pattern = splatc.patterns.causal() & splatc.patterns.window(256, 0)
    attend = splatc.compile(pattern, seq_len=4096, head_dim=64, dtype="float32")
    o = attend(q, k, v)

Importing splatc loads neither torch nor TVM; they come with the first use that needs them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from splatc import patterns
from splatc.compile import analyze, attention, compile

if TYPE_CHECKING:
    from splatc import jax as jax
    from splatc import nn as nn
    from splatc import sparsify as sparsify
    from splatc.integrations.torch import patch, patch_sdpa
    from splatc.reordered import reorder
    from splatc.runtime.compressed import CompressedScores, nm_scores
    from splatc.runtime.scores import SparseScores
    from splatc.runtime.unfused import sddmm, softmax, spmm

__all__ = ["CompressedScores", "SparseScores", "analyze", "attention", "compile", "nm_scores", "patch", "patch_sdpa",
           "patterns", "reorder", "sddmm", "softmax", "spmm"]  # fmt: skip

MODULES = ("jax", "nn", "sparsify")  # imported when asked for: they import torch or JAX
HOMES = {  # as what these need is
    "splatc.integrations.torch": ("patch", "patch_sdpa"),
    "splatc.reordered": ("reorder",),
    "splatc.runtime.compressed": ("CompressedScores", "nm_scores"),
    "splatc.runtime.unfused": ("SparseScores", "sddmm", "softmax", "spmm"),
}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *MODULES})


def __getattr__(name: str) -> Any:
    if name in MODULES:
        return import_module(f"splatc.{name}")
    for home, names in HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    if name == "__version__":
        return import_module("importlib.metadata").version("splatc")
    raise AttributeError(f"module 'splatc' has no attribute {name!r}")
