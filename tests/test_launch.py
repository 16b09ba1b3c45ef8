"""Launching kernels without a GPU: what reaches the driver, and that it computes attention."""

from __future__ import annotations

import logging
import threading
import weakref
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from splatc import patterns as P
from splatc.codegen.build import device_source
from splatc.codegen.cuda import attention_cuda
from splatc.codegen.emitted import parse_signatures
from splatc.codegen.kernel import KernelSpec
from splatc.codegen.target import Target
from splatc.errors import CompileError, InvalidInput, Unsupported, VerifyError
from splatc.ir.passes import Schedule
from splatc.runtime import gpu as gpu_module
from splatc.runtime.gpu import DeviceTables, image_for, load_functions
from splatc.runtime.gpu_call import allocation
from splatc.runtime.kernel import Kernel
from splatc.runtime.launch import REMEMBERED, Launcher
from splatc.runtime.likeness import likeness, unlike
from tests import cuda_on_cpu
from tests.fake_gpu import FakeDriver, FakeTorch, fake_gpu, plan, write_built
from tests.fake_gpu import check as check_within
from tests.fake_gpu import draw as draw_tensors

torch = pytest.importorskip("torch")
pytest.importorskip("tvm")
D = 16
SPEC = KernelSpec("portable", D, D, "float32", 64, 64, Target("cuda", "sm_80"))
NAME = "splatc_attention_kernel"
PATTERN = P.causal() & (P.window(20, 0) | P.strided(16))


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, list[tuple[str, str]]]:
    """(built folder, kernel on the CPU, its parameters)."""
    folder = tmp_path_factory.mktemp("portable")
    emitted = attention_cuda(SPEC)
    source = device_source(emitted, SPEC.target.arch)
    (signature,) = parse_signatures(source)
    (function,) = emitted.functions
    write_built(folder, [{**asdict(function), "parameters": signature.parameters}])
    run = cuda_on_cpu.compile_on_cpu(source, folder)
    return folder, lambda grid, **arguments: run(grid[0], **arguments), list(signature.parameters)


class Machine:
    """A launcher for one mask on a fake GPU."""

    def __init__(self, emulated: Any, *patterns: Any, layout: str = "bhsd", idle: bool = False) -> None:
        self.patterns = patterns or (PATTERN,)
        folder, kernel, parameters = emulated
        self.torch = FakeTorch()
        run = (lambda grid, **arguments: None) if idle else kernel
        self.driver = FakeDriver({NAME: run}, {NAME: parameters}, arch=(8, 0))
        self.gpu = fake_gpu(self.driver, self.torch)
        self.planned = 0
        self.launcher = Launcher(
            Kernel(SPEC, folder), layout, lambda shape: None, self.plan, find_gpu=lambda _: self.gpu
        )

    def plan(self, shape: Any, limits: Any) -> Any:
        self.planned += 1
        assert limits == (None, None)
        return plan(self.patterns, shape, Schedule(64, 64), limits)

    def __call__(self, q: Any, k: Any, v: Any, *, scale: Any = None, enable_gqa: bool = False) -> Any:
        return self.launcher(q, k, v, scale, enable_gqa)


def draw(*lengths: int, **sizes: int) -> list[Any]:
    return draw_tensors(*lengths, **{"dim": D} | sizes)


def check(got: Any, qkv: Any, dense: np.ndarray, scale: float | None = None) -> None:
    check_within(got, qkv, dense, scale, (1e-5, 1e-4))


# -- results -----------------------------------------------------------------------------------------------------------


def test_attention_through_the_launcher(emulated: Any) -> None:
    attend = Machine(emulated)
    for q_len, kv_len in ((100, 100), (40, 130)):
        qkv = draw(q_len, kv_len, heads=4, kv_heads=2, batch=2)
        for scale in (None, 0.3, 0, -0.5):
            check(attend(*qkv, scale=scale, enable_gqa=True), qkv, PATTERN.dense(q_len, kv_len), scale)


def test_several_passes_and_heads(emulated: Any) -> None:
    heads = [PATTERN, P.full(), P.global_cols(0)]
    attend = Machine(emulated, *heads)
    qkv = draw(heads=3)
    check(attend(*qkv), qkv, np.stack([one.dense(100) for one in heads]))


def test_strides_and_layouts(emulated: Any) -> None:
    dense, qkv = PATTERN.dense(100), draw(heads=3, batch=2)
    bhsd = Machine(emulated)
    wanted, wanted_lse = bhsd(*qkv)
    moved = [x.transpose(1, 2).contiguous() for x in qkv]
    o, lse = Machine(emulated, layout="bshd")(*moved)
    assert o.shape == (2, 100, 3, D) and o.is_contiguous()
    assert torch.equal(o.transpose(1, 2), wanted) and torch.equal(lse, wanted_lse)
    wide = [torch.zeros(2, 3, 200, 2 * D) for _ in qkv]
    for w, x in zip(wide, qkv):
        w[:, :, ::2, :D] = x
    last = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in qkv]
    for tensors in ([x.transpose(1, 2) for x in moved], [w[:, :, ::2, :D] for w in wide], last):
        assert torch.equal(bhsd(*tensors)[0], wanted)
    q, k, v = qkv
    expanded = [q, k[:1, :1].expand(2, 3, 100, D), v[:, :1].expand(2, 3, 100, D)]
    check(bhsd(*expanded), expanded, dense)


def test_no_keys(emulated: Any) -> None:
    q, k, v = draw(100)
    o, lse = Machine(emulated, layout="bshd")(*(x.transpose(1, 2) for x in (q, k[:, :, :0], v[:, :, :0])))
    assert o.shape == (1, 100, 2, D) and (o == 0).all() and torch.isneginf(lse).all()


# -- what is done once, and what each time -----------------------------------------------------------------------------


def test_preparations_are_done_once(emulated: Any) -> None:
    attend = Machine(emulated, idle=True)
    qkv = draw()
    for _ in range(5):
        attend(*qkv)
    attend(*draw(batch=3))
    assert attend.planned == 1 and len(attend.driver.loaded) == 1 and len(attend.driver.names) == 1
    attend(*draw(50))
    assert attend.planned == 2 and len(attend.driver.loaded) == 1
    assert len(attend.driver.launched) == 7


def test_each_call_moves_to_its_tensors_stream_and_scale(emulated: Any) -> None:
    attend = Machine(emulated, idle=True)
    first, second = draw(), draw()
    for stream, qkv, scale in ((7, first, None), (7, second, 2.0), (9, first, 2.0)):
        attend.torch.stream = stream
        o, lse = attend(*qkv, scale=scale)
        _, used, values = attend.driver.launched[-1]
        assert used == stream and values["scale"] == pytest.approx(scale or D**-0.5)
        pointers = [values[f"{name}_flat_ptr"] for name in ("q", "k", "v", "o")] + [values["lse_ptr"]]
        assert pointers == [x.data_ptr() for x in (*qkv, o, lse)]


def test_passes_merge_in_order(emulated: Any) -> None:
    attend = Machine(emulated, P.causal() & (P.window(63, 0) | P.strided(128)), idle=True)
    attend(*draw(2048, heads=1))
    assert [values["merge"] for *_, values in attend.driver.launched] == [0, 1]
    work = [values["work_ptr"] for *_, values in attend.driver.launched]
    assert len(set(work)) == 2 and all(address % 16 == 0 for address in work)


def test_the_gpu_of_the_tensors_is_the_current_one(emulated: Any) -> None:
    attend = Machine(emulated, idle=True)
    attend(*draw())
    assert attend.torch.entered == []
    attend.torch.device = 1
    attend(*draw())
    assert attend.torch.entered == [0] and attend.torch.device == 1


def test_no_more_is_remembered_than_needed(emulated: Any) -> None:
    attend = Machine(emulated, P.full(), idle=True)
    for length in range(1, REMEMBERED + 9):
        attend(*draw(length))
    assert len(attend.launcher._ready) == len(attend.launcher._tables) == REMEMBERED


def test_threads_do_not_mix_their_arguments(emulated: Any) -> None:
    attend, faults = Machine(emulated, idle=True), []

    def run(seed: int) -> None:
        qkv = [x + seed for x in draw()]
        for _ in range(50):
            attend(*qkv, scale=1.0 + seed)

    seen: dict[float, int] = {}

    def record(grid: Any, **values: Any) -> None:
        if seen.setdefault(values["scale"], values["q_flat_ptr"]) != values["q_flat_ptr"]:
            faults.append(values)

    attend.driver.kernels[NAME] = record
    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults and len(seen) == 4


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_checks_still_speak(emulated: Any) -> None:
    attend = Machine(emulated, idle=True)
    q, k, v = draw()
    attend(q, k, v)
    for wrong, message in (
        ((q, k.half(), v), "different dtypes"),
        ((q[0], k, v), "4 dimensions"),
        ((q, k[:, :1], v[:, :1]), "enable_gqa=True"),
        ((q.numpy(), k, v), "three of one kind"),
        (([1.0], k, v), "q is a list"),
        ((None, k, v), "q is a NoneType"),
    ):
        with pytest.raises(InvalidInput, match=message):
            attend(*wrong)
    for scale in ("large", float("nan"), [1]):
        with pytest.raises(InvalidInput, match="scale is"):
            attend(q, k, v, scale=scale)


def test_gradients_are_refused_each_time_they_are_on(emulated: Any) -> None:
    attend = Machine(emulated, idle=True)
    q, k, v = draw()
    k.requires_grad_()
    for _ in range(2):
        with torch.no_grad():
            attend(q, k, v)
        with pytest.raises(Unsupported, match="gradients"):
            attend(q, k, v)


def test_a_kernel_may_ask_for_what_nobody_gives(emulated: Any) -> None:
    folder, kernel, parameters = emulated
    attend = Machine((folder, kernel, parameters))
    write = [{"name": NAME, "threads": 256, "smem_bytes": 0, "parameters": [*parameters, ("int32", "novelty")]}]
    attend.launcher._kernel = Kernel(SPEC, folder / "other")
    (folder / "other").mkdir()
    write_built(folder / "other", write)
    with pytest.raises(VerifyError, match="asks for novelty"):
        attend(*draw())


def test_expected_lengths_are_laid_out_and_uploaded_before_they_come(emulated: Any) -> None:
    attend = Machine(emulated)
    attend.launcher.expect(100, 100)  # nothing is known of its batch, heads and GPU yet
    assert attend.planned == attend.torch.uploads == 0
    attend(*draw(64, 64, heads=4, kv_heads=2, batch=2), enable_gqa=True)
    before = attend.torch.uploads
    attend.torch.capturing = True
    attend.launcher.expect(100, 120)  # no upload now
    assert (attend.planned, attend.torch.uploads) == (2, before)
    attend.torch.capturing = False
    attend.launcher.expect(100, 120)
    attend.launcher.expect(100, 120)
    assert (attend.planned, attend.torch.uploads) == (2, before + 1)
    qkv = draw(100, 120, heads=4, kv_heads=2, batch=2)
    check(attend(*qkv, enable_gqa=True), qkv, PATTERN.dense(100, 120))
    assert (attend.planned, attend.torch.uploads) == (2, before + 1)
    attend.launcher.expect(0, 120)  # nothing to plan
    qkv = draw(100, 120, heads=3, batch=2)  # others than expected
    check(attend(*qkv), qkv, PATTERN.dense(100, 120))
    assert attend.planned == 3


# -- graphs ------------------------------------------------------------------------------------------------------------


def test_a_capture_needs_a_call_before(emulated: Any) -> None:
    attend = Machine(emulated, idle=True)
    attend.torch.capturing = True
    with pytest.raises(Unsupported, match="call once with the same shapes before"):
        attend(*draw())
    attend.torch.capturing = False
    attend(*draw())
    attend.torch.capturing = True
    attend(*draw())
    attend(*draw(batch=2))  # other sizes of the same lengths need no upload
    with pytest.raises(Unsupported, match="captured"):
        attend(*draw(99))


def test_tables_of_a_capture_are_kept(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    monkeypatch.setattr(gpu_module, "_captured", kept)
    attend = Machine(emulated, P.full(), idle=True)
    attend(*draw())
    assert not kept
    attend.torch.capturing = True
    attend(*draw())
    attend(*draw())
    assert len(kept) == 1 and isinstance(kept[0], DeviceTables)
    tables = attend.launcher._tables[100, 100, 2, 0, 0]
    attend.torch.capturing = False
    for length in range(1, REMEMBERED + 1):
        attend(*draw(length))
    assert tables is kept[0] and (100, 100, 2, 0, 0) not in attend.launcher._tables


def test_queue_slots() -> None:
    torch_ = FakeTorch()
    gpu = fake_gpu(FakeDriver({}, {}), torch_)
    torch_.capturing = True
    with pytest.raises(Unsupported, match="allocating work queues"):
        gpu.queue_slots
    torch_.capturing = False
    slots = gpu_module._QueueSlots(gpu, eager=4, captured=2)
    eager = [slots.take(False) for _ in range(8)]
    assert len(set(eager[:4])) == 4 and eager[4:] == eager[:4]
    captured = [slots.take(True) for _ in range(4)]  # the last two beyond those set aside
    assert len({*captured, *eager}) == 8
    assert all(slot % 8 == 0 for slot in (*eager, *captured))


# -- loading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "capability", "image"),
    [
        ("sm_80", (8, 0), ".cubin"), ("sm_80", (8, 6), ".cubin"), ("sm_80", (9, 0), ".ptx"),
        ("sm_90a", (9, 0), ".cubin"), ("sm_100f", (10, 3), ".cubin"), ("sm_120", (12, 0), ".cubin"),
        ("sm_90", (10, 0), ".ptx"),
    ],
)  # fmt: skip
def test_which_binary_a_gpu_runs(arch: str, capability: tuple[int, int], image: str) -> None:
    assert image_for(arch, capability) == image


@pytest.mark.parametrize(
    ("arch", "capability", "here"),
    [("sm_90a", (8, 0), "sm_80"), ("sm_90a", (10, 0), "sm_100a"), ("sm_86", (8, 0), "sm_80"),
     ("sm_100f", (12, 0), "sm_120a"), ("sm_100", (9, 0), "sm_90a")],
)  # fmt: skip
def test_other_gpus_are_named(arch: str, capability: tuple[int, int], here: str) -> None:
    with pytest.raises(InvalidInput, match=f"compiled for {arch} but GPU 0 is {here}: compile again for {here}"):
        image_for(arch, capability)


def test_every_image_is_loaded_once(tmp_path: Path) -> None:
    common = {"threads": 32, "smem_bytes": 0, "parameters": [["int32", "n"]]}
    write_built(tmp_path, [{"name": name, "image": name[0], **common} for name in ("a1", "b", "a2")])
    driver = FakeDriver({}, {})
    found = load_functions(tmp_path, "sm_90a", fake_gpu(driver, FakeTorch()))
    assert driver.loaded == [b"a.cubin", b"b.cubin"]
    assert [(f.name, driver.names[f.kernel - 1]) for f in found] == [(name, name) for name in ("a1", "b", "a2")]


def test_a_folder_with_source_only(tmp_path: Path) -> None:
    write_built(tmp_path, [{"name": NAME}])
    (tmp_path / "kernel.cubin").unlink()
    gpu = fake_gpu(FakeDriver({}, {}), FakeTorch())
    with pytest.raises(CompileError, match=r"holds source only.*splatc\[cuda\]"):
        load_functions(tmp_path, "sm_90a", gpu)


def test_copies_are_announced_once(emulated: Any, caplog: pytest.LogCaptureFixture) -> None:
    from splatc.runtime.launch import _say_copied

    _say_copied.cache_clear()
    with caplog.at_level(logging.WARNING, "splatc"):
        for _ in range(3):
            _say_copied("of a test")
    assert [record.message for record in caplog.records] == ["splatc copies an input at every call: of a test"]


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("sizes", [(2, 3, 5, 8), (1, 1, 7, 1), (2, 1, 1, 4), (6,), (1,)])
def test_allocations_are_contiguous(sizes: tuple[int, ...], direct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not direct:
        monkeypatch.delattr(torch._C._dynamo.guards, "_empty_strided_cpu")
    new = allocation(torch.device("cpu"), torch.float16, *sizes)
    one, other = new(), new()
    assert (one.shape, one.stride(), one.dtype) == (sizes, torch.empty(sizes).stride(), torch.float16)
    assert one.data_ptr() != other.data_ptr() and not one.requires_grad
    assert one.untyped_storage().nbytes() == 2 * one.numel()


# -- tensors like those of the call before -----------------------------------------------------------------------------


def changes() -> dict[str, Any]:
    """What makes another kind of tensor of one that is (1, 2, 100, D)."""
    return {
        "sizes": lambda x: x[:, :, :50], "strides": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "dtype": lambda x: x.half(), "device": lambda x: x.to("meta"), "parameter": torch.nn.Parameter,
        "gradients": lambda x: x.clone().requires_grad_(), "rank": lambda x: x[0], "kind": lambda x: x.numpy(),
    }  # fmt: skip


@pytest.mark.parametrize("change", changes())
def test_what_is_not_like_the_tensors_before(change: str) -> None:
    qkv = draw()
    like = likeness(*qkv)
    assert like(*(x.clone() for x in qkv)), "this PyTorch has no such check: calls take longer"
    for i in range(3):
        others = [x.clone() for x in qkv]
        others[i] = changes()[change](others[i])
        assert not like(*others)


def test_nothing_is_kept_alive_by_what_is_like_it() -> None:
    q, k, v = draw()
    like, gone = likeness(q, k, v), weakref.ref(q)
    del q
    assert gone() is None and not like(k, k, None)


@pytest.mark.parametrize("known", [likeness, lambda q, k, v: unlike])
def test_calls_that_take_turns(known: Any, emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splatc.runtime.likeness.likeness", known)
    attend, dense = Machine(emulated), PATTERN.dense(100)
    qkv = draw(heads=4, kv_heads=2)
    wide = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv]
    for tensors in (qkv, wide, qkv, qkv, wide):
        check(attend(*tensors, enable_gqa=True), qkv, dense)
    with pytest.raises(InvalidInput, match="pass enable_gqa=True"):
        attend(*qkv)
    with pytest.raises(InvalidInput, match="q is a list"):
        attend([1.0], *qkv[1:], enable_gqa=True)
    check(attend(*qkv, enable_gqa=True), qkv, dense)
    assert len(attend.launcher._ready) == 2
