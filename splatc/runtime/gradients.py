"""Gradients of a compiled mask on a CPU: two functions over two plans, the mask's and the transposed mask's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from splatc.codegen.build import GRADIENTS
from splatc.ir.score import BlockBias, RelativeBias
from splatc.ir.terms import NO_TERMS, Terms
from splatc.runtime.cpu_call import exchange, table_arguments, term_arguments
from splatc.runtime.kernel import Kernel
from splatc.runtime.launch import remember
from splatc.runtime.plan import Launch
from splatc.runtime.tensors import Shape, is_torch, last_axis_contiguous, to_bhsd

if TYPE_CHECKING:
    from splatc.runtime.attention import Plan

Planner = Callable[[int, int], "Plan"]
DQ, DKV = GRADIENTS
SHARES = 16  # of the work where tables have gradients: each has a copy of them, whatever the threads


class Gradients:
    """dq, dk, dv and those of biases and sinks of one compiled mask, bitwise equal from run to run and for any number
    of threads.

    planned(q_len, kv_len): the plan of the mask; transposed(kv_len, q_len): of the transposed one.
    """

    def __init__(self, kernel: Kernel, planned: Planner, transposed: Planner, layout: str, cap: float) -> None:
        """kernel: of the role "backward". cap: the softcap of scores, 0 for none."""
        self.kernel = kernel
        self._planned, self._transposed = planned, transposed
        self._layout, self._cap = layout, cap
        score = kernel.spec.score
        self._shares = SHARES if score.has(RelativeBias) or score.has(BlockBias) else None
        self._ready: dict[tuple[int, ...], tuple[list[_Call], list[_Call]]] = {}

    def __call__(self, shape: Shape, q: Any, k: Any, v: Any, o: Any, lse: Any, do: Any, dlse: Any,
                 scale: float, terms: Terms | None = None,
                 learning: Sequence[bool] | None = None) -> tuple[Any, ...]:  # fmt: skip
        """The gradients of torch tensors q, k, v, of which o and lse were computed, for those of o and lse; then those
        of ``terms.learning(learning)``.

        All but lse and dlse (None for zeros), (batch, heads, q_len), are in the compiled layout; so are the results,
        contiguous and of the dtype of q.
        """
        import torch

        *inputs, o = (last_axis_contiguous(to_bhsd(x.detach(), self._layout)) for x in (q, k, v, do, o))
        delta = (inputs[3].to(lse.dtype) * o.to(lse.dtype)).sum(-1)
        if dlse is not None:
            delta = delta - dlse.detach()
        lse, delta = lse.detach().contiguous(), delta.contiguous()
        results = [torch.zeros(x.shape, dtype=lse.dtype) for x in (q, k, v)]
        writes = [exchange(to_bhsd(x, self._layout)) for x in results]
        terms = terms or NO_TERMS
        of_terms = self.write(shape, [exchange(x) for x in inputs], lse.numpy(), delta.numpy(), writes, scale,
                              _in_numpy(terms))  # fmt: skip
        found = dict(zip(terms.learning(), of_terms, strict=True))
        of_terms = [torch.from_numpy(found[name]).to(lse.dtype) for name in terms.learning(learning)]
        return *(x.to(q.dtype) for x in results), *of_terms

    def write(self, shape: Shape, inputs: Sequence[Any], lse: Any, delta: Any, results: Sequence[Any], scale: float,
              terms: Terms) -> list[Any]:  # fmt: skip
        """Compute into results, dq, dk and dv, of the type of lse; returns the gradients of what there is of
        ``terms.learnable``, float64. Where there are no queries or no keys, results are left as they are.

        inputs: q, k, v, do; they and results (batch, heads, seq, dim) as tvm_ffi takes them. lse, delta (rowsum(dO * O)
        - dLSE): (batch, heads, q_len). These and terms are NumPy arrays.
        """
        biases = BiasSums(terms, lse, self._shares)
        if shape.q_len and shape.kv_len:
            reads = *inputs, exchange(lse), exchange(delta)
            dq, dk, dv = results
            rest = term_arguments(self.kernel.spec.score, terms)
            of_rows, of_columns = self._calls(shape)
            for name, writes, calls, sums in ((DQ, (dq,), of_rows, biases.arguments), (DKV, (dk, dv), of_columns, ())):
                run = self.kernel.load(name)
                for tables, merge, *member in calls:
                    run(*reads, *writes, *tables, scale, self._cap, merge, *member, *rest, *sums)
        return biases.results(lse, delta)

    def prepare(self, shape: Shape) -> None:
        """Plan and lay out calls with these sizes, and load the kernel."""
        self._calls(shape)
        for name in GRADIENTS:
            self.kernel.load(name)

    def _calls(self, shape: Shape) -> tuple[list[_Call], list[_Call]]:
        """(of dq, of dkv): made once for each size."""
        key = shape.batch, shape.heads, shape.kv_heads, shape.q_len, shape.kv_len
        if key not in self._ready:
            batch, group = shape.batch, shape.heads // shape.kv_heads
            plan = self._planned(shape.q_len, shape.kv_len)
            rows = [_call(launch, batch, shares=self._shares) for launch in plan.launches(shape.batch, shape.heads)]
            plan = self._transposed(shape.kv_len, shape.q_len)
            columns = [
                _call(launch, batch, member)
                for member in range(group)  # one query head of every key head: the others are added to it
                for launch in plan.launches(shape.batch, shape.heads, members=slice(member, None, group))
            ]
            remember(self._ready, key, (rows, columns))
        return self._ready[key]


_Call = tuple[Any, ...]  # tables, merge and, for keys, the member of the group


def _call(launch: Launch, batch: int, *member: int, shares: int | None = None) -> _Call:
    return table_arguments(launch, batch, shares), int(launch.merge or any(member)), *member


def _in_numpy(terms: Terms) -> Terms:
    """Terms with NumPy arrays instead of torch tensors, of the same memory."""
    tensors = {f.name: x.detach().numpy() for f in fields(terms) if is_torch(x := getattr(terms, f.name))}
    return replace(terms, **tensors)


class BiasSums:
    """What the kernel sums for biases, and what becomes of it: sums in float64, in an order of their own."""

    def __init__(self, terms: Terms, lse: Any, shares: int | None) -> None:
        """terms of NumPy arrays. lse: (batch, heads, q_len). shares: of the work."""
        self._terms = terms
        self._slopes = None if terms.alibi_slopes is None else np.zeros(lse.shape, lse.dtype)
        self._tables = [None if x is None else np.zeros((shares or 1, len(x), x[0].size))
                        for x in (terms.relative_bias, terms.block_bias)]  # fmt: skip

    @property
    def arguments(self) -> tuple[Any, ...]:
        """For the kernel of dq."""
        return tuple(exchange(x) for x in (self._slopes, *self._tables) if x is not None)

    def results(self, lse: Any, delta: Any) -> list[Any]:
        """The gradients, once the kernel ran; all that sinks need is lse and delta."""
        slopes, tables, sinks = self._slopes, self._tables, self._terms.sinks
        sums = [None if slopes is None else slopes.sum((0, 2), dtype=np.float64),
                *(None if x is None else x.sum(0) for x in tables),
                None if sinks is None else _of_sinks(sinks, lse, delta)]  # fmt: skip
        return [x.reshape(like.shape) for x, like in zip(sums, self._terms.learnable, strict=True) if x is not None]


def _of_sinks(sinks: Any, lse: Any, delta: Any) -> Any:
    """-delta times the share of a sink in its rows; rows of lse -inf have none."""
    share = np.exp(sinks[:, None] - np.where(np.isneginf(lse), np.inf, lse))
    return -(share * delta).sum((0, 2), dtype=np.float64)
