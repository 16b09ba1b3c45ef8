"""Scores pruned to N:M, and their compressed form: what sparse tensor cores read.

Values are the kept ones of each group of M keys, in the order of keys: kv_len N / M of them a row. Metadata says where
they were, a nibble for each group of 64 bits of dense values, the first in the lowest bits of a 16-bit word:

    values of         group       nibble                                             a word covers
    16 bits, 2:4      4 keys      i0 | i1 << 2, i0 < i1: 4, 8, 12, 9, 13 or 14       16 keys
    16 bits, 1:2      2 x 2 keys  the same, one of each pair: 8, 12, 9 or 13         16 keys
    32 bits, 1:2      2 keys      4 for the first, 14 for the second                 8 keys

(A 32-bit value counts as two of 16 bits. Words have room for whole words' keys: the last may be beyond kv_len.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from splatc.errors import InvalidInput
from splatc.patterns.pruned import ONE_OF_TWO, TWO_OF_FOUR, Pruning

Floats = NDArray[Any]
Bools = NDArray[np.bool_]
LANE_CODES = np.array([4, 14])  # of 1:2 in 32 bits
WORD_GROUPS = 4  # nibbles in a word
# Words in the order of registers: tiles of 64 rows and 128 keys, of two times 64 keys a word for each of 128 threads.
TILE_ROWS, TILE_KEYS, TILE_WORDS = 64, 128, 256
_FREE = {TWO_OF_FOUR: 0x4444, ONE_OF_TWO: 0x8888}  # the word of keys that do not exist: the lowest ones stay


def select(scores: Floats, pruning: Pruning) -> Bools:
    """The n entries of each group of m along the last axis that ``Pruning`` keeps, exactly n in each; the axis must be
    a multiple of m. Entries of -inf come last, the lowest position first, like all that are equal."""
    groups = scores.reshape(*scores.shape[:-1], scores.shape[-1] // pruning.m, pruning.m)
    order = np.argsort(-np.where(np.isnan(groups), np.inf, groups), axis=-1, kind="stable")
    out = np.zeros(groups.shape, np.bool_)
    np.put_along_axis(out, order[..., : pruning.n], True, axis=-1)
    return out.reshape(scores.shape)


def prune(scores: Floats, pruning: Pruning) -> Floats:
    """Scores (..., kv_len) with -inf where they are pruned, and where they are -inf (keys that are not in the mask)."""
    kept = select(_padded(scores, pruning.m, -np.inf), pruning)[..., : scores.shape[-1]]
    return np.where(kept, scores, -np.inf)


@dataclass(frozen=True, eq=False)
class Compressed:
    """N:M values (..., keys n / m) of ``encode`` and their metadata, uint16 (..., words): keys are kv_len,
    rounded up to whole words. bits: of the values' type on the device, 16 or 32."""

    values: Floats
    words: NDArray[np.uint16]
    kv_len: int
    pruning: Pruning
    bits: int


def encode(scores: Floats, pruning: Pruning, bits: int = 16) -> Compressed:
    """Scores (..., kv_len), -inf for keys that are not in the mask, pruned and compressed.

    bits: 16 (float16, bfloat16; 2:4 or 1:2) or 32 (tf32: 1:2 only). A group with fewer than n keys of the mask has -inf
    for the others, at the lowest positions that are free. Raises InvalidInput for what the hardware does not have.
    """
    check_ratio(pruning, bits)
    dense = _padded(np.asarray(scores), keys_of_a_word(bits), -np.inf)
    kept = select(dense, pruning)
    rows, count = dense.shape[:-1], dense.shape[-1] // (4 if bits == 16 else 2)  # nibbles of a row
    values = dense[kept].reshape(*rows, dense.shape[-1] // pruning.m * pruning.n)
    at = np.nonzero(kept.reshape(*rows, count, dense.shape[-1] // max(count, 1)))[-1]  # positions in nibbles' keys
    if bits == 16:
        pairs = at.reshape(*rows, count, 2)
        nibbles = pairs[..., 0] | pairs[..., 1] << 2
    else:
        nibbles = LANE_CODES[at].reshape(*rows, count)
    shifts = 4 * np.arange(WORD_GROUPS)
    words = (nibbles.reshape(*rows, count // WORD_GROUPS, WORD_GROUPS) << shifts).sum(-1).astype(np.uint16)
    return Compressed(values, words, scores.shape[-1], pruning, bits)


def decode(c: Compressed, fill: float = -np.inf) -> Floats:
    """The dense (..., kv_len) of what was compressed, ``fill`` where nothing is kept."""
    *rows, words = c.words.shape
    nibbles = (c.words[..., None] >> 4 * np.arange(WORD_GROUPS) & 15).astype(np.int64)
    nibbles = nibbles.reshape(*rows, WORD_GROUPS * words)
    if c.bits == 16:
        group, at = 4, np.stack([nibbles & 3, nibbles >> 2], axis=-1)
    else:
        group, at = 2, nibbles[..., None] >> 3  # 4 -> 0, 14 -> 1
    out = np.full((*nibbles.shape, group), fill, c.values.dtype)
    np.put_along_axis(out, at, c.values.reshape(at.shape), axis=-1)
    return out.reshape(*rows, WORD_GROUPS * words * group)[..., : c.kv_len]


def to_registers(words: NDArray[np.uint16], pruning: Pruning = TWO_OF_FOUR) -> NDArray[np.uint32]:
    """Words (..., rows, n), 16 keys each, in the order in which sparse tensor cores take them from registers:
    (..., ceil(n / 8), ceil(rows / 64), 2, 128).

    Of 64 keys, thread 32 w + 4 g + b has block b of 16 keys: of row 16 w + g in the lower half, of 8 rows on in the
    upper one. Rows and keys beyond the end have the word 0x4444, of 1:2 0x8888.
    """
    *front, rows, count = words.shape
    row_tiles, key_tiles = -(-rows // TILE_ROWS), -(-count // (TILE_KEYS // 16))
    whole = np.full((*front, TILE_ROWS * row_tiles, TILE_KEYS // 16 * key_tiles), _FREE[pruning], np.uint32)
    whole[..., :rows, :count] = words
    parts = np.moveaxis(whole.reshape(*front, row_tiles, 4, 2, 8, key_tiles, 2, 4), -5, 0)
    low, high = np.moveaxis(parts, (-3, -6, -2, -5, -4, -1), range(-6, 0))
    joined: NDArray[np.uint32] = low | high << np.uint32(16)
    return joined.reshape(*front, key_tiles, row_tiles, 2, 128)


def from_registers(words: NDArray[Any], rows: int, count: int) -> NDArray[np.uint16]:
    """Words (..., rows, count) of ``to_registers``, given as 32-bit integers of any kind."""
    *front, key_tiles, row_tiles, _, _ = words.shape
    joined = words.astype(np.uint32).reshape(*front, key_tiles, row_tiles, 2, 4, 8, 4)
    halves = np.stack([joined & np.uint32(0xFFFF), joined >> np.uint32(16)])
    parts = np.moveaxis(halves, range(-6, 0), (-3, -6, -2, -5, -4, -1))
    whole = np.moveaxis(parts, 0, -5).reshape(*front, TILE_ROWS * row_tiles, TILE_KEYS // 16 * key_tiles)
    return whole[..., :rows, :count].astype(np.uint16)


def keys_of_a_word(bits: int) -> int:
    """Keys that 16 bits of metadata say all about."""
    return 256 // bits


def check_ratio(pruning: Pruning, bits: int) -> None:
    """Raise InvalidInput unless sparse tensor cores take this ratio for values of so many bits."""
    if bits not in (16, 32):
        raise InvalidInput(f"bits is {bits}: values have 16 or 32")
    if bits == 32 and pruning != ONE_OF_TWO:
        raise InvalidInput(f"{pruning} of 32-bit values: sparse tensor cores take nm(1, 2) only, or 16 bits")


def _padded(x: Floats, multiple: int, fill: float) -> Floats:
    """x with its last axis filled up to a multiple."""
    missing = -x.shape[-1] % multiple
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)], constant_values=fill) if missing else x
