"""The three kernels of compressed scores on a GPU, prepared once for tensors of the same sizes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import cache
from typing import Any

from splatc.codegen.kernel import (
    COMPRESSED_SDDMM,
    COMPRESSED_SOFTMAX,
    COMPRESSED_SPMM,
    SOFTMAX_LANES,
    SOFTMAX_THREADS,
    SOFTMAX_UNIT,
    KernelSpec,
    compressed_spec,
)
from splatc.codegen.target import Target
from splatc.formats.nm import TILE_KEYS, TILE_ROWS, TILE_WORDS
from splatc.patterns.pruned import TWO_OF_FOUR, Pruning
from splatc.runtime.arguments import Arguments, Bound, Function, Map, encode
from splatc.runtime.gpu import Gpu, gpu, load_functions
from splatc.runtime.gpu_call import Step, config_of, start_of
from splatc.runtime.kernel import find_kernel
from splatc.runtime.launch import GROUP, contiguous_copy, layout_of, padded_keys, padded_layout, remember
from splatc.runtime.tensor_map import ALIGNMENT, Geometry, Layout, geometry, grouped
from splatc.runtime.tensors import dtype_name

TALL, SHORT = 256, 128  # rows of a tile
WARP_ROWS = 16  # that leave together
MapOf = tuple[Layout, int, Callable[..., Geometry]]  # of a tensor: its layout, rows of a box, kind of map


class CompressedKernels:
    """Those of one GPU. load: from a spec to its functions there."""

    def __init__(self, on: Gpu, load: Callable[[KernelSpec, Gpu], tuple[Function, ...]]) -> None:
        self._gpu, self._load = on, load
        self._ready: dict[tuple[Any, ...], _Launch] = {}

    def scores(self, q: Any, k: Any, scale: float, pruning: Pruning = TWO_OF_FOUR) -> tuple[Any, Any]:
        """(values, metadata) of CompressedScores."""
        import torch

        (batch, heads, q_len, _), kv_len = q.shape, int(k.shape[2])
        values = q.new_empty(batch, heads, q_len, TILE_KEYS // 16 * -(-kv_len // 16))
        key_tiles, row_blocks = -(-kv_len // TILE_KEYS), -(-q_len // TILE_ROWS)
        metadata = torch.empty((batch, heads, key_tiles, row_blocks, 2, TILE_WORDS // 2), dtype=torch.int32,
                               device=q.device)  # fmt: skip
        if not values.numel():
            return values, metadata
        if scale <= 0:  # the kernel masks before it scales; exact: what is scaled is q
            q, scale = q.neg() if scale else q.mul(0), -scale or 1.0
        q, k = mapped(q), mapped(padded_keys(k) if kv_len % GROUP else k)
        key = COMPRESSED_SDDMM, q.shape, q.stride(), k.shape, k.stride(), q.dtype, scale, pruning
        if key not in self._ready:
            rows = self._rows(batch * heads, q_len, int(q.shape[3]))
            of_k = padded_layout(layout_of(k)) if kv_len % GROUP else layout_of(k)
            maps = {"q": (layout_of(q), rows, geometry), "k": (of_k, TILE_KEYS, grouped),
                    "values": (layout_of(values), WARP_ROWS, geometry)}  # fmt: skip
            numbers = {"scale": scale, "kv_len": kv_len, "group": heads // k.shape[1]}
            remember(self._ready, key, self._product(COMPRESSED_SDDMM, q, rows, numbers, maps, values, metadata,
                                                       pruning))  # fmt: skip
        self._ready[key]({"q": q, "k": k, "values": values, "metadata": metadata})
        return values, metadata

    def softmax(self, values: Any, in_place: bool) -> Any:
        """Of the rows of values, there or elsewhere."""
        import torch

        x = flat(values)
        p = x if in_place else torch.empty_like(x)
        if not values.numel():
            return p
        rows, width = x.numel() // x.shape[-1], int(x.shape[-1])
        key = COMPRESSED_SOFTMAX, rows, width, x.dtype
        if key not in self._ready:
            functions = self._functions(COMPRESSED_SOFTMAX, 8, dtype_name(x), TALL)
            choice = next(i for i, (lanes, units) in enumerate(SOFTMAX_LANES)
                          if units is None or width <= lanes * units * SOFTMAX_UNIT)  # fmt: skip
            blocks = -(-rows * SOFTMAX_LANES[choice][0] // SOFTMAX_THREADS)
            remember(self._ready, key, _Launch(self._gpu, functions[choice], blocks, {"rows": rows, "width": width}, {},
                                               ("x", "p")))  # fmt: skip
        self._ready[key]({"x": x, "p": p})
        return values.copy_(p) if in_place and x is not values else p

    def spmm(self, values: Any, metadata: Any, v: Any) -> Any:
        """o of CompressedScores.spmm."""
        batch, heads, q_len, _ = values.shape
        o = v.new_empty(batch, heads, q_len, v.shape[3])
        if not values.numel() or not o.numel():
            return o.zero_()
        values, metadata, v = flat(values), flat(metadata), mapped(v)
        key = COMPRESSED_SPMM, values.shape, v.shape, v.stride(), v.dtype
        if key not in self._ready:
            rows = self._rows(batch * heads, q_len, int(v.shape[3]))
            maps = {"values": (layout_of(values), rows, geometry), "v": (layout_of(v), TILE_KEYS, geometry),
                    "out": (layout_of(o), WARP_ROWS, geometry)}  # fmt: skip
            numbers = {"group": heads // v.shape[1]}
            remember(self._ready, key, self._product(COMPRESSED_SPMM, v, rows, numbers, maps, values, metadata))
        self._ready[key]({"values": values, "metadata": metadata, "v": v, "out": o})
        return o

    def _product(self, role: str, like: Any, rows: int, numbers: Mapping[str, float], maps: Mapping[str, MapOf],
                 values: Any, metadata: Any, pruning: Pruning = TWO_OF_FOUR) -> _Launch:  # fmt: skip
        """A product's launch. numbers: what is not of its walk."""
        on, dtype = self._gpu, dtype_name(like)
        (function,) = self._functions(role, int(like.shape[3]), dtype, rows, pruning)
        batch, heads, q_len, _ = values.shape
        row_tiles = -(-q_len // rows)
        items = batch * heads * row_tiles
        of_block = function.kernel, function.threads, function.smem_bytes, on.ordinal
        resident = on.driver.blocks_per_multiprocessor(*of_block) * on.driver.multiprocessors(on.ordinal)
        blocks = min(items, resident)
        all_numbers = {**numbers, "items": items, "blocks": blocks, "heads": heads, "row_tiles": row_tiles,
                       "key_tiles": metadata.shape[2], "row_blocks": metadata.shape[3],
                       **{f"{name}_step": layout.step for name, (layout, *_) in maps.items()}}  # fmt: skip
        encoded = {
            f"{name}_map0": encode(on.driver, name, dtype, kind((layout.length, 1, 1, 1, layout.length, layout.length),
                                                                (box, 1, 1), layout), int(values.data_ptr()))
            for name, (layout, box, kind) in maps.items()
        }  # fmt: skip
        return _Launch(on, function, blocks, all_numbers, encoded, (*maps, "metadata"))

    def _rows(self, pairs: int, q_len: int, dim: int) -> int:
        """Of a tile: tall ones read less of K and V, but there must be enough of them for all multiprocessors."""
        enough = pairs * -(-q_len // TALL) >= 2 * self._gpu.driver.multiprocessors(self._gpu.ordinal)
        return TALL if enough and dim <= 64 else SHORT

    def _functions(self, role: str, dim: int, dtype: str, rows: int,
                   pruning: Pruning = TWO_OF_FOUR) -> tuple[Function, ...]:  # fmt: skip
        on = self._gpu
        major, minor = on.driver.capability(on.ordinal)
        target = Target("cuda", f"sm_{major}{minor}" + "a" * (major >= 9))
        return self._load(compressed_spec(role, dim, dtype, target, rows, pruning), on)


class _Launch:
    """A function with its arguments, for tensors that come with each call."""

    def __init__(self, on: Gpu, function: Function, blocks: int, numbers: Mapping[str, float], maps: Mapping[str, Map],
                 tensors: tuple[str, ...]) -> None:  # fmt: skip
        self._gpu, self._lock = on, threading.Lock()
        pointers = {f"{name}_ptr": 0 for name in tensors}
        arguments = Arguments(function, {**numbers, **pointers, "blocks": blocks}, maps)
        self._bounds = {
            name: Bound(on.driver, [arguments.slot(f"{name}_ptr")],
                        [one for one in arguments.maps.values() if one.tensor == name], 0)
            for name in tensors
        }  # fmt: skip
        step = Step(function, arguments, (blocks, 1, 1), {}, early=True)
        self._step, self._config = step, config_of(step)
        self._start = start_of(self._config, step)

    def __call__(self, tensors: Mapping[str, Any]) -> None:
        """On the current stream."""
        on = self._gpu
        with on.framework.on(on.ordinal) if on.framework.device() != on.ordinal else nullcontext(), self._lock:
            for name, bound in self._bounds.items():
                if (address := int(tensors[name].data_ptr())) != bound.address:
                    bound.move(address)
            self._config.stream = on.framework.stream(on.ordinal)
            on.driver.launch(*self._start, on.ordinal)


def flat(x: Any) -> Any:
    """x, or a copy that is contiguous and begins where 16 bytes do."""
    x = x.contiguous()
    return contiguous_copy(x) if x.data_ptr() % ALIGNMENT else x


def mapped(x: Any) -> Any:
    """x (batch, heads, seq, dim), or a copy of which tensor maps exist."""
    good = x.data_ptr() % ALIGNMENT == 0 and (x.stride(-1) == 1 or x.shape[-1] == 1) and layout_of(x).mappable()
    return x if good else contiguous_copy(x)


@cache
def kernels_on(ordinal: int) -> CompressedKernels:
    """Those of a GPU, by torch's number."""
    def load(spec: KernelSpec, on: Gpu) -> tuple[Function, ...]:
        return load_functions(find_kernel(spec).folder, spec.target.arch, on)

    return CompressedKernels(gpu(ordinal), load)
