"""The suite of gradients on a CPU: reference, contestants, records, targets, tables. Figures are not judged here."""

from __future__ import annotations

import json
import math

import pytest

from splatc import oracle
from splatc import patterns as P
from splatc.bench.gpu import (
    backward,
    backward_tables,
    cases,
    gradients,
    machine,
    passes,
    results,
    run,
    suites,
    tables,
    targets,
)
from splatc.bench.gpu.measure import Job
from splatc.bench.gpu.peers import BUILDERS, Contestant, boolean_matrix
from splatc.bench.gpu.results import Results
from splatc.bench.gpu.shapes import Shape
from tests.bench_results import change, entry, good, record
from tests.test_bench_gpu import SMALL, TINY, absent, boom, session

torch = pytest.importorskip("torch")

CAUSAL = cases.seventeen(192)["causal"]
CPU_FLEX = "does not support backward on CPU"


# -- the reference -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_the_reference_is_the_oracle(kv_heads, monkeypatch):
    monkeypatch.setattr(gradients, "ROWS", 50)
    pattern = P.causal() & P.window(30, -3)  # the first rows are empty
    mask = pattern.dense(120)
    q, do = (torch.randn(2, 4, 120, 8) for _ in range(2))
    k, v = (torch.randn(2, kv_heads, 120, 8) for _ in range(2))
    arrays = [x.double().numpy() for x in (q, k, v, do)]
    exact = oracle.gradients(arrays[0], arrays[1], arrays[2], mask, arrays[3])
    dq, dk, dv = map(torch.from_numpy, exact)
    wanted = gradients.reference(q, k, v, do, torch.from_numpy(mask), range(kv_heads))
    assert max(gradients.errors((dq, dk, dv), wanted).values()) < 1e-12
    wrong = dk.clone()
    wrong[:, -1] *= 1.5
    found = gradients.errors((dq, wrong, dv), wanted)
    assert found["dk"] > 0.1 and found["dq"] < 1e-12
    wrong[0, 0, 3, 3] = math.nan
    assert math.isnan(gradients.errors((dq, wrong, dv), wanted)["dk"])


@pytest.mark.parametrize("n", [64, 300, 1024, 8192])
def test_tile_lists(n):
    case = cases.tile_lists(n)
    q = torch.arange(n)[:, None], torch.arange(n)[None, :]
    mask = case.mask_mod("cpu")(0, 0, *q).numpy()
    if n < 8192:
        assert (case.pattern.dense(n) == mask).all()
    else:
        tiles = mask[::128, ::128]
        assert (tiles.sum(0) == 4).all() and (tiles.sum(1) == 4).all() and case.name == targets.LISTS
        assert mask.mean() == 0.0625


@pytest.mark.parametrize("n", [300, 8192])
def test_random_tiles(n):
    case = cases.random_tiles(n)
    mask = case.mask_mod("cpu")(0, 0, torch.arange(n)[:, None], torch.arange(n)[None, :]).numpy()
    assert (case.pattern.dense(n) == mask).all()
    if n == 8192:
        rows = mask[::128, ::128].sum(1)
        assert 0.1 < mask.mean() < 0.15 and rows.std() > 1  # an eighth, spread as chance has it


@pytest.mark.parametrize("n", [300, 2048])
def test_half_in_one_row(n):
    q = torch.arange(n)[:, None], torch.arange(n)[None, :]
    blocks = []
    for case in cases.half_in_one_row(n):
        mask = case.mask_mod("cpu")(0, 0, *q).numpy()
        assert (case.pattern.dense(n) == mask).all()
        blocks.append(mask[::128, ::128].sum(1))
    rows = -(-n // 128)
    assert sorted(blocks[0]) == [1] * (rows - 1) + [rows] and (blocks[1] == 2).all()


# -- measuring ---------------------------------------------------------------------------------------------------------


def measured(job, **options):
    return backward.Backward(session(**options)).measure(job)


def test_contestants_are_checked_and_timed():
    def half(case, shape, device):
        inner = BUILDERS["cudnn"](case, shape, device)
        return Contestant(lambda q, k, v: 0.5 * inner.call(q, k, v), inner.context)

    builders = {**BUILDERS, "flash_attn": half, "flash": lambda *_: Contestant(boom), "flash_attn_3": absent}
    found = measured(Job("backward", CAUSAL, TINY, suites.BACKWARD_PEERS, repeats=3), builders=builders)
    assert "failed" not in found
    values = found["contestants"]
    assert list(values) == ["splatc", "flex", "cudnn", "flash", "flash_attn"]
    assert CPU_FLEX in values["flex"]["failed"] and values["flash"] == {"failed": "RuntimeError: no kernel"}
    assert "wrong result" in values["flash_attn"]["failed"] and "median_ms" not in values["flash_attn"]
    for name in ("splatc", "cudnn"):
        assert set(values[name]["errors"]) == {"dq", "dk", "dv"} and values[name]["error"] < 1e-5
        assert values[name]["median_ms"] > 0 and values[name]["both"]["median_ms"] > 0
    assert values["splatc"]["equal_runs"] == values["splatc"]["runs"] == 3
    rate = TINY.backward_flops(found["nnz"]) / values["splatc"]["median_ms"] / 1e9
    assert values["splatc"]["useful_tflops"] == pytest.approx(rate)
    assert TINY.backward_flops(100) == 10 * 100 * 16 * 2 and found["dense"]["contestant"] == "cudnn"
    json.dumps(found, allow_nan=False)
    assert "backward causal S=192" in tables.summary(found)


def test_ours_may_fail():
    found = measured(Job("backward", CAUSAL, TINY, ("cudnn",)), builders={**BUILDERS, "splatc": boom})
    assert found["contestants"]["splatc"] == {"failed": "RuntimeError: no kernel"}
    assert found["contestants"]["cudnn"]["median_ms"] > 0
    everything = Results([machine.describe(["x"], "cpu")], [found | {"run": 0}])
    assert "no kernel" in tables.markdown(everything)
    assert any("no kernel" in line for line in targets.missed(targets.judge(everything)))


def test_the_share_of_other_kernels():
    assert passes.fixed_share(
        {"splatc_gradient_columns_kernel": 50.0, "splatc_gradient_rows_kernel": 30.0, "before": 20.0}
    ) == pytest.approx(0.2)
    assert passes.fixed_share({}) is None and passes.fixed_share(None) is None
    assert passes.kernels(boom, "cpu") is None


# -- the suite ---------------------------------------------------------------------------------------------------------


def test_the_suite_has_the_stated_sizes():
    jobs = suites.jobs("backward", suites.Choice())
    assert {(j.case.name, j.shape.seq_len, j.shape.head_dim) for j in jobs} == {
        *((name, 8192, dim) for name in (*cases.seventeen(64), targets.LISTS) for dim in (64, 128)),
        *((name, 16384, dim) for name in ("full", "causal") for dim in (64, 128)),
    }
    assert len(jobs) == 40 and backward.count(suites.Choice()) == 41
    assert all({"cudnn", "flash"} <= set(j.peers) for j in jobs)
    assert all("flex" in j.peers for j in jobs if j.shape.seq_len == 8192)


@pytest.fixture(scope="module")
def small() -> Results:
    found = run.run(["backward"], SMALL, session(), ["splatc", "bench"], budget=300, keep=lambda *_: None)
    assert not found.runs[0]["left_out"] and len(found.records) == run.count(["backward"], SMALL)
    return found


def test_a_real_run(small):
    for one in small.records[:-1]:
        assert "failed" not in one and one["contestants"]["splatc"]["error"] < 1e-5, one
    times = small.records[-1]["contestants"]["splatc"]["times"]
    assert set(times) == {"forward", "forward and backward", "forward, no gradients", "forward, torch.compile"}
    assert all(v["p10_us"] <= v["median_us"] <= v["p90_us"] for v in times.values())
    assert "torch.compile" in tables.summary(small.records[-1])
    again = results.from_dict(json.loads(json.dumps(small.to_dict(), allow_nan=False)))
    assert again.records == json.loads(json.dumps(small.records))
    text = tables.markdown(small)
    assert "Backward, S=256, D=32" in text and "Host time of calls with gradients" in text
    for section in tables.sections(small):
        assert all(len(row.cells) == len(section.columns) for row in section.rows), section.title
    judged = {v.what for v in targets.judge(small) if v.met is not None}
    assert judged <= {"runs that are not bitwise equal", "measurements without failure"}


# -- targets and tables ------------------------------------------------------------------------------------------------


def learned() -> Results:
    """Results that meet every target, those of gradients included."""
    found = good()
    for job in suites.jobs("backward", suites.Choice()):
        one = record("backward", job.case.name, 1.0, 4.0, job.shape, dense={"contestant": "cudnn", "tflops": 500.0})
        for values in one["contestants"].values():
            values |= {"errors": dict.fromkeys(("dq", "dk", "dv"), 2e-3), "both": entry(1.5)}
            del values["lse_error"]
        one |= {"kernels_us": {"main(int)": 900.0, "before": 80.0}, "fixed_share": 0.08}
        found.records.append(one)
    times = {"forward": {"median_us": 30.0, "p10_us": 29.0, "p90_us": 33.0}, "forward, torch.compile": {"failed": "no"}}
    contestants = {"splatc": {"case": "causal", "times": times}, "flex": {"failed": "no"}}
    found.records.append({"suite": backward_tables.HOST, "case": "calls with gradients", "run": 0,
                          "contestants": contestants})  # fmt: skip
    return found


def test_all_targets_can_be_met():
    verdicts = targets.judge(learned())
    assert [v for v in verdicts if not v.met] == []
    assert sum(v.what.startswith("backward") for v in verdicts) == 10


@pytest.mark.parametrize(
    ("case", "who", "values", "missed"),
    [
        ("strided8", "splatc", {"error": 0.02}, "backward, relative error of dQ, dK and dV, bfloat16"),
        ("strided8", "splatc", {"error": math.nan}, "backward, relative error of dQ, dK and dV, bfloat16"),
        ("strided8", "splatc", {"equal_runs": 49}, "runs that are not bitwise equal"),
        ("strided8", "splatc", {"failed": "no"}, "measurements without failure"),
        ("strided8", "flex", {"median_ms": 1.29}, "backward, each pattern against FlexAttention, D=64"),
        ("full", "cudnn", {"median_ms": 1.07}, "backward, dense against cuDNN, S=8192, D=64"),
        ("full", "cudnn", {"median_ms": 1.02}, "backward, dense against cuDNN, S=16384, D=128"),
        (targets.LISTS, "", {"fixed_share": 0.16}, "backward, share of all kernels but walks over tiles"),
    ],
)
def test_each_target_can_be_missed(case, who, values, missed):
    lines = targets.missed(targets.judge(change(learned(), "backward", case, who, **values)))
    assert any(line.startswith(missed) for line in lines), lines


def test_the_mean_leaves_the_lists_out():
    found = change(learned(), "backward", targets.LISTS, "flex", median_ms=0.1)
    assert targets.missed(targets.judge(found)) == []
    for r in found.records:
        if r["suite"] == "backward" and r["head_dim"] == 128:
            r["contestants"]["flex"]["median_ms"] = 3.4
    lines = targets.missed(targets.judge(found))
    what = "backward, geometric mean against FlexAttention, D=128"
    assert lines == [f"{what}: 3.40x over 17 patterns, the target is >= 3.5x"]


def test_tables():
    found = change(learned(), "backward", "bigbird64", "flex", failed="OutOfMemoryError")
    found.records[-2]["kernels_failed"] = "RuntimeError: no CUPTI"
    text = tables.markdown(found)
    for heading in ("Backward, S=8192, D=64", "Backward, S=16384, D=128", "Kernels of a backward pass",
                    "Host time of calls with gradients"):  # fmt: skip
        assert f"### {heading}" in text
    assert "main 900.0; before 80.0" in text and "no CUPTI" in text and "OutOfMemoryError" in text
    for section in tables.sections(found):
        assert all(len(row.cells) == len(section.columns) for row in section.rows), section.title
    assert "splatc forward 30.0, splatc forward, torch.compile failed" in tables.summary(found.records[-1])


def test_the_matrix_is_the_mask():
    assert torch.equal(boolean_matrix(CAUSAL, 50, "cpu"), torch.ones(50, 50, dtype=torch.bool).tril())
    assert isinstance(TINY, Shape)
