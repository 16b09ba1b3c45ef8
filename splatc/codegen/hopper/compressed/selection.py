"""Selection among score registers, exact: by fp32 scores, ties to the lower key; kept pairs in the order of keys.

A thread has whole groups of keys (prune.py: the map of K does it): score registers 4b + 2r + e and n/4 + 4b + 2r + e
are keys 16b + 4q + e and 16b + 4q + 2 + e of row r.

2:4: both of the first two keys stay if the smaller is no less than both others; both of the last two if the smaller is
greater than both others; else the larger of each pair does. 1:2: the larger of each pair, as in the fused kernel.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from tvm.script import tirx as T

from splatc.codegen.constants import NEG_INF
from splatc.codegen.hopper.emit import Expr, call_source, do, registers, store
from splatc.codegen.hopper.products import PTX_TYPE
from splatc.codegen.hopper.prune import (
    BLOCK_KEYS,
    EXCHANGED,
    FINISH,
    LOWER_KEYS,
    SELECT_PAIRS,
    WORD_BLOCKS,
    WORD_KEYS,
    exchange_choices,
    group_of,
)
from splatc.patterns.pruned import ONE_OF_TWO, TWO_OF_FOUR, Pruning

SELECT_FOUR = (
    "splatc_select",
    "__forceinline__ __device__ void splatc_select(float x0, float x1, float x2, float x3, uint32_t shift, "
    "float& low, float& high, uint32_t& own) {\n"
    "  float high01 = fmaxf(x0, x1), low01 = fminf(x0, x1), high23 = fmaxf(x2, x3), low23 = fminf(x2, x3);\n"
    "  bool first = low01 >= high23, last = low23 > high01;\n"
    "  low = first ? x0 : last ? x2 : high01;\n"
    "  high = first ? x1 : last ? x3 : high23;\n"
    "  uint32_t each = (x0 >= x1 ? 8u : 9u) | (x2 >= x3 ? 0u : 4u);\n"
    "  own |= (first ? 4u : last ? 14u : each) << shift;\n}\n",
)
SELECT = {TWO_OF_FOUR: (SELECT_FOUR, 0), ONE_OF_TWO: (SELECT_PAIRS, LOWER_KEYS)}  # and codes to begin with


class Selection:
    """Of a tile of n keys, from its n/2 score registers a thread.

    kept: uint32 words of two values; word 2b + r is of block b, row r. words: metadata, one for each 64 keys.
    """

    def __init__(self, n: int, dtype: str, lane: Expr, pruning: Pruning) -> None:
        self._n, self._blocks, self._kind = n, n // BLOCK_KEYS, PTX_TYPE[dtype]
        self._select, self._no_codes = SELECT[pruning]
        self._lane = lane
        self._exchange = exchange_choices(lane)
        self.kept = registers("kept", 2 * self._blocks, "uint32")
        self.words = registers("metadata", n // WORD_KEYS, "uint32")
        self._pair = registers("kept_pair", 2)
        self._own, self._other = (registers(name, n // WORD_KEYS, "uint32") for name in ("own_codes", "other_codes"))

    def mask(self, s: Expr, count: Expr) -> None:
        """-inf for the tile's keys from ``count`` on."""
        of_lane = count - 4 * (self._lane % 4)
        for i in range(self._n // 2):
            half, in_half = divmod(i, self._n // 4)
            key = BLOCK_KEYS * (in_half // 4) + 2 * half + i % 2
            store(s, i, T.if_then_else(of_lane > key, s[i], T.float32(NEG_INF)))

    def select(self, s: Expr, scale: Expr) -> None:
        """The kept scores, times the scale, which is positive, and rounded; and their codes."""
        for w in range(self._n // WORD_KEYS):
            store(self._own, w, T.uint32(self._no_codes))
        for b in range(self._blocks):
            w, in_word = divmod(b, WORD_BLOCKS)
            for r in range(2):
                shift = T.uint32(4 * in_word + 16 * r)
                keys = group_of(s, self._n // 2, b, r)
                call_source(self._select, *keys, shift, self._pair[0], self._pair[1], self._own[w])
                low, high = (self._pair[i] * scale for i in range(2))
                do(T.ptx[f"cvt.rn.{self._kind}x2.f32"](self.kept[2 * b + r], high, low))

    def encode(self) -> None:
        """The metadata words."""
        keep, turn, pick = self._exchange
        for w in range(self._n // WORD_KEYS):
            call_source(EXCHANGED, keep, turn, self._own[w], self._other[w])
            call_source(FINISH, self._own[w], self._other[w], pick, self.words[w])
