"""Results end to end on the CPU, against the float64 oracle: every pattern, dtype, layout and kind of input."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

import splatc
from splatc import oracle
from splatc import patterns as P
from splatc.oracle import relative_error
from tests import library

torch = pytest.importorskip("torch")

BOUND = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 1e-2, "float64": 1e-13}
D = 16  # most tests share one kernel


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    """Rows that a kernel does not write are NaN."""
    from splatc.runtime import attention

    def outputs(*args):
        o, lse = make(*args)
        o[...], lse[...] = float("nan"), float("nan")
        return o, lse

    make = attention.outputs
    monkeypatch.setattr(attention, "outputs", outputs)


def tensors(q_len, kv_len, *, batch=1, heads=2, kv_heads=None, d=D, dv=None, dtype="float32", seed=0) -> Any:
    rng = np.random.default_rng(seed)
    kv_heads = kv_heads or heads
    shapes = (batch, heads, q_len, d), (batch, kv_heads, kv_len, d), (batch, kv_heads, kv_len, dv or d)
    return [torch.from_numpy(rng.standard_normal(s)).to(getattr(torch, dtype)) for s in shapes]


def attention(qkv: Any, mask: Any, **options: Any) -> Any:
    q, k, v = qkv
    return splatc.attention(q, k, v, mask, **options)


def check(got, qkv, mask, dtype="float32", scale=None, softcap=None):
    """(o, lse) agree with the oracle on the very same inputs; rows without a key give exactly 0 and -inf."""
    o, lse = (np.asarray(x.double() if isinstance(x, torch.Tensor) else x, np.float64) for x in got)
    q, k, v = (np.asarray(x.double()) for x in qkv)
    wanted, wanted_lse = oracle.attention(q, k, v, mask, scale, softcap)
    assert o.shape == wanted.shape and lse.shape == wanted_lse.shape
    empty = np.isneginf(wanted_lse)
    assert (np.isneginf(lse) == empty).all()
    assert (o[empty] == 0).all() and np.isfinite(o).all()
    assert relative_error(o, wanted) < BOUND[dtype]
    np.testing.assert_allclose(lse[~empty], wanted_lse[~empty], rtol=BOUND[dtype], atol=BOUND[dtype])


def run(qkv, mask, dense, dtype="float32", **options):
    """Attention on these tensors, checked."""
    got = attention(qkv, mask, return_lse=True, **options)
    assert got[0].dtype == qkv[0].dtype and got[1].dtype == (torch.float64 if dtype == "float64" else torch.float32)
    check(got, qkv, dense, dtype, options.get("scale"), options.get("softcap"))
    return got


# -- every pattern -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("name", library.NAMES)
def test_every_pattern(name, dtype):
    pattern = library.pattern(name, 200)
    run(tensors(200, 200, dtype=dtype), pattern, pattern.dense(200), dtype)


@pytest.mark.parametrize(
    "shape",
    [(1, 1), (2, 2), (63, 63), (127, 127), (1000, 1000), (100, 333), (333, 100), (1, 500)],
    ids=lambda s: f"{s[0]}x{s[1]}",
)
def test_every_pattern_at_odd_sizes(shape):
    for name in library.NAMES:
        pattern = library.pattern(name, *shape)
        if pattern is not None:
            run(tensors(*shape, heads=1), pattern, pattern.dense(*shape))


@settings(max_examples=100)
@given(library.sized_patterns(200))
def test_random_compositions(case):
    pattern, q_len, kv_len = case
    run(tensors(q_len, kv_len, heads=1), pattern, pattern.dense(q_len, kv_len))


@settings(max_examples=100)
@given(case=library.strided_patterns())
@pytest.mark.usefixtures("eager_views")
def test_strided_patterns(case):
    """Through residue, block and patch views, in up to three passes."""
    pattern, q_len, kv_len = case
    attend = splatc.compile(pattern, seq_len=q_len, kv_len=kv_len, head_dim=D, dtype="float32", target="cpu")
    qkv = tensors(q_len, kv_len)
    check(attend(*qkv, return_lse=True), qkv, pattern.dense(q_len, kv_len))


@settings(max_examples=60)
@given(library.masks())
def test_random_masks(mask):
    run(tensors(*mask.shape, heads=1), mask, mask)


@pytest.mark.parametrize("dtype", BOUND)
def test_rows_without_keys(dtype):
    pattern = P.causal("bottom_right") & ~P.global_rows(3)
    dense = pattern.dense(150, 100)
    assert (~dense.any(1)).sum() >= 50
    run(tensors(150, 100, dtype=dtype), pattern, dense, dtype)
    o, lse = attention(tensors(50, 60, dtype=dtype), P.global_cols(0), return_lse=True)
    assert (o == 0).all() and torch.isneginf(lse).all()


@pytest.mark.parametrize("dtype", BOUND)
def test_several_passes_over_the_rows(dtype):
    """Pieces that want different row views are merged by (O, LSE)."""
    pattern = P.causal() & (P.window(63, 0) | P.strided(128)) & ~P.window(40, -30)
    attend = splatc.compile(pattern, seq_len=2048, head_dim=D, dtype=dtype, target="cpu")
    assert attend.explain().passes > 1
    qkv = tensors(2048, 2048, heads=1, dtype=dtype)
    check(attend(*qkv, return_lse=True), qkv, pattern.dense(2048), dtype)


# -- shapes and layouts ------------------------------------------------------------------------------------------------

MIXED = P.causal() & (P.window(30, 0) | P.strided(16))
DENSE = MIXED.dense(150)


@pytest.mark.parametrize("d, dv", [(16, 16), (40, 40), (64, 64), (128, 128), (16, 24), (24, 16)])
def test_head_dims(d, dv):
    run(tensors(150, 150, d=d, dv=dv), MIXED, DENSE)


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (6, 1)])
def test_batch_and_grouped_heads(heads, kv_heads):
    run(tensors(150, 150, batch=3, heads=heads, kv_heads=kv_heads), MIXED, DENSE, enable_gqa=heads != kv_heads)


def test_a_pattern_for_each_head():
    heads = [MIXED, P.full(), P.strided(7), MIXED, P.global_cols(0), P.mask(P.window(3, 3).dense(150))]
    dense = np.stack([p.dense(150) for p in heads])
    for kv_heads in (6, 2):
        run(tensors(150, 150, batch=2, heads=6, kv_heads=kv_heads), heads, dense, enable_gqa=True)
    run(tensors(150, 150, heads=6), dense, dense)  # bool[heads, q_len, kv_len]
    run(tensors(150, 150, heads=6), P.per_head(heads) & P.causal(), dense & P.causal().dense(150))


def test_layouts():
    qkv = tensors(150, 150, batch=2, heads=3)
    o, lse = run(qkv, MIXED, DENSE)
    moved = [x.transpose(1, 2).contiguous() for x in qkv]
    got, got_lse = attention(moved, MIXED, layout="bshd", return_lse=True)
    assert got.shape == (2, 150, 3, D) and got.is_contiguous() and got_lse.shape == (2, 3, 150)
    assert torch.equal(got.transpose(1, 2), o) and torch.equal(got_lse, lse)
    attend = splatc.compile(MIXED, seq_len=150, head_dim=D, dtype=torch.float32, target="cpu", layout="bshd")
    assert torch.equal(attend(*moved), got)
    arrays = attend(*(x.numpy() for x in moved))
    assert arrays.shape == got.shape and np.array_equal(arrays, got.numpy())


def test_any_strides():
    qkv = tensors(150, 150, batch=2, heads=3)
    wanted = attention(qkv, MIXED)
    wide = [torch.zeros(2, 3, 300, 2 * D) for _ in qkv]
    for w, x in zip(wide, qkv):
        w[:, :, ::2, :D] = x
    packed = torch.stack(qkv, 3)  # (batch, heads, seq, 3, dim)
    last = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in qkv]
    assert last[0].stride(-1) != 1
    for given_ in (
        [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv],
        [w[:, :, ::2, :D] for w in wide],
        [packed[..., i, :] for i in range(3)],
        last,
    ):
        before = [x.clone() for x in given_]
        assert torch.equal(attention(given_, MIXED), wanted)
        assert all(torch.equal(a, b) for a, b in zip(before, given_))
    q, k, v = qkv
    expanded = [q, k[:1, :1].expand(2, 3, 150, D), v[:1, :1].expand(2, 3, 150, D)]
    run(expanded, MIXED, DENSE)
    flipped = [x.numpy()[:, :, ::-1] for x in qkv]
    backwards = attention(flipped, P.full())
    np.testing.assert_array_equal(backwards, attention([np.ascontiguousarray(x) for x in flipped], P.full()))


def test_numpy_arrays():
    qkv: Any = [x.numpy() for x in tensors(150, 150)]
    o, lse = attention(qkv, MIXED, return_lse=True)
    assert type(o) is np.ndarray and o.dtype == np.float32 and type(lse) is np.ndarray
    check((o, lse), [torch.from_numpy(x) for x in qkv], DENSE)
    for x in qkv:
        x.flags.writeable = False
    assert np.array_equal(attention(qkv, MIXED), o)
    frozen = [np.frombuffer(x.tobytes(), np.float32).reshape(x.shape) for x in qkv]  # owned by bytes
    assert np.array_equal(attention(frozen, MIXED), o)
    half = [x.astype(np.float16) for x in qkv]
    check(attention(half, MIXED, return_lse=True), [torch.from_numpy(x) for x in half], DENSE, "float16")


@pytest.mark.parametrize("scale", [0.3, 1, 0, -0.5, np.float32(0.25), torch.tensor(2.0)], ids=repr)
def test_scale(scale):
    qkv = tensors(150, 150)
    check(attention(qkv, MIXED, scale=scale, return_lse=True), qkv, DENSE, scale=float(scale))


def test_large_scores_do_not_overflow():
    q, k, v = tensors(150, 150)
    run([q * 300, k * 300, v], MIXED, DENSE)


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("softcap", [0.5, 5.0, 50.0])
def test_softcap(softcap, dtype):
    """On scores that the cap bends: without it the result is another one."""
    q, k, v = tensors(150, 150, dtype=dtype)
    qkv = [q * softcap, k, v]
    for pattern in (MIXED, P.full(), P.window(20, 5) & ~P.window(3, 3), P.longformer(10, 4), P.global_cols(0)):
        o, lse = run(qkv, pattern, pattern.dense(150), dtype, softcap=softcap)
        if torch.isfinite(lse).any():
            assert relative_error(attention(qkv, pattern).double(), o.double()) > 0.05
    run([q * 1e3, k, v], MIXED, DENSE, dtype, softcap=softcap, scale=-0.5)
    run(qkv, MIXED, DENSE, dtype, softcap=softcap, scale=0)


def test_softcap_over_several_passes():
    pattern = P.causal() & (P.window(63, 0) | P.strided(128))
    attend = splatc.compile(pattern, seq_len=2048, head_dim=D, dtype="float32", target="cpu", softcap=2.0)
    assert attend.explain().passes > 1
    q, k, v = tensors(2048, 2048, heads=1)
    qkv = [3 * q, k, v]
    check(attend(*qkv, return_lse=True), qkv, pattern.dense(2048), softcap=2.0)
    other = splatc.compile(pattern, seq_len=2048, head_dim=D, dtype="float32", target="cpu", softcap=1.0)
    assert other.kernel.folder == attend.kernel.folder  # the cap itself arrives with the call


def test_runs_are_equal_whatever_the_threads():
    qkv = tensors(300, 300, heads=3)
    one = attention(qkv, MIXED)
    threads = torch.get_num_threads()
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            attend = splatc.compile(MIXED, seq_len=300, head_dim=D, dtype="float32", target="cpu")
            assert torch.equal(attend(*qkv), one)
    finally:
        torch.set_num_threads(threads)


def test_a_nan_in_v_reaches_just_the_rows_that_see_it():
    q, k, v = tensors(300, 300)
    v[0, 0, 150, 3], v[0, 1, 7, 0] = float("inf"), float("nan")
    o = attention((q, k, v), P.window(40, 20))
    seen = torch.from_numpy(P.window(40, 20).dense(300))
    for h, j, d in ((0, 150, 3), (1, 7, 0)):
        assert torch.equal(~torch.isfinite(o[0, h, :, d]), seen[:, j])
        assert torch.isfinite(o[0, h, :, [x for x in range(D) if x != d]]).all()


def test_gradients_may_be_off():
    q, k, v = tensors(64, 64)
    q.requires_grad_()
    with torch.no_grad():
        run([q, k, v], P.causal(), P.causal().dense(64))
    run([q.detach(), k, v], P.causal(), P.causal().dense(64))


# -- a compiled mask ---------------------------------------------------------------------------------------------------


def files(folder: Path) -> set[tuple[str, int]]:
    return {(str(f.relative_to(folder)), f.stat().st_mtime_ns) for f in folder.rglob("*") if f.is_file()}


def test_a_new_length_needs_no_new_kernel(tmp_path, monkeypatch):
    monkeypatch.setenv("SPLATC_CACHE_DIR", str(tmp_path))  # other tests use and add to the shared one meanwhile
    attend = splatc.compile(MIXED, seq_len=150, head_dim=D, dtype="float32", target="cpu")
    folder, before = attend.kernel.folder, files(attend.kernel.folder)
    entries = {p.name for p in folder.parent.iterdir()}
    for q_len, kv_len in ((150, 150), (700, 700), (65, 400), (400, 65)):
        qkv = tensors(q_len, kv_len)
        check(attend(*qkv, return_lse=True), qkv, MIXED.dense(q_len, kv_len))
        assert attend.plan(q_len, kv_len).q_len == q_len
    assert attend.kernel.folder == folder and files(folder) == before
    assert {p.name for p in folder.parent.iterdir()} == entries
    for other in (P.strided(3), P.bigbird(), "causal", np.eye(90, dtype=bool)):
        again = splatc.compile(other, seq_len=90, head_dim=D, dtype="float32", target="cpu")
        assert again.kernel.folder == folder


def test_what_a_compiled_mask_says():
    attend = splatc.compile("causal & window(255, 0)", seq_len=1024, head_dim=D, dtype=torch.float32, target="cpu")
    mask = (P.causal() & P.window(255, 0)).dense(1024)
    said = attend.explain()
    assert (said.nnz, said.density) == (mask.sum(), mask.mean()) and said.tile_area == said.tiles * 64 * 64
    assert said.waste == said.tile_area / said.nnz and said.full_tiles + said.bit_tiles == said.tiles
    assert said.to_dict()["pieces"] == said.pieces == 2 and "waste" in str(said)
    assert "define" in attend.source and "splatc" in attend.source
    assert repr(attend).startswith("<splatc attention causal() & window(255, 0) 1024x1024 d=16 float32 on cpu:")
    assert attend.plan() is attend.plan(1024) and attend.plan(1024, 1024).heads is None


@pytest.mark.parametrize("mask, options", [
    (P.causal() & P.window(9, 0), {"layout": "bshd", "softcap": 2.0, "sinks": True}), ("causal() & nm(2, 4)", {}),
    ([P.causal(), P.strided(3)], {"alibi": True}), (P.per_batch([P.causal(), P.full()]), {"dtype": "float64"}),
    (np.eye(20, dtype=bool), {"tile": (64, 64), "v_head_dim": 8}),
], ids=str)  # fmt: skip
def test_pickled_it_is_what_it_was_compiled_from(mask, options):
    f = splatc.compile(mask, **{"seq_len": 20, "head_dim": D, "dtype": "float32", "target": "cpu", **options})
    twin = pickle.loads(pickle.dumps(f))
    assert twin.kernel.spec == f.kernel.spec and repr(twin) == repr(f) and twin.plan().pattern == f.plan().pattern
    q, k, v = (x.transpose(1, 2).contiguous() if f.layout == "bshd" else x
               for x in tensors(20, 20, batch=2, dv=f.kernel.spec.v_head_dim, dtype=f.kernel.spec.dtype))  # fmt: skip
    terms = {name: torch.ones(2) for name, asked in (("sinks", "sinks"), ("alibi_slopes", "alibi")) if asked in options}
    assert torch.equal(twin(q, k, v, **terms), f(q, k, v, **terms))


def test_analyze():
    acsr = splatc.analyze("strided(8)", 64, 32)
    np.testing.assert_array_equal(acsr.to_dense(), P.strided(8).dense(64, 32))
    assert acsr.nnz == 256 and acsr.remainder.nnz == 0 and len(acsr.pieces) >= 1
    assert splatc.analyze(DENSE) == splatc.analyze(MIXED, 150)


def test_attention_is_memoised():
    from splatc.compile import _memo

    qkv = tensors(150, 150)
    attention(qkv, DENSE)
    before = _memo.cache_info()
    attention(qkv, DENSE.copy())
    attention(tensors(150, 150, batch=2, heads=1), P.mask(DENSE))
    after = _memo.cache_info()
    assert (after.hits - before.hits, after.misses - before.misses) == (2, 0)


# -- kinds of mask -----------------------------------------------------------------------------------------------------


def test_matrices_and_graphs():
    networkx = pytest.importorskip("networkx")
    sparse = pytest.importorskip("scipy.sparse")
    mask = np.random.default_rng(0).random((150, 150)) < 0.05
    graph = networkx.from_numpy_array(mask, create_using=networkx.DiGraph)
    for given_ in (mask, torch.from_numpy(mask), mask.astype(np.uint8), sparse.csr_array(mask), sparse.coo_matrix(mask),
                   torch.from_numpy(mask).to_sparse_csr(), graph, P.mask(mask), mask[None, None]):  # fmt: skip
        run(tensors(150, 150), given_, mask)
        if not isinstance(given_, networkx.Graph):
            attend = splatc.compile(given_, seq_len=150, head_dim=D, dtype="float32", target="cpu")
            assert attend.explain().nnz == mask.sum()
    attend = splatc.compile(mask[:, :70], head_dim=D, dtype="float32", target="cpu")  # lengths from the matrix
    qkv = tensors(150, 70)
    check(attend(*qkv, return_lse=True), qkv, mask[:, :70])


def test_flex_attention_masks():
    flex = pytest.importorskip("torch.nn.attention.flex_attention")

    def local(b, h, q, k):
        return (q >= k) & ((q - k < 20) | (k % 16 == 0))

    q, k = np.arange(150)[:, None], np.arange(150)[None, :]
    mask = (q >= k) & ((q - k < 20) | (k % 16 == 0))
    run(tensors(150, 150), local, mask)
    run(tensors(150, 150), flex.create_block_mask(local, None, None, 150, 150, device="cpu"), mask)
    run(tensors(150, 150, heads=2), lambda b, h, q, k: q >= k + 20 * h, np.stack([q >= k, q >= k + 20]))


def test_text():
    run(tensors(150, 150), "causal & (window(30, 0) | strided(16))", DENSE)
