"""Gradients on a GPU by the portable kernels, in float32 and where tensor cores have none, against float64 autograd.

What a kernel does not write is NaN here (``poisoned``), and PyTorch's deterministic mode is on while it runs.
"""

from __future__ import annotations

from typing import Any

import pytest

import splatc
from splatc import oracle
from splatc import patterns as P
from splatc.ir.terms import Terms

torch = pytest.importorskip("torch")

from tests.dense_gradients import dense_gradients  # noqa: E402  (it imports torch)
from tests.gpu_gradients import (  # noqa: E402  (it imports torch)
    DEVICE,
    LONG_ROWS,
    MIXED,
    WINDOW,
    backward,
    compiled,
    draw,
    draw_dlse,
    mask_of,
    same,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
PATTERNS = {"window": WINDOW, "passes": MIXED, "long rows": LONG_ROWS, "full": P.full(), "strided": P.strided(7),
            "grid": P.neighborhood((20, 15), 5), "uneven": P.causal("bottom_right") & ~P.global_rows(3)}  # fmt: skip
# (dtype, head_dim, options): float32, the same after a forward pass by tensor cores, head dims that these do not take
KINDS = {"float32": ("float32", 64, {"allow_tf32": False}), "tf32": ("float32", 64, {}),
         "odd": ("bfloat16", 33, {}), "wide": ("float32", 256, {"allow_tf32": False})}  # fmt: skip
BOUND = {"float32": 1e-5, "tf32": 3e-3, "odd": 1e-2, "wide": 1e-5}


def check(kind: str, pattern: Any, q_len: int, kv_len: int, heads: int = 2, kv_heads: int = 2, batch: int = 1,
          softcap: float | None = None) -> None:  # fmt: skip
    dtype, dim, options = KINDS[kind]
    attend = compiled(pattern, q_len, kv_len, dim, dtype, softcap=softcap, **options)
    q, k, v, do = draw(q_len, kv_len, dim, dtype, heads, kv_heads, batch)
    dlse = draw_dlse(do) if q_len % 2 else None
    gqa = {"enable_gqa": heads != kv_heads}
    got = backward(attend, (q, k, v), do, dlse, **gqa)
    assert same(backward(attend, (q, k, v), do, dlse, **gqa), got)
    errors = dense_gradients(q, k, v, mask_of(pattern, heads, q_len, kv_len), do, dlse, None, softcap).errors(got)
    assert all(e < BOUND[kind] for e in errors.values()), errors


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PATTERNS)
def test_patterns(name: str, kind: str) -> None:
    check(kind, PATTERNS[name], 300, 300)


@pytest.mark.parametrize("kind", ["float32", "tf32", "odd"])
def test_sizes_and_heads(kind: str) -> None:
    check(kind, P.causal("bottom_right"), 130, 301, heads=4, kv_heads=2, batch=2)
    check(kind, P.full(), 1, 1)
    check(kind, MIXED, 1001, 1001, heads=4, kv_heads=1)
    check(kind, P.per_head([MIXED, P.full(), P.strided(7), MIXED]), 200, 200, heads=4, kv_heads=2)
    check(kind, WINDOW, 200, 200, softcap=2.0)


def test_sinks() -> None:
    """After a forward pass in tf32, which is the one that has them."""
    q, k, v, do = draw(300, 300, 64, "float32")
    sinks = torch.tensor([0.5, 2.0], device=DEVICE, requires_grad=True)
    a, b, c = leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    got = torch.autograd.grad(splatc.attention(a, b, c, WINDOW, sinks=sinks), [*leaves, sinks], do)
    arrays = [x.detach().double().cpu().numpy() for x in (q, k, v, do, sinks)]
    mask = mask_of(WINDOW, 2, 300, 300).cpu().numpy()
    wanted = oracle.gradients(arrays[0], arrays[1], arrays[2], mask, arrays[3], terms=Terms(sinks=arrays[4]))
    for x, y in zip(got, wanted, strict=True):
        assert oracle.relative_error(x.double().cpu().numpy(), y) < BOUND["tf32"]


def test_layout_and_a_long_sequence() -> None:
    """Memory grows with the length alone."""
    attend = compiled(WINDOW, 16384, 16384, 64, "float32", layout="bshd")
    q, k, v, do = (x.transpose(1, 2).contiguous() for x in draw(16384, 16384, 64, "float32"))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    got = backward(attend, (q, k, v), do)
    assert torch.cuda.max_memory_allocated() - before < 20 * q.nbytes
    q, k, v, do = (x.transpose(1, 2)[:, :, :1000] for x in (q, k, v, do))
    found = dense_gradients(q, k, v, mask_of(WINDOW, 2, 1000, 1000), do)
    rows = slice(0, 900)  # keys that no later query attends to
    for x, wanted in zip(got, found.gradients, strict=True):
        x, wanted = x.transpose(1, 2)[:, :, rows].double(), wanted[:, :, rows]
        assert float((x - wanted).norm() / wanted.norm()) < 3e-3
