"""What a Score asks for at a call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Terms:
    """Tensors and numbers, None where the Score does not ask."""

    alibi_slopes: Any = None
    relative_bias: Any = None
    block_bias: Any = None
    sinks: Any = None
    seed: Any = None
    block_size: int = 0
    shift: int = 0
    dropout_p: float = 0.0
