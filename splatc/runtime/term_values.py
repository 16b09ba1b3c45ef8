"""Terms of a score as parameters of GPU kernels: what codegen/hopper/terms.py declares, by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from splatc.ir.dropout import threshold_of

if TYPE_CHECKING:
    from splatc.ir.terms import Terms
    from splatc.runtime.gpu_call import Step

POINTERS = {"slopes_ptr": "alibi_slopes", "relative_ptr": "relative_bias", "biases_ptr": "block_bias",
            "sinks_ptr": "sinks", "seed_ptr": "seed"}  # fmt: skip
# Of terms that a kernel does not have, or until a call brings them
ABSENT: dict[str, float] = {
    **dict.fromkeys(POINTERS, 0), "reach": 0, "shift": 0, "block_size": 1, "block_rows": 1, "block_cols": 1,
    "threshold": 0, "kept": 1.0,
}  # fmt: skip


def term_values(terms: Terms) -> dict[str, float]:
    """Every parameter, of tensors that stay alive until the kernels have started."""
    tensors = {name: getattr(terms, field) for name, field in POINTERS.items()}
    values = {**ABSENT, **{name: x.data_ptr() for name, x in tensors.items() if x is not None}, "shift": terms.shift}
    if terms.relative_bias is not None:
        values["reach"] = terms.relative_bias.shape[1] // 2
    if terms.block_bias is not None:
        _, rows, cols = terms.block_bias.shape
        values |= {"block_size": terms.block_size, "block_rows": rows, "block_cols": cols}
    if terms.dropout_p:
        values |= {"threshold": threshold_of(terms.dropout_p), "kept": 1 / (1 - terms.dropout_p)}
    return values


class Slots:
    """Where the steps of a call hold certain parameters."""

    def __init__(self, steps: Sequence[Step], names: Iterable[str]) -> None:
        self._slots: list[tuple[str, Any]] = [
            (name, slot) for name in names for step in steps if (slot := step.arguments.slot(name)) is not None
        ]

    def fill(self, values: Mapping[str, float]) -> None:
        for name, slot in self._slots:
            slot.value = values[name]
