"""Launching the Hopper kernel without a GPU: a NumPy twin of the kernel reads what the launcher prepares."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from splatc import oracle
from splatc import patterns as P
from splatc.codegen.build import emit, source_of
from splatc.codegen.costs import Costs
from splatc.codegen.emitted import parse_signatures
from splatc.codegen.hopper.shape import MAX_VIEWS
from splatc.codegen.kernel import KernelSpec
from splatc.codegen.target import Target
from splatc.compile import make_plan
from splatc.ir.passes import Schedule
from splatc.ir.score import Score, score_of
from splatc.ir.terms import Terms
from splatc.ir.views import contiguous, patches, residue
from splatc.patterns.heads import patterns_of
from splatc.runtime.kernel import Kernel
from splatc.runtime.launch import Launcher, _say_copied, layout_of
from splatc.runtime.tensor_map import Layout, geometry, sub_box
from tests.fake_gpu import FakeDriver, FakeTorch, TensorMap, fake_gpu, plan, write_built
from tests.fake_gpu import check as check_within
from tests.fake_gpu import draw as draw_tensors
from tests.hopper_on_cpu import ATTEND, COMBINE, POSITIONS, TERMS, attend_kernel, combine_kernel

torch = pytest.importorskip("torch")
D = 16
NAMES = ("splatc_attention_kernel", "splatc_combine_kernel")


class Machine:
    """A launcher of the NumPy twin for patterns, one a head or one for all."""

    def __init__(self, folder: Path, *patterns: Any, m: int = 64, n: int = 64, layout: str = "bhsd",
                 dim: int = D, gather: bool = False, sms: int = 3, dtype: str = "float16",
                 score: Score = Score()) -> None:  # noqa: B008 (frozen)  # fmt: skip
        self.patterns, self.score = patterns, score
        self.schedule = Schedule(m, n, max_row_views=MAX_VIEWS[0], max_col_views=MAX_VIEWS[1], gather=gather,
                                 fill_empty=True)  # fmt: skip
        self.torch = FakeTorch()
        kernels = dict(zip(NAMES, (attend_kernel(m, n, dim, score), combine_kernel(m, dim, dtype, score.sinks))))
        parameters = [*ATTEND, *TERMS, *POSITIONS * score.positional], [*COMBINE, *TERMS]
        self.driver = FakeDriver(kernels, dict(zip(NAMES, parameters)), sms=sms)
        self.gpu = fake_gpu(self.driver, self.torch)
        folder.mkdir(exist_ok=True)
        write_built(folder, [
            {"name": name, "threads": 128, "smem_bytes": 1024, "parameters": parameters}
            for name, parameters in self.driver.parameters.items()
        ])  # fmt: skip
        spec = KernelSpec("hopper", dim, dim, dtype, m, n, Target("cuda", "sm_90a"), score)
        self.launcher = Launcher(
            Kernel(spec, folder), layout, lambda shape: None, self.plan, find_gpu=lambda _: self.gpu
        )

    def plan(self, shape: Any, limits: Any) -> Any:
        assert limits == MAX_VIEWS
        return plan(self.patterns, shape, self.schedule, limits, self.score)

    def __call__(self, q: Any, k: Any, v: Any, *, scale: Any = None, enable_gqa: bool = True, terms: Any = None) -> Any:
        return self.launcher(q, k, v, scale, enable_gqa, terms)


def draw(*lengths: int, **sizes: int) -> list[Any]:
    return [x.half() for x in draw_tensors(*lengths, **{"dim": D} | sizes)]


def draw32(*lengths: int, **sizes: int) -> list[Any]:
    return draw_tensors(*lengths, **{"dim": D} | sizes)


def check(got: Any, qkv: Any, dense: np.ndarray, scale: float | None = None) -> None:
    lse_error = 2e-3 if got[0].dtype == torch.float32 else 1e-3  # of products in tf32
    check_within(got, qkv, dense, scale, (2e-3, lse_error))


STRIDED = P.causal() & (P.window(15, 0) | P.strided(16))


@pytest.mark.parametrize(
    ("pattern", "q_len", "m", "n"),
    [
        (P.causal(), 150, 64, 64), (P.causal(), 150, 128, 64), (P.window(30, 10), 200, 192, 64),
        (P.strided(7), 1000, 64, 64),  # residues of two lengths: two maps
        (P.strided(100), 1000, 128, 64),  # several residues in a tile
        (STRIDED, 700, 64, 64), (P.causal() & P.fixed(128, 8), 700, 64, 64),
        (P.neighborhood((40, 24), 7), 960, 64, 64), (P.neighborhood((40, 24), 7), 960, 128, 64),
        (P.window(5, 5) & ~P.window(9, 9), 70, 64, 64),  # nothing at all
        (P.full(), 1, 64, 64),
    ],
)  # fmt: skip
def test_what_the_kernel_sees(pattern: Any, q_len: int, m: int, n: int, tmp_path: Path) -> None:
    attend, qkv = Machine(tmp_path, pattern, m=m, n=n), draw(q_len)
    check(attend(*qkv), qkv, pattern.dense(q_len))


@pytest.mark.parametrize(("m", "n", "dim"), [(64, 64, 16), (128, 64, 72), (192, 32, 40), (128, 128, 8)])
@pytest.mark.parametrize("pattern", [P.causal(), P.strided(7), STRIDED, P.longformer(20, 8)], ids=str)
def test_float32_in_tf32(pattern: Any, m: int, n: int, dim: int, tmp_path: Path) -> None:
    """Maps of 32 columns a box, rounded inputs, outputs that are not rounded."""
    attend, qkv = Machine(tmp_path, pattern, m=m, n=n, dim=dim, dtype="float32"), draw32(500, dim=dim)
    o, lse = attend(*qkv)
    assert o.dtype == torch.float32 and (o.view(torch.int32) & 0x1FFF).any()
    check((o, lse), qkv, pattern.dense(500))
    types = {name[0]: one.dtype for name, one in attend.driver.launched[-1][2].items() if isinstance(one, TensorMap)}
    assert types in ({"q": "tfloat32", "k": "tfloat32", "v": "tfloat32", "o": "float32", "p": "float32"}, {})


@pytest.fixture
def cheap_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only column tiles cost anything: rows are cut as soon as that ends earlier."""
    free = lambda spec, workers: Costs(1.0, 0.0, 0.0, 0.0, 0.0, 1.0, workers, "")  # noqa: E731
    monkeypatch.setattr("splatc.runtime.launch_hopper.costs_of", free)


@pytest.mark.parametrize(
    ("pattern", "length", "merges"),
    [(P.longformer(20, 8), 600, [0, 0]), (P.causal(), 600, [0, 0]),
     (P.causal() & (P.window(15, 0) | P.strided(8)), 4200, [0, 1, 1])],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.usefixtures("cheap_parts")
def test_rows_in_parts(pattern: Any, length: int, merges: list[int], dtype: str, tmp_path: Path) -> None:
    attend = Machine(tmp_path, pattern, sms=200, dtype=dtype)
    qkv = (draw if dtype == "float16" else draw32)(length, heads=1, batch=2)
    check(attend(*qkv), qkv, pattern.dense(length))
    launched = [(name, values["merge"]) for name, _, values in attend.driver.launched]
    assert [merge for _, merge in launched] == merges and launched[-1][0] == NAMES[1]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("sms", [3, 200])  # with many, rows are in parts
@pytest.mark.usefixtures("cheap_parts")
def test_merged_with_what_is_there(dtype: str, sms: int, tmp_path: Path) -> None:
    """Some queries attend to more keys: their rows of o and lse, which lie in those of all, come to both."""
    n, first, more = 300, 40, 650
    near, far = P.causal() & P.window(60, 0), P.causal() & P.window(500, -40)
    q, k, v = (draw if dtype == "float16" else draw32)(n, heads=2, batch=2)
    _, more_k, more_v = (draw if dtype == "float16" else draw32)(more, heads=2, batch=2)
    o, lse = Machine(tmp_path / "near", near, dtype=dtype)(q, k, v)
    asking = slice(first, first + 200)
    before = o.clone(), lse.clone()
    attend = Machine(tmp_path / "far", far, dtype=dtype, sms=sms)
    rows = o[:, :, asking], lse[:, :, asking], q[:, :, asking]
    assert attend.launcher.merge(*rows, more_k, more_v, None, False)
    dense = np.zeros((n, n + more), bool)
    dense[:, :n], dense[asking, n:] = near.dense(n), far.dense(200, more)
    check((o, lse), (q, torch.cat([k, more_k], 2), torch.cat([v, more_v], 2)), dense)
    others = np.setdiff1d(np.arange(n), np.arange(n)[asking])
    for now, then in zip((o, lse), before, strict=True):
        assert torch.equal(now[:, :, others], then[:, :, others])


def test_what_is_not_merged_by_a_kernel(tmp_path: Path) -> None:
    attend, (q, k, v) = Machine(tmp_path, P.full()), draw(70, heads=2)
    o, lse = attend(q, k, v)
    before = o.clone(), lse.clone()
    for rows in ((o, lse, -1.0), (o, lse.mT.contiguous().mT, None), (o.mT.contiguous().mT, lse, None)):
        assert not attend.launcher.merge(*rows[:2], q, k, v, rows[2], False)
    assert torch.equal(o, before[0]) and torch.equal(lse, before[1])


@pytest.mark.parametrize("sms", [3, 200])
@pytest.mark.usefixtures("cheap_parts")
def test_patterns_for_each_batch_entry(sms: int, tmp_path: Path) -> None:
    """Of two passes not all entries have both; what is laid out serves again."""
    entries = [STRIDED, P.documents([300, 400]) & P.causal(), P.per_head([P.full(), P.window(5, 5)])]
    machine, pattern = Machine(tmp_path, P.full(), sms=sms), P.per_batch(entries)
    spec = KernelSpec("hopper", D, D, "float16", 64, 64, Target("cuda", "sm_90a"), Score())
    machine.plan = lambda shape, limits: make_plan(  # type: ignore[method-assign]
        pattern, shape.q_len, shape.kv_len, spec).launches(shape.batch, shape.heads, *limits)  # fmt: skip
    machine.launcher = Launcher(machine.launcher._kernel, "bhsd", lambda shape: None, machine.plan,
                                find_gpu=lambda _: machine.gpu)  # fmt: skip
    for _ in range(2):
        qkv = draw(700, heads=2, batch=3)
        masks = [one.dense(700) for one in patterns_of(pattern, 2, 3)]
        check(machine(*qkv), qkv, np.stack(masks).reshape(3, 2, 700, 700))


def test_gathered_keys(tmp_path: Path) -> None:
    mask = np.random.default_rng(0).random((200, 900)) < 0.01
    pattern = P.mask(mask)
    attend, qkv = Machine(tmp_path, pattern, gather=True), draw(200, 900)
    check(attend(*qkv), qkv, mask)


@pytest.mark.usefixtures("cheap_parts")
def test_patterns_of_heads(tmp_path: Path) -> None:
    patterns = [P.causal(), P.strided(9), STRIDED, P.longformer(10, 3)]
    qkv = draw(300, heads=4, kv_heads=2, batch=2)
    for sms in (1, 100):
        attend = Machine(tmp_path / str(sms), *patterns, sms=sms)
        check(attend(*qkv), qkv, np.stack([p.dense(300) for p in patterns]))


def test_layouts_and_strides(tmp_path: Path) -> None:
    """Whatever way batch and heads lie in memory, the maps reach them, without copies where strides allow it."""
    pattern, dense = STRIDED, STRIDED.dense(130)
    attend = Machine(tmp_path / "bhsd", pattern)
    qkv = draw(130, heads=3, batch=2)
    wanted, wanted_lse = attend(*qkv)
    check((wanted, wanted_lse), qkv, dense)
    moved = [x.transpose(1, 2).contiguous() for x in qkv]
    o, lse = Machine(tmp_path / "bshd", pattern, layout="bshd")(*moved)
    assert o.is_contiguous() and torch.equal(o.transpose(1, 2), wanted) and torch.equal(lse, wanted_lse)
    packed = torch.stack(moved, 2).transpose(1, 3)  # (batch, heads, 3, seq, dim) of memory (batch, seq, 3, heads, dim)
    more_heads = [torch.cat([x, x + 1], 1)[:, :3] for x in qkv]
    wide = [torch.cat([x, x], 3)[..., :D] for x in qkv]
    for tensors in ([x.transpose(1, 2) for x in moved], [packed[:, :, i] for i in range(3)], more_heads, wide):
        before = len(attend.launcher._ready)
        assert torch.equal(attend(*tensors)[0], wanted)
        assert len(attend.launcher._ready) == before + 1, "it was copied"
    q, k, v = qkv
    for k_, v_ in ((k[:, :1], v[:, :1]), (k[:1, :1], v[:1]), (k[:1], v[:, :1])):
        expanded = [q, k_.expand(2, 3, 130, D), v_.expand(2, 3, 130, D)]
        check(attend(*expanded), expanded, dense)


def test_what_tma_cannot_read_is_copied(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _say_copied.cache_clear()
    attend = Machine(tmp_path, STRIDED)
    qkv = draw(130)
    wanted = attend(*qkv)[0]
    odd = [torch.nn.functional.pad(x, (0, 3))[..., :D] for x in qkv]  # rows of 38 bytes
    shifted = [torch.cat([torch.zeros(1).half(), x.flatten()])[1:].view(x.shape) for x in qkv]  # at 2 modulo 16
    backwards = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in qkv]
    for tensors, why in ((odd, "do not suit the tensor memory"), (shifted, "16 bytes"), (backwards, "not neighbours")):
        caplog.clear()
        assert torch.equal(attend(*tensors)[0], wanted)
        assert [why in record.message for record in caplog.records] == [True], caplog.records
    q, k, v = qkv
    once = [q, k[:, :, :1].expand_as(k), v]  # one key for all positions
    check(attend(*once), once, STRIDED.dense(130))


@pytest.mark.parametrize("scale", [0.3, 0, -0.5])
def test_any_scale(scale: float, tmp_path: Path) -> None:
    attend, qkv = Machine(tmp_path, P.causal()), draw()
    check(attend(*qkv, scale=scale), qkv, P.causal().dense(100), scale)
    assert attend.driver.launched[-1][2]["scale"] > 0


def test_head_dims_that_are_no_multiple_of_64(tmp_path: Path) -> None:
    for dim in (8, 72, 128):
        attend, qkv = Machine(tmp_path, P.causal(), dim=dim), draw(dim=dim)
        check(attend(*qkv), qkv, P.causal().dense(100))


def test_nothing_is_encoded_while_tensors_stay(tmp_path: Path) -> None:
    attend, qkv = Machine(tmp_path, P.full()), draw()
    keep = [attend(*qkv) for _ in range(2)]
    encoded, moved = len(attend.driver.maps), attend.driver.moved
    keep.append(attend(*qkv))
    assert len(attend.driver.maps) == encoded and attend.driver.moved <= moved + 1  # o alone is new
    maps = {id(one) for name, one in attend.driver.launched[-1][2].items() if name.startswith("k_map")}
    assert len(maps) == 1, "views that are not there are view 0"
    slots = [values["queue_ptr"] for *_, values in attend.driver.launched]
    assert len(set(slots)) == len(slots) == 3


def test_blocks_fill_the_gpu_and_no_more(tmp_path: Path) -> None:
    attend = Machine(tmp_path, P.full())
    attend(*draw(64, heads=1))
    attend(*draw(64, heads=8))
    assert [values["blocks"] for *_, values in attend.driver.launched] == [1, attend.driver.sms]


CAP, EVERYTHING = score_of(softcap=True), score_of(True, True, True, True, True, True)


@pytest.mark.parametrize("options, tile", [
    ({}, (64, 64)), ({}, (128, 128)), ({}, (192, 128)), ({"score": CAP}, (64, 128)), ({"gather": True}, (128, 64)),
    ({"score": CAP, "gather": True}, (128, 128)), ({"dtype": "float32"}, (128, 64)), ({"score": EVERYTHING}, (128, 64)),
])  # fmt: skip
def test_the_launcher_knows_all_that_the_kernel_asks_for(options: Any, tile: tuple[int, int]) -> None:
    pytest.importorskip("tvm")
    options = {"dtype": "bfloat16"} | options
    spec = KernelSpec("hopper", 64, 64, tile_m=tile[0], tile_n=tile[1], target=Target("cuda", "sm_90a"), **options)
    emitted = emit(spec)
    declared = {one.name: one for one in parse_signatures(source_of(emitted, spec))}
    known_to = ([*ATTEND, *TERMS, *POSITIONS * spec.score.positional], [*COMBINE, *TERMS])
    for function, known in itertools.zip_longest(emitted.functions, known_to[: len(emitted.functions)]):
        assert declared[function.name].threads == function.threads
        assert set(declared[function.name].parameters) <= set(known)


TERM_MASKS: dict[str, Any] = {
    "window": P.window(50, 20), "strided": STRIDED, "several passes": P.strided(4) & P.causal() | P.window(3, 3),
    "gathered": P.random_blocks(2, 3), "per head": [P.causal(), P.window(9, 30)],
}  # fmt: skip


@pytest.mark.parametrize("name", TERM_MASKS)
@pytest.mark.parametrize("sizes", [(130, 130), (70, 200)], ids=str)
def test_terms(name: str, sizes: tuple[int, int], tmp_path: Path) -> None:
    mask = TERM_MASKS[name]
    patterns = mask if isinstance(mask, list) else [mask]
    rng = np.random.default_rng(5)
    terms = Terms(
        torch.from_numpy(rng.uniform(0, 0.02, 2).astype(np.float32)),
        torch.from_numpy(rng.normal(size=(2, 61)).astype(np.float32)),
        torch.from_numpy(rng.normal(size=(2, -(-sizes[0] // 48), -(-sizes[1] // 48))).astype(np.float32)),
        torch.from_numpy(rng.normal(size=2).astype(np.float32) + 1), torch.tensor([12345678901]),
        block_size=48, shift=sizes[1] - sizes[0], dropout_p=0.3,
    )  # fmt: skip
    attend = Machine(tmp_path, *patterns, gather=name == "gathered",
                     score=score_of(False, True, True, True, True, True))  # fmt: skip
    q, k, v = draw(*sizes, batch=2)
    o, lse = attend(q, k, v, terms=terms)
    dense = np.stack([one.dense(*sizes) for one in patterns] * (2 // len(patterns)))
    q64, k64, v64 = (x.double().numpy() for x in (q, k, v))
    names = ("alibi_slopes", "relative_bias", "block_bias", "sinks", "seed")
    arrays = replace(terms, **{name: getattr(terms, name).numpy() for name in names})
    want, want_lse = oracle.attention(q64, k64, v64, dense, terms=arrays)
    assert oracle.relative_error(o.double(), want) < 2e-3
    assert abs(lse.double().numpy() - want_lse).max() < 1e-3


@pytest.mark.usefixtures("cheap_parts")
def test_sinks_of_rows_in_parts(tmp_path: Path) -> None:
    """A long row is cut: its parts have no sink, their sum has."""
    pattern = P.longformer(20, 8)
    attend = Machine(tmp_path, pattern, score=score_of(sinks=True), sms=200)
    q, k, v = draw(600)
    sinks = torch.tensor([1.5, -2.0])
    o, lse = attend(q, k, v, terms=Terms(sinks=sinks))
    assert any(name == NAMES[1] for name, *_ in attend.driver.launched)
    q64, k64, v64 = (x.double().numpy() for x in (q, k, v))
    want, want_lse = oracle.attention(q64, k64, v64, pattern.dense(600), terms=Terms(sinks=sinks.numpy()))
    assert oracle.relative_error(o.double(), want) < 2e-3
    assert abs(lse.double().numpy() - want_lse).max() < 1e-3


# -- tensor maps -------------------------------------------------------------------------------------------------------

VIEWS = [contiguous(100, 64), residue(100, 7, 64), residue(100, 40, 64), patches(96, (16, 6, 1), (16, 4, 1))]


@pytest.mark.parametrize("view", VIEWS, ids=str)
def test_boxes_hold_what_views_say(view: Any) -> None:
    x = torch.arange(2 * 3 * view.length * 8).reshape(2, 3, view.length, 8).to(torch.int16)
    one = layout_of(x)
    assert one.mappable() and one.step == 3
    origins = np.array([[x1, x2, 0] for x1 in (-3, 0, 32, 90) for x2 in (0, 1, 2, 5)])
    rows = [[*extents, *view.strides, *view.box] for extents in view.shown]
    for origin, part, positions in zip(origins, view.part(origins), view.positions(origins)):
        shape = geometry(rows[part], view.box, one)
        tensor_map = TensorMap("float16", x.data_ptr(), shape.dims, shape.strides, shape.box)
        for batch, head in itertools.product(range(2), range(3)):
            got = tensor_map.load((0, *(int(i) for i in origin), batch * one.step + head))[:, :8]
            want = np.where((positions >= 0)[:, None], x[batch, head, positions].numpy(), 0)
            assert np.array_equal(got.view(np.int16), want)


@pytest.mark.parametrize(
    ("layout", "step"),
    [
        (Layout(2, 3, 10, 16, 480, 160, 16, 2), 3),  # bhsd
        (Layout(2, 3, 10, 16, 480, 16, 48, 2), 30),  # bshd
        (Layout(1, 3, 10, 16, 1, 160, 16, 2), 0),
        (Layout(2, 3, 10, 16, 0, 160, 16, 2), 0),  # an expanded batch
        (Layout(4, 1, 10, 16, 200, 1, 16, 2), 1),
        (Layout(2, 3, 10, 16, 1000, 160, 16, 2), None),  # batches no whole number of heads apart
        (Layout(2, 3, 10, 16, 480, 0, 16, 2), None),
        (Layout(2, 3, 10, 16, 480, 160, 0, 2), None),
        (Layout(1, 3, 10, 16, 480, 164, 16, 2), None),
        (Layout(1, 1, 1, 16, 5, 3, 1, 2), 0),  # strides of one element mean nothing
        (Layout(1, 2, 10, 16, 480, 1 << 40, 16, 2), None),
    ],
)
def test_which_layouts_have_maps(layout: Layout, step: int | None) -> None:
    assert layout.mappable() == (step is not None)
    assert step is None or layout.step == step


def test_expanded_heads_are_one() -> None:
    one = layout_of(torch.zeros(2, 1, 10, 16).half().expand(2, 4, 10, 16))
    assert not one.mappable() and one.one_head().mappable()


def test_parts_of_a_box_are_those_of_the_view() -> None:
    for view in VIEWS:
        assert sub_box(view.box, 1) == view.sub_box(1)
    assert sub_box((128, 1, 1), 2) == ((64, 1, 1), (64, 0, 0))
    assert sub_box((16, 4, 3), 3) == ((16, 4, 1), (0, 0, 1))
