"""Arrays, tensors, sparse matrices, graphs, FlexAttention masks and files keep their mask as patterns."""

import subprocess
import sys
from functools import partial

import numpy as np
import pytest

from splatc import patterns as P
from splatc.errors import InvalidInput, PatternSyntaxError
from splatc.patterns import as_pattern

RNG = np.random.default_rng(0)
M = RNG.random((20, 30)) < 0.4


def test_patterns_texts_and_lists():
    assert as_pattern(P.causal()) == as_pattern("causal") == P.causal()
    got = as_pattern(["causal", P.full(), M], q_len=20, kv_len=30, heads=3)
    assert got == P.per_head([P.causal(), P.full(), P.mask(M)])
    with pytest.raises(InvalidInput, match="2 heads, but there are 3"):
        as_pattern(["causal", "full"], heads=3)
    with pytest.raises(InvalidInput, match=r"numpy\.array"):
        as_pattern([[True, False], [True, True]])
    with pytest.raises(InvalidInput, match="20 x 30, but q_len is 20 and kv_len is 20"):
        as_pattern(M, q_len=20)
    for bad in (3, None, {"a": 1}, int):
        with pytest.raises(InvalidInput, match="cannot make a pattern of a builtins"):
            as_pattern(bad)


def test_arrays():
    assert as_pattern(M) == P.mask(M)
    heads = RNG.random((3, 8, 9)) < 0.5
    np.testing.assert_array_equal(as_pattern(heads).dense(8, 9), heads)
    assert as_pattern(heads[None]) == as_pattern(heads)
    assert as_pattern(np.stack([M[None]] * 2)) == P.mask(M)
    entries = np.stack([M[None], ~M[None]])
    assert as_pattern(entries) == P.per_batch([P.mask(M), P.mask(~M)])
    both = RNG.random((2, 3, 8, 9)) < 0.5
    np.testing.assert_array_equal(as_pattern(both).dense(8, 9), both)
    with pytest.raises(InvalidInput, match="for 2 batch entries, but there are 3"):
        as_pattern(entries, heads=1, batch=3)
    with pytest.raises(InvalidInput, match="cu_seqlens"):
        as_pattern(np.array([0, 3, 8]))
    with pytest.raises(InvalidInput, match="additive"):
        as_pattern(np.zeros((4, 4)))
    with pytest.raises(InvalidInput, match=r"2\*\*32"):
        as_pattern(np.broadcast_to(np.True_, (2**17, 2**17)))


def test_scipy_sparse():
    sparse = pytest.importorskip("scipy.sparse")
    dense = M.astype(np.float32)
    for make in (sparse.csr_array, sparse.csc_matrix, sparse.coo_array, sparse.lil_matrix, sparse.bsr_array):
        p = as_pattern(make(dense))
        np.testing.assert_array_equal(p.dense(20, 30), M)
        assert p == as_pattern(sparse.csr_array(M)) and p.lines(20, 30) is None
        np.testing.assert_array_equal((p & P.full()).dense(20, 30), M)
    stored_zero = sparse.coo_array(([1.0, 0.0, 2.0, -2.0], ([0, 1, 2, 2], [1, 2, 0, 0])), shape=(3, 3))
    np.testing.assert_array_equal(
        as_pattern(stored_zero).dense(3), np.array([[0, 1, 0]] + [[0] * 3] * 2, bool)
    )
    assert not as_pattern(sparse.csr_array((4, 5))).dense(4, 5).any()
    huge = as_pattern(sparse.coo_array(([1], ([2**20 - 1], [5])), shape=(2**20, 2**20)), q_len=2**20)
    assert huge.contains(np.array([2**20 - 1, 0]), np.array([5, 5]), 2**20, 2**20).tolist() == [True, False]
    with pytest.raises(InvalidInput, match=r"2\*\*32"):
        huge.dense(2**20)
    with pytest.raises(InvalidInput, match="20 x 30"):
        as_pattern(sparse.csr_array(M), q_len=30)


def test_networkx():
    nx = pytest.importorskip("networkx")
    g = nx.DiGraph([(2, 0), (0, 1)])
    want = np.zeros((3, 3), bool)
    want[2, 0] = want[0, 1] = True
    np.testing.assert_array_equal(as_pattern(g).dense(3), want)  # node i is position i, in whatever order
    named = nx.Graph([("b", "a"), ("a", "c")])
    got = as_pattern(named).dense(3)
    np.testing.assert_array_equal(got, nx.to_numpy_array(named).astype(bool))
    np.testing.assert_array_equal(got, got.T)
    multi = nx.MultiDiGraph([(0, 1), (0, 1), (1, 1)])
    np.testing.assert_array_equal(as_pattern(multi).dense(2), [[False, True], [False, True]])
    assert not as_pattern(nx.empty_graph(4)).dense(4).any()
    with pytest.raises(InvalidInput, match="empty"):
        as_pattern(nx.Graph())


def test_torch_tensors():
    torch = pytest.importorskip("torch")
    t = torch.from_numpy(M)
    assert as_pattern(t) == as_pattern(t.to(torch.uint8)) == P.mask(M)
    assert as_pattern(t[None, None]) == P.mask(M)
    for s in (t.to_sparse(), t.to_sparse_csr()):
        np.testing.assert_array_equal(as_pattern(s).dense(20, 30), M)
    assert P.documents(cu_seqlens=torch.tensor([0, 3, 5])) == P.documents([3, 2])
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(InvalidInput, match="additive"):
            as_pattern(torch.zeros(3, 3, dtype=dtype))


def causal_mod(b, h, q, k):
    return k <= q


def test_mask_mod_without_torch_semantics():
    assert as_pattern(causal_mod, q_len=20, kv_len=30) == P.mask(P.causal().dense(20, 30))
    near = partial(lambda w, b, h, q, k: abs(q - k) <= w, 3)
    assert as_pattern(near, q_len=9) == P.mask(P.window(3, 3).dense(9))
    with pytest.raises(InvalidInput, match="give q_len"):
        as_pattern(causal_mod)


def test_mask_mod_with_torch():
    torch = pytest.importorskip("torch")
    starts, doc = torch.tensor([0, 7]), torch.tensor([[0] * 5 + [1] * 10 + [2] * 5, [0] * 20])

    # A reduction over a table: broadcasting would reduce over the queries too.
    def anchors(b, h, q, k):
        return (k == starts).any() | ((q - k).abs() < 2)

    want = (np.arange(20)[None, :, None] == starts.numpy()).any(-1) | P.window(1, 1).dense(20)
    assert as_pattern(anchors, q_len=20) == P.mask(want)
    same = P.documents([5, 10, 5]).dense(20)
    assert as_pattern(lambda b, h, q, k: doc[0, q] == doc[0, k], q_len=20) == P.mask(same)
    assert as_pattern(lambda b, h, q, k: doc[:1][b, q] == doc[:1][b, k], q_len=20) == P.mask(same)
    with pytest.raises(InvalidInput, match="depends on the batch index"):
        as_pattern(lambda b, h, q, k: doc[b, q] == doc[b, k], q_len=20)

    width = torch.tensor([1, 4])
    by_head = lambda b, h, q, k: (q - k).abs() <= width[h]  # noqa: E731
    two = P.per_head([P.mask(P.window(w, w).dense(20)) for w in (1, 4)])
    assert as_pattern(by_head, q_len=20, heads=2) == two
    with pytest.raises(InvalidInput, match="uses the head index h"):
        as_pattern(by_head, q_len=20)
    with pytest.raises(InvalidInput, match="past the end of a table"):
        as_pattern(by_head, q_len=20, heads=3)
    for bad, message in (
        (lambda b, h, q, k: q - k, "returned torch.int64"),
        (lambda b, h, q, k: q >= k and k > 2, "& | ~ rather than and"),
        (lambda b, h, q: q > 2, "positional argument"),
        (lambda b, h, q, k: doc[0, q] == 1, "past the end"),
    ):
        with pytest.raises(InvalidInput, match=message) as e:
            as_pattern(bad, q_len=30)
        assert "\n" not in str(e.value)
    with pytest.raises(InvalidInput, match=r"2\*\*32"):
        as_pattern(causal_mod, q_len=2**17)


def test_block_mask_objects():
    torch = pytest.importorskip("torch")
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    starts = torch.tensor([3, 40])
    width = torch.tensor([2, 9])
    anchors = lambda b, h, q, k: (k == starts).any() | (q >= k)  # noqa: E731
    by_head = lambda b, h, q, k: (q - k).abs() <= width[h]  # noqa: E731
    doc = torch.arange(50).repeat(2, 1) // torch.tensor([[7], [9]])
    by_batch = lambda b, h, q, k: doc[b, q] == doc[b, k]  # noqa: E731

    for mod in (causal_mod, anchors, flex.and_masks(anchors, causal_mod)):
        for size in (16, 128):
            block = flex.create_block_mask(mod, None, None, 50, 60, device="cpu", BLOCK_SIZE=size)
            want = flex.create_mask(mod, 1, 1, 50, 60, "cpu")[0, 0].numpy()
            np.testing.assert_array_equal(as_pattern(block, q_len=50, kv_len=60).dense(50, 60), want)
    for heads in (None, 2):  # the block table has one entry per head, or is shared
        block = flex.create_block_mask(by_head, None, heads or 1, 50, 50, device="cpu", BLOCK_SIZE=16)
        if heads is None:  # cover every block, so that one table is right for both heads
            counts = torch.full((1, 1, 4), 4, dtype=torch.int32)
            indices = torch.arange(4, dtype=torch.int32).expand(1, 1, 4, 4)
            block = flex.BlockMask.from_kv_blocks(
                counts, indices, BLOCK_SIZE=16, mask_mod=by_head, seq_lengths=(50, 50)
            )
        want = flex.create_mask(by_head, 1, 2, 50, 50, "cpu")[0].numpy()
        np.testing.assert_array_equal(as_pattern(block, heads=2).dense(50), want)
    block = flex.create_block_mask(causal_mod, 2, 1, 50, 50, device="cpu", BLOCK_SIZE=16)
    np.testing.assert_array_equal(as_pattern(block).dense(50), P.causal().dense(50))
    with pytest.raises(InvalidInput, match="cut by indexing"):
        as_pattern(block[0])
    with pytest.raises(InvalidInput, match="is for lengths"):
        as_pattern(block, q_len=49)
    got = as_pattern(flex.create_block_mask(by_batch, 2, None, 50, 50, device="cpu", BLOCK_SIZE=16))
    np.testing.assert_array_equal(got.dense(50), flex.create_mask(by_batch, 2, 1, 50, 50, "cpu").numpy())
    coarse = lambda b, h, q, k: q // 16 >= k // 16  # noqa: E731
    block = flex.create_block_mask(coarse, None, None, 64, 64, device="cpu", BLOCK_SIZE=16)
    assert as_pattern(block) == P.block_mask(np.tri(4, dtype=bool), 16)  # all full: stays symbolic
    indices = torch.zeros(1, 1, 2, 3, dtype=torch.int32)  # no mask_mod, and room for one block only
    counts = torch.tensor([[[1, 0]]], dtype=torch.int32)
    bare = flex.BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=16)
    assert as_pattern(bare) == P.block_mask([[1, 0, 0], [0, 0, 0]], 16)


def test_files(tmp_path):
    sparse = pytest.importorskip("scipy.sparse")
    io = pytest.importorskip("scipy.io")
    np.save(tmp_path / "m.npy", M)
    np.savez(tmp_path / "one.npz", mask=M)
    np.savez(tmp_path / "two.npz", a=M, b=M)
    sparse.save_npz(tmp_path / "sparse.npz", sparse.csr_array(M))
    io.mmwrite(tmp_path / "s.mtx", sparse.coo_array(M.astype(int)))
    io.mmwrite(tmp_path / "d.mtx", M.astype(float))
    (tmp_path / "p.splat").write_text("# a comment\ncausal &  # another\n  window(3, 0)\n")
    for name in ("m.npy", "one.npz", "sparse.npz", "s.mtx", "d.mtx"):
        np.testing.assert_array_equal(P.load_mask(tmp_path / name).dense(20, 30), M)
        assert P.parse_or_load(str(tmp_path / name)) == P.load_mask(str(tmp_path / name))
    assert P.load_mask(tmp_path / "p.splat") == P.causal() & P.window(3, 0)
    (tmp_path / "x.bin").write_bytes(b"?")
    (tmp_path / "bad.splat").write_text("causal & windw(3, 0)")
    (tmp_path / "none.txt").write_text("# nothing\n")
    for name in ("junk.npy", "junk.npz", "junk.mtx", "junk.txt"):
        (tmp_path / name).write_bytes(b"\x93NUMPY\xff\x00junk")
    np.save(tmp_path / "pickled.npy", np.array([{}, 1], object), allow_pickle=True)
    (tmp_path / "empty.npy").write_bytes(b"")
    (tmp_path / "t.pt").write_bytes(b"")
    for name, message in (
        ("two.npz", "one array, but it holds 2: a, b"),
        ("x.bin", "unknown kind of file '.bin'"),
        ("absent.npy", "no such file"),
        ("none.txt", "no pattern"),
        ("junk.npy", "not a readable .npy file"),
        ("junk.npz", "not a readable .npz file"),
        ("junk.mtx", "not a readable .mtx file"),
        ("junk.txt", "not a readable .txt file"),
        ("pickled.npy", "not a readable .npy file"),
        ("empty.npy", "not a readable .npy file"),
        ("t.pt", "can run code"),
    ):
        with pytest.raises(InvalidInput, match=message) as e:
            P.load_mask(tmp_path / name)
        assert str(tmp_path / name) in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(PatternSyntaxError, match=r"bad.splat: column 10: .*did you mean"):
        P.load_mask(tmp_path / "bad.splat")


def test_parse_or_load_tells_files_from_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "causal").write_text("full")
    assert P.parse_or_load("causal") == P.causal()
    assert P.parse_or_load("causal & full") == P.causal() & P.full()
    assert P.parse_or_load("full & " * 999 + "full") == P.parse(
        "full & " * 999 + "full"
    )  # too long for a path
    for path in ("missing.npy", "some/where", "./x.splat"):
        with pytest.raises(InvalidInput, match=r"no such file|unknown kind"):
            P.parse_or_load(path)
    with pytest.raises(PatternSyntaxError):
        P.parse_or_load("caussal")


def test_importing_patterns_imports_nothing_heavy():
    code = (
        "import sys, numpy as np, splatc.patterns as P\n"
        "P.as_pattern(np.eye(3, dtype=bool)); P.as_pattern(lambda b, h, q, k: q >= k, q_len=8); P.causal()\n"
        "def mod(b, h, q, k):\n"
        "    return (q == np.arange(3)).any() | (q >= k)\n"
        "try:\n"
        "    P.as_pattern(mod, q_len=50)\n"
        "except P.base.InvalidInput as e:\n"
        "    assert 'not elementwise' in str(e), e\n"
        "else:\n"
        "    raise SystemExit('a reduction was taken for an elementwise mask')\n"
        "print([m for m in ('torch', 'tvm', 'scipy', 'networkx', 'matplotlib', 'lark') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert out.stdout.strip() == "[]", out.stderr
