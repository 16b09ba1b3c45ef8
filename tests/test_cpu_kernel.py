"""The CPU kernel against a float64 dense reference, on tables planned by brute force from a dense mask."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("TVM_BIND_THREADS", "0")  # else TVM pins the test process to one core
os.environ.setdefault("TVM_NUM_THREADS", "2")  # workers that do run side by side
torch = pytest.importorskip("torch")
tvm = pytest.importorskip("tvm")

from tvm.target.codegen import llvm_get_system_cpu, llvm_get_system_triple  # noqa: E402

from splatc.codegen.build import compile_cpu  # noqa: E402
from splatc.codegen.cpu import attention_cpu, llvm_target  # noqa: E402
from splatc.codegen.kernel import KernelSpec  # noqa: E402
from splatc.codegen.target import Target  # noqa: E402

HOST = llvm_get_system_cpu()
Origin = tuple[int, int, int]
Tile = tuple[int, Origin]  # (view, origin)


@dataclass(frozen=True)
class View:
    n: Origin
    s: Origin
    b: Origin

    def positions(self, origin: Origin, length: int) -> np.ndarray:
        """The position of each lane of the box at `origin`, -1 if invalid."""
        lane = np.arange(self.b[0] * self.b[1] * self.b[2])
        x = [origin[0] + lane % self.b[0], origin[1] + lane // self.b[0] % self.b[1],
             origin[2] + lane // (self.b[0] * self.b[1])]  # fmt: skip
        inside = np.logical_and.reduce([(x[d] >= 0) & (x[d] < self.n[d]) for d in range(3)])
        p = sum(x[d] * self.s[d] for d in range(3))
        return np.where(inside & (p < length), p, -1)


def line(length: int, box: int) -> View:
    return View((length, 1, 1), (1, length, length), (box, 1, 1))


@dataclass
class Plan:
    """The tables of one pass, and the part of the mask that it covers."""

    views: list[View]
    shape: tuple[int, int]  # tile_m, tile_n
    items: list[list[int]] = field(default_factory=list)
    entries: list[list[int]] = field(default_factory=list)
    bits: list[np.ndarray] = field(default_factory=list)

    def add(self, mask: np.ndarray, row: Tile, cols: list[Tile]) -> None:
        """An item: the row tile against those of the column tiles that the mask touches."""
        first = len(self.entries)
        q = self.views[row[0]].positions(row[1], mask.shape[0])
        for view, origin in cols:
            k = self.views[view].positions(origin, mask.shape[1])
            tile = mask[q][:, k] & (q >= 0)[:, None] & (k >= 0)
            if not tile.any():
                continue
            if tile[q >= 0].all():
                last = self.entries[-1] if len(self.entries) > first else [0] * 8
                end = (last[0] + last[3] * self.views[view].b[0], last[1], last[2])
                if last[3] and last[4] == 0 and last[5] == view and end == origin:
                    last[3] += 1  # the entry grows by one tile
                else:
                    self.entries.append([*origin, 1, 0, view, 0, 0])
            else:
                packed = np.packbits(tile.T, axis=1, bitorder="little")
                self.bits.append(np.ascontiguousarray(packed).view(np.int32))
                self.entries.append([*origin, 1, len(self.bits), view, 0, 0])
        self.items.append([*row[1], first, len(self.entries) - first, row[0], 0, 0])

    def tables(self, batch: int, heads: int, workers: int) -> list[Any]:
        m, n = self.shape
        work = [(h, i) for h in range(heads) for i in range(len(self.items))]
        views = [[*v.n, *v.s, *v.b, v.b[0], 0, 0] for v in self.views]
        bits = np.array(self.bits or np.zeros((1, n, m // 32)), np.int32)
        chunks = np.linspace(0, batch * len(work), workers + 1).astype(np.int32)
        ints = [np.array(x, np.int32).reshape(-1, c) for x, c in
                ((work, 2), (self.items, 8), (self.entries, 8), (views, 12))]  # fmt: skip
        return [
            *map(torch.from_numpy, ints),
            torch.from_numpy(bits).view(torch.uint32),
            torch.from_numpy(chunks),
        ]


def plan_lines(mask: np.ndarray, m: int = 64, n: int = 64) -> Plan:
    """Row and column tiles of the axis as it is."""
    plan = Plan([line(mask.shape[0], m), line(mask.shape[1], n)], (m, n))
    for row in range(0, mask.shape[0], m):
        plan.add(mask, (0, (row, 0, 0)), [(1, (c, 0, 0)) for c in range(0, mask.shape[1], n)])
    return plan


def plan_residues(mask: np.ndarray, step: int, m: int = 64, n: int = 64) -> Plan:
    """One residue class mod step at a time (columns of the same class only)."""
    size = -(-mask.shape[0] // step)
    views = [View((size, step, 1), (step, 1, size * step), (box, 1, 1)) for box in (m, n)]
    plan = Plan(views, (m, n))
    for rho in range(step):
        for t in range(0, size, m):
            plan.add(mask, (0, (t, rho, 0)), [(1, (c, rho, 0)) for c in range(0, size, n)])
    return plan


@functools.cache
def kernel(d: int, dv: int, dtype: str, m: int, n: int, arch: str) -> Callable[..., None]:
    module = attention_cpu(KernelSpec("cpu", d, dv, dtype, m, n, Target("cpu", arch)))
    return compile_cpu(module, arch)["splatc_attention"]  # type: ignore[no-any-return]


def reference(q: Any, k: Any, v: Any, mask: np.ndarray, scale: float) -> tuple[Any, Any]:
    """(O, LSE) in float64; O = 0 and LSE = -inf for rows that attend to nothing."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    score = (q @ k.mT * scale).masked_fill(~torch.from_numpy(mask), -torch.inf)
    lse = torch.logsumexp(score, -1)
    weight = torch.exp(score - lse.masked_fill(lse == -torch.inf, 0)[..., None])
    return weight @ v, lse


TOLERANCE = {"float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}


def check(
    mask: np.ndarray, plans: list[Plan], d: int = 32, dv: int | None = None, dtype: str = "float32",
    batch: int = 1, heads: int = 1, kv_heads: int = 1, workers: int = 3, arch: str = HOST,
    layout: str = "bhsd",
) -> None:  # fmt: skip
    """Run the passes on random inputs and compare; the first pass overwrites poisoned outputs."""
    dv = d if dv is None else dv
    gen = torch.Generator().manual_seed(1)

    def tensor(h: int, s: int, x: int) -> Any:
        if layout == "bhsd":
            return torch.randn(batch, h, s, x, generator=gen).to(getattr(torch, dtype))
        # "bshd": heads inside the sequence, rows padded, and a pointer that is only element-aligned
        wide = torch.randn(batch, s, h, x + 3, generator=gen).to(getattr(torch, dtype))
        return wide[..., 1 : x + 1].transpose(1, 2)

    q_len, kv_len = mask.shape
    q, k, v = tensor(heads, q_len, d), tensor(kv_heads, kv_len, d), tensor(kv_heads, kv_len, dv)
    o = tensor(heads, q_len, dv).fill_(torch.nan)
    lse = torch.full((batch, heads, q_len), torch.nan)
    scale = 1.3 * d**-0.5
    for number, plan in enumerate(plans):
        run = kernel(d, dv, dtype, *plan.shape, arch)
        run(q, k, v, o, lse, *plan.tables(batch, heads, workers), scale, 0.0, int(number > 0))
    want_o, want_lse = reference(q, k, v, mask, scale)
    error = (o.double() - want_o).norm() / want_o.norm()
    assert error < TOLERANCE[dtype] * len(plans)
    empty = torch.from_numpy(~mask.any(1))
    assert (o[:, :, empty] == 0).all() and (lse[:, :, empty] == -torch.inf).all()
    assert (lse - want_lse)[:, :, ~empty].abs().max() < 1e-5
    if layout == "bshd":  # the padding of the rows is not touched: it is as random as before
        assert torch.isfinite(o.transpose(1, 2).as_strided((o.shape[2] - 1,), (o.stride(2),), dv + 1)).all()


@pytest.mark.parametrize(
    ("arch", "register"), [("znver4", "zmm"), ("x86-64-v4", "zmm"), ("x86-64-v3", "ymm")]
)
def test_products_are_fused_and_stay_in_registers(arch: str, register: str) -> None:
    if not llvm_get_system_triple().startswith("x86_64"):
        pytest.skip("reads x86 assembly")
    module = attention_cpu(KernelSpec("cpu", 64, 64, "bfloat16", 64, 64, Target("cpu", arch)))
    assembly = compile_cpu(module, arch).mod.inspect_source("asm")
    fused = [line for line in assembly.splitlines() if "vfmadd231ps" in line]
    in_registers = [line for line in fused if line.count(register) == 3]
    assert len(in_registers) >= 3 * 4 * 2  # full scores, scores with bits, accumulation: rows x vecs each
    assert not any("%rsp" in line or "%rbp" in line for line in fused)  # no operand was spilled to the stack


def window(q_len: int, kv_len: int, left: int, right: int) -> np.ndarray:
    d = np.arange(kv_len) - np.arange(q_len)[:, None]
    return np.asarray((d >= -left) & (d <= right))


def test_full_tiles_and_repeat() -> None:
    mask = np.ones((128, 320), bool)
    plan = plan_lines(mask)
    assert [e[3:5] for e in plan.entries] == [[5, 0], [5, 0]]
    check(mask, [plan])


@pytest.mark.parametrize(
    ("tile", "dtype"),
    [((64, 64), "float32"), ((64, 64), "float16"), ((64, 64), "bfloat16"),  # what splatc.compile takes
     ((128, 64), "float16"), ((64, 128), "bfloat16"), ((32, 48), "float32")],
)  # fmt: skip
def test_window_with_bits(tile: tuple[int, int], dtype: str) -> None:
    mask = window(200, 230, 70, 90)
    check(mask, [plan_lines(mask, *tile)], d=64, dtype=dtype, heads=2)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("arch", ["x86-64-v3", "x86-64"])
def test_narrower_vectors(arch: str, dtype: str) -> None:
    if not tvm.target.codegen.target_has_features("avx2", tvm.target.Target(llvm_target(HOST))):
        pytest.skip("needs an x86 host with AVX2")
    mask = window(100, 150, 30, 60)
    check(mask, [plan_lines(mask)], d=40, dtype=dtype, arch=arch)


@pytest.mark.parametrize(
    ("d", "dv"), [(1, 1), (5, 3), (16, 64), (40, 40), (80, 16), (96, 7), (192, 128), (256, 256)]
)
def test_head_dims(d: int, dv: int) -> None:
    mask = window(70, 130, 40, 40)
    check(mask, [plan_lines(mask)], d=d, dv=dv)


@pytest.mark.parametrize("length", [61, 64, 300])
def test_residue_view(length: int) -> None:
    i = np.arange(length)
    mask = (i[:, None] - i) % 4 == 0
    check(mask, [plan_residues(mask, 4)], heads=2)


def test_patches_with_negative_origins() -> None:
    width, height, reach = 13, 11, 2
    x, y = (a.ravel() for a in np.meshgrid(np.arange(width), np.arange(height)))
    mask = (abs(x - x[:, None]) <= reach) & (abs(y - y[:, None]) <= reach)
    grid = ((width, height, 1), (1, width, width * height))
    plan = Plan([View(*grid, b=(8, 8, 1)), View(*grid, b=(16, 4, 1))], (64, 64))
    for x0 in range(0, width, 8):
        for y0 in range(0, height, 8):
            cols = [(1, (x0 - 4, y0 - 2 + 4 * j, 0)) for j in range(3)]
            plan.add(mask, (0, (x0, y0, 0)), cols)
    check(mask, [plan])


def test_boxes_in_three_dimensions() -> None:
    n = (5, 6, 7)
    x = np.stack(np.unravel_index(np.arange(210), n[::-1])[::-1])
    mask = (abs(x[:, :, None] - x[:, None]) <= 1).all(0)
    view = View(n, (1, 5, 30), (4, 4, 4))
    plan = Plan([view, view], (64, 64))
    for at in np.ndindex(2, 2, 2):
        x0 = tuple(4 * a for a in at)
        cols = [(1, tuple(o + 4 * int(s) - 1 for o, s in zip(x0, step))) for step in np.ndindex(2, 2, 2)]
        plan.add(mask, (0, x0), cols)
    check(mask, [plan])


def test_empty_rows() -> None:
    mask = window(256, 256, 20, 20)
    mask[10:20] = mask[64:130] = mask[255] = False  # some rows of an item, all rows of an item
    plan = plan_lines(mask)
    assert plan.items[1][4] == 0
    check(mask, [plan])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_passes_merge(dtype: str) -> None:
    """The second pass meets rows that the first filled, and rows that it left empty; some stay empty."""
    i = np.arange(150)
    near = window(150, 150, 20, 0)
    near[30:100] = False
    far = ((i[:, None] - i) % 3 == 0) & ~near
    far[40:50] = far[:10] = False
    check(near | far, [plan_lines(near), plan_residues(far, 3)], d=20, dv=24, dtype=dtype, heads=2)


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_batch_and_grouped_heads(workers: int) -> None:
    mask = window(130, 70, 100, 10)
    check(mask, [plan_lines(mask)], batch=2, heads=6, kv_heads=2, workers=workers)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_strided_and_unaligned_tensors(dtype: str) -> None:
    mask = window(130, 100, 30, 30)
    check(mask, [plan_lines(mask)], d=20, dv=24, dtype=dtype, batch=2, heads=4, kv_heads=2, layout="bshd")


def test_large_scores_and_nan() -> None:
    """Scores of +-1e5 neither overflow nor vanish; a NaN in K reaches just the rows that see it."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 64, 16) for _ in range(3))
    o, lse = torch.empty(1, 1, 64, 16), torch.empty(1, 1, 64)
    mask = window(64, 64, 3, 3)
    run, tables = kernel(16, 16, "float32", 64, 64, HOST), plan_lines(mask).tables(1, 1, 1)
    run(q, k, v, o, lse, *tables, 3e4, 0.0, 0)
    want_o, want_lse = reference(q, k, v, mask, 3e4)
    assert (lse / want_lse - 1).abs().max() < 1e-6 and (o - want_o).abs().max() < 0.05
    k[0, 0, 10, 5] = torch.nan
    run(q, k, v, o, lse, *tables, 0.25, 0.0, 0)
    bad = torch.from_numpy(mask[:, 10])
    assert o[0, 0, bad].isnan().all() and o[0, 0, ~bad].isfinite().all()
