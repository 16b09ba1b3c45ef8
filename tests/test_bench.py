"""The benchmark harness: timing, reports, targets. Figures are not judged here."""

from __future__ import annotations

import json
import time
from functools import partial

import numpy as np
import pytest

from splatc import patterns as P
from splatc.bench import analysis, attention, cases, child, report
from splatc.bench.report import Row, Section
from splatc.bench.timing import Timing, interleaved
from splatc.errors import SplatcError


def test_rounds_are_interleaved():
    calls: list[str] = []
    found = interleaved({name: partial(calls.append, name) for name in "abc"}, rounds=9)
    rounds = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert rounds[0] == "abc" and len(rounds) == 10  # one round before, untimed
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    before = {calls[i] for i in range(2, len(calls) - 1) if calls[i + 1] == "a"}
    assert before >= {"b", "c"}  # none always follows the same one
    assert found["a"].rounds == 9 and found["a"].fastest <= found["a"].median <= found["a"].slowest


def test_a_slow_function_stops_early_but_not_before_three_rounds():
    found = interleaved({"a": lambda: time.sleep(0.002)}, rounds=50, budget=0.0)
    assert found["a"].rounds == 3 and found["a"].median >= 0.002


def test_timing_in_milliseconds():
    assert Timing.of([0.003, 0.001, 0.002]).to_dict() == {"median_ms": 2.0, "min_ms": 1.0, "max_ms": 3.0, "rounds": 3}


@pytest.mark.parametrize("n", [1024, 4096])
def test_cases_fit_their_length(n):
    for pattern in {**cases.library_cases(n), **cases.million_cases(n)}.values():
        pattern.check(n, n)
    assert set(attention.SPEEDUPS) <= set(cases.attention_cases(n))
    assert set(analysis.WASTE_TARGETS) <= set(cases.library_cases(n))


def test_random_documents_cover_everything():
    for count in (3, 12, 1000):
        cases.documents(5000, count).check(5000, 5000)


def test_sampled_error_sees_one_wrong_head():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 3, 64, 16)) for _ in range(3))
    pattern = P.causal() & P.window(9, 0)
    from splatc.oracle import attention as reference

    o = reference(q, k, v, pattern.dense(64))[0]
    assert attention.sampled_error(o, q, k, v, pattern) < 1e-12
    o[0, 1] = 0
    assert attention.sampled_error(o, q, k, v, pattern) > 0.1


def test_blocks_visited():
    mask = np.zeros((300, 300), bool)
    mask[0, 0] = mask[299, 299] = mask[128, 127] = True
    assert analysis._blocks_visited(mask) == 3


def section() -> Section:
    rows = [Row(("a|b", "1"), {"name": "a", "x": 1}), Row(("c", "2"), {"name": "c", "x": 2}, ("c: too slow",))]
    return Section("Things", ("name", "x"), "A note.", rows)


def test_reports():
    about = report.environment(["splatc", "bench"])
    assert about["versions"]["python"] and about["machine"]["cores"] >= 1 and about["command"] == "splatc bench"
    text = report.to_markdown([section()], about)
    assert "| a\\|b | 1 |" in text and "- Things: c: too slow" in text and "A note." in text
    values = json.loads(json.dumps(report.to_json([section()], about)))
    assert values["missed"] == ["Things: c: too slow"] and values["tables"][0]["rows"][1]["x"] == 2
    assert report.from_json(values) == [section()]


def test_markdown_without_misses():
    met = Section("Things", ("x",), rows=[Row(("1",), {})])
    assert "All stated targets are met." in report.to_markdown([met], report.environment([]))


def test_plan_in_a_process():
    row = next(iter(analysis.plans(8192)))
    assert row.values["name"] == "window" and row.values["seconds"] > 0 and row.values["extra_mib"] >= 0
    assert row.values["pieces"] == 3 and not row.missed


def test_a_plan_that_fails_is_a_row(monkeypatch):
    def fail(*_: object) -> None:
        raise SplatcError("no memory")

    monkeypatch.setattr(analysis, "plan_in_child", fail)
    rows = list(analysis.plans(8192))
    assert len(rows) == 5 and all(row.missed and "no memory" in row.missed[0] for row in rows)
    assert all(len(row.cells) == len(analysis.PLAN_COLUMNS) for row in rows)


def test_a_child_that_fails_says_why():
    with pytest.raises(SplatcError, match="KeyError"):
        child.plan_in_child("no such pattern", 8192)


def test_matrices_and_waste():
    for rows, columns in (
        (analysis.matrices(512), analysis.MATRIX_COLUMNS),
        (analysis.waste(1024), analysis.WASTE_COLUMNS),
    ):
        found = list(rows)
        assert all(len(row.cells) == len(columns) for row in found)
        json.dumps([row.values for row in found])


def test_targets_are_judged_at_their_sizes_only(monkeypatch):
    assert attention.Setting().stated and not attention.Setting(seq_len=1024).stated
    monkeypatch.setattr(analysis, "plan_in_child", lambda *_: {
        "seconds": 2.0, "extra_mib": 400.0, "pieces": 1, "tiles": 1, "waste": 1.0, "table_mib": 1.0})  # fmt: skip
    assert len(next(iter(analysis.plans())).missed) == 2
    assert not next(iter(analysis.plans(4096))).missed


def test_attention_rows():
    pytest.importorskip("torch")
    rows = list(attention.run(attention.Setting(seq_len=512, heads=2, head_dim=32, rounds=1)))
    assert len(rows) == attention.count(attention.Setting(seq_len=512))
    for row in rows:
        assert not row.missed and row.values["error"] < 1e-5 and len(row.cells) == len(attention.COLUMNS)


def test_warm_start():
    pytest.importorskip("torch")
    seconds = child.startup(256, 1)["seconds"]
    assert 0 < seconds < 30
