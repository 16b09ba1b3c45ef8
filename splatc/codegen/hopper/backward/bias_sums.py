"""Gradients of biases: what each pair adds to its bias, summed as 64-bit integers in global memory.

A pair's score gradient times a power of two, rounded; integers give the same sum in any order. The power is so small
that the sum over all queries fits, and 62 bits leave it precise. A thread adds up what its neighbouring columns have
for the same bias first, because far pairs of a relative table, and pairs of one block, share one.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from splatc.codegen.hopper.emit import Cell, Expr, do, let, registers, store, when
from splatc.codegen.hopper.terms import Key, Pairs, Query, TermEmitter
from splatc.ir.score import Alibi, BlockBias, RelativeBias, Score


class SumArguments:
    """The kernel's parameters: int64 sums like each tensor of biases, and their powers of two, float32 (2): of tables,
    and of slopes."""

    def __init__(self, score: Score, table: Any) -> None:
        if score.has(Alibi):
            self.slopes = table("slope_sums", "int64", 1)
        if score.has(RelativeBias):
            self.relative = table("relative_sums", "int64", 1)
        if score.has(BlockBias):
            self.biases = table("block_sums", "int64", 1)
        if score.biases:
            self.powers = table("powers", "float32", 1)


class BiasSums:
    """The sums of a thread's two rows of queries."""

    def __init__(self, a: SumArguments, terms: TermEmitter, count: int) -> None:
        """count: of the registers of a tile."""
        self._a, self._terms, self._count = a, terms, count
        self._runs = []
        for step in terms.score.biases:
            if isinstance(step, RelativeBias):
                self._runs.append((a.relative, self._in_table, Runs("relative")))
            elif isinstance(step, BlockBias):
                self._runs.append((a.biases, self._in_blocks, Runs("block")))
        self._slope = Cell("slope_sum", T.float32(0.0), "float32") if terms.score.has(Alibi) else None

    def _in_table(self, q: Query, k: Key) -> Expr:
        return self._terms.middle + self._terms.distance(q, k)

    def _in_blocks(self, q: Query, k: Key) -> Expr:
        return q.block + k.block

    def add(self, gradients: Expr, pairs: Pairs) -> None:
        """Of a tile's score gradients."""
        pairs.sweep()
        for i in range(self._count):
            sides = pairs.sides(i)
            if self._slope is not None:
                q, k = sides
                self._slope.set(self._slope() - gradients[i] * T.abs(k.real - q.real))
            for sums, place, runs in self._runs:
                runs.add(i // 2 % 2, let("bias", place(*sides)), gradients[i], sums, self._a.powers[0])

    def finish(self) -> None:
        """The last sums of a row tile; everything is empty then."""
        for sums, _, runs in self._runs:
            runs.flush(sums, self._a.powers[0])
        if self._slope is not None:
            send(self._a.slopes, self._terms.head, self._slope() * self._a.powers[1])
            self._slope.set(T.float32(0.0))


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
