"""Online softmax on score registers, in the log2 domain; two rows a thread, four threads a row.

A row's exponentials are relative to its ``top``: its largest score when that was set. The top moves only when a score
exceeds it by more than SLACK (in log2 units), so exponentials are at most 2^SLACK, which float16 has room for. Most
tiles are asked for no more than whether one does: as integers, three at a time, each thread of its own scores only. A
row that has seen nothing has top -inf and sum 0; masked scores are -inf.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from tvm.script import tirx as T

from splatc.codegen.constants import FULL_WARP, LN2, LOG2E, NEG_INF
from splatc.codegen.cuda_parts import from_lane
from splatc.codegen.hopper.emit import Expr, call_source, let, registers, store, when
from splatc.codegen.hopper.epilogue import finite

SLACK = 8.0
CHAINS = 4  # of dependent instructions, side by side
# The bits of floats, as integers, are ordered as the floats are where the limit is not negative. A negative limit is a
# negative integer, and 0, which ``high`` starts from, is over it.
LARGER = ("splatc_larger", "__forceinline__ __device__ void splatc_larger(int& high, float x, float y) "
          "{ high = __vimax3_s32(high, __float_as_int(x), __float_as_int(y)); }\n")  # fmt: skip


def columns_of(row: int, count: int) -> list[int]:
    """The score registers of a thread's row 0 or 1."""
    return [i for i in range(count) if i // 2 % 2 == row]


class Softmax:
    """The running sum of a thread's two rows over ``count`` score registers a tile.

    unit: what one score counts in the softmax (the scale), in fp32 and positive.
    """

    def __init__(self, count: int, unit: Expr) -> None:
        self._count = count
        self._log2_unit = let("log2_unit", unit * T.float32(LOG2E))
        self._slack = let("slack", T.float32(SLACK) / self._log2_unit)
        self.sum = registers("sum", 2)
        self.shrink = registers("shrink", 2)
        self._top = registers("top", 2)
        self._moved = registers("moved", 1, "int32")
        self._high = registers("high", 2, "int32")
        self._largest = registers("largest", 2)
        self._partial = registers("partial", CHAINS)

    @property
    def moved(self) -> Expr:
        """After ``next``: whether earlier outputs are to be multiplied by ``shrink``; alike in a warp."""
        return self._moved[0] != 0

    def first(self, s: Expr) -> None:
        """Scores of a row's first tile -> exp2(s - top); the state starts."""
        for r in range(2):
            self._find_largest(s, r)
            store(self._top, r, self._largest[r])
        self._exponentiate(s)
        for r in range(2):
            store(self.sum, r, self._tile_sum(r))

    def next(self, s: Expr) -> None:
        """The same for a later tile; where a top has ``moved``, ``shrink`` is the factor for what came before."""
        self._look_for_moves(s)
        with when(self.moved):
            for r in range(2):
                self._find_largest(s, r)
                store(self._largest, r, T.max(self._largest[r], self._top[r]))
                old = let("old", self._top[r] * self._log2_unit)
                store(self._top, r, self._largest[r])
                store(self.shrink, r, T.exp2(old - self._bias(r)))
                store(self.sum, r, self.sum[r] * self.shrink[r])
        self._exponentiate(s)
        for r in range(2):
            store(self.sum, r, self.sum[r] + self._tile_sum(r))

    def finish(self, inverse: Expr, lse: Expr) -> None:
        """inverse[r] = 1 / sum (0 for an empty row); lse[r] = natural log of the sum of exponentials."""
        for r in range(2):
            for distance in (1, 2):
                store(self.sum, r, self.sum[r] + from_lane(self.sum[r], distance))
            empty = T.EQ(self.sum[r], T.float32(0.0))
            store(inverse, r, T.if_then_else(empty, T.float32(0.0), T.float32(1.0) / self.sum[r]))
            store(lse, r, self._bias(r) * T.float32(LN2) + T.log(self.sum[r]))

    def _look_for_moves(self, s: Expr) -> None:
        """moved = whether a score of this warp's is over its row's limit."""
        for r in range(2):
            store(self._high, r, T.int32(0))
        for pair in range(self._count // 2):  # of columns of row pair % 2
            call_source(LARGER, self._high[pair % 2], s[2 * pair], s[2 * pair + 1])
        over = [self._high[r] > T.reinterpret("int32", self._top[r] + self._slack) for r in range(2)]
        store(self._moved, 0, T.cuda.any_sync(T.uint32(FULL_WARP), T.cast(T.Or(*over), "int32")))

    def _bias(self, row: int) -> Expr:
        """Top in log2 units, finite."""
        return finite(self._top[row] * self._log2_unit)

    def _find_largest(self, s: Expr, row: int) -> None:
        """Of all of the row's scores."""
        best = self._partial
        for n, i in enumerate(columns_of(row, self._count)):
            store(best, n % CHAINS, s[i] if n < CHAINS else T.max(best[n % CHAINS], s[i]))
        store(self._largest, row, T.max(T.max(best[0], best[1]), T.max(best[2], best[3])))
        for distance in (1, 2):
            store(self._largest, row, T.max(self._largest[row], from_lane(self._largest[row], distance)))

    def _exponentiate(self, s: Expr) -> None:
        bias = [let(f"bias{r}", self._bias(r)) for r in range(2)]
        for i in range(self._count):
            store(s, i, T.exp2(s[i] * self._log2_unit - bias[i // 2 % 2]))
        for r in range(2):
            for n, i in enumerate(columns_of(r, self._count)):
                part = 2 * r + n % 2
                store(self._partial, part, s[i] if n < 2 else self._partial[part] + s[i])

    def _tile_sum(self, row: int) -> Expr:
        return self._partial[2 * row] + self._partial[2 * row + 1]


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
