"""Gradients of a compiled mask on a Hopper GPU: codegen/hopper/backward over the transposed mask's plan."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from splatc.codegen.costs import costs_of
from splatc.codegen.hopper.backward.shape import (
    KEYS,
    STATISTICS,
    WARPGROUPS,
    WARPS,
    bound_rows,
    rows_of,
    shape_of,
)
from splatc.codegen.hopper.backward.shape import (
    Shape as Sizes,
)
from splatc.codegen.hopper.shape import MAX_VIEWS
from splatc.runtime.arguments import Arguments, Bound, Function
from splatc.runtime.gpu import DeviceTables, Gpu, gpu, load_functions
from splatc.runtime.gpu_call import Step, config_of, contiguous, start_of
from splatc.runtime.kernel import Kernel
from splatc.runtime.launch import contiguous_copy, layout_of, output_layout, remember
from splatc.runtime.launch_hopper import Maps, boxes_of, hopper_tables
from splatc.runtime.plan import Launch
from splatc.runtime.tensor_map import ALIGNMENT, Layout, sub_box, unswizzled
from splatc.runtime.tensors import Shape, to_bhsd
from splatc.runtime.work import Work, work_of

if TYPE_CHECKING:
    from splatc.runtime.attention import Plan

INPUTS = ("q", "k", "v", "o", "do", "lse", "dlse")
RESULTS = ("dq", "dk", "dv")
SCRATCH = ("sums", "statistics", "bounds", "part_k", "part_v")
TABLES = ("work", "entries", "bits", "combine", "positions")


class GpuGradients:
    """dq, dk, dv of one compiled mask on GPUs, bitwise equal from run to run.

    transposed(kv_len, q_len): the plan of the transposed mask.
    """

    def __init__(self, kernel: Kernel, transposed: Callable[[int, int], Plan], layout: str, cap: float,
                 find_gpu: Callable[[int], Gpu] = gpu) -> None:  # fmt: skip
        """kernel: of the role "backward". cap: the softcap of scores, 0 for none."""
        self.kernel = kernel
        self._transposed, self._layout, self._cap, self._find_gpu = transposed, layout, cap, find_gpu
        self._ready: dict[tuple[Any, ...], GradientCall] = {}
        self._uploaded: dict[tuple[Any, ...], tuple[list[Columns], DeviceTables]] = {}

    def __call__(self, shape: Shape, q: Any, k: Any, v: Any, o: Any, lse: Any, do: Any, dlse: Any,
                 scale: float) -> tuple[Any, Any, Any]:  # fmt: skip
        """The gradients of torch tensors q, k, v, of which o and lse were computed, for those of o and lse.

        All but lse and dlse, (batch, heads, q_len), are in the compiled layout; so are the results, contiguous and of
        the dtype of q.
        """
        import torch

        if not (shape.q_len and shape.kv_len):
            return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        tensors = {name: readable(to_bhsd(x.detach(), self._layout))
                   for name, x in zip(INPUTS, (q, k, v, o, do.to(q.dtype)), strict=False)}  # fmt: skip
        tensors["lse"], tensors["dlse"] = lse.detach().contiguous(), dlse.detach().to(lse.dtype).contiguous()
        key = shape, *(x.stride() for x in tensors.values()), q.device
        if key not in self._ready:
            layouts = {name: layout_of(tensors[name]) for name in INPUTS[:5]}
            remember(self._ready, key, self._prepare(shape, layouts, q))
        return self._ready[key]({name: x.data_ptr() for name, x in tensors.items()}, scale)

    def _prepare(self, shape: Shape, layouts: dict[str, Layout], q: Any) -> GradientCall:
        on = self._find_gpu(q.device.index)
        with on.torch.on(on.ordinal):
            functions = load_functions(self.kernel.folder, self.kernel.spec.target.arch, on)
            columns, tables = self._columns(shape, on)
            call = Preparation(on, shape, shape_of(self.kernel.spec), layouts, functions, self._layout, self._cap,
                               int(q.data_ptr()))  # fmt: skip
            return GradientCall(on, call.sizes(columns), call.steps(columns, tables), tables, self._layout)

    def _columns(self, shape: Shape, on: Gpu) -> tuple[list[Columns], DeviceTables]:
        """The launches of the column kernel, and their tables on the GPU."""
        key = shape.batch, shape.heads, shape.kv_heads, shape.q_len, shape.kv_len, on.ordinal
        if key not in self._uploaded:
            spec = self.kernel.spec
            costs = costs_of(spec, on.driver.multiprocessors(on.ordinal))
            columns = []
            for launch, member, members in column_launches(self._transposed(shape.kv_len, shape.q_len), shape):
                dearer = replace(costs, tile=costs.tile * members, bits=costs.bits * members)
                columns.append(Columns(launch, work_of(launch, shape.batch, dearer), member, members))
            arrays = [hopper_tables(one.launch, one.work, spec) for one in columns]
            remember(self._uploaded, key, (columns, DeviceTables(on, arrays)))
        return self._uploaded[key]


@dataclass(frozen=True)
class Columns:
    """A launch of the column kernel: of every key head, query heads ``member`` ... of those that share it."""

    launch: Launch
    work: Work
    member: int
    members: int


def column_launches(plan: Plan, shape: Shape) -> list[tuple[Launch, int, int]]:
    """(launch, first member, members): one for all query heads of a key head where they have the same mask."""
    group = shape.heads // shape.kv_heads
    same = plan.heads is None or all(h == plan.heads[i - i % group] for i, h in enumerate(plan.heads))
    found = []
    for member in range(1 if same else group):
        for launch in plan.launches(shape.heads, *MAX_VIEWS, members=slice(member, None, group)):
            merged = replace(launch, merge=launch.merge or member > 0)
            found.append((merged, member, group if same else 1))
    return found


def readable(x: Any) -> Any:
    """x, (batch, heads, seq, dim), or a copy that tensor maps can describe: gradients often come expanded."""
    bad = x.stride(-1) != 1 or x.data_ptr() % ALIGNMENT or not layout_of(x).mappable()
    return contiguous_copy(x) if bad else x


@dataclass(frozen=True)
class Preparation:
    """What launches of the kernels are made of, for tensors of given sizes and strides."""

    gpu: Gpu
    shape: Shape
    kernel: Sizes
    layouts: dict[str, Layout]
    functions: tuple[Function, ...]
    layout: str
    cap: float
    address: int

    def sizes(self, columns: list[Columns]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """(dtype, shape) of all that a call allocates; results in the caller's layout."""
        s, dtype = self.shape, self.shape.dtype
        order = (0, 1, 2) if self.layout == "bhsd" else (0, 2, 1)

        def result(*rows: int, dim: int) -> tuple[str, tuple[int, ...]]:
            return dtype, (*(rows[i] for i in order), dim)

        parts = max(one.work.part_tiles for one in columns) * KEYS
        return {
            "dq": result(s.batch, s.heads, s.q_len, dim=s.head_dim),
            "dk": result(s.batch, s.kv_heads, s.kv_len, dim=s.head_dim),
            "dv": result(s.batch, s.kv_heads, s.kv_len, dim=s.v_head_dim),
            "sums": ("int32", (s.batch * s.heads * s.q_len, s.head_dim)),
            "statistics": ("float32", (s.batch * s.heads * s.q_len, STATISTICS)),
            "bounds": ("float32", (s.batch * s.kv_heads * self.bound_blocks, 2)),
            "part_k": (dtype, (parts, s.head_dim)), "part_v": (dtype, (parts, s.v_head_dim)),
        }  # fmt: skip

    @property
    def widest(self) -> int:
        return max(self.shape.head_dim, self.shape.v_head_dim)

    @property
    def bound_blocks(self) -> int:
        return -(-self.shape.kv_len // bound_rows(self.shape.kv_len, self.widest))

    def steps(self, columns: list[Columns], tables: DeviceTables) -> list[Step]:
        """In the order of their launches."""
        bounds, prepare, column, combine, finish = self.functions
        s = self.shape
        pairs, kv_pairs = s.batch * s.heads, s.batch * s.kv_heads
        steps = [
            self._rows(bounds, kv_pairs, self.bound_blocks, rows=bound_rows(s.kv_len, self.widest)),
            self._rows(prepare, pairs, -(-s.q_len // rows_of(self.widest))),
        ]
        for i, one in enumerate(columns):
            steps.append(self._columns(column, i, one, tables))
            if one.work.part_tiles:
                steps.append(self._combine(combine, i, one, tables))
        return [*steps, self._rows(finish, pairs, -(-s.q_len // rows_of(s.head_dim)))]

    def _rows(self, function: Function, pairs: int, blocks_a_head: int, rows: int = 0) -> Step:
        """A kernel over rows: of ``pairs`` heads of all batch entries, blocks_a_head blocks each."""
        blocks = pairs * blocks_a_head
        return self._step(function, blocks, {"blocks_a_head": blocks_a_head, "rows": rows}, {})

    def _step(self, function: Function, blocks: int, values: dict[str, float], maps: Mapping[str, Any]) -> Step:
        s = self.shape
        holders = {name: f"{name}_ptr" for name in (*INPUTS, *RESULTS, *SCRATCH, "queue")}
        common: dict[str, float] = {
            "blocks": blocks, "heads": s.heads, "kv_heads": s.kv_heads, "group": s.heads // s.kv_heads,
            "q_len": s.q_len, "kv_len": s.kv_len, "bound_blocks": self.bound_blocks, "scale": 0.0, "cap": self.cap,
            **dict.fromkeys(holders.values(), 0),
        }  # fmt: skip
        for name, one in self._all_layouts().items():
            common |= {f"{name}_step": one.step, f"{name}_batch": one.batch_stride, f"{name}_head": one.head_stride,
                       f"{name}_seq": one.seq_stride}  # fmt: skip
        arguments = Arguments(function, {**common, **values}, maps)
        return Step(function, arguments, (blocks, 1, 1), holders, early=True)

    def _all_layouts(self) -> dict[str, Layout]:
        """Of every tensor that is seen as (batch, heads, seq, dim)."""
        s = self.shape
        keys = replace(s, heads=s.kv_heads, q_len=s.kv_len)
        size = self.layouts["q"].itemsize
        return {
            **self.layouts,
            "dq": output_layout(replace(s, v_head_dim=s.head_dim), self.layout, size),
            "dk": output_layout(replace(keys, v_head_dim=s.head_dim), self.layout, size),
            "dv": output_layout(keys, self.layout, size),
            "sums": output_layout(replace(s, v_head_dim=s.head_dim), "bhsd", 4),
            "statistics": output_layout(replace(s, v_head_dim=STATISTICS), "bhsd", 4),
        }

    def _columns(self, function: Function, i: int, one: Columns, tables: DeviceTables) -> Step:
        driver, total, launch = self.gpu.driver, len(one.work.rows), one.launch
        per_sm = driver.blocks_per_multiprocessor(function.kernel, function.threads, function.smem_bytes,
                                                  self.gpu.ordinal)  # fmt: skip
        blocks = min(total, per_sm * driver.multiprocessors(self.gpu.ordinal))
        values = {"total": total, "member": one.member, "members": one.members, "merge": int(launch.merge),
                  "part_k_step": 0, "part_v_step": 0, **_addresses(tables, i)}  # fmt: skip
        halves = [sub_box(box, WARPGROUPS) for box in boxes_of(launch.row_views)]
        shares = [sub_box(box, WARPGROUPS) if self.kernel.halves_queries else (tuple(map(int, box)), (0, 0, 0))
                  for box in boxes_of(launch.col_views)]  # fmt: skip
        for name, parts, limit in (("row", halves, MAX_VIEWS[0]), ("sum", shares, MAX_VIEWS[1])):
            for view in range(limit):
                step = parts[min(view, len(parts) - 1)][1]
                values |= {f"{name}_step{view}_{axis}": step[axis - 1] for axis in (1, 2, 3)}
        return self._step(function, blocks, values, self._maps(function, one, halves, shares))

    def _maps(self, function: Function, one: Columns, halves: list[Any], shares: list[Any]) -> Mapping[str, Any]:
        maps, layouts, dtype = Maps(self.gpu.driver, function, self.address), self._all_layouts(), self.shape.dtype
        rows, cols = one.launch.row_views, one.launch.col_views
        for name in ("k", "v"):
            maps.add(name, dtype, rows, boxes_of(rows), layouts[name], MAX_VIEWS[0])
            maps.add(f"d{name}", dtype, rows, [box for box, _ in halves], layouts[f"d{name}"], MAX_VIEWS[0])
            dim, size = layouts[name].dim, layouts[name].itemsize
            maps.add_rows(f"part_{name}", f"part_{name}", dtype, max(one.work.part_tiles, 1) * KEYS, dim, size)
        for name in ("q", "do"):
            maps.add(name, dtype, cols, boxes_of(cols), layouts[name], MAX_VIEWS[1])
        maps.add("statistics", "float32", cols, boxes_of(cols), layouts["statistics"], MAX_VIEWS[1], unswizzled)
        maps.add("sums", "int32", cols, [box for box, _ in shares], layouts["sums"], MAX_VIEWS[1])
        return maps.found

    def _combine(self, function: Function, i: int, one: Columns, tables: DeviceTables) -> Step:
        blocks = len(one.work.combine) * KEYS // WARPS
        return self._step(function, blocks, {"merge": int(one.launch.merge), **_addresses(tables, i)}, {})


def _addresses(tables: DeviceTables, launch: int) -> dict[str, float]:
    return {f"{name}_ptr": tables.address(launch, name) for name in TABLES}


class GradientCall:
    """Steps, and what each call puts into them: addresses, the scale, the stream."""

    def __init__(self, on: Gpu, sizes: Mapping[str, tuple[str, tuple[int, ...]]], steps: list[Step],
                 tables: DeviceTables, layout: str) -> None:  # fmt: skip
        """sizes: (dtype, shape) of what a call allocates, the results first."""
        import torch

        self._gpu, self._tables, self._layout = on, tables, layout
        self._empty = torch.empty_strided
        self._sizes = {name: (*contiguous(*shape), getattr(torch, dtype)) for name, (dtype, shape) in sizes.items()
                       if math.prod(shape)}  # fmt: skip
        self._lock = threading.Lock()
        self._bounds = {name: self._bound(name, steps) for name in (*INPUTS, *RESULTS, *SCRATCH, "queue")}
        self._scales = [slot for step in steps if (slot := step.arguments.slot("scale")) is not None]
        self._configs = [config_of(step) for step in steps]
        self._steps = steps  # what the addresses below are of
        self._starts = [start_of(config, step) for config, step in zip(self._configs, steps, strict=True)]

    def _bound(self, name: str, steps: list[Step]) -> Bound:
        slots = [step.arguments.slot(step.holders[name]) for step in steps]
        maps = [one for step in steps for one in step.arguments.maps.values() if one.tensor == name]
        return Bound(self._gpu.driver, slots, maps, -1)

    def __call__(self, addresses: dict[str, int], scale: float) -> tuple[Any, Any, Any]:
        """(dq, dk, dv) of tensors at these addresses that are as this call was prepared for."""
        on = self._gpu
        with on.torch.on(on.ordinal):
            mine = {name: self._empty(shape, strides, dtype=dtype, device=on.device)
                    for name, (shape, strides, dtype) in self._sizes.items()}  # fmt: skip
            stream, captured = on.torch.stream(on.ordinal), on.torch.capturing()
            addresses = {**addresses, **{name: x.data_ptr() for name, x in mine.items()},
                         "queue": on.queue_slots.take(captured)}  # fmt: skip
            with self._lock:
                for name, address in addresses.items():
                    if self._bounds[name].address != address:
                        self._bounds[name].move(address)
                for slot in self._scales:
                    slot.value = scale
                for config in self._configs:
                    config.stream = stream
                self._tables.used(stream, captured)
                for start in self._starts:
                    on.driver.launch(*start, on.ordinal)
        return mine["dq"], mine["dk"], mine["dv"]
