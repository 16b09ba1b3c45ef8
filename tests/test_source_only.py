"""Where TVM could run kernels it gives sources too, without compiling them; others' compilations are not touched."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from threading import Thread

import pytest

from splatc.codegen import source_only as module
from splatc.codegen.nvcc import toolkits
from splatc.codegen.source_only import COMPILE, source_only

tvm_ffi = pytest.importorskip("tvm_ffi")

# What TVM's CUDA runtime wants of a driver before it does anything.
DRIVER = ("cuDeviceGetName", "cuFuncSetAttribute", "cuGetErrorName", "cuGetErrorString", "cuLaunchKernelEx",
          "cuModuleGetFunction", "cuModuleLoadData", "cuModuleUnload", "cuTensorMapEncodeTiled")  # fmt: skip
EMIT = """
from contextlib import nullcontext
import tvm
from splatc.codegen import build, source_only
from splatc.codegen.kernel import kernel_spec
from splatc.codegen.target import Target
asked = []
tvm.register_global_func("tvm_callback_cuda_compile", lambda code: asked.append(code) or b"theirs", override=True)
spec = kernel_spec(64, None, "bfloat16", Target("cuda", "sm_90a"))
source = build.cuda_source(spec)[1]
assert "__global__" in source and not asked
source_only.source_only = nullcontext
assert build.cuda_source(spec)[1] == source and len(asked) == 1, "TVM's runtime for GPUs is not there"
"""


@pytest.fixture
def theirs(monkeypatch):
    """A compilation that TVM would ask for; the former one is back afterwards."""
    former = tvm_ffi.get_global_func(COMPILE, allow_missing=True)
    monkeypatch.setattr(module, "_asked", None)
    tvm_ffi.register_global_func(COMPILE, lambda code: code.encode(), override=True)
    yield
    if former is None:
        tvm_ffi.registry.remove_global_func(COMPILE)
    else:
        tvm_ffi.register_global_func(COMPILE, former, override=True)


def compiled() -> bytes:
    return bytes(tvm_ffi.get_global_func(COMPILE)("code"))


def test_inside_there_is_no_binary_and_outside_theirs(theirs):
    for _ in range(2):
        with source_only():
            assert compiled() == b""
        assert compiled() == b"code"
    with pytest.raises(ValueError, match="mine"), source_only():
        raise ValueError("mine")
    assert compiled() == b"code"


def test_other_threads_get_theirs(theirs):
    found = []
    with source_only():
        other = Thread(target=lambda: found.append(compiled()))
        other.start()
        other.join()
    assert found == [b"code"]


def test_who_registers_later_is_asked_too(theirs):
    with source_only():
        pass
    tvm_ffi.register_global_func(COMPILE, lambda code: b"later", override=True)
    with source_only():
        assert compiled() == b""
    assert compiled() == b"later"


def test_with_a_driver(tmp_path):
    """TVM's CUDA runtime loads beside a driver that does nothing."""
    runtimes = [path for home in toolkits() for path in Path(home).glob("lib*/libcudart.so.1[0-9]")]
    if not runtimes:
        pytest.skip("no CUDA runtime here")
    driver = tmp_path / "driver.c"
    driver.write_text("".join(f"int {name}(void) {{ return 100; }}\n" for name in DRIVER))
    subprocess.run(["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", tmp_path / "libcuda.so.1", driver],
                   check=True)  # fmt: skip
    environment = {**os.environ, "LD_LIBRARY_PATH": f"{tmp_path}:{runtimes[0].parent}"}
    done = subprocess.run([sys.executable, "-c", EMIT], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
