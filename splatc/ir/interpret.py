"""A slow NumPy interpreter of the IR, at every level: what each pass must leave unchanged."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from splatc.errors import VerifyError
from splatc.ir.cover import paint
from splatc.ir.program import GATHERED, Attend, Cover, Domain, Mask, Program, Regions, Sddmm, Softmax, Spmm
from splatc.ir.see import see
from splatc.ir.views import View

Float = NDArray[np.float64]


def interpret(program: Program, q: Float, k: Float, v: Float, scale: float) -> tuple[Float, Float]:
    """(o, lse) of one head: q (q_len, d), k (kv_len, d), v (kv_len, dv) float64 -> o (q_len, dv), lse (q_len,)."""
    env: dict[str, Float] = {"q": q, "k": k, "v": v}
    for op in program.body:
        match op:
            case Sddmm(out, a, b, over):
                env[out] = np.where(elements(program.domain(over)), env[a] @ env[b].T * scale, -np.inf)
            case Softmax(out, lse, x):
                env[lse] = _logsumexp(env[x])
                env[out] = np.exp(env[x] - np.where(np.isinf(env[lse]), 0.0, env[lse])[:, None])
            case Spmm(out, p, w):
                env[out] = env[p] @ env[w]
            case Attend(out, lse, a, b, w, over, merging):
                new = _attend(program.domain(over), env[a], env[b], env[w], scale)
                env[out], env[lse] = _merge((env[out], env[lse]), new) if merging else new
    return env["o"], env["lse"]


def interpret_gradients(program: Program, transposed: Program, q: Float, k: Float, v: Float, do: Float, dlse: Float,
                        scale: float) -> tuple[Float, Float, Float]:  # fmt: skip
    """(dq, dk, dv) of one head for the gradients do (q_len, dv) of o and dlse (q_len,) of lse; shapes as in
    ``interpret``. dq is summed over the tiles of the program, dk and dv over those of the transposed mask's program."""
    o, lse = interpret(program, q, k, v, scale)
    lse, delta = np.where(np.isinf(lse), 0.0, lse), (do * o).sum(1) - dlse
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)

    def of_tile(i: NDArray[np.int64], j: NDArray[np.int64], held: NDArray[np.bool_]) -> tuple[Float, Float]:
        p = np.exp(np.where(held, q[i] @ k[j].T * scale, -np.inf) - lse[i, None])
        return p, p * (do[i] @ v[j].T - delta[i, None]) * scale

    for i, j, held in _existing(program):
        dq[i] += of_tile(i, j, held)[1] @ k[j]
    for j, i, held in _existing(transposed):
        p, ds = of_tile(i, j, held.T)
        dk[j] += ds.T @ q[i]
        dv[j] += p.T @ do[i]
    return dq, dk, dv


def _existing(program: Program) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]]:
    """The tiles of a program without the lanes that do not exist; one tile for a domain that is no cover yet."""
    for _, domain in program.domains:
        if isinstance(domain, Cover):
            for rows, cols, held in tiles(domain):
                yield rows[rows >= 0], cols[cols >= 0], held[np.ix_(rows >= 0, cols >= 0)]
        else:
            yield np.arange(program.q_len), np.arange(program.kv_len), elements(domain)


def elements(domain: Domain) -> NDArray[np.bool_]:
    """The (query, key) pairs of a domain as a boolean matrix; raises VerifyError if any is covered twice."""
    match domain:
        case Mask(acsr):
            return acsr.to_dense()
        case Regions(q_len, kv_len, regions):
            times = np.zeros((q_len, kv_len), np.int64)
            for region in regions:
                q, k = _region_elements(region.pieces, region.rows, region.cols)
                np.add.at(times, (q, k), 1)
                np.add.at(times, region.remainder.elements(), 1)
        case Cover():
            times = np.zeros((domain.q_len, domain.kv_len), np.int64)
            for q, k, held in tiles(domain):
                np.add.at(
                    times, np.ix_(q[q >= 0], k[k >= 0]), held[np.ix_(q >= 0, k >= 0)]
                )  # lanes may share a position
                if held[np.ix_(q >= 0, k < 0)].any():
                    raise VerifyError(f"a tile at query {q[0]} attends to keys that do not exist")
    if (times > 1).any():
        q, k = np.argwhere(times > 1)[0]
        raise VerifyError(f"the pair (q={q}, k={k}) is covered {times[q, k]} times")
    return times > 0


def tiles(cover: Cover) -> list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]]:
    """Every tile as (query positions, key positions, elements); positions are -1 in lanes that do not exist."""
    out = []
    lanes_q, lanes_k = cover.rows.lanes, cover.cols[0].lanes
    shapes = paint(cover.shapes, slice(0, cover.shapes.count), lanes_q, lanes_k)
    everything = np.ones((lanes_q, lanes_k), bool)
    for *origin, first, count in cover.items.tolist():
        q = cover.rows.positions(np.array([origin]))[0]
        for x1, x2, x3, view, repeat, shape in cover.entries[first : first + count].tolist():
            held = shapes[shape - 1] if shape else everything
            if view == GATHERED:
                out.append((q, cover.gather[x1], held))
                continue
            cols = cover.cols[view]
            for i in range(repeat):
                k = cols.positions(np.array([[x1, x2, x3]]) + i * np.array(cols.advance))[0]
                out.append((q, k, held))
    return out


def _region_elements(pieces: NDArray[np.int64], rows: View, cols: View) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The pairs of pieces, found through their views: each lane of each view-space strip is mapped back."""
    from splatc.formats.strips import ramp, row_runs, unit_runs

    seen = see(pieces, rows, cols)
    if seen is None:
        raise VerifyError(f"the view {cols} cannot show its region's pieces")
    found_q, found_k = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for i in range(len(seen.strips)):
        runs = unit_runs(row_runs(seen.strips[i : i + 1]))
        owner, j = ramp(runs.stop - runs.start)
        u, w = runs.row[owner], runs.start[owner] + j
        found_q.append(u * rows.strides[0] + seen.row_line[i] * rows.strides[1])
        if cols.kind == "blocks":
            found_k.append(w // cols.box[0] * cols.step + cols.offset + w % cols.box[0])
        else:
            found_k.append(w * cols.strides[0] + seen.col_line[i] * cols.strides[1])
    return np.concatenate(found_q), np.concatenate(found_k)


def _attend(domain: Domain, q: Float, k: Float, v: Float, scale: float) -> tuple[Float, Float]:
    """Online softmax over the tiles of a cover (over everything at once for other domains)."""
    empty = np.zeros((len(q), v.shape[1])), np.full(len(q), -np.inf)
    if not isinstance(domain, Cover):
        s = np.where(elements(domain), q @ k.T * scale, -np.inf)
        lse = _logsumexp(s)
        return np.exp(s - np.where(np.isinf(lse), 0.0, lse)[:, None]) @ v, lse
    o, lse = empty
    for rows, cols, held in tiles(domain):
        rows_ok, cols_ok = rows >= 0, cols >= 0
        i, j = rows[rows_ok], cols[cols_ok]
        s = np.where(held[np.ix_(rows_ok, cols_ok)], q[i] @ k[j].T * scale, -np.inf)
        part = _logsumexp(s)
        p = np.exp(s - np.where(np.isinf(part), 0.0, part)[:, None]) @ v[j]
        o[i], lse[i] = _merge((o[i], lse[i]), (p, part))
    return o, lse


def _merge(a: tuple[Float, Float], b: tuple[Float, Float]) -> tuple[Float, Float]:
    """Two partial results over disjoint keys as one."""
    lse = np.logaddexp(a[1], b[1])
    safe = np.where(np.isinf(lse), 0.0, lse)
    return np.exp(a[1] - safe)[:, None] * a[0] + np.exp(b[1] - safe)[:, None] * b[0], lse


def _logsumexp(x: Float) -> Float:
    top = x.max(axis=1, initial=-np.inf)
    safe = np.where(np.isinf(top), 0.0, top)
    with np.errstate(divide="ignore"):
        return np.asarray(safe + np.log(np.exp(x - safe[:, None]).sum(1)))
