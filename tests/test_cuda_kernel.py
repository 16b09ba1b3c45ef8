"""The portable CUDA kernel on a GPU, against a float64 oracle; outputs are poisoned before each run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from splatc.codegen.kernel import KernelSpec
from tests import kernel_tables
from tests.cuda_on_gpu import compile_on_gpu
from tests.test_cuda_source import make_spec

torch = pytest.importorskip("torch")
pytest.importorskip("tvm")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CASES = {case.name: case for case in kernel_tables.all_cases()}
DTYPES = ("float32", "float16", "bfloat16")
TOLERANCE = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 6e-3}


def device_arch() -> str:
    """The architecture of the present GPU: "sm_90a" for Hopper, else "sm_NN"."""
    major, minor = torch.cuda.get_device_capability()
    return "sm_90a" if (major, minor) == (9, 0) else f"sm_{major}{minor}"


def random(dtype: str, *shape: int, seed: int = 0) -> Any:
    """Standard normal values on the GPU, the same for the same arguments."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(getattr(torch, dtype)).cuda()


def poisoned(dtype: str, *shape: int) -> Any:
    """A tensor full of NaN."""
    return torch.full(shape, float("nan"), dtype=getattr(torch, dtype), device="cuda")


def on_gpu(table: np.ndarray) -> Any:
    """An int32 or uint32 table as a CUDA tensor."""
    return torch.from_numpy(table.view(np.int32)).cuda()


def launch(
    spec: KernelSpec, case: kernel_tables.Case, q: Any, k: Any, v: Any, o: Any, lse: Any, scale: float
) -> None:
    """All passes of the case."""
    run = compile_on_gpu(spec)
    strides = {f"{n}{i}": x.stride(i) for n, x in zip("qkvo", (q, k, v, o)) for i in range(3)}
    for index, t in enumerate(case.passes):
        arrays = {"work": t.work(q.shape[1]), "items": t.items, "entries": t.padded_entries(), "views": t.views,
                  "bits": t.bits}  # fmt: skip
        tables = {f"{name}_ptr": on_gpu(array) for name, array in arrays.items()}
        sizes = {"batch": q.shape[0], "q_heads": q.shape[1], "kv_heads": k.shape[1], "q_len": q.shape[2],
                 "kv_len": k.shape[2], "n_work": len(arrays["work"])}  # fmt: skip
        run(len(arrays["work"]) * q.shape[0], q_flat_ptr=q, k_flat_ptr=k, v_flat_ptr=v, o_flat_ptr=o, lse_ptr=lse,
            **tables, **sizes, **strides, scale=scale, merge=int(index > 0))  # fmt: skip
        torch.cuda.synchronize()  # the tables live as long


def check(spec: KernelSpec, case: kernel_tables.Case, q: Any, k: Any, v: Any, o: Any) -> None:
    """Run, and compare O and LSE with the oracle."""
    lse, scale = poisoned("float32", *q.shape[:3]), 0.9 / spec.head_dim**0.5
    launch(spec, case, q, k, v, o, lse, scale)
    a, b, c = (x.float().cpu().numpy() for x in (q, k, v))
    want, want_lse = kernel_tables.reference(a, b, c, case.mask, scale)
    got, got_lse = o.double().cpu().numpy(), lse.double().cpu().numpy()
    some = np.isfinite(want_lse)
    assert np.isneginf(got_lse[~some]).all() and (got[~some] == 0).all()
    assert np.linalg.norm(got - want) <= TOLERANCE[spec.dtype] * np.linalg.norm(want)
    assert np.abs(got_lse[some] - want_lse[some]).max(initial=0.0) < 1e-4


def check_random(spec: KernelSpec, case: kernel_tables.Case, q_heads: int = 2, kv_heads: int = 2) -> None:
    """The same, on contiguous random inputs of batch 2."""
    (q_len, kv_len), d, dv = case.mask.shape, spec.head_dim, spec.v_head_dim
    q = random(spec.dtype, 2, q_heads, q_len, d, seed=1)
    k = random(spec.dtype, 2, kv_heads, kv_len, d, seed=2)
    v = random(spec.dtype, 2, kv_heads, kv_len, dv, seed=3)
    check(spec, case, q, k, v, poisoned(spec.dtype, 2, q_heads, q_len, dv))


def gpu_spec(d: int, dv: int, dtype: str, m: int = 64, n: int = 64) -> KernelSpec:
    return make_spec(d, dv, dtype, device_arch(), m, n)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(CASES))
def test_cases(name: str, dtype: str) -> None:
    check_random(gpu_spec(64, 64, dtype), CASES[name])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("d", "dv"), [(16, 16), (40, 40), (96, 96), (128, 128), (256, 256), (128, 64), (33, 130), (1, 3)]
)
def test_head_dims(d: int, dv: int, dtype: str) -> None:
    check_random(gpu_spec(d, dv, dtype), CASES["two_passes"])
    check_random(gpu_spec(d, dv, dtype), CASES["window"])


@pytest.mark.parametrize(("m", "n"), [(32, 16), (32, 64), (64, 32), (128, 64), (128, 128)])
def test_tile_shapes(m: int, n: int) -> None:
    for case in kernel_tables.all_cases(m, n):
        check_random(gpu_spec(48, 48, "float32", m, n), case)


@pytest.mark.parametrize(("q_heads", "kv_heads"), [(4, 1), (6, 3), (8, 8)])
def test_grouped_heads(q_heads: int, kv_heads: int) -> None:
    check_random(gpu_spec(64, 64, "bfloat16"), CASES["window"], q_heads, kv_heads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_tensors(dtype: str) -> None:
    """bshd tensors seen as bhsd, rows at odd offsets, and an output inside a larger tensor."""
    case, (length, _) = CASES["two_passes"], CASES["two_passes"].mask.shape
    q = random(dtype, 2, length, 4, 40, seed=1).transpose(1, 2)
    k = random(dtype, 2, 2, length, 47, seed=2)[..., 3:43]
    v = random(dtype, 2, length, 2, 40, seed=3).transpose(1, 2)
    room = poisoned(dtype, 2, length, 4, 43)
    check(gpu_spec(40, 40, dtype), case, q, k, v, room[..., 1:41].transpose(1, 2))
    assert torch.isnan(room[..., [0, 41, 42]]).all()


def test_offsets_beyond_31_bits() -> None:
    """Element offsets of K pass 2**31: positions 2**25 elements apart."""
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of free device memory")
    case = kernel_tables.full(64, 64, 64, 128)
    near = random("bfloat16", 1, 1, 128, 64, seed=2)
    far = torch.empty(128 << 25, dtype=torch.bfloat16, device="cuda").as_strided(
        (1, 1, 128, 64), (0, 0, 1 << 25, 1)
    )
    far.copy_(near)
    q, o = random("bfloat16", 1, 1, 64, 64, seed=1), poisoned("bfloat16", 1, 1, 64, 64)
    check(gpu_spec(64, 64, "bfloat16"), case, q, far, far, o)


def test_runs_are_bitwise_equal() -> None:
    spec, case = gpu_spec(64, 64, "bfloat16"), CASES["window"]
    q, k, v = (random("bfloat16", 1, 2, 300, 64, seed=s) for s in range(3))
    first = None
    for _ in range(10):
        o, lse = poisoned("bfloat16", 1, 2, 300, 64), poisoned("float32", 1, 2, 300)
        launch(spec, case, q, k, v, o, lse, 0.125)
        first = o if first is None else first
        assert torch.equal(o, first)
