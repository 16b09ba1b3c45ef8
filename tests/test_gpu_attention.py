"""splatc on a CUDA device, end to end, against the float64 oracle: every pattern of the library, odd sizes included."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import splatc
from splatc import oracle
from splatc import patterns as P
from splatc.codegen.kernel import HOPPER_TILES
from splatc.errors import Unsupported
from tests.library import LIBRARY, SQUARE

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# of O and LSE; "tf32": float32 by tensor cores, "float32": without them
TOLERANCE = {"float32": 1e-5, "tf32": 2e-3, "float16": 5e-3, "bfloat16": 1e-2}
LSE_TOLERANCE = {"float32": 1e-3, "tf32": 2e-3, "float16": 1e-3, "bfloat16": 1e-3}
STRIDED = P.causal() & (P.window(31, 0) | P.strided(32))  # two passes at longer lengths
SIZES = [(1, 1), (17, 17), (63, 63), (127, 127), (129, 129), (1000, 1000), (129, 300), (300, 64)]


def options(dtype: str) -> dict[str, Any]:
    """What asks for a kernel of TOLERANCE's."""
    return {"allow_tf32": dtype == "tf32"} if dtype in ("float32", "tf32") else {}


def kind(dtype: str) -> str:
    """The type of the tensors."""
    return "float32" if dtype == "tf32" else dtype


def draw(q_len: int, kv_len: int, dim: int, v_dim: int, dtype: str, heads: int = 4, kv_heads: int = 2) -> list[Any]:
    """Random q, k, v on the device; k is strided (bshd memory), so that strides are always exercised."""
    generator = torch.Generator("cuda").manual_seed(q_len * 7 + kv_len + dim)
    of = getattr(torch, kind(dtype))
    q = torch.randn(2, heads, q_len, dim, device="cuda", generator=generator).to(of)
    k = torch.randn(2, kv_len, kv_heads, dim, device="cuda", generator=generator).to(of).transpose(1, 2)
    v = torch.randn(2, kv_heads, kv_len, v_dim, device="cuda", generator=generator).to(of)
    return [q, k, v]


def reference(q: Any, k: Any, v: Any, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return oracle.attention(q.double().cpu().numpy(), k.double().cpu().numpy(), v.double().cpu().numpy(), mask)


def check(pattern: Any, mask: np.ndarray, q_len: int, kv_len: int, dim: int, dtype: str, v_dim: int = 0) -> None:
    q, k, v = draw(q_len, kv_len, dim, v_dim or dim, dtype)
    o, lse = splatc.attention(q, k, v, pattern, return_lse=True, enable_gqa=True, **options(dtype))
    want, want_lse = reference(q, k, v, mask)
    got_lse = lse.cpu().numpy()
    assert oracle.relative_error(o.double().cpu().numpy(), want) < TOLERANCE[dtype]
    finite = np.isfinite(want_lse)
    assert np.array_equal(np.isneginf(got_lse), ~finite)
    assert np.abs(got_lse[finite] - want_lse[finite]).max(initial=0) < LSE_TOLERANCE[dtype]
    assert (o.cpu().numpy() if kind(dtype) == "float32" else o.float().cpu().numpy())[~finite].any() == np.False_


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", [*LIBRARY, *SQUARE])
def test_every_pattern(name: str, dtype: str) -> None:
    for q_len, kv_len in SIZES:
        if name in SQUARE and q_len != kv_len:
            continue
        pattern = {**LIBRARY, **SQUARE}[name](q_len, kv_len)
        check(pattern, pattern.dense(q_len, kv_len), q_len, kv_len, 64, dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "tf32"])
@pytest.mark.parametrize(("dim", "v_dim"), [(16, 16), (32, 32), (40, 24), (96, 96), (64, 128), (128, 64), (128, 128),
                                            (192, 128), (192, 192), (256, 256)])  # fmt: skip
def test_head_dims(dim: int, v_dim: int, dtype: str) -> None:
    check(STRIDED, STRIDED.dense(300), 300, 300, dim, dtype, v_dim)


@pytest.mark.parametrize("tile", HOPPER_TILES)
def test_tiles(tile: tuple[int, int]) -> None:
    for dim in (64, 128):
        if tile[0] == 192 and dim == 128:
            continue  # of more registers than there are
        qkv = draw(333, 333, dim, dim, "bfloat16", kv_heads=4)
        attend = splatc.compile(STRIDED, seq_len=333, head_dim=dim, dtype="bfloat16", tile=tile)
        assert close(attend(*qkv), qkv, STRIDED.dense(333), "bfloat16")


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_heads_that_share_keys(kv_heads: int) -> None:
    q, k, v = draw(500, 700, 128, 128, "bfloat16", kv_heads=kv_heads)
    o = splatc.attention(q, k, v, P.causal("bottom_right"), enable_gqa=True)
    assert close(o, (q, k, v), P.causal("bottom_right").dense(500, 700), "bfloat16")


@pytest.mark.parametrize("tile", [(64, 32), (64, 64), (64, 128), (128, 32), (128, 128), (192, 64)])
def test_tiles_in_tf32(tile: tuple[int, int]) -> None:
    for dim in (8, 64):
        qkv = draw(333, 333, dim, dim, "tf32", kv_heads=4)
        attend = splatc.compile(STRIDED, seq_len=333, head_dim=dim, dtype="float32", tile=tile)
        assert close(attend(*qkv), qkv, STRIDED.dense(333), "tf32")


def test_softcap_and_long_rows_in_tf32() -> None:
    """Split rows are put together in float32."""
    pattern = P.longformer(40, 8)
    q, k, v = draw(3000, 3000, 64, 64, "tf32", heads=1, kv_heads=1)
    o, lse = splatc.attention(q, k, v, pattern, softcap=5.0, return_lse=True)
    a, b, c = (x.double().cpu().numpy() for x in (q, k, v))
    want, want_lse = oracle.attention(a, b, c, pattern.dense(3000), softcap=5.0)
    assert oracle.relative_error(o.double().cpu().numpy(), want) < 2e-3
    assert np.abs(lse.cpu().numpy() - want_lse).max() < 2e-3


def test_float32_can_be_exact() -> None:
    """Without tf32 the result is a float32 one; with it, it is not, but not truncated either."""
    (q, k, v), mask = draw(500, 500, 64, 64, "float32", kv_heads=4), np.ones((500, 500), bool)
    error = {}
    for dtype in ("float32", "tf32"):
        o = splatc.attention(q, k, v, P.full(), **options(dtype))
        error[dtype] = oracle.relative_error(o.double().cpu().numpy(), reference(q, k, v, mask)[0])
    assert error["float32"] < 1e-5 < 1e-4 < error["tf32"] < 8e-4  # truncated inputs give 1.7e-3


@pytest.mark.parametrize(("dtype", "dim"), [("bfloat16", 64), ("float16", 64), ("bfloat16", 128)])
@pytest.mark.parametrize("pattern", [P.full(), P.causal(), P.window(200, 40), P.window(300, -100) | P.sink(2)], ids=str)
@pytest.mark.parametrize("low_to_high", [(-90, 90), (90, -90), (-200, -190), (190, 200), (-1, 1)], ids=str)
def test_scores_that_rise_and_fall(low_to_high: tuple[int, int], pattern: Any, dtype: str, dim: int) -> None:
    """Along the keys, by far more than exponentials have room for: maxima move in every tile, or are never positive."""
    length = 900
    q, k, v = draw(length, length, dim, dim, dtype)
    q[..., 0], k[..., 0] = 8, torch.linspace(*low_to_high, length, device="cuda").to(k.dtype) * dim**0.5 / 8
    o, lse = splatc.attention(q, k, v, pattern, return_lse=True, enable_gqa=True)
    want, want_lse = reference(q, k, v, pattern.dense(length, length))
    assert oracle.relative_error(o.double().cpu().numpy(), want) < TOLERANCE[dtype]
    finite = np.isfinite(want_lse)
    assert np.array_equal(np.isneginf(lse.cpu().numpy()), ~finite)
    assert np.allclose(lse.cpu().numpy()[finite], want_lse[finite], rtol=1e-5, atol=1e-3)


def test_per_head_patterns() -> None:
    heads = [P.causal(), P.window(9, 9), P.strided(4), P.causal()]
    for dtype in ("float32", "tf32"):
        check(heads, np.stack([p.dense(200) for p in heads]), 200, 200, 64, dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "tf32"])
@pytest.mark.parametrize("dim", [64, 128])
def test_merged_with_what_is_there(dim: int, dtype: str) -> None:
    """Rows of o and lse, which lie in those of all queries, come to more keys; the others stay."""
    n, more, asking = 1500, 900, slice(300, 1300)
    near, far = P.causal() & P.window(200, 0), P.causal() & P.window(700, -100)
    q, k, v = draw(n, n, dim, dim, dtype)
    _, more_k, more_v = draw(n, more, dim, dim, dtype)
    o, lse = splatc.attention(q, k, v, near, return_lse=True, enable_gqa=True)
    before = o.clone(), lse.clone()
    attend = splatc.compile(far, seq_len=1000, kv_len=more, head_dim=dim, dtype=kind(dtype))
    rows = o[:, :, asking], lse[:, :, asking], q[:, :, asking]
    assert attend.merge(*rows, more_k, more_v, dim**-0.5, True)
    mask = np.zeros((n, n + more), bool)
    mask[:, :n], mask[asking, n:] = near.dense(n), far.dense(1000, more)
    want, want_lse = reference(q, torch.cat([k, more_k], 2), torch.cat([v, more_v], 2), mask)
    assert oracle.relative_error(o.double().cpu().numpy(), want) < TOLERANCE[dtype]
    assert np.abs(lse.cpu().numpy() - want_lse).max() < LSE_TOLERANCE[dtype]
    for now, then in zip((o, lse), before, strict=True):
        assert torch.equal(now[:, :, : asking.start], then[:, :, : asking.start])
        assert torch.equal(now[:, :, asking.stop :], then[:, :, asking.stop :])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_patterns_for_each_batch_entry(dtype: str) -> None:
    for entries in ([P.documents([300, 700]) & P.causal(), STRIDED], [P.per_head([P.full(), P.causal()] * 2), STRIDED]):
        pattern = P.per_batch(entries)
        check(pattern, np.broadcast_to(pattern.dense(1000), (2, 4, 1000, 1000)), 1000, 1000, 64, dtype)


def test_side_stream_and_new_length() -> None:
    attend = splatc.compile(P.causal(), seq_len=256, head_dim=64, dtype="float32", allow_tf32=False)
    for length in (256, 77):
        q, k, v = draw(length, length, 64, 64, "float32", kv_heads=4)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            o = attend(q, k, v)
        torch.cuda.current_stream().wait_stream(stream)
        want, _ = reference(q, k, v, np.tri(length, dtype=bool))
        assert oracle.relative_error(o.double().cpu().numpy(), want) < 1e-5


def test_fifty_runs_are_bitwise_equal() -> None:
    q, k, v = draw(500, 500, 64, 64, "bfloat16")
    runs = [splatc.attention(q, k, v, P.longformer(40, 8), enable_gqa=True) for _ in range(50)]
    assert all(torch.equal(run, runs[0]) for run in runs)


# -- streams, graphs, strides, devices ---------------------------------------------------------------------------------

KINDS = [("float32", 64), ("tf32", 64), ("tf32", 128), ("bfloat16", 64), ("float16", 128), ("bfloat16", 40)]


def close(o: Any, qkv: Any, mask: np.ndarray, dtype: str) -> bool:
    q, k, v = qkv
    want = reference(q, k, v, mask)[0]
    return oracle.relative_error(o.double().cpu().numpy(), want) < TOLERANCE[dtype]


@pytest.mark.parametrize(("dtype", "dim"), KINDS)
def test_a_captured_graph_reads_new_values(dtype: str, dim: int) -> None:
    """A replay computes what the inputs hold by then, also after the mask has seen many other lengths."""
    dense = STRIDED.dense(500)
    attend = splatc.compile(STRIDED, seq_len=500, head_dim=dim, dtype=kind(dtype), **options(dtype))
    qkv = draw(500, 500, dim, dim, dtype, kv_heads=4)
    attend(*qkv)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first = attend(*qkv)
        second = attend(first, qkv[1], qkv[2])
    for length in range(60, 130):
        attend(*draw(length, length, dim, dim, dtype, kv_heads=4))
    for seed in range(3):
        torch.manual_seed(seed)
        for x in qkv:
            x.normal_()
        graph.replay()
        torch.cuda.synchronize()
        assert close(first, qkv, dense, dtype) and close(second, [first, *qkv[1:]], dense, dtype)


def test_a_capture_needs_a_call_before() -> None:
    attend = splatc.compile(P.causal(), seq_len=131, head_dim=64, dtype="bfloat16")
    qkv = draw(131, 131, 64, 64, "bfloat16", kv_heads=4)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(Unsupported, match="call once with the same shapes before"), torch.cuda.graph(graph):
        attend(*qkv)
    assert close(attend(*qkv), qkv, np.tri(131, dtype=bool), "bfloat16")


@pytest.mark.parametrize(("dtype", "dim"), KINDS)
def test_many_streams_at_once(dtype: str, dim: int) -> None:
    dense = STRIDED.dense(300)
    attend = splatc.compile(STRIDED, seq_len=300, head_dim=dim, dtype=kind(dtype), **options(dtype))
    qkv = draw(300, 300, dim, dim, dtype, kv_heads=4)
    wanted = attend(*qkv)
    streams, results = [torch.cuda.Stream() for _ in range(4)], []
    torch.cuda.synchronize()
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(attend(*qkv))
    torch.cuda.synchronize()
    assert close(wanted, qkv, dense, dtype) and all(torch.equal(o, wanted) for o in results)


def test_threads_with_streams_of_their_own() -> None:
    attend = splatc.compile(STRIDED, seq_len=300, head_dim=64, dtype="bfloat16")
    inputs = [[x + i for x in draw(300, 300, 64, 64, "bfloat16", kv_heads=4)] for i in range(4)]
    wanted = [attend(*qkv) for qkv in inputs]
    torch.cuda.synchronize()

    def run(i: int) -> bool:
        with torch.cuda.stream(torch.cuda.Stream()):
            results = [attend(*inputs[i]) for _ in range(50)]
            torch.cuda.current_stream().synchronize()
        return all(torch.equal(o, wanted[i]) for o in results)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(4)))


@pytest.mark.parametrize(("dtype", "dim"), KINDS)
def test_strides(dtype: str, dim: int) -> None:
    length, dense = 300, STRIDED.dense(300)
    attend = splatc.compile(STRIDED, seq_len=length, head_dim=dim, dtype=kind(dtype), **options(dtype))
    qkv = [x.contiguous() for x in draw(length, length, dim, dim, dtype, kv_heads=4)]
    wanted = attend(*qkv)
    assert close(wanted, qkv, dense, dtype)
    moved = [x.transpose(1, 2).contiguous() for x in qkv]
    packed = torch.stack(moved, 2).transpose(1, 3)  # memory (batch, seq, 3, heads, dim)
    wide = [torch.cat([x, x], 3)[..., :dim] for x in qkv]
    longer = [torch.cat([x, x], 2)[:, :, :length] for x in qkv]
    every_other = [torch.stack([x, x], 3).flatten(2, 3)[:, :, ::2] for x in qkv]
    odd = [torch.nn.functional.pad(x, (0, 3))[..., :dim] for x in qkv]
    shifted = [torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in qkv]
    backwards = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in qkv]
    for tensors in ([x.transpose(1, 2) for x in moved], [packed[:, :, i] for i in range(3)], wide, longer, every_other,
                    odd, shifted, backwards):  # fmt: skip
        assert torch.equal(attend(*tensors), wanted)
    bshd = splatc.compile(STRIDED, seq_len=length, head_dim=dim, dtype=kind(dtype), layout="bshd",
                          **options(dtype))  # fmt: skip
    o = bshd(*moved)
    assert o.is_contiguous() and torch.equal(o.transpose(1, 2), wanted)
    q, k, v = qkv
    for k_, v_ in ((k[:, :1], v[:, :1]), (k[:1, :1], v[:1]), (k[:1], v[:, :1])):
        expanded = [q, k_.expand_as(k), v_.expand_as(v)]
        assert close(attend(*expanded), expanded, dense, dtype)


@pytest.mark.parametrize(("dtype", "dim"), KINDS)
@pytest.mark.parametrize("scale", [0.3, 0, -0.5])
def test_scale(dtype: str, dim: int, scale: float) -> None:
    q, k, v = draw(200, 200, dim, dim, dtype, kv_heads=4)
    o, lse = splatc.attention(q, k, v, P.causal(), scale=scale, return_lse=True, **options(dtype))
    a, b, c = (x.double().cpu().numpy() for x in (q, k, v))
    want, want_lse = oracle.attention(a, b, c, np.tri(200, dtype=bool), scale)
    larger = max(abs(scale) * dim**0.5, 1) if dtype == "tf32" else 1  # scores, and their errors, than by default
    assert oracle.relative_error(o.double().cpu().numpy(), want) < TOLERANCE[dtype] * larger
    assert np.abs(lse.cpu().numpy() - want_lse).max() < LSE_TOLERANCE[dtype] * larger


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(("dtype", "dim"), KINDS)
def test_two_gpus(dtype: str, dim: int) -> None:
    attend = splatc.compile(STRIDED, seq_len=300, head_dim=dim, dtype=kind(dtype), **options(dtype))
    dense = STRIDED.dense(300)
    here = draw(300, 300, dim, dim, dtype, kv_heads=4)
    there = [x.to("cuda:1") for x in here]
    for qkv in (there, here, there):
        o = attend(*qkv)
        assert o.device == qkv[0].device and torch.cuda.current_device() == 0
        assert close(o, qkv, dense, dtype)
