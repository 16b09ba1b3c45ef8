"""What a Score adds to scores and takes from probabilities (ir/score.py, ir/dropout.py), for one thread's registers.

Both sides of a pair are prepared once, a query by ``query_side`` and a key by ``key_side``; what is left for each of
the pairs is a few instructions. Positions of lanes that do not exist are any number: reads stay inside their tables.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as I

from splatc.codegen.hopper.emit import Expr, let, registers, store
from splatc.ir.dropout import GOLDEN, MIX, PHILOX_MULTIPLIERS, PHILOX_STEPS, ROUNDS
from splatc.ir.score import Alibi, BlockBias, RelativeBias, Score


class TermArguments:
    """The kernel's parameters for a Score: only those that it asks for. table: declares a flat global array."""

    def __init__(self, score: Score, table: Any) -> None:
        def number(name: str) -> Expr:
            return I.arg(name, I.int32())

        self.score = score
        if score.has(Alibi):
            self.slopes = table("slopes", "float32", 1)  # (heads,)
        if score.has(RelativeBias):
            self.relative = table("relative", "float32", 1)  # (heads, 2 * reach + 1)
            self.reach = number("reach")
        if score.has(Alibi) or score.has(RelativeBias):
            self.shift = number("shift")
        if score.has(BlockBias):
            self.biases = table("biases", "float32", 1)  # (heads, block_rows, block_cols)
            self.block_size, self.block_rows, self.block_cols = map(number, ("block_size", "block_rows", "block_cols"))
        if score.sinks:
            self.sinks = table("sinks", "float32", 1)  # (heads,)
        if score.dropout:
            self.seed = table("seed", "uint32", 1)  # low and high half
            self.threshold = T.cast(number("threshold"), "uint32")
            self.kept = I.arg("kept", I.float32())  # 1 / (1 - p)


@dataclass(frozen=True)
class Query:
    """A query lane, in the forms that terms use; None where no term does."""

    position: Expr  # + shift
    real: Expr  # the same, as a float
    block: Expr  # where its row of block biases begins
    word: Expr  # of dropout


@dataclass(frozen=True)
class Key:
    """A key lane, in the forms that terms use."""

    position: Expr
    real: Expr
    block: Expr
    word: Expr  # times GOLDEN


class TermEmitter:
    """The terms of one query head: ``begin`` before anything else."""

    def __init__(self, a: TermArguments) -> None:
        self.a, self.score = a, a.score

    def begin(self, batch: Expr, head: Expr) -> None:
        """Read what belongs to a head."""
        a, score = self.a, self.score
        self.batch, self.head = batch, head
        if score.has(Alibi):
            self.slope = let("slope", a.slopes[head])
        if score.has(RelativeBias):
            self.middle = let("middle", head * (2 * a.reach + 1) + a.reach)
        if score.has(BlockBias):
            self.first_block = let("first_block", head * (a.block_rows * a.block_cols))

    def query_side(self, position: Expr, word: Expr = None) -> Query:
        """Of a query's position. word: of dropout, if it is known already."""
        a, score = self.a, self.score
        moved = real = block = None
        if score.has(Alibi) or score.has(RelativeBias):
            moved = let("moved", position + a.shift)
            real = let("query", T.cast(moved, "float32")) if score.has(Alibi) else None
        if score.has(BlockBias):
            row = _inside(T.truncdiv(position, a.block_size), a.block_rows)
            block = let("query_block", self.first_block + row * a.block_cols)
        if score.dropout and word is None:
            word = query_word(a.seed, position, self.head, self.batch)
        return Query(moved, real, block, word)

    def key_side(self, position: Expr) -> Key:
        """Of a key's position."""
        a, score = self.a, self.score
        real = block = word = None
        if score.has(Alibi):
            real = let("key", T.cast(position, "float32"))
        if score.has(BlockBias):
            block = let("key_block", _inside(T.truncdiv(position, a.block_size), a.block_cols))
        if score.dropout:
            word = let("key_word", T.cast(position, "uint32") * T.uint32(GOLDEN))
        return Key(position, real, block, word)

    def add(self, value: Expr, q: Query, k: Key) -> Expr:
        """A score (natural units) with the biases of its pair."""
        a = self.a
        for step in self.score.biases:
            match step:
                case Alibi():
                    value = value - self.slope * T.abs(k.real - q.real)
                case RelativeBias():
                    value = value + a.relative[self.middle + self.distance(q, k)]
                case BlockBias():
                    value = value + a.biases[q.block + k.block]
        return value

    def distance(self, q: Query, k: Key) -> Expr:
        """k - q, clipped to the reach of the table."""
        return T.max(T.min(k.position - q.position, self.a.reach), -self.a.reach)

    def dropped(self, q: Query, k: Key) -> Expr:
        """Whether dropout drops the pair."""
        return mix(T.bitwise_xor(q.word, k.word)) < self.a.threshold


class Pairs:
    """The pairs of a tile in a thread's registers: register 4i + 2r + c is row r of two and column (i, c).

    Rows are known; ``column`` prepares the column of a register when a sweep over the registers comes to it.
    """

    def __init__(self, terms: TermEmitter, rows: Sequence[Any], column: Callable[[int], Any],
                 rows_are_keys: bool = False) -> None:  # fmt: skip
        self._terms, self._rows, self._column, self._rows_are_keys = terms, rows, column, rows_are_keys
        self._columns: dict[tuple[int, int], Any] = {}

    def sweep(self) -> Pairs:
        """Begin anew at the first register: columns take registers, so none is remembered from sweep to sweep."""
        self._columns = {}
        return self

    def sides(self, i: int) -> tuple[Query, Key]:
        """Of a register."""
        at = i // 4, i % 2
        if at not in self._columns:
            self._columns[at] = self._column(i)
        row, column = self._rows[i // 2 % 2], self._columns[at]
        return (column, row) if self._rows_are_keys else (row, column)

    def add(self, i: int, value: Expr) -> Expr:
        """A register's score with its biases."""
        return self._terms.add(value, *self.sides(i))

    def kept(self, i: int, value: Expr) -> Expr:
        """value, or 0 where dropout drops the register's pair."""
        return T.if_then_else(self._terms.dropped(*self.sides(i)), T.float32(0.0), value)


def _inside(index: Expr, count: Expr) -> Expr:
    return T.max(T.min(index, count - 1), 0)


def mix(x: Expr) -> Expr:
    """Every bit of a 32-bit word changes every bit of the result about half the time (ir/dropout.py)."""
    first, factor1, second, factor2, third = (T.uint32(n) for n in MIX)
    x = let("mixed", T.bitwise_xor(x, T.shift_right(x, first)) * factor1)
    x = let("mixed", T.bitwise_xor(x, T.shift_right(x, second)) * factor2)
    return let("mixed", T.bitwise_xor(x, T.shift_right(x, third)))


def query_word(seed: Expr, position: Expr, head: Expr, batch: Expr) -> Expr:
    """A query's word of Philox4x32-10 (ir/dropout.py), in a register. seed: two uint32."""
    x, y = registers("philox", 4, "uint32"), registers("philox_product", 2, "uint64")
    key = registers("philox_key", 2, "uint32")
    for i, value in enumerate((position, head, batch, 0)):
        store(x, i, T.cast(value, "uint32") if i < 3 else T.uint32(0))
    for i in range(2):
        store(key, i, seed[i])
    for _ in range(ROUNDS):
        for i in range(2):
            store(y, i, T.cast(x[2 * i], "uint64") * T.uint64(PHILOX_MULTIPLIERS[i]))
        low, high = ([f(y[i]) for i in range(2)] for f in (_low, _high))
        store(x, 0, T.bitwise_xor(T.bitwise_xor(high[1], x[1]), key[0]))
        store(x, 2, T.bitwise_xor(T.bitwise_xor(high[0], x[3]), key[1]))
        store(x, 1, low[1])
        store(x, 3, low[0])
        for i in range(2):
            store(key, i, key[i] + T.uint32(PHILOX_STEPS[i]))
    return let("query_word", x[0])


def _low(x: Expr) -> Expr:
    return T.cast(x, "uint32")


def _high(x: Expr) -> Expr:
    return T.cast(T.shift_right(x, T.uint64(32)), "uint32")
