"""Legality of programs, stated once. Runs between passes; reports every fault and quotes the IR."""

from __future__ import annotations

import numpy as np

from splatc.errors import VerifyError
from splatc.formats.fold import unnest
from splatc.formats.strips import ROW, ROWS, element_counts
from splatc.ir.printer import to_text
from splatc.ir.program import GATHERED, Attend, Cover, Mask, Operation, Program, Prune, Regions, Sddmm, Softmax, Spmm
from splatc.ir.score import ORDER
from splatc.ir.see import see


def verify(program: Program) -> None:
    """Raise VerifyError, naming every fault, unless the program is legal."""
    faults = _names(program) + _scores(program)
    for name, domain in program.domains:
        match domain:
            case Mask(acsr):
                found = _mask(program, acsr.q_len, acsr.kv_len)
                found += _strips(unnest(acsr.pieces.table), program)
            case Regions():
                found = _mask(program, domain.q_len, domain.kv_len) + _regions(domain, program)
            case Cover():
                found = _mask(program, domain.q_len, domain.kv_len) + _cover(domain)
        faults += [f"{name}: {fault}" for fault in found]
    if faults:
        raise VerifyError("illegal program: " + "; ".join(faults) + "\n" + to_text(program))


def _names(program: Program) -> list[str]:
    """Every operand is defined before its use, and every domain exists and suits its operation."""
    faults = []
    domains = dict(program.domains)
    if len(domains) != len(program.domains):
        faults.append("two domains have one name")
    known = {"q", "k", "v"}
    for i, op in enumerate(program.body):
        uses, makes, domain = _operands(op)
        faults += [f"operation {i} uses {name}, which is not defined" for name in uses if name not in known]
        if domain is not None and domain not in domains:
            faults.append(f"operation {i} runs over {domain}, which does not exist")
        known.update(makes)
    faults += [f"{name} is not computed" for name in ("o", "lse") if name not in known]
    return faults


def _scores(program: Program) -> list[str]:
    """All passes do the same to scores, in the order of ORDER; sinks are counted once."""
    faults = []
    score = program.score
    kinds = [type(step) for step in score.steps]
    if kinds != [kind for kind in ORDER if kind in kinds]:
        faults.append("steps of scores are not in their order")
    for i, op in enumerate(program.body):
        if not isinstance(op, Attend):
            continue
        if (op.score.steps, op.score.dropout) != (score.steps, score.dropout):
            faults.append(f"operation {i} does something else to scores than others do")
        if op.score.pruning != score.pruning:
            faults.append(f"operation {i} prunes scores otherwise than others do")
        if op.merging and op.score.sinks:
            faults.append(f"operation {i} counts the sinks again")
    return faults + _groups(program)


def _groups(program: Program) -> list[str]:
    """Where scores are pruned, every tile has whole groups of keys, and a row has each of its tiles in one pass."""
    pruning = program.score.pruning
    if pruning is None:
        return []
    merged = any(isinstance(op, Attend) and op.merging for op in program.body)
    faults = ["scores are pruned in more than one pass"] if merged else []
    for name, domain in program.domains:
        if not isinstance(domain, Cover):
            continue
        if any(view.kind != "contiguous" or view.lanes % pruning.m for view in domain.cols):
            faults.append(f"{name}: a column view cuts groups of {pruning.m} keys")
        if (domain.entries[:, 3] == GATHERED).any() or (domain.entries[:, 0] % pruning.m).any():
            faults.append(f"{name}: a tile begins inside a group of {pruning.m} keys, or is a list of keys")
    return faults


def _operands(op: Operation) -> tuple[list[str], list[str], str | None]:
    """(what it uses, what it makes, the domain it runs over)."""
    match op:
        case Sddmm(out, q, k, over, _):
            return [q, k], [out], over
        case Prune(out, x, _):
            return [x], [out], None
        case Softmax(out, lse, x, _, _):
            return [x], [out, lse], None
        case Spmm(out, p, v):
            return [p, v], [out], None
        case Attend(out, lse, q, k, v, over, merging, _):
            return [q, k, v, *([out, lse] if merging else [])], [out, lse], over


def _mask(program: Program, q_len: int, kv_len: int) -> list[str]:
    if (q_len, kv_len) == (program.q_len, program.kv_len):
        return []
    return [f"is {q_len} x {kv_len} but the program is {program.q_len} x {program.kv_len}"]


def _strips(strips: np.ndarray, program: Program) -> list[str]:
    if len(strips) and ((strips[:, ROW] < 0) | (strips[:, ROW] + strips[:, ROWS] > program.q_len)).any():
        return ["a piece lies outside the rows"]
    return []


def _regions(regions: Regions, program: Program) -> list[str]:
    faults = []
    for i, region in enumerate(regions.regions):
        seen = see(region.pieces, region.rows, region.cols)
        if seen is None:
            faults.append(f"region {i} holds pieces that its column view cannot show")
        elif element_counts(seen.strips).sum() != element_counts(unnest(region.pieces)).sum():
            faults.append(f"region {i} loses elements in its views")
        if region.rows.length != program.q_len or region.cols.length != program.kv_len:
            faults.append(f"region {i} has views of another length")
        if len(region.remainder.rows) and (region.rows.kind, region.cols.kind) != ("contiguous", "contiguous"):
            faults.append(f"region {i} has bits under a view that is not contiguous")
    return faults


def _cover(cover: Cover) -> list[str]:
    faults = []
    first, count = cover.items[:, 3], cover.items[:, 4]
    view, repeat, shape = cover.entries[:, 3], cover.entries[:, 4], cover.entries[:, 5]
    if len({v.lanes for v in cover.cols}) > 1:
        faults.append("column views have tiles of different sizes")
    if (
        (first < 0).any()
        or (count < 0).any()
        or (first + count > len(cover.entries)).any()
        or count.sum() != len(cover.entries)
    ):
        faults.append("items do not partition the entries")
    gathered = view == GATHERED
    if (~gathered & ((view < 0) | (view >= len(cover.cols)))).any():
        faults.append("an entry names a column view that does not exist")
    row = cover.entries[gathered, 0]
    if ((row < 0) | (row >= len(cover.gather))).any() or cover.entries[gathered, 1:3].any():
        faults.append("an entry names a list of keys that does not exist")
    if ((cover.gather < -1) | (cover.gather >= cover.kv_len)).any():
        faults.append("a list of keys names a key that does not exist")
    if ((shape < 0) | (shape > cover.shapes.count)).any():
        faults.append("an entry names a shape that does not exist")
    if ((repeat < 1) | ((repeat > 1) & ((shape > 0) | gathered))).any():
        faults.append("only full tiles repeat, one time or more")
    if len(np.unique(cover.items[:, :3], axis=0)) != len(cover.items):
        faults.append("two items have one row tile")
    return faults
