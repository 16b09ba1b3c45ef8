"""When layers change from dense to blocks: the schedule, in a loop, over ranks and in other people's trainers."""

from __future__ import annotations

import sys
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from splatc import patterns as P
from splatc.errors import InvalidInput, Unsupported

torch = pytest.importorskip("torch")

from splatc.sparsify import SpionAttention, SpionSchedule, find_pattern  # noqa: E402
from splatc.sparsify.callbacks import lightning_callback, trainer_callback  # noqa: E402
from splatc.sparsify.schedule import settled  # noqa: E402
from tests.ranks import on_ranks  # noqa: E402
from tests.test_spion_layer import dense_weights  # noqa: E402

# -- the schedule ------------------------------------------------------------------------------------------------------


class Model(torch.nn.Module):  # type: ignore[name-defined]
    """Two layers, one after the other."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([SpionAttention(16, 2, **options) for _ in range(2)])

    def forward(self, x: Any) -> Any:
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_settled():
    assert settled({"a": 1.0, "b": 2.0}, {"a": 1.1, "b": 1.8}, 0.15)
    assert not settled({"a": 1.0, "b": 2.0}, {"a": 1.1, "b": 1.6}, 0.15)
    assert settled({"a": 0.0}, {"a": 0.0}, 0.15) and not settled({"a": 0.0}, {"a": 1.0}, 0.15)
    assert not settled({"a": 1.0}, {"a": 1.15000001}, 0.15)


def test_the_transition(tmp_path):
    pytest.importorskip("matplotlib")
    torch.manual_seed(3)
    model = Model()
    told: list[dict[str, Any]] = []
    schedule = SpionSchedule(model, block=16, quantile=0.7, pictures=tmp_path / "maps", on_switch=told.append)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    x, maps = torch.randn(2, 64, 16), []
    for _ in range(12):
        if schedule.switched:
            break
        with schedule.watch():
            loss = model(x).square().mean()
        layer = model.layers[0]
        q, k = (f(x).unflatten(-1, (2, 8)).transpose(1, 2) for f in (layer.q_proj, layer.k_proj))
        maps.append(dense_weights(q, k).mean((0, 1)).detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert schedule.switched and len(maps) >= 3 and len(schedule.distances) == len(maps) - 1
    distances = [one["layers.0"] for one in schedule.distances]
    assert distances == pytest.approx([float((b - a).norm()) for a, b in pairwise(maps)], rel=1e-3)
    wanted = find_pattern(maps[-1], 16, 0.7).pattern
    assert model.layers[0].blocks == wanted and set(told[0]) == {"layers.0", "layers.1"}
    assert all((tmp_path / f"maps/layers.{i}.png").stat().st_size > 5000 for i in range(2))
    before = {p: optimizer.state[p]["exp_avg"].clone() for p in model.parameters()}
    assert all((p in optimizer.state) and before[p].abs().sum() > 0 for p in model.layers[1].parameters() if p.ndim > 1)
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    assert all(optimizer.state[p]["step"] == len(maps) + 1 for p in model.parameters())
    with pytest.raises(InvalidInput, match="nothing left to watch"):
        schedule.start()


def test_a_schedule_goes_on_from_its_state(tmp_path):
    torch.manual_seed(4)
    model = Model()
    x = torch.randn(1, 32, 16)
    schedule = SpionSchedule(model, block=8, quantile=0.5, per_head=True)
    for _ in range(2):
        with schedule.watch():
            model(x)
    torch.save({"model": model.state_dict(), "schedule": schedule.state_dict()}, tmp_path / "all.pt")
    saved = torch.load(tmp_path / "all.pt", weights_only=True)
    copied = Model()
    copied.load_state_dict(saved["model"])
    other = SpionSchedule(copied, block=8, quantile=0.5, per_head=True)
    other.load_state_dict(saved["schedule"])
    for one, m in ((schedule, model), (other, copied)):
        with one.watch():
            m(x)
    assert schedule.switched and other.switched and schedule.distances == other.distances  # d = 0: nothing moved
    assert [layer.blocks for layer in model.layers] == [layer.blocks for layer in copied.layers]
    assert isinstance(model.layers[0].blocks, P.PerHead)
    resumed = Model()
    resumed.load_state_dict(copied.state_dict())
    assert SpionSchedule(resumed).switched and torch.equal(resumed(x), model(x))
    with pytest.raises(InvalidInput, match="the state is of layers"):
        SpionSchedule(resumed.layers[0]).load_state_dict(saved["schedule"])


def test_micro_batches_are_one_evaluation():
    torch.manual_seed(5)
    model = Model()
    x = torch.randn(4, 32, 16)
    layer = model.layers[0]
    layer.watch()
    model(x[:2]), model(x[2:])
    halves = layer.watched()
    layer.watch()
    model(x)
    assert torch.allclose(halves, layer.watched(), atol=1e-6)


def test_wrong_schedules():
    with pytest.raises(InvalidInput, match="has no SpionAttention"):
        SpionSchedule(torch.nn.Linear(2, 2))
    with pytest.raises(InvalidInput, match="change is 0"):
        SpionSchedule(Model(), change=0)
    with pytest.raises(InvalidInput, match="must be odd"):
        SpionSchedule(Model(), filter=4)
    model = Model()
    schedule = SpionSchedule(model)
    with pytest.raises(InvalidInput, match="no map to find patterns in"):
        schedule.switch()
    with pytest.raises(InvalidInput, match="was not called"), schedule.watch():
        model.layers[0](torch.randn(1, 8, 16))
    with pytest.raises(RuntimeError), schedule.watch():
        raise RuntimeError
    assert not schedule.watching
    with schedule.watch():
        model(torch.randn(1, 8, 16))
    with pytest.raises(InvalidInput, match="sequences of one length"), schedule.watch():
        model(torch.randn(1, 9, 16))


def test_padding_is_not_in_the_maps():
    torch.manual_seed(6)
    layer, x = SpionAttention(16, 2), torch.randn(3, 24, 16)
    lengths = torch.tensor([24, 24, 15])
    layer.watch()
    layer(x, key_padding_mask=torch.arange(24) >= lengths[:, None])
    seen: Any = layer.watched()
    maps = torch.zeros(3, 24, 24)
    for out, one, n in zip(maps, x, lengths):
        layer.watch()
        layer(one[None, :n])
        out[:n, :n] = layer.watched()
    assert torch.allclose(seen[:15], maps.mean(0)[:15], atol=1e-6)
    assert torch.allclose(seen[15:], maps[:2].mean(0)[15:], atol=1e-6)


def _watch(x: Any, calls: Any, per_head: bool) -> Any:
    """What a layer sees in calls with these entries of x."""
    torch.manual_seed(0)
    layer = SpionAttention(16, 2)
    layer.watch(per_head)
    for first, last in calls:
        layer(x[first:last])
    return layer.watched()


def _share(x: Any, folder: str) -> None:
    """In each of two processes: equal calls, one call beside two, none beside one, none at all, other lengths."""
    rank = torch.distributed.get_rank()
    for i, calls in enumerate(CALLS):
        torch.save(_watch(x, calls[rank], per_head=i % 2 == 1), f"{folder}/{i}.{rank}.pt")
    with pytest.raises(InvalidInput, match=r"sizes \(23, 23\), \(24, 24\)"):
        _watch(x[:, rank:], [(0, 2)], False)
    schedule = SpionSchedule(Model(), block=8)
    if rank == 0:  # an evaluation of one process, that fails
        with pytest.raises(RuntimeError), schedule.watch():
            schedule.layers["layers.0"](x)
            raise RuntimeError
    with schedule.watch():
        for layer in schedule.layers.values():
            layer(x)


CALLS: Any = ([[(0, 1)], [(1, 2)]], [[(0, 2), (2, 3)], [(3, 5)]], [[], [(1, 4)]], [[], []])  # of each process


@pytest.mark.slow
def test_processes_share_their_maps(tmp_path):
    torch.manual_seed(1)
    on_ranks(2, tmp_path, _share, x := torch.randn(5, 24, 16), str(tmp_path))
    for i, calls in enumerate(CALLS):
        wanted = _watch(x, [*calls[0], *calls[1]], per_head=i % 2 == 1)
        for rank in range(2):
            got = torch.load(tmp_path / f"{i}.{rank}.pt")
            assert got is wanted is None or torch.allclose(got, wanted, atol=1e-6)


# -- callbacks ---------------------------------------------------------------------------------------------------------


def _map_of(model: Any, x: Any) -> Any:
    """What the first layer attends to."""
    layer = model.layers[0]
    layer.watch()
    layer(x)
    return layer.watched()


def stand_in(monkeypatch: Any, module: str, name: str) -> None:
    """A library whose callbacks have a base class and nothing else."""
    parts = module.split(".")
    for i in range(len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[: i + 1]), ModuleType(parts[i]))
    setattr(sys.modules[module], name, type(name, (), {}))


@pytest.mark.parametrize("module", ["lightning.pytorch", "pytorch_lightning"])
def test_lightning_hooks(monkeypatch, module):
    for one in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, one, None)  # as if it were not installed
    model = Model()
    schedule = SpionSchedule(model, block=8, quantile=0.5)
    with pytest.raises(Unsupported, match="needs lightning"):
        lightning_callback(schedule, 2)
    stand_in(monkeypatch, module, "Callback")
    with pytest.raises(InvalidInput, match="every is 0"):
        lightning_callback(schedule, 0)
    callback = lightning_callback(schedule, 2)
    x = torch.randn(2, 24, 16)
    for batch in range(16):  # two to a step of the optimizer, and a validation between them
        step, second = divmod(batch, 2)
        trainer = SimpleNamespace(global_step=step)
        callback.on_train_batch_start(trainer, model, x, batch)
        assert schedule.watching == (step in (2, 4, 6))
        model(x[second:][:1])
        trainer.global_step += second
        callback.on_train_batch_end(trainer, model, None, x, batch)
        if not second:
            callback.on_validation_start(trainer, model)
            model(torch.randn(1, 24, 16))
            callback.on_validation_end(trainer, model)
        elif step == 4:
            assert torch.allclose(schedule.state_dict()["maps"]["layers.0"], _map_of(model, x), atol=1e-6)
            callback.load_state_dict(callback.state_dict())
        assert schedule.switched == (batch >= 13)
    assert len(schedule.distances) == 2


def test_trainer_hooks(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    model = Model()
    schedule = SpionSchedule(model, block=8, quantile=0.5)
    with pytest.raises(Unsupported, match="needs transformers"):
        trainer_callback(schedule, 1)
    stand_in(monkeypatch, "transformers", "TrainerCallback")
    callback = trainer_callback(schedule, 3)
    for step in range(10):
        callback.on_step_begin(None, type("State", (), {"global_step": step}), None)
        model(torch.ones(1, 24, 16))
        callback.on_step_end(None, type("State", (), {"global_step": step + 1}), None)
        assert schedule.switched == (step >= 9)
