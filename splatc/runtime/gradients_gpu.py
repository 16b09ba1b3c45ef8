"""Gradients of a compiled mask on a Hopper GPU: codegen/hopper/backward, in one walk over tiles or in two."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from splatc.codegen.hopper.backward.shape import STATISTICS, WARPS, bound_rows, rows_of
from splatc.codegen.hopper.shape import MAX_VIEWS, WARPGROUP_ROWS
from splatc.codegen.kernel import GRADIENTS, KernelSpec
from splatc.ir.score import NO_SCORE, Score, score_of
from splatc.ir.terms import LEARNABLE, NO_TERMS, Terms
from splatc.runtime.arguments import Arguments, Bound, Function
from splatc.runtime.bias_gradients import ABSENT_SUMS, BiasGradients, without_pairs
from splatc.runtime.gpu import DeviceTables, FindGpu, Gpu, gpu, load_functions
from splatc.runtime.gpu_call import Allocate, Sizes, Step, allocation, config_of, start_of
from splatc.runtime.gradient_walks import Sources, Walk, Way, way_of
from splatc.runtime.kernel import Kernel
from splatc.runtime.launch import contiguous_copy, layout_of, output_layout, remember
from splatc.runtime.launch_hopper import Maps, boxes_of, hopper_tables
from splatc.runtime.tensor_map import ALIGNMENT, Layout, geometry, sub_box, unswizzled
from splatc.runtime.tensors import Shape, to_bhsd
from splatc.runtime.term_values import ABSENT, Slots, term_values

if TYPE_CHECKING:
    from splatc.runtime.likeness import Like

INPUTS = ("q", "k", "v", "o", "do", "lse", "dlse")
RESULTS = ("dq", "dk", "dv")
SCRATCH = ("sums", "statistics", "bounds", "part_q", "part_k", "part_v")
TABLES = ("work", "entries", "bits", "gather", "combine", "positions")


class GpuGradients:
    """dq, dk, dv of one compiled mask on GPUs, bitwise equal from run to run."""

    takes = INPUTS

    def __init__(self, sources: Sources, find: Callable[[KernelSpec], Kernel], layout: str, cap: float,
                 walks: str | None = None, find_gpu: FindGpu = gpu) -> None:  # fmt: skip
        """find: the kernel of a spec. cap: the softcap of scores, 0 for none. walks: "one" or "two", None for the
        faster."""
        self.sources, self._find, self._layout, self._cap = sources, find, layout, cap
        self._walks, self._find_gpu = walks, find_gpu
        self._ready: dict[tuple[Any, ...], GradientCall] = {}
        self._latest: tuple[Like, GradientCall] | None = None  # of these, for tensors that are taken as they are
        self._no_dlse: dict[tuple[Any, ...], Any] = {}
        self._uploaded: dict[tuple[Any, ...], tuple[Way, DeviceTables]] = {}

    def __call__(self, shape: Shape, q: Any, k: Any, v: Any, o: Any, lse: Any, do: Any, dlse: Any,
                 scale: float, terms: Terms | None = None,
                 learning: Sequence[bool] | None = None) -> tuple[Any, ...]:  # fmt: skip
        """The gradients of torch tensors q, k, v, of which o and lse were computed, for those of o and lse; then those
        of ``terms.learning(learning)``: others cost nothing.

        All but lse and dlse (None for zeros), (batch, heads, q_len), are in the compiled layout; so are the results,
        contiguous and of the dtype of q.
        """
        import torch

        dlse = self._zeros(lse) if dlse is None else dlse.detach().to(lse.dtype).contiguous()
        given = q, k, v, o, do, lse
        known = self._latest  # read once: backward passes of other GPUs run in other threads
        if terms is None and known is not None and known[0](*given):
            places = [x.data_ptr() for x in given]
            if not any(place % ALIGNMENT for place in places):
                made = known[1](dict(zip(INPUTS, (*places, dlse.data_ptr()), strict=True)), scale)
                return made["dq"], made["dk"], made["dv"]
        wanted = (terms or NO_TERMS).learning(learning)
        if not (shape.q_len and shape.kv_len):
            return *(torch.zeros_like(x) for x in (q, k, v)), *without_pairs(terms or NO_TERMS, wanted, lse, dlse)
        tensors = {name: readable(to_bhsd(x.detach(), self._layout))
                   for name, x in zip(INPUTS, (q, k, v, o, do.to(q.dtype)), strict=False)}  # fmt: skip
        tensors["lse"], tensors["dlse"] = lse.detach().contiguous(), dlse
        key = shape, *(x.stride() for x in tensors.values()), q.device, wanted
        if key not in self._ready:
            layouts = {name: layout_of(tensors[name]) for name in INPUTS[:5]}
            learns = score_of(False, *(name in wanted for name in LEARNABLE[:-1]))
            remember(self._ready, key, self.prepared(shape, layouts, q.device.index, learns))
        run, addresses = self._ready[key], {name: x.data_ptr() for name, x in tensors.items()}
        if terms is None:
            from splatc.runtime.likeness import likeness  # needed by calls only

            if [addresses[name] for name in INPUTS[:-1]] == [x.data_ptr() for x in given]:  # nothing was copied
                self._latest = likeness(*given), run
            made = run(addresses, scale)
            return made["dq"], made["dk"], made["dv"]
        biases = BiasGradients(terms, wanted, shape, tensors["do"], tensors["v"], dlse)
        made = run(addresses, scale, {**term_values(terms), **biases.values})
        delta = made["statistics"].view(*lse.shape, STATISTICS)[..., 1]
        return made["dq"], made["dk"], made["dv"], *biases.results(lse, delta)

    def _zeros(self, lse: Any) -> Any:
        """What dlse is where nobody asks for gradients of lse: made once for each size, but for each graph anew."""
        if self._find_gpu(lse.device.index).framework.capturing():
            return lse.new_zeros(lse.shape)
        key = lse.shape, lse.device
        if key not in self._no_dlse:
            remember(self._no_dlse, key, lse.new_zeros(lse.shape))
        return self._no_dlse[key]

    def way(self, shape: Shape, device: int) -> Way:
        """How calls of these sizes are computed on a GPU."""
        on = self._find_gpu(device)
        with on.framework.on(on.ordinal):
            return self._way(shape, on)[0]

    def prepared(self, shape: Shape, layouts: dict[str, Layout], ordinal: int,
                 learning: Score = NO_SCORE) -> GradientCall:  # fmt: skip
        """A call for tensors of these sizes and strides, q, k, v, o and do, seen as bhsd, on a GPU. learning: the terms
        whose sums are made."""
        on = self._find_gpu(ordinal)
        with on.framework.on(on.ordinal):
            way, tables = self._way(shape, on)
            call = Preparation(on, shape, way, tables, layouts, self._layout, self._cap)
            rows = None if way.rows is None else self._functions(replace(way.rows, learning=learning), on)
            steps = call.steps([self._functions(one, on) for one in way.columns], rows)
            return GradientCall(on, call.sizes(), steps, tables)

    def _functions(self, spec: KernelSpec, on: Gpu) -> tuple[Function, ...]:
        return load_functions(self._find(spec).folder, spec.target.arch, on)

    def _way(self, shape: Shape, on: Gpu) -> tuple[Way, DeviceTables]:
        """The walks over tiles, and their tables on the GPU."""
        key = shape.batch, shape.heads, shape.kv_heads, shape.q_len, shape.kv_len, on.ordinal
        if key not in self._uploaded:
            way = way_of(self.sources, shape, on.driver.multiprocessors(on.ordinal), self._walks)
            arrays = [hopper_tables(one.launch, one.work, spec) for spec, one in way.walks]
            remember(self._uploaded, key, (way, DeviceTables(on, arrays)))
        return self._uploaded[key]


def readable(x: Any) -> Any:
    """x, (batch, heads, seq, dim), or a copy that tensor maps can describe: gradients often come expanded."""
    bad = x.stride(-1) != 1 or x.data_ptr() % ALIGNMENT or not layout_of(x).mappable()
    return contiguous_copy(x) if bad else x


@dataclass(frozen=True)
class Seen:
    """The tensors that a kernel sees through row views and column views, and its results, through a warpgroup's share
    of row views; sums: whether it adds up dQ, through column views."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    results: tuple[str, ...]
    sums: bool


OF_QUERIES, OF_KEYS = ("q", "do", "statistics"), ("k", "v")
OVER_ROWS = Seen(OF_QUERIES, OF_KEYS, ("dq",), sums=False)


def over_columns(spec: KernelSpec) -> Seen:
    """What a column kernel sees."""
    made = GRADIENTS[spec.role]
    return Seen(OF_KEYS, OF_QUERIES, tuple(name for name in made if name != "dq"), sums="dq" in made)


@dataclass(frozen=True)
class Preparation:
    """What launches of the kernels are made of, for tensors of given sizes and strides. tables: of the way's walks."""

    gpu: Gpu
    shape: Shape
    way: Way
    tables: DeviceTables
    layouts: dict[str, Layout]
    layout: str
    cap: float

    def sizes(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """(dtype, shape) of all that a call allocates; results in the caller's layout."""
        s, dtype = self.shape, self.shape.dtype
        order = (0, 1, 2) if self.layout == "bhsd" else (0, 2, 1)

        def result(*rows: int, dim: int) -> tuple[str, tuple[int, ...]]:
            return dtype, (*(rows[i] for i in order), dim)

        row_parts, column_parts = (
            max((one.work.part_tiles * one.height for one in walks), default=0)
            for walks in (self.way.row_walks, self.way.column_walks))  # fmt: skip
        sums: dict[str, tuple[str, tuple[int, ...]]] = {
            "sums": ("int32", (s.batch * s.heads * s.q_len, s.head_dim)),
            "bounds": ("float32", (s.batch * s.kv_heads * self.bound_blocks, 2)),
        }
        return {
            "dq": result(s.batch, s.heads, s.q_len, dim=s.head_dim),
            "dk": result(s.batch, s.kv_heads, s.kv_len, dim=s.head_dim),
            "dv": result(s.batch, s.kv_heads, s.kv_len, dim=s.v_head_dim),
            "statistics": ("float32", (s.batch * s.heads * s.q_len, STATISTICS)),
            **(sums if self.way.rows is None else {}), "part_q": (dtype, (row_parts, s.head_dim)),
            "part_k": (dtype, (column_parts, s.head_dim)), "part_v": (dtype, (column_parts, s.v_head_dim)),
        }  # fmt: skip

    @property
    def widest(self) -> int:
        return max(self.shape.head_dim, self.shape.v_head_dim)

    @property
    def bound_blocks(self) -> int:
        return -(-self.shape.kv_len // bound_rows(self.shape.kv_len, self.widest))

    def steps(self, columns: Sequence[tuple[Function, ...]], rows: tuple[Function, ...] | None) -> list[Step]:
        """In the order of their launches, of the functions of the kernels."""
        s, way = self.shape, self.way
        pairs, kv_pairs = s.batch * s.heads, s.batch * s.kv_heads
        blocks, first = -(-s.q_len // rows_of(self.widest)), len(way.row_walks)
        if rows is not None:
            prepare, walk, combine = rows
            steps = [self._rows(prepare, pairs, blocks), *self._walks(way.row_walks, 0, OVER_ROWS, walk, combine)]
            for spec, functions in zip(way.columns, columns, strict=True):
                steps += self._walks(way.column_walks, first, over_columns(spec), *functions)
            return steps
        (spec,), ((bounds, prepare, walk, combine, finish),) = way.columns, columns
        return [
            self._rows(bounds, kv_pairs, self.bound_blocks, rows=bound_rows(s.kv_len, self.widest)),
            self._rows(prepare, pairs, blocks),
            *self._walks(way.column_walks, first, over_columns(spec), walk, combine),
            self._rows(finish, pairs, -(-s.q_len // rows_of(s.head_dim))),
        ]

    def _rows(self, function: Function, pairs: int, blocks_a_head: int, rows: int = 0) -> Step:
        """A kernel over rows: of ``pairs`` heads of all batch entries, blocks_a_head blocks each."""
        blocks = pairs * blocks_a_head
        return self._step(function, blocks, {"blocks_a_head": blocks_a_head, "rows": rows}, {})

    def _walks(self, walks: Sequence[Walk], first: int, seen: Seen, function: Function,
               combine: Function) -> list[Step]:  # fmt: skip
        """Launches over tiles, whose tables are those from number ``first`` on; then, of those with parts, the sums."""
        steps = []
        for i, one in enumerate(walks, first):
            names = (*TABLES, "columns") if self.way.columns[0].score.positional else TABLES
            addresses = {f"{name}_ptr": self.tables.address(i, name) for name in names}
            beside = self.way.rows is not None and i == len(self.way.row_walks)  # the end of a walk for other results
            values: dict[str, float] = {"merge": int(one.launch.merge), "follow": int(not beside), **addresses}
            steps.append(self._walk(function, one, values, seen))
            if one.work.part_tiles:
                steps.append(self._step(combine, len(one.work.combine) * one.height // WARPS, values, {}))
        return steps

    def _step(self, function: Function, blocks: int, values: dict[str, float], maps: Mapping[str, Any]) -> Step:
        s = self.shape
        holders = {name: f"{name}_ptr" for name in (*INPUTS, *RESULTS, *SCRATCH, "queue")}
        common: dict[str, float] = {
            "blocks": blocks, "heads": s.heads, "kv_heads": s.kv_heads, "group": s.heads // s.kv_heads,
            "q_len": s.q_len, "kv_len": s.kv_len, "bound_blocks": self.bound_blocks, "scale": 0.0, "cap": self.cap,
            **ABSENT, **ABSENT_SUMS, **dict.fromkeys(holders.values(), 0),
        }  # fmt: skip
        for name, one in self._all_layouts().items():
            common |= {f"{name}_step": one.step, f"{name}_batch": one.batch_stride, f"{name}_head": one.head_stride,
                       f"{name}_seq": one.seq_stride, f"{name}_last": one.last[1],
                       f"{name}_row": one.seq_stride}  # fmt: skip
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

    def _walk(self, function: Function, one: Walk, values: dict[str, float], seen: Seen) -> Step:
        driver, total = self.gpu.driver, len(one.work.rows)
        per_sm = driver.blocks_per_multiprocessor(function.kernel, function.threads, function.smem_bytes,
                                                  self.gpu.ordinal)  # fmt: skip
        blocks = min(total, per_sm * driver.multiprocessors(self.gpu.ordinal))
        values = {**values, "total": total, "member": one.member, "members": one.members}
        rows, cols = boxes_of(one.launch.row_views), boxes_of(one.launch.col_views)
        shares_of_rows = [sub_box(box, one.height // WARPGROUP_ROWS) for box in rows]
        shares = [sub_box(box, self.way.columns[0].tile_n // WARPGROUP_ROWS) for box in cols] if seen.sums else []
        for name, parts, limit in (("row", shares_of_rows, MAX_VIEWS[0]), ("sum", shares, MAX_VIEWS[1])):
            for view in range(limit if parts else 0):
                step = parts[min(view, len(parts) - 1)][1]
                values |= {f"{name}_step{view}_{axis}": step[axis - 1] for axis in (1, 2, 3)}
        return self._step(function, blocks, values, self._maps(function, one, seen, shares_of_rows, shares))

    def _maps(self, function: Function, one: Walk, seen: Seen, results: list[Any],
              shares: list[Any]) -> Mapping[str, Any]:  # fmt: skip
        maps, layouts, dtype = Maps(self.gpu.driver, function, self.tables.first), self._all_layouts(), self.shape.dtype
        rows, cols = one.launch.row_views, one.launch.col_views
        for names, views, limit in ((seen.rows, rows, MAX_VIEWS[0]), (seen.columns, cols, MAX_VIEWS[1])):
            for name in names:
                how = ("float32", unswizzled) if name == "statistics" else (dtype, geometry)
                maps.add(name, how[0], views, boxes_of(views), layouts[name], limit, how[1])
        for name in seen.results:
            maps.add(name, dtype, rows, [box for box, _ in results], layouts[name], MAX_VIEWS[0])
            part, dim, size = f"part_{name[1:]}", layouts[name].dim, layouts[name].itemsize
            maps.add_rows(part, part, dtype, max(one.work.part_tiles, 1) * one.height, dim, size)
        if shares:
            maps.add("sums", "int32", cols, [box for box, _ in shares], layouts["sums"], MAX_VIEWS[1])
        return maps.found


class GradientCall:
    """Steps, and what each call puts into them: addresses, the scale, the stream."""

    def __init__(self, on: Gpu, sizes: Sizes, steps: list[Step],
                 tables: DeviceTables) -> None:  # fmt: skip
        """sizes: (dtype, shape) of results and scratch, the results first."""
        self._gpu, self._tables = on, tables
        self.sizes = {name: (dtype, shape) for name, (dtype, shape) in sizes.items() if math.prod(shape)}
        self._lock = threading.Lock()
        names = dict.fromkeys(name for step in steps for name in step.holders if name != "queue")
        self._bounds = {name: self._bound(name, steps) for name in names}
        queues = [step.arguments.slot(step.holders["queue"]) for step in steps if "queue" in step.holders]
        self._queues = [slot for slot in queues if slot is not None]
        self._scales = [slot for step in steps if (slot := step.arguments.slot("scale")) is not None]
        self._terms = Slots(steps, (*ABSENT, *ABSENT_SUMS))
        self._configs = [config_of(step) for step in steps]
        self._steps = steps  # what the addresses below are of
        self._starts = [start_of(config, step) for config, step in zip(self._configs, steps, strict=True)]

    def _bound(self, name: str, steps: list[Step]) -> Bound:
        slots = [step.arguments.slot(step.holders[name]) for step in steps if name in step.holders]
        maps = [one for step in steps for one in step.arguments.maps.values() if one.tensor == name]
        return Bound(self._gpu.driver, slots, maps, -1)

    def __call__(self, addresses: dict[str, int], scale: float,
                 terms: Mapping[str, float] | None = None) -> dict[str, Any]:  # fmt: skip
        """Torch tensors of all of ``sizes``, dq, dk and dv among it, for tensors at these addresses that are as this
        call was prepared for. terms: the parameters of a score's."""
        ask, ordinal = self._gpu.framework, self._gpu.ordinal
        if ask.device() != ordinal:
            with ask.on(ordinal):
                return self(addresses, scale, terms)
        import torch

        allocations = self._filled if torch.are_deterministic_algorithms_enabled() else self._direct
        mine = {name: new() for name, new in allocations.items()}
        self.start({**addresses, **{name: x.data_ptr() for name, x in mine.items()}}, scale, terms)
        return mine

    @property
    def scratch(self) -> Sizes:
        """What a call needs beside its results."""
        return {name: size for name, size in self.sizes.items() if name not in RESULTS}

    @cached_property
    def _direct(self) -> dict[str, Allocate]:
        """What allocates each of ``sizes``, fast."""
        import torch

        return {name: allocation(self._gpu.device, getattr(torch, dtype), *size)
                for name, (dtype, size) in self.sizes.items()}  # fmt: skip

    @cached_property
    def _filled(self) -> dict[str, Allocate]:
        """The same so that PyTorch fills it, as it does in deterministic mode."""
        import torch

        return {name: partial(torch.empty, size, dtype=getattr(torch, dtype), device=self._gpu.device)
                for name, (dtype, size) in self.sizes.items()}  # fmt: skip

    def start(self, addresses: dict[str, int], scale: float, terms: Mapping[str, float] | None = None) -> None:
        """Compute for tensors, results and scratch at these addresses, on the current stream of the GPU, which is the
        current one."""
        on = self._gpu
        stream, captured = on.framework.stream(on.ordinal), on.framework.capturing()
        with self._lock:
            for name, address in addresses.items():
                if self._bounds[name].address != address:
                    self._bounds[name].move(address)
            for slot in self._scales:
                slot.value = scale
            for slot in self._queues:  # one each: two walks may run at the same time
                slot.value = on.queue_slots.take(captured)
            if terms is not None:
                self._terms.fill(terms)
            for config in self._configs:
                config.stream = stream
            self._tables.used(stream, captured)
            for start in self._starts:
                on.driver.launch(*start, on.ordinal)
