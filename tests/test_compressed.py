"""Compressed scores without a GPU: the reference on a CPU, what launches tell the kernels, the emitted code."""

from __future__ import annotations

import ctypes
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import splatc
from splatc import oracle
from splatc.codegen.build import build
from splatc.codegen.hopper.shape import SMEM_BYTES, slot_keys
from splatc.codegen.kernel import COMPRESSED_SDDMM, COMPRESSED_SOFTMAX, COMPRESSED_SPMM, compressed_spec
from splatc.codegen.target import Target
from splatc.codegen.toolchain import find_compiler
from splatc.errors import InvalidInput, Unsupported
from splatc.formats.nm import encode, from_registers, prune, to_registers
from splatc.patterns.pruned import ONE_OF_TWO, RATIOS, TWO_OF_FOUR, Pruning

torch = pytest.importorskip("torch")
HOPPER = Target("cuda", "sm_90a")
LENGTHS = [(1, 1), (17, 3), (70, 130), (64, 128), (300, 257)]


def draw(q_len: int, kv_len: int, heads: int = 2, kv_heads: int = 2, dim: int = 16, batch: int = 2) -> list[Any]:
    """Random q, k, v in float16; scores have ties."""
    rng = np.random.default_rng(q_len + kv_len)
    sizes = (batch, heads, q_len, dim), (batch, kv_heads, kv_len, dim), (batch, kv_heads, kv_len, dim)
    return [np.round(rng.standard_normal(size) * 4).astype(np.float16) / 4 for size in sizes]


# -- the reference -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pruning", RATIOS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_the_three_are_pruned_attention(lengths: tuple[int, int], pruning: Pruning) -> None:
    q, k, v = draw(*lengths, heads=4)
    scores = splatc.nm_scores(q, k, pruning.n, pruning.m, enable_gqa=True)
    probs = scores.softmax()
    wide_q, wide_k, wide_v = (x.astype(np.float64) for x in (q, k, v))
    want, _ = oracle.attention(wide_q, wide_k, wide_v, np.ones(lengths, bool), pruning=pruning)
    assert oracle.relative_error(probs.spmm(v, enable_gqa=True).astype(np.float64), want) < 5e-3
    assert np.allclose(probs.values.astype(np.float32).sum(-1), 1, atol=2e-3)
    assert scores.softmax(in_place=True) is scores and np.array_equal(scores.values, probs.values)


@pytest.mark.parametrize("pruning", RATIOS, ids=str)
def test_dense_form(pruning: Pruning) -> None:
    q, k, _ = draw(70, 133)
    scores = splatc.nm_scores(q, k, pruning.n, pruning.m, scale=0.5)
    exact = q.astype(np.float64) @ k.astype(np.float64).swapaxes(-1, -2) * 0.5
    assert np.array_equal(scores.to_dense(-np.inf), prune(exact, pruning).astype(np.float16))
    assert scores.values.shape == (2, 2, 70, 72) and "2 x 70" not in repr(scores) and "x 133" in repr(scores)
    assert str(pruning) in repr(scores) and scores.softmax().pruning == pruning


def test_size() -> None:
    q, k, _ = draw(256, 512)
    assert splatc.nm_scores(q, k).nbytes == 4 * 256 * 512 * (1 + 1 / 8)  # 2 bytes for two keys, 4 bits for four


def test_torch_tensors() -> None:
    q, k, v = (torch.from_numpy(x) for x in draw(40, 50))
    for dtype in (torch.float16, torch.bfloat16):
        probs = splatc.nm_scores(q.to(dtype), k.to(dtype)).softmax()
        o = probs.spmm(v.to(dtype))
        assert o.dtype == probs.values.dtype == dtype and probs.metadata.dtype == torch.int32
        dense = probs.to_dense().double() @ v.double()
        assert oracle.relative_error(o.double().numpy(), dense.numpy()) < 5e-3


def test_bad_input() -> None:
    q, k, v = draw(8, 8)
    with pytest.raises(InvalidInput, match=r"nm\(1, 4\): it must be nm\(2, 4\) or nm\(1, 2\)"):
        splatc.nm_scores(q, k, 1, 4)
    for pruning in RATIOS:
        with pytest.raises(Unsupported, match="float16 or bfloat16, not float32"):
            splatc.nm_scores(q.astype(np.float32), k.astype(np.float32), pruning.n, pruning.m)
    with pytest.raises(Unsupported, match="gradients"):
        splatc.nm_scores(torch.from_numpy(q).requires_grad_(), torch.from_numpy(k))
    with pytest.raises(InvalidInput, match="enable_gqa"):
        splatc.nm_scores(q, k[:, :1])
    probs = splatc.nm_scores(q, k).softmax()
    with pytest.raises(InvalidInput, match=r"must be \(2, heads, 8, v_head_dim\)"):
        probs.spmm(v[:, :, :7])
    with pytest.raises(InvalidInput, match="give both of one kind"):
        probs.spmm(torch.from_numpy(v))
    with pytest.raises(InvalidInput, match="make them alike"):
        probs.spmm(v.astype(np.float32))
    with pytest.raises(InvalidInput, match="a divisor"):
        probs.spmm(v[:, :1])
    for target, dim in ((Target("cuda", "sm_80"), 64), (HOPPER, 60)):
        with pytest.raises(Unsupported, match="needs the Hopper kernel"):
            compressed_spec(COMPRESSED_SDDMM, dim, "float16", target)


def test_order_of_registers() -> None:
    rng = np.random.default_rng(0)
    for rows, count in ((1, 1), (64, 8), (70, 9), (200, 33)):
        words = rng.integers(0, 1 << 16, (2, rows, count)).astype(np.uint16)
        registers = to_registers(words)
        assert np.array_equal(from_registers(registers.view(np.int32), rows, count), words)
        for row, c in zip(rng.integers(rows, size=20), rng.integers(count, size=20), strict=True):
            thread = row % 64 // 16 * 32 + row % 8 * 4 + c % 4
            word = registers[1, c // 8, row // 64, c % 8 // 4, thread]
            assert word >> (row % 16 // 8 * 16) & 0xFFFF == words[1, row, c]


@pytest.mark.parametrize("pruning", RATIOS, ids=str)
def test_registers_of_what_does_not_exist(pruning: Pruning) -> None:
    """Keys and rows beyond the end are as the encoder has keys of -inf."""
    free = encode(np.full((64, 128), -np.inf), pruning).words
    assert np.array_equal(to_registers(free[:1, :1], pruning), to_registers(free, pruning))


# -- the generated kernels, run on the CPU by the code that launches them on a GPU -------------------------------------


@pytest.fixture(scope="module")
def gpu() -> Any:
    pytest.importorskip("tvm")
    from tests.compressed_on_cpu import Emulated

    return Emulated()


def check(gpu: Any, q: Any, k: Any, v: Any, scale: float, pruning: Pruning, o_within: float = 5e-3) -> None:
    """All three, of tensors that are whole numbers: values and metadata bit by bit."""
    want = splatc.nm_scores(q, k, pruning.n, pruning.m, scale=scale, enable_gqa=True)
    values, metadata = gpu.scores(q, k, scale, pruning)
    assert torch.equal(values, want.values) and torch.equal(metadata, want.metadata)
    p, probs = gpu.softmax(values, False), want.softmax()
    assert torch.allclose(p.float(), probs.values.float(), rtol=2**-7, atol=1e-6) and p is not values
    assert gpu.softmax(values, True) is values and torch.equal(values, p)
    o, wanted = gpu.spmm(p, metadata, v), probs.spmm(v, enable_gqa=True)
    assert oracle.relative_error(o.double().numpy(), wanted.double().numpy()) < o_within


@pytest.mark.parametrize("pruning", RATIOS, ids=str)
@pytest.mark.parametrize("lengths", [(1, 1), (17, 3), (130, 300)])
def test_lengths_and_shared_heads(gpu: Any, lengths: tuple[int, int], pruning: Pruning) -> None:
    """Lengths that are no multiples of anything, tensors that are not contiguous, any scale."""
    q, k, v = ((torch.from_numpy(x) * 4).bfloat16() for x in draw(*lengths, 2, 1))
    strided = q.transpose(1, 2).contiguous().transpose(1, 2), k, torch.cat([v, v], 3)[..., :16]
    for scale in (0.3, -0.25, 0.0) if lengths[0] < 100 else (0.3,):
        check(gpu, *strided, scale, pruning)


def test_tall_tiles(gpu: Any) -> None:
    """8 tiles of 256 rows are enough for 3 multiprocessors."""
    q, k, v = ((torch.from_numpy(x) * 4).bfloat16() for x in draw(260, 20, 4, 4, batch=1))
    check(gpu, q, k, v, 0.3, TWO_OF_FOUR)
    names = [name for name, *_ in gpu.driver.launched[-4:]]
    assert "m256" in names[0] and "m256" in names[-1]


@pytest.mark.parametrize("kv_len", [16, 250, 500, 1000, 2000, 4000, 4500])
def test_softmax_of_every_width(gpu: Any, kv_len: int) -> None:
    x = torch.randn(1, 1, 3, 8 * -(-kv_len // 16)).mul(3).bfloat16()
    x[..., 1, 8:] = -torch.inf
    assert torch.allclose(gpu.softmax(x, False).float(), torch.softmax(x.float(), -1), rtol=2**-7, atol=1e-7)


def test_empty_tensors(gpu: Any) -> None:
    q, k, v = (torch.from_numpy(x) for x in draw(30, 20))
    launched = len(gpu.driver.launched)
    for q_len, kv_len in ((0, 20), (30, 0)):
        values, metadata = gpu.scores(q[:, :, :q_len], k[:, :, :kv_len], 1.0)
        o = gpu.spmm(gpu.softmax(values, False), metadata, v[:, :, :kv_len])
        assert o.shape == (2, 2, q_len, 16) and not o.any()
    assert len(gpu.driver.launched) == launched


# -- the emitted code --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(find_compiler() is None, reason="no CUDA compiler (nvcc or NVRTC) is installed")
@pytest.mark.parametrize(
    ("role", "dim", "rows", "pruning"),
    [
        (COMPRESSED_SDDMM, 64, 256, TWO_OF_FOUR),
        (COMPRESSED_SDDMM, 64, 256, ONE_OF_TWO),
        (COMPRESSED_SPMM, 64, 256, TWO_OF_FOUR),
        (COMPRESSED_SPMM, 128, 128, TWO_OF_FOUR),
        (COMPRESSED_SOFTMAX, 8, 256, TWO_OF_FOUR),
    ],
)
def test_compiles_without_spills(role: str, dim: int, rows: int, pruning: Pruning, tmp_path: Path) -> None:
    build(compressed_spec(role, dim, "bfloat16", HOPPER, rows, pruning), tmp_path)  # refuses spills and C75xx remarks
    for function in json.loads((tmp_path / "report.json").read_text())["functions"]:
        assert function["spill_bytes"] == function["stack_bytes"] == 0
        assert function["smem_bytes"] <= SMEM_BYTES and function["registers"] * function["threads"] <= 65536
    ptx = "".join(path.read_text() for path in tmp_path.glob("*.ptx"))
    products = set(re.findall(r"wgmma\.mma_async\.(sp\.)?sync\.aligned\.m64n(\d+)k(\d+)", ptx))
    expected = {COMPRESSED_SDDMM: {("", "128", "16")}, COMPRESSED_SPMM: {("sp.", str(dim), "32")}}
    assert products == expected.get(role, set())


def test_only_the_sddmm_knows_the_ratio() -> None:
    """A softmax and a product are compiled once for both."""
    for role in (COMPRESSED_SDDMM, COMPRESSED_SOFTMAX, COMPRESSED_SPMM):
        specs = {compressed_spec(role, 64, "float16", HOPPER, pruning=pruning) for pruning in RATIOS}
        assert len(specs) == (2 if role == COMPRESSED_SDDMM else 1)


CODES = {TWO_OF_FOUR: {4, 8, 12, 9, 13, 14}, ONE_OF_TWO: {8, 12, 9, 13}}


@pytest.mark.parametrize(("kind", "pruning"), [("bf16", TWO_OF_FOUR), ("f16", TWO_OF_FOUR), ("bf16", ONE_OF_TWO)])
def test_selection_and_metadata(kind: str, pruning: Pruning, tmp_path: Path) -> None:
    """Metadata of a warp's 16 rows is that of the plain encoder, bit by bit, with ties, -inf, zeros of both signs; kept
    values are its values, scaled and rounded."""
    run = emitted_selection(kind, pruning, tmp_path)
    random = np.random.default_rng(len(kind))
    codes: set[int] = set()
    for case in range(8):
        scores = random.standard_normal((16, 128)).astype(np.float32)
        if case % 4 == 1:
            scores = np.round(scores * 2)
        if case % 4 == 2:
            scores[random.random(scores.shape) < (0.5, 0.9)[case // 4]] = -np.inf
        if case == 3:
            scores = np.where(random.random(scores.shape) < 0.5, -0.0, 0.0).astype(np.float32)
        count = 128 if case < 4 else int(random.integers(1, 128))
        codes |= check_warp(run, scores, count, 0.37 if case % 2 else 1.0, kind, pruning)
    assert codes == CODES[pruning]


def check_warp(run: Any, rows: np.ndarray, count: int, scale: float, kind: str, pruning: Pruning) -> set[int]:
    """Check a warp's rows, of which only the first ``count`` keys exist; the codes that there were."""
    n = rows.shape[1]
    lane, i = np.arange(32)[:, None], np.arange(n // 2)[None, :]
    key = np.array(slot_keys(n))[8 * (i // 4) + 2 * (lane % 4) + i % 2]
    scores = np.ascontiguousarray(rows[lane // 4 + 8 * (i // 2 % 2), key])
    kept, words = np.zeros((32, n // 8), np.uint32), np.zeros((32, n // 64), np.uint32)
    run(*(ctypes.c_void_p(x.ctypes.data) for x in (scores, kept, words)), count, ctypes.c_float(scale))
    exact = rows.copy()
    exact[:, count:] = -np.inf
    want = encode(exact, pruning)
    # words are of a warp of 16 rows: the first of a tile of 64
    registers = np.full((1, 1, 2, 128), 0x44444444, np.uint32)
    registers[0, 0, :, :32] = words.T
    got = from_registers(registers, 16, n // 16)
    assert np.array_equal(got, want.words)
    # word 2b + r of lane 4g + q: the pair of group 4b + q of row g + 8r
    pairs = kept.view(np.uint16).reshape(8, 4, n // 16, 2, 2).transpose(3, 0, 2, 1, 4).reshape(16, n // 2)
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    wanted = torch.from_numpy(want.values * np.float32(scale)).to(dtype)
    assert torch.equal(torch.from_numpy(pairs.view(np.int16)).view(dtype), wanted)
    return set(np.unique(got[..., None] >> np.arange(0, 16, 4) & 15).tolist())


def emitted_selection(kind: str, pruning: Pruning, folder: Path) -> Any:
    """select(scores float32 (32, 64), kept uint32 (32, 16), words uint32 (32, 2), count, scale): a warp's threads."""
    from tvm.script.ir_builder import IRBuilder
    from tvm.tirx.script.builder import ir as I

    from splatc.codegen.hopper.compressed.selection import Selection
    from splatc.codegen.hopper.emit import named, registers, store
    from tests.test_hopper_pruning import compiled_for_cpu

    sizes = {"scores": ("float32", 64), "kept": ("uint32", 16), "words": ("uint32", 2)}
    with IRBuilder() as builder, I.prim_func():
        I.func_name("select")
        of_warp = {name: named(name, I.match_buffer(I.arg(f"{name}_arg", I.handle()), (32, width), dtype))
                   for name, (dtype, width) in sizes.items()}  # fmt: skip
        count, scale = I.arg("count", I.int32()), I.arg("scale", I.float32())
        I.device_entry()
        I.cta_id([1])
        lane = I.thread_id([32])
        mine = registers("mine", 64)
        for i in range(64):
            store(mine, i, of_warp["scores"][lane, i])
        selection = Selection(128, {"bf16": "bfloat16", "f16": "float16"}[kind], lane, pruning)
        selection.mask(mine, count)
        selection.select(mine, scale)
        selection.encode()
        for i in range(16):
            I.buffer_store(of_warp["kept"], selection.kept[i], [lane, i])
        for i in range(2):
            I.buffer_store(of_warp["words"], selection.words[i], [lane, i])
    function = builder.get().with_attr("global_symbol", "select")
    declared = "float* scores, uint32_t* kept, uint32_t* words, int count, float scale"
    return compiled_for_cpu("select", function, declared, folder)
