"""A few queries at the end of a sequence: results and gradients of few.attend against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from splatc.integrations.transformers import few
from splatc.integrations.transformers.tail import tail
from splatc.patterns import Pattern, heads_of

BOUNDS = {"float64": 1e-12, "float32": 1e-5, "float16": 1e-2, "bfloat16": 1e-2}  # of relative errors
SCALE = 0.3


def expected(pattern: Pattern, q: Any, k: Any, v: Any, softcap: float | None, sinks: Any) -> Any:
    """Attention of the last queries, in float64; rows of nothing give 0."""
    q_len, kv_len = q.shape[2], k.shape[2]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    s = SCALE * q @ k.mT
    s = s if softcap is None else softcap * torch.tanh(s / softcap)
    mask = np.stack([one.dense(kv_len)[kv_len - q_len :] for one in heads_of(pattern, q.shape[1])])
    p = s.masked_fill(~torch.from_numpy(mask).to(q.device), -float("inf")).exp()
    total = p.sum(-1, keepdim=True) + (0 if sinks is None else sinks.exp()[:, None, None])
    return p / total.masked_fill(total == 0, 1) @ v


def check(pattern: Pattern, dtype: str, device: str = "cpu", q_len: int = 3, kv_len: int = 23,
          dims: tuple[int, int] = (16, 16), softcap: float | None = None, sinks: bool = False) -> None:  # fmt: skip
    """The result without and with gradients, and the gradients: 4 heads, of keys 2, in a batch of 2."""
    shapes = (2, 4, q_len, dims[0]), (2, 2, kv_len, dims[0]), (2, 2, kv_len, dims[1])
    given = [torch.randn(shape, device=device).to(getattr(torch, dtype)) for shape in shapes]
    if sinks:
        given.append(torch.randn(4, device=device).to(torch.promote_types(given[0].dtype, torch.float32)))

    def run(attend: Any, given: list[Any]) -> list[Any]:
        given = [x.detach().requires_grad_() for x in given]
        o = attend(*given[:3], given[3] if sinks else None)
        o.double().pow(2).sum().backward()
        return [o.detach(), *(x.grad for x in given)]

    theirs = run(lambda q, k, v, s: expected(pattern, q, k, v, softcap, s), [x.double() for x in given])
    ours = run(lambda q, k, v, s: few.attend(tail(pattern), q, k, v, SCALE, softcap, s), given)
    with torch.no_grad():
        alone = few.attend(tail(pattern), given[0], given[1], given[2], SCALE, softcap, given[3] if sinks else None)
    assert alone.dtype == ours[0].dtype == given[0].dtype
    for name, a, b in zip(("alone", "o", "dq", "dk", "dv", "dsinks"), [alone, *ours], [theirs[0], *theirs]):  # noqa: B905
        assert torch.linalg.norm(a - b) <= BOUNDS[dtype] * torch.linalg.norm(b), name
