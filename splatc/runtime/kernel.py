"""Finding or building a kernel, and loading it."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from splatc.codegen.build import FUNCTION, PTX, REPORT, build, load, source_name
from splatc.codegen.kernel import BACKWARD, KernelSpec, not_hopper
from splatc.codegen.toolchain import find_compiler
from splatc.config import Config
from splatc.errors import Unsupported
from splatc.runtime.cache import KernelCache, source_fingerprint

_log = logging.getLogger("splatc")


@dataclass(frozen=True)
class Kernel:
    """A built kernel: its folder (see codegen/build.py) and how to load it."""

    spec: KernelSpec
    folder: Path

    @property
    def source(self) -> str:
        """The generated CUDA (or, on a CPU, LLVM IR)."""
        return (self.folder / source_name(self.spec)).read_text()

    @property
    def ptx(self) -> str:
        """The PTX of all functions of a CUDA kernel, one image after the other."""
        images = dict.fromkeys(f["image"] for f in json.loads(self.file(REPORT))["functions"])
        return "\n".join(self.file(f"{image}{PTX}") for image in images)

    def file(self, name: str) -> str:
        """The text of another file of the folder, such as "kernel.tir.py" or "report.json"."""
        return (self.folder / name).read_text()

    def load(self, name: str = FUNCTION) -> Callable[..., None]:
        """A function of a CPU kernel, in the argument order of the kernel ABI. (For GPUs: runtime/launch.py.)"""
        return load(self.folder, name)


def kernel_cache(config: Config) -> KernelCache:
    """The cache on disk that the environment asks for."""
    return KernelCache(None if config.disable_cache else config.cache_dir, config.cache_size)


def find_kernel(spec: KernelSpec) -> Kernel:
    """The kernel of a spec, from memory, from the cache on disk or built now."""
    config = Config.from_env()
    if spec.kernel == "portable":
        of_gradients = spec.role == BACKWARD
        why = not_hopper(spec.head_dim, spec.v_head_dim, spec.dtype, spec.target, allow_tf32=of_gradients)
        _say_portable(why or ("gradients must be of 16-bit types" if of_gradients else "it was asked for"))
    return _find(spec, config)


@cache
def _say_portable(why: str) -> None:
    """Once for each reason: people who expect tensor cores should not have to find out from their timings."""
    _log.warning("splatc uses its portable CUDA kernel, without tensor cores (docs/performance.md): for the Hopper "
                 "kernel %s", why)  # fmt: skip


@lru_cache(maxsize=1024)
def _find(spec: KernelSpec, config: Config) -> Kernel:
    cache = kernel_cache(config)
    return Kernel(spec, cache.get_or_build(key_fields(spec), lambda folder: build(spec, folder), label=spec.name))


def key_fields(spec: KernelSpec) -> dict[str, Any]:
    """All that changes a kernel."""
    versions = {name: _version(name, module) for name, module in (("apache-tvm", "tvm"), ("apache-tvm-ffi", "tvm_ffi"))}
    machine = f"{platform.system()}-{platform.machine()}"
    compiler = {"cuda": cuda_identity()} if spec.target.kind == "cuda" else {"cpu": cpu_identity()}
    names = {"score": list(spec.score.names), "learning": list(spec.learning.names)}  # a step has no fields
    known = {**asdict(spec), "target": str(spec.target), **names}
    return {**known, "codegen": source_fingerprint(), **versions, **compiler, "python": platform.python_version(),
            "machine": machine}  # fmt: skip


def cuda_identity() -> str:
    """What tells the CUDA compiler that kernels are compiled with from others."""
    compiler = find_compiler()
    return "none" if compiler is None else compiler.identity


@cache
def cpu_identity() -> str:
    """What tells this machine's CPU from others for a kernel compiled for "native": its model and features."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    kept = sorted(
        {line for line in lines if line.split("\t")[0].strip(" :") in ("model name", "flags", "Features", "CPU part")}
    )
    return hashlib.sha256("\n".join(kept).encode()).hexdigest()[:16]


def _version(name: str, module: str) -> str:
    """The version of an installed package; where it was unpacked without metadata, the state of its files."""
    from importlib import metadata  # slow to import

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            raise Unsupported(f"{name} is not installed: pip install {name}") from None
        stat = Path(spec.origin).stat()
        return f"{spec.origin}:{stat.st_size}:{stat.st_mtime_ns}"
