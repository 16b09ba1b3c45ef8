"""The three kernels on a GPU: what products.py does on a CPU, for torch tensors.

Arguments are put together at each call, and nothing is kept but kernels and tables: any thread may call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from splatc.codegen.hopper.shape import WARPGROUP
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
from splatc.codegen.value_tiles import ValueTiles, joined
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
BLOCKS = 4  # of sddmm for each multiprocessor: fewer row tiles are cut to get there
FEW = 32  # blocks for each multiprocessor, up to which the longest begin first: beyond, neighbours are better together

Ints = NDArray[np.int32]
Uploaded = tuple[DeviceTables, Mapping[str, Any]]  # with the arrays it was made from
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
        """Start a product: blocks with row tiles of a head, or pieces of them."""
        tiles = self._known(structure, (heads, transposed), lambda: tile_tables(structure, heads, transposed))
        key = heads, transposed, function.name, function.threads, batch
        work = self._known(structure, key, lambda: self._work(function, structure, transposed, batch, heads, tiles[1]))
        works = len(work[1]["work"])
        values: dict[str, float] = {**numbers, "works": works, "total": int(structure.bases(heads)[-1])}
        for name, x in tensors.items():
            values |= {f"{name}_{axis}": x.stride(i) for i, axis in enumerate(("batch", "head", "seq")) if x.ndim == 4}
        self._start(function, batch * works, values, [tiles, work], tensors)

    def _work(self, function: Function, structure: Structure, transposed: bool, batch: int, heads: int,
              tiles: Mapping[str, Any]) -> Mapping[str, Ints]:  # fmt: skip
        """Which blocks of a product do what: of each batch entry."""
        rows = work_rows(structure, heads, transposed, tiles["items"])
        multiprocessors = self._gpu.driver.multiprocessors(self._gpu.ordinal)
        if function.name.startswith(SDDMM_FUNCTION):  # results of a piece are its own
            rows = cut(rows, max(BLOCKS * multiprocessors // (batch * len(rows)), 1))
        if batch * len(rows) <= FEW * multiprocessors:
            rows = spread(rows, multiprocessors)
        work = shared(rows, function.threads // WARPGROUP)
        return {"work": described(work, tiles["entries"], structure.bases(heads))}

    def _rows(self, function: Function, structure: Structure, batch: int, heads: int,
              tensors: Mapping[str, Any]) -> None:  # fmt: skip
        """Start a function over rows: a warp for each."""
        tables = self._known(structure, (heads,), lambda: row_tables(structure, heads))
        rows = batch * heads * structure.q_len
        values: dict[str, float] = {"rows": rows, "heads": heads, "q_len": structure.q_len,
                                    "total": int(structure.bases(heads)[-1])}  # fmt: skip
        self._start(function, -(-rows // WARPS), values, [tables], tensors)

    def _known(self, structure: Structure, what: tuple[Any, ...], make: Callable[[], Mapping[str, Any]]) -> Uploaded:
        """Tables of a structure, uploaded once."""
        found: Uploaded | None = structure.ready.get((self._gpu, *what))
        if found is None:
            arrays = make()
            found = DeviceTables(self._gpu, [arrays]), arrays
            remember(structure.ready, (self._gpu, *what), found)
        return found

    def _start(self, function: Function, blocks: int, values: Mapping[str, float], tables: Sequence[Uploaded],
               tensors: Mapping[str, Any]) -> None:  # fmt: skip
        on = self._gpu
        addresses = {f"{name}_ptr": x.data_ptr() for name, x in tensors.items()}
        for held, arrays in tables:
            addresses |= {f"{name}_ptr": held.address(0, name) for name in arrays}
        arguments = Arguments(function, {**values, **addresses, "blocks": blocks}, {})
        step = Step(function, arguments, (blocks, 1, 1), {}, early=True)
        config = config_of(step)
        with on.framework.on(on.ordinal) if on.framework.device() != on.ordinal else nullcontext():
            config.stream = on.framework.stream(on.ordinal)
            for held, _ in tables:
                held.used(config.stream or 0, on.framework.capturing())
            on.driver.launch(*start_of(config, step), on.ordinal)


def tile_tables(structure: Structure, heads: int, transposed: bool) -> Mapping[str, NDArray[Any]]:
    """The tables of a product for so many heads but ``work`` (codegen/hopper/unfused/tiles.py)."""
    return joined(_used(structure, heads, transposed))[0].arrays()


def work_rows(structure: Structure, heads: int, transposed: bool, items: Ints) -> Ints:
    """int32 (row tiles of all heads, 4): head, item, first entry, entries. items: of ``tile_tables``."""
    ends = np.cumsum([0, *(len(tiles.items) for tiles in _used(structure, heads, transposed))])
    pattern_of, rows = structure.head_patterns(heads), []
    numbered = sorted(set(pattern_of))
    for head, pattern in enumerate(pattern_of):
        item = np.arange(*ends[numbered.index(pattern) :][:2])
        rows.append(np.column_stack([np.full_like(item, head), item, items[item]]))
    return np.concatenate(rows).astype(np.int32)


def _used(structure: Structure, heads: int, transposed: bool) -> list[ValueTiles]:
    """The tiles of each pattern that so many heads have, by its number."""
    return [structure.tiles(transposed)[p] for p in sorted(set(structure.head_patterns(heads)))]


def cut(rows: Ints, parts: int) -> Ints:
    """``work_rows`` of which the longest are cut in so many pieces, and others in fewer, about as long."""
    counts = rows[:, 3].astype(np.int64)
    pieces = np.maximum(-(-counts // max(-(-int(counts.max()) // parts), 1)), 1)
    of = np.repeat(np.arange(len(rows)), pieces)
    number = np.arange(len(of)) - (pieces.cumsum() - pieces)[of]
    begin, end = (counts[of] * i // pieces[of] for i in (number, number + 1))
    return np.column_stack([rows[of, :2], rows[of, 2] + begin, end - begin]).astype(np.int32)


def spread(rows: Ints, multiprocessors: int) -> Ints:
    """The longest rows of ``work`` first, to and fro over multiprocessors, as they take blocks in turn."""
    order = np.argsort(-rows[:, 3], kind="stable")
    turns = [order[i : i + multiprocessors] for i in range(0, len(order), multiprocessors)]
    to_and_fro: Ints = rows[np.concatenate([turn[:: -1 if i % 2 else 1] for i, turn in enumerate(turns)])]
    return to_and_fro


def shared(rows: Ints, teams: int) -> Ints:
    """(rows, teams, 4) of ``work_rows`` whose entries so many warpgroups share."""
    ends = rows[:, 3:] * np.arange(teams + 1) // teams
    begin, count = rows[:, 2:3] + ends[:, :-1], np.diff(ends, axis=1)
    of_block = np.repeat(rows[:, None, :2], teams, axis=1)
    return np.concatenate([of_block, np.stack([begin, count], 2)], 2).astype(np.int32)


def described(work: Ints, entries: Ints, bases: NDArray[np.int64]) -> Ints:
    """``work``, and for each warpgroup what the kernel wants to know first of other tables."""
    bases = np.ascontiguousarray(bases, np.int64)
    halves = bases.view(np.int32).reshape(-1, 2)[work[..., 0]]
    first = np.minimum(work[..., 2], len(entries) - 1)
    second = np.minimum(first + 1, first + np.maximum(work[..., 3] - 1, 0))
    return np.concatenate([work, halves, entries[first], entries[second]], -1)


def row_tables(structure: Structure, heads: int) -> Mapping[str, Any]:
    """The tables of a softmax for so many heads (codegen/hopper/unfused/softmax.py)."""
    indptr = np.stack([order.indptr for order in structure.orders]).astype(np.int32)
    return {"indptr": indptr, "pattern": np.array(structure.head_patterns(heads), np.int32),
            "bases": structure.bases(heads)}  # fmt: skip


@cache
def products_on(ordinal: int) -> GpuProducts:
    """Those of a GPU, by torch's number."""
    return GpuProducts(gpu(ordinal), lambda spec, on: load_functions(find_kernel(spec).folder, spec.target.arch, on))


def _flat(values: Any) -> Any:
    """Values as kernels take them: contiguous, and beginning where 16 bytes do."""
    values = values.detach().contiguous()
    return contiguous_copy(values) if values.data_ptr() % ALIGNMENT else values
