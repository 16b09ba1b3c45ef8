"""Run a generated kernel on a GPU with arguments by name, for tests of kernels alone."""

from __future__ import annotations

import ctypes
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from splatc.codegen.build import build
from splatc.codegen.kernel import KernelSpec
from splatc.runtime.arguments import Arguments
from splatc.runtime.driver import LaunchConfig
from splatc.runtime.gpu import gpu, load_functions


@functools.cache
def compile_on_gpu(spec: KernelSpec) -> Callable[..., None]:
    """A function launch(grid, **arguments by parameter name); tensors stand for their addresses."""
    import torch

    folder = Path(tempfile.mkdtemp(prefix="splatc-test-kernel-"))
    build(spec, folder)
    on = gpu(torch.cuda.current_device())
    (function,) = load_functions(folder, spec.target.arch, on)

    def launch(grid: int, **arguments: Any) -> None:
        values = {name: x.data_ptr() if hasattr(x, "data_ptr") else x for name, x in arguments.items()}
        held = Arguments(function, values, {})
        config = LaunchConfig(
            grid, 1, 1, function.threads, 1, 1, function.smem_bytes, on.framework.stream(on.ordinal)
        )
        on.driver.launch(ctypes.addressof(config), function.kernel, ctypes.addressof(held.array), on.ordinal)

    return launch
