"""Copies of listed rows: the generated CUDA, run on the CPU."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as I

from splatc.codegen.build import device_source
from splatc.codegen.emitted import Emitted, parse_signatures
from splatc.codegen.hopper.combine import array
from splatc.codegen.hopper.copies import Maps, Point, Rows, commit_copies, gather_rows, wait_copies
from splatc.codegen.hopper.emit import do, kernel_function, loop, store
from splatc.codegen.hopper.shape import TEAM
from splatc.codegen.hopper.shared_memory import SharedMemory
from tests.cuda_on_cpu import load_cpp
from tests.products_on_cpu import cpp, launcher
from tests.test_hopper_pruning import tvm_module
from tests.test_hopper_source import HOPPER

LISTS, BATCH, HEADS, LENGTH = 3, 2, 3, 500
CHUNK = 64  # float16 values of a swizzled row


def gather_kernel(dim: int, count: int, ahead: bool) -> Any:
    """What copies the rows of one list to shared memory, and that to out."""
    size = -(-dim // CHUNK) * CHUNK * count
    with kernel_function("gather") as made:
        out, keys = array("out", "float16"), array("keys", "int32", count)
        rows = Rows("k", "float16", dim, Maps("k", 0))
        number, batch, head = (I.arg(name, I.int32()) for name in ("number", "batch", "head"))
        I.device_entry()
        I.cta_id([1])
        thread = I.thread_id([TEAM])
        pool = SharedMemory()
        tile = pool.alloc((size,), "float16", align=1024)
        pool.commit()
        zero = T.int32(0)
        gather_rows(rows, keys, Point(number, zero, zero, batch, head), tile, zero, count, thread, ahead)
        commit_copies()
        wait_copies(0)
        do(T.cuda.cta_sync())
        with loop(size // TEAM) as i:
            store(out, i * TEAM + thread, tile[i * TEAM + thread])
    return made()


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("count", [64, 80, 112, 128])
@pytest.mark.parametrize("dim", [16, 64, 96, 128])
def test_listed_rows(dim: int, count: int, ahead: bool) -> None:
    source = device_source(Emitted(tvm_module({"gather": gather_kernel(dim, count, ahead)}), ()), HOPPER.arch)
    ((name, parameters),) = ((one.name, one.parameters) for one in parse_signatures(source))
    run = launcher(load_cpp(cpp(source))[f"launch_{name}"], parameters)
    rng = np.random.default_rng()
    k = rng.normal(size=(BATCH, HEADS, LENGTH, dim)).astype(np.float16)
    keys = np.array([rng.permutation(LENGTH)[:count] for _ in range(LISTS)], np.int32)
    keys[rng.random(keys.shape) < 0.1] = -1
    batch, head, number = (int(rng.integers(n)) for n in (BATCH, HEADS, LISTS))
    out = np.full((-(-dim // CHUNK), count, CHUNK // 8, 8), np.nan, np.float16)
    run((1, 1, 1), out_ptr=out.ctypes.data, keys_ptr=keys.ctypes.data, k_ptr=k.ctypes.data, k_step=HEADS,
        k_last=LENGTH * dim, k_row=dim, number=number, batch=batch, head=head)  # fmt: skip
    row, column = np.ogrid[:count, : CHUNK // 8]
    got = out[:, row, column ^ row % 8].transpose(1, 0, 2, 3).reshape(count, -1)
    listed = keys[number]
    wanted = np.where(listed[:, None] >= 0, k[batch, head, listed], 0)
    np.testing.assert_array_equal(got[:, :dim], wanted)
    assert (got[:, dim:] == 0).all()
