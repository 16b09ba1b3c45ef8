"""2:4 and 1:2 pruning of score registers: of four keys two are kept, in place, and metadata says which.

A tile of K lies in shared memory so that a thread has whole groups of keys: row h n/2 + 2c + e of it is key
4c + 2h + e (``slot_keys`` of shape.py; the tensor map does it, runtime/tensor_map.py). Then score registers 4b + 2r + e
and n/4 + 4b + 2r + e of lane q of a quad are keys 16b + 4q + e and 16b + 4q + 2 + e of row r: group 4b + q. The kept
two go to the first of these pairs: compressed scores look like those of a tile of n/2 keys, to the softmax and as
operand A of a sparse product.

2:4 (Tagged): v0 = max(x0, x1, min(x2, x3)) and v1 = max(x2, x3, min(x0, x1)) are the largest two. Where they were
travels in their own last bits: key i carries the tag 3 - i, at bits 0-1 in even blocks of 16 keys, at bits 4-5 in odd
ones. So scores count to 2^-21 or 2^-17 of their size, and what is equal up to there goes by position: the lower key
wins from +0 on, the higher one below.

1:2 (OneOfTwo): v0 = max(x0, x1) and v1 = max(x2, x3), exactly, and a comparison of each pair is its code. That is 2:4
with one of each pair, so all but the selection is the same.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Protocol

from tvm.script import tirx as T

from splatc.codegen.constants import NEG_INF
from splatc.codegen.hopper.emit import Expr, call_source, emit_if, registers, store
from splatc.codegen.hopper.products import fence, hidden
from splatc.patterns.pruned import ONE_OF_TWO, TWO_OF_FOUR, Pruning

MASKED = -1e30  # a score that is not in the mask, until the kept two are known: -inf would make NaN with a tag
BLOCK_KEYS = 16  # that a quad has of a row: a group of four a lane
WORD_KEYS = 64  # keys of a quad's metadata words, a word a lane
WORD_BLOCKS = WORD_KEYS // BLOCK_KEYS

TAG = 'asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"({to}) : "r"(__float_as_uint({x})), "n"({rest}), "r"({tag}));'
LARGEST = """  float high01, low01, high23, low23;  // not .ftz: tags of zeros are denormals
  asm("max.f32 %0, %1, %2;" : "=f"(high01) : "f"(__uint_as_float(a)), "f"(__uint_as_float(b)));
  asm("min.f32 %0, %1, %2;" : "=f"(low01) : "f"(__uint_as_float(a)), "f"(__uint_as_float(b)));
  asm("max.f32 %0, %1, %2;" : "=f"(high23) : "f"(__uint_as_float(c)), "f"(__uint_as_float(d)));
  asm("min.f32 %0, %1, %2;" : "=f"(low23) : "f"(__uint_as_float(c)), "f"(__uint_as_float(d)));
  asm("max.f32 %0, %1, %2;" : "=f"(x0) : "f"(high01), "f"(low23));
  asm("max.f32 %0, %1, %2;" : "=f"(x1) : "f"(high23), "f"(low01));
"""
LOWER_KEYS = 0x88888888  # codes that say the lower key of every pair
# The larger of each of two pairs; their code is at bit ``shift`` of own, which begins as LOWER_KEYS. NaN stays.
PAIR = (
    '  asm("{{ .reg .pred upper; setp.lt.f32 upper, %1, %2; @upper or.b32 %0, %0, %3; }}" '
    ': "+r"(own) : "f"({x}), "f"({y}), "r"({bit}u << shift));\n'
    '  asm("max.NaN.f32 %0, %1, %2;" : "=f"({larger}) : "f"({x}), "f"({y}));\n'
)
SELECT_PAIRS = (
    "splatc_select_pairs",
    "__forceinline__ __device__ void splatc_select_pairs(float x0, float x1, float x2, float x3, uint32_t shift, "
    "float& low, float& high, uint32_t& own) {\n"
    f"{PAIR.format(x='x0', y='x1', bit=1, larger='low')}{PAIR.format(x='x2', y='x3', bit=4, larger='high')}}}\n",
)


def select_source(odd: bool) -> tuple[str, str]:
    """(name, source) of the selection in an even or odd block: x0, x1 = the kept two, tagged. one, two: the tags 1 and
    2 in registers, as then an instruction a score is enough."""
    name, bits = f"splatc_select_{'odd' if odd else 'even'}", 3 << 4 * odd
    rest = f"0x{~bits & 0xFFFFFFFF:X}u"
    return name, (
        f"__forceinline__ __device__ void {name}(float& x0, float& x1, float x2, float x3, uint32_t one, "
        "uint32_t two) {\n"
        f"  uint32_t a = __float_as_uint(x0) | 0x{bits:X}u, b, c, d = __float_as_uint(x3) & {rest};\n"
        f"  {TAG.format(to='b', x='x1', rest=rest, tag='two')}\n"
        f"  {TAG.format(to='c', x='x2', rest=rest, tag='one')}\n{LARGEST}}}\n"
    )


def encode_source() -> str:
    """The source of splatc_encode: a lane's codes of four blocks, after the first of two exchanges with its quad.

    k{r}{b}{c}: kept score c of row r, block b. own: nibble 4r + b is the code of block b, with those of lane ^ 1 where
    ``keep`` is 0; other: the word of lane ^ 2.
    """
    kept = ", ".join(f"float k{r}{b}{c}" for r in range(2) for b in range(4) for c in range(2))
    lines = []
    for c in range(2):
        for r in range(2):
            for half in range(2):
                even, odd = (f"__float_as_uint(k{r}{2 * half + i}{c})" for i in range(2))
                lines.append(f"  uint32_t w{r}{half}{c} = ({even} & 0x0Fu) | ({odd} & ~0x0Fu);")
        row = [f"__byte_perm(w{r}0{c}, w{r}1{c}, 0x0040)" for r in range(2)]
        lines.append(f"  uint32_t tags{c} = __byte_perm({row[0]}, {row[1]}, 0x5410);")
    gather = "\n".join(lines)
    return (
        f"__forceinline__ __device__ void splatc_encode({kept}, uint32_t keep, uint32_t turn, uint32_t& own, "
        f"uint32_t& other) {{\n{gather}\n"
        f"  own = (~tags0 & 0x33333333u) | (~(tags1 << 2) & 0xCCCCCCCCu);\n{EXCHANGE}}}\n"
    )


# Of a lane's word of codes, nibble 4r + b of which is block b's: the first of two exchanges with its quad.
EXCHANGE = (
    "  uint32_t theirs = __shfl_xor_sync(0xFFFFFFFFu, own, 1);\n"
    "  theirs = __funnelshift_l(theirs, theirs, turn);\n"
    "  own = (own & keep) | (theirs & ~keep);\n"
    "  other = __shfl_xor_sync(0xFFFFFFFFu, own, 2);\n"
)
EXCHANGED = (
    "splatc_exchange_codes",
    "__forceinline__ __device__ void splatc_exchange_codes(uint32_t keep, uint32_t turn, uint32_t& own, "
    f"uint32_t& other) {{\n{EXCHANGE}}}\n",
)
# Opaque, or ptxas gives the result the registers that the product in flight still reads (C7513: all is serialised).
FINISH = (
    "splatc_finish_word",
    "__forceinline__ __device__ void splatc_finish_word(uint32_t own, uint32_t other, uint32_t pick, uint32_t& word) "
    '{ asm volatile("prmt.b32 %0, %1, %2, %3;" : "=r"(word) : "r"(own), "r"(other), "r"(pick)); }\n',
)


def exchange_choices(lane: Expr) -> tuple[Expr, ...]:
    """keep, turn and pick of a lane: what it does in the exchanges (EXCHANGE, FINISH)."""
    odd, upper = T.bitwise_and(lane, 1) != 0, T.bitwise_and(lane, 2) != 0
    choices = ((odd, 0xF0F0F0F0, 0x0F0F0F0F), (odd, 28, 4), (upper, 0x3715, 0x6240))
    return tuple(hidden(T.Select(which, T.uint32(yes), T.uint32(no)), "uint32") for which, yes, no in choices)


class Selection(Protocol):
    """How the kept half of a thread's score registers is found. masked: the score of a key that is not in the mask."""

    masked: float

    def __init__(self, n: int) -> None:
        """For tiles of n keys."""

    def select(self, s: Expr, own: Expr) -> None:
        """The kept scores to the first half of the registers, and maybe their codes to own (``encode_source``)."""

    def encode(self, s: Expr, w: int, own: Expr, other: Expr, keep: Expr, turn: Expr) -> None:
        """own[w] and other[w]: a lane's codes of 64 keys, after the first exchange with its quad."""


class Tagged:
    """2:4: where a kept score was travels in its last bits."""

    masked = MASKED

    def __init__(self, n: int) -> None:
        self._count, self._blocks = n // 2, n // BLOCK_KEYS
        self._tags = [[hidden(T.uint32(tag << 4 * odd), "uint32") for tag in (1, 2)] for odd in range(2)]

    def select(self, s: Expr, own: Expr) -> None:
        for b in range(self._blocks):
            function = select_source(b % 2 == 1)
            for r in range(2):
                x = group_of(s, self._count, b, r)
                call_source(function, *x, *self._tags[b % 2])

    def encode(self, s: Expr, w: int, own: Expr, other: Expr, keep: Expr, turn: Expr) -> None:
        kept = [s[4 * (4 * w + b) + 2 * r + c] for r in range(2) for b in range(4) for c in range(2)]
        call_source(("splatc_encode", encode_source()), *kept, keep, turn, own[w], other[w])


class OneOfTwo:
    """1:2: a comparison a pair."""

    masked = NEG_INF

    def __init__(self, n: int) -> None:
        self._count, self._blocks = n // 2, n // BLOCK_KEYS

    def select(self, s: Expr, own: Expr) -> None:
        for w in range(self._blocks // WORD_BLOCKS):
            store(own, w, T.uint32(LOWER_KEYS))
        for b in range(self._blocks):
            w, in_word = divmod(b, WORD_BLOCKS)
            for r in range(2):
                x = group_of(s, self._count, b, r)
                call_source(SELECT_PAIRS, *x, T.uint32(4 * in_word + 16 * r), x[0], x[1], own[w])

    def encode(self, s: Expr, w: int, own: Expr, other: Expr, keep: Expr, turn: Expr) -> None:
        call_source(EXCHANGED, keep, turn, own[w], other[w])


SELECTIONS: dict[Pruning, type[Selection]] = {TWO_OF_FOUR: Tagged, ONE_OF_TWO: OneOfTwo}


class Pruner:
    """Prunes the n/2 score registers that a thread has of a tile of n keys."""

    def __init__(self, n: int, lane: Expr, pruning: Pruning) -> None:
        self._count, self._words = n // 2, n // WORD_KEYS
        self._own, self._other = (registers(name, self._words, "uint32") for name in ("codes", "other_codes"))
        self._selection = SELECTIONS[pruning](n)
        self.masked = self._selection.masked
        self._keep, self._turn, self._pick = exchange_choices(lane)

    def prune(self, s: Expr, masked: Expr | bool) -> None:
        """The kept scores to the first half of the registers, and a start of their metadata. masked: whether some
        are not in the mask (``self.masked``); they become -inf."""
        self._selection.select(s, self._own)
        for w in range(self._words):
            self._selection.encode(s, w, self._own, self._other, self._keep, self._turn)
        if self.masked != NEG_INF:
            emit_if(masked, lambda: self._unmask(s))

    def finish(self, words: Expr) -> None:
        """The metadata words; no product that reads ``words`` may be in flight."""
        for one in (self._own, self._other):
            fence(one, self._words)
        for w in range(self._words):
            call_source(FINISH, self._own[w], self._other[w], self._pick, words[w])

    def _unmask(self, s: Expr) -> None:
        """-inf where less than two of a group's keys are in the mask."""
        for i in range(self._count // 2):
            absent = s[i] < T.float32(self.masked / 2)
            store(s, i, T.if_then_else(absent, T.float32(NEG_INF), s[i]))


def group_of(s: Expr, count: int, b: int, r: int) -> list[Expr]:
    """The registers of a thread's four keys of block b and row r, of ``count`` score registers."""
    first = 4 * b + 2 * r
    return [s[first + i % 2 + i // 2 * (count // 2)] for i in range(4)]
