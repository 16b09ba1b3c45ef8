"""What ptxas says of a kernel in its -v report, whoever ran it: nvcc or NVRTC."""

from __future__ import annotations

import re
from dataclasses import dataclass

from splatc.errors import CompileError

_ENTRY = re.compile(r"Compiling entry function '(\w+)'")
_PROPERTIES = re.compile(r"Function properties for (\S+)")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USAGE = re.compile(r"Used (\d+) registers")
_LOSS = re.compile(r"\bC75\d\d\b|[Ll]ocal memory used")  # C75xx: wgmma serialised, setmaxnreg ignored, ...


@dataclass(frozen=True)
class Compiled:
    """What a CUDA compiler makes of one source for one arch. log: everything that it and ptxas -v said."""

    cubin: bytes
    ptx: str
    log: str


@dataclass(frozen=True)
class Usage:
    """One function: registers of a thread, and bytes of local memory: stack frame, spill stores and loads."""

    registers: int
    stack_bytes: int
    spill_bytes: int


def read_report(log: str) -> dict[str, Usage]:
    """The usage of each entry function in a ptxas -v report. Raises CompileError if there is none to read."""
    found: dict[str, Usage] = {}
    entry, function, stack, spills = "", "", 0, 0
    for line in log.splitlines():
        if match := _ENTRY.search(line):
            entry = match[1]
        elif match := _PROPERTIES.search(line):
            function = match[1]
        elif (match := _SPILLS.search(line)) and function == entry:
            stack, spills = int(match[1]), int(match[2]) + int(match[3])
        elif (match := _USAGE.search(line)) and entry:
            found[entry] = Usage(int(match[1]), stack, spills)
    if not found:
        raise CompileError("ptxas gave no report: its -v output has changed; please report your CUDA version")
    return found


def check_report(log: str, arch: str) -> None:
    """Raise CompileError, quoting ptxas, where any function spills, uses the stack or lost its asynchrony (C75xx)."""
    for line in log.splitlines():
        spills = _SPILLS.search(line)
        if (spills and any(map(int, spills.groups()))) or _LOSS.search(line):
            said = line.partition(": ")[2] if line.startswith("ptxas") and ": " in line else line
            raise CompileError(
                f"the kernel is not fit for {arch}: ptxas says {said.strip()!r}; "
                "if you chose the tile, choose another, else use a smaller head_dim and report this"
            )


def first_error(log: str) -> str:
    """The line of a compiler's output that says what went wrong."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "no message")
