"""A few queries at the end of a sequence: few.attend, its results and gradients, against the oracle."""

from __future__ import annotations

import torch

from splatc import oracle
from splatc.integrations.transformers import few
from splatc.integrations.transformers.tail import tail
from splatc.ir.terms import NO_TERMS, Terms
from splatc.patterns import Pattern

SCALE = 0.3
# Of relative errors: of results with head_dim 16, of gradients. Scores grow with head_dim here, and so does what they
# are rounded by; in 16 bits that of O counts.
BOUNDS = {"float64": (1e-13, 1e-12), "float32": (1e-6, 1e-5), "float16": (1e-2, 1e-2), "bfloat16": (1e-2, 1e-2)}


def check(pattern: Pattern, dtype: str, device: str = "cpu", q_len: int = 3, kv_len: int = 23,
          dims: tuple[int, int] = (16, 16), softcap: float | None = None, sinks: bool = False) -> None:  # fmt: skip
    """4 heads, of keys 2, in a batch of 2: the result with gradients and without, head by head, and the gradients."""
    shapes = (4, q_len, dims[0]), (2, kv_len, dims[0]), (2, kv_len, dims[1]), (4, q_len, dims[1])
    q, k, v, do = (torch.randn(2, *shape, device=device).to(getattr(torch, dtype)) for shape in shapes)
    logits = torch.randn(4, device=device).to(torch.promote_types(q.dtype, torch.float32)) if sinks else None
    leaves = [x.requires_grad_() for x in (q, k, v, logits) if x is not None]
    results = [few.attend(tail(pattern), q, k, v, SCALE, softcap, logits)]
    gradients = torch.autograd.grad(results[0], leaves, do)
    with torch.no_grad():
        results.append(few.attend(tail(pattern), q, k, v, SCALE, softcap, logits))

    bound, bound_of_gradients = BOUNDS[dtype]
    bound *= dims[0] / 16 if dtype in ("float32", "float64") else 1
    mask = pattern.dense(kv_len)[..., kv_len - q_len :, :]
    a, b, c, *others = (x.detach().double().cpu().numpy() for x in leaves)
    terms = Terms(sinks=others[0]) if sinks else NO_TERMS
    wanted, _ = oracle.attention(a, b, c, mask, SCALE, softcap, terms)
    for o in results:
        assert o.dtype == q.dtype
        for h in range(4):
            assert oracle.relative_error(o[:, h].detach().double().cpu().numpy(), wanted[:, h]) <= bound, h
    all_wanted = oracle.gradients(a, b, c, mask, do.double().cpu().numpy(), None, SCALE, softcap, terms)
    for name, got, one in zip(("q", "k", "v", "sinks")[: len(leaves)], gradients, all_wanted, strict=True):
        assert oracle.relative_error(got.double().cpu().numpy(), one) <= bound_of_gradients, name
