"""What the tests of gradients on a Hopper GPU share: tensors, gradients from poisoned memory, the check."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

import splatc
from splatc import patterns as P
from splatc.patterns.heads import patterns_of
from tests.dense_gradients import dense_gradients

DEVICE = "cuda"
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
MARKS = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")]

BOUND = 1e-2  # relative error of each of dq, dk and dv
KINDS = [("bfloat16", 64), ("bfloat16", 128), ("float16", 64), ("float16", 128)]
MIXED = P.causal() & (P.window(30, 0) | P.strided(32))  # two passes
LONG_ROWS = P.longformer(40, 8)
WINDOW = P.window(80, 10)  # every row has some keys


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """New memory holds NaN, and only deterministic operations may run."""
    torch.use_deterministic_algorithms(True)  # fill_uninitialized_memory is on by default
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def draw(q_len: int, kv_len: int, dim: int, dtype: str, heads: int = 2, kv_heads: int = 2, batch: int = 1,
         v_dim: int | None = None) -> list[Any]:  # fmt: skip
    """Random q, k, v and do (batch, heads, seq, dim); k is strided (bshd memory). v_dim: of v and do, if it differs."""
    v_dim = v_dim or dim
    generator = torch.Generator(DEVICE).manual_seed(q_len * 7 + kv_len + dim)

    def normal(*shape: int) -> Any:
        return torch.randn(*shape, device=DEVICE, generator=generator).to(getattr(torch, dtype))

    q, v = normal(batch, heads, q_len, dim), normal(batch, kv_heads, kv_len, v_dim)
    do = normal(batch, heads, q_len, v_dim)
    return [q, normal(batch, kv_len, kv_heads, dim).transpose(1, 2), v, do]


def draw_dlse(do: Any) -> Any:
    """A random gradient of lse."""
    generator = torch.Generator(DEVICE).manual_seed(do.shape[2])
    return torch.randn(do.shape[:3], device=DEVICE, generator=generator)


def mask_of(pattern: Any, heads: int, q_len: int, kv_len: int) -> Any:
    """(heads, q_len, kv_len) on the device; of batch entries with patterns of their own, (batch, heads, ...)."""
    entries = pattern.batch if isinstance(pattern, P.PerBatch) else 0
    of_heads = patterns_of(pattern, heads, entries)
    each = {one: torch.from_numpy(one.dense(q_len, kv_len)).to(DEVICE) for one in dict.fromkeys(of_heads)}
    masks = torch.stack([each[one] for one in of_heads])
    return masks.view(entries, heads, q_len, kv_len) if entries else masks


def compiled(pattern: Any, q_len: int, kv_len: int, dim: int, dtype: str, **options: Any) -> Any:
    return splatc.compile(pattern, seq_len=q_len, kv_len=kv_len, head_dim=dim, dtype=dtype, target=DEVICE, **options)


def backward(attend: Any, qkv: Sequence[Any], do: Any, dlse: Any = None, **options: Any) -> tuple[Any, ...]:
    """(dq, dk, dv) by autograd, from memory full of NaN."""
    leaves = [x.detach().requires_grad_() for x in qkv]
    with poisoned():
        o, lse = attend(*leaves, return_lse=True, **options)
        wanted, given = ([o], [do]) if dlse is None else ([o, lse], [do, dlse])
        return torch.autograd.grad(wanted, leaves, given)


def same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def check(attend: Any, pattern: Any, tensors: list[Any], dlse: Any = None, softcap: Any = None, **options: Any) -> Any:
    """Each of dq, dk and dv is finite and right; returns them and the reference."""
    q, k, v, do = tensors
    qkv = q, k, v
    got = backward(attend, qkv, do, dlse, **options)
    mask = mask_of(pattern, q.shape[1], q.shape[2], k.shape[2])
    found = dense_gradients(q, k, v, mask, do, dlse, options.get("scale"), softcap)
    for x, y in zip(got, qkv):
        assert x.shape == y.shape and x.dtype == y.dtype and x.device == y.device
    errors = found.errors(got)
    assert all(e < BOUND for e in errors.values()), (tuple(q.shape), tuple(k.shape), errors)
    unseen = (~mask.any(-1), ~mask.any(-2))  # ([batch,] heads, q_len), ([batch,] heads, kv_len)
    assert (got[0] * unseen[0][..., None] == 0).all()
    if q.shape[1] == k.shape[1]:
        assert all((x * unseen[1][..., None] == 0).all() for x in got[1:])
    return got, found
