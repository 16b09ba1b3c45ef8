"""``splatc doctor``: what works on this machine, and what to install for the rest."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from splatc.cli.output import console, plural, print_json, table
from splatc.codegen import costs
from splatc.codegen.nvcc import find_nvcc
from splatc.codegen.nvrtc import find_nvrtc
from splatc.codegen.toolchain import INSTALL
from splatc.config import Config
from splatc.errors import SplatcError
from splatc.runtime.cache import KernelCache


@dataclass(frozen=True)
class Finding:
    """One line of the report. needed: the CPU path cannot work without it. cure: the command that mends it."""

    what: str
    works: bool
    detail: str
    needed: bool
    cure: str = ""


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(epilog="\b\nExamples:\n  splatc doctor\n  splatc doctor --json")(doctor)


def doctor(json: Annotated[bool, typer.Option("--json", help="A JSON array on stdout.")] = False) -> None:
    """What works on this machine and what to install. Exit code 1 if the CPU path cannot work."""
    findings = examine()
    broken = [f for f in findings if f.needed and not f.works]
    if json:
        print_json([vars(f) for f in findings])
    else:
        colours = {"OK": "green", "MISSING": "bold red", "optional": "yellow"}
        rows = []
        for f in findings:
            state = "OK" if f.works else "MISSING" if f.needed else "optional"
            rows.append(
                (f.what, Text(state, colours[state]), f.detail + (f"\n-> {f.cure}" if f.cure and not f.works else ""))
            )
        console().print(table(("part", "state", "what was found"), rows, left=3))
        verdict = f"missing for the CPU: {', '.join(f.what for f in broken)}" if broken else "the CPU path works"
        console().print(f"{verdict}; {_gpu_verdict({f.what for f in findings if f.works})}")
    if broken:
        raise typer.Exit(1)


def _gpu_verdict(works: set[str]) -> str:
    compiles = bool(works & {"NVRTC", "nvcc"})
    if "GPU" in works:
        return "the GPU path works too" if compiles else "the GPU is there, but nothing that compiles kernels for it"
    return f"no GPU here: CUDA can be generated{' and compiled' if compiles else ''}, not run"


def examine() -> list[Finding]:
    """All findings; a check that fails in an unforeseen way is a finding itself."""
    checks: tuple[tuple[str, bool, Callable[[], Finding]], ...] = (
        ("Python", True, _python),
        *(
            (name, True, lambda name=name: _package(name, True, f"pip install {name}"))  # type: ignore[misc]
            for name in ("numpy", "scipy", "networkx", "lark", "filelock")
        ),
        ("tvm", True, _tvm),
        ("C compiler", True, _compiler),
        ("cache folder", True, _cache),
        ("torch", False, _torch),
        ("GPU", False, _gpu),
        ("NVRTC", False, _nvrtc),
        ("nvcc", False, _nvcc),
        ("cost model", False, _costs),
        ("matplotlib", False, lambda: _package("matplotlib", False, "pip install 'splatc[plot]'", " (pictures)")),
    )
    found = []
    for name, needed, check in checks:
        try:
            found.append(check())
        except Exception as error:
            reason = (str(error).strip().splitlines() or [""])[0]
            found.append(Finding(name, False, f"{type(error).__name__}: {reason}", needed))
    return found


def _costs() -> Finding:
    cure = "on a Hopper GPU: splatc tune --calibrate -o costs.json; then SPLATC_COSTS=costs.json"
    return Finding("cost model", True, f"Hopper kernels as measured on: {costs.source()}", False, cure)


def _python() -> Finding:
    works = (3, 10) <= sys.version_info < (3, 14)
    return Finding(
        "Python", works, f"{platform.python_version()} at {sys.executable}", True, "install Python 3.10 to 3.13"
    )


def _package(name: str, needed: bool, cure: str, use: str = "") -> Finding:
    if importlib.util.find_spec(name) is None:
        return Finding(name, False, f"not installed{use}", needed, cure)
    try:
        return Finding(name, True, metadata.version(name), needed)
    except metadata.PackageNotFoundError:
        return Finding(name, True, "installed", needed)


def _tvm() -> Finding:
    cure = "pip install 'apache-tvm==0.27.0.post1'"
    if importlib.util.find_spec("tvm") is None:
        return Finding("tvm", False, "not installed (the code generator)", True, cure)
    script = (
        "import tvm; from tvm.target.codegen import llvm_version_major as v, llvm_get_system_cpu as c; "
        "print(tvm.__version__, 'with LLVM', v(), 'for', c())"
    )
    done = _python_says(script)  # in a process of its own: a broken build may crash
    lines = (
        done.stdout.split("\n")[0] if done.returncode == 0 else done.stderr.strip().rpartition("\n")[2]
    ) or "crashed"
    return Finding("tvm", done.returncode == 0, lines, True, cure)


def _compiler() -> Finding:
    found = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    cure = "apt install gcc (or your system's C compiler)"
    return Finding(
        "C compiler", found is not None, found or "none of cc, gcc, clang (they link the kernels)", True, cure
    )


def _cache() -> Finding:
    config = Config.from_env()
    if config.disable_cache:
        return Finding("cache folder", True, "off: SPLATC_DISABLE_CACHE is set, every process compiles its own", True)
    try:
        entries = KernelCache(config.cache_dir, config.cache_size)
        problem = _folder_problem(config.cache_dir)
    except SplatcError as error:
        return Finding("cache folder", False, str(error), True, "see above")
    detail = f"{config.cache_dir}, {plural(len(entries.entries()), 'kernel')}"
    return Finding(
        "cache folder", not problem, problem or detail, False, "set SPLATC_CACHE_DIR to a folder of your own"
    )


def _folder_problem(path: Path) -> str:
    from splatc.runtime.guard import check_ancestors, check_folder

    path = Path(os.path.realpath(path))
    check_ancestors(path)
    exists = check_folder(path)
    there = path if exists else next(p for p in path.parents if p.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            return ""
    except OSError as error:
        return f"{there} cannot be written to ({error.strerror}): every process compiles its own kernels"


def _torch() -> Finding:
    if importlib.util.find_spec("torch") is None:
        return Finding(
            "torch",
            False,
            "not installed (torch tensors; NumPy arrays work without)",
            False,
            "pip install 'splatc[torch]'",
        )
    done = _python_says("import torch; print(torch.__version__, 'CUDA', torch.version.cuda or 'none')")
    text = done.stdout.strip() if done.returncode == 0 else done.stderr.strip().rpartition("\n")[2]
    return Finding("torch", done.returncode == 0, text, False, "pip install 'splatc[torch]'")


def _gpu() -> Finding:
    script = (
        "import torch; n = torch.cuda.device_count() if torch.cuda.is_available() else 0; "
        "c = [torch.cuda.get_device_capability(i) for i in range(n)]; "
        "print(n, *('%s sm_%d%d (%s kernel)' % (torch.cuda.get_device_name(i), *c[i], "
        "'Hopper' if c[i] == (9, 0) else 'portable') for i in range(n)), sep='; ')"
    )
    done = _python_says(script)
    count, _, names = done.stdout.strip().partition("; ")
    works = done.returncode == 0 and count not in ("", "0")
    cure = "an NVIDIA GPU with its driver, and a build of torch with CUDA; CUDA source can be generated without"
    return Finding("GPU", works, names if works else "none that torch can use", False, cure)


def _nvcc() -> Finding:
    found = find_nvcc()
    cure = "install the CUDA toolkit: https://developer.nvidia.com/cuda-downloads (or set CUDA_HOME)"
    if found is None:
        return Finding(
            "nvcc", False, "not on PATH, in CUDA_HOME or /usr/local/cuda (nothing needs it where NVRTC is)", False, cure
        )
    done = subprocess.run([found, "--version"], capture_output=True, text=True, check=False, timeout=60)
    release = next((line.strip() for line in done.stdout.splitlines() if "release" in line), "no version")
    return Finding("nvcc", done.returncode == 0, f"{found}: {release}", False, cure)


def _nvrtc() -> Finding:
    found = find_nvrtc()
    detail = "no library with its headers in pip's packages or a CUDA toolkit (compiles kernels for a GPU)"
    return Finding("NVRTC", found is not None, str(found.library) if found else detail, False, INSTALL)


def _python_says(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)
