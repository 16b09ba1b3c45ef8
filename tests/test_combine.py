"""The kernel that puts parts of rows together: the generated CUDA, run on the CPU, against float64."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from splatc import oracle
from splatc.codegen.build import device_source
from splatc.codegen.emitted import Emitted, parse_signatures
from splatc.codegen.hopper.combine import NAME, ROWS, combine_parts
from splatc.codegen.hopper.shape import shape_of
from tests.cuda_on_cpu import load_cpp
from tests.products_on_cpu import cpp, launcher
from tests.test_hopper_pruning import tvm_module
from tests.test_hopper_source import HOPPER, spec_of

torch = pytest.importorskip("torch")

BATCH, HEADS, QUERIES, ITEMS = 2, 3, 200, 4
TOLERANCE = {"float16": 1e-3, "bfloat16": 1e-2, "float32": 1e-5}
SIZES = [("float16", 64), ("bfloat16", 128), ("float16", 40), ("bfloat16", 8), ("float16", 256), ("float32", 72),
         ("float32", 256)]  # fmt: skip
CASES = [*((dtype, dim, merge, False) for dtype, dim in SIZES for merge in (False, True)), ("float16", 40, False, True)]


@cache
def kernel(dtype: str, dim: int, sinks: bool) -> tuple[Any, int]:
    """(What runs a grid, rows of a tile)."""
    shape = shape_of(spec_of(64, dim, dtype, sinks=sinks))
    source = device_source(Emitted(tvm_module({NAME: combine_parts(shape)}), ()), HOPPER.arch, simplified=False)
    ((name, parameters),) = ((one.name, one.parameters) for one in parse_signatures(source))
    return launcher(load_cpp(cpp(source))[f"launch_{name}"], parameters), shape.m


@pytest.mark.parametrize("counts", [(2, 5, 1), (33, 3, 32), (16, 70, 8)])
@pytest.mark.parametrize(("dtype", "dim", "merge", "sinks"), CASES)
def test_parts_of_rows(dtype: str, dim: int, merge: bool, sinks: bool, counts: tuple[int, ...]) -> None:
    run, m = kernel(dtype, dim, sinks)
    rng = np.random.default_rng(dim + len(counts))
    kind = getattr(torch, dtype)
    tiles = [(i % BATCH, (i + 1) % HEADS, i, sum(counts[:i]), n) for i, n in enumerate(counts)]
    positions = np.full((ITEMS, m), -1, np.int32)
    for item in range(ITEMS):
        rows = rng.permutation(QUERIES)[: m - 5]
        positions[item, rng.permutation(m)[: len(rows)]] = rows
    part_o = torch.from_numpy(rng.normal(size=(sum(counts), m, dim))).to(kind)
    part_lse = rng.normal(size=(sum(counts), m)).astype(np.float32) * 5
    part_lse[rng.random(part_lse.shape) < 0.2] = -np.inf
    o = torch.from_numpy(rng.normal(size=(BATCH, HEADS, QUERIES, dim))).to(kind)
    lse = rng.normal(size=(BATCH, HEADS, QUERIES)).astype(np.float32)
    sink = rng.normal(size=HEADS).astype(np.float32)
    want_o, want_lse = o.double().numpy(), lse.astype(np.float64)
    for batch, head, item, first, n in tiles:
        for row in np.flatnonzero(positions[item] >= 0):
            at = batch, head, positions[item, row]
            parts = part_o[first : first + n, row].double().numpy()
            weights = part_lse[first : first + n, row].astype(np.float64)
            if merge or sinks:
                parts = np.vstack([parts, want_o[at] if merge else np.zeros(dim)])
                weights = np.append(weights, want_lse[at] if merge else sink[head])
            total = np.logaddexp.reduce(weights)
            want_lse[at] = total
            want_o[at] = np.exp(weights - total) @ parts if np.isfinite(total) else 0
    table = np.array([[*tile, 0, 0, 0] for tile in tiles], np.int32)
    arrays = {"combine": table, "positions": positions, "part_lse": part_lse, "lse": lse, "sinks": sink}
    blocks = len(tiles) * m // ROWS
    given = {f"{name}_ptr": array.ctypes.data for name, array in arrays.items()}
    given |= {"o_ptr": o.data_ptr(), "part_o_ptr": part_o.data_ptr(), "heads": HEADS, "q_len": QUERIES, "merge": merge,
              "blocks": blocks}  # fmt: skip
    given |= dict(zip(("o_batch", "o_head", "o_seq"), o.stride(), strict=False))
    run((blocks, 1, 1), **given)
    assert oracle.relative_error(o.double().numpy(), want_o) < TOLERANCE[dtype]
    np.testing.assert_allclose(lse, want_lse, rtol=1e-5, atol=1e-5)
