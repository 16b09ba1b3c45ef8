"""``splatc bench``: options, files and exit codes. The GPU suites run on a CPU here, at small sizes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from splatc.bench import analysis, attention
from splatc.bench.gpu import run as gpu_run
from splatc.bench.gpu import suites
from splatc.bench.gpu.measure import Session
from splatc.cli import bench
from splatc.cli.main import run
from tests.bench_results import change, good
from tests.test_bench import section
from tests.test_bench_gpu import SMALL

FORMER = "# Performance\n\nWords.\n\n<!-- bench:cpu begin -->\nFORMER\n<!-- bench:cpu end -->\n\nMore.\n\n" \
         "<!-- bench:gpu begin: from splatc bench -->\nFORMER\n<!-- bench:gpu end -->\n\nThe end.\n"  # fmt: skip


@pytest.fixture
def cpu_only(monkeypatch):
    monkeypatch.setattr(bench, "has_gpu", lambda: False)
    rows = section().rows
    monkeypatch.setattr(attention, "run", lambda setting: iter(rows))
    monkeypatch.setattr(analysis, "warm_start", lambda: iter(rows[:1]))


@pytest.fixture
def gpu_on_cpu(monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setattr(bench, "has_gpu", lambda: True)
    monkeypatch.setattr(gpu_run, "session_for", lambda choice, device: Session("cpu", rounds=1, dense_size=(256, 2)))
    monkeypatch.setattr(suites.Choice, "small", lambda dtype, dims: replace(SMALL, dtype=dtype, head_dims=dims))


def saved(tmp_path, name, results):
    path = tmp_path / name
    about = {"date": "2026-11-20", "command": "x", "versions": {}, "machine": {}}
    path.write_text(bench.Report(about, [], results).to_json())
    return str(path)


def test_without_a_gpu_the_default_is_the_cpu(capsys, cpu_only, tmp_path):
    code = run(["bench", "--quick", "--json", str(tmp_path / "b.json"), "--markdown", str(tmp_path / "b.md")])
    out, err = capsys.readouterr()
    assert code == 1 and "target missed" in err and "too slow" in err and "Warm start" in out
    assert len(json.loads((tmp_path / "b.json").read_text())["tables"]) == 2
    assert "too slow" in (tmp_path / "b.md").read_text()


def test_with_a_gpu_the_default_is_the_gpu(gpu_on_cpu):
    assert bench.choose_suites(None) == bench.choose_suites("gpu") == set(suites.SUITES)
    assert bench.choose_suites("all") == {*suites.SUITES, "cpu", "compiler"}
    assert bench.choose_suites(" dense, host,cpu") == {"dense", "host", "cpu"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "dance"], "'dance' is none of dense, patterns"),
        (["--suite", ","], "names no suite"),
        (["--suite", "dense"], "need a CUDA device"),
        (["--dtype", "int8"], "--dtype is 'int8'"),
        (["--head-dim", "64,x"], "--head-dim is '64,x'"),
        (["--head-dim", "512"], "whole numbers from 1 to 256"),
        (["--from", "nowhere.json"], "nowhere.json: No such file"),
        (["--from", "nowhere.json", "--suite", "cpu"], "give one of them"),
    ],
)
def test_wrong_options(arguments, message, capsys, cpu_only):
    assert run(["bench", *arguments]) in (1, 2)
    assert message in capsys.readouterr().err


def test_a_gpu_suite_is_measured_saved_and_told(capsys, gpu_on_cpu, tmp_path):
    path = tmp_path / "d.json"
    code = run(["bench", "--suite", "dense", "--quick", "--dtype", "float32", "--head-dim", "32", "--json", str(path),
                "-j", "0"])  # fmt: skip
    out, err = capsys.readouterr()
    assert code == 0, err
    values = json.loads(path.read_text())
    assert len(values["gpu"]["records"]) == 4 and len(values["gpu"]["targets"]) > 30
    assert "Dense and causal, 2 heads, float32" in out and "dense causal S=512 D=32: splatc" in err


def test_figures_are_saved_before_the_run_ends(capsys, gpu_on_cpu, monkeypatch, tmp_path):
    """Whoever loses the machine half way keeps what was measured."""
    path = tmp_path / "d.json"
    counted = []

    def interrupted(job, session):
        counted.append(job)
        if len(counted) == 3:
            raise KeyboardInterrupt
        return {"suite": "dense", "case": job.case.name, "failed": "as said"}

    monkeypatch.setattr(gpu_run, "measure", interrupted)
    assert run(["bench", "--suite", "dense", "--quick", "--json", str(path), "-j", "0"]) == 130
    assert len(json.loads(path.read_text())["gpu"]["records"]) == 2


def test_earlier_figures_become_the_document(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    first, second = good(), good()
    first.records = [r for r in first.records if r["suite"] != "host"]
    second.records = [r for r in second.records if r["suite"] == "host"]
    document = tmp_path / "performance.md"
    document.write_text(FORMER)
    (tmp_path / "img").mkdir()
    picture, merged = tmp_path / "img" / "bench.png", tmp_path / "all.json"
    code = run(["bench", "--from", saved(tmp_path, "a.json", first), "--from", saved(tmp_path, "b.json", second),
                "--markdown", str(document), "--plot", str(picture), "--json", str(merged)])  # fmt: skip
    assert code == 0, capsys.readouterr().err
    text = document.read_text()
    assert text.startswith(FORMER.partition("<!-- bench:gpu")[0]) and text.endswith("The end.\n")
    assert "![useful rate of each mask, and the roofline](img/bench.png)" in text and "on 2026-11-20" in text
    assert text.count("FORMER") == 1 and "<!-- bench:gpu begin: from splatc bench -->\n\n## On a GPU" in text
    assert "Host time of an eager call" in text and "Masks, S=8192, D=64" in text and picture.stat().st_size > 0
    assert len(json.loads(merged.read_text())["gpu"]["records"]) == len(good().records)
    again = text
    assert run(["bench", "--from", str(merged), "--markdown", str(document), "--plot", str(picture)]) == 0
    assert document.read_text().count("## On a GPU") == again.count("## On a GPU") == 1


def test_cpu_figures_too(cpu_only, capsys, tmp_path):
    run(["bench", "--suite", "cpu", "--quick", "--json", str(tmp_path / "c.json")])
    values = json.loads((tmp_path / "c.json").read_text())
    (tmp_path / "c.json").write_text(json.dumps(values | {"command": "splatc bench -s cpu"}))
    document = tmp_path / "p.md"
    document.write_text(FORMER)
    assert run(["bench", "--from", str(tmp_path / "c.json"), "--markdown", str(document)]) == 1  # a row misses a target
    text = document.read_text()
    assert "## CPU attention" in text and "| a\\|b | 1 |" in text and "too slow" in text and text.count("FORMER") == 1
    assert "`splatc bench -s cpu` on" in text  # what measured, not what wrote


def test_a_missed_target_is_exit_code_1(capsys, tmp_path):
    worse = change(good(), "host", "warm", "", seconds=0.5)
    assert run(["bench", "--from", saved(tmp_path, "a.json", worse)]) == 1
    assert "target missed: warm process: 0.5 s, the target is <= 0.3 s" in capsys.readouterr().err


def test_results_of_something_else(capsys, tmp_path):
    (tmp_path / "x.json").write_text('{"tables": 3}')
    assert run(["bench", "--from", str(tmp_path / "x.json")]) == 2
    assert "x.json: no results" in capsys.readouterr().err


def test_a_document_without_the_marks_of_a_part(capsys, tmp_path):
    document = tmp_path / "p.md"
    document.write_text("<!-- bench:cpu begin -->\n<!-- bench:cpu end -->\n")
    assert run(["bench", "--from", saved(tmp_path, "a.json", good()), "--markdown", str(document)]) == 2
    assert "bench:gpu begin" in capsys.readouterr().err
