"""Rows of K and V from rank to rank while this one computes, and their gradients back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.distributed as dist

from splatc.distributed.plan import Plan
from splatc.formats.strips import Ints

Rows = slice | torch.Tensor  # places on an axis: a slice where they are consecutive, which copies nothing, else int64


class Exchange:
    """What one rank of a group sends and receives. All ranks call ``fetch``, and ``give_back``, in the same order, also
    those that have nothing to send or receive."""

    def __init__(self, plan: Plan, group: dist.ProcessGroup) -> None:
        share = plan.shares[dist.get_rank(group)]
        self._send, self._group = share.send, group
        self._send_counts, self._receive_counts = [len(one) for one in share.send], list(share.receive)
        self._on = lru_cache(maxsize=8)(self._returns)

    def fetch(self, k: torch.Tensor, v: torch.Tensor) -> Coming:
        """Sends rows of the local k and v (batch, kv_heads, rows, dim) to the ranks that need them; what comes is of
        the positions that this rank fetches."""
        at = self._on(k.device).sent
        return self._swap(k[:, :, at], v[:, :, at], self._send_counts, self._receive_counts)

    def give_back(self, dk: torch.Tensor, dv: torch.Tensor) -> Coming:
        """Sends gradients of fetched keys and values to their owners; what comes is for ``add``."""
        return self._swap(dk, dv, self._receive_counts, self._send_counts)

    def add(self, own: torch.Tensor, returned: torch.Tensor) -> None:
        """Adds what came back to the gradients of own keys or values, in place, in the order of ranks, in float32 at
        least; rows that nobody fetched are not touched."""
        on = self._on(own.device)
        total = own[:, :, on.touched].to(torch.promote_types(own.dtype, torch.float32), copy=True)
        for at, part in zip(on.places, torch.split(returned, self._send_counts, 2), strict=True):
            add_rows(total, at, part)
        put_rows(own, on.touched, total)

    def _swap(self, k: torch.Tensor, v: torch.Tensor, go: list[int], come: list[int]) -> Coming:
        """Starts it. In what travels, all heads of K and of V at one position are neighbours."""
        sent, received = (k.new_empty(sum(n), _width(k) + _width(v)) for n in (go, come))
        for part, x in zip(_unpacked(sent, k, v), (k, v), strict=True):
            part.copy_(x)
        work = dist.all_to_all_single(received, sent, come, go, group=self._group, async_op=True)
        assert work is not None  # this process is in the group
        return Coming(work, sent, _unpacked(received, k, v))

    def _returns(self, device: torch.device) -> _Returns:
        sent = np.concatenate(self._send)
        touched = np.unique(sent)
        places = [rows_of(np.searchsorted(touched, one), device) for one in self._send]
        return _Returns(rows_of(sent, device), rows_of(touched, device), places)


@dataclass(frozen=True)
class _Returns:
    """Local rows on one device. sent: those for rank 0 first. touched: the same, each once, ascending. places: of those
    for each rank, the places in touched."""

    sent: Rows
    touched: Rows
    places: list[Rows]


@dataclass(frozen=True)
class Coming:
    """K and V (batch, kv_heads, n, dim), or their gradients, on their way. sent: kept until they are there."""

    work: dist.Work
    sent: torch.Tensor
    parts: Sequence[torch.Tensor]

    def wait(self) -> Sequence[torch.Tensor]:
        """Both, for what is launched from now on on the current stream. With NCCL the host does not wait."""
        self.work.wait()
        return self.parts


def rows_of(places: Ints, device: torch.device) -> Rows:
    """Places on an axis, in their order."""
    first = int(places[0]) if len(places) else 0
    if np.array_equal(places, np.arange(first, first + len(places))):
        return slice(first, first + len(places))
    return torch.from_numpy(places).to(device)


def put_rows(x: torch.Tensor, at: Rows, rows: torch.Tensor) -> None:
    """x[:, :, at] = rows, in the dtype of x; no place is there twice."""
    if isinstance(at, slice):
        x[:, :, at].copy_(rows)
    else:
        x.index_copy_(2, at, rows.to(x.dtype))


def add_rows(x: torch.Tensor, at: Rows, more: torch.Tensor) -> None:
    """x[:, :, at] += more, in place; no place is there twice, so each has one writer."""
    if isinstance(at, slice):
        x[:, :, at].add_(more)
    else:
        x.index_add_(2, at, more.to(x.dtype))


def _width(x: torch.Tensor) -> int:
    """Numbers at one position."""
    return x.shape[0] * x.shape[1] * x.shape[3]


def _unpacked(rows: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
    """Rows (n, width of k and of v) as views (batch, heads, n, dim), with the sizes of k and v."""
    parts = zip(torch.split(rows, [_width(k), _width(v)], 1), (k, v), strict=True)
    return [part.view(len(rows), *x.shape[:2], x.shape[3]).permute(1, 2, 0, 3) for part, x in parts]
