"""Imports go one way, and `import splatc` is light.

    patterns -> formats -> ir -> codegen -> runtime -> compile and the torch front end -> cli, bench

A module may import its own stage and those to the left of it. errors and config are open to all. Heavy
libraries are imported inside functions, except by the modules that LAZY names; others import those so.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

import splatc

PACKAGE = Path(splatc.__file__).parent
BASE = ("errors", "config")  # everybody's; they import each other only
STAGES = ("patterns", "formats", "ir", "codegen", "runtime")
FRONT = len(STAGES)  # modules directly in splatc/: they see all stages
SHELLS = ("cli", "bench", "__main__")  # and these see everything

HEAVY = {"torch", "jax", "jax_tvm_ffi", "tvm", "tvm_ffi", "scipy", "networkx", "matplotlib"}
BOTH = ("splatc.codegen", "splatc.runtime")
ONLY_IN = {"tvm": ("splatc.codegen",), "tvm_ffi": BOTH, "jax_tvm_ffi": ("splatc.runtime",)}

# Modules written in a heavy library's own terms, and the library: they may import it at the top, and only
# modules with the same licence may import them at the top.
LAZY = {
    "splatc.codegen.cpu*": {"tvm", "tvm_ffi"},  # the emitters
    "splatc.codegen.cuda*": {"tvm", "tvm_ffi"},
    "splatc.codegen.hopper.*": {"tvm", "tvm_ffi"},
    "splatc.runtime.torch_ops": {"torch"},
    "splatc.runtime.torch_products": {"torch"},
    "splatc.nn*": {"torch"},
    "splatc.sparsify.nm": {"torch"},
    "splatc.sparsify.layer": {"torch"},
    "splatc.sparsify.projection": {"torch"},
    "splatc.sparsify.schedule": {"torch"},
    "splatc.sparsify.scores": {"torch"},
    "splatc.sparsify.zero": {"torch"},
    "splatc.runtime.jax_ops": {"jax", "jax_tvm_ffi", "tvm_ffi"},
    "splatc.jax": {"jax", "jax_tvm_ffi", "tvm_ffi"},
    "splatc.distributed*": {"torch"},
    "splatc.integrations.torch*": {"torch"},
    "splatc.integrations.transformers*": {"torch"},
}
LIGHT = {"splatc.codegen.hopper.shape", "splatc.codegen.hopper.backward.shape"}  # all the same


def licence(module: str) -> set[str]:
    if module in LIGHT:
        return set()
    return set().union(*(libraries for pattern, libraries in LAZY.items() if fnmatch(module, pattern)))


def name_of(path: Path) -> str:
    parts = ("splatc", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def rank(module: str) -> int:
    stage = module.split(".")[1] if "." in module else ""
    if stage in BASE:
        return -1
    if stage in SHELLS:
        return FRONT + 1
    return STAGES.index(stage) if stage in STAGES else FRONT


def imports(tree: ast.Module) -> Iterator[tuple[str, int, bool]]:
    """What a file imports: (module, line, at import time). `if TYPE_CHECKING:` is not at import time."""

    def walk(node: ast.AST, top: bool) -> Iterator[tuple[str, int, bool]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            origin = node.module or ""
            names = [f"{origin}.{alias.name}" for alias in node.names]
            yield from ((name if name in MODULES else origin, node.lineno, top) for name in names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in (*node.body, *node.orelse):
                yield from walk(child, top and child not in node.body)
        else:
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            for inner in ast.iter_child_nodes(node):
                yield from walk(inner, top and not inside)

    yield from walk(tree, True)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_left(module):
    faults = []
    for name, line, top in set(imports(ast.parse(MODULES[module].read_text(encoding="utf-8")))):
        where, library = f"{MODULES[module]}:{line}", name.split(".")[0]
        if library == "splatc":
            if rank(name) > rank(module):
                faults.append(f"{where}: {module} imports {name}, which is to the right of it")
            if top and not licence(name) <= licence(module):
                faults.append(f"{where}: {name} is heavy: import it inside the function that needs it")
        if library in HEAVY and top and library not in licence(module):
            faults.append(f"{where}: import {library} inside the function that needs it")
        if library in ONLY_IN and not module.startswith(ONLY_IN[library]):
            faults.append(f"{where}: {library} is for {' and '.join(ONLY_IN[library])} only")
    assert not faults, "\n".join(sorted(faults))


def test_the_checks_see_what_they_should():
    source = """import os
if TYPE_CHECKING:
    import torch
def f():
    from splatc import errors, x
    import tvm.ir
"""
    assert list(imports(ast.parse(source))) == [
        ("os", 1, True),
        ("torch", 3, False),
        ("splatc.errors", 5, False),
        ("splatc", 5, False),
        ("tvm.ir", 6, False),
    ]
    left_to_right = [
        "errors",
        "patterns.base",
        "formats",
        "ir.x",
        "codegen",
        "runtime.cache",
        "compile",
        "cli.main",
    ]
    ranks = [rank(f"splatc.{module}") for module in left_to_right]
    assert ranks == sorted(set(ranks)) and rank("splatc") == rank("splatc.compile")


def loaded_by(statement: str) -> set[str]:
    """The modules that a fresh interpreter has loaded after `statement`."""
    script = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return set(done.stdout.split())


def test_import_splatc_is_light():
    loaded = loaded_by("import splatc")
    assert not loaded & HEAVY
    beyond = loaded - loaded_by("import numpy, dataclasses, pathlib, logging, typing")
    assert len(beyond) < 120, f"import splatc loads {len(beyond)} modules beyond numpy: {sorted(beyond)}"


def test_every_light_module_is_light():
    light = [m for m in MODULES if not licence(m) and not m.endswith("__main__")]
    assert not loaded_by("import " + ", ".join(light)) & HEAVY


def test_an_import_has_no_side_effects(tmp_path):
    """No folder, no log handler, no output."""
    script = "import splatc, logging; assert not any(logging.getLogger(n).handlers for n in ('', 'splatc'))"
    env = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(PACKAGE.parent)}
    env |= {"SPLATC_LOG_LEVEL": "debug", "SPLATC_CACHE_SIZE": "nonsense", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())
