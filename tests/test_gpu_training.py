"""Gradients on a Hopper GPU inside PyTorch: streams, graphs, devices, compilers, checkpoints, autocast, modules."""

from __future__ import annotations

import copy
import gc
from typing import Any

import numpy as np
import pytest

from splatc.config import GRADIENT_WALKS

torch = pytest.importorskip("torch")

from tests.gpu_gradients import (  # noqa: E402  (it imports torch)
    BOUND,
    DEVICE,
    KINDS,
    LONG_ROWS,
    MARKS,
    MIXED,
    WINDOW,
    backward,
    check,
    compiled,
    draw,
    same,
)

pytestmark = MARKS


# -- streams, graphs, devices ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("walks", GRADIENT_WALKS)
@pytest.mark.parametrize(("dtype", "dim"), KINDS)
def test_another_stream(dtype: str, dim: int, walks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPLATC_GRADIENT_WALKS", walks)
    attend = compiled(MIXED, 500, 500, dim, dtype)
    *qkv, do = draw(500, 500, dim, dtype)
    wanted = backward(attend, qkv, do)
    streams, results = [torch.cuda.Stream() for _ in range(3)], []
    torch.cuda.synchronize()
    for _ in range(5):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(backward(attend, qkv, do))
    torch.cuda.synchronize()
    assert all(same(got, wanted) for got in results)


@pytest.mark.parametrize("walks", GRADIENT_WALKS)
@pytest.mark.parametrize(("dtype", "dim"), KINDS)
def test_a_captured_graph_reads_new_values(dtype: str, dim: int, walks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward in one graph, replayed on other values, also after calls of many other lengths."""
    monkeypatch.setenv("SPLATC_GRADIENT_WALKS", walks)
    attend = compiled(MIXED, 500, 500, dim, dtype)
    *qkv, do = draw(500, 500, dim, dtype)
    leaves = [x.detach().contiguous().requires_grad_() for x in qkv]

    def step() -> tuple[Any, ...]:
        o = attend(*leaves)
        return o, *torch.autograd.grad(o, leaves, do)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for length in range(60, 100):
        *others, other_do = draw(length, length, dim, dtype)
        backward(attend, others, other_do)
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            for x in (*leaves, do):
                x.normal_()
        graph.replay()
        torch.cuda.synchronize()
        assert same([x.clone() for x in captured], step())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(("dtype", "dim"), KINDS)
def test_two_gpus(dtype: str, dim: int) -> None:
    attend = compiled(MIXED, 300, 300, dim, dtype)
    here = draw(300, 300, dim, dtype)
    there = [x.to("cuda:1") for x in here]
    wanted, _ = check(attend, MIXED, here)
    for _ in range(2):
        got = backward(attend, there[:3], there[3])
        assert all(x.device == torch.device("cuda:1") for x in got) and torch.cuda.current_device() == 0
        assert same([x.to("cuda:0") for x in got], wanted)


# -- compilers, checkpoints, autocast ----------------------------------------------------------------------------------


class Block(torch.nn.Module):  # type: ignore[name-defined,misc]
    """A layer as people write it: 2 heads of 64."""

    def __init__(self, attend: Any) -> None:
        super().__init__()
        self.attend, self.project = attend, torch.nn.Linear(128, 384)

    def forward(self, x: Any) -> Any:
        batch, length, _ = x.shape
        q, k, v = self.project(x).view(batch, length, 3, 2, 64).permute(2, 0, 3, 1, 4)
        o, lse = self.attend(q, k, v, return_lse=True, scale=0.25)
        return o.transpose(1, 2).reshape(batch, length, 128) + lse.mean().to(o.dtype)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_without_a_break_and_without_a_recompilation(backend: str) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    block = Block(compiled(MIXED, 150, 150, 64, "bfloat16")).to(DEVICE, torch.bfloat16)
    traced = torch.compile(block, fullgraph=True, dynamic=True, backend=backend)

    def both(length: int) -> None:
        x = torch.randn(2, length, 128, device=DEVICE, dtype=torch.bfloat16)
        results = []
        for f in (block, traced):
            block.zero_grad()
            y = f(x)
            y.float().square().sum().backward()
            results.append([y.detach(), block.project.weight.grad.clone()])
        for a, b in zip(*results):
            assert float((a.float() - b.float()).norm() / a.float().norm()) < BOUND

    both(150)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (64, 201, 700):
            both(length)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_opcheck(layout: str) -> None:
    from splatc.runtime import torch_ops

    attend = compiled(MIXED, 100, 100, 64, "bfloat16", layout=layout)
    *qkv, _ = draw(100, 100, 64, "bfloat16", 2, 1)
    qkv = [(x if layout == "bhsd" else x.transpose(1, 2)).contiguous() for x in qkv]
    options = attend._handle, None, True
    torch.library.opcheck(torch_ops.attention, (*(x.clone().requires_grad_() for x in qkv), *options))
    o, lse = attend(*qkv, return_lse=True, enable_gqa=True)
    torch.library.opcheck(torch_ops.attention_backward, (*qkv, o, lse, torch.ones_like(o), lse * 0, *options),
                          test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))  # fmt: skip


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    attend = compiled(MIXED, 300, 300, 64, "bfloat16")
    *qkv, do = draw(300, 300, 64, "bfloat16")
    leaves = [x.detach().requires_grad_() for x in qkv]
    out = checkpoint(lambda *x: attend(*x), *leaves, use_reentrant=reentrant)
    out.backward(do)
    assert same([x.grad for x in leaves], backward(attend, qkv, do))


def test_autocast() -> None:
    """Inputs in float32, attention in the dtype that was compiled, gradients in float32 again."""
    attend = compiled(MIXED, 300, 300, 64, "bfloat16")
    *qkv, do = draw(300, 300, 64, "bfloat16")
    leaves = [x.float().requires_grad_() for x in qkv]
    with torch.autocast(DEVICE, torch.bfloat16):
        o = attend(*leaves)
    assert o.dtype == torch.bfloat16
    got = torch.autograd.grad(o, leaves, do)
    assert all(x.dtype == torch.float32 for x in got)
    assert same(got, [x.float() for x in backward(attend, qkv, do)])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_module_learns(dtype: str) -> None:
    """splatc.nn on the GPU: output and the gradients of all parameters against the same layer in float64 on the CPU."""
    from splatc.nn import SparseAttention

    torch.manual_seed(0)
    layer = SparseAttention(256, 4, MIXED, num_kv_heads=2).to(DEVICE, getattr(torch, dtype))
    exact = copy.deepcopy(layer).cpu().double()
    for length in (300, 77):
        x = torch.randn(2, length, 256, device=DEVICE, dtype=getattr(torch, dtype))
        results = []
        for one, given in ((layer, x), (exact, x.cpu().double())):
            one.zero_grad()
            y = one(given)
            y.double().square().sum().backward()
            results.append([y.detach(), *(p.grad for p in one.parameters() if p.ndim == 2)])
        for a, b in zip(*results):
            assert float((a.cpu().double() - b).norm() / b.norm()) < 2 * BOUND


OLD = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)


@pytest.mark.parametrize("pattern", [
    pytest.param(WINDOW, marks=pytest.mark.skipif(OLD, reason="PyTorch 2.11 traces patterns as text only")),
    "causal & window(80, 0)",
], ids=str)  # fmt: skip
def test_the_function_in_a_trace(pattern: Any) -> None:
    """Traced before anything is compiled, for any length."""
    from splatc.nn.functional import sparse_attention

    torch._dynamo.reset()

    def run(q: Any, k: Any, v: Any) -> Any:
        return sparse_attention(q, k, v, pattern, enable_gqa=True)

    traced = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (300, 129, 500):
        *qkv, do = draw(length, length, 64, "bfloat16", 4, 2)
        both = []
        for f in (traced, run):
            leaves = [x.detach().requires_grad_() for x in qkv]
            both.append(torch.autograd.grad(f(*leaves), leaves, do))
        assert same(*both)


def test_memory_does_not_grow() -> None:
    """What steps of the same shape leave behind."""
    attend = compiled(LONG_ROWS, 1000, 1000, 64, "bfloat16")
    *qkv, do = draw(1000, 1000, 64, "bfloat16")
    sizes = []
    gc.collect()  # what other tests have left
    for _ in range(10):
        backward(attend, qkv, do)
        torch.cuda.synchronize()
        sizes.append(torch.cuda.memory_allocated())
    assert np.ptp(sizes[2:]) == 0
