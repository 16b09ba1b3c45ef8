"""splatc: compiles the geometry of an attention mask into fused kernels.

    pattern = splatc.patterns.causal() & splatc.patterns.window(256, 0)
    attend = splatc.compile(pattern, seq_len=4096, head_dim=64, dtype="float32")
    o = attend(q, k, v)

Importing splatc loads neither torch nor TVM; they come with the first use that needs them.
"""

from typing import TYPE_CHECKING, Any

from splatc import patterns
from splatc.compile import analyze, attention, compile

if TYPE_CHECKING:
    from splatc import jax as jax
    from splatc import nn as nn
    from splatc import sparsify as sparsify
    from splatc.runtime.compressed import CompressedScores, nm_scores
    from splatc.runtime.scores import SparseScores
    from splatc.runtime.unfused import sddmm, softmax, spmm

__all__ = ["CompressedScores", "SparseScores", "analyze", "attention", "compile", "nm_scores", "patterns", "sddmm",
           "softmax", "spmm"]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in ("jax", "nn", "sparsify"):  # jax imports JAX, nn imports torch
        from importlib import import_module

        return import_module(f"splatc.{name}")
    if name in ("SparseScores", "sddmm", "softmax", "spmm"):
        from splatc.runtime import unfused

        return getattr(unfused, name)
    if name in ("CompressedScores", "nm_scores"):
        from splatc.runtime import compressed

        return getattr(compressed, name)
    if name == "__version__":
        from importlib.metadata import version

        return version("splatc")
    raise AttributeError(f"module 'splatc' has no attribute {name!r}")
