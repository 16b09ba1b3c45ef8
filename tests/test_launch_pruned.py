"""Launching the Hopper kernel that prunes scores, without a GPU: maps, bits and padding by the NumPy twin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from splatc import patterns as P
from splatc.codegen.hopper.shape import slot_keys
from splatc.ir.score import Score
from splatc.patterns.pruned import RATIOS
from splatc.runtime.tensor_map import Layout, geometry, grouped
from tests.fake_gpu import TensorMap
from tests.fake_gpu import check as check_within
from tests.test_launch_hopper import D, Machine, draw

torch = pytest.importorskip("torch")
NM, NM12 = (Score(pruning=pruning) for pruning in RATIOS)


def check(got: Any, qkv: Any, dense: np.ndarray, score: Score = NM) -> None:
    check_within(got, qkv, dense, None, (2e-3, 1e-3), score.pruning)


@pytest.mark.parametrize(
    ("pattern", "lengths", "m", "n"),
    [
        (P.full(), (70, 132), 128, 128), (P.causal(), (150, 150), 128, 64),
        (P.causal(), (129, 129), 192, 128), (P.window(30, 10), (100, 101), 64, 64), (P.full(), (1, 1), 64, 64),
        (P.full(), (17, 3), 64, 64), (P.longformer(20, 8), (130, 130), 64, 64),
        (P.window(5, 5) & ~P.window(9, 9), (70, 70), 64, 64),  # nothing at all
    ],
)  # fmt: skip
def test_what_the_kernel_sees(pattern: Any, lengths: tuple[int, int], m: int, n: int, tmp_path: Path) -> None:
    attend = Machine(tmp_path, pattern, m=m, n=n, score=NM)
    qkv = draw(*lengths, heads=2, kv_heads=1)
    check(attend(*qkv), qkv, pattern.dense(*lengths))


@pytest.mark.parametrize(
    ("pattern", "lengths", "n"),
    [
        (P.causal(), (150, 150), 64), (P.window(30, 10), (100, 101), 64), (P.full(), (17, 3), 64),
        (P.window(45, 0) & P.fixed(9, 2), (130, 130), 128),
    ],
)  # fmt: skip
def test_one_of_two(pattern: Any, lengths: tuple[int, int], n: int, tmp_path: Path) -> None:
    """Keys are read in groups of four all the same."""
    attend, qkv = Machine(tmp_path, pattern, n=n, score=NM12), draw(*lengths, heads=2, kv_heads=1)
    check(attend(*qkv), qkv, pattern.dense(*lengths), NM12)


@pytest.mark.parametrize("length", [128, 130])
def test_layouts_and_strides(length: int, tmp_path: Path) -> None:
    attend = Machine(tmp_path / "bhsd", P.causal(), score=NM)
    qkv = draw(length, heads=3, batch=2)
    wanted = attend(*qkv)[0]
    moved = [x.transpose(1, 2).contiguous() for x in qkv]
    o = Machine(tmp_path / "bshd", P.causal(), layout="bshd", score=NM)(*moved)[0]
    assert torch.equal(o.transpose(1, 2), wanted)
    for tensors in ([x.transpose(1, 2) for x in moved], [torch.cat([x, x], 3)[..., :D] for x in qkv]):
        assert torch.equal(attend(*tensors)[0], wanted)
    q, k, v = qkv
    expanded = [q, k[:, :1].expand(2, 3, length, D), v[:, :1].expand(2, 3, length, D)]
    check(attend(*expanded), expanded, P.causal().dense(length))
    assert torch.equal(attend(q, k, v, scale=-0.25)[0], attend(-q, k, v, scale=0.25)[0])


@pytest.mark.parametrize("n", [64, 128])
def test_a_tile_of_keys_in_shared_memory(n: int) -> None:
    """Row by row it is what the plain map loads, in the order of slots; beyond the end there are zeros."""
    layout = Layout(2, 3, 148, 8, 3 * 148 * 8, 148 * 8, 8, 2)
    memory = np.arange(1, 2 * 3 * 148 * 8 + 1).astype(np.uint16)
    view = (148, 1, 1, 1, 148, 148)
    plain, slots = (
        TensorMap("float16", memory.ctypes.data, one.dims, one.strides, one.box)
        for one in (geometry(view, (n, 1, 1), layout), grouped(view, (n, 1, 1), layout))
    )
    for first in (0, 20, 64, 128):
        for last in range(6):
            rows = plain.load((0, first, 0, 0, last))
            assert np.array_equal(slots.load((0, 0, first // 4, 0, last)), rows[slot_keys(n)])
            assert rows[: 148 - first, :8].all()
