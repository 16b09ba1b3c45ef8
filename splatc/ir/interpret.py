"""A slow NumPy interpreter of the IR, at every level: what each pass must leave unchanged."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from splatc.errors import VerifyError
from splatc.formats.nm import prune
from splatc.formats.strips import Ints
from splatc.ir.cover import paint
from splatc.ir.numbers import Numbers
from splatc.ir.program import GATHERED, Attend, Cover, Domain, Mask, Program, Prune, Regions, Sddmm, Softmax, Spmm
from splatc.ir.score import Alibi, BlockBias, RelativeBias, Score
from splatc.ir.see import see
from splatc.ir.views import View

Float = NDArray[np.float64]
NO_NUMBERS = Numbers()


def interpret(program: Program, q: Float, k: Float, v: Float, scale: float,
              numbers: Numbers = NO_NUMBERS) -> tuple[Float, Float]:  # fmt: skip
    """(o, lse) of one head: q (q_len, d), k (kv_len, d), v (kv_len, dv) float64 -> o (q_len, dv), lse (q_len,)."""
    env: dict[str, Float] = {"q": q, "k": k, "v": v}
    rows, cols = np.arange(program.q_len), np.arange(program.kv_len)
    for op in program.body:
        match op:
            case Sddmm(out, a, b, over, steps):
                s, _ = numbers.scores(steps, env[a] @ env[b].T * scale, rows, cols)
                env[out] = np.where(elements(program.domain(over)), s, -np.inf)
            case Prune(out, x, pruning):
                env[out] = prune(env[x], pruning)
            case Softmax(out, lse, x, sinks, dropout):
                env[lse] = np.logaddexp(_logsumexp(env[x]), numbers.sink if sinks else -np.inf)
                env[out] = _weights(env[x], env[lse])
                if dropout:
                    env[out] *= numbers.dropped(rows, cols)
            case Spmm(out, p, w):
                env[out] = env[p] @ env[w]
            case Attend(out, lse, a, b, w, over, merging, score):
                new = _attend(program.domain(over), env[a], env[b], env[w], scale, score, numbers)
                env[out], env[lse] = _merge((env[out], env[lse]), new) if merging else new
    return env["o"], env["lse"]


def interpret_gradients(program: Program, transposed: Program, q: Float, k: Float, v: Float, do: Float, dlse: Float,
                        scale: float, numbers: Numbers = NO_NUMBERS) -> tuple[Float, ...]:  # fmt: skip
    """(dq, dk, dv) of one head for the gradients do (q_len, dv) of o and dlse (q_len,) of lse; shapes as in
    ``interpret``. dq is summed over the tiles of the program, dk and dv over those of the transposed mask's program.

    They are followed by the gradients of what the score has of ``Terms.learnable``, of this head, over the tiles of
    the program.
    """
    score, terms = program.score, numbers.terms
    o, lse = interpret(program, q, k, v, scale, numbers)
    delta = (do * o).sum(1) - dlse
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    tables = [np.zeros(() if x.ndim == 1 else x.shape[1:]) for x in terms.learnable if x is not None]

    def of_tile(i: Ints, j: Ints, held: NDArray[np.bool_]) -> tuple[Float, Float, Float]:
        """(probabilities after dropout, gradients of scores, those of products)."""
        s, slope = numbers.scores(score.steps, q[i] @ k[j].T * scale, i, j)
        p = _weights(_pruned(np.where(held, s, -np.inf), score), lse[i])
        factor = numbers.dropped(i, j) if score.dropout else np.ones_like(p)
        ds = p * (factor * (do[i] @ v[j].T) - delta[i, None])
        return p * factor, ds, ds * slope * scale

    for i, j, held in _existing(program):
        _, ds, dqk = of_tile(i, j, held)
        dq[i] += dqk @ k[j]
        for table, step in zip(tables, score.biases, strict=False):
            match step:
                case Alibi():
                    table -= (ds * numbers.distance(i, j)).sum()
                case RelativeBias():
                    np.add.at(table, numbers.offset(i, j), ds)
                case BlockBias():
                    np.add.at(table, numbers.block(i, j), ds)
    for j, i, held in _existing(transposed):
        p, _, dqk = of_tile(i, j, held.T)
        dk[j] += dqk.T @ q[i]
        dv[j] += p.T @ do[i]
    if score.sinks:
        tables[-1] -= (_weights(np.full((len(q), 1), numbers.sink), lse)[:, 0] * delta).sum()
    return dq, dk, dv, *tables


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
            pairs = [found for region in regions for found in (
                _region_elements(region.pieces, region.rows, region.cols), region.remainder.elements())]  # fmt: skip
        case Cover(q_len=q_len, kv_len=kv_len):
            pairs = []
            for q, k, held in tiles(domain):
                i, j = np.nonzero(held & (q >= 0)[:, None])
                if (k[j] < 0).any():
                    raise VerifyError(f"a tile at query {q[0]} attends to keys that do not exist")
                pairs.append((q[i], k[j]))  # lanes may share a position
    flat = np.concatenate([np.zeros(0, np.int64), *(np.ravel_multi_index(one, (q_len, kv_len)) for one in pairs)])
    times = np.bincount(flat, minlength=q_len * kv_len).reshape(q_len, kv_len)
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
        found_q.append(_positions(rows, u, seen.row_line[i]))
        found_k.append(_positions(cols, w, seen.col_line[i]))
    return np.concatenate(found_q), np.concatenate(found_k)


def _positions(view: View, u: Ints, line: int) -> Ints:
    """Of coordinates (line, u)."""
    if view.kind == "blocks":
        return u // view.box[0] * view.step + view.offset + u % view.box[0]
    return u * view.strides[0] + line * view.strides[1]


def _attend(domain: Domain, q: Float, k: Float, v: Float, scale: float, score: Score,
            numbers: Numbers) -> tuple[Float, Float]:  # fmt: skip
    """Online softmax over the tiles of a cover (over everything at once for other domains)."""

    def part(i: Ints, j: Ints, held: NDArray[np.bool_]) -> tuple[Float, Float]:
        s, _ = numbers.scores(score.steps, q[i] @ k[j].T * scale, i, j)
        s = _pruned(np.where(held, s, -np.inf), score)
        lse = _logsumexp(s)
        p = _weights(s, lse)
        return (p * numbers.dropped(i, j) if score.dropout else p) @ v[j], lse

    o, lse = np.zeros((len(q), v.shape[1])), np.full(len(q), numbers.sink if score.sinks else -np.inf)
    if not isinstance(domain, Cover):
        return _merge((o, lse), part(np.arange(len(q)), np.arange(len(k)), elements(domain)))
    for rows, cols, held in tiles(domain):
        rows_ok, cols_ok = rows >= 0, cols >= 0
        i, j = rows[rows_ok], cols[cols_ok]
        o[i], lse[i] = _merge((o[i], lse[i]), part(i, j, held[np.ix_(rows_ok, cols_ok)]))
    return o, lse


def _pruned(s: Float, score: Score) -> Float:
    """Scores (queries, keys) of a tile of whole groups of keys, -inf where the mask or the pruning is off."""
    return s if score.pruning is None else prune(s, score.pruning)


def _weights(s: Float, lse: Float) -> Float:
    """exp(s - lse) of rows, 0 where lse is -inf."""
    return np.asarray(np.exp(s - np.where(np.isinf(lse), 0.0, lse)[:, None]))


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
