"""What a kernel is compiled for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A device family and its architecture.

    kind: "cpu" (arch: an LLVM CPU name such as "znver4") or "cuda" (arch: "sm_80", "sm_90a", ...).
    """

    kind: str
    arch: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.arch}"
