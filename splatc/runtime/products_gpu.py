"""The three kernels on a GPU: what products.py does on a CPU, for torch tensors.

Arguments are put together at each call, and nothing is kept but kernels and tables: any thread may call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import cache
from typing import Any

import numpy as np

from splatc.codegen.kernel import (
    SDDMM,
    SDDMM_FUNCTION,
    SOFTMAX,
    SOFTMAX_BACKWARD_FUNCTION,
    SOFTMAX_FUNCTION,
    SPMM,
    SPMM_FUNCTION,
    SPMM_TRANSPOSED_FUNCTION,
    KernelSpec,
    product_spec,
)
from splatc.codegen.target import Target, arch_of
from splatc.codegen.value_tiles import joined
from splatc.runtime.arguments import Arguments, Function
from splatc.runtime.gpu import DeviceTables, Gpu, gpu, load_functions
from splatc.runtime.gpu_call import Step, config_of, start_of
from splatc.runtime.gradients_gpu import readable
from splatc.runtime.kernel import find_kernel
from splatc.runtime.launch import contiguous_copy, remember
from splatc.runtime.structure import Structure
from splatc.runtime.tensor_map import ALIGNMENT
from splatc.runtime.tensors import dtype_name

WARPS = 8  # rows of a softmax that a block has
BLOCKS, MOST_PARTS = 4, 8  # of sddmm: blocks for each multiprocessor, and blocks that share a row tile to get there

Loader = Callable[[KernelSpec, Gpu], tuple[Function, ...]]


class GpuProducts:
    """The functions of products.py for tensors on one GPU. Raise Unsupported for what kernels there do not take."""

    def __init__(self, on: Gpu, load: Loader) -> None:
        self._gpu, self._load = on, load
        self._functions: dict[tuple[str, int, str], dict[str, Function]] = {}

    def sddmm(self, structure: Structure, q: Any, k: Any, factor: float) -> Any:
        """As ``products.sddmm``."""
        batch, heads, _, dim = (int(n) for n in q.shape)
        function = self._function(SDDMM, dim, q, SDDMM_FUNCTION)
        values = q.new_empty(structure.values_shape(batch, heads))
        if values.numel():
            tensors = {"q": readable(q.detach()), "k": readable(k.detach()), "values": values}
            self._product(function, structure, False, batch, heads, tensors, {"group": heads // int(k.shape[1]),
                          "factor": factor})  # fmt: skip
        return values

    def spmm(self, structure: Structure, values: Any, heads: int, y: Any, factor: float,
             transposed: bool = False) -> Any:  # fmt: skip
        """As ``products.spmm``."""
        batch, y_heads, _, dim = (int(n) for n in y.shape)
        function = self._function(SPMM, dim, y, SPMM_TRANSPOSED_FUNCTION if transposed else SPMM_FUNCTION)
        rows = structure.kv_len if transposed else structure.q_len
        out = y.new_empty((batch, heads, rows, dim))
        if not values.numel() or not y.numel():
            return out.zero_()
        tensors = {"values": _flat(values), "y": readable(y.detach()), "out": out}
        self._product(function, structure, transposed, batch, heads, tensors, {"group": heads // y_heads,
                      "factor": factor, "heads": heads, "rows": rows})  # fmt: skip
        return out

    def softmax(self, structure: Structure, values: Any, heads: int) -> tuple[Any, Any]:
        """As ``products.softmax``."""
        import torch

        function, batch = self._function(SOFTMAX, 1, values, SOFTMAX_FUNCTION), int(values.shape[0])
        p = values.new_empty(values.shape)
        lse = values.new_empty((batch, heads, structure.q_len), dtype=torch.float32)
        if not values.numel():
            return p, lse.fill_(-math.inf)
        self._rows(function, structure, batch, heads, {"values": _flat(values), "p": p, "lse": lse})
        return p, lse

    def softmax_gradient(self, structure: Structure, p: Any, dp: Any, dlse: Any) -> Any:
        """As ``products.softmax_gradient``."""
        function = self._function(SOFTMAX, 1, p, SOFTMAX_BACKWARD_FUNCTION)
        ds = p.new_empty(p.shape)
        if p.numel():
            batch, heads = (int(n) for n in dlse.shape[:2])
            tensors = {"p": _flat(p), "dp": _flat(dp), "dlse": dlse, "ds": ds}
            self._rows(function, structure, batch, heads, tensors)
        return ds

    # -- launches ------------------------------------------------------------------------------------------------------

    def _function(self, role: str, dim: int, like: Any, name: str) -> Function:
        key = role, dim, dtype_name(like)
        if key not in self._functions:
            target = Target("cuda", arch_of(self._gpu.driver.capability(self._gpu.ordinal)))
            spec = product_spec(*key, target)
            loaded = self._load(spec, self._gpu)
            self._functions[key] = {one.name.removesuffix("_kernel"): one for one in loaded}
        return self._functions[key][name]

    def _product(self, function: Function, structure: Structure, transposed: bool, batch: int, heads: int,
                 tensors: Mapping[str, Any], numbers: Mapping[str, float]) -> None:  # fmt: skip
        """Start a product: a block for each row tile of each head."""
        key = self._gpu, heads, transposed
        if key not in structure.ready:
            remember(structure.ready, key, self._upload(tile_tables(structure, heads, transposed)))
        tables, arrays = structure.ready[key]
        works = len(arrays["work"])
        parts = 1
        if function.name.startswith(SDDMM_FUNCTION):  # results of a part are its own
            busy = BLOCKS * self._gpu.driver.multiprocessors(self._gpu.ordinal)
            parts = min(max(busy // (batch * works), 1), MOST_PARTS)
        values: dict[str, float] = {**numbers, "works": works, "parts": parts, "total": int(structure.bases(heads)[-1])}
        for name, x in tensors.items():
            values |= {f"{name}_{axis}": x.stride(i) for i, axis in enumerate(("batch", "head", "seq")) if x.ndim == 4}
        self._start(function, batch * works * parts, {**values, **tables_at(tables, arrays)}, tables, tensors)

    def _rows(self, function: Function, structure: Structure, batch: int, heads: int,
              tensors: Mapping[str, Any]) -> None:  # fmt: skip
        """Start a function over rows: a warp for each."""
        key = self._gpu, heads, None
        if key not in structure.ready:
            remember(structure.ready, key, self._upload(row_tables(structure, heads)))
        tables, arrays = structure.ready[key]
        rows = batch * heads * structure.q_len
        values: dict[str, float] = {"rows": rows, "heads": heads, "q_len": structure.q_len,
                                    "total": int(structure.bases(heads)[-1])}  # fmt: skip
        self._start(function, -(-rows // WARPS), {**values, **tables_at(tables, arrays)}, tables, tensors)

    def _upload(self, arrays: Mapping[str, Any]) -> tuple[DeviceTables, Mapping[str, Any]]:
        return DeviceTables(self._gpu, [arrays]), arrays

    def _start(self, function: Function, blocks: int, values: Mapping[str, float], tables: DeviceTables,
               tensors: Mapping[str, Any]) -> None:  # fmt: skip
        on = self._gpu
        addresses = {f"{name}_ptr": x.data_ptr() for name, x in tensors.items()}
        arguments = Arguments(function, {**values, **addresses, "blocks": blocks}, {})
        step = Step(function, arguments, (blocks, 1, 1), {})
        config = config_of(step)
        with on.framework.on(on.ordinal) if on.framework.device() != on.ordinal else nullcontext():
            config.stream = on.framework.stream(on.ordinal)
            tables.used(config.stream or 0, on.framework.capturing())
            on.driver.launch(*start_of(config, step), on.ordinal)


def tile_tables(structure: Structure, heads: int, transposed: bool) -> Mapping[str, Any]:
    """The tables of a product for so many heads (codegen/hopper/unfused/tiles.py)."""
    pattern_of = structure.head_patterns(heads)
    used = sorted(set(pattern_of))
    tiles, ends = joined([structure.tiles(transposed)[p] for p in used])
    items = {p: np.arange(*ends[i : i + 2]) for i, p in enumerate(used)}
    work = [np.stack([np.full_like(items[p], head), items[p]], 1) for head, p in enumerate(pattern_of)]
    return {**tiles.arrays(), "work": np.concatenate(work).astype(np.int32), "bases": structure.bases(heads)}


def row_tables(structure: Structure, heads: int) -> Mapping[str, Any]:
    """The tables of a softmax for so many heads (codegen/hopper/unfused/softmax.py)."""
    indptr = np.stack([order.indptr for order in structure.orders]).astype(np.int32)
    return {"indptr": indptr, "pattern": np.array(structure.head_patterns(heads), np.int32),
            "bases": structure.bases(heads)}  # fmt: skip


def tables_at(tables: DeviceTables, names: Mapping[str, Any]) -> dict[str, int]:
    """Where the tables lie, by parameter."""
    return {f"{name}_ptr": tables.address(0, name) for name in names}


@cache
def products_on(ordinal: int) -> GpuProducts:
    """Those of a GPU, by torch's number."""
    return GpuProducts(gpu(ordinal), lambda spec, on: load_functions(find_kernel(spec).folder, spec.target.arch, on))


def _flat(values: Any) -> Any:
    """Values as kernels take them: contiguous, and beginning where 16 bytes do."""
    values = values.detach().contiguous()
    return contiguous_copy(values) if values.data_ptr() % ALIGNMENT else values
