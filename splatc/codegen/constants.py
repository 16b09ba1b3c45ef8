"""Numbers that kernels for GPUs share. In fp32: the emitted literals are exact."""

from __future__ import annotations

NEG_INF = float("-inf")
LOG2E = 1.44269502162933349609375
LN2 = 0.693147182464599609375
FULL_WARP = 0xFFFFFFFF


def ceil_div(value: int, step: int) -> int:
    """How many steps cover value."""
    return -(-value // step)
