"""Calls that something records: exported programs in another process, torch.jit.trace, make_fx, fake tensors; and what
they must refuse."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import splatc
from splatc import patterns as P
from splatc.errors import InvalidInput, Unsupported

torch = pytest.importorskip("torch")

from torch._subclasses import FakeTensorMode  # noqa: E402
from torch.autograd import forward_ad  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402

from splatc.nn import SparseAttention  # noqa: E402
from splatc.nn.functional import sparse_attention  # noqa: E402

PROGRAM = """
import sys, torch
from splatc import patterns as P
from splatc.nn.functional import sparse_attention

class Model(torch.nn.Module):
    def __init__(self, pattern):
        super().__init__()
        self.pattern = pattern
    def forward(self, q, k, v):
        return sparse_attention(q, k, v, pattern=self.pattern)

x = [torch.randn(1, 2, 32, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)]
for text in sys.argv[3:]:
    model = Model(P.parse(text))
    wanted = model(*x)
if sys.argv[1] == "save":
    torch.export.save(torch.export.export(model, tuple(x)), sys.argv[2])
else:
    assert torch.equal(torch.export.load(sys.argv[2]).module()(*x), wanted)
"""
CALLS = {
    "compiled": lambda: splatc.compile("causal", seq_len=32, head_dim=16, dtype="float32"),
    "any length": lambda: lambda q, k, v, **options: sparse_attention(q, k, v, pattern=P.causal(), **options),
}


def draw(count: int = 3) -> list[Any]:
    return [torch.randn(1, 2, 32, 16) for _ in range(count)]


def test_an_exported_program_finds_its_mask_or_none(tmp_path: Path) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-W", "ignore", "-c", PROGRAM, words[0], str(tmp_path / "program.pt2"), *words[1:]]
        return subprocess.run(line, capture_output=True, text=True, check=False)

    saved = run("save", "window(3, 0)")
    assert saved.returncode == 0, saved.stderr
    same = run("load", "full()", "causal()", "window(3, 0)")  # the same mask, but not the first one made
    assert same.returncode == 0, same.stderr
    other = run("load", "full()")
    assert "no compiled mask has the handle" in other.stderr and "make one for the same mask" in other.stderr


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("record", ["trace", "make_fx"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_what_was_recorded_computes_anew(record: str, name: str) -> None:
    call, first, second = CALLS[name](), draw(), draw()
    def function(q: Any, k: Any, v: Any) -> Any:
        return call(q, k, v)

    if record == "trace":
        recorded = torch.jit.trace(function, tuple(first), check_trace=False)
    else:
        recorded = make_fx(function)(*first)
    assert torch.equal(recorded(*second), call(*second))


@pytest.mark.parametrize("name", CALLS)
def test_fake_tensors(name: str) -> None:
    call = CALLS[name]()
    with FakeTensorMode():
        assert call(*(torch.empty(1, 2, 32, 16) for _ in range(3))).shape == (1, 2, 32, 16)


@pytest.mark.parametrize("name", CALLS)
def test_forward_mode_is_refused(name: str) -> None:
    call, (q, k, v) = CALLS[name](), draw()
    with forward_ad.dual_level():
        assert call(q, k, v).shape == q.shape  # without a tangent there is nothing to lose
        for given in ((forward_ad.make_dual(q, q), k, v), (q, k, forward_ad.make_dual(v, v))):
            with pytest.raises(Unsupported, match="forward mode"):
                call(*given)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("grad", [True, False])
def test_a_scale_cannot_learn_and_must_be_a_number(grad: bool, name: str) -> None:
    call, (q, k, v) = CALLS[name](), draw()
    q.requires_grad_(grad)
    for scale, words in ((torch.tensor(0.3, requires_grad=True), "multiply q by it"), ("big", "must be a number")):
        with pytest.raises(InvalidInput, match=f"scale is .*{words}"):
            call(q, k, v, scale=scale)
    assert torch.equal(call(q, k, v, scale=torch.tensor(0.25)), call(q, k, v, scale=0.25))


def test_neither_can_that_of_a_layer_or_a_cap() -> None:
    learned = torch.nn.Parameter(torch.tensor(0.3))
    with pytest.raises(InvalidInput, match="scale is a tensor that requires gradients"):
        SparseAttention(32, 2, pattern=P.causal(), scale=learned)
    with pytest.raises(InvalidInput, match="softcap is a tensor that requires gradients"):
        splatc.compile("causal", seq_len=32, head_dim=16, dtype="float32", softcap=learned)


def test_autocast_leaves_float64_alone() -> None:
    q, k, v = (x.double() for x in draw())
    with torch.autocast("cpu", torch.bfloat16):
        assert splatc.attention(q, k, v, "causal").dtype == torch.float64
        assert sparse_attention(q, k, v, pattern=P.causal()).dtype == torch.float64
        assert splatc.attention(q.float(), k.float(), v.float(), "causal").dtype == torch.bfloat16


@pytest.mark.parametrize("call", [splatc.attention, lambda q, k, v, pattern: splatc.sddmm(q, k, pattern)])
def test_what_plans_as_it_goes_says_so_to_a_compiler(call: Any) -> None:
    function = torch.compile(lambda q, k, v: call(q, k, v, "causal"), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"plans a mask at each call, which torch\.compile cannot trace"):
        function(*draw())
