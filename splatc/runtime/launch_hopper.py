"""How the Hopper kernel is launched: tensor maps for every view, persistent blocks on a queue, then partial results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from splatc.codegen.costs import costs_of
from splatc.codegen.hopper.shape import MAX_VIEWS, STRIDES, WARPGROUP_ROWS, slot_keys
from splatc.codegen.kernel import KernelSpec
from splatc.codegen.tables import accumulator_bits
from splatc.runtime.arguments import Arguments, Function, Map, encode
from splatc.runtime.driver import Driver
from splatc.runtime.gpu import Gpu
from splatc.runtime.gpu_call import Request, Step
from splatc.runtime.plan import Launch
from splatc.runtime.tensor_map import Geometry, Layout, geometry, grouped, sub_box
from splatc.runtime.term_values import ABSENT
from splatc.runtime.work import Work, work_of

HOLDERS = {"k": "k_ptr", "v": "v_ptr", "lse": "lse_ptr", "part_lse": "part_lse_ptr", "queue": "queue_ptr"}
COMBINE_HOLDERS = {"o": "o_ptr", "lse": "lse_ptr", "part_o": "part_o_ptr", "part_lse": "part_lse_ptr"}
COMBINE_ROWS = 8  # that a block of the second function puts together: a warp each


def hopper_work(launch: Launch, spec: KernelSpec, batch: int, on: Gpu) -> Work:
    """What a launch hands out to the multiprocessors of a GPU."""
    return work_of(launch, batch, costs_of(spec, on.driver.multiprocessors(on.ordinal)))


def hopper_tables(launch: Launch, work: Work, spec: KernelSpec) -> Mapping[str, NDArray[Any]]:
    """The arrays of a launch that the kernel reads."""
    bits = launch.bits if spec.score.pruning is None else launch.bits[:, slot_keys(spec.tile_n)]
    bits = accumulator_bits(bits, spec.tile_m, spec.tile_n)
    tables = {"work": work.rows, "entries": work.entries, "combine": work.combine, "positions": launch.positions,
              "gather": launch.gather, "bits": bits}  # fmt: skip
    return {**tables, "columns": columns_table(launch)} if spec.score.positional else tables


def columns_table(launch: Launch) -> NDArray[np.int32]:
    """(MAX_VIEWS[1] + lists of keys, STRIDES + tile_n): where the lanes of column tiles are (hopper/shape.py)."""
    lists, lanes = launch.gather.shape
    table = np.zeros((MAX_VIEWS[1] + lists, STRIDES + lanes), np.int32)
    for row, view in zip(table, launch.col_views, strict=False):
        strides, (b1, b2, b3) = view[3:6], view[6:9]
        row[:3] = strides
        x3, x2, x1 = np.unravel_index(np.arange(lanes), (b3, b2, b1))
        row[STRIDES:] = x1 * strides[0] + x2 * strides[1] + x3 * strides[2]
    table[MAX_VIEWS[1] :, STRIDES:] = launch.gather
    return table


def hopper_steps(request: Request) -> list[Step]:
    """For each launch the attention, and where it has rows in parts the function that combines them."""
    attend, *rest = request.functions
    steps = []
    for i, (launch, work) in enumerate(zip(request.launches, request.works, strict=True)):
        steps.append(_attend(request, attend, i, launch, work))
        if work.part_tiles:
            steps.append(_combine(request, rest[0], i, launch, work))
    return steps


def _attend(request: Request, function: Function, i: int, launch: Launch, work: Work) -> Step:
    gpu, total = request.gpu, len(work.rows)
    per_sm = gpu.driver.blocks_per_multiprocessor(function.kernel, function.threads, function.smem_bytes, gpu.ordinal)
    blocks = min(total, per_sm * gpu.driver.multiprocessors(gpu.ordinal))
    values: dict[str, float] = {
        **_common(request, i, launch), "total": total, "blocks": blocks, "scale": 0.0, "cap": request.cap,
        "group": request.shape.heads // request.layouts["k"].heads, **dict.fromkeys(HOLDERS.values(), 0), **ABSENT,
    }  # fmt: skip
    for name, one in request.layouts.items():
        values |= {f"{name}_step": one.step, f"{name}_last": one.last[1], f"{name}_row": one.seq_stride}
    for view in range(MAX_VIEWS[0]):
        step = _output_box(request, launch, view)[1]
        values |= {f"o_step{view}_{axis}": step[axis - 1] for axis in (1, 2, 3)}
    maps = _maps(request, function, launch, work)
    return Step(function, Arguments(function, values, maps), (blocks, 1, 1), HOLDERS, early=True)


def _combine(request: Request, function: Function, i: int, launch: Launch, work: Work) -> Step:
    o, blocks = request.layouts["o"], len(work.combine) * request.spec.tile_m // COMBINE_ROWS
    values = {
        **_common(request, i, launch), "blocks": blocks, "o_batch": o.batch_stride, "o_head": o.head_stride,
        "o_seq": o.seq_stride, **dict.fromkeys(COMBINE_HOLDERS.values(), 0), **ABSENT,
    }  # fmt: skip
    return Step(function, Arguments(function, values, {}), (blocks, 1, 1), COMBINE_HOLDERS, early=True)


def _common(request: Request, i: int, launch: Launch) -> dict[str, float]:
    names = ["work", "entries", "combine", "positions", "gather", "bits"]
    names += ["columns"] * request.spec.score.positional
    pointers = {f"{name}_ptr": request.tables.address(i, name) for name in names}
    merge, lse_rows = launch.merge or request.lse_rows > 0, request.lse_rows or request.shape.q_len
    return {**pointers, "heads": request.shape.heads, "q_len": lse_rows, "merge": int(merge)}


def _output_box(request: Request, launch: Launch, view: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """(box, step) of a warpgroup's rows in a row view: the box is stored at consumer * step."""
    row = launch.row_views[min(view, len(launch.row_views) - 1)]
    return sub_box([int(b) for b in row[6:9]], request.spec.tile_m // WARPGROUP_ROWS)


def _maps(request: Request, function: Function, launch: Launch, work: Work) -> dict[str, Map]:
    """Every map that the function asks for."""
    maps = Maps(request.gpu.driver, function, request.address)
    views, cols, layouts, dtype = launch.row_views, launch.col_views, request.layouts, request.spec.dtype
    maps.add("q", map_type("q", dtype), views, boxes_of(views), layouts["q"], MAX_VIEWS[0])
    output = [_output_box(request, launch, n)[0] for n in range(len(views))]
    maps.add("o", map_type("o", dtype), views, output, layouts["o"], MAX_VIEWS[0])
    of_keys = geometry if request.spec.score.pruning is None else grouped
    maps.add("k", map_type("k", dtype), cols, boxes_of(cols), layouts["k"], MAX_VIEWS[1], of_keys)
    maps.add("v", map_type("v", dtype), cols, boxes_of(cols), layouts["v"], MAX_VIEWS[1])
    rows = max(work.part_tiles, 1) * request.spec.tile_m
    maps.add_rows("part", "part_o", map_type("part_o", dtype), rows, request.shape.v_head_dim, layouts["o"].itemsize)
    return maps.found


class Maps:
    """The tensor maps of a launch by the name of their parameter, as far as a function asks for them.

    address: of some memory on the GPU, until a call puts a tensor's in its place.
    """

    def __init__(self, driver: Driver, function: Function, address: int) -> None:
        self._driver, self._address = driver, address
        self._wanted = {name for kind, name in function.parameters if kind == "map"}
        self.found: dict[str, Map] = {}

    def add(self, tensor: str, kind: str, views: Any, boxes: Sequence[Any], layout: Layout, limit: int,
            shape: Callable[..., Geometry] = geometry) -> None:  # fmt: skip
        """A map for each view, ``{tensor}_map0`` ...; those beyond, up to ``limit``, are the first view's."""
        for n, (view, box) in enumerate(zip(views, boxes, strict=True)):
            self._encode(f"{tensor}_map{n}", tensor, kind, shape(view, box, layout))
        for n in range(len(views), limit):
            if (name := f"{tensor}_map{n}") in self._wanted:
                self.found[name] = self.found[f"{tensor}_map0"]

    def add_rows(self, name: str, tensor: str, kind: str, rows: int, dim: int, itemsize: int) -> None:
        """Of contiguous memory, (rows, dim), which a warpgroup's 64 rows go to at a time."""
        view, layout = (rows, 1, 1, 1, rows, rows), Layout(1, 1, rows, dim, 0, 0, dim, itemsize)
        self._encode(f"{name}_map0", tensor, kind, geometry(view, (WARPGROUP_ROWS, 1, 1), layout))

    def _encode(self, name: str, tensor: str, kind: str, shape: Geometry) -> None:
        if name in self._wanted:
            self.found[name] = encode(self._driver, tensor, kind, shape, self._address)


def boxes_of(views: Any) -> list[Any]:
    """The boxes of rows of a view table."""
    return [view[6:9] for view in views]


def map_type(tensor: str, dtype: str) -> str:
    """What a tensor's maps say of its values. Loads through maps of tfloat32 round, which products of tf32 would not:
    tensor cores ignore the last bits. Outputs, and what is merged with them, stay float32."""
    return "tfloat32" if dtype == "float32" and tensor in ("q", "k", "v") else dtype
