"""Gradients of biases that learn: what each pair adds to its bias, summed as 64-bit integers in global memory.

A pair's score gradient times a power of two, rounded; integers give the same sum in any order. The power is so small
that the sum over all queries fits, and 62 bits leave it precise. A thread adds up what its neighbouring columns have
for the same bias first, because far pairs of a relative table, and pairs of one block, share one.

Score gradients of a row nearly cancel in the gradient of a slope, and delta, of an O that was rounded, is off by some
e: that adds -e times the row's mean distance. So a row also leaves the sum of its score gradients, which tells e, and
its mean distance (runtime/bias_gradients.py puts them together).
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T

from splatc.codegen.cuda_parts import from_lane
from splatc.codegen.hopper.backward.scores import RowScores
from splatc.codegen.hopper.backward.shape import DISTANCE_BITS
from splatc.codegen.hopper.block import int_arg
from splatc.codegen.hopper.combine import wide
from splatc.codegen.hopper.emit import Cell, Expr, do, let, registers, store, when
from splatc.codegen.hopper.terms import Key, Query, TermEmitter
from splatc.ir.score import Alibi, BlockBias, RelativeBias, Score


class SumArguments:
    """The kernel's parameters for the biases of a Score that learn: int64 sums like each tensor of biases, and their
    powers of two, float32 (2): of tables, and of slopes. For slopes also int64 (batch, heads, q_len, 2): sums of score
    gradients, times the first power, and of distances weighted by probabilities, times 2^DISTANCE_BITS."""

    def __init__(self, learning: Score, table: Any) -> None:
        if learning.has(Alibi):
            self.slopes = table("slope_sums", "int64", 1)
            self.rows = table("row_sums", "int64", 1)
            self.heads, self.q_len = int_arg("heads"), int_arg("q_len")
        if learning.has(RelativeBias):
            self.relative = table("relative_sums", "int64", 1)
        if learning.has(BlockBias):
            self.biases = table("block_sums", "int64", 1)
        if learning:
            self.powers = table("powers", "float32", 1)


class BiasSums:
    """The sums of a thread's two rows of queries."""

    def __init__(self, a: SumArguments, learning: Score, terms: TermEmitter, scores: RowScores) -> None:
        """learning: the biases that learn, of the score of ``terms``. scores: whose registers are added, of a tile."""
        self._a, self._terms, self._scores = a, terms, scores
        self._runs = []
        for step in learning.biases:
            if isinstance(step, RelativeBias):
                self._runs.append((a.relative, self._in_table, Runs("relative")))
            elif isinstance(step, BlockBias):
                self._runs.append((a.biases, self._in_blocks, Runs("block")))
        self._slope = SlopeSums(a) if learning.has(Alibi) else None

    def _in_table(self, q: Query, k: Key) -> Expr:
        return self._terms.middle + self._terms.distance(q, k)

    def _in_blocks(self, q: Query, k: Key) -> Expr:
        return q.block + k.block

    def add(self) -> None:
        """What a tile's pairs add: score gradients are in dp, probabilities in s."""
        gradients, pairs = self._scores.dp, self._scores.pairs.sweep()
        for i in range(self._scores.count):
            sides = pairs.sides(i)
            if self._slope is not None:
                self._slope.add(i // 2 % 2, distance(*sides), gradients[i], self._scores.s[i])
            for sums, place, runs in self._runs:
                runs.add(i // 2 % 2, let("bias", place(*sides)), gradients[i], sums, self._a.powers[0])

    def finish(self, batch: Expr, lane: Expr, position_of: Callable[[int], Expr]) -> None:
        """The last sums of a row tile; everything is empty then. position_of: of row r, in its sequence."""
        for sums, _, runs in self._runs:
            runs.flush(sums, self._a.powers[0])
        if self._slope is not None:
            a, head = self._a, self._terms.head
            first = let("first_row", wide(batch * a.heads + head) * wide(a.q_len))
            self._slope.finish(head, lane, self._scores.lse, lambda r: first + wide(position_of(r)))


def distance(q: Query, k: Key) -> Expr:
    """What a slope is multiplied by."""
    return T.abs(k.real - q.real)


class SlopeSums:
    """What the gradient of a head's slope takes of two rows: of both, minus the sum of score gradients times distances;
    of each, the sums of its score gradients and of its probabilities times distances."""

    def __init__(self, a: SumArguments) -> None:
        self._a = a
        self._slope = Cell("slope_sum", T.float32(0.0), "float32")
        self._sums = {name: registers(f"{name}_sum", 2) for name in ("gradient", "distance")}
        self._empty()

    def _empty(self) -> None:
        self._slope.set(T.float32(0.0))
        for sums in self._sums.values():
            for r in range(2):
                store(sums, r, T.float32(0.0))

    def add(self, r: int, far: Expr, gradient: Expr, probability: Expr) -> None:
        """A pair of row r."""
        far = let("far", far)
        self._slope.set(self._slope() - gradient * far)
        for sums, value in zip(self._sums.values(), (gradient, probability * far), strict=True):
            store(sums, r, sums[r] + value)

    def finish(self, head: Expr, lane: Expr, lse: Expr, row_of: Callable[[int], Expr]) -> None:
        """Send them away. Of a row that does not exist the LSE is 0, as of one without pairs, and its place that of
        another one."""
        a = self._a
        send(a.slopes, head, self._slope() * a.powers[1])
        for r in range(2):
            for sums in self._sums.values():
                for lanes in (1, 2):  # that share the row
                    store(sums, r, sums[r] + from_lane(sums[r], lanes))
            with when(T.And(T.EQ(lane % 4, 0), lse[r] != T.float32(0.0))):
                at, factors = let("at_row", row_of(r) * 2), (a.powers[0], T.float32(2.0**DISTANCE_BITS))
                for i, (sums, factor) in enumerate(zip(self._sums.values(), factors, strict=True)):
                    send(a.rows, at + i, sums[r] * factor)
        self._empty()


class Runs:
    """Of each of two rows, the sum over the last columns that share a bias."""

    def __init__(self, name: str) -> None:
        self._bias, self._sum = registers(f"{name}_at", 2, "int32"), registers(f"{name}_run", 2)
        for r in range(2):
            store(self._bias, r, 0)
            store(self._sum, r, T.float32(0.0))

    def add(self, r: int, bias: Expr, value: Expr, sums: Expr, power: Expr) -> None:
        with when(bias != self._bias[r]):
            self._send(r, sums, power)
            store(self._bias, r, bias)
        store(self._sum, r, self._sum[r] + value)

    def flush(self, sums: Expr, power: Expr) -> None:
        for r in range(2):
            self._send(r, sums, power)

    def _send(self, r: int, sums: Expr, power: Expr) -> None:
        with when(self._sum[r] != T.float32(0.0)):
            send(sums, self._bias[r], self._sum[r] * power)
        store(self._sum, r, T.float32(0.0))


def send(sums: Expr, at: Expr, value: Expr) -> None:
    """sums[at] += value, rounded."""
    rounded = registers("rounded", 1, "int64")
    do(T.ptx["cvt.rni.s64.f32"](rounded[0], value))
    do(T.ptx["red.global.add.u64"](sums.ptr_to([at]), T.reinterpret("uint64", rounded[0])))
