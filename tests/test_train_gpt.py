"""examples/train_gpt.py at its small size: the curves agree, runs resume, one failure does not lose the others."""

from __future__ import annotations

import importlib
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

FOLDER = Path(__file__).parent.parent / "examples"
ARGUMENTS = ("--small", "--device", "cpu", "--steps", "24", "--save-every", "8")


@pytest.fixture
def gpt(monkeypatch):
    """The modules of the example."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return SimpleNamespace(**{name: importlib.import_module(name) for name in ("train_gpt", "gpt_model", "gpt_text")})


def run(gpt: Any, monkeypatch: Any, folder: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """(exit code, what train_gpt.json says)."""
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", *ARGUMENTS, "--out", str(folder), *arguments])
    return gpt.train_gpt.main(), json.loads((folder / "train_gpt.json").read_text())


def test_the_curves_agree(gpt, monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    code, found = run(gpt, monkeypatch, tmp_path)
    printed = capsys.readouterr().out
    assert code == 0 and found["agree"] and "they agree" in printed and "dense with mask, float32" in printed
    assert found["differences"]["mean"] < 0.01 and found["differences"]["largest"] < 0.03
    for kind in ("splatc", "dense"):
        losses = found["runs"][kind]["losses"]
        assert len(losses) == 24 and losses[-1] < losses[0] - 0.7 and losses[0] == pytest.approx(math.log(41), abs=0.1)
    assert (tmp_path / "train_gpt.png").stat().st_size > 5000
    code, again = run(gpt, monkeypatch, tmp_path)  # nothing is left to do
    assert code == 0 and again["runs"] == found["runs"]


def test_out_of_time_and_wrong_runs(gpt, monkeypatch, tmp_path, capsys):
    code, found = run(gpt, monkeypatch, tmp_path, "--budget-seconds", "0", "--runs", "dense")
    assert code == 0 and found["runs"]["dense"]["losses"] == [] and "goes on from here" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="'sparse' is none of"):
        run(gpt, monkeypatch, tmp_path, "--runs", "sparse")


def test_a_failure_is_told_and_the_others_run(gpt, monkeypatch, tmp_path, capsys):
    code, found = run(gpt, monkeypatch, tmp_path, "--runs", "flex,dense", "--steps", "2")
    assert code == 1 and found["runs"]["flex"]["failed"] and len(found["runs"]["dense"]["losses"]) == 2
    assert "failed: " in capsys.readouterr().out


def test_a_run_goes_on_as_if_nothing_had_happened(gpt, tmp_path):
    t = gpt.train_gpt
    plan, text = replace(t.SMALL, steps=6, save_every=100), t.corpus(20_000, 0)
    whole = t.Trainer("splatc", plan, "cpu", tmp_path / "whole.pt")
    assert t.train(whole, text, math.inf, lambda run: None)
    first = t.Trainer("splatc", plan, "cpu", tmp_path / "cut.pt")
    assert not first.resume()
    for step in range(3):
        first.step(t.batch(text, plan, step, "cpu"), step)
    assert not t.train(first, text, 0.0, lambda run: None)  # out of time: saved
    second = t.Trainer("splatc", plan, "cpu", tmp_path / "cut.pt")
    assert second.resume() and len(second.run.losses) == 3
    assert t.train(second, text, math.inf, lambda run: None)
    assert second.run.losses == pytest.approx(whole.run.losses, abs=1e-6)
    other = t.Trainer("splatc", replace(plan, rate=1.0), "cpu", tmp_path / "cut.pt")
    assert not other.resume()  # of other settings


def test_kinds_start_alike_and_compute_alike(gpt):
    size = gpt.train_gpt.SMALL.size
    models = []
    for kind in ("splatc", "dense"):
        torch.manual_seed(3)
        models.append(gpt.gpt_model.GPT(size, kind))
    one, other = (model.state_dict() for model in models)
    assert list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)
    tokens = torch.randint(0, size.vocabulary, (2, size.context))
    torch.testing.assert_close(models[0](tokens), models[1](tokens), rtol=1e-4, atol=1e-5)
    q, k = np.arange(256)[:, None], np.arange(256)[None, :]
    for mask in gpt.gpt_model.masks(size):
        assert (mask.mask_mod(0, 0, q, k) == mask.pattern.dense(256)).all()


def test_the_text_means_something(gpt):
    t = gpt.gpt_text
    tokens = t.corpus(50_000, 1)
    assert len(tokens) == 50_000 and (tokens == t.corpus(50_000, 1)).all() and (tokens != t.corpus(50_000, 2)).any()
    text = "".join(t.ALPHABET[i] for i in tokens)
    for document in text.split("\n\n")[:-1]:
        numbers = {a: int(b) for a, b in re.findall(r"(\w+) is (\d+)\.", document.split("\n")[0])}
        for a, b, c in re.findall(r"(\w+) plus (\w+) is (\d+)", document):
            assert numbers[a] + numbers[b] == int(c)
        for a, b in re.findall(r"what is (\w+)\? (\d+)", document):
            assert numbers[a] == int(b)


def test_smoothed_differences(gpt):
    t = gpt.train_gpt
    assert t.smooth([2.0, 4.0]).tolist() == [2.0, 3.0] and t.smooth(range(100))[-1] == pytest.approx(89.5)
    away = t.differences(t.Run("a", [1.0] * 50), t.Run("b", [1.0] * 49 + [3.0]))
    assert away["final"] == away["largest"] == pytest.approx(2 / t.SMOOTH) and away["mean"] == pytest.approx(0.002)
    assert math.isnan(t.differences(t.Run("a"), t.Run("b", [1.0]))["mean"])
    plan = t.Plan()
    rates = [t.learning_rate(plan, step) for step in range(plan.steps)]
    assert max(rates) == pytest.approx(plan.rate) and min(rates[100:]) > 0.09 * plan.rate and rates[0] < plan.rate / 10
