"""Gradients by the portable CUDA kernels without a GPU: compilers take them, their logic runs on the CPU."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from splatc import oracle
from splatc import patterns as P
from splatc.codegen.build import build, device_source
from splatc.codegen.cuda_backward import gradients_cuda
from splatc.codegen.emitted import parse_signatures
from splatc.codegen.kernel import BACKWARD, KernelSpec, gradient_spec, gradient_specs, kernel_spec, no_gradients
from splatc.codegen.target import Target
from splatc.codegen.toolchain import find_compiler
from splatc.compile import make_plan
from splatc.errors import Unsupported
from splatc.ir.score import score_of
from splatc.ir.terms import Terms
from splatc.patterns.heads import heads_of
from splatc.runtime.gradients_portable import PortableGradients
from splatc.runtime.kernel import Kernel
from splatc.runtime.tensors import Shape
from tests import cuda_on_cpu
from tests.fake_gpu import FakeDriver, FakeTorch, fake_gpu, write_built

torch = pytest.importorskip("torch")
pytest.importorskip("tvm")

from tests.dense_gradients import dense_attention, dense_gradients  # noqa: E402  (it imports torch)

needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ with C++20")
MIXED = P.window(3, 0) | P.strided(32)  # two passes, if long enough
D, DV = 20, 12


def spec_of(d: int, dv: int, dtype: str = "float32", arch: str = "sm_80", softcap: bool = False) -> KernelSpec:
    return KernelSpec("portable", d, dv, dtype, 64, 64, Target("cuda", arch), score_of(softcap), role=BACKWARD)


# -- compiling ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(find_compiler() is None, reason="no CUDA compiler (nvcc or NVRTC) is installed")
@pytest.mark.parametrize("spec", [spec_of(64, 64), spec_of(128, 128, "bfloat16", "sm_90a", softcap=True)],
                         ids=lambda spec: spec.name)  # fmt: skip
def test_compiles_without_spills(spec: KernelSpec, tmp_path: Path) -> None:
    build(spec, tmp_path)  # raises CompileError for spills and local memory
    functions = json.loads((tmp_path / "report.json").read_text())["functions"]
    assert [f["name"] for f in functions] == ["splatc_gradient_dq_kernel", "splatc_gradient_dkv_kernel"]
    assert all(0 < f["registers"] <= 255 and f["spill_bytes"] == f["stack_bytes"] == 0 for f in functions)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(Unsupported, match=r"head_dim 256 .* bytes of shared memory and sm_86"):
        gradients_cuda(spec_of(256, 256, arch="sm_86"))


def test_which_kernels_have_them() -> None:
    """Whatever has no gradients by tensor cores."""
    hopper, ampere = Target("cuda", "sm_90a"), Target("cuda", "sm_80")
    for forward in (
        kernel_spec(64, None, "float32", hopper), kernel_spec(64, None, "float32", hopper, allow_tf32=False),
        kernel_spec(33, None, "bfloat16", hopper), kernel_spec(64, 32, "float16", ampere),
    ):  # fmt: skip
        assert no_gradients(forward) is None
        (spec,) = gradient_specs(forward)
        assert spec == gradient_spec(forward) == replace(spec_of(64, 64), **{
            name: getattr(forward, name) for name in ("head_dim", "v_head_dim", "dtype", "target")})  # fmt: skip
    assert len(gradient_specs(kernel_spec(64, None, "bfloat16", hopper))) == 3
    alibi = kernel_spec(64, None, "float32", hopper, score_of(alibi=True))
    assert "portable kernel, which has no alibi" in str(no_gradients(alibi))


# -- computing ---------------------------------------------------------------------------------------------------------


class Machine:
    """Gradients of patterns by the emulated kernels."""

    def __init__(self, folder: Path, spec: KernelSpec) -> None:
        self.spec, self.driver = spec, FakeDriver({}, {}, arch=(8, 0))
        emitted = gradients_cuda(spec)
        source = device_source(emitted, spec.target.arch)
        signatures = {one.name: one for one in parse_signatures(source)}
        for one in emitted.functions:
            self.driver.parameters[one.name] = list(signatures[one.name].parameters)
            run = cuda_on_cpu.compile_on_cpu(source, folder, kernel=one.name)
            self.driver.kernels[one.name] = lambda grid, run=run, **arguments: run(grid[0], **arguments)
        write_built(folder, [{**asdict(one), "parameters": signatures[one.name].parameters}
                             for one in emitted.functions])  # fmt: skip
        self.kernel, self.gpu = Kernel(spec, folder), fake_gpu(self.driver, FakeTorch())

    def gradients(self, pattern: Any, layout: str, cap: float) -> PortableGradients:
        def plan(q_len: int, kv_len: int) -> Any:
            return make_plan(pattern, q_len, kv_len, self.spec)

        def transposed(kv_len: int, q_len: int) -> Any:
            return make_plan(pattern.transposed(), kv_len, q_len, self.spec)

        return PortableGradients(self.kernel, plan, transposed, layout, cap, lambda _: self.gpu)

    def check(self, pattern: Any, q_len: int, kv_len: int, heads: int = 2, kv_heads: int = 2, batch: int = 1,
              layout: str = "bhsd", softcap: float | None = None, bound: float = 3e-6) -> None:  # fmt: skip
        """Each of dq, dk and dv is right, from memory full of NaN; k is strided, one gradient expanded."""
        dtype, d, dv = getattr(torch, self.spec.dtype), self.spec.head_dim, self.spec.v_head_dim
        generator = torch.Generator().manual_seed(q_len)

        def draw(*sizes: int) -> Any:
            return torch.randn(*sizes, generator=generator).to(dtype)

        q, k = draw(batch, heads, q_len, d), draw(batch, kv_len, kv_heads, 2 * d)[..., :d].transpose(1, 2)
        v, do = draw(batch, kv_heads, kv_len, dv), draw(batch, 1, q_len, dv).expand(batch, heads, q_len, dv)
        dlse = torch.randn(batch, heads, q_len, generator=generator) if q_len % 2 else None
        mask = torch.stack([torch.from_numpy(one.dense(q_len, kv_len)) for one in heads_of(pattern, heads)])
        keys, values = (x.repeat_interleave(heads // kv_heads, 1).double() for x in (k, v))
        scale = 1.2 / d**0.5
        o, lse, *_ = dense_attention(q.double(), keys, values, mask, scale, softcap)
        found = dense_gradients(q, k, v, mask, do, dlse, scale, softcap)
        shape = Shape(batch, heads, kv_heads, q_len, kv_len, d, dv, self.spec.dtype, "cuda:0")
        q, k, v, o, do = (x.transpose(1, 2) if layout == "bshd" else x for x in (q, k, v, o.to(dtype), do))
        gradients = self.gradients(pattern, layout, softcap or 0.0)
        torch.use_deterministic_algorithms(True)
        try:
            got = gradients(shape, q, k, v, o, lse.float(), do, dlse, scale)
        finally:
            torch.use_deterministic_algorithms(False)
        assert all(x.dtype == dtype and x.is_contiguous() for x in got)
        errors = found.errors([x.transpose(1, 2) if layout == "bshd" else x for x in got])
        assert all(e < bound for e in errors.values()), errors


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    if shutil.which("g++") is None:
        pytest.skip("needs g++ with C++20")
    return Machine(tmp_path_factory.mktemp("gradients"), spec_of(D, DV))


@pytest.mark.parametrize(("pattern", "q_len", "kv_len"), [
    (MIXED, 301, 301), (P.window(30, 10), 129, 129), (P.causal("bottom_right"), 70, 130), (P.strided(7), 200, 200),
    (P.causal("bottom_right") & ~P.global_rows(3) & ~P.global_cols(20), 130, 90), (P.window(-2000, 2005), 50, 50),
    (P.neighborhood((12, 10), 5), 120, 120), (P.full(), 1, 1), (P.full(), 65, 3),
], ids=str)  # fmt: skip
def test_patterns(machine: Machine, pattern: Any, q_len: int, kv_len: int) -> None:
    machine.check(pattern, q_len, kv_len)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_batch_and_grouped_heads(machine: Machine, layout: str) -> None:
    machine.check(MIXED, 300, 300, heads=4, kv_heads=2, batch=2, layout=layout)
    launched = [(name, values["merge"], values.get("member")) for name, _, values in machine.driver.launched][-6:]
    assert [one for one in launched if "dq" in one[0]] == [("splatc_gradient_dq_kernel", i, None) for i in (0, 1)]
    assert [one[1:] for one in launched if "dkv" in one[0]] == [(0, 0), (1, 0), (1, 1), (1, 1)]


def test_sinks(machine: Machine) -> None:
    """They are in LSE; their gradient needs no kernel."""
    q, k, v, do = (torch.randn(1, 2, 100, dim, generator=torch.Generator().manual_seed(0)) for dim in (D, D, DV, DV))
    sinks, dense = torch.tensor([0.5, 2.0]), P.window(30, 10).dense(100)
    terms, q64, k64, v64, do64 = (x.double().numpy() for x in (sinks, q, k, v, do))
    o, lse = oracle.attention(q64, k64, v64, dense, terms=Terms(sinks=terms))
    wanted = oracle.gradients(q64, k64, v64, dense, do64, terms=Terms(sinks=terms))
    shape = Shape(1, 2, 2, 100, 100, D, DV, "float32", "cuda:0")
    gradients = machine.gradients(P.window(30, 10), "bhsd", 0.0)
    given = shape, q, k, v, torch.from_numpy(o).float(), torch.from_numpy(lse).float(), do, None, D**-0.5
    for x, y in zip(gradients(*given, Terms(sinks=sinks)), wanted, strict=True):
        assert oracle.relative_error(x.double().numpy(), y) < 1e-5
    assert len(gradients(*given, Terms(sinks=sinks), [False] * 4)) == 3


def test_a_pattern_for_each_head(machine: Machine) -> None:
    heads = P.per_head([MIXED, P.full(), P.strided(7), MIXED])
    machine.check(heads, 90, 90, heads=4, kv_heads=2)


def test_no_queries_or_no_keys(machine: Machine) -> None:
    shape = Shape(1, 2, 2, 0, 5, D, DV, "float32", "cuda:0")
    q, k, v, o = (torch.ones(1, 2, n, dim) for n, dim in ((0, D), (5, D), (5, DV), (0, DV)))
    got = machine.gradients(MIXED, "bhsd", 0.0)(shape, q, k, v, o, torch.ones(1, 2, 0), o, None, 0.1)
    assert [x.shape for x in got] == [q.shape, k.shape, v.shape] and not any(x.any() for x in got)


@needs_gxx
def test_chunks_softcap_and_bfloat16(tmp_path: Path) -> None:
    """Head dims that are staged in two chunks, of which the last is not whole."""
    Machine(tmp_path, spec_of(33, 72, "bfloat16", softcap=True)).check(P.window(30, 10), 100, 100, softcap=2.0,
                                                                       bound=1e-2)  # fmt: skip
