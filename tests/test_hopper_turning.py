"""V for products in tf32: where loads put it, where the producer's warps write it, where wgmma reads it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from splatc.codegen.constants import ceil_div

pytest.importorskip("tvm")
from splatc.codegen.hopper.products import along_row, score_of  # noqa: E402
from splatc.codegen.hopper.turning import (  # noqa: E402
    CHUNK,
    SQUARES,
    UNIT,
    key_of,
    square_of,
    staged_at,
    turned_at,
)

LANES = np.arange(32)


def swizzled(address: np.ndarray) -> np.ndarray:
    """Byte addresses under a 128-byte swizzle: bits 4 to 6 are exchanged by bits 7 to 9."""
    return np.asarray(address ^ (address >> 7 & 7) << 4)


def staged_chunk(values: np.ndarray) -> np.ndarray:
    """What a tensor map with 128-byte swizzle writes of (keys, 32) values."""
    memory = np.zeros(values.size, values.dtype)
    key, column = np.indices(values.shape)
    memory[swizzled(key * 128 + column * 4) // 4] = values
    return memory


def turned(values: np.ndarray) -> np.ndarray:
    """V^T in memory, of (keys, columns) values: the steps of Turner, all lanes and turns."""
    n, dv = values.shape
    chunks = ceil_div(dv, CHUNK)
    padded = np.zeros((n, chunks * CHUNK), values.dtype)
    padded[:, :dv] = values
    memory = np.full(n * chunks * CHUNK, -1, values.dtype)
    for c, turn in itertools.product(range(chunks), range(n // CHUNK * SQUARES)):
        staged = staged_chunk(padded[:, c * CHUNK : (c + 1) * CHUNK])
        keys = turn // SQUARES
        slots, columns = square_of(LANES, turn % SQUARES)
        read = [keys * CHUNK * CHUNK + staged_at(slots, columns, i) for i in range(UNIT)]
        square = np.stack([staged[at[:, None] + np.arange(UNIT)] for at in read], axis=2)  # (lane, column, slot)
        written = keys * chunks * CHUNK * CHUNK + c * CHUNK * CHUNK
        for j in range(UNIT):
            memory[written + turned_at(slots, columns, j)[:, None] + np.arange(UNIT)] = square[:, j]
    return memory


@pytest.mark.parametrize(("n", "dv"), [(32, 8), (32, 256), (64, 40), (64, 128), (128, 64)])
def test_products_read_every_value_where_it_is(n: int, dv: int) -> None:
    """B of the kk-th wgmma, K-major: slot c and column j lie in row j, byte 4 c of the 32 at its offset."""
    values = np.arange(1, n * dv + 1).reshape(n, dv)
    memory = turned(values)
    slot, column = np.meshgrid(np.arange(8), np.arange(dv), indexing="ij")
    for kk in range(n // 8):
        start = along_row(kk, ceil_div(dv, CHUNK) * CHUNK) * 16
        at = start + column // 8 * 1024 + column % 8 * 128 + slot * 4
        assert np.array_equal(memory[swizzled(at) // 4], values[key_of(8 * kk + slot), column])


def test_probabilities_meet_their_values() -> None:
    """A of wgmma in tf32, from the registers that hold scores: the product is P V."""
    rng = np.random.default_rng(0)
    n, p, v = 64, rng.standard_normal((64, 64)), rng.standard_normal((64, 8))
    warp, lane = np.divmod(np.arange(128), 32)
    row, q = warp * 16 + lane // 4, lane % 4
    registers = np.empty((128, n // 2))
    for i, r, c in itertools.product(range(n // 8), range(2), range(2)):
        registers[:, 4 * i + 2 * r + c] = p[row + 8 * r, 8 * i + 2 * q + c]
    a = np.empty_like(p)  # rows x slots
    for kk, r, c in itertools.product(range(n // 8), range(2), range(2)):
        a[row + 8 * r, 8 * kk + 4 * c + q] = registers[:, score_of(4 * kk + 2 * c + r)]
    assert np.allclose(a @ v[key_of(np.arange(n))], p @ v)


def test_eight_lanes_meet_all_banks() -> None:
    """16 bytes a lane: eight lanes at a time go through if no two of them are at the same 16 bytes of 128."""
    for turn, i in itertools.product(range(SQUARES), range(UNIT)):
        slots, columns = square_of(LANES, turn)
        for at in (staged_at(slots, columns, i), turned_at(slots, columns, i)):
            assert (np.sort((at // UNIT % 8).reshape(4, 8), axis=1) == np.arange(8)).all()


def test_every_square_has_its_turn() -> None:
    seen = {(int(a), int(b)) for turn in range(SQUARES) for a, b in zip(*square_of(LANES, turn))}
    assert seen == set(itertools.product(range(8), repeat=2))
