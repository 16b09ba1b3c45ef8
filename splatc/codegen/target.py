"""What a kernel is compiled for."""

from __future__ import annotations

import ctypes
import importlib.util
import re
import sys
from dataclasses import dataclass

from splatc.config import Config
from splatc.errors import InvalidInput

NATIVE = "native"
OLDEST = "sm_80"


@dataclass(frozen=True)
class Target:
    """A device family and its architecture.

    kind: "cpu" (arch: "native" or an LLVM CPU name such as "znver4") or "cuda" (arch: "sm_80", "sm_90a", ...).
    """

    kind: str
    arch: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.arch}"


def resolve_target(target: str | Target | None) -> Target:
    """A target from what the user wrote.

    None: SPLATC_ARCH if set, else the GPU here if torch sees one, else this CPU. "cpu"; "cuda": the GPU here, else
    SPLATC_ARCH, else the oldest that we compile for (its PTX runs on any later GPU); or an arch such as "sm_90a".
    Raises InvalidInput for anything else.
    """
    if isinstance(target, Target):
        return target
    arch = Config.from_env().arch
    if target is None:
        target = arch or gpu_arch() or "cpu"
    elif target == "cuda":
        target = gpu_arch() or arch or OLDEST
    if isinstance(target, str) and (target == "cpu" or target.startswith("cpu:")):
        return Target("cpu", target[4:] or NATIVE)
    if not isinstance(target, str) or not re.fullmatch(r"sm_\d{2,3}[af]?", target):
        raise InvalidInput(f"target is {target!r}, but it must be 'cpu', 'cuda' or an arch such as 'sm_80' or 'sm_90a'")
    return Target("cuda", target)


def gpu_arch() -> str | None:
    """The arch of the current GPU if there is a driver and torch sees one, else None."""
    if "torch" not in sys.modules and (not _has_driver() or importlib.util.find_spec("torch") is None):
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    return arch_of(torch.cuda.get_device_capability())


def arch_of(capability: tuple[int, int]) -> str:
    """What to compile for, for a GPU of this compute capability."""
    major, minor = capability
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


def _has_driver() -> bool:
    """Whether a CUDA driver is installed: cheaper to ask than importing torch."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True
