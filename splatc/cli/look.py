"""``splatc analyze`` and ``splatc show``: looking at a mask. Nothing is compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from splatc.cli.masks import (
    Dtype,
    HeadDim,
    KvLen,
    MaskArgument,
    SeqLen,
    named_spec,
    plan_mask,
    quick_target,
    sized_mask,
)
from splatc.cli.output import console, fields, note, percent, print_json, seconds, size
from splatc.codegen.target import resolve_target
from splatc.errors import InvalidInput
from splatc.formats.acsr import ACSR
from splatc.ir.program import Mask
from splatc.runtime.attention import Plan

ANALYZE_EXAMPLES = """\b
Examples:
  splatc analyze 'causal & window(256, 0)' --seq-len 8192
  splatc analyze 'bigbird(64)' -s 4096 --target sm_90a --json
  splatc analyze mask.npy --pieces"""

SHOW_EXAMPLES = """\b
Examples:
  splatc show 'causal & (window(31, 0) | strided(32))' --seq-len 512
  splatc show 'fixed(128, 16)' -s 1024 -o fixed.png
  splatc show mask.npy --tiles -o tiles.svg
  splatc show attention.npy --maps --block 64 -o maps.png"""


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command(epilog=ANALYZE_EXAMPLES)(analyze)
    app.command(epilog=SHOW_EXAMPLES)(show)


def analyze(
    mask: MaskArgument,
    seq_len: SeqLen = None,
    kv_len: KvLen = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    pieces: Annotated[bool, typer.Option("--pieces", help="Print the pieces themselves, too.")] = False,
    head_dim: HeadDim = 64,
    dtype: Dtype = None,
    target: Annotated[
        str | None, typer.Option("--target", show_default="cpu", help="cpu, cuda or an arch such as sm_90a.")
    ] = None,
) -> None:
    """What splatc finds in a mask: pieces, density, tiles, waste and a predicted time. Compiles nothing."""
    found: list[ACSR] = []

    def after(name: str, program: object) -> None:
        domains = getattr(program, "domains", ())
        found.extend(d.acsr for _, d in domains if name == "lower" and isinstance(d, Mask))

    spec = named_spec(head_dim, None, dtype, resolve_target(quick_target(target)))
    plan = plan_mask(sized_mask(mask, seq_len, kv_len), spec, after)
    lines = [str(piece) for acsr in found for piece in acsr.pieces] if pieces else []
    if json:
        print_json({**plan.explanation.to_dict(), **({"piece_list": lines} if pieces else {})})
        return
    out = console()
    out.print(_summary(plan))
    if pieces:
        out.print()
        for i, line in enumerate(lines):
            out.print(f"{i:>6}  {line}", soft_wrap=True)


def _summary(plan: Plan) -> object:
    e = plan.explanation
    distinct = len(plan.programs)
    several = f"{plan.entries} batch entries" if plan.entries else f"{len(plan.heads or ())} heads"
    heads = f", {several} with {distinct} distinct masks" if plan.heads else ""
    text = e.pattern if len(e.pattern) <= 300 else f"{e.pattern[:300]}... ({len(e.pattern)} characters)"
    rest = f", and a remainder of {e.remainder_nnz:,} elements" if e.remainder_nnz else ", nothing left over"
    kinds = f"{e.full_tiles:,} full, {e.bit_tiles:,} with bits ({e.distinct_bits:,} distinct)"
    rows = [
        ("pattern", text),
        ("mask", f"{e.q_len:,} x {e.kv_len:,}{heads}"),
        ("nnz", f"{e.nnz:,}"),
        *([("pruned", f"{e.pruning}: by scores, among these elements")] if e.pruning else []),
        ("density", percent(e.density)),
        ("pieces", f"{e.pieces:,}{rest}"),
        ("tiles", f"{e.tiles:,}: {kinds}"),
        ("waste", f"{e.waste:.3f} (tile area / elements that attend)"),
        *((f"pass {i}", view) for i, view in enumerate(e.views)),
        ("tables", size(e.table_bytes)),
        ("predicted", f"{seconds(e.seconds)} a head and batch entry (head_dim {e.head_dim}, {e.dtype}, {e.target})"),
    ]
    return fields(rows)


def show(
    mask: MaskArgument,
    seq_len: SeqLen = None,
    kv_len: KvLen = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", show_default="the terminal", help="A .png, .svg or .pdf file (needs matplotlib)."
        ),
    ] = None,
    pieces: Annotated[bool, typer.Option("--pieces", help="Only the mask with its pieces.")] = False,
    tiles: Annotated[bool, typer.Option("--tiles", help="Only the tiles.")] = False,
    head: Annotated[int, typer.Option("--head", help="Which head, if each has its own mask.")] = 0,
    maps: Annotated[
        bool,
        typer.Option("--maps", help="The file is a map of attention (.npy, floats): draw how SPION finds its pattern."),
    ] = False,
    block: Annotated[int, typer.Option("--block", help="Of --maps: the side of a block.")] = 64,
    quantile: Annotated[float, typer.Option("--quantile", help="Of --maps: blocks above it are candidates.")] = 0.98,
    filter: Annotated[int, typer.Option("--filter", help="Of --maps: cells along the diagonal that are summed.")] = 31,
    variant: Annotated[str, typer.Option("--variant", help="Of --maps: CF, C, F, or without filling CT, T.")] = "CF",
) -> None:
    """Draw a mask with its pieces and its tiles, in a file or in the terminal. Compiles nothing."""
    if maps:
        _show_maps(Path(mask), output, block, quantile, filter, variant)
        return
    from splatc.draw import Drawing, print_to, save

    drawing = Drawing.of(*sized_mask(mask, seq_len, kv_len), head=head)
    both = pieces == tiles
    if output is not None:
        save(drawing, output, pieces=both or pieces, tiles=both or tiles)
        note(f"wrote {output} ({size(output.stat().st_size)})")
    else:
        print_to(console(), drawing, pieces=both or pieces, tiles=both or tiles)


def _show_maps(path: Path, output: Path | None, block: int, quantile: float, filter: int, variant: str) -> None:
    from splatc.draw.maps import load_scores, save_maps
    from splatc.sparsify.spion import find_pattern

    if output is None:
        raise InvalidInput("--maps draws in a file: give -o maps.png")
    (maps,) = find_pattern(load_scores(path), block, quantile, filter, variant).maps
    save_maps(maps, output, title=f"{path.name}, {variant}")
    note(f"wrote {output} ({size(output.stat().st_size)}): {percent(maps.density)} of {len(maps.blocks)}^2 blocks")
