"""What most commands begin with: the mask that the user named, its lengths, and the kernel it is meant for."""

from __future__ import annotations

from typing import Annotated

import typer

from splatc.codegen.kernel import KernelSpec, kernel_spec, with_pruning
from splatc.codegen.target import Target
from splatc.compile import After, best_plan, resolve_mask
from splatc.config import Config
from splatc.errors import InvalidInput
from splatc.patterns.base import Pattern
from splatc.patterns.importers import parse_or_load
from splatc.patterns.pruned import split
from splatc.runtime.attention import Plan

MaskArgument = Annotated[
    str,
    typer.Argument(
        metavar="PATTERN_OR_FILE",
        show_default=False,
        help="A pattern such as 'causal & window(256, 0)', or a mask file: .npy, .npz, .mtx, .txt, .splat",
    ),
]
SeqLen = Annotated[
    int | None, typer.Option("--seq-len", "-s", show_default=False, help="Queries; a matrix knows its own.")
]
KvLen = Annotated[int | None, typer.Option("--kv-len", show_default=False, help="Keys, if not as many as queries.")]
HeadDim = Annotated[int, typer.Option("--head-dim", "-d", help="Size of a query and key vector, 1 to 256.")]
VHeadDim = Annotated[
    int | None, typer.Option("--v-head-dim", show_default=False, help="That of a value vector, if another.")
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        show_default="float32, for a GPU bfloat16",
        help="float32, float16 or bfloat16; on a CPU also float64.",
    ),
]


def sized_mask(text: str, seq_len: int | None, kv_len: int | None) -> tuple[Pattern, int, int]:
    """(pattern, q_len, kv_len) of a pattern's text or a mask file."""
    for name, value in (("--seq-len", seq_len), ("--kv-len", kv_len)):
        if value is not None and value < 1:
            raise InvalidInput(f"{name} is {value}: it must be at least 1")
    pattern = parse_or_load(text)
    try:
        return resolve_mask(pattern, seq_len, kv_len)
    except InvalidInput as error:
        if seq_len is None and "seq_len is missing" in str(error):
            raise InvalidInput(f"{pattern} has no length of its own: give --seq-len N") from None
        raise


def quick_target(target: str | None) -> str:
    """The target for commands that compile nothing: --target, else SPLATC_ARCH, else the CPU. Looks for no GPU."""
    return target or Config.from_env().arch or "cpu"


def named_spec(head_dim: int, v_head_dim: int | None, dtype: str | None, target: Target) -> KernelSpec:
    """The kernel that the options name, with its most usual tile."""
    return kernel_spec(head_dim, v_head_dim, dtype or ("float32" if target.kind == "cpu" else "bfloat16"), target)


def plan_mask(mask: tuple[Pattern, int, int], spec: KernelSpec, after: After | None = None) -> Plan:
    """The plan of a mask, with the tile that ``splatc.compile`` would take; compiles nothing."""
    pattern, q_len, kv_len = mask
    static, pruning = split(pattern)
    return best_plan(static, q_len, kv_len, with_pruning(spec, pruning), after=after)
