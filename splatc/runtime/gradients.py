"""Gradients of a compiled mask on a CPU: two functions over two plans, the mask's and the transposed mask's."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from splatc.codegen.build import GRADIENTS
from splatc.runtime.cpu_call import exchange, table_arguments
from splatc.runtime.kernel import Kernel
from splatc.runtime.launch import remember
from splatc.runtime.plan import Launch
from splatc.runtime.tensors import Shape, last_axis_contiguous, to_bhsd

if TYPE_CHECKING:
    from splatc.runtime.attention import Plan

Planner = Callable[[int, int], "Plan"]


class Gradients:
    """dq, dk, dv of one compiled mask, bitwise equal from run to run and for any number of threads.

    planned(q_len, kv_len): the plan of the mask; transposed(kv_len, q_len): of the transposed one.
    """

    def __init__(self, kernel: Kernel, planned: Planner, transposed: Planner, layout: str, cap: float) -> None:
        """kernel: of the role "backward". cap: the softcap of scores, 0 for none."""
        self.kernel = kernel
        self._planned, self._transposed = planned, transposed
        self._layout, self._cap = layout, cap
        self._ready: dict[tuple[int, ...], tuple[list[_Call], list[_Call]]] = {}

    def __call__(self, shape: Shape, q: Any, k: Any, v: Any, o: Any, lse: Any, do: Any, dlse: Any,
                 scale: float) -> tuple[Any, Any, Any]:  # fmt: skip
        """The gradients of torch tensors q, k, v, of which o and lse were computed, for those of o and lse.

        All but lse and dlse, (batch, heads, q_len), are in the compiled layout; so are the results, contiguous and of
        the dtype of q.
        """
        import torch

        *inputs, o = (last_axis_contiguous(to_bhsd(x.detach(), self._layout)) for x in (q, k, v, do, o))
        delta = (inputs[3].to(lse.dtype) * o.to(lse.dtype)).sum(-1) - dlse.detach()
        statistics = [lse.detach().contiguous(), delta.contiguous()]
        results = [torch.empty(x.shape, dtype=lse.dtype) for x in (q, k, v)]
        if shape.q_len and shape.kv_len:
            reads = [exchange(x) for x in (*inputs, *statistics)]
            dq, dk, dv = (exchange(to_bhsd(x, self._layout)) for x in results)
            for name, writes, calls in zip(GRADIENTS, ((dq,), (dk, dv)), self._calls(shape), strict=True):
                run = self.kernel.load(name)
                for tables, merge, *member in calls:
                    run(*reads, *writes, *tables, scale, self._cap, merge, *member)
        else:
            for x in results:
                x.zero_()
        dq, dk, dv = (x.to(q.dtype) for x in results)
        return dq, dk, dv

    def _calls(self, shape: Shape) -> tuple[list[_Call], list[_Call]]:
        """(of dq, of dkv): made once for each size."""
        key = shape.batch, shape.heads, shape.kv_heads, shape.q_len, shape.kv_len
        if key not in self._ready:
            batch, group = shape.batch, shape.heads // shape.kv_heads
            plan = self._planned(shape.q_len, shape.kv_len)
            rows = [_call(launch, batch) for launch in plan.launches(shape.heads)]
            plan = self._transposed(shape.kv_len, shape.q_len)
            columns = [
                _call(launch, batch, member)
                for member in range(group)  # one query head of every key head: the others are added to it
                for launch in plan.launches(shape.heads, members=slice(member, None, group))
            ]
            remember(self._ready, key, (rows, columns))
        return self._ready[key]


_Call = tuple[Any, ...]  # tables, merge and, for keys, the member of the group


def _call(launch: Launch, batch: int, *member: int) -> _Call:
    return table_arguments(launch, batch), int(launch.merge or any(member)), *member
