"""What becomes of the records of GPU benchmarks: results in files, targets, tables, the plot."""

from __future__ import annotations

import json
import math

import pytest

import splatc
from splatc.bench.gpu import plot, results, suites, tables, targets
from splatc.bench.gpu.results import Results
from splatc.bench.gpu.shapes import Shape
from tests.bench_results import change, good, record

# -- results and targets -----------------------------------------------------------------------------------------------


def test_all_targets_can_be_met():
    verdicts = targets.judge(good())
    assert [v for v in verdicts if not v.met and not v.what.startswith("backward")] == []
    assert targets.missed(verdicts) == [] and "No measured target is missed." in tables.markdown(good())


@pytest.mark.parametrize(
    ("suite", "case", "who", "values", "missed"),
    [
        ("patterns", "strided8", "splatc", {"error": 0.02}, "relative error of O, bfloat16"),
        ("patterns", "strided8", "splatc", {"error": math.nan}, "relative error of O, bfloat16"),
        ("patterns", "strided8", "splatc", {"lse_error": 2e-3}, "error of LSE, bfloat16"),
        ("patterns", "strided8", "splatc", {"equal_runs": 49}, "runs that are not bitwise equal"),
        ("patterns", "strided8", "splatc", {"failed": "no"}, "measurements without failure"),
        ("dense", "full", "cudnn", {"median_ms": 1.07}, "dense against cuDNN, S=8192, D=64"),
        ("dense", "causal", "cudnn", {"median_ms": 1.01}, "causal against cuDNN, S=16384, D=128"),
        ("patterns", "win_pm256", "flex", {"median_ms": 0.01}, "each pattern against FlexAttention, D=64"),
        ("patterns", "win_pm256", "splatc", {"useful_tflops": 380.0}, "win_pm256: useful rate"),
        ("patterns", "strided64", "splatc", {"median_ms": 0.05}, "strided64: time over its bytes bound"),
        ("shapes", "nat2d_13", "flex", {"median_ms": 0.5}, "13 x 13 neighbourhood"),
        ("shapes", "causal_win1024", "splatc", {"useful_tflops": 499.0}, "window 1024 causal"),
        ("shapes", "half_in_one_row", "splatc", {"median_ms": 0.14}, "half of the tiles in one row block"),
        ("pruned", "nm24_full", "cudnn", {"median_ms": 1.06}, "2:4 attention against cuDNN, D=128"),
        ("pruned", "nm24_full", "cudnn", {"median_ms": 1.04}, "2:4 attention against cuDNN, D=64"),
        ("pruned", "nm24_full", "unpruned", {"median_ms": 1.04}, "2:4 attention against our own without, D=128"),
        ("pruned", "nm24_blocked256", "unpruned", {"median_ms": 0.99}, "2:4 of a static pattern"),
        ("host", "cold, NVRTC", "", {"seconds": 2.6}, "cold compile"),
        ("host", "warm", "", {"seconds": 0.31}, "warm process"),
        ("host", "new length", "", {"added_ms": 1.1}, "new length"),
        ("host", "eager call", "splatc", {"median_us": 16.0}, "eager call"),
    ],
)
def test_each_target_can_be_missed(suite, case, who, values, missed):
    lines = targets.missed(targets.judge(change(good(), suite, case, who, **values)))
    assert any(line.startswith(missed) for line in lines), lines


def test_rounding_does_not_hide_a_miss():
    bound = targets.Bound(">=", 1.08, "{:.2f}x")
    assert [bound.show(x) for x in (1.0761, 1.08, 1.07, 1.2)] == ["1.08x (1.0761)", "1.08x", "1.07x", "1.20x"]


def test_growth_and_mean():
    found = good()
    for r in found.records:
        if r["suite"] == "growth" and r["seq_len"] == 1 << 14:
            r["contestants"]["splatc"]["median_ms"] *= 1.2
        if r["suite"] == "growth" and r["seq_len"] == suites.MILLION:
            r["memory"]["extra_bytes"] = 1 << 30
        if r["suite"] == "patterns" and r["head_dim"] == 64:
            r["contestants"]["flex"]["median_ms"] *= 0.5
    lines = targets.missed(targets.judge(found))
    assert [line.split(":")[0] for line in lines] == [
        "geometric mean against FlexAttention, D=64", "window, time per query from S=4K to 256K, slowest over fastest",
        "win_pm256", "strided64"]  # fmt: skip
    assert "S=16384" in lines[1]


def test_other_sizes_are_not_judged():
    found = good()
    for r in found.records:
        if r["suite"] == "patterns":
            r["heads"] = 4
    judged = {v.what: v.met for v in targets.judge(found)}
    assert judged["each pattern against FlexAttention, D=64"] is None and judged["dense against cuDNN, S=8192, D=64"]


def test_results_merge_and_keep_nan():
    first, second = good(), good()
    second.runs[0]["ceilings"] = {"copy_tb_s": 2.1, "matmul_tflops": 350.0}
    second.records = [r for r in second.records if r["case"] == "strided64"]
    second.records[0]["contestants"]["splatc"]["error"] = math.nan
    second.records[0]["contestants"]["flex"]["error"] = math.inf
    back = [results.from_dict(json.loads(json.dumps(x.to_dict(), allow_nan=False))) for x in (first, second)]
    both = results.merge(back)
    assert len(both.runs) == 2 and len(both.records) == len(first.records)
    r = next(r for r in both.records if r["case"] == "strided64")
    values = r["contestants"]
    assert r["run"] == 1 and math.isnan(values["splatc"]["error"]) and values["flex"]["error"] == math.inf
    assert targets.copy_tb_s(both, r) == 2.1
    assert tables.limit(r, 2.1).startswith("bytes: 182%")
    assert len(tables.headline(both)) == 1  # the same machine


def test_foreign_json_is_refused():
    with pytest.raises(splatc.errors.InvalidInput, match=r"a\.json: no GPU results"):
        results.from_dict({"format": 99}, "a.json")


# -- tables and plot ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "values", "copy", "wanted"),
    [
        (0.040, {}, 4.2, "bytes: 80% of the time is a copy of them"),
        (0.090, {}, 0.0001, "arithmetic: the dense rate"),
        (0.200, {"waste": 1.8}, None, "tile waste 1.80; tiles at 0.82 of the dense rate, 7.8 a row"),
        (0.200, {"waste": 1.01, "tile_m": None}, None, "tiles at 0.46 of the dense rate"),
        (0.150, {"passes": 2, "waste": 1.01}, 4.2, "2 passes; tiles at 0.61 of the dense rate, 7.8 a row; bytes 48%"),
    ],
)
def test_what_limits_a_kernel(ours, values, copy, wanted):
    r = record("patterns", "x", ours, 1.0, Shape(8192, 128), 0.1, **values)
    if copy == 0.0001:
        r["contestants"]["splatc"]["useful_tflops"], copy = 590.0, None
    elif ours >= 0.1:
        r["contestants"]["splatc"]["useful_tflops"] = {0.2: 273.0, 0.15: 364.0}[ours]
    assert tables.limit(r, copy) == wanted


def test_tables_of_everything():
    found = good()
    change(found, "patterns", "longformer", "flex", failed="RuntimeError: too | long")
    text = tables.markdown(found)
    assert "| longformer | 10.00% |" in text and "n/a" in text and "too \\| long" in text
    for heading in ("Targets", "Masks, S=8192, D=128", "Growth with the length", "Correctness", "What failed"):
        assert f"### {heading}" in text
    for section in tables.sections(found):
        assert all(len(row.cells) == len(section.columns) for row in section.rows), section.title


def test_the_plot(tmp_path):
    pytest.importorskip("matplotlib")
    plot.save(good(), tmp_path / "bench.png")
    assert (tmp_path / "bench.png").stat().st_size > 20_000
    with pytest.raises(splatc.errors.InvalidInput, match="must be one of"):
        plot.save(good(), tmp_path / "bench.txt")
    with pytest.raises(splatc.errors.InvalidInput, match="nothing to plot"):
        plot.save(Results(), tmp_path / "bench.png")
