"""What CPU kernels do to scores and probabilities: an emitter for each step of a Score (ir/score.py), and dropout.

Scores are in the log2 domain: times log2(e), as are the softcap and all biases. Lanes are the rows of a tile; queries
are its rows or, where a kernel walks over the transposed mask, its columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as I

from splatc.codegen.cpu_tile import Shape
from splatc.codegen.cpu_vector import LOG2E, Expr, exp2, load, scratch, vector_type
from splatc.codegen.cpu_walk import match_array
from splatc.ir.dropout import GOLDEN, MIX, PHILOX_MULTIPLIERS, PHILOX_STEPS, ROUNDS
from splatc.ir.score import Alibi, BlockBias, RelativeBias, Softcap, Step


@dataclass(frozen=True)
class TermArguments:
    """The arguments that a function has for the Score, in the order of the ABI; None where the Score does not ask.

    Tensors are contiguous and in the type of computations, the seed int64 (1,). block: (heads, rows * block_cols) of
    blocks. threshold, factor: of dropout.
    """

    slopes: Expr
    relative: Expr
    block: Expr
    sinks: Expr
    seed: Expr
    shift: Expr
    block_size: Expr
    block_cols: Expr
    threshold: Expr
    factor: Expr


def match_terms(s: Shape) -> TermArguments:
    """Declare them, after all other arguments."""
    score = s.score

    def array(name: str, there: bool, dims: int) -> Expr | None:
        return match_array(name, tuple(I.int32() for _ in range(dims)), s.acc) if there else None

    def number(name: str, there: bool, dtype: Expr) -> Expr | None:
        return I.arg(name, dtype) if there else None

    return TermArguments(
        slopes=array("slopes", score.has(Alibi), 1),
        relative=array("relative", score.has(RelativeBias), 2),
        block=array("block", score.has(BlockBias), 2),
        sinks=array("sinks", score.sinks, 1),
        seed=match_array("seed", (1,), "int64") if score.dropout else None,
        shift=number("shift", bool(score.biases), I.int32()),
        block_size=number("block_size", score.has(BlockBias), I.int32()),
        block_cols=number("block_cols", score.has(BlockBias), I.int32()),
        threshold=number("threshold", score.dropout, I.int64()),
        factor=number("factor", score.dropout, s.scalar(None)),
    )


class Side:
    """The lanes of one side of a tile: their positions and, where the Score asks for them, what follows from these."""

    def __init__(self, s: Shape, pos: Expr, count: int, rows: bool, queries: bool) -> None:
        """pos: of so many lanes, -1 where invalid. rows: whether this is the side of rows; queries: of queries."""
        self.pos, self.count, self._rows, self._lanes, self._queries = pos, count, rows, s.lanes, queries
        self.blocks = scratch(count, "int32") if s.score.has(BlockBias) else None
        self.words = scratch(count, "uint32") if s.score.dropout and queries else None

    def of(self, array: Expr, j: Expr, row: Expr) -> Expr:
        """A vector: of the rows from ``row`` on, or of column j for all lanes."""
        return load(array, row, self._lanes) if self._rows else T.Broadcast(array[j], self._lanes)

    def emit_begin(self, a: TermArguments, batch: Expr, head: Expr) -> None:
        """Once positions are there: blocks, and the words of queries."""
        if self.blocks is not None:
            with I.serial(0, self.count) as i:
                I.buffer_store(self.blocks, T.truncdiv(T.max(self.pos[i], 0), a.block_size), [i])
        if self.words is not None:
            with I.serial(0, self.count) as i:
                I.buffer_store(self.words, query_word(a.seed[0], batch, head, self.pos[i]), [i])


class TermEmitter:
    """What is done to the scores and probabilities of a worker, tile by tile."""

    def __init__(self, s: Shape, a: TermArguments, factor: Expr, cap: Expr, row_pos: Expr, col_pos: Expr,
                 queries_are_rows: bool = True) -> None:  # fmt: skip
        """factor: of products, where it is not that of the rows already. cap: a vector."""
        self.factor = I.Bind(T.Broadcast(factor, s.lanes)) if s.scales_scores else None
        self.s, self.a, self.cap = s, a, cap
        self.rows = Side(s, row_pos, s.m, rows=True, queries=queries_are_rows)
        self.cols = Side(s, col_pos, s.n, rows=False, queries=not queries_are_rows)
        self.q, self.k = (self.rows, self.cols) if queries_are_rows else (self.cols, self.rows)

    def emit_begin_rows(self, batch: Expr, head: Expr) -> None:
        """For an item of this query head, once the positions of its rows are there."""
        self.batch, self.head = batch, head
        if self.a.slopes is not None:
            self.slope = I.Bind(T.Broadcast(self.a.slopes[head] * self.s.scalar(LOG2E), self.s.lanes))
        self.rows.emit_begin(self.a, batch, head)

    def emit_begin_columns(self) -> None:
        """For a column tile, once the positions of its columns are there."""
        self.cols.emit_begin(self.a, self.batch, self.head)

    # -- scores --------------------------------------------------------------------------------------------------------

    def apply(self, score: Expr, j: Expr, row: Expr) -> tuple[Expr, Expr | None]:
        """(the factor and every step in turn on a vector of products of column j, the slope of the softcap there, if
        there is one)."""
        slope = None
        if self.factor is not None:
            score = score * self.factor
        for step in self.s.score.steps:
            if isinstance(step, Softcap):
                score, slope = cap_score(score, self.cap, self.s)
            else:
                score = EMITTERS[type(step)](self, score, j, row)
        return score, slope

    def emit_away(self, j: Expr, row: Expr) -> Expr:
        """k - q - shift."""
        return I.Bind(self.k.of(self.k.pos, j, row) - self.q.of(self.q.pos, j, row) - self._ints(self.a.shift))

    def emit_distance(self, j: Expr, row: Expr) -> Expr:
        """What slopes are multiplied by."""
        away = self.emit_away(j, row)
        return T.cast(T.max(away, self._ints(0) - away), vector_type(self.s.lanes, self.s.acc))

    def emit_offset(self, j: Expr, row: Expr) -> Expr:
        """The place in the table of RelativeBias."""
        reach = self._ints(I.Bind(T.truncdiv(self.a.relative.shape[1], 2)))
        return I.Bind(T.max(T.min(self.emit_away(j, row), reach), self._ints(0) - reach) + reach)

    def emit_block(self, j: Expr, row: Expr) -> Expr:
        """The place in the table of BlockBias, its last two dimensions as one."""
        q, k = self.q.of(self.q.blocks, j, row), self.k.of(self.k.blocks, j, row)
        return I.Bind(q * self._ints(self.a.block_cols) + k)

    def _ints(self, value: Expr) -> Expr:
        return T.Broadcast(T.int32(value) if isinstance(value, int) else value, self.s.lanes)

    # -- probabilities -------------------------------------------------------------------------------------------------

    def emit_dropped(self, p: Expr, j: Expr, row: Expr) -> Expr:
        """p / (1 - dropout), 0 where it is dropped; p itself without dropout."""
        if not self.s.score.dropout:
            return p
        lanes = self.s.lanes
        word = pair_word(self.q.of(self.q.words, j, row), T.cast(self.k.of(self.k.pos, j, row),
                                                                 vector_type(lanes, "uint32")), lanes)  # fmt: skip
        kept = word >= T.Broadcast(T.cast(self.a.threshold, "uint32"), lanes)
        return T.Select(kept, p * T.Broadcast(self.a.factor, lanes), self.s.constant(0.0))


def cap_score(score: Expr, cap: Expr, s: Shape) -> tuple[Expr, Expr]:
    """(cap * tanh(score / cap), its derivative), by tanh(x) = (1 - e) / (1 + e) with e = exp(-2 |x|) and the sign of x;
    1 - tanh(x)^2 = 4 e / (1 + e)^2 loses nothing where tanh is nearly 1.
    """
    x = I.Bind(score / cap)
    e = I.Bind(exp2(T.max(x, -x) * s.constant(-2 * LOG2E), s.lanes, s.acc))
    one, zero = s.constant(1.0), s.constant(0.0)
    size = I.Bind((one - e) / (one + e) * cap)
    return T.Select(x < zero, zero - size, size), s.constant(4.0) * e / ((one + e) * (one + e))


def _alibi(t: TermEmitter, score: Expr, j: Expr, row: Expr) -> Expr:
    return score - t.slope * t.emit_distance(j, row)


def _relative(t: TermEmitter, score: Expr, j: Expr, row: Expr) -> Expr:
    return score + t.a.relative[t.head, t.emit_offset(j, row)] * t.s.constant(LOG2E)


def _block(t: TermEmitter, score: Expr, j: Expr, row: Expr) -> Expr:
    return score + t.a.block[t.head, t.emit_block(j, row)] * t.s.constant(LOG2E)


EMITTERS: dict[type[Step], Callable[[TermEmitter, Expr, Expr, Expr], Expr]] = {
    Alibi: _alibi, RelativeBias: _relative, BlockBias: _block,
}  # fmt: skip


def query_word(seed: Expr, batch: Expr, head: Expr, q: Expr) -> Expr:
    """The word of a query, as ir/dropout.py has it."""
    k0, k1 = I.Bind(T.cast(seed, "uint32")), I.Bind(T.cast(seed >> T.int64(32), "uint32"))
    x = [T.cast(q, "uint32"), T.cast(head, "uint32"), T.cast(batch, "uint32"), T.uint32(0)]
    for i in range(ROUNDS):
        high_a, low_a = _product(x[0], PHILOX_MULTIPLIERS[0])
        high_b, low_b = _product(x[2], PHILOX_MULTIPLIERS[1])
        keys = [k + T.uint32(i * step % 2**32) for k, step in zip((k0, k1), PHILOX_STEPS, strict=True)]
        x = [I.Bind(high_b ^ x[1] ^ keys[0]), low_b, I.Bind(high_a ^ x[3] ^ keys[1]), low_a]
    return x[0]


def _product(word: Expr, factor: int) -> tuple[Expr, Expr]:
    """The (high, low) half of a product of 32-bit words."""
    product = I.Bind(T.cast(word, "uint64") * T.uint64(factor))
    return T.cast(product >> T.uint64(32), "uint32"), I.Bind(T.cast(product, "uint32"))


def pair_word(of_query: Expr, k: Expr, lanes: int) -> Expr:
    """Vectors of words of (query, key) pairs, as ir/dropout.py has them."""
    golden, first, factor1, second, factor2, third = (T.Broadcast(T.uint32(x), lanes) for x in (GOLDEN, *MIX))
    x = I.Bind(of_query ^ (k * golden))
    x = I.Bind((x ^ (x >> first)) * factor1)
    x = I.Bind((x ^ (x >> second)) * factor2)
    return x ^ (x >> third)
