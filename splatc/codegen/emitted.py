"""What an emitter of CUDA gives, and what the launch needs to know of each function: its parameters, by name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from splatc.errors import CompileError

KINDS = {"CUtensorMap": "map", "int": "int32", "int64_t": "int64", "float": "float32"}
_BEGIN = re.compile(r'^(?=extern "C" __global__)', re.MULTILINE)
_FUNCTION = re.compile(r'extern "C" __global__ void\s+__launch_bounds__\(([^)]*)\)\s+(\w+)\s*\(([^)]*)\)\s*[;{]')


@dataclass(frozen=True)
class DeviceFunction:
    """A __global__ function: its name in the source, threads of a block, bytes of dynamic shared memory."""

    name: str
    threads: int
    smem_bytes: int


@dataclass(frozen=True)
class Emitted:
    """A generated module, a tvm.IRModule, and its functions, the first one being the attention itself."""

    module: Any
    functions: tuple[DeviceFunction, ...]


@dataclass(frozen=True)
class Signature:
    """A __global__ function of generated source.

    parameters: (kind, name) in order; kind is "map" (a CUtensorMap by value), "pointer", "int32", "int64" or "float32".
    """

    name: str
    threads: int
    parameters: tuple[tuple[str, str], ...]


def parse_signatures(source: str) -> tuple[Signature, ...]:
    """The __global__ functions of a generated source, each once though it is declared and defined.

    Raises CompileError for a parameter that no launch could give a value.
    """
    found: dict[str, Signature] = {}
    for bounds, name, inside in _FUNCTION.findall(source):
        parameters = tuple(_parameter(name, text) for text in inside.split(",") if text.strip())
        found.setdefault(name, Signature(name, int(bounds.partition(",")[0]), parameters))
    if not found:
        raise CompileError("the generated CUDA has no __global__ function; please report this kernel")
    return tuple(found.values())


def functions_apart(source: str) -> dict[str, str]:
    """The sources of a generated source's __global__ functions by name, each with all that comes before the first, its
    lines numbered as they are here."""
    before, *parts = _BEGIN.split(source)
    apart, line = {}, 1 + before.count("\n")
    for part in parts:
        if "{" in part:  # the others declare what is defined further down
            apart[parse_signatures(part)[0].name] = f"{before}#line {line}\n{part}"
        line += part.count("\n")
    return apart


def _parameter(function: str, text: str) -> tuple[str, str]:
    kind, _, name = text.strip().rpartition(" ")
    words = [word for word in kind.split() if word not in ("const", "__restrict__", "__grid_constant__")]
    if name.startswith("cse_"):
        raise CompileError(f"{function}: TVM made parameter {name} of an expression: write it inside the kernel")
    if "*" in kind:
        return "pointer", name
    if words[-1:] and words[-1] in KINDS:
        return KINDS[words[-1]], name
    raise CompileError(f"{function}: parameter {text.strip()!r} is of a kind that no launch knows")
