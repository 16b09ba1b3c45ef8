"""What a kernel is compiled for."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass

from splatc.config import Config
from splatc.errors import InvalidInput, Unsupported

NATIVE = "native"


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

    None: SPLATC_ARCH if set, else the GPU here if torch sees one, else this CPU. "cpu"; "cuda" (the GPU here, else
    SPLATC_ARCH); an arch such as "sm_90a". Raises InvalidInput for anything else, Unsupported for "cuda" without a GPU.
    """
    if isinstance(target, Target):
        return target
    arch = Config.from_env().arch
    if target is None:
        target = arch or gpu_arch() or "cpu"
    if not isinstance(target, str):
        raise InvalidInput(f"target is {target!r}, but it must be None, 'cpu', 'cuda' or an arch such as 'sm_90a'")
    if target == "cpu" or target.startswith("cpu:"):
        return Target("cpu", target[4:] or NATIVE)
    if target == "cuda":
        found = gpu_arch() or arch
        if found is None:
            raise Unsupported("target 'cuda': no GPU here; name an arch, such as target='sm_90a', or set SPLATC_ARCH")
        target = found
    if not re.fullmatch(r"sm_\d{2,3}[af]?", target):
        raise InvalidInput(f"target is {target!r}, but it must be 'cpu', 'cuda' or an arch such as 'sm_80' or 'sm_90a'")
    return Target("cuda", target)


def gpu_arch() -> str | None:
    """The arch of the current GPU if torch is loaded (or installed) and sees one, else None."""
    try:
        torch = sys.modules.get("torch") or __import__("torch")
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")
