"""2:4 selection among rounded scores of 16 bits, two rows in each instruction, exact: ties go to the lower key.

A thread has whole groups of keys (prune.py: the map of K does it): score registers 4b + 2r + e and n/4 + 4b + 2r + e
are keys 16b + 4q + e and 16b + 4q + 2 + e of row r. Word i of a group holds key i of both rows. Six comparisons of all
pairs are masks; a key is kept if two of its three comparisons are won. The kept two come out in the order of keys, and
their code in all nibbles of a half, so that a word of metadata is put together by masks alone.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from tvm.script import tirx as T

from splatc.codegen.constants import NEG_INF
from splatc.codegen.hopper.emit import Expr, do, registers, store
from splatc.codegen.hopper.products import PTX_TYPE
from splatc.codegen.hopper.prune import EXCHANGE, FINISH, WORD_KEYS, exchange_choices

BLOCK_KEYS = 16  # that a quad has of a row: a group a lane
_PAIRS = {"a": (0, 1), "b": (0, 2), "c": (0, 3), "d": (1, 2), "e": (1, 3), "f": (2, 3)}


def select_source(kind: str) -> tuple[str, str]:
    """(name, source) of the selection in two groups: kept0, kept1: a pair of values of each; code: of both."""
    compare = "".join(
        f'  asm("set.ge.u32.{kind}x2 %0, %1, %2;" : "=r"({to}) : "r"(x{i}), "r"(x{j}));\n'
        for to, (i, j) in _PAIRS.items()
    )
    name = f"splatc_select_{kind}"
    return name, (
        f"__forceinline__ __device__ void {name}(uint32_t x0, uint32_t x1, uint32_t x2, uint32_t x3, "
        "uint32_t& kept0, uint32_t& kept1, uint32_t& code) {\n"
        f"  uint32_t a, b, c, d, e, f;  // x_i >= x_j\n{compare}"
        "  uint32_t k0 = (a & b) | (a & c) | (b & c), k1 = (~a & d) | (~a & e) | (d & e);\n"
        "  uint32_t k2 = (~b & ~d) | (~b & f) | (~d & f), k3 = (~c & ~e) | (~c & ~f) | (~e & ~f);\n"
        "  uint32_t low = (k0 & x0) | (~k0 & ((k1 & x1) | (~k1 & x2)));\n"
        "  uint32_t high = (k3 & x3) | (~k3 & ((k2 & x2) | (~k2 & x1)));\n"
        "  kept0 = __byte_perm(low, high, 0x5410);\n"
        "  kept1 = __byte_perm(low, high, 0x7632);\n"
        "  uint32_t first = ~k0 & ~(k1 ^ 0x55555555u), second = k3 | (k2 ^ 0x55555555u);\n"
        "  code = (first & 0x33333333u) | (second & 0xCCCCCCCCu);\n}\n"
    )


ENCODE = (
    "splatc_encode_blocks",
    "__forceinline__ __device__ void splatc_encode_blocks(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, "
    "uint32_t keep, uint32_t turn, uint32_t& own, uint32_t& other) {\n"
    "  uint32_t low = (c0 & 0x0F0F0F0Fu) | (c1 & 0xF0F0F0F0u), high = (c2 & 0x0F0F0F0Fu) | (c3 & 0xF0F0F0F0u);\n"
    f"  own = (low & 0x00FF00FFu) | (high & 0xFF00FF00u);\n{EXCHANGE}}}\n",
)


class Selection:
    """Of a tile of n keys, from its n/2 score registers a thread.

    kept: uint32 words of two values; word 2b + r is of block b, row r. words: metadata, one for each 64 keys.
    """

    def __init__(self, n: int, dtype: str, lane: Expr) -> None:
        self._n, self._blocks, self._kind = n, n // BLOCK_KEYS, PTX_TYPE[dtype]
        self._lane = lane
        self._exchange = exchange_choices(lane)
        self.kept = registers("kept", 2 * self._blocks, "uint32")
        self.words = registers("metadata", n // WORD_KEYS, "uint32")
        self._codes = registers("codes", self._blocks, "uint32")
        self._keys = registers("keys", 4, "uint32")
        self._own, self._other = (registers(name, 1, "uint32") for name in ("own_codes", "other_codes"))

    def mask(self, s: Expr, count: Expr) -> None:
        """-inf for the tile's keys from ``count`` on."""
        of_lane = count - 4 * (self._lane % 4)
        for i in range(self._n // 2):
            half, in_half = divmod(i, self._n // 4)
            key = BLOCK_KEYS * (in_half // 4) + 2 * half + i % 2
            store(s, i, T.if_then_else(of_lane > key, s[i], T.float32(NEG_INF)))

    def select(self, s: Expr, scale: Expr) -> None:
        """The kept of s * scale, rounded."""
        name, source = select_source(self._kind)
        keys = [self._keys[i] for i in range(4)]
        for b in range(self._blocks):
            for i, key in enumerate(keys):
                first = i // 2 * (self._n // 4) + 4 * b + i % 2
                do(T.ptx[f"cvt.rn.{self._kind}x2.f32"](key, s[first + 2] * scale, s[first] * scale))
            do(T.cuda.func_call(name, *keys, self.kept[2 * b], self.kept[2 * b + 1], self._codes[b],
                                source_code=source))  # fmt: skip

    def encode(self) -> None:
        """The metadata words."""
        keep, turn, pick = self._exchange
        for w in range(self._n // WORD_KEYS):
            codes = [self._codes[4 * w + b] for b in range(4)]
            do(T.cuda.func_call(ENCODE[0], *codes, keep, turn, self._own[0], self._other[0], source_code=ENCODE[1]))
            do(T.cuda.func_call(FINISH[0], self._own[0], self._other[0], pick, self.words[w], source_code=FINISH[1]))
