"""Pruning on Hopper without a GPU: the emitted selection and metadata run on the CPU; the kernels compile."""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from splatc.codegen.build import build, device_source
from splatc.codegen.emitted import Emitted
from splatc.codegen.hopper.shape import SMEM_BYTES, shape_of, slot_keys
from splatc.codegen.kernel import KernelSpec, kernel_spec, no_gradients, with_pruning
from splatc.codegen.target import Target
from splatc.codegen.toolchain import find_compiler
from splatc.errors import Unsupported
from splatc.formats.nm import encode, prune
from splatc.ir.score import score_of
from splatc.patterns.pruned import ONE_OF_TWO, RATIOS, TWO_OF_FOUR, Pruning
from tests.cuda_on_cpu import HEADER

pytest.importorskip("tvm")
HOPPER = Target("cuda", "sm_90a")
needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no CUDA compiler (nvcc or NVRTC) is installed")


def spec_of(d: int, dtype: str, tile: tuple[int, int], softcap: bool = False, pruning: Pruning = TWO_OF_FOUR,
            **score: bool) -> KernelSpec:  # fmt: skip
    return with_pruning(kernel_spec(d, None, dtype, HOPPER, score_of(softcap, **score), tile), pruning)


SPECS = [spec_of(128, "bfloat16", (128, 128)), spec_of(64, "float16", (192, 128)),
         spec_of(128, "float16", (128, 64), softcap=True, sinks=True),
         spec_of(128, "bfloat16", (128, 128), pruning=ONE_OF_TWO),
         spec_of(64, "float16", (192, 128), pruning=ONE_OF_TWO),
         spec_of(256, "float16", (128, 64), softcap=True, pruning=ONE_OF_TWO, sinks=True)]  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_compiles_without_spills(spec: KernelSpec, tmp_path: Path) -> None:
    build(spec, tmp_path)  # raises CompileError for spills, local memory and C75xx remarks
    attention = json.loads((tmp_path / "report.json").read_text())["functions"][0]
    assert attention["spill_bytes"] == attention["stack_bytes"] == 0
    assert attention["smem_bytes"] <= SMEM_BYTES
    assert attention["threads"] == 128 * (1 + spec.tile_m // 64)
    ptx = "".join(path.read_text() for path in tmp_path.glob("*.ptx"))
    products = re.findall(r"wgmma\.mma_async\.(sp\.)?sync\.aligned\.m64n(\d+)k(\d+)", ptx)
    assert {("", str(spec.tile_n), "16"), ("sp.", str(spec.v_head_dim), "32")} == set(products)


def test_what_is_refused() -> None:
    plain = kernel_spec(64, None, "float16", HOPPER)
    for spec, why in ((kernel_spec(64, None, "float32", HOPPER), "16-bit"),
                      (replace(plain, score=score_of(False, alibi=True)), "no biases"),
                      (kernel_spec(60, None, "float16", HOPPER), "multiples of 8")):  # fmt: skip
        for pruning in RATIOS:
            with pytest.raises(Unsupported, match=rf"{re.escape(str(pruning))} has no kernel .* {why}"):
                with_pruning(spec, pruning)
    with pytest.raises(Unsupported, match="64 keys"):
        shape_of(replace(SPECS[0], tile_n=112))
    assert "none of nm" in str(no_gradients(SPECS[0]))


# -- the emitted code, run by a warp of std::threads -------------------------------------------------------------------

INTRINSICS = """
inline uint32_t __float_as_uint(float x) { uint32_t u; std::memcpy(&u, &x, 4); return u; }
inline float __uint_as_float(uint32_t x) { float f; std::memcpy(&f, &x, 4); return f; }
inline uint32_t __funnelshift_l(uint32_t low, uint32_t high, uint32_t n) {
  return uint32_t(((uint64_t(high) << 32 | low) << (n & 31)) >> 32);
}
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t s) {
  uint64_t all = uint64_t(y) << 32 | x; uint32_t out = 0;
  for (int i = 0; i < 4; ++i) out |= uint32_t(all >> 8 * (s >> 4 * i & 7) & 255) << 8 * i;
  return out;
}
template <typename T> uint32_t bits_of(float x) { T t(x); uint16_t bits; std::memcpy(&bits, &t, 2); return bits; }
inline uint32_t lane_word[kMaxThreads];
inline uint32_t __shfl_xor_sync(unsigned, uint32_t value, int mask) {
  return exchange(lane_word, value, int(threadIdx.x ^ mask));
}
"""
ASSEMBLY = {  # what the instructions do, of their operands in turn
    "{ .reg .pred upper; setp.lt.f32 upper, %1, %2; @upper or.b32 %0, %0, %3; }": "if ({1} < {2}) {0} |= {3};",
    "max.NaN.f32 %0, %1, %2;": "{0} = {1} != {1} || {2} != {2} ? NAN : fmaxf({1}, {2});",
    "lop3.b32 %0, %1, %2, %3, 0xEA;": "{0} = ({1} & {2}) | {3};",
    "max.f32 %0, %1, %2;": "{0} = fmaxf({1}, {2});",
    "min.f32 %0, %1, %2;": "{0} = fminf({1}, {2});",
    "prmt.b32 %0, %1, %2, %3;": "{0} = __byte_perm({1}, {2}, {3});",
    "cvt.rn.bf16x2.f32 %0, %1, %2;": "{0} = bits_of<nv_bfloat16>({1}) << 16 | bits_of<nv_bfloat16>({2});",
    "cvt.rn.f16x2.f32 %0, %1, %2;": "{0} = bits_of<half>({1}) << 16 | bits_of<half>({2});",
}


def without_assembly(source: str) -> str:
    """The source with instructions as C++; asm that only keeps an order is dropped."""
    source = re.sub(r'asm volatile\("" [^;]*;', "", source)

    def plain(match: re.Match[str]) -> str:
        operands = re.findall(r'"[=+]?[rnf]"\(((?:[^()]|\([^()]*\))*)\)', match[2])
        return ASSEMBLY[match[1]].format(*operands)

    return re.sub(r'asm(?: volatile)?\("([^"]+)"((?:[^;"]|"[^"]*")*)\);', plain, source)


def emitted_pruning(n: int, pruning: Pruning, folder: Path) -> Any:
    """prune(scores float32 (32, n / 2), kept float32 (32, n / 4), words uint32 (32, n / 64)): a warp's, by thread."""
    from tvm.script.ir_builder import IRBuilder
    from tvm.tirx.script.builder import ir as I

    from splatc.codegen.hopper.emit import named, registers, store
    from splatc.codegen.hopper.prune import Pruner

    sizes = {"scores": ("float32", n // 2), "kept": ("float32", n // 4), "words": ("uint32", n // 64)}
    with IRBuilder() as builder, I.prim_func():
        I.func_name("prune")
        of_warp = {name: named(name, I.match_buffer(I.arg(f"{name}_arg", I.handle()), (32, width), dtype))
                   for name, (dtype, width) in sizes.items()}  # fmt: skip
        I.device_entry()
        I.cta_id([1])
        lane = I.thread_id([32])
        mine = {name: registers(f"my_{name}", width, dtype) for name, (dtype, width) in sizes.items()}
        for i in range(n // 2):
            store(mine["scores"], i, of_warp["scores"][lane, i])
        pruner = Pruner(n, lane, pruning)
        pruner.prune(mine["scores"], masked=True)
        pruner.finish(mine["words"])
        for i in range(n // 4):
            I.buffer_store(of_warp["kept"], mine["scores"][i], [lane, i])
        for i in range(n // 64):
            I.buffer_store(of_warp["words"], mine["words"][i], [lane, i])
    function = builder.get().with_attr("global_symbol", "prune")
    return compiled_for_cpu("prune", function, "float* scores, float* kept, uint32_t* words", folder)


def compiled_for_cpu(name: str, function: Any, declared: str, folder: Path) -> Any:
    """A generated kernel of one warp, as a C function with these parameters."""
    source = without_assembly(device_source(Emitted(tvm_module({name: function}), ()), HOPPER.arch, simplified=False))
    first = source.index("__forceinline__ __device__ void splatc_")
    helpers, kernel = source[first : (at := source.rindex('extern "C" __global__'))], source[at:]
    call = f"{name}_kernel({arguments_of(name, kernel)});"
    (folder / "run.cpp").write_text(
        f'#include "{HEADER}"\n#define uint unsigned int\n{INTRINSICS}{helpers}\n{kernel}\n'
        f'extern "C" void run({declared}) {{ run_grid(1, 32, [=] {{ {call} }}); }}\n'
    )
    command = ["g++", "-std=c++20", "-O1", "-w", "-shared", "-fPIC", str(folder / "run.cpp")]
    subprocess.run([*command, "-o", str(folder / "run.so")], check=True, capture_output=True, text=True)
    return ctypes.CDLL(str(folder / "run.so")).run


def tvm_module(functions: dict[str, Any]) -> Any:
    import tvm

    return tvm.IRModule(functions)


def arguments_of(name: str, kernel: str) -> str:
    """The names of the kernel's parameters, as the caller has them."""
    names = re.findall(r"(\w+?)(?:_ptr)?\s*[,)]", kernel[kernel.index(f"{name}_kernel(") : kernel.index("{")])
    return ", ".join(names)


@pytest.mark.parametrize("n", [64, 128])
def test_selection_and_metadata(n: int, tmp_path: Path) -> None:
    """Kept scores and metadata of a warp's 16 rows are those of the plain encoder, at the places that wgmma reads."""
    run = emitted_pruning(n, TWO_OF_FOUR, tmp_path)
    random = np.random.default_rng(n)
    for case in range(12):
        rows = random.standard_normal((16, n)).astype(np.float32)
        if case % 3 == 1:
            rows = np.round(rows, 1) if case < 6 else np.round(abs(rows))  # ties: checked where they are defined
            rows = abs(rows)
        if case % 3 == 2:
            rows[random.random(rows.shape) < (0.5, 0.9)[case % 2]] = -1e30
        if case == 11:
            rows[:] = 0
        check_warp(run, rows, n)


def check_warp(run: Any, rows: np.ndarray, n: int) -> None:
    masked = np.where(rows < -1e29, -np.inf, rows).astype(np.float64)
    at, values = pruned_warp(run, rows, n)
    assert (at[..., 0] != at[..., 1]).all()
    dense = np.full((16, n // 4, 4), -np.inf)
    np.put_along_axis(dense, at, values.astype(np.float64), -1)
    want = prune(masked, TWO_OF_FOUR)
    finite = np.isfinite(want)
    assert np.array_equal(np.isfinite(dense.reshape(16, n)), finite)
    assert np.allclose(dense.reshape(16, n)[finite], want[finite], rtol=2.0**-16, atol=1e-40)
    full = np.isfinite(masked.reshape(16, -1, 4)).sum(-1) >= 2  # of others one nibble is as good as another
    low, high = np.sort(at, -1)[..., 0], np.sort(at, -1)[..., 1]
    ordered = encode(masked, TWO_OF_FOUR).words[..., None] >> 4 * np.arange(4) & 15
    assert np.array_equal((low | high << 2)[full], ordered.reshape(16, -1)[full])


@pytest.mark.parametrize("n", [64, 128])
def test_one_of_two_is_exact(n: int, tmp_path: Path) -> None:
    """1:2: kept scores and metadata are the encoder's bit by bit, with ties of any sign, denormals, -inf; NaN stays."""
    run = emitted_pruning(n, ONE_OF_TWO, tmp_path)
    random = np.random.default_rng(n)
    for case in range(8):
        rows = random.standard_normal((16, n)).astype(np.float32)
        if case % 4 == 1:
            rows = np.round(rows * 2)
        if case % 4 == 2:
            rows[random.random(rows.shape) < (0.5, 0.9)[case // 4]] = -np.inf
        if case % 4 == 3:
            size = np.float32(0 if case == 3 else 1e-43) * random.integers(3, size=rows.shape)
            rows = np.copysign(size, rows).astype(np.float32)
        at, values = pruned_warp(run, rows, n)
        want = encode(rows, ONE_OF_TWO)
        nibbles = want.words[..., None] >> 4 * np.arange(4) & 15
        assert np.array_equal(at[..., 0] | at[..., 1] << 2, nibbles.reshape(16, -1))
        assert np.array_equal(values.reshape(16, -1), want.values)
    rows[random.random(rows.shape) < 0.1] = np.nan
    _, values = pruned_warp(run, rows, n)
    assert np.array_equal(np.isnan(values.reshape(16, -1)), np.isnan(rows.reshape(16, -1, 2)).any(-1))


def pruned_warp(run: Any, rows: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(where in each group of four its two kept scores are, these) of a warp's rows: (16, n / 4, 2)."""
    lane, i = np.arange(32)[:, None], np.arange(n // 2)[None, :]
    key = np.array(slot_keys(n))[8 * (i // 4) + 2 * (lane % 4) + i % 2]
    scores = np.ascontiguousarray(rows[lane // 4 + 8 * (i // 2 % 2), key])
    kept, words = np.zeros((32, n // 4), np.float32), np.zeros((32, n // 64), np.uint32)
    run(*(ctypes.c_void_p(x.ctypes.data) for x in (scores, kept, words)))
    # metadata: lane 4g + b of a word has 16-key block b; rows g and g + 8 in its halves
    nibbles = np.zeros((16, n // 4), np.int64)
    for w in range(n // 64):
        for r in range(2):
            for j in range(4):
                nibbles[8 * r : 8 * r + 8, w * 16 + j : w * 16 + 16 : 4] = (
                    words[:, w].reshape(8, 4) >> np.uint32(16 * r + 4 * j) & 15)  # fmt: skip
    # values: register 4b + 2r + c of lane 4g + q is kept score c of group 4b + q
    values = kept.reshape(8, 4, n // 16, 2, 2).transpose(3, 0, 2, 1, 4).reshape(16, n // 4, 2)
    return np.stack([nibbles & 3, nibbles >> 2], -1), values
