"""Functions run by several processes of one group, and what they check: context-parallel attention against float64."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from splatc import oracle
from splatc.distributed import ContextParallel

Counted = list[tuple[int, int]]
multiprocessing.set_forkserver_preload(["torch.distributed", "pytest", "splatc.distributed"])


def on_ranks(ranks: int, folder: Path, function: Callable[..., None], *args: Any, backend: str = "gloo") -> None:
    """function(*args) in each of so many processes; what fails in one fails here."""
    store = f"file://{folder}/store"
    method = "forkserver" if backend == "gloo" else "spawn"  # torch is imported once, but CUDA is not shared
    torch.multiprocessing.start_processes(  # type: ignore[no-untyped-call]
        _enter, (ranks, store, backend, function, args), ranks, start_method=method)  # fmt: skip


def _enter(rank: int, ranks: int, store: str, backend: str, function: Callable[..., None], args: Any) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=ranks)
    try:
        function(*args)
    finally:
        dist.destroy_process_group()


def counting() -> Counted:
    """Bytes (sent, received) of each all_to_all_single from now on: a list that grows."""
    seen: Counted = []
    original = dist.all_to_all_single

    def counted(out: torch.Tensor, rows: torch.Tensor, *args: Any, **named: Any) -> Any:
        seen.append((rows.numel() * rows.element_size(), out.numel() * out.element_size()))
        return original(out, rows, *args, **named)

    dist.all_to_all_single = counted  # type: ignore[assignment]
    return seen


def check(attend: ContextParallel, mask: np.ndarray[Any, Any], heads: int = 4, kv_heads: int = 2, batch: int = 2,
          dim: int = 16, dtype: torch.dtype = torch.float32, device: str = "cpu", bound: float = 2e-5,
          softcap: float | None = None, v_dim: int | None = None, scale: float | None = None) -> None:  # fmt: skip
    """Forward, LSE and gradients against the oracle; two backward passes are equal; bytes are those the mask needs."""
    n = mask.shape[-1]
    rng = np.random.default_rng(n)
    v_dim = v_dim or dim
    sizes = (heads, dim), (kv_heads, dim), (kv_heads, v_dim), (heads, v_dim)
    q, k, v, do = (
        torch.from_numpy(rng.standard_normal((batch, h, n, d))).to(device, dtype) for h, d in sizes
    )
    dlse = torch.from_numpy(rng.standard_normal((batch, heads, n))).to(device)
    dlse = dlse.to(torch.promote_types(dtype, torch.float32))
    xq, xk, xv, xdo, xdlse = (x.double().cpu().numpy() for x in (q, k, v, do, dlse))
    wanted = oracle.attention(xq, xk, xv, mask, scale, softcap)
    wanted_gradients = oracle.gradients(xq, xk, xv, mask, xdo, xdlse, scale, softcap)
    local = [attend.shard(x).requires_grad_() for x in (q, k, v)]
    seen = counting()
    o, lse = attend(*local, return_lse=True, enable_gqa=True, scale=scale)
    finite = np.isfinite(wanted[1])
    got_lse = attend.unshard(lse).double().cpu().numpy()
    assert oracle.relative_error(attend.unshard(o).double().cpu().numpy(), wanted[0]) < bound
    assert (np.isfinite(got_lse) == finite).all()
    assert oracle.relative_error(got_lse[finite], wanted[1][finite]) < bound
    grads = [torch.autograd.grad((o, lse), local, (attend.shard(do), attend.shard(dlse).where(lse.isfinite(), 0)),
                                 retain_graph=True) for _ in range(2)]  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    for got, one in zip(grads[0], wanted_gradients, strict=True):
        assert oracle.relative_error(attend.unshard(got).double().cpu().numpy(), one) < bound

    traffic = attend.bytes_communicated(*local[1:])
    rows = attend.positions.numpy()
    needed = np.array(mask.reshape(-1, n, n)[:, rows].any((0, 1)))
    needed[rows] = False
    size = batch * kv_heads * (dim + v_dim) * k.element_size()
    assert traffic.forward_received == traffic.backward_sent == int(needed.sum()) * size
    forward, *backward = seen or [(0, 0)] * 3
    assert forward == (traffic.forward_sent, traffic.forward_received)
    assert backward == [(traffic.backward_sent, traffic.backward_received)] * 2
