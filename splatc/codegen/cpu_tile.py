"""One packed tile of a CPU kernel: products, scores, online softmax and accumulation, in vectors of lanes.

Lanes are the rows of a tile: queries, or keys where a kernel walks over the transposed mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as I

from splatc.codegen.constants import NEG_INF
from splatc.codegen.cpu_vector import Expr, Register, constant, exp2, load, scratch, store
from splatc.ir.score import Score

if TYPE_CHECKING:
    from splatc.codegen.cpu_prune import Kept
    from splatc.codegen.cpu_score import TermEmitter


@dataclass(frozen=True)
class Shape:
    """What is known at compile time: the tile (m x n, head dims d and dv) and the register tile.

    A register tile has rows x vecs accumulators of `lanes` rows of the tile; a block is the rows that it
    covers, `width` = vecs * lanes of them. *_pitch: head dims rounded up to whole vectors.
    """

    d: int
    dv: int
    m: int
    n: int
    dtype: str
    score: Score
    lanes: int
    vecs: int
    rows: int

    @property
    def acc(self) -> str:
        """The type that everything is computed in."""
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def flush(self) -> bool:
        """Whether tiny probabilities are 0: biases by position make many of them."""
        return bool(self.score.biases)

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

    @property
    def scales_scores(self) -> bool:
        """Whether the scale is applied to scores, not to the rows of a tile: what is compared must be the same whatever
        the rows are, and equal where products are."""
        return self.score.pruning is not None

    def of_rows(self, factor: Expr) -> Expr:
        """What the rows of a tile are multiplied by when they are packed, the factor of scores being this."""
        return self.scalar(1.0) if self.scales_scores else factor

    def scalar(self, value: float | Expr) -> Expr:
        """A number in the type of computations."""
        return getattr(T, self.acc)(value)

    def constant(self, value: float) -> Expr:
        """A vector of equal numbers."""
        return constant(value, self.lanes, self.acc)

    def register(self, value: Expr | None = None) -> Register:
        return Register(self.lanes, value, self.acc)

    def registers(self, rows: int, value: float | None = None) -> list[list[Register]]:
        """A register tile of so many rows."""
        fill = None if value is None else self.constant(value)
        return [[self.register(fill) for _ in range(self.vecs)] for _ in range(rows)]

    def scratch(self, size: int) -> Expr:
        """Memory of the worker, in the type of computations."""
        return scratch(size, self.acc)


class Scratch:
    """A worker's own buffers of the forward kernel.

    Those named *t are transposed: element (x, query) of a block at (block * pitch + x) * width + query.
    """

    def __init__(self, s: Shape) -> None:
        self.qt = s.scratch(s.m * s.d_pitch)  # times s.of_rows(scale * log2(e))
        self.k = s.scratch(s.n * s.d)
        self.v = s.scratch(s.n * s.dv)
        self.st = s.scratch(s.n * s.width)  # of one block: scores, then probabilities
        self.ot = s.scratch(s.m * s.dv_pitch)  # not yet divided by l
        self.m = s.scratch(s.m)  # running maximum of the scores, log2 domain
        self.l = s.scratch(s.m)  # running sum of exp2(score - m)
        self.rows = s.scratch(s.m * max(s.d_pitch, s.dv_pitch))  # of Q or O, before or after a transpose
        self.row_pos = scratch(s.m, "int32")  # positions of the lanes of a tile side, -1 if invalid
        self.live_pos = scratch(s.m, "int32")  # row_pos, -1 also where LSE is -inf
        self.col_pos = scratch(s.n, "int32")


@dataclass(frozen=True)
class Bits:
    """The bits of one tile: where its elements attend."""

    table: Expr
    tile: Expr

    def on(self, s: Shape, j: Expr, i: Expr) -> Expr:
        """Lane mask: do row lanes i, i + 1, ... and column lane j attend? (They share a word.)"""
        word = self.table[self.tile, j, T.truncdiv(i, 32)]
        first = T.uint32(1) << T.cast(T.truncmod(i, 32), "uint32")
        test = T.Broadcast(first, s.lanes) << T.Ramp(T.uint32(0), T.uint32(1), s.lanes)
        return T.NE(T.bitwise_and(T.Broadcast(word, s.lanes), test), constant(0, s.lanes, "uint32"))


def emit_tile(b: Scratch, s: Shape, terms: TermEmitter, bits: Bits | None, kept: Kept | None) -> None:
    """Online softmax over one packed tile; bits: None for a full tile; kept: what prunes scores, if anything does."""
    held = kept or bits
    guard = None if held is None else emit_guard(held, b.v, s.n * s.dv, s)
    with I.serial(0, s.blocks) as block:
        top = [s.register(s.constant(NEG_INF)) for _ in range(s.vecs)]
        alpha = [s.register() for _ in range(s.vecs)]
        emit_scores(b, s, terms, block, top, bits)
        if kept is not None:
            kept.emit(b.st, block)  # the largest of a row stays: top holds
        emit_softmax(b, s, terms, block, top, alpha)
        emit_weighted_sum(b.ot, s.dv_pitch, b.v, s.dv, b.st, s, block, guard, alpha)


def emit_product(
    acc: list[list[Register]],
    s: Shape,
    depth: int,
    scalar: Callable[[Expr, int], Expr],
    vector: Callable[[Expr, int], Expr],
    where: Callable[[Expr, int], Expr] | None = None,
) -> None:
    """acc[r][v] += sum over x < depth of scalar(x, r) * vector(x, v): the register tile.

    where(x, v): the lanes that have a summand x.
    """
    with I.serial(0, depth) as x:
        vectors = [I.Bind(vector(x, v)) for v in range(s.vecs)]
        masks = [where(x, v) for v in range(s.vecs)] if where else []  # (TVM binds no vector of booleans)
        for r, row in enumerate(acc):
            a = I.Bind(T.Broadcast(scalar(x, r), s.lanes))
            for v, (cell, b) in enumerate(zip(row, vectors, strict=True)):
                total = cell.get() + a * b
                cell.set(T.Select(masks[v], total, cell.get()) if where else total)


def row_groups(count: int, rows: int, emit: Callable[[Expr, int], None]) -> None:
    """emit(first, size) over [0, count) in groups of `rows`, and once for the remainder."""
    if count >= rows:
        with I.serial(0, count // rows) as g:
            emit(g * rows, rows)
    if count % rows:
        emit(count - count % rows, count % rows)


def emit_dots(
    s: Shape, y: Expr, xt: Expr, dim: int, pitch: int, block: Expr, emit: Callable[[Expr, int, Expr], None]
) -> None:
    """emit(j, v, <y_j, x_i>) for the n columns j and the vectors v of the rows i of a block.

    y: rows of `dim`; xt: transposed, with `pitch`.
    """

    def group(j0: Expr, rows: int) -> None:
        acc = s.registers(rows, 0.0)
        emit_product(
            acc, s, dim,
            lambda d, r: y[(j0 + r) * dim + d],
            lambda d, v: load(xt, (block * pitch + d) * s.width + v * s.lanes, s.lanes),
        )  # fmt: skip
        for r, v in product(range(rows), range(s.vecs)):
            emit(j0 + r, v, acc[r][v].get())

    row_groups(s.n, s.rows, group)


def emit_scores(
    b: Scratch, s: Shape, terms: TermEmitter, block: Expr, top: list[Register], bits: Bits | None
) -> None:
    """st[j, i] = every step of <k_j, q_i>, -inf where a bit is off; top[i] = max(top[i], their maximum over j)."""

    def one(j: Expr, v: int, score: Expr) -> None:
        score, _ = terms.apply(score, j, block * s.width + v * s.lanes)
        if bits is not None:
            score = T.Select(bits.on(s, j, block * s.width + v * s.lanes), score, s.constant(NEG_INF))
        score = I.Bind(score)
        top[v].set(T.max(top[v].get(), score))
        store(b.st, j * s.width + v * s.lanes, score, s.lanes)

    emit_dots(s, b.k, b.qt, s.d, s.d_pitch, block, one)


def emit_softmax(
    b: Scratch, s: Shape, terms: TermEmitter, block: Expr, top: list[Register], alpha: list[Register]
) -> None:
    """m' = max(m, top); p = exp2(st - m'); alpha = exp2(m - m'); l = l * alpha + sum of p over j; st = p, or 0 where it
    is dropped."""
    lanes = s.lanes
    base = [s.register() for _ in range(s.vecs)]
    total = [s.register() for _ in range(s.vecs)]
    for v in range(s.vecs):
        row = block * s.width + v * lanes
        new = I.Bind(T.max(load(b.m, row, lanes), top[v].get()))
        # A row with nothing yet has m' = -inf: subtract 0 instead, exp2(-inf) is 0.
        base[v].set(T.Select(T.EQ(new, s.constant(NEG_INF)), s.constant(0.0), new))
        alpha[v].set(exp2(load(b.m, row, lanes) - base[v].get(), lanes, s.acc))
        total[v].set(load(b.l, row, lanes) * alpha[v].get())
        store(b.m, row, new, lanes)
    with I.serial(0, s.n) as j:
        for v in range(s.vecs):
            at = j * s.width + v * lanes
            p = I.Bind(exp2(load(b.st, at, lanes) - base[v].get(), lanes, s.acc, flush=s.flush))
            total[v].set(total[v].get() + p)
            store(b.st, at, terms.emit_dropped(p, j, block * s.width + v * lanes), lanes)
    for v in range(s.vecs):
        store(b.l, block * s.width + v * lanes, total[v].get(), lanes)


@dataclass(frozen=True)
class Guard:
    """0 times infinity is not 0: in a tile that is not full and where some factor is not finite, summands that are off
    must be left out. doubt: 0 where all are finite, else NaN.
    """

    held: Bits | Kept
    doubt: Expr


def emit_guard(held: Bits | Kept, values: Expr, count: int, s: Shape) -> Guard:
    """The guard of sums over a tile with these factors."""
    zero = s.register(s.constant(0.0))  # hidden: TVM takes x * 0 for 0
    chains, doubt = [s.register(s.constant(0.0)) for _ in range(s.rows)], s.scratch(1)
    together = s.rows * s.lanes
    whole = count - count % together
    with I.serial(0, whole // together) as x:
        for i, chain in enumerate(chains):
            chain.set(chain.get() + load(values, x * together + i * s.lanes, s.lanes) * zero.get())
    I.buffer_store(doubt, s.scalar(0.0), [0])
    for chain, i in product(chains, range(s.lanes)):
        I.buffer_store(doubt, doubt[0] + chain.slot[i], [0])
    for i in range(whole, count):
        I.buffer_store(doubt, doubt[0] + values[i] * zero.slot[0], [0])
    return Guard(held, doubt)


def emit_weighted_sum(
    sum_t: Expr, pitch: int, y: Expr, dim: int, weights: Expr, s: Shape, block: Expr, guard: Guard | None,
    alpha: list[Register] | None = None,
) -> None:  # fmt: skip
    """sum_t[d, i] = sum_t[d, i] * alpha[i] + sum over j of y[j, d] * weights[j, i]; no weight where a bit is off."""

    def sums(where: Callable[[Expr, int], Expr] | None) -> None:
        def group(d0: Expr, rows: int) -> None:
            def at(r: int, v: int) -> Expr:
                return (block * pitch + d0 + r) * s.width + v * s.lanes

            acc = s.registers(rows)
            for r, v in product(range(rows), range(s.vecs)):
                before = load(sum_t, at(r, v), s.lanes)
                acc[r][v].set(before if alpha is None else before * alpha[v].get())
            emit_product(
                acc, s, s.n,
                lambda j, r: y[j * dim + d0 + r],
                lambda j, v: load(weights, j * s.width + v * s.lanes, s.lanes),
                where,
            )  # fmt: skip
            for r, v in product(range(rows), range(s.vecs)):
                store(sum_t, at(r, v), acc[r][v].get(), s.lanes)

        row_groups(dim, s.rows, group)

    if guard is None:
        sums(None)
        return
    with I.If(T.EQ(guard.doubt[0], s.scalar(0.0))):
        with I.Then():
            sums(None)
        with I.Else():
            sums(lambda j, v: guard.held.on(s, j, block * s.width + v * s.lanes))
