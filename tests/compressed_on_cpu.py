"""The three kernels of compressed scores in NumPy: what they make of their parameters and tensor maps. float16."""

from __future__ import annotations

from typing import Any

import numpy as np

from splatc.codegen.hopper.shape import slot_keys
from splatc.codegen.kernel import (
    COMPRESSED_SDDMM,
    COMPRESSED_SOFTMAX,
    COMPRESSED_SPMM,
    SOFTMAX_LANES,
    SOFTMAX_THREADS,
    KernelSpec,
)
from splatc.formats.nm import TILE_KEYS, TILE_ROWS, Compressed, decode, encode, from_registers, to_registers
from splatc.patterns.pruned import Pruning
from splatc.runtime.arguments import Function
from splatc.runtime.compressed_gpu import WARP_ROWS, CompressedKernels
from splatc.runtime.gpu import Gpu
from tests.fake_gpu import FakeDriver, FakeTorch, fake_gpu
from tests.hopper_on_cpu import array, load, store

WALK = ("items", "blocks", "heads", "group", "row_tiles", "row_blocks", "key_tiles")
MAPS = {COMPRESSED_SDDMM: ("q", "k", "values"), COMPRESSED_SPMM: ("values", "v", "out")}


def parameters(role: str) -> tuple[tuple[str, str], ...]:
    """(kind, name) of a kernel's parameters."""
    if role == COMPRESSED_SOFTMAX:
        return (("pointer", "x_ptr"), ("pointer", "p_ptr"), *(("int32", x) for x in ("blocks", "rows", "width")))
    own = (("int32", "kv_len"), ("float32", "scale")) if role == COMPRESSED_SDDMM else ()
    return (*(("map", f"{x}_map0") for x in MAPS[role]), *(("int32", f"{x}_step") for x in MAPS[role]),
            *(("int32", x) for x in WALK), ("pointer", "metadata_ptr"), *own)  # fmt: skip


class Twin(CompressedKernels):
    """On tensors in this computer's memory."""

    def __init__(self) -> None:
        self.driver = FakeDriver({}, {})
        super().__init__(fake_gpu(self.driver, FakeTorch()), self._make)

    def _make(self, spec: KernelSpec, on: Gpu) -> tuple[Function, ...]:
        count = len(SOFTMAX_LANES) if spec.role == COMPRESSED_SOFTMAX else 1
        made = []
        for i in range(count):
            name = f"{spec.role}_{spec.head_dim}_{spec.tile_m}_{i}"
            self.driver.parameters[name] = list(parameters(spec.role))
            self.driver.kernels[name] = self._run(spec, i)
            made.append(Function(name, self.driver.kernel(0, name, 0, 0), 0, 0, parameters(spec.role)))
        return tuple(made)

    @staticmethod
    def _run(spec: KernelSpec, i: int) -> Any:
        def run(grid: tuple[int, int, int], **given: Any) -> None:
            if spec.role == COMPRESSED_SOFTMAX:
                _softmax(*SOFTMAX_LANES[i], **given)
                return
            assert grid[0] == given["blocks"] <= given["items"]
            for item in range(given["items"]):
                pair, tile = divmod(item, given["row_tiles"])
                (_sddmm if spec.role == COMPRESSED_SDDMM else _spmm)(spec, pair, tile * spec.tile_m, **given)

        return run


def _places(pair: int, given: dict[str, Any], key_side: str) -> tuple[int, int]:
    """The last coordinates of rows and of keys."""
    batch, head = divmod(pair, given["heads"])
    row_side = "values" if key_side == "v" else "q"
    return batch * given[f"{row_side}_step"] + head, batch * given[f"{key_side}_step"] + head // given["group"]


def _words(pair: int, key_tile: int, given: dict[str, Any]) -> np.ndarray:
    """Metadata of all rows of a tile of keys."""
    words = array(given["metadata_ptr"], np.uint32, given["items"] // given["row_tiles"], given["key_tiles"],
                  given["row_blocks"], 2, 128)  # fmt: skip
    return words[pair, key_tile]


def _sddmm(spec: KernelSpec, pair: int, row: int, **given: Any) -> None:
    at_q, at_k = _places(pair, given, "k")
    batch, head = divmod(pair, given["heads"])
    q = load(given["q_map0"], (row, 0, 0, at_q), spec.head_dim)
    for j in range(given["key_tiles"]):
        slots = load(given["k_map0"], (0, j * TILE_KEYS // 4, 0, at_k), spec.head_dim)
        k = np.empty_like(slots)
        k[slot_keys(TILE_KEYS)] = slots
        s = (q @ k.T * np.float32(given["scale"])).astype(np.float16).astype(np.float32)
        s[:, max(given["kv_len"] - j * TILE_KEYS, 0) :] = -np.inf * given["scale"]
        made = encode(s, Pruning(2, 4))
        last = batch * given["values_step"] + head
        for i in range(0, spec.tile_m, WARP_ROWS):
            box = given["values_map0"]
            box.store((j * TILE_KEYS // 2, row + i, 0, 0, last), made.values[i : i + WARP_ROWS].astype(np.float16).view(
                np.uint16))  # fmt: skip
        first = row // TILE_ROWS
        there = _words(pair, j, given)[first : first + spec.tile_m // TILE_ROWS]
        there[:] = to_registers(made.words)[0, : len(there)]


def _spmm(spec: KernelSpec, pair: int, row: int, **given: Any) -> None:
    at_p, at_v = _places(pair, given, "v")
    batch, head = divmod(pair, given["heads"])
    o = np.zeros((spec.tile_m, spec.v_head_dim))
    for j in range(given["key_tiles"]):
        p = given["values_map0"].load((j * TILE_KEYS // 2, row, 0, 0, at_p)).view(np.float16).astype(np.float32)
        words = np.full((1, spec.tile_m // TILE_ROWS, 2, 128), 0x44444444, np.uint32)
        first = row // TILE_ROWS
        there = _words(pair, j, given)[first : first + spec.tile_m // TILE_ROWS]
        words[0, : len(there)] = there
        standard = from_registers(words, spec.tile_m, TILE_KEYS // 16)
        dense = decode(Compressed(p, standard, TILE_KEYS, Pruning(2, 4), 16), 0.0)
        o += dense @ load(given["v_map0"], (j * TILE_KEYS, 0, 0, at_v), spec.v_head_dim)
    for i in range(0, spec.tile_m, WARP_ROWS):
        store(given["out_map0"], (row + i, 0, 0, batch * given["out_step"] + head), o[i : i + WARP_ROWS])


def _softmax(lanes: int, units: int | None, **given: Any) -> None:
    rows, width = given["rows"], given["width"]
    assert given["blocks"] * SOFTMAX_THREADS // lanes >= rows and (units is None or width <= lanes * units * 8)
    x = array(given["x_ptr"], np.float16, rows, width).astype(np.float32)
    weights = np.exp(x - x.max(-1, keepdims=True))
    array(given["p_ptr"], np.float16, rows, width)[:] = weights / weights.sum(-1, keepdims=True)
