"""Programs as text, in a syntax that a person could have written."""

from __future__ import annotations

from splatc.formats.acsr import Pieces
from splatc.ir.program import (
    GATHERED,
    Attend,
    Cover,
    Domain,
    Mask,
    Operation,
    Program,
    Prune,
    Regions,
    Sddmm,
    Softmax,
    Spmm,
)
from splatc.ir.score import Alibi, BlockBias, RelativeBias, Score, Softcap, Step

SHOWN = 8  # pieces, items, ... printed before "..."


def to_text(program: Program) -> str:
    """The program as text; long tables are cut after a few lines."""
    lines = [f"attention(q: {program.q_len}, k: {program.kv_len}, v: {program.kv_len}) {{"]
    for name, domain in program.domains:
        lines += [f"  {line}" for line in _domain(name, domain)]
    lines += [f"  {_operation(op)}" for op in program.body]
    return "\n".join([*lines, "}"]) + "\n"


def _domain(name: str, domain: Domain) -> list[str]:
    match domain:
        case Mask(acsr):
            return [
                f"mask {name} = {acsr} {{",
                *_cut([f"  {piece}" for piece in acsr.pieces[:SHOWN]], len(acsr.pieces)),
                "}",
            ]
        case Regions(_, _, regions):
            lines = [f"regions {name} = {{"]
            for region in regions:
                pieces = Pieces(region.pieces)
                rest = f", remainder of {region.remainder.nnz} elements" if region.remainder.nnz else ""
                lines.append(f"  rows {region.rows}, cols {region.cols}: {len(pieces)} pieces{rest} {{")
                lines += [f"  {line}" for line in _cut([f"  {piece}" for piece in pieces[:SHOWN]], len(pieces))]
                lines.append("  }")
            return [*lines, "}"]
        case Cover():
            return _cover(name, domain)


def _cover(name: str, cover: Cover) -> list[str]:
    partly = int((cover.entries[:, 5] > 0).sum())
    lines = [f"cover {name} = {cover.tiles} tiles ({partly} partly filled, {cover.shapes.count} shapes) {{",
             f"  rows {cover.rows}"]  # fmt: skip
    lines += [f"  cols{i} {view}" for i, view in enumerate(cover.cols)]
    if len(cover.gather):
        lines.append(f"  keys: {len(cover.gather)} lists of {cover.gather.shape[1]}")
    items = []
    for x1, x2, x3, first, count in cover.items[:SHOWN].tolist():
        parts = []
        for k1, k2, k3, view, repeat, shape in cover.entries[first : first + min(count, SHOWN)].tolist():
            kind = f"shape{shape - 1}" if shape else "full"
            where = f"keys{_point(k1)}" if view == GATHERED else f"cols{view}{_point(k1, k2, k3)}"
            parts.append(f"{where} {kind}" + (f" x{repeat}" if repeat > 1 else ""))
        more = ["..."] if count > SHOWN else []
        items.append(f"  rows{_point(x1, x2, x3)}: " + (", ".join(parts + more) or "nothing"))
    lines += _cut(items, len(cover.items))
    spans = []
    for shape, lane, lanes, col, dcol, width, dwidth, stride, count, dcount in cover.shapes.spans[:SHOWN].tolist():
        span = f"  shape{shape}: lanes {lane}+t, t<{lanes}: {col}{dcol:+}t width {width}{dwidth:+}t"
        spans.append(span + (f" count {count}{dcount:+}t stride {stride}" if (count, dcount) != (1, 0) else ""))
    lines += _cut(spans, len(cover.shapes.spans))
    if len(cover.shapes.blocks):
        lines.append(f"  {len(cover.shapes.blocks)} blocks of bits")
    return [*lines, "}"]


def _operation(op: Operation) -> str:
    match op:
        case Sddmm(out, q, k, over, steps):
            return f"{out} = sddmm({q}, {k}) over {over}" + _piped(Score(steps))
        case Prune(out, x, pruning):
            return f"{out} = prune({x}, {pruning.n}, {pruning.m})"
        case Softmax(out, lse, x, sinks, dropout):
            return f"{out}, {lse} = softmax({x}{', sinks' if sinks else ''})" + _piped(Score(dropout=dropout))
        case Spmm(out, p, v):
            return f"{out} = spmm({p}, {v})"
        case Attend(out, lse, q, k, v, over, merging, score):
            into = f" merging ({out}, {lse})" if merging else ""
            return f"{out}, {lse} = attend({q}, {k}, {v}) over {over}{into}" + _piped(score)


STEPS: dict[type[Step], str] = {
    Softcap: "softcap(cap)", Alibi: "alibi(slopes)", RelativeBias: "bias(relative)", BlockBias: "bias(blocks)",
}  # fmt: skip


def _piped(score: Score) -> str:
    """What follows in turn: " | softcap(cap) | alibi(slopes) | prune(2, 4) | softmax(sinks) | dropout(seed)"."""
    words = [STEPS[type(step)] for step in score.steps]
    words += [f"prune({score.pruning.n}, {score.pruning.m})"] if score.pruning else []
    words += [word for word, there in (("softmax(sinks)", score.sinks), ("dropout(seed)", score.dropout)) if there]
    return "".join(f" | {word}" for word in words)


def _point(*x: int) -> str:
    while len(x) > 1 and x[-1] == 0:
        x = x[:-1]
    return f"[{', '.join(map(str, x))}]"


def _cut(lines: list[str], total: int) -> list[str]:
    return [*lines, f"  ... {total - len(lines)} more"] if total > len(lines) else lines
