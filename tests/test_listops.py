"""examples/listops.py at a tiny size: the grammar, every mode, the change to patterns, runs that go on."""

from __future__ import annotations

import importlib
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("one_thread")

FOLDER = Path(__file__).parent.parent / "examples"
TINY = ("--small", "--device", "cpu", "--examples", "40", "--tests", "8", "--batch", "2", "--evaluate", "2")


@pytest.fixture
def listops(monkeypatch):
    """The modules of the example."""
    monkeypatch.syspath_prepend(str(FOLDER))
    names = ("listops", "listops_data", "listops_model")
    return SimpleNamespace(**{name: importlib.import_module(name) for name in names})


def test_the_grammar(listops):
    data = listops.listops_data
    tokens, values = data.dataset(data.Grammar(10, 200, 5, 5), 60, 256, 3)
    lengths = (tokens > 0).sum(1)
    assert ((lengths >= 10) & (lengths <= 205)).all() and len(set(values)) == 10
    for row, value in zip(tokens, values):
        assert data.evaluate(row[row > 0].tolist()) == value
    again, _ = data.dataset(data.Grammar(10, 200, 5, 5), 20, 256, 3, processes=2)
    other, _ = data.dataset(data.Grammar(10, 200, 5, 5), 20, 256, 4)
    assert (again == tokens[:20]).all() and (other != tokens[:20]).any()
    text = "[MAX 4 [MIN 7 2 ] 1 [SM 8 5 ] [MED 9 0 8 6 ] ]"
    assert data.evaluate([data.NUMBER[word] for word in text.split()]) == 7
    with pytest.raises(ValueError, match="do not fit"):
        data.dataset(data.Grammar(), 1, 100, 0)


def test_every_mode_computes(listops):
    model = listops.listops_model
    size = model.Size(length=64, layers=1, block=8)
    tokens = torch.randint(1, len(listops.listops_data.WORDS), (2, 64))
    for mode in model.MODES:
        assert torch.isfinite(model.Classifier(size, mode)(tokens)).all(), mode
    assert str(model.pattern_of("bigbird", size)) == "bigbird(block=8)"
    padded = torch.cat([tokens, torch.zeros(2, 10, dtype=torch.long)], 1)
    means = model.Classifier(replace(size, length=74), "window").eval()
    assert torch.isfinite(means(padded)).all()


@pytest.mark.slow
def test_training(listops, monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    modes = "dense,spion-CF,window"
    monkeypatch.setattr(sys, "argv", ["listops.py", *TINY, "--steps", "8", "--modes", modes, "--out", str(tmp_path)])
    monkeypatch.setattr(listops.listops, "SMALL", replace(listops.listops.SMALL, change=1e9))
    assert listops.listops.main() == 0
    runs = {run["mode"]: run for run in json.loads((tmp_path / "listops.json").read_text())["runs"]}
    assert list(runs) == modes.split(",") and "spion-CF" in capsys.readouterr().out
    for mode, run in runs.items():
        assert len(run["losses"]) == 8 and np.isfinite(run["losses"]).all() and run["failed"] is None
        assert [step for step, _ in run["accuracy"]] == [2, 4, 6, 8] and 1.5 < run["losses"][0] < 4
        for cost in run["costs"].values():  # seven products for six, of what the mode attends to at the end
            share = cost["pairs"] / cost["dense_pairs"]
            assert cost["fewer_operations"] == pytest.approx(6 / 7 / share) and cost["dense_pairs"] == 2 * 64**2
            assert share == 1 if mode == "dense" else share < 0.7
        assert (run["changed"] == 6 and len(run["densities"]) == 2) if "spion" in mode else run["changed"] is None
        if "spion" in mode:  # the third evaluation; equal before it
            assert run["losses"][:6] == pytest.approx(runs["dense"]["losses"][:6], abs=1e-5)
            assert len(list((tmp_path / f"listops_maps/{mode}").glob("*.png"))) == 2
    assert runs["spion-CF"]["losses"][6:] != pytest.approx(runs["dense"]["losses"][6:], abs=1e-6)
    assert (tmp_path / "listops.png").stat().st_size > 5000
    with pytest.raises(SystemExit, match="'sparse' is none of"):
        monkeypatch.setattr(sys, "argv", ["listops.py", "--modes", "sparse"])
        listops.listops.main()


@pytest.mark.slow
def test_a_run_goes_on_as_if_nothing_had_happened(listops, tmp_path, monkeypatch):
    monkeypatch.setattr("splatc.sparsify.schedule.draw_all", lambda found, folder: None)  # test_training draws
    example = listops.listops
    plan = replace(example.SMALL, batch=2, steps=9, evaluate=2, change=1e9, examples=20, tests=4, prune_to="zero")
    pairs = [listops.listops_data.dataset(plan.grammar, n, plan.size.length, n) for n in (20, 4)]
    data = dict(zip(("train", "test"), pairs))
    whole = example.Trainer("spion-CF", plan, "cpu", tmp_path)
    assert not whole.resume()
    assert example.train(whole, data, math.inf, lambda run: None) and whole.run.changed == 6
    for cuts in ((3,), (7,), (4, 8)):  # before the change, after it, both
        (tmp_path / str(cuts)).mkdir()
        for cut in (*cuts, 9):
            part = example.Trainer("spion-CF", plan, "cpu", tmp_path / str(cuts))
            assert part.resume() == (cut != cuts[0])
            while len(part.run.losses) < cut:
                part.step(*data["train"])
            part.save()
        assert part.run.losses == pytest.approx(whole.run.losses, abs=1e-6)
        assert part.run.changed == 6 and part.schedule.switched and part.schedule.distances == whole.schedule.distances
    assert not example.Trainer("spion-CF", replace(plan, rate=1.0), "cpu", tmp_path).resume()  # of other settings


def test_peers_compute_the_same(listops):
    model = listops.listops_model
    size = model.Size(length=64, layers=1, block=8)
    torch.manual_seed(0)
    wanted = model.Classifier(size, "dense").eval()
    tokens = torch.randint(1, len(listops.listops_data.WORDS), (2, 64))
    for mode in model.PEERS:
        other = model.Classifier(size, mode).eval()
        other.load_state_dict(wanted.state_dict())
        assert torch.allclose(other(tokens), wanted(tokens), atol=1e-5), mode


def test_blocks_for_flex_attention(listops):
    from splatc import patterns as P

    peers = importlib.import_module("listops_peers")
    matrix = np.random.default_rng(0).random((6, 6)) < 0.4
    blocks = peers.block_mask(P.block_mask(matrix, 8), "cpu")
    assert (blocks.to_dense()[0, 0].numpy() > 0).tolist() == matrix.tolist() and blocks.shape[-2:] == (48, 48)
    layer = peers.Flex(16, 2)
    layer.switch(P.block_mask(matrix, 8))
    with pytest.raises(Exception, match="gradients on GPUs only"):
        layer(torch.randn(1, 48, 16))


def test_speed(listops, monkeypatch, tmp_path, capsys):
    speed = importlib.import_module("listops_speed")
    monkeypatch.setattr(speed, "GENERATED", (128, 1))
    monkeypatch.setattr(speed, "SECONDS", 0)
    small = (*TINY[:3], "--speed", "64", "--tokens", "128", "--out", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["listops.py", *small])
    assert listops.listops.main() == 0
    saved = json.loads((tmp_path / "listops_speed.json").read_text())
    assert [(one["length"], one["batch"]) for one in saved["lengths"]] == [(64, 2)]
    for record in saved["lengths"]:
        assert [one["how"] for one in record["contestants"]] == ["unfused", "sdpa", "dense", "splatc"]
        assert len(record["densities"]) == 2 and max(record["densities"]) < 0.4
        for one in record["contestants"]:
            assert one["step_ms"] > 0 and one["attention_ms"] > 0 and one["error"] < 1e-5 and one["failed"] is None
    assert "64 positions, batch 2" in capsys.readouterr().out
