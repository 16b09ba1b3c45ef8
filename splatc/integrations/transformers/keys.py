"""Keys at some positions, as a pattern: global tokens, and what is no padding."""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import Any

import numpy as np

from splatc.patterns import Pattern, full, global_cols

Positions = np.ndarray[Any, np.dtype[np.bool_]]


def keys_at(chosen: Positions) -> Pattern:
    """All queries attend to the keys with True in bool (kv_len,), of which there is one at least."""
    if chosen.all():
        return full()
    edges = np.flatnonzero(np.diff(np.concatenate([[False], chosen, [False]]).astype(np.int8)))
    runs = [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]
    return reduce(or_, (global_cols(b) & ~global_cols(a) if a else global_cols(b) for a, b in runs))


def groups_of(*each: Positions) -> dict[tuple[bytes, ...], list[int]]:
    """Batch entries with equal rows in all of these arrays (batch, ...)."""
    found: dict[tuple[bytes, ...], list[int]] = {}
    for i in range(len(each[0])):
        found.setdefault(tuple(x[i].tobytes() for x in each), []).append(i)
    return found
