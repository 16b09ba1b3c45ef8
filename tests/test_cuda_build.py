"""From generated CUDA to a folder with a cubin: signatures, compilers, ptxas's report. Needs no GPU."""

from __future__ import annotations

import ctypes
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from splatc.codegen import toolchain
from splatc.codegen.build import build
from splatc.codegen.emitted import functions_apart, parse_signatures
from splatc.codegen.nvcc import compile_nvcc, find_nvcc
from splatc.codegen.nvrtc import compile_nvrtc, find_nvrtc
from splatc.codegen.ptxas import Compiled, Usage, check_report, first_error, read_report
from splatc.codegen.target import Target
from splatc.errors import CompileError, CudaError, Unsupported
from splatc.runtime.arguments import Arguments, Function, Map
from splatc.runtime.driver import Driver, LaunchConfig
from splatc.runtime.kernel import Kernel, key_fields
from tests.test_cuda_source import COMPILERS, make_spec

# -- signatures --------------------------------------------------------------------------------------------------------

ATTEND = """
extern "C" __global__ void __launch_bounds__(384, 1) attend_kernel(float* __restrict__ lse_ptr, \
const __grid_constant__ CUtensorMap q_map0, int64_t o_seq, int merge, float scale)"""
SOURCE = f"""{ATTEND};{ATTEND} {{
}}
extern "C" __global__ void __launch_bounds__(256) combine_kernel(nv_bfloat16* __restrict__ o_ptr) {{
}}
"""


def test_each_function_is_found_once() -> None:
    attend, combine = parse_signatures(SOURCE)
    assert (attend.name, attend.threads) == ("attend_kernel", 384)
    assert attend.parameters == (
        ("pointer", "lse_ptr"), ("map", "q_map0"), ("int64", "o_seq"), ("int32", "merge"), ("float32", "scale"),
    )  # fmt: skip
    assert (combine.name, combine.threads, combine.parameters) == ("combine_kernel", 256, (("pointer", "o_ptr"),))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("int merge", "int cse_v12", "attend_kernel: TVM made parameter cse_v12 of an expression"),
        ("int merge", "double merge", "attend_kernel: parameter 'double merge' is of a kind"),
        ("__global__", "__device__", "no __global__ function"),
    ],
)
def test_what_no_launch_could_give(old: str, new: str, message: str) -> None:
    with pytest.raises(CompileError, match=message):
        parse_signatures(SOURCE.replace(old, new))


def test_functions_apart() -> None:
    source = f"#include <one.h>\n// and\n{SOURCE}"
    lines, apart = source.splitlines(), functions_apart(source)
    assert list(apart) == ["attend_kernel", "combine_kernel"]
    for name, text in apart.items():
        assert text.startswith("#include <one.h>\n// and\n") and [f.name for f in parse_signatures(text)] == [name]
        numbered = re.search(r"#line (\d+)\n(.*)", text)
        assert numbered is not None and lines[int(numbered[1]) - 1] == numbered[2] and name in numbered[2]
        assert text.count("{") == 1, "its body and no declaration"


# -- ptxas's report ----------------------------------------------------------------------------------------------------

REPORT = """ptxas info    : 2 bytes gmem
ptxas info    : Compiling entry function 'combine_kernel' for 'sm_90a'
ptxas info    : Function properties for combine_kernel
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers
ptxas info    : Compiling entry function 'attend_kernel' for 'sm_90a'
ptxas info    : Function properties for attend_kernel
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers
"""
SERIAL = "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ..."


def test_the_report_has_every_function() -> None:
    assert read_report(REPORT) == {"combine_kernel": Usage(40, 0, 0), "attend_kernel": Usage(168, 16, 12)}
    with pytest.raises(CompileError, match="gave no report"):
        read_report("all is well")


@pytest.mark.parametrize(
    ("log", "quoted"),
    [(REPORT, "16 bytes stack frame, 8 bytes spill stores"), (SERIAL, "C7510.*wgmma.mma_async"),
     ("ptxas warning : Local memory used for function 'f', size of stack frame: 8 bytes", "Local memory used")],
)  # fmt: skip
def test_what_ptxas_complains_of_is_an_error(log: str, quoted: str) -> None:
    with pytest.raises(CompileError, match=f"not fit for sm_90a: ptxas says .*{quoted}") as error:
        check_report(log, "sm_90a")
    assert "\n" not in str(error.value)


def test_a_clean_report_passes() -> None:
    check_report("\n".join(REPORT.splitlines()[:5]), "sm_90a")


# -- compilers ---------------------------------------------------------------------------------------------------------

SPILLS = """
extern "C" __global__ void __launch_bounds__(1024, 2) f(float* x, int n) {
  float a[64];
  for (int i = 0; i < 64; ++i) a[i] = x[i * 7 + threadIdx.x];
  for (int j = 0; j < n; ++j) for (int i = 0; i < 64; ++i) a[i] = a[i] * a[(i + 1) % 64] + x[j + i];
  for (int i = 0; i < 64; ++i) x[i + threadIdx.x] = a[i];
}
"""


@pytest.mark.parametrize("compiler", COMPILERS)
def test_spills_are_found(compiler: Any) -> None:
    compiled = compiler(SPILLS, "sm_90a")
    assert read_report(compiled.log)["f"].spill_bytes > 0
    with pytest.raises(CompileError, match=r"bytes spill stores|Local memory"):
        check_report(compiled.log, "sm_90a")


@pytest.mark.parametrize("compiler", COMPILERS)
def test_errors_are_one_line(compiler: Any) -> None:
    for source, arch, message in (
        ("int f( {", "sm_80", "failed for sm_80: .*error"),
        (SPILLS, "sm_12345", "failed for sm_12345: .*(arch|sm_12345)"),
    ):
        with pytest.raises(CompileError, match=message) as error:
            compiler(source, arch)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_tensor_maps_and_traits_compile(compiler: Any) -> None:
    """What generated sources lean on, whoever compiles them."""
    source = """
#ifdef __CUDACC_RTC__
#include <cuda/std/cstdint>
#include <cuda/std/type_traits>
using cuda::std::uint32_t;
namespace std { using cuda::std::is_same_v; using cuda::std::is_integral; using cuda::std::conditional; }
#else
#include <cstdint>
#include <type_traits>
#include <cuda.h>
#endif
#include <cuda_bf16.h>
#include <cuda_fp16.h>
static_assert(sizeof(CUtensorMap) == 128 && alignof(CUtensorMap) == 128, "");
static_assert(std::is_integral<uint32_t>::value && !std::is_integral<float>::value, "");
static_assert(std::is_same_v<std::conditional<true, int, float>::type, int>, "");
extern "C" __global__ void __launch_bounds__(32) f(const __grid_constant__ CUtensorMap m, nv_bfloat16* x) {
  x[0] = __float2bfloat16(2.0f);
}
"""
    assert read_report(compiler(source, "sm_90a").log).keys() == {"f"}


@pytest.mark.skipif(find_nvrtc() is None or find_nvcc() is None, reason="needs NVRTC and nvcc")
def test_the_user_may_choose_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, found = make_spec(64, 64, "bfloat16"), {}
    for name in ("nvrtc", "nvcc", ""):
        monkeypatch.setenv("SPLATC_CUDA_COMPILER", name)
        found[name] = toolchain.find_compiler()
        assert key_fields(spec)["cuda"] == found[name].identity
    assert [one.name for one in found.values()] == ["nvrtc", "nvcc", "nvrtc"]
    assert [one.compile.func for one in found.values()] == [compile_nvrtc, compile_nvcc, compile_nvrtc]


def test_compilers_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPLATC_CUDA_COMPILER", raising=False)
    monkeypatch.setattr(toolchain, "find_nvrtc", lambda: None)
    monkeypatch.setattr(toolchain, "find_nvcc", lambda: __file__)
    only = toolchain.find_compiler()
    assert only is not None and only.name == "nvcc"
    monkeypatch.setenv("SPLATC_CUDA_COMPILER", "nvrtc")
    with pytest.raises(Unsupported, match=r"nvrtc is not installed: .*splatc\[cuda\]"):
        toolchain.find_compiler()
    monkeypatch.delenv("SPLATC_CUDA_COMPILER")
    monkeypatch.setattr(toolchain, "find_nvcc", lambda: None)
    assert toolchain.find_compiler() is None and key_fields(make_spec(64, 64, "bfloat16"))["cuda"] == "none"


# -- a built folder ----------------------------------------------------------------------------------------------------


def faked(monkeypatch: pytest.MonkeyPatch, log: str, apart: bool = False) -> None:
    compiled = Compiled(b"\x7fELF", ".version 8.0", log)
    one = toolchain.CudaCompiler("nvrtc", "nvrtc:1", lambda source, arch: compiled, apart)
    monkeypatch.setattr("splatc.codegen.build.find_compiler", lambda: one)


LOG = "\n".join(REPORT.splitlines()[:5]).replace("combine_kernel", "splatc_attention_kernel") + "\n"


@pytest.mark.parametrize(("apart", "image"), [(False, "kernel"), (True, "splatc_attention_kernel")])
def test_a_built_folder(apart: bool, image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tvm")
    faked(monkeypatch, LOG, apart)
    spec = make_spec(64, 64, "bfloat16")
    build(spec, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "kernel.tir.py", "kernel.cu", f"{image}.cubin", f"{image}.ptx", "kernel.log", "report.json",
    }  # fmt: skip
    assert Kernel(spec, tmp_path).ptx == ".version 8.0"
    report = json.loads((tmp_path / "report.json").read_text())
    (function,) = report["functions"]
    assert report["compiler"] == "nvrtc" and report["target"] == "cuda:sm_80" and function["image"] == image
    assert (function["name"], function["threads"], function["registers"]) == ("splatc_attention_kernel", 256, 40)
    assert ["pointer", "q_flat_ptr"] in function["parameters"] and function["smem_bytes"] > 48 * 1024


def test_a_kernel_that_spills_is_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tvm")
    faked(monkeypatch, LOG + SERIAL)
    with pytest.raises(CompileError, match="C7510"):
        build(make_spec(64, 64, "bfloat16"), tmp_path)
    assert not (tmp_path / "kernel.cubin").exists() and (tmp_path / "kernel.log").exists()


def test_source_only_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tvm")
    monkeypatch.setattr("splatc.codegen.build.find_compiler", lambda: None)
    build(make_spec(64, 64, "bfloat16"), tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"kernel.tir.py", "kernel.cu", "report.json"}
    assert json.loads((tmp_path / "report.json").read_text())["compiler"] is None


def test_the_first_error_of_a_log() -> None:
    assert first_error("k.cu(3): warning: hm\nk.cu(4): error: no\nk.cu(5): error: no") == "k.cu(4): error: no"
    assert first_error("\nall lost\n") == "all lost" and first_error("") == "no message"


# -- the driver --------------------------------------------------------------------------------------------------------


class Calls:
    """A libcuda whose functions return the statuses they are given, in turn, then 0."""

    def __init__(self, **statuses: list[int]) -> None:
        self.made: list[str] = []
        for name in ("cuGetErrorName", "cuGetErrorString", "cuDeviceGet", "cuDeviceGetAttribute",
                     "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent", "cuLibraryLoadData", "cuLibraryGetKernel",
                     "cuKernelSetAttribute", "cuOccupancyMaxActiveBlocksPerMultiprocessor", "cuTensorMapEncodeTiled",
                     "cuTensorMapReplaceAddress", "cuLaunchKernelEx", "cuMemAlloc_v2", "cuMemcpyHtoD_v2",
                     "cuStreamSynchronize"):  # fmt: skip
            setattr(self, name, self.function(name, statuses.get(name, [])))

    def function(self, name: str, statuses: list[int]) -> Any:
        def call(*arguments: Any) -> int:
            self.made.append(name)
            if name == "cuGetErrorName":
                arguments[1]._obj.value = b"CUDA_ERROR_X"
            elif name == "cuGetErrorString":
                arguments[1]._obj.value = b"it did not work"
            return statuses.pop(0) if statuses else 0

        return call


def test_errors_have_the_drivers_words_and_advice() -> None:
    driver = Driver(Calls(cuLibraryLoadData=[222]))
    with pytest.raises(CudaError, match=r"loading a kernel failed: it did not work \(CUDA_ERROR_X\): update the"):
        driver.load(b"")
    driver = Driver(Calls(cuLaunchKernelEx=[999]))
    with pytest.raises(CudaError, match="starting a kernel failed: it did not work"):
        driver.launch(None, 1, None, 0)


def test_memory_of_the_driver() -> None:
    calls = Calls(cuMemAlloc_v2=[0, 2])
    driver = Driver(calls)
    driver.upload(64, 20, 0)
    assert calls.made == ["cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent", "cuMemAlloc_v2",
                          "cuMemcpyHtoD_v2", "cuStreamSynchronize"]  # fmt: skip
    with pytest.raises(CudaError, match=r"allocating 20 bytes on GPU 0 failed: it did not work .*: free GPU memory"):
        driver.upload(64, 20, 0)


def test_a_thread_without_a_context_gets_one() -> None:
    calls = Calls(cuLaunchKernelEx=[201])
    Driver(calls).launch(None, 1, None, 0)
    assert calls.made == ["cuLaunchKernelEx", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent",
                          "cuLaunchKernelEx"]  # fmt: skip


def test_an_old_driver_is_named() -> None:
    with pytest.raises(Unsupported, match=r"older than CUDA 12.*update it"):
        Driver(SimpleNamespace(cuGetErrorName=lambda: 0))


def test_launch_config_is_the_drivers() -> None:
    assert ctypes.sizeof(LaunchConfig) == 56 and LaunchConfig.stream.offset == 32


def test_arguments_lie_where_the_driver_reads_them() -> None:
    parameters = (("pointer", "p"), ("int32", "i"), ("map", "m"), ("int64", "l"), ("float32", "f"))
    memory = (ctypes.c_uint8 * 128)()
    maps = {"m": Map("q", memory, ctypes.addressof(memory))}
    values = {"p": 1 << 40, "i": -3, "l": -(1 << 40), "f": 0.5, "x": 1}
    held = Arguments(Function("f", 1, 32, 0, parameters), values, maps)
    read = [kind.from_address(at).value for kind, at in zip(
        (ctypes.c_uint64, ctypes.c_int32, ctypes.c_uint8, ctypes.c_int64, ctypes.c_float), held.array)]  # fmt: skip
    assert read == [1 << 40, -3, 0, -(1 << 40), 0.5] and held.array[2] == maps["m"].address
    held.slot("f").value = 2.0
    assert ctypes.c_float.from_address(held.array[4]).value == 2.0 and held.slot("x") is None


def test_a_target_without_a_gpu_runs_on_later_ones() -> None:
    """What resolve_target promises: sm_80 has no suffix, so its PTX is kept and loads anywhere later."""
    from splatc.codegen.target import OLDEST
    from splatc.runtime.gpu import image_for

    assert Target("cuda", OLDEST).arch == "sm_80" and image_for(OLDEST, (12, 0)) == ".ptx"
