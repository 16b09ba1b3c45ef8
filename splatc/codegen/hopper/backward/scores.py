"""What a thread computes between the products: probabilities, gradients of scores, and sums of dQ as integers.

Of a tile's n queries (columns) and a warpgroup's 64 keys (rows), in the row kernel the other way round, register
4i + 2r + c of thread (g, q) is row g + 8r and column 8i + 2q + c. A pair of them, c = 0 and 1, is rounded to one word:
word 2i + r.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Sequence

from tvm.script import tirx as T

from splatc.codegen.constants import LOG2E
from splatc.codegen.hopper.backward.shape import STATISTICS, SUM_CHUNK, RowShape, Shape
from splatc.codegen.hopper.emit import Expr, do, let, registers, store
from splatc.codegen.hopper.products import PTX_TYPE, hidden
from splatc.codegen.hopper.shape import WARPGROUP_ROWS, chunk
from splatc.codegen.hopper.softmax import capped, mask_values
from splatc.codegen.hopper.stored import unpack
from splatc.codegen.hopper.terms import Pairs
from splatc.ir.score import Alibi

# Words of a query's statistics (rows.py); in one walk, and in two
LSE, DELTA, SCALE_IN = 0, 1, 2
WORD, POSITION = 2, 3


class Scores:
    """Probabilities p and score gradients ds of a tile, packed; both are A operands.

    With a softcap or dropout ds first holds what of p the gradients take: before dropout, times the slope of the cap.
    pairs: of the tile in a stage, where a term asks for it.
    """

    pairs: Pairs

    def __init__(self, s: Shape, scale: Expr, cap: Expr, statistics: Expr, lane: Expr, kept: Expr = None) -> None:
        """kept: what dropout multiplies the probabilities by that it leaves."""
        self._s, self._statistics, self._kept = s, statistics, kept
        self.count = s.n // 2
        self.words = s.n // 4
        self.s, self.dp = registers("scores", self.count), registers("dp", self.count)
        self.p, self.ds = (registers(name, self.words, "uint32") for name in ("probs", "ds"))
        self._pair = registers("pair", 4)
        self._natural = cap if s.softcap else scale
        self._unit = let("unit", self._natural * T.float32(LOG2E))
        self._twice = let("twice", scale / cap * T.float32(2 * LOG2E)) if s.softcap else None
        self._apart = s.makes("dk") and (s.softcap or s.score.dropout)
        self._packed = s.makes("dv") or s.score.dropout or not self._apart  # whether anything is made from p
        self._mine = let("my_columns", lane % 4 * (2 * STATISTICS))

    def of_query(self, stage: Expr, register: int) -> tuple[Expr, Expr]:
        """(position, word of dropout) of the query of a register."""
        position, word = (self._of_query(stage, register // 4, register % 2, what) for what in (POSITION, WORD))
        return let("query_position", T.reinterpret("int32", position)), T.reinterpret("uint32", word)

    def _of_query(self, stage: Expr, i: int, c: int, word: int) -> Expr:
        """A statistic of the query of column group i, column c."""
        return self._statistics[stage * (self._s.n * STATISTICS) + self._mine + (8 * i + c) * STATISTICS + word]

    def probabilities(self, stage: Expr) -> None:
        """p = exp(score - LSE) of the scores, after dropout; ds where it is kept apart."""
        score = self._s.score
        for word in range(self.words):
            i, r = divmod(word, 2)
            for c in range(2):
                at = 4 * i + 2 * r + c
                lse, value = self._of_query(stage, i, c, LSE), self.s[at]
                if self._twice is not None:
                    store(self._pair, 2 + c, capped(value * self._twice))
                    value = self._pair[2 + c]
                if score.biases:
                    store(self._pair, c, T.exp2(self.pairs.add(at, value * self._natural) * T.float32(LOG2E) - lse))
                else:
                    store(self._pair, c, T.exp2(value * self._unit - lse))
                if self._apart and self._twice is not None:
                    store(self._pair, 2 + c, self._pair[c] * (T.float32(1.0) - self._pair[2 + c] * self._pair[2 + c]))
                elif self._apart:
                    store(self._pair, 2 + c, self._pair[c])
                if score.dropout:
                    store(self._pair, c, self.pairs.kept(at, self._pair[c] * self._kept))
            self._take_pair(word)

    def _take_pair(self, word: int) -> None:
        """A word's two probabilities, and where they are kept apart what of them the gradients take."""
        if self._packed:
            self._pack(self.p, word, self._pair[0], self._pair[1])
        if self._apart:
            self._pack(self.ds, word, self._pair[2], self._pair[3])

    def _pack(self, words: Expr, at: int, low: Expr, high: Expr) -> None:
        do(T.ptx[f"cvt.rn.{PTX_TYPE[self._s.dtype]}x2.f32"](words[at], high, low))

    def mask(self, bits: Expr) -> None:
        """0 where the register's bit is clear. bits: words of a thread."""
        if self._packed:
            mask_words(self.p, self.words, bits)
        if self._apart:
            mask_words(self.ds, self.words, bits)

    def gradients(self, stage: Expr) -> None:
        """ds = p (dp - delta), from p rounded; dp of a pair that was dropped, which p says, is 0."""
        for word in range(self.words):
            i, r = divmod(word, 2)
            p = unpack((self.ds if self._apart else self.p)[word], self._s.dtype)
            for c in range(2):
                delta, dp = self._of_query(stage, i, c, DELTA), self.dp[4 * i + 2 * r + c]
                if self._s.score.dropout:
                    left = unpack(self.p[word], self._s.dtype)[c]
                    dp = T.if_then_else(T.EQ(left, T.float32(0.0)), T.float32(0.0), dp * self._kept)
                store(self._pair, c, p[c] * (dp - delta))
            self._pack(self.ds, word, self._pair[0], self._pair[1])

    def stage_gradients(self, target: Expr, stage: Expr, first_row: Expr, lane: Expr) -> None:
        """Write ds to its stage: 64 queries side by side in a swizzled row of a key, one block after another."""
        width = chunk(self._s.dtype)
        lane = hidden(lane, "int32")
        row = let("ds_row", first_row + lane % 16)
        for i in range(self._s.n // 16):
            column16 = T.bitwise_xor(i % 4 * 2 + lane // 16, row % 8)
            at = stage * (self._s.keys * self._s.n) + i // 4 * (self._s.keys * width) + row * width + column16 * 8
            words = (self.ds[4 * i + j] for j in range(4))
            do(T.ptx["stmatrix.sync.aligned.m8n8.x4.shared.b16"](target.ptr_to([at]), *words))


class ValueScores(Scores):
    """Probabilities of a tile for dV alone: they take the place of scores until ``pack`` makes an A operand of them."""

    def _take_pair(self, word: int) -> None:
        for c in range(2):
            store(self.s, 2 * word + c, self._pair[c])

    def mask(self, bits: Expr) -> None:
        mask_values(self.s, self.count, bits, masked=0.0)

    def pack(self) -> None:
        """p, when the product with the one before is done."""
        for word in range(self.words):
            self._pack(self.p, word, self.s[2 * word], self.s[2 * word + 1])


class RowScores:
    """Score gradients ds of a tile of queries (rows) by keys (columns), packed: an A operand.

    lse, delta: of a thread's two rows, in registers. pairs: of the tile, where a term asks for it. Where biases learn,
    dp becomes what they take, the gradients without the slope of a softcap; and s, the probabilities, is masked too.
    """

    pairs: Pairs

    def __init__(self, s: RowShape, scale: Expr, cap: Expr, kept: Expr = None) -> None:
        """kept: what dropout multiplies the probabilities by that it leaves."""
        self._kind, self._dtype, self._score, self._kept = PTX_TYPE[s.dtype], s.dtype, s.score, kept
        self.count = s.n // 2
        self.words = s.n // 4
        self.s, self.dp = registers("scores", self.count), registers("dp", self.count)
        self.ds = registers("ds", self.words, "uint32")
        self.lse, self.delta = registers("row_lse", 2), registers("row_delta", 2)
        self._natural = cap if s.softcap else scale
        self._unit = let("unit", self._natural * T.float32(LOG2E))
        self._twice = let("twice", scale / cap * T.float32(2 * LOG2E)) if s.softcap else None
        self._learning, self._slopes_learn = bool(s.learning), s.learning.has(Alibi)
        if s.softcap and self._learning:
            self._slopes, self._pair = registers("slopes", self.words, "uint32"), registers("slope", 2)

    def read_rows(self, statistics: Sequence[Expr]) -> None:
        """Remember LSE and delta of the two rows: (LSE, LSE, delta, delta)."""
        for r in range(2):
            store(self.lse, r, statistics[r])
            store(self.delta, r, statistics[2 + r])

    def probabilities(self) -> None:
        """s = exp(score - LSE), times the slope of a softcap."""
        for i in range(self.count):
            lse = self.lse[i // 2 % 2]
            if self._score.biases:
                self._biased(i, lse)
                continue
            if self._twice is None:
                store(self.s, i, T.exp2(self.s[i] * self._unit - lse))
                continue
            store(self.s, i, capped(self.s[i] * self._twice))
            slope = T.float32(1.0) - self.s[i] * self.s[i]
            store(self.s, i, T.exp2(self.s[i] * self._unit - lse) * slope)

    def _biased(self, i: int, lse: Expr) -> None:
        """s[i] = exp(score with its biases - LSE), times the slope of a softcap; which goes to slopes where biases
        learn."""
        if self._twice is not None:
            store(self.s, i, capped(self.s[i] * self._twice))
        slope = T.float32(1.0) - self.s[i] * self.s[i]
        if self._twice is not None and self._learning:
            store(self._pair, i % 2, slope)
            if i % 2:
                self._pack(self._slopes, i // 2, self._pair[0], self._pair[1])
        p = T.exp2(self.pairs.add(i, self.s[i] * self._natural) * T.float32(LOG2E) - lse)
        store(self.s, i, p if self._twice is None or self._learning else p * slope)

    def _pack(self, words: Expr, at: int, low: Expr, high: Expr) -> None:
        do(T.ptx[f"cvt.rn.{self._kind}x2.f32"](words[at], high, low))

    def gradients(self) -> None:
        """ds = s (dp - delta)."""
        for word in range(self.words):
            both = [self._gradient(i) for i in (2 * word, 2 * word + 1)]
            if self._learning and self._twice is not None:
                slopes = unpack(self._slopes[word], self._dtype)
                both = [one * slope for one, slope in zip(both, slopes, strict=True)]
            self._pack(self.ds, word, *both)

    def _gradient(self, i: int) -> Expr:
        dp = self.dp[i]
        if self._score.dropout:
            dp = self.pairs.kept(i, dp * self._kept)
        gradient = self.s[i] * (dp - self.delta[i // 2 % 2])
        if not self._learning:
            return gradient
        store(self.dp, i, gradient)
        return self.dp[i]

    def mask(self, bits: Expr) -> None:
        """0 where the register's bit is clear, whatever it was. bits: words of a thread."""
        mask_words(self.ds, self.words, bits)
        if self._learning:
            mask_values(self.dp, self.count, bits, masked=0.0)
            if self._slopes_learn:
                mask_values(self.s, self.count, bits, masked=0.0)


def mask_words(words: Expr, count: int, bits: Expr) -> None:
    """0 for both halves of a word whose bits are clear, two of ``bits`` each."""
    for word in range(count):
        bit = 2 * word
        low = _kept(bits[bit // 32], bit % 32, 0xFFFF)
        high = _kept(bits[bit // 32], bit % 32 + 1, 0xFFFF0000)
        store(words, word, T.bitwise_and(words[word], T.bitwise_or(low, high)))


def _kept(bits: Expr, bit: int, value: int) -> Expr:
    zero = T.uint32(0)
    return T.if_then_else(T.bitwise_and(bits, T.uint32(1 << bit)) != zero, T.uint32(value), zero)


class QuerySums:
    """A warpgroup's dQ of a tile, 64 queries by ``sum_width`` columns, on its way out as integers.

    A query's dQ times a power of two of its own, rounded: sums of integers do not depend on their order.
    """

    def __init__(self, s: Shape, statistics: Expr, me: Expr, warp: Expr, lane: Expr) -> None:
        self._s, self._statistics = s, statistics
        self.count = s.sum_width // 2
        self.dq = registers("dq", self.count)
        self._scale, self._next = registers("row_scale", 2), registers("next_scale", 2)
        self._row = let("sum_row", warp * 16 + lane // 4)
        self._query = let("sum_query", self._row + me * WARPGROUP_ROWS) if s.halves_queries else self._row
        # Two rows of a half-warp must not meet in a bank: of every four column groups, odd rows begin with the third.
        self._odd = let("odd_row", T.EQ(lane // 4 % 2, 1))
        group, pair = lane // 4, lane % 4
        swizzle = T.bitwise_xor(T.bitwise_xor(pair // 2, group), group % 2 * 4)
        self._swizzle = let("sum_swizzle", swizzle)
        self._base = let("sum_base", me * (s.sum_bytes // 4) + self._row * SUM_CHUNK + pair % 2 * 2)

    def read_scale(self, stage: Expr) -> None:
        """Remember the scale of the queries in a stage: their dQ comes later, when the stage is gone."""
        for r in range(2):
            at = (stage * self._s.n + self._query + 8 * r) * STATISTICS + SCALE_IN
            store(self._next, r, self._statistics[at])

    def next_scale(self) -> None:
        """What was read last holds for what is staged next."""
        for r in range(2):
            store(self._scale, r, self._next[r])

    def stage(self, target: Expr) -> None:
        """Write dq, scaled and rounded: rows of 32 columns, swizzled."""
        pair = registers("sum_pair", 2, "int32")
        swizzle, base = hidden(self._swizzle, "int32"), hidden(self._base, "int32")
        for i in range(self.count // 4):
            partner = i ^ 2  # column group, in the same chunk
            for r in range(2):
                for c in range(2):
                    at = 2 * r + c
                    value = T.Select(self._odd, self.dq[4 * partner + at], self.dq[4 * i + at])
                    do(T.ptx["cvt.rni.s32.f32"](pair[c], value * self._scale[r]))
                column4 = T.bitwise_xor(swizzle, i % 4 * 2)
                rows = i // 4 * (WARPGROUP_ROWS * SUM_CHUNK) + 8 * r * SUM_CHUNK
                do(T.ptx["st.shared.v2.s32"](target.ptr_to([base + rows + column4 * 4]), pair[0], pair[1]))
