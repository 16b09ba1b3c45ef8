"""Attention over several processes: the sequence is sharded, and the pattern says which keys each of them needs."""

from splatc.distributed.attention import ContextParallel, context_parallel
from splatc.distributed.layout import CONTIGUOUS, ZIGZAG, Layout, residues
from splatc.distributed.plan import Plan, Traffic, plan_of

__all__ = [
    "CONTIGUOUS",
    "ContextParallel",
    "Layout",
    "Plan",
    "Traffic",
    "ZIGZAG",
    "context_parallel",
    "plan_of",
    "residues",
]
