"""Online softmax on score registers, in the log2 domain; two rows a thread, four threads a row.

A row that has seen nothing has maximum -inf and sum 0; masked scores are -inf.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from tvm.script import tirx as T

from splatc.codegen.constants import LOG2E, NEG_INF
from splatc.codegen.cuda_parts import from_lane
from splatc.codegen.hopper.emit import Expr, let, registers, store


def columns_of(row: int, count: int) -> list[int]:
    """The score registers of a thread's row 0 or 1."""
    return [i for i in range(count) if i // 2 % 2 == row]


def finite(x: Expr) -> Expr:
    """x, or 0 for -inf: so that exp2(-inf - x) is 0 and not NaN."""
    return T.if_then_else(T.EQ(x, T.float32(NEG_INF)), T.float32(0.0), x)


class Softmax:
    """The running maximum and sum of a thread's two rows over ``count`` score registers a tile.

    unit: what one score counts in the softmax (the scale), in fp32.
    """

    def __init__(self, count: int, unit: Expr) -> None:
        self._count = count
        self._unit = unit
        self._log2_unit = let("log2_unit", unit * T.float32(LOG2E))
        self.top = registers("top", 2)
        self.sum = registers("sum", 2)
        self.shrink = registers("shrink", 2)
        self._bias = registers("bias", 2)
        self._new_top = registers("new_top", 2)
        self._partial = registers("partial", 4)

    def first(self, s: Expr) -> None:
        """Scores of a row's first tile -> exp2(s - maximum); the state starts."""
        for r in range(2):
            self._find_top(s, r)
            store(self.top, r, self._new_top[r])
            store(self._bias, r, finite(self._new_top[r] * self._log2_unit))
        self._exponentiate(s, first=True)

    def next(self, s: Expr) -> None:
        """The same for a later tile; ``shrink`` is then what earlier sums and outputs are to be multiplied by."""
        for r in range(2):
            self._find_top(s, r)
            store(self._new_top, r, T.max(self._new_top[r], self.top[r]))
            store(self._bias, r, finite(self._new_top[r] * self._log2_unit))
            store(self.shrink, r, T.exp2(self.top[r] * self._log2_unit - self._bias[r]))
            store(self.top, r, self._new_top[r])
        self._exponentiate(s, first=False)

    def finish(self, inverse: Expr, lse: Expr) -> None:
        """inverse[r] = 1 / sum (0 for an empty row); lse[r] = natural log of the sum of exponentials."""
        for r in range(2):
            for distance in (1, 2):
                store(self.sum, r, self.sum[r] + from_lane(self.sum[r], distance))
            empty = T.EQ(self.sum[r], T.float32(0.0))
            store(inverse, r, T.if_then_else(empty, T.float32(0.0), T.float32(1.0) / self.sum[r]))
            store(lse, r, self.top[r] * self._unit + T.log(self.sum[r]))

    def _find_top(self, s: Expr, row: int) -> None:
        columns = columns_of(row, self._count)
        for c in range(4):  # four independent chains
            store(self._partial, c, s[columns[c]])
        for n, i in enumerate(columns[4:]):
            store(self._partial, n % 4, T.max(self._partial[n % 4], s[i]))
        best = [self._partial[c] for c in range(4)]
        store(self._new_top, row, T.max(T.max(best[0], best[1]), T.max(best[2], best[3])))
        for distance in (1, 2):
            store(self._new_top, row, T.max(self._new_top[row], from_lane(self._new_top[row], distance)))

    def _exponentiate(self, s: Expr, first: bool) -> None:
        for i in range(self._count):
            store(s, i, T.exp2(s[i] * self._log2_unit - self._bias[i // 2 % 2]))
        for r in range(2):
            columns = columns_of(r, self._count)
            for c in range(2):
                store(self._partial, 2 * r + c, s[columns[c]])
            for n, i in enumerate(columns[2:]):
                store(self._partial, 2 * r + n % 2, self._partial[2 * r + n % 2] + s[i])
            tile_sum = self._partial[2 * r] + self._partial[2 * r + 1]
            store(self.sum, r, tile_sum if first else self.sum[r] * self.shrink[r] + tile_sum)


def cap_scores(s: Expr, count: int, inverse: Expr) -> None:
    """s = tanh(s * inverse), as 1 - 2 / (1 + exp(2x)): exact near 0, where tanh.approx is not."""
    twice = let("twice", inverse * T.float32(2 * LOG2E))
    for i in range(count):
        store(s, i, capped(s[i] * twice))


def capped(twice: Expr) -> Expr:
    """tanh(x) of twice x in the log2 domain: 1 - 2 / (1 + exp(2x))."""
    return T.float32(1.0) - T.float32(2.0) / (T.float32(1.0) + T.exp2(twice))


def mask_values(values: Expr, count: int, words: Expr, masked: float = NEG_INF) -> None:
    """``masked`` where the register's bit is clear."""
    for i in range(count):
        kept = T.bitwise_and(words[i // 32], T.uint32(1 << (i % 32))) != T.uint32(0)
        store(values, i, T.if_then_else(kept, values[i], T.float32(masked)))
