"""Attention over several ranks: parts of patterns, plans, and processes on the CPU against float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splatc import patterns as P
from splatc.errors import InvalidInput, Unsupported
from splatc.formats.acsr import ACSR
from splatc.formats.strips import paint
from splatc.formats.symbolic import strips_of
from splatc.patterns.taken import Places, take
from tests import library

pytest.importorskip("torch.distributed")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from splatc import compile  # noqa: E402
from splatc.distributed import CONTIGUOUS, ZIGZAG, ContextParallel, context_parallel, plan_of, residues  # noqa: E402
from splatc.distributed.exchange import Rows, add_rows, put_rows, rows_of  # noqa: E402
from splatc.distributed.plan import needed_keys  # noqa: E402
from splatc.distributed.split import Split, merge  # noqa: E402
from tests.ranks import check, counting, on_ranks  # noqa: E402

# -- parts of patterns -------------------------------------------------------------------------------------------------


def check_part(pattern: P.Pattern, mask: np.ndarray) -> None:
    """The symbolic part, and its transposed, are the matrix."""
    for part, wanted in ((pattern, mask), (pattern.transposed(), mask.T)):
        np.testing.assert_array_equal(ACSR.from_pattern(part, *wanted.shape).to_dense(), wanted)
        q_len, kv_len = wanted.shape
        lines = part.lines(q_len, kv_len)
        if lines is not None:
            np.testing.assert_array_equal(paint(strips_of(part, q_len, kv_len, lines), q_len, kv_len), wanted)


@pytest.mark.parametrize("n", [1, 127])
@pytest.mark.parametrize("name", library.NAMES)
def test_shares_of_every_pattern(name: str, n: int) -> None:
    """Both parts of a share are parts of the mask; what is fetched is what its rows attend to and it does not hold, and
    who asks for it attends to any of that."""
    pattern = library.ALL[name](n, n)
    mask = pattern.dense(n)
    for ranks, layout in [(1, None)] if n == 1 else [(2, None), (2, ZIGZAG), (3, CONTIGUOUS), (3, residues(8))]:
        plan = plan_of(pattern, n, ranks, layout)
        assert sorted(np.concatenate([s.rows for s in plan.shares]).tolist()) == list(range(n))
        for share in plan.shares:
            check_part(share.own, mask[np.ix_(share.rows, share.rows)])
            needed = np.array(mask[share.rows].any(0))
            needed[share.rows] = False
            assert np.flatnonzero(needed).tolist() == sorted(share.fetched) and len(share.fetched) == share.received
            asking = mask[np.ix_(share.rows, share.fetched)].any(1)
            assert np.flatnonzero(asking).tolist() == share.asking.tolist()
            assert (share.beyond is None) == (share.received == 0)
            if share.beyond is not None:
                check_part(share.beyond, mask[np.ix_(share.rows[share.asking], share.fetched)])
            assert share.elements == mask[share.rows].sum()


@settings(max_examples=30)
@given(st.data())
def test_any_rows_and_columns(data: st.DataObject) -> None:
    """Runs in any order, of any step, also where residues of the pattern are not those of the places."""
    q_len, kv_len = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 60))
    pattern = data.draw(library.combinations(q_len, kv_len))
    step = data.draw(st.integers(1, 6))
    rows, cols = (
        np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, unique=True))) for n in (q_len, kv_len)
    )
    part = take(pattern, rows, cols, (q_len, kv_len), step)
    check_part(part, pattern.dense(q_len, kv_len)[np.ix_(rows, cols)])


def test_places() -> None:
    places = Places.of(np.array([4, 5, 6, 20, 21, 3]), 1)
    assert places.runs == ((4, 3), (20, 2), (3, 1)) and len(places) == 6
    assert places.positions.tolist() == [4, 5, 6, 20, 21, 3]
    assert Places.of(np.array([1, 4, 7, 2, 5]), 3).runs == ((1, 3), (2, 2))
    with pytest.raises(InvalidInput, match="3 rows and 2 columns, not 4 and 4"):
        ACSR.from_pattern(take(P.causal(), np.arange(3), np.arange(2), (9, 9)), 4)


@pytest.mark.parametrize("name", library.LIBRARY)
def test_needed_keys(name: str) -> None:
    pattern = library.LIBRARY[name](150, 131)
    rows = np.arange(3, 150, 4)
    acsr = ACSR.from_pattern(pattern, 150, 131)
    np.testing.assert_array_equal(needed_keys(acsr, rows), pattern.dense(150, 131)[rows].any(0))


# -- plans -------------------------------------------------------------------------------------------------------------


def test_64k_positions() -> None:
    """What each mask needs is what is fetched; no matrix; causal masks are balanced."""
    n = 65536
    window = plan_of(P.window(1024, 0), n, 2)
    assert window.layout == CONTIGUOUS and [s.received for s in window.shares] == [0, 1024]
    strided = plan_of(P.causal() & P.strided(128), n, 2)
    assert strided.layout == residues(128) and not strided.exchanges
    causal = plan_of(P.causal(), n, 4)
    assert causal.layout == ZIGZAG and len({s.elements for s in causal.shares}) == 1
    for plan in (window, strided, causal):
        for share in plan.shares:
            parts = [ACSR.from_pattern(share.own, len(share.rows))]
            if share.beyond is not None:
                parts.append(ACSR.from_pattern(share.beyond, len(share.asking), share.received))
            assert sum(part.nnz for part in parts) == share.elements and sum(len(part.pieces) for part in parts) < 10


def test_global_tokens_are_broadcast() -> None:
    plan = plan_of(P.window(8, 8) | P.global_cols(4), 400, 4, CONTIGUOUS)
    assert [s.received for s in plan.shares] == [8, 20, 20, 12]
    assert [s.sent for s in plan.shares] == [3 * 4 + 8, 16, 16, 8]


def test_traffic_is_symmetric() -> None:
    plan = plan_of(P.bigbird(block=8), 300, 3)
    each = [plan.traffic(rank, 10) for rank in range(3)]
    assert sum(t.forward_sent for t in each) == sum(t.forward_received for t in each) > 0
    assert all((t.backward_sent, t.backward_received) == (t.forward_received, t.forward_sent) for t in each)


def test_plans_are_remembered() -> None:
    assert plan_of(P.window(3, 3), 50, 2) is plan_of(P.window(3, 3), 50, 2)


def test_refused_plans() -> None:
    with pytest.raises(InvalidInput, match="2 positions leave one of 3 ranks without any"):
        plan_of(P.causal(), 2, 3)
    with pytest.raises(InvalidInput, match="modulus is 1"):
        residues(1)


# -- rows of tensors ---------------------------------------------------------------------------------------------------


def test_rows() -> None:
    """Consecutive places are a slice, which copies nothing."""
    cpu = torch.device("cpu")
    assert rows_of(np.arange(3, 7), cpu) == slice(3, 7) and rows_of(np.zeros(0, np.int64), cpu) == slice(0, 0)
    some = rows_of(np.array([2, 4, 3]), cpu)
    assert isinstance(some, torch.Tensor) and some.tolist() == [2, 4, 3]
    for at in (slice(1, 4), torch.tensor([1, 3, 4])):
        x = torch.zeros(1, 1, 6, 2, dtype=torch.bfloat16)
        put_rows(x, at, torch.ones(1, 1, 3, 2))
        add_rows(x, at, torch.full((1, 1, 3, 2), 2.0))
        wanted = torch.zeros(6).index_fill(0, torch.arange(6)[at], 3.0)
        assert torch.equal(x.float(), wanted[:, None].expand(1, 1, 6, 2))


# -- parts put together ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [slice(2, 8), torch.tensor([0, 2, 3, 5, 7, 8])], ids=["slice", "list"])
def test_merged_parts(at: Rows) -> None:
    """Of rows that attend to both parts, to one of them, to none; of scores that are far apart."""
    torch.manual_seed(0)
    none = -torch.inf
    o, lse = torch.randn(1, 1, 9, 4), torch.randn(1, 1, 9)
    more, more_lse = torch.randn(1, 1, 6, 4), torch.tensor([[[0.3, none, 2.0, none, 200.0, -200.0]]])
    lse[:, :, at] = torch.tensor([0.5, 0.1, none, none, -200.0, 200.0])
    o[:, :, at][:, :, 2:4] = 0.0
    o[~lse.isfinite()] = 0.0
    more[~more_lse.isfinite()] = 0.0
    before, before_lse = o[:, :, at].double(), lse[:, :, at].double()
    total = torch.logaddexp(before_lse, more_lse.double())
    weights = [(x - total).exp().nan_to_num(0.0)[..., None] for x in (before_lse, more_lse.double())]
    wanted, wanted_lse = o.double(), lse.double()
    wanted[:, :, at], wanted_lse[:, :, at] = before * weights[0] + more.double() * weights[1], total
    merge(o, lse, at, more, more_lse)
    torch.testing.assert_close(o, wanted.float())
    torch.testing.assert_close(lse, wanted_lse.float())
    assert (o[0, 0][~lse[0, 0].isfinite()] == 0).all() and (~lse.isfinite()).sum() == 1


class Recorder:
    """Stands for an exchange and both parts: what is called, in its order."""

    def __init__(self, seen: list[str], name: str = "") -> None:
        self._seen, self._name = seen, name

    def fetch(self, k: torch.Tensor, v: torch.Tensor) -> Recorder:
        self._seen.append("fetch")
        self._parts = k[:, :, :2], v[:, :, :2]
        return self

    def give_back(self, dk: torch.Tensor, dv: torch.Tensor) -> Recorder:
        self._seen.append("give back")
        self._parts = dk, dv
        return self

    def wait(self) -> Any:
        self._seen.append("wait")
        return self._parts

    def add(self, own: torch.Tensor, returned: torch.Tensor) -> None:
        self._seen.append("add")

    def merge(self, *given: Any) -> bool:
        return False

    def run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *options: Any) -> Any:
        self._seen.append(self._name)
        return torch.zeros_like(q), q.new_zeros(q.shape[:3])

    def backward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *options: Any) -> Any:
        self._seen.append(f"{self._name} backward")
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), []


def test_what_overlaps() -> None:
    """Own keys are computed while rows are on their way, in both directions."""
    seen: list[str] = []
    own, beyond = Recorder(seen, "own"), Recorder(seen, "beyond")
    split: Any = Split(Recorder(seen), own, beyond, slice(0, 3))  # type: ignore[arg-type]
    q, k, v = (torch.zeros(1, 1, 5, 4, requires_grad=True) for _ in range(3))
    o, _ = split(q, k, v, 1.0, False)
    assert seen == ["fetch", "own", "wait", "beyond"]
    seen.clear()
    o.sum().backward()
    assert seen == ["beyond backward", "give back", "own backward", "wait", "add", "add"]


# -- processes ---------------------------------------------------------------------------------------------------------

MASKS = [
    P.window(20, 7),
    P.causal(),
    P.strided(8),
    P.causal() & (P.window(15, 0) | P.strided(16)),
    P.longformer(9, 3),
    P.bigbird(block=8),
    P.documents([50, 1, 30, 56]),
    P.window(-140, 150),  # rows without a key, keys without a query
]


def equal_to_float64() -> None:
    n = 137
    for pattern in MASKS:
        check(context_parallel(pattern, seq_len=n), pattern.dense(n))


def other_layouts_and_masks() -> None:
    n = 137
    for layout in (CONTIGUOUS, ZIGZAG, residues(8)):
        check(context_parallel(MASKS[3], seq_len=n, layout=layout), MASKS[3].dense(n))
    matrix = np.random.default_rng(0).random((61, 61)) < 0.1
    check(context_parallel(matrix), matrix)
    heads = P.per_head([P.window(5, 0), P.strided(7), P.causal(), P.window(5, 0)])
    check(context_parallel(heads, seq_len=n), heads.dense(n), batch=1)


def test_equal_to_float64(tmp_path: Path) -> None:
    on_ranks(2, tmp_path, equal_to_float64)


def test_three_ranks(tmp_path: Path) -> None:
    on_ranks(3, tmp_path, other_layouts_and_masks)


def scattered(n: int) -> np.ndarray:
    """A mask for thirds of a length: the last fetches nothing, and nobody fetches of the first, whose rows attend to
    fetched keys alone; the second asks in every third row; some rows attend to nothing."""
    third = n // 3
    mask = np.random.default_rng(1).random((n, n)) < 0.2
    mask[:, :third], mask[third : 2 * third] = False, False
    mask[third : 2 * third : 3, 2 * third :: 7] = True
    mask[2 * third :, : 2 * third] = False
    mask[5], mask[n - 5], mask[third + 3, third : 2 * third] = False, False, True
    return mask


EXACT: dict[str, Any] = {"dtype": torch.float64, "bound": 1e-12, "dim": 8, "v_dim": 5}


def exactly_float64() -> None:
    for pattern in (P.causal() & P.window(9, 0), P.causal(), P.bigbird(block=8), P.window(-60, 70)):
        check(context_parallel(pattern, seq_len=83), pattern.dense(83), **EXACT, scale=0.7)
    n = 84
    attend = context_parallel(scattered(n), layout=CONTIGUOUS)
    assert [share.received > 0 for share in attend.plan.shares] == [True, True, False]
    assert [share.sent > 0 for share in attend.plan.shares] == [False, True, True]
    assert (np.diff(attend.plan.shares[1].asking) == 3).all()
    check(attend, scattered(n), **EXACT)
    check(context_parallel(scattered(n), layout=ZIGZAG), scattered(n), **EXACT)


def test_exactly_float64(tmp_path: Path) -> None:
    on_ranks(3, tmp_path, exactly_float64)


def on_four_ranks() -> None:
    n = 101
    for pattern in (P.causal() & P.window(12, 0), P.longformer(6, 3), P.window(40, 40)):
        check(context_parallel(pattern, seq_len=n), pattern.dense(n))
    mask = np.tri(n, dtype=bool)
    mask[: n // 4] = True  # the first rank alone fetches, what it holds nobody does
    mask[n // 4 :] &= np.arange(n) // 26 == np.arange(n // 4, n)[:, None] // 26
    check(context_parallel(mask, layout=CONTIGUOUS), mask)
    check(context_parallel(P.causal(), seq_len=n, softcap=2.0), P.causal().dense(n), softcap=2.0)


def test_four_ranks(tmp_path: Path) -> None:
    on_ranks(4, tmp_path, on_four_ranks)


def drawn(attend: ContextParallel, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Local q, k, v and gradient of o, of 4 heads of 16."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    return [torch.randn(2, 4, len(attend.positions), 16, generator=generator).to(dtype) for _ in range(4)]


def runs_are_equal() -> None:
    """Keys that several ranks fetch: their gradients are added in one order, in float32."""
    n = 90
    attend = context_parallel(P.causal() | P.global_cols(7), seq_len=n, layout=CONTIGUOUS)
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v, do = drawn(attend, dtype)

        def run(q: torch.Tensor = q, k: torch.Tensor = k, v: torch.Tensor = v, do: torch.Tensor = do) -> Any:
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            o, lse = attend(*leaves, return_lse=True)
            return o, lse, *torch.autograd.grad(o, leaves, do)

        first = run()
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
    check(attend, np.array(attend.plan.pattern.dense(n)), dtype=torch.bfloat16, bound=1e-2)


def test_runs_are_equal(tmp_path: Path) -> None:
    on_ranks(3, tmp_path, runs_are_equal)


def some_gradients() -> None:
    """Collectives are called by all ranks alike, whichever inputs and outputs have gradients."""
    attend = context_parallel(P.causal() & P.window(9, 0), seq_len=60, layout=CONTIGUOUS)
    q, k, v, do = drawn(attend)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    o, lse = attend(*leaves, return_lse=True)
    whole = torch.autograd.grad(o, leaves, do, retain_graph=True)
    dlse = torch.autograd.grad(lse, leaves[:2], do[..., 0])
    seen = counting()
    with torch.no_grad():
        assert torch.equal(attend(q, k, v), o)
    assert len(seen) == 1
    for wanted, swaps in (((0,), 1), ((1,), 2), ((2,), 2), ((0, 2), 2)):
        seen.clear()
        some = [x.clone().requires_grad_(i in wanted) for i, x in enumerate((q, k, v))]
        got = torch.autograd.grad(attend(*some), [some[i] for i in wanted], do)
        assert all(torch.equal(x, whole[i]) for x, i in zip(got, wanted, strict=True))
        assert len(seen) == swaps
    with torch.autocast("cpu", torch.bfloat16):
        assert attend(*leaves).dtype == torch.bfloat16
    assert all(x.isfinite().all() for x in dlse)
    with pytest.raises(Unsupported, match="first derivatives only"):
        torch.autograd.grad(torch.autograd.grad(attend(*leaves).sum(), leaves, create_graph=True)[0].sum(), leaves)
    with pytest.raises(Unsupported, match="gradients one by one"):
        torch.autograd.grad(attend(*leaves), leaves, torch.stack([do, do]), is_grads_batched=True)


def test_some_gradients(tmp_path: Path) -> None:
    on_ranks(2, tmp_path, some_gradients)


def of_groups_and_compiled_masks() -> None:
    from torch.distributed.device_mesh import init_device_mesh

    pattern, n = P.causal() & P.window(30, 0), 97
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    compiled = compile(pattern, seq_len=n, head_dim=16, dtype="float32", softcap=2.0, target="cpu")
    check(context_parallel(compiled, mesh), pattern.dense(n), softcap=2.0)
    attend = context_parallel(pattern, seq_len=n, layout=CONTIGUOUS)
    assert "97 positions" in repr(attend) and attend.layout == CONTIGUOUS
    x = torch.arange(3.0 * n).reshape(1, n, 3)
    assert torch.equal(attend.unshard(attend.shard(x, 1), 1), x)
    with pytest.raises(InvalidInput, match=r"q has shape \(1, 1, 97, 16\), but rank"):
        attend(*[torch.zeros(1, 1, n, 16)] * 3)
    with pytest.raises(InvalidInput, match="axis 2 of x has 5 positions"):
        attend.shard(torch.zeros(1, 1, 5))
    with pytest.raises(InvalidInput, match="axis 2 of x has 5 positions"):
        attend.unshard(torch.zeros(1, 1, 5))
    with pytest.raises(Unsupported, match="as many queries as keys, not 4 and 6"):
        context_parallel(np.ones((4, 6), bool))
    with pytest.raises(Unsupported, match="no biases, sinks or dropout"):
        context_parallel(compile(pattern, seq_len=n, head_dim=16, dtype="float32", sinks=True, target="cpu"))


def test_groups_and_compiled_masks(tmp_path: Path) -> None:
    on_ranks(2, tmp_path, of_groups_and_compiled_masks)


def of_a_part_of_the_ranks() -> None:
    group = dist.new_group([1])
    if dist.get_rank() == 1:
        check(context_parallel(P.causal(), group, seq_len=20), P.causal().dense(20))
    else:
        with pytest.raises(InvalidInput, match="this process is not in the group"):
            context_parallel(P.causal(), group, seq_len=20)


def test_a_part_of_the_ranks(tmp_path: Path) -> None:
    on_ranks(2, tmp_path, of_a_part_of_the_ranks)


def test_no_group() -> None:
    with pytest.raises(InvalidInput, match="init_process_group"):
        context_parallel(P.causal(), seq_len=10)


def on_gpus() -> None:
    n = 1037
    for pattern in (P.window(200, 0), P.causal(), P.causal() & P.strided(64), P.longformer(64, 4)):
        check(context_parallel(pattern, seq_len=n), pattern.dense(n), dim=64, dtype=torch.bfloat16, device="cuda",
              bound=1e-2)  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus(tmp_path: Path) -> None:
    on_ranks(2, tmp_path, on_gpus, backend="nccl")
