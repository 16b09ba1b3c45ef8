"""Context parallel attention against one GPU: torchrun --nproc-per-node 2 -m splatc.bench.context_parallel

Window and strided masks, 64K positions, forward, and forward with backward. All ranks run together; the slowest counts.
Beside them the exchange of a forward pass alone, packing included: what has to be hidden.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from splatc.patterns import causal, strided, window

LENGTH, HEADS, DIM = 65536, 16, 128
ROUNDS, CALLS = 5, 50  # so many calls that barriers around them do not count
PATTERNS = {
    "window": causal() & window(1024, 0),
    "strided": causal() & strided(128),
    "wide strided": strided(16),
}


def main() -> None:
    """Prints for each mask and direction the times, their ratio and the bytes of each rank."""
    import torch
    import torch.distributed as dist

    from splatc import attention
    from splatc.distributed import context_parallel

    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    whole = [torch.randn(1, HEADS, LENGTH, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    for name, pattern in PATTERNS.items():
        attend = context_parallel(pattern, seq_len=LENGTH)
        *qkv, do = whole
        *local, local_do = [attend.shard(x) for x in whole]
        traffic = attend.bytes_communicated(*local[1:])
        exchange = _seconds(partial(_exchange, attend, *local[1:])) if attend.plan.exchanges else 0.0
        for backward in (False, True):
            one = _seconds(_step(lambda q, k, v, p=pattern: attention(q, k, v, p), qkv, do, backward))
            many = _seconds(_step(attend, local, local_do, backward))
            received = traffic.forward_received + backward * traffic.backward_received
            every: list[Any] = [None] * ranks
            dist.all_gather_object(every, received)
            if rank == 0:
                what = "forward and backward" if backward else "forward"
                print(
                    f"{name} {what}: {attend.layout}, 1 GPU {one * 1e3:.3f} ms, {ranks} GPUs {many * 1e3:.3f} ms, "
                    f"{one / many:.2f}x, bytes received {every}, one exchange alone {exchange * 1e3:.3f} ms, "
                    f"on {torch.cuda.get_device_name()}",
                    flush=True,
                )
    dist.destroy_process_group()


def _step(attend: Callable[..., Any], qkv: list[Any], do: Any, backward: bool) -> Callable[[], Any]:
    import torch

    if not backward:
        return lambda: attend(*qkv)
    leaves = [x.clone().requires_grad_() for x in qkv]
    return lambda: torch.autograd.grad(attend(*leaves), leaves, do)


def _exchange(attend: Any, k: Any, v: Any) -> None:
    attend.exchange.fetch(k, v).wait()


def _seconds(step: Callable[[], Any]) -> float:
    """A call's seconds on the slowest rank: the median of some rounds of several calls."""
    import torch
    import torch.distributed as dist

    samples = []
    for _ in range(ROUNDS + 2):
        torch.cuda.synchronize()
        dist.barrier()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            step()
        torch.cuda.synchronize()
        taken = torch.tensor((time.perf_counter() - start) / CALLS, device="cuda", dtype=torch.float64)
        dist.all_reduce(taken, dist.ReduceOp.MAX)
        samples.append(float(taken))
    return sorted(samples[2:])[ROUNDS // 2]


if __name__ == "__main__":
    main()
