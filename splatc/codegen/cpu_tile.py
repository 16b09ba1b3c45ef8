"""One packed tile of the CPU kernel: scores, online softmax and accumulation, in vectors of queries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as I

from splatc.codegen.constants import NEG_INF
from splatc.codegen.cpu_vector import LOG2E, Expr, Register, constant, exp2, load, scratch, store


@dataclass(frozen=True)
class Shape:
    """What is known at compile time: the tile (m x n, head dims d and dv) and the register tile.

    A register tile has rows x vecs accumulators of `lanes` queries; a block is the queries that it
    covers, `width` = vecs * lanes of them. *_pitch: head dims rounded up to whole vectors.
    """

    d: int
    dv: int
    m: int
    n: int
    dtype: str
    softcap: bool
    lanes: int
    vecs: int
    rows: int

    @property
    def width(self) -> int:
        return self.lanes * self.vecs

    @property
    def blocks(self) -> int:
        return self.m // self.width

    @property
    def d_pitch(self) -> int:
        return -(-self.d // self.lanes) * self.lanes

    @property
    def dv_pitch(self) -> int:
        return -(-self.dv // self.lanes) * self.lanes


class Scratch:
    """A worker's own buffers.

    Those named *t are transposed: element (x, query) of a block at (block * pitch + x) * width + query.
    """

    def __init__(self, s: Shape, cap: Expr) -> None:
        """cap: of scores times log2(e)."""
        self.cap = I.Bind(T.Broadcast(cap, s.lanes))
        self.qt = scratch(s.m * s.d_pitch)  # times scale * log2(e)
        self.k = scratch(s.n * s.d)
        self.v = scratch(s.n * s.dv)
        self.st = scratch(s.n * s.width)  # of one block: scores, then probabilities
        self.ot = scratch(s.m * s.dv_pitch)  # not yet divided by l
        self.m = scratch(s.m)  # running maximum of the scores, log2 domain
        self.l = scratch(s.m)  # running sum of exp2(score - m)
        self.rows = scratch(s.m * max(s.d_pitch, s.dv_pitch))  # of Q or O, before or after a transpose
        self.row_pos = scratch(s.m, "int32")  # positions of the lanes of a tile side, -1 if invalid
        self.live_pos = scratch(s.m, "int32")  # row_pos, -1 also where LSE is -inf
        self.col_pos = scratch(s.n, "int32")


def emit_tile(bits: Expr, b: Scratch, s: Shape, bitmap: Expr | None) -> None:
    """Online softmax over one packed tile; bitmap: index in bits, None for a full tile."""
    with I.serial(0, s.blocks) as block:
        top = [Register(s.lanes, constant(NEG_INF, s.lanes)) for _ in range(s.vecs)]
        alpha = [Register(s.lanes) for _ in range(s.vecs)]
        emit_scores(bits, b, s, block, top, bitmap)
        emit_softmax(b, s, block, top, alpha)
        emit_accumulate(b, s, block, alpha)


def emit_product(
    acc: list[list[Register]],
    s: Shape,
    depth: int,
    scalar: Callable[[Expr, int], Expr],
    vector: Callable[[Expr, int], Expr],
) -> None:
    """acc[r][v] += sum over x < depth of scalar(x, r) * vector(x, v): the register tile."""
    with I.serial(0, depth) as x:
        vectors = [I.Bind(vector(x, v)) for v in range(s.vecs)]
        for r, row in enumerate(acc):
            a = I.Bind(T.Broadcast(scalar(x, r), s.lanes))
            for cell, b in zip(row, vectors, strict=True):
                cell.set(cell.get() + a * b)


def row_groups(count: int, rows: int, emit: Callable[[Expr, int], None]) -> None:
    """emit(first, size) over [0, count) in groups of `rows`, and once for the remainder."""
    if count >= rows:
        with I.serial(0, count // rows) as g:
            emit(g * rows, rows)
    if count % rows:
        emit(count - count % rows, count % rows)


def emit_scores(bits: Expr, b: Scratch, s: Shape, block: Expr, top: list[Register], bitmap: Expr | None) -> None:
    """st[j, i] = <k_j, q_i>, -inf where a bit is off; top[i] = max(top[i], their maximum over j)."""

    def group(j0: Expr, rows: int) -> None:
        acc = [[Register(s.lanes, constant(0.0, s.lanes)) for _ in range(s.vecs)] for _ in range(rows)]
        emit_product(
            acc, s, s.d,
            lambda d, r: b.k[(j0 + r) * s.d + d],
            lambda d, v: load(b.qt, (block * s.d_pitch + d) * s.width + v * s.lanes, s.lanes),
        )  # fmt: skip
        for r, v in product(range(rows), range(s.vecs)):
            score = cap_score(acc[r][v].get(), b, s) if s.softcap else acc[r][v].get()
            if bitmap is not None:
                on = bits_on(bits, s, bitmap, j0 + r, block * s.width + v * s.lanes)
                score = T.Select(on, score, constant(NEG_INF, s.lanes))
            score = I.Bind(score)
            top[v].set(T.max(top[v].get(), score))
            store(b.st, (j0 + r) * s.width + v * s.lanes, score, s.lanes)

    row_groups(s.n, s.rows, group)


def cap_score(score: Expr, b: Scratch, s: Shape) -> Expr:
    """cap * tanh(score / cap), by tanh(x) = (1 - e) / (1 + e) with e = exp(-2 |x|) and the sign of x."""
    x = I.Bind(score / b.cap)
    e = I.Bind(exp2(T.max(x, -x) * constant(-2 * LOG2E, s.lanes), s.lanes))
    one, zero = constant(1.0, s.lanes), constant(0.0, s.lanes)
    size = I.Bind((one - e) / (one + e) * b.cap)
    return T.Select(x < zero, zero - size, size)


def bits_on(bits: Expr, s: Shape, bitmap: Expr, j: Expr, i: Expr) -> Expr:
    """Lane mask: do query lanes i, i + 1, ... attend to column lane j? (They share a word.)"""
    word = bits[bitmap, j, T.truncdiv(i, 32)]
    first = T.uint32(1) << T.cast(T.truncmod(i, 32), "uint32")
    test = T.Broadcast(first, s.lanes) << T.Ramp(T.uint32(0), T.uint32(1), s.lanes)
    return T.NE(T.bitwise_and(T.Broadcast(word, s.lanes), test), constant(0, s.lanes, "uint32"))


def emit_softmax(b: Scratch, s: Shape, block: Expr, top: list[Register], alpha: list[Register]) -> None:
    """m' = max(m, top); st = exp2(st - m'); alpha = exp2(m - m'); l = l * alpha + sum of st over j."""
    lanes = s.lanes
    base = [Register(lanes) for _ in range(s.vecs)]
    total = [Register(lanes) for _ in range(s.vecs)]
    for v in range(s.vecs):
        row = block * s.width + v * lanes
        new = I.Bind(T.max(load(b.m, row, lanes), top[v].get()))
        # A row with nothing yet has m' = -inf: subtract 0 instead, exp2(-inf) is 0.
        base[v].set(T.Select(T.EQ(new, constant(NEG_INF, lanes)), constant(0.0, lanes), new))
        alpha[v].set(exp2(load(b.m, row, lanes) - base[v].get(), lanes))
        total[v].set(load(b.l, row, lanes) * alpha[v].get())
        store(b.m, row, new, lanes)
    with I.serial(0, s.n) as j:
        for v in range(s.vecs):
            at = j * s.width + v * lanes
            p = I.Bind(exp2(load(b.st, at, lanes) - base[v].get(), lanes))
            total[v].set(total[v].get() + p)
            store(b.st, at, p, lanes)
    for v in range(s.vecs):
        store(b.l, block * s.width + v * lanes, total[v].get(), lanes)


def emit_accumulate(b: Scratch, s: Shape, block: Expr, alpha: list[Register]) -> None:
    """ot[d, i] = ot[d, i] * alpha[i] + sum over j of v[j, d] * st[j, i]."""

    def group(d0: Expr, rows: int) -> None:
        def at(r: int, v: int) -> Expr:
            return (block * s.dv_pitch + d0 + r) * s.width + v * s.lanes

        acc = [[Register(s.lanes) for _ in range(s.vecs)] for _ in range(rows)]
        for r, v in product(range(rows), range(s.vecs)):
            acc[r][v].set(load(b.ot, at(r, v), s.lanes) * alpha[v].get())
        emit_product(
            acc, s, s.n,
            lambda j, r: b.v[j * s.dv + d0 + r],
            lambda j, v: load(b.st, j * s.width + v * s.lanes, s.lanes),
        )  # fmt: skip
        for r, v in product(range(rows), range(s.vecs)):
            store(b.ot, at(r, v), acc[r][v].get(), s.lanes)

    row_groups(s.dv, s.rows, group)
