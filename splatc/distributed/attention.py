"""Context-parallel attention: what people call on each rank."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from splatc.compile import attention, compiled_for, resolve_mask
from splatc.distributed.exchange import Exchange, rows_of
from splatc.distributed.layout import Layout
from splatc.distributed.plan import Traffic, plan_of
from splatc.distributed.split import Split
from splatc.errors import InvalidInput, Unsupported
from splatc.patterns.base import Pattern
from splatc.runtime.attention import CompiledAttention
from splatc.runtime.tensors import Shape, check_call, check_scale, for_autocast, refuse_compilation
from splatc.runtime.terms import NOTHING


class ContextParallel:
    """Attention of a sequence that is sharded over a group: ``f(q, k, v, scale=None, return_lse=False,
    enable_gqa=False)`` on local shards. Made by ``context_parallel``."""

    def __init__(self, mask: Any, group: dist.ProcessGroup, seq_len: int | None, layout: Layout | None,
                 softcap: float | None, allow_tf32: bool) -> None:  # fmt: skip
        pattern, q_len, kv_len = resolve_mask(mask, seq_len, None)
        if q_len != kv_len:
            raise Unsupported(
                f"context parallel attention needs as many queries as keys, not {q_len} and {kv_len}: "
                "ranks hold queries, keys and values of the same positions"
            )
        self.group = group
        self.rank = dist.get_rank(group)
        self.plan = plan_of(pattern, q_len, dist.get_world_size(group), layout)
        self._share = self.plan.shares[self.rank]
        self.exchange = Exchange(self.plan, group)
        self._softcap, self._allow_tf32 = softcap, allow_tf32
        self._splits = lru_cache(maxsize=8)(self._split)

    @property
    def layout(self) -> Layout:
        """Which positions the ranks hold. The layers of a model must have the same one: give it to the others."""
        return self.plan.layout

    @property
    def positions(self) -> torch.Tensor:
        """The positions that this rank holds, int64 (local_len), in its order: for rotary embeddings and the like."""
        return torch.from_numpy(self._share.rows.copy())

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None = None,
                 return_lse: bool = False, enable_gqa: bool = False) -> Any:  # fmt: skip
        """Attention of the local queries q (batch, heads, local_len, head_dim) to the keys and values of all ranks; k
        and v (batch, kv_heads, local_len, dim) are the local ones. All ranks must call it, forward and backward, in the
        same order.

        Returns o (batch, heads, local_len, v_head_dim), and with return_lse also lse (batch, heads, local_len), for
        local queries. Otherwise as ``splatc.attention``.
        """
        rows = len(self._share.rows)
        for name, x in (("q", q), ("k", k), ("v", v)):
            if x.ndim != 4 or x.shape[2] != rows:
                raise InvalidInput(
                    f"{name} has shape {tuple(x.shape)}, but rank {self.rank} holds {rows} of {self.plan.seq_len} "
                    f"positions: give (batch, heads, {rows}, dim), as shard() returns"
                )
        if not self.plan.exchanges:  # a collective is called by all ranks or by none
            return attention(q, k, v, self._share.own, scale=scale, return_lse=return_lse, enable_gqa=enable_gqa,
                             softcap=self._softcap, allow_tf32=self._allow_tf32)  # fmt: skip
        refuse_compilation(q, "context parallel attention", "call it under torch.compiler.disable")
        q, k, v = for_autocast(q, k, v)
        shape = check_call(q, k, v, "bhsd", enable_gqa)
        o, lse = self._splits(shape)(q, k, v, check_scale(scale, shape.head_dim), enable_gqa)
        return (o, lse) if return_lse else o

    def _split(self, shape: Shape) -> Split:
        """For calls of these sizes."""
        share = self._share

        def compiled(mask: Pattern, sizes: Shape) -> CompiledAttention:
            return compiled_for(sizes, mask, self._softcap, "bhsd", self._allow_tf32, NOTHING)

        beyond = None
        if share.beyond is not None:
            beyond = compiled(share.beyond, replace(shape, q_len=len(share.asking), kv_len=share.received))
        asking = rows_of(share.asking, torch.device(shape.device))
        return Split(self.exchange, compiled(share.own, shape), beyond, asking)

    def shard(self, x: torch.Tensor, dim: int = 2) -> torch.Tensor:
        """The local rows of a whole tensor, whose axis `dim` is the sequence. Differentiable, no communication."""
        self._check_length(x, dim, self.plan.seq_len, "the sequence has")
        return x.index_select(dim, self.positions.to(x.device))

    @torch.no_grad()
    def unshard(self, x: torch.Tensor, dim: int = 2) -> torch.Tensor:
        """The whole tensor, on every rank, from the local rows of each. Without gradients: to look at results."""
        lengths = [len(share.rows) for share in self.plan.shares]
        self._check_length(x, dim, lengths[self.rank], "this rank holds")
        rows = x.movedim(dim, 0)
        padded = rows.new_zeros(max(lengths), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(parts, padded, group=self.group)
        out = rows.new_empty(self.plan.seq_len, *rows.shape[1:])
        for share, part, length in zip(self.plan.shares, parts, lengths, strict=True):
            out[torch.from_numpy(share.rows).to(x.device)] = part[:length]
        return out.movedim(0, dim)

    def bytes_communicated(self, k: torch.Tensor, v: torch.Tensor) -> Traffic:
        """Bytes that this rank will send and receive for tensors like the local k and v: exactly the rows that the
        pattern needs and the rank does not hold."""
        row = sum(x.shape[0] * x.shape[1] * x.shape[3] * x.element_size() for x in (k, v))
        return self.plan.traffic(self.rank, row)

    @staticmethod
    def _check_length(x: torch.Tensor, dim: int, length: int, holder: str) -> None:
        if x.shape[dim] != length:
            raise InvalidInput(f"axis {dim} of x has {x.shape[dim]} positions, but {holder} {length}")

    def __repr__(self) -> str:
        share = self._share
        return (
            f"<splatc context parallel {self.plan.pattern} {self.plan.layout}, rank {self.rank}: {len(share.rows)} of "
            f"{self.plan.seq_len} positions, fetches {share.received}>"
        )


def context_parallel(mask: Any, group: dist.ProcessGroup | DeviceMesh | None = None, *, seq_len: int | None = None,
                     layout: Layout | None = None, softcap: float | None = None,
                     allow_tf32: bool = True) -> ContextParallel:  # fmt: skip
    """Attention of a sequence sharded over the ranks of a group.

    mask: anything that ``splatc.compile`` takes, or what it returned (its pattern, length and softcap are used; layout
    "bhsd", no biases, sinks or dropout). group: a process group or a device mesh of one dimension, default: all
    processes. seq_len: of the whole sequence, where the mask has none of its own; the number of ranks need not divide
    it.
    layout: which rank holds which positions, default: the one of least cost for this pattern. softcap, allow_tf32: as
    of ``splatc.compile``; a mask compiled for exact float32 on a GPU stays exact.
    """
    if not dist.is_initialized():
        raise InvalidInput("there is no process group: call torch.distributed.init_process_group first (see torchrun)")
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise InvalidInput(f"the mesh has {group.ndim} dimensions: pick the one of the sequence, as in mesh['cp']")
        group = group.get_group()
    if group is None:
        group = dist.group.WORLD
    assert group is not None
    if dist.get_rank(group) < 0:
        raise InvalidInput("this process is not in the group: call context_parallel on the ranks of the group only")
    if isinstance(mask, CompiledAttention):
        score = mask.kernel.spec.score
        if mask.layout != "bhsd" or score.positional or score.sinks:
            raise Unsupported(
                "context parallel attention has layout='bhsd' and no biases, sinks or dropout: compile it without them"
            )
        plan = mask.plan()
        if plan.q_len != plan.kv_len:
            raise Unsupported(f"context parallel needs as many queries as keys, not {plan.q_len} and {plan.kv_len}")
        exact = mask.kernel.spec.kernel == "portable"
        return ContextParallel(plan.pattern, group, seq_len or plan.q_len, layout, softcap or mask.softcap,
                               allow_tf32 and not exact)  # fmt: skip
    return ContextParallel(mask, group, seq_len, layout, softcap, allow_tf32)
