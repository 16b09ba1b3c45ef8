"""sddmm, softmax and spmm for Hopper: tables, compiled code, the kernels run on the CPU, and on a GPU."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import splatc
from splatc import oracle
from splatc import patterns as P
from splatc.bench.gpu import products as bench
from splatc.codegen.build import build
from splatc.codegen.hopper.shape import SMEM_BYTES
from splatc.codegen.hopper.unfused.tiles import WORK
from splatc.codegen.kernel import PRODUCTS, SOFTMAX, product_spec
from splatc.codegen.target import Target
from splatc.codegen.toolchain import find_compiler
from splatc.codegen.value_tiles import ValueTiles, joined, value_tiles
from splatc.errors import InvalidInput, Unsupported
from splatc.formats.acsr import ACSR
from splatc.formats.order import Order
from splatc.runtime import products_gpu
from splatc.runtime.products_gpu import cut, described, shared, spread, tile_tables, work_rows
from splatc.runtime.structure import structure_of, tile_values
from tests import library

torch = pytest.importorskip("torch")
pytest.importorskip("tvm")
HOPPER = Target("cuda", "sm_90a")
MASKS = {
    "window": P.window(40, 30),
    "blocked": P.blocked(64),
    "strided": P.strided(8),
    "global": P.longformer(9, 2),
    "bottom": P.causal("bottom_right"),
    "no_rows": P.causal() & P.window(-10, 60),
    "views": P.causal() & (P.window(31, 0) | P.strided(32)),
    "full": P.full(),
    "empty": P.window(-2000, 2005),
}
MOST = {"bfloat16": 4e-3, "float16": 6e-4, "float32": 6e-4}  # of roundings: 2^-9, 2^-12, and of tf32 in a product
on_hopper = pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
                               reason="needs a Hopper GPU")  # fmt: skip


# -- tables ------------------------------------------------------------------------------------------------------------


def numbered(tiles: ValueTiles, queries_are_rows: bool, shape: tuple[int, int]) -> np.ndarray:
    """The numbers of elements as kernels find them: int64 (q_len, kv_len), -1 where no tile has any."""
    out = np.full(shape, -1)
    for (begin, count), rows in zip(tiles.items.tolist(), tiles.positions, strict=True):
        for e in range(begin, begin + count):
            column, kind = tiles.entries[e].tolist()
            lines, keys = rows, tiles.columns[column]
            if not queries_are_rows:
                lines, keys = keys, lines
            held = np.ones((len(lines), len(keys)), bool)
            if kind:
                held = np.unpackbits(tiles.bits[kind - 1].view(np.uint8), axis=1, bitorder="little").astype(bool)
            for line in np.flatnonzero(tiles.first[e] >= 0).tolist():
                q, k = lines[line], keys[held[line]]
                assert q >= 0 and len(k) and (k >= 0).all() and (out[q, k] == -1).all()
                out[q, k] = tiles.first[e, line] + np.arange(len(k))
    return out


def check_tables(pattern: Any, q_len: int, kv_len: int) -> None:
    mask = pattern.dense(q_len, kv_len)
    wanted = np.where(mask, np.cumsum(mask).reshape(mask.shape) - 1, -1)
    order = Order(ACSR.from_pattern(pattern, q_len, kv_len))
    turned = ACSR.from_pattern(pattern.transposed(), kv_len, q_len)
    for acsr, rows in ((order.acsr, True), (turned, False)):
        tiles = value_tiles(tile_values(acsr, order, rows)[1], rows)
        np.testing.assert_array_equal(numbered(tiles, rows, mask.shape), wanted)


@pytest.mark.parametrize("name", library.NAMES)
def test_tiles_number_every_element(name):
    for shape in ((130, 130), (60, 170)):
        pattern = library.pattern(name, *shape)
        if pattern is not None:
            check_tables(pattern, *shape)


def test_tiles_of_several_patterns():
    shape = 130, 140
    patterns = P.causal(), P.strided(8), P.window(9, 9)
    all_tiles = [structure_of(pattern, *shape).tiles(transposed=False)[0] for pattern in patterns]
    together, ends = joined(all_tiles)
    for pattern, begin, end in zip(patterns, ends[:-1], ends[1:], strict=True):
        one = ValueTiles(**{**vars(together), "items": together.items[begin:end],
                            "positions": together.positions[begin:end]})  # fmt: skip
        mask = pattern.dense(*shape)
        wanted = np.where(mask, np.cumsum(mask).reshape(shape) - 1, -1)
        np.testing.assert_array_equal(numbered(one, True, shape), wanted)


def test_work_has_every_row_tile_of_every_head_once():
    structure = structure_of(P.PerHead((P.causal(), P.strided(8), P.causal())), 130, 130)
    tables = tile_tables(structure, 3, transposed=False)
    rows = work_rows(structure, 3, False, tables["items"])
    heads, items = rows[:, :2].T
    for head in range(3):
        positions = tables["positions"][items[heads == head]]
        assert sorted(positions[positions >= 0].tolist()) == list(range(130))


def test_warpgroups_share_the_entries_of_a_row_tile_and_know_where_to_begin():
    structure = structure_of(P.PerHead((P.causal(), P.window(-200, 300), P.strided(8))), 450, 450)
    tables = tile_tables(structure, 3, transposed=False)
    rows, bases = work_rows(structure, 3, False, tables["items"]), structure.bases(3)
    for teams in (1, 2):
        work = described(shared(rows, teams), tables["entries"], bases)
        assert work.shape == (len(rows), teams, WORK) and work.dtype == np.int32
        for (head, item, begin, count), block in zip(rows.tolist(), work, strict=True):
            assert (block[:, :2] == (head, item)).all()
            entries = [e for first, some in block[:, 2:4].tolist() for e in range(first, first + some)]
            assert entries == list(range(begin, begin + count))
            assert block[:, 3].max() - block[:, 3].min() <= 1
            assert (np.ascontiguousarray(block[:, 4:6]).view(np.int64) == bases[head]).all()
            for part in block[block[:, 3] > 0]:
                first, last = part[2], part[2] + part[3] - 1
                np.testing.assert_array_equal(part[6:].reshape(2, 2), tables["entries"][[first, min(first + 1, last)]])


@pytest.mark.parametrize("parts", [1, 2, 3, 100])
def test_long_row_tiles_are_cut_into_pieces_about_as_long(parts):
    structure = structure_of(P.PerHead((P.causal(), P.window(-200, 300), P.strided(8))), 450, 450)
    rows = work_rows(structure, 3, False, tile_tables(structure, 3, False)["items"])
    assert rows[:, 3].max() == 8 and 0 in rows[:, 3]  # of the second mask some row tiles have none
    pieces = cut(rows, parts)
    entries = [[(head, item, e) for head, item, begin, count in some.tolist() for e in range(begin, begin + count)]
               for some in (rows, pieces)]  # fmt: skip
    assert entries[0] == entries[1] and pieces.dtype == np.int32
    assert pieces[:, 3].max() == max(-(-8 // parts), 1)
    for head, item in rows[:, :2].tolist():
        lengths = pieces[(pieces[:, :2] == (head, item)).all(1), 3]
        assert 1 <= len(lengths) <= parts and lengths.max() - lengths.min() <= 1


def test_multiprocessors_get_long_rows_with_short_ones():
    lengths = np.array([4, 9, 1, 7, 3, 8])
    rows = np.column_stack([np.arange(6), np.arange(6), np.zeros(6), lengths]).astype(np.int32)
    assert spread(rows, 2)[:, 3].tolist() == [9, 8, 4, 7, 3, 1]
    np.testing.assert_array_equal(np.sort(spread(rows, 4)[:, 0]), np.arange(6))


def test_tables_are_small_where_masks_are_dense_enough():
    for pattern in (P.window(256, 256), P.blocked(512), P.strided(8)):
        structure = structure_of(pattern, 2048, 2048)
        for transposed in (False, True):
            (tiles,) = structure.tiles(transposed)
            assert tiles.nbytes < 0.06 * 2 * structure.orders[0].nnz


# -- compiled here -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(find_compiler() is None, reason="no CUDA compiler (nvcc or NVRTC) is installed")
@pytest.mark.parametrize(("role", "dim", "dtype"), [
    ("sddmm", 64, "bfloat16"), ("sddmm", 256, "float32"), ("spmm", 64, "bfloat16"),
    ("spmm", 256, "float32"), (SOFTMAX, 1, "bfloat16"),
])  # fmt: skip
def test_kernels_compile_without_spills(role, dim, dtype, tmp_path: Path):
    build(product_spec(role, dim, dtype, HOPPER), tmp_path)  # refuses spills and serialised products
    for function in json.loads((tmp_path / "report.json").read_text())["functions"]:
        assert function["spill_bytes"] == 0 and function["smem_bytes"] <= SMEM_BYTES
    text = "".join(path.read_text() for path in tmp_path.glob("*.ptx"))
    assert ("wgmma.mma_async" in text) == (role != SOFTMAX)


def test_what_there_is_no_kernel_for():
    for role in PRODUCTS:
        with pytest.raises(Unsupported, match="sm_90a, not for cuda:sm_80"):
            product_spec(role, 64, "bfloat16", Target("cuda", "sm_80"))
    with pytest.raises(Unsupported, match="multiples of 8, not 12: pad"):
        product_spec("sddmm", 12, "bfloat16", HOPPER)
    with pytest.raises(InvalidInput, match="float64"):
        product_spec("spmm", 64, "float64", HOPPER)


# -- results -----------------------------------------------------------------------------------------------------------


def draw(lengths: tuple[int, int], dtype: str, device: str = "cpu", heads: int = 4, kv_heads: int = 2,
         dim: int = 16, grad: bool = False) -> list[Any]:  # fmt: skip
    """Fresh random q, k, v in a batch of two; k is strided (bshd memory)."""
    of = getattr(torch, dtype)
    q = torch.randn(2, heads, lengths[0], dim).to(of).to(device)
    k = torch.randn(2, lengths[1], kv_heads, dim).to(of).to(device).transpose(1, 2)
    v = torch.randn(2, kv_heads, lengths[1], dim).to(of).to(device)
    return [x.requires_grad_(grad) for x in (q, k, v)]


def wide(x: Any) -> np.ndarray:
    return np.asarray(x.detach().double().cpu().numpy())


def dense_of(structure: Any, values: Any, heads: int) -> np.ndarray:
    """float64 (batch, heads, q_len, kv_len) of values."""
    return wide(splatc.SparseScores(values.cpu(), structure).to_dense())


def check_products(on: Any, patterns: Any, lengths: tuple[int, int], tensors: list[Any]) -> None:
    """Every function of GpuProducts for these q, k and v against float64; what a step is given are rounded numbers."""
    q, k, v = tensors
    heads, kv_heads = q.shape[1], k.shape[1]
    structure = structure_of(patterns, *lengths)
    masks = np.stack([structure.patterns[p].dense(*lengths) for p in structure.head_patterns(heads)])
    wide_k, wide_v = (np.repeat(wide(x), heads // kv_heads, axis=1) for x in (k, v))
    most = MOST[str(q.dtype).removeprefix("torch.")]

    values = on.sddmm(structure, q, k, 0.3)
    near(dense_of(structure, values, heads), np.where(masks, wide(q) @ wide_k.swapaxes(-1, -2) * 0.3, 0), most)
    p, lse = on.softmax(structure, values, heads)
    scores = np.where(masks, dense_of(structure, values, heads), -np.inf)
    with np.errstate(divide="ignore", invalid="ignore"):
        top = scores.max(-1, keepdims=True)
        wanted_lse = np.log(np.exp(scores - top).sum(-1)) + top[..., 0]
        wanted_p = np.where(masks, np.exp(scores - wanted_lse[..., None]), 0)
    wanted_lse = np.where(masks.any(-1), wanted_lse, -np.inf)
    np.testing.assert_array_equal(np.isneginf(wide(lse)), np.isneginf(wanted_lse))
    finite = np.isfinite(wanted_lse)
    np.testing.assert_allclose(wide(lse)[finite], wanted_lse[finite], rtol=1e-5, atol=1e-5)
    near(dense_of(structure, p, heads), wanted_p, most)
    dense_p = dense_of(structure, p, heads)
    near(wide(on.spmm(structure, p, heads, v, 2.0)), dense_p @ wide_v * 2, most)
    near(wide(on.spmm(structure, p, heads, q, 1.0, transposed=True)), dense_p.swapaxes(-1, -2) @ wide(q), most)
    dp, dlse = torch.randn_like(p), torch.randn_like(lse)
    dense_dp = dense_of(structure, dp, heads)
    delta = (dense_p * dense_dp).sum(-1) - np.where(finite, wide(dlse), 0)
    ds = on.softmax_gradient(structure, p, dp, dlse)
    near(dense_of(structure, ds, heads), dense_p * (dense_dp - delta[..., None]), most)


def near(got: np.ndarray, wanted: np.ndarray, most: float) -> None:
    assert got.shape == wanted.shape
    assert oracle.relative_error(got, wanted) <= most


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize(("name", "lengths"), [("window", (129, 130)), ("strided", (70, 200)), ("views", (130, 100)),
                                               ("no_rows", (130, 130)), ("empty", (20, 30)), ("global", (100, 130))])
def test_kernels_on_the_cpu(name, lengths):
    from tests.products_on_cpu import EmulatedProducts

    tensors = draw(lengths, "bfloat16", heads=2, kv_heads=1)
    on = EmulatedProducts(16, "bfloat16")
    on.driver.sms = 3 if name == "window" else 12  # more of them share row tiles
    check_products(on, MASKS[name], lengths, tensors)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_tf32_on_the_cpu():
    from tests.products_on_cpu import EmulatedProducts

    lengths = 70, 100
    tensors = draw(lengths, "float32", heads=2, kv_heads=1, dim=40)
    check_products(EmulatedProducts(40, "float32"), MASKS["window"], lengths, tensors)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("density", [0.3, 0.98])
def test_scattered_keys_on_the_cpu(density, dtype):
    """Lines that begin and end anywhere, and go on from tile to tile."""
    from tests.products_on_cpu import EmulatedProducts

    lengths = 100, 200
    mask = P.mask(np.random.default_rng(7).random(lengths) < density)
    check_products(EmulatedProducts(16, dtype), mask, lengths, draw(lengths, dtype, heads=2, kv_heads=1))


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_a_pattern_for_each_head_on_the_cpu():
    from tests.products_on_cpu import EmulatedProducts

    heads = P.PerHead((P.causal(), P.strided(8), MASKS["empty"]))
    check_products(EmulatedProducts(16, "bfloat16"), heads, (70, 70), draw((70, 70), "bfloat16", heads=3, kv_heads=3))


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("dtype", MOST)
@pytest.mark.parametrize("lengths", [(1, 1), (129, 130), (70, 300), (1000, 1001)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("name", MASKS)
def test_kernels_on_a_gpu(name, lengths, dtype):
    heads = 128 if lengths == (1, 1) else 4  # errors are judged over many values
    check_products(products_gpu.products_on(0), MASKS[name], lengths, draw(lengths, dtype, "cuda", heads, dim=64))


@pytest.mark.gpu
@on_hopper
def test_head_dims_on_a_gpu():
    """In one process, with one structure: kernels of several numbers of warpgroups use it."""
    lengths = 300, 333
    for dtype in ("bfloat16", "float32"):
        for dim in (8, 72, 128, 256):
            check_products(products_gpu.products_on(0), MASKS["views"], lengths, draw(lengths, dtype, "cuda", dim=dim))


@pytest.mark.gpu
@on_hopper
def test_every_pattern_on_a_gpu():
    for name in library.NAMES:
        for lengths in ((130, 130), (60, 170)):
            pattern = library.pattern(name, *lengths)
            if pattern is not None:
                check_products(products_gpu.products_on(0), pattern, lengths, draw(lengths, "bfloat16", "cuda"))


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("patterns", [[P.causal(), P.strided(8), P.window(-2000, 2005), P.longformer(5, 3)],
                                      P.causal() & P.window(100, 0)], ids=["heads", "window"])  # fmt: skip
def test_the_three_agree_with_the_fused_kernel_on_a_gpu(patterns):
    """With gradients, by the public functions."""
    lengths = 700, 700
    per_head = isinstance(patterns, list)
    q, k, v = draw(lengths, "bfloat16", "cuda", kv_heads=4 if per_head else 2, dim=64, grad=True)
    probs, lse = splatc.softmax(splatc.sddmm(q, k, patterns, enable_gqa=True), return_lse=True)
    o = splatc.spmm(probs, v, enable_gqa=True)
    fused, fused_lse = splatc.attention(q, k, v, patterns, return_lse=True, enable_gqa=True)
    do = torch.randn_like(o)
    got, wanted = (torch.autograd.grad(x, (q, k, v), do) for x in (o, fused))
    near(wide(o), wide(fused), 1e-2)
    finite = torch.isfinite(fused_lse)
    assert (lse - fused_lse)[finite].abs().max() < 2e-2  # scores are rounded
    for a, b in zip(got, wanted, strict=True):
        near(wide(a), wide(b), 1.5e-2)


@pytest.mark.gpu
@on_hopper
def test_conversions_on_a_gpu():
    q, k, _ = draw((50, 60), "bfloat16", "cuda", heads=2)
    scores = splatc.sddmm(q, k, MASKS["window"], enable_gqa=True)
    dense = scores.to_dense()
    assert dense.is_cuda
    assert torch.equal(splatc.SparseScores.from_dense(dense, MASKS["window"]).values, scores.values)
    assert torch.equal(scores.to_torch(1, 1).to_dense(), dense[1, 1])
    np.testing.assert_array_equal(scores.to_scipy(1, 1).toarray(), dense[1, 1].float().cpu())
    again = splatc.SparseScores.from_torch(scores.to_torch(1, 1))
    assert torch.equal(again.values[0, 0], scores.values[1, 1])


@pytest.mark.gpu
@on_hopper
def test_a_captured_graph_computes_anew():
    q, k, v = draw((200, 200), "bfloat16", "cuda", kv_heads=4, dim=64)

    def run() -> Any:
        return splatc.spmm(splatc.softmax(splatc.sddmm(q, k, MASKS["window"])), v)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    with torch.no_grad():
        q.copy_(torch.randn_like(q))
    graph.replay()
    assert torch.equal(out, run())


@pytest.mark.gpu
@on_hopper
def test_memory_on_a_gpu_is_of_the_elements():
    """A global token and a window: 17 elements in every row but one. Nothing is as wide as that row."""
    size, pattern = 4096, P.window(8, 8) | P.global_rows(1)
    q, k, v = draw((size, size), "bfloat16", "cuda", kv_heads=4)
    o = splatc.spmm(splatc.softmax(splatc.sddmm(q, k, pattern)), v)
    values = 2 * 4 * ACSR.from_pattern(pattern, size).nnz * 2
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    probs, lse = splatc.softmax(splatc.sddmm(q, k, pattern), return_lse=True)
    o = splatc.spmm(probs, v)
    used = torch.cuda.max_memory_allocated() - before
    assert used < 2.1 * values + lse.nbytes + 2 * o.nbytes


# -- the benchmark -----------------------------------------------------------------------------------------------------


def test_masks_of_the_benchmark_keep_what_they_say():
    for density in bench.DENSITIES:
        for pattern in bench.masks(1024, density):
            assert abs(ACSR.from_pattern(pattern, 1024).nnz / 1024**2 - density) < 0.01


def test_a_record_compares_with_the_best_of_each_kind():
    seconds = {"splatc": 2.0, "dense": 3.0, "cusparse float32": 9.0, "cusparse float16": 5.0}
    one = bench.Record("spmm", "causal()", 1024, 0.5, 16, "bfloat16", seconds, {}, 1e-3)
    assert one.over("dense") == 1.5 and one.over("cusparse") == 2.5
    assert str(one).endswith("missed")  # 2.81 is stated
    assert not str(replace(one, seconds=seconds | {"splatc": 1.0})).endswith("missed")
    assert np.isnan(replace(one, seconds={"splatc": 1.0}).over("dense"))


@pytest.mark.gpu
@on_hopper
def test_the_benchmark_runs(tmp_path, capsys):
    out = tmp_path / "products.json"
    bench.main(["--lengths", "256", "--densities", "0.5", "--heads", "2", "--json", str(out)])
    records = json.loads(out.read_text())["records"]
    assert len(records) == 6 and all({"splatc", "dense", "cusparse float32"} <= set(r["seconds"]) for r in records)
    assert all(r["error"] < 1e-2 for r in records) and "cuSPARSE" in capsys.readouterr().out
