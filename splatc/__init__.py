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

__all__ = ["analyze", "attention", "compile", "patterns"]


def __getattr__(name: str) -> Any:
    if name == "nn":  # it imports torch
        import splatc.nn

        return splatc.nn
    if name == "jax":  # it imports JAX
        import splatc.jax

        return splatc.jax
    if name == "__version__":
        from importlib.metadata import version

        return version("splatc")
    raise AttributeError(f"module 'splatc' has no attribute {name!r}")
