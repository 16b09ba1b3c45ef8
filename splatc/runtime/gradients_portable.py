"""Gradients of a compiled mask by the portable CUDA kernels: codegen/cuda_backward.py, over two plans as on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from splatc.codegen.kernel import DKV_FUNCTION as DKV
from splatc.codegen.kernel import DQ_FUNCTION as DQ
from splatc.ir.terms import NO_TERMS, Terms
from splatc.runtime.arguments import Arguments, Function
from splatc.runtime.bias_gradients import of_sinks, without_pairs
from splatc.runtime.gpu import DeviceTables, FindGpu, Gpu, gpu, load_functions
from splatc.runtime.gpu_call import Step
from splatc.runtime.gradients_gpu import GradientCall
from splatc.runtime.kernel import Kernel
from splatc.runtime.launch import layout_of, output_layout, remember
from splatc.runtime.launch_portable import portable_tables
from splatc.runtime.plan import Launch
from splatc.runtime.tensor_map import Layout
from splatc.runtime.tensors import Shape, last_axis_contiguous, to_bhsd

if TYPE_CHECKING:
    from splatc.runtime.attention import Plan

Planner = Callable[[int, int], "Plan"]
# What the tensors of a kernel are in each function: those that its rows and its columns bring, and the results.
SEEN = {DQ: {"q": "x1", "do": "x2", "k": "y1", "v": "y2", "dq": "out1"},
        DKV: {"k": "x1", "v": "x2", "q": "y1", "do": "y2", "dk": "out1", "dv": "out2"}}  # fmt: skip
STRIDES = {"x1": "xa", "x2": "xb", "y1": "ya", "y2": "yb", "out1": "oa", "out2": "ob"}
STATISTICS = {"lse": "lse_ptr", "delta": "delta_ptr"}
INPUTS = "q", "k", "v", "do", "lse", "delta"


class PortableGradients:
    """dq, dk, dv of one compiled mask on GPUs, in float32 whatever the tensors are, bitwise equal from run to run.

    planned(q_len, kv_len): the plan of the mask; transposed(kv_len, q_len): of the transposed one; of tiles of the
    portable kernel.
    """

    takes = INPUTS

    def __init__(self, kernel: Kernel, planned: Planner, transposed: Planner, layout: str, cap: float,
                 find_gpu: FindGpu = gpu) -> None:  # fmt: skip
        """kernel: of the role "backward". cap: the softcap of scores, 0 for none."""
        self.kernel = kernel
        self._planned, self._transposed = planned, transposed
        self._layout, self._cap, self._find_gpu = layout, cap, find_gpu
        self._ready: dict[tuple[Any, ...], GradientCall] = {}
        self._uploaded: dict[tuple[Any, ...], tuple[list[tuple[Launch, int | None]], DeviceTables]] = {}

    def __call__(self, shape: Shape, q: Any, k: Any, v: Any, o: Any, lse: Any, do: Any, dlse: Any,
                 scale: float, terms: Terms | None = None,
                 learning: Sequence[bool] | None = None) -> tuple[Any, ...]:  # fmt: skip
        """The gradients of torch tensors q, k, v, of which o and lse were computed, for those of o and lse; then those
        of ``terms.learning(learning)``, of terms that have nothing but sinks.

        All but lse and dlse (None for zeros), (batch, heads, q_len), are in the compiled layout; so are the results,
        contiguous and of the dtype of q.
        """
        import torch

        terms = terms or NO_TERMS
        wanted = terms.learning(learning)
        if not (shape.q_len and shape.kv_len):
            no_dlse = torch.zeros_like(lse) if dlse is None else dlse.detach()
            return *(torch.zeros_like(x) for x in (q, k, v)), *without_pairs(terms, wanted, lse.detach(), no_dlse)
        q, k, v, o, do = (last_axis_contiguous(to_bhsd(x.detach().to(q.dtype), self._layout)) for x in (q, k, v, o, do))
        delta = (do.float() * o.float()).sum(-1)
        if dlse is not None:
            delta = delta - dlse.detach()
        tensors = {"q": q, "k": k, "v": v, "do": do, "lse": lse.detach().contiguous(), "delta": delta.contiguous()}
        key = shape, *(x.stride() for x in tensors.values()), q.device
        if key not in self._ready:
            layouts = {name: layout_of(tensors[name]) for name in ("q", "k", "v", "do")}
            remember(self._ready, key, self.prepared(shape, layouts, q.device.index))
        made = self._ready[key]({name: x.data_ptr() for name, x in tensors.items()}, scale)
        sinks = [of_sinks(terms.sinks.detach(), tensors["lse"], tensors["delta"])] if "sinks" in wanted else []
        return *(made[name].to(q.dtype) for name in ("dq", "dk", "dv")), *sinks

    def prepared(self, shape: Shape, layouts: dict[str, Layout], ordinal: int) -> GradientCall:
        """A call for tensors of these sizes and strides, q, k, v and do, seen as bhsd, on a GPU."""
        on = self._find_gpu(ordinal)
        with on.framework.on(on.ordinal):
            walks, tables = self._walks(shape, on)
            s, keys = shape, replace(shape, heads=shape.kv_heads, q_len=shape.kv_len)
            loaded = load_functions(self.kernel.folder, self.kernel.spec.target.arch, on)
            functions = dict(zip((DQ, DKV), loaded, strict=True))
            results = {"dq": replace(s, v_head_dim=s.head_dim), "dk": replace(keys, v_head_dim=s.head_dim), "dv": keys}
            known = {**layouts, **{name: output_layout(one, self._layout, 4) for name, one in results.items()}}
            steps = [self._step(functions, shape, known, launch, member, tables, i)
                     for i, (launch, member) in enumerate(walks)]  # fmt: skip
            order = (0, 1, 2, 3) if self._layout == "bhsd" else (0, 2, 1, 3)
            sizes = {}
            for name, one in results.items():
                rows = one.batch, one.heads, one.q_len, one.v_head_dim
                sizes[name] = "float32", tuple(rows[i] for i in order)
            return GradientCall(on, sizes, steps, tables)

    def _walks(self, shape: Shape, on: Gpu) -> tuple[list[tuple[Launch, int | None]], DeviceTables]:
        """Launches in order, of dQ (None) and, for one query head of every key head, of dK and dV; and their tables on
        the GPU."""
        key = shape.heads, shape.kv_heads, shape.q_len, shape.kv_len, on.ordinal
        if key not in self._uploaded:
            group = shape.heads // shape.kv_heads
            sizes = shape.batch, shape.heads
            walks: list[tuple[Launch, int | None]] = []
            walks += [(one, None) for one in self._planned(shape.q_len, shape.kv_len).launches(*sizes)]
            plan = self._transposed(shape.kv_len, shape.q_len)
            for member in range(group):
                walks += [(one, member) for one in plan.launches(*sizes, members=slice(member, None, group))]
            tables = DeviceTables(on, [portable_tables(one) for one, _ in walks])
            remember(self._uploaded, key, (walks, tables))
        return self._uploaded[key]

    def _step(self, functions: Mapping[str, Function], s: Shape, layouts: Mapping[str, Layout], launch: Launch,
              member: int | None, tables: DeviceTables, number: int) -> Step:  # fmt: skip
        """A launch, whose tables are those of this number."""
        name = DQ if member is None else DKV
        values: dict[str, float] = {
            "batch": s.batch, "scale": 0.0, "cap": self._cap, "member": member or 0,
            "merge": int(launch.merge or bool(member)), "n_work": len(launch.work),
            **{f"{table}_ptr": tables.address(number, table) for table in portable_tables(launch)},
        }  # fmt: skip
        heads, lengths = (s.heads, s.kv_heads), (s.q_len, s.kv_len)
        for side, i in zip("xy", (0, 1) if name == DQ else (1, 0), strict=True):
            values |= {f"{side}_heads": heads[i], f"{side}_len": lengths[i]}
        for tensor, what in SEEN[name].items():
            one = layouts[tensor]
            strides = enumerate((one.batch_stride, one.head_stride, one.seq_stride))
            values |= {f"{STRIDES[what]}{i}": stride for i, stride in strides}
        values |= {f"ob{i}": 0 for i in range(3) if name == DQ}  # what signatures hold of a result that is not made
        holders = {**{tensor: f"{what}_flat_ptr" for tensor, what in SEEN[name].items()}, **STATISTICS}
        arguments = Arguments(functions[name], {**values, **dict.fromkeys(holders.values(), 0)}, {})
        return Step(functions[name], arguments, (s.batch * len(launch.work), 1, 1), holders)
