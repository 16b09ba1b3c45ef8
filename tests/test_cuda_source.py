"""The portable CUDA kernel without a GPU: compilers take it without spills, and its logic runs on the CPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest

from splatc.codegen.build import device_source
from splatc.codegen.cuda import attention_cuda, choose_blocking
from splatc.codegen.emitted import parse_signatures
from splatc.codegen.kernel import KernelSpec
from splatc.codegen.nvcc import compile_nvcc, find_nvcc
from splatc.codegen.nvrtc import compile_nvrtc, find_nvrtc
from splatc.codegen.ptxas import check_report, read_report
from splatc.codegen.target import Target
from splatc.codegen.variables import arrays_to_variables
from splatc.errors import Unsupported
from tests import cuda_on_cpu, kernel_tables

COMPILERS = [
    pytest.param(compile_nvrtc, marks=pytest.mark.skipif(find_nvrtc() is None, reason="needs NVRTC"), id="nvrtc"),
    pytest.param(compile_nvcc, marks=pytest.mark.skipif(find_nvcc() is None, reason="needs nvcc"), id="nvcc"),
]
needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ with C++20")
CASES = {case.name: case for case in kernel_tables.all_cases()}
NAME = "splatc_attention_kernel"


def make_spec(d: int, dv: int, dtype: str, arch: str = "sm_80", m: int = 64, n: int = 64) -> KernelSpec:
    return KernelSpec("portable", d, dv, dtype, m, n, Target("cuda", arch))


@cache
def emit(spec: KernelSpec) -> str:
    """The device code."""
    return device_source(attention_cuda(spec), spec.target.arch)


@cache
def emulated(spec: KernelSpec) -> Callable[..., None]:
    """The kernel on the CPU: compiled once for all cases."""
    with TemporaryDirectory(prefix="splatc-emulated-") as folder:
        return cuda_on_cpu.compile_on_cpu(emit(spec), Path(folder))


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize(
    ("d", "dv", "dtype"),
    [(64, 64, "float32"), (128, 128, "bfloat16"), (256, 256, "float16"), (40, 24, "bfloat16")],
)
def test_compiles_without_spills(d: int, dv: int, dtype: str, arch: str, compiler: Any) -> None:
    compiled = compiler(emit(make_spec(d, dv, dtype, arch)), arch)
    check_report(compiled.log, arch)
    usage = read_report(compiled.log)[NAME]
    assert 0 < usage.registers <= 255 and usage.stack_bytes == usage.spill_bytes == 0
    assert "warning" not in compiled.log.lower(), compiled.log
    assert compiled.cubin.startswith(b"\x7fELF") and f".target {arch}" in compiled.ptx
    assert f".entry {NAME}" in compiled.ptx


def test_what_the_launch_must_give() -> None:
    (signature,) = parse_signatures(emit(make_spec(64, 48, "bfloat16")))
    emitted = attention_cuda(make_spec(64, 48, "bfloat16"))
    assert (signature.name, signature.threads) == (NAME, 256)
    assert [(f.name, f.threads) for f in emitted.functions] == [(NAME, 256)]
    kinds = {name: kind for kind, name in signature.parameters}
    assert kinds["q_flat_ptr"] == kinds["work_ptr"] == "pointer" and kinds["merge"] == "int32"
    assert kinds["o2"] == kinds["n_work"] == "int64" and kinds["scale"] == "float32"


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90a"])
@pytest.mark.parametrize("d", [1, 64, 96, 128, 256])
def test_shared_memory_fits(d: int, arch: str) -> None:
    limit = 163 if arch == "sm_80" and d == 256 else 99
    if arch == "sm_90a":
        limit = 227
    assert choose_blocking(make_spec(d, d, "float32", arch)).smem_bytes <= limit * 1024


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (make_spec(1024, 64, "float32"), "shared memory"),
        (make_spec(64, 1024, "float32"), "accumulators"),
        (make_spec(64, 64, "float64"), "dtype"),
        (make_spec(64, 64, "float32", m=48), "48 x 64"),
        (make_spec(64, 64, "float32", n=8), "64 x 8"),
        (make_spec(64, 64, "float32", "sm_75"), "sm_75"),
        (make_spec(0, 64, "float32"), "head dims"),
    ],
)
def test_limits_are_named(spec: KernelSpec, words: str) -> None:
    with pytest.raises(Unsupported, match=words):
        attention_cuda(spec)


def element_strides(**arrays: np.ndarray) -> dict[str, int]:
    """The kernel's stride arguments q0, q1, q2, k0, ... in elements."""
    return {f"{n}{i}": x.strides[i] // x.itemsize for n, x in arrays.items() for i in range(3)}


def run_on_cpu(spec: KernelSpec, case: kernel_tables.Case, batch: int = 1) -> tuple[float, float]:
    """Relative error of O and largest error of LSE, emulated, with GQA, strides and poisoned outputs."""
    launch = emulated(spec)
    q_heads, kv_heads, (q_len, kv_len) = 2, 1, case.mask.shape
    rng = np.random.default_rng(7)

    def fresh(*shape: int) -> np.ndarray:
        return cuda_on_cpu.to_bits16(rng.standard_normal(shape).astype(np.float32), spec.dtype)

    q = fresh(batch, q_len, q_heads, spec.head_dim).transpose(0, 2, 1, 3)
    k = fresh(batch, kv_heads, kv_len, spec.head_dim + 3)[..., : spec.head_dim]
    v = fresh(batch, kv_heads, kv_len, spec.v_head_dim)
    o = cuda_on_cpu.to_bits16(np.full((*q.shape[:3], spec.v_head_dim), np.nan, np.float32), spec.dtype)
    lse = np.full(q.shape[:3], np.nan, np.float32)
    scale = 0.8 / spec.head_dim**0.5
    for index, tables in enumerate(case.passes):
        work = tables.work(q_heads)
        arguments: dict[str, Any] = {
            "q_flat_ptr": q, "k_flat_ptr": k, "v_flat_ptr": v, "o_flat_ptr": o, "lse_ptr": lse,
            "work_ptr": work, "items_ptr": tables.items, "entries_ptr": tables.padded_entries(),
            "views_ptr": tables.views, "bits_ptr": tables.bits,
            "batch": batch, "q_heads": q_heads, "kv_heads": kv_heads, "q_len": q_len, "kv_len": kv_len,
            "n_work": len(work), "scale": scale, "merge": int(index > 0),
        }  # fmt: skip
        launch(batch * len(work), **arguments, **element_strides(q=q, k=k, v=v, o=o))
    q, k, v, o = (cuda_on_cpu.from_bits16(np.ascontiguousarray(x), spec.dtype) for x in (q, k, v, o))
    want, want_lse = kernel_tables.reference(q, k, v, case.mask, scale)
    some = np.isfinite(want_lse)
    assert np.isneginf(lse[~some]).all() and (o[~some] == 0).all(), "rows with nothing: O = 0 and LSE = -inf"
    error = np.linalg.norm(o - want) / max(float(np.linalg.norm(want)), 1e-30)
    return float(error), float(np.abs(lse[some] - want_lse[some]).max(initial=0.0))


@needs_gxx
@pytest.mark.parametrize("name", list(CASES))
def test_logic_on_cpu(name: str) -> None:
    error, lse_error = run_on_cpu(make_spec(20, 12, "float32"), CASES[name])
    assert error < 2e-6 and lse_error < 1e-5


@needs_gxx
@pytest.mark.parametrize(
    ("d", "dv", "dtype", "arch", "m", "n"),
    [
        (1, 3, "float32", "sm_80", 64, 64),
        (96, 130, "bfloat16", "sm_80", 64, 64),
        (256, 256, "float16", "sm_86", 64, 64),  # narrow chunks
        (40, 40, "float16", "sm_90a", 128, 32),
        (33, 65, "float32", "sm_80", 32, 80),
    ],
)
def test_shapes_on_cpu(d: int, dv: int, dtype: str, arch: str, m: int, n: int) -> None:
    case = kernel_tables.two_passes(m, n, length=90)
    error, lse_error = run_on_cpu(make_spec(d, dv, dtype, arch, m, n), case, batch=2)
    assert error < {"float32": 2e-6, "float16": 5e-4, "bfloat16": 4e-3}[dtype] and lse_error < 1e-5


def test_arrays_become_variables_where_only_numbers_index_them() -> None:
    source = """
__device__ void helper(float* top_ptr) { top_ptr[0] = 1; }
extern "C" __global__ void a(float* p) {
  alignas(64) float top_ptr[2];
  alignas(64) unsigned int top_ptr_1[1];
  alignas(64) float turn_ptr[4];
  alignas(64) half passed_ptr[8];
  top_ptr[1] = max(top_ptr[0], p[0]);
  take((&(top_ptr_1[0])), passed_ptr, passed_ptr[3]);
  turn_ptr[i] = turn_ptr[2];
}
extern "C" __global__ void b(float* p) {
  alignas(64) float turn_ptr[1];
  turn_ptr[0] = p[1];
}
"""
    assert arrays_to_variables(source) == """
__device__ void helper(float* top_ptr) { top_ptr[0] = 1; }
extern "C" __global__ void a(float* p) {
  float top_ptr_at0, top_ptr_at1;
  unsigned int top_ptr_1_at0;
  alignas(64) float turn_ptr[4];
  alignas(64) half passed_ptr[8];
  top_ptr_at1 = max(top_ptr_at0, p[0]);
  take((&(top_ptr_1_at0)), passed_ptr, passed_ptr[3]);
  turn_ptr[i] = turn_ptr[2];
}
extern "C" __global__ void b(float* p) {
  float turn_ptr_at0;
  turn_ptr_at0 = p[1];
}
"""


def test_no_torch_is_loaded_to_generate(tmp_path: Path) -> None:
    """In a fresh process with an empty cache: TVM would bring it along, for three seconds."""
    script = """
import sys, splatc
kernel = splatc.compile("causal()", seq_len=100, head_dim=64, dtype="bfloat16", target="sm_90a").kernel
assert "wgmma" in kernel.source and "tvm" in sys.modules
print("torch" in sys.modules)
"""
    env = {**os.environ, "SPLATC_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr
