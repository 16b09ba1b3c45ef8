"""``splatc compile`` and ``splatc dump``: kernels ahead of time, and everything that the compiler makes on the way."""

from __future__ import annotations

import io
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from splatc.cli.masks import (
    Dtype,
    HeadDim,
    KvLen,
    MaskArgument,
    SeqLen,
    VHeadDim,
    named_spec,
    plan_mask,
    quick_target,
    sized_mask,
)
from splatc.cli.output import console, note, size, write_or_print
from splatc.codegen.kernel import (
    COMPRESSED,
    HOPPER_STEP,
    ROWS,
    SDDMM,
    SOFTMAX,
    SPMM,
    KernelSpec,
    compressed_spec,
    gradient_specs,
    product_spec,
    tile_shapes,
    with_pruning,
)
from splatc.codegen.tables import Tables
from splatc.codegen.target import resolve_target
from splatc.codegen.toolchain import INSTALL, find_compiler
from splatc.config import Config
from splatc.errors import CacheError, InvalidInput, Unsupported
from splatc.ir.passes import PASSES
from splatc.ir.printer import to_text
from splatc.ir.program import GATHERED, Program
from splatc.patterns import full
from splatc.patterns.base import Pattern
from splatc.patterns.pruned import split
from splatc.runtime.attention import Plan
from splatc.runtime.kernel import find_kernel, kernel_cache
from splatc.runtime.structure import structure_of, tile_values

Sized = tuple[Pattern, int, int]

PASS_NAMES = ", ".join(["lower", *(one.__name__ for one in PASSES)])

COMPILE_EXAMPLES = """\b
Examples:
  splatc compile none --head-dim 64 --dtype bfloat16 --target sm_90a
  splatc compile 'causal & window(256, 0)' --seq-len 8192 -d 128 --target cpu"""

DUMP_EXAMPLES = """\b
Examples:
  splatc dump 'window(256, 256)' --seq-len 4096 --head-dim 64 --arch sm_90a -o window.cu
  splatc dump causal -s 4096 --what ptx --arch sm_80
  splatc dump causal -s 4096 --arch cpu                      (LLVM IR)
  splatc dump causal -s 4096 --arch cpu --backward           (of the gradients)
  splatc dump causal -s 4096 --arch sm_90a --role backward_rows
  splatc dump causal -s 4096 --arch sm_90a --unfused         (sddmm, softmax, spmm)
  splatc dump 'fixed(128, 16)' -s 1024 --after choose_views  (the IR after a pass)
  splatc dump 'fixed(128, 16)' -s 1024 --what tables -o tables.npz"""


Backward = Annotated[bool, typer.Option("--backward", help="What computes gradients.")]


class What(str, Enum):
    """What ``splatc dump`` can print."""

    cuda = "cuda"
    ptx = "ptx"
    llvm = "llvm"
    tir = "tir"
    ir = "ir"
    tables = "tables"


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command("compile", epilog=COMPILE_EXAMPLES)(compile_kernel)
    app.command(epilog=DUMP_EXAMPLES)(dump)


def compile_kernel(
    mask: Annotated[
        str,
        typer.Argument(
            metavar="PATTERN_OR_FILE|none",
            show_default=False,
            help="A mask, checked, whose tile the kernel gets; none: the most usual tile.",
        ),
    ],
    seq_len: SeqLen = None,
    kv_len: KvLen = None,
    head_dim: HeadDim = 64,
    v_head_dim: VHeadDim = None,
    dtype: Dtype = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            "--arch",
            show_default="the GPU here, else the CPU",
            help="cpu, cuda or an arch such as sm_90a (which needs NVRTC or nvcc).",
        ),
    ] = None,
    backward: Backward = False,
) -> None:
    """Compile a kernel into the cache, ahead of time, and print its folder (of gradients: of all that may be used)."""
    spec = named_spec(head_dim, v_head_dim, dtype, resolve_target(target))
    sized = None if mask == "none" else sized_mask(mask, seq_len, kv_len)
    if sized is not None:
        spec = plan_mask(sized, spec).spec
    specs = _kernels_of_gradients(spec, sized) if backward else [spec]
    root = kernel_cache(Config.from_env()).root
    if root is None:
        raise InvalidInput("SPLATC_DISABLE_CACHE is set, so a compiled kernel could not be kept: unset it")
    if spec.target.kind == "cuda" and find_compiler() is None:
        raise Unsupported(f"compiling for {spec.target.arch} needs NVRTC or nvcc: {INSTALL} (`splatc dump` needs none)")
    for one in specs:
        with console(stderr=True).status(f"compiling {one.name} for {one.target}"):
            folder = find_kernel(one).folder
        if not folder.is_relative_to(root):
            raise CacheError(
                f"the kernel cannot be kept in {root} (read-only or full): set SPLATC_CACHE_DIR to another folder"
            )
        print(folder)


def _kernels_of_gradients(spec: KernelSpec, sized: Sized | None) -> list[KernelSpec]:
    """All kernels that may compute the gradients of one: of the tiles that a mask gets; without one of all tiles."""
    kernels = gradient_specs(spec)
    if sized is None:
        return [replace(one, tile_m=m, tile_n=n) for one in kernels for m, n in tile_shapes(one)]
    return [plan_mask(_seen_by(one, sized), one).spec for one in kernels]


def _seen_by(spec: KernelSpec, sized: Sized) -> Sized:
    """The mask whose tiles a kernel for gradients walks over: but for that of dQ, transposed."""
    pattern, q_len, kv_len = sized
    static, _ = split(pattern)
    return (static, q_len, kv_len) if spec.role == ROWS else (static.transposed(), kv_len, q_len)


def dump(
    mask: MaskArgument,
    seq_len: SeqLen = None,
    kv_len: KvLen = None,
    head_dim: HeadDim = 64,
    v_head_dim: VHeadDim = None,
    dtype: Dtype = None,
    arch: Annotated[
        str | None,
        typer.Option("--arch", "--target", show_default="SPLATC_ARCH, else cpu", help="cpu or an arch such as sm_90a."),
    ] = None,
    what: Annotated[
        What | None, typer.Option("--what", show_default="cuda; llvm for the CPU", help="What to write.")
    ] = None,
    after: Annotated[
        str | None,
        typer.Option(
            "--after",
            metavar="PASS",
            show_default="the last one",
            help=f"The IR after a pass: {PASS_NAMES}.",
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", show_default="stdout", help="A file.")] = None,
    backward: Backward = False,
    role: Annotated[
        str | None,
        typer.Option(
            "--role",
            show_default="with --backward, one over the transposed mask",
            help="Of the kernels for gradients, this one: backward, or on Hopper also backward_rows, backward_columns, "
            "and for wide heads backward_values and backward_keys.",
        ),
    ] = None,
    unfused: Annotated[
        bool, typer.Option("--unfused", help="The kernels that the fused one replaces: sddmm, softmax, spmm.")
    ] = False,
) -> None:
    """Write what the compiler makes of a mask: CUDA, PTX, LLVM, TIR, the IR after any pass, or the tables."""
    spec = named_spec(head_dim, v_head_dim, dtype, resolve_target(quick_target(arch)))
    if what is None:
        what = What.ir if after is not None else What.cuda if spec.target.kind == "cuda" else What.llvm
    if after is not None and what is not What.ir:
        raise InvalidInput(f"--after is for --what ir: there are no passes in {what.value}")
    sized = sized_mask(mask, seq_len, kv_len)
    if unfused:
        write_or_print(_unfused(sized, spec, what, after, backward or role is not None), output)
        return
    if backward or role is not None:
        _, pruning = split(sized[0])
        spec = _kernel_of_role(with_pruning(spec, pruning), role)
        sized = _seen_by(spec, sized)
    if what is What.ir:
        write_or_print(_ir(sized, spec, after), output)
    elif what is What.tables:
        _write_tables(plan_mask(sized, spec), output)
    else:
        write_or_print(_source(plan_mask(sized, spec).spec, what), output)


def _kernel_of_role(spec: KernelSpec, role: str | None) -> KernelSpec:
    """The kernel of this role among those for the gradients of a kernel; None: the first that goes over columns."""
    specs = {one.role: one for one in gradient_specs(spec)}
    wanted = role or next(known for known in specs if known != ROWS)
    if wanted not in specs:
        raise InvalidInput(f"--role is {role!r}: the kernels for gradients here are {', '.join(specs)}")
    others = ", ".join(one for one in specs if one != wanted)
    if role is None and others:
        note(f"this is {wanted}; with --role there are also {others}")
    return specs[wanted]


def _unfused(sized: Sized, spec: KernelSpec, what: What, after: str | None, backward: bool) -> str:
    static, pruning = split(sized[0])
    if pruning is None:
        dims = {SDDMM: spec.head_dim, SOFTMAX: 1, SPMM: spec.v_head_dim}
        specs = [product_spec(role, dim, spec.dtype, spec.target) for role, dim in dims.items()]
    else:
        for found, cure in ((static != full(), "the rest of the mask, or --unfused"), (what is What.ir, "--what ir")):
            if found:
                raise InvalidInput(f"--unfused has kernels for {pruning} alone, and no program: leave out {cure}")
        dims = dict(zip(COMPRESSED, (spec.head_dim, HOPPER_STEP, spec.v_head_dim), strict=True))
        specs = [compressed_spec(role, dim, spec.dtype, spec.target, pruning=pruning) for role, dim in dims.items()]
    if what is What.tables or backward:
        raise InvalidInput("--unfused has no tables, and its gradients are the same kernels: leave out --what tables "
                           "and --backward")  # fmt: skip
    if what is not What.ir:
        mark = {What.llvm: ";", What.tir: "#"}.get(what, "//")
        return "\n".join(f"{mark} {one.name}\n{_source(one, what)}" for one in specs)
    if after is not None:
        raise InvalidInput("--unfused shows the whole program: leave out --after")
    orders = structure_of(*sized).orders
    return "\n".join(to_text(tile_values(order.acsr, order, queries_are_rows=True)[0]) for order in orders)


def _ir(sized: Sized, spec: KernelSpec, wanted: str | None) -> str:
    names = PASS_NAMES.split(", ")
    wanted = wanted or names[-1]
    if wanted not in names:
        raise InvalidInput(f"there is no pass {wanted!r}: the passes are {PASS_NAMES}")
    seen: list[Program] = []
    plan = plan_mask(sized, spec, lambda name, program: seen.append(program) if name == wanted else None)
    texts = [to_text(program) for program in seen]
    if plan.heads is None or len(texts) == 1:
        return "\n".join(texts)
    heads = [[h for h, mine in enumerate(plan.heads) if mine == p] for p in range(len(texts))]
    return "\n".join(f"// heads {', '.join(map(str, who))}\n{text}" for who, text in zip(heads, texts, strict=True))


def _source(spec: KernelSpec, what: What) -> str:
    kind = spec.target.kind
    if (kind == "cuda") != (what in (What.cuda, What.ptx)) and what is not What.tir:
        other = "cpu" if kind == "cuda" else "an arch such as sm_90a"
        raise InvalidInput(f"there is no {what.value} for {spec.target}: give --arch {other}")
    if kind == "cuda" and what is not What.ptx:
        from splatc.codegen.build import cuda_source

        with console(stderr=True).status(f"generating {spec.name} for {spec.target}"):
            return cuda_source(spec)[what is What.cuda]
    if what is What.ptx and find_compiler() is None:
        raise Unsupported(f"PTX needs NVRTC or nvcc: {INSTALL}, or use --what cuda")
    names = {What.llvm: "kernel.ll", What.tir: "kernel.tir.py"}
    with console(stderr=True).status(f"compiling {spec.name} for {spec.target}"):
        kernel = find_kernel(spec)
        return kernel.ptx if what is What.ptx else kernel.file(names[what])


def _write_tables(plan: Plan, output: Path | None) -> None:
    named = [
        (f"mask{p}_pass{i}" if len(plan.tables) > 1 else f"pass{i}", t)
        for p, passes in enumerate(plan.tables)
        for i, t in enumerate(passes)
    ]
    if output is not None and output.suffix == ".npz":
        arrays = {f"{name}_{part}": array for name, t in named for part, array in t.arrays().items()}
        data = io.BytesIO()
        np.savez(data, **arrays)
        output.write_bytes(data.getvalue())
        note(f"wrote {output} ({size(output.stat().st_size)}): {', '.join(arrays)}")
    else:
        write_or_print("\n".join(tables_text(name, t) for name, t in named), output)


def tables_text(name: str, tables: Tables) -> str:
    """One pass's tables for people: a line a view, item and entry, and each distinct tile of bits as a picture."""
    lines = [
        f"{name}: {tables.tiles} tiles ({tables.full_tiles} full, {tables.bit_tiles} with bits), {size(tables.nbytes)}"
    ]
    lines += ["", "view  extents / strides / box"]
    for side, views in (("rows", tables.row_views), ("cols", tables.col_views)):
        lines += [f"{side}{i:<2} {v[0:3]} / {v[3:6]} / {v[6:9]}" for i, v in enumerate(views.tolist())]
    lines += ["", "item  row origin: entries"]
    entries = tables.entries.tolist()
    for i, (x1, x2, x3, first, count, rows, *_) in enumerate(tables.items.tolist()):
        parts = []
        for k1, k2, k3, repeat, bits, view, *_ in entries[first : first + count]:
            kind = f"bits{bits - 1}" if bits else "full" + (f" x{repeat}" if repeat > 1 else "")
            where = f"keys{k1}" if view == GATHERED else f"cols{view}[{k1}, {k2}, {k3}]"
            parts.append(f"{where} {kind}")
        lines.append(f"{i:>4}  rows{rows}[{x1}, {x2}, {x3}]: " + ("; ".join(parts) or "nothing"))
    for i, keys in enumerate(tables.gather.tolist()):
        lines += ["", f"keys{i}: " + " ".join(str(key) for key in keys if key >= 0)]
    for i, tile in enumerate(tables.bits if tables.bit_tiles else ()):
        dense = np.unpackbits(
            np.ascontiguousarray(tile).view(np.uint8).reshape(len(tile), -1), axis=1, bitorder="little"
        ).T
        lines += ["", f"bits{i} (rows down, columns across)"]
        lines += ["".join("#" if bit else "." for bit in row) for row in dense]
    return "\n".join(lines) + "\n"
