"""The GPU benchmarks on a CPU: masks, contestants, checks, records, targets, tables. Figures are not judged here."""

from __future__ import annotations

import json
import math
import sys
import types
from dataclasses import replace

import numpy as np
import pytest

import splatc
from splatc import oracle
from splatc import patterns as P
from splatc.bench.gpu import (
    cases,
    check,
    checks,
    host,
    machine,
    peers,
    plot,
    results,
    run,
    suites,
    tables,
    targets,
    warm,
)
from splatc.bench.gpu.measure import DeviceLost, Job, Session, measure
from splatc.bench.gpu.peers import BUILDERS, Contestant, NotApplicable
from splatc.bench.gpu.results import Results
from splatc.bench.gpu.shapes import Shape

torch = pytest.importorskip("torch")

SMALL = suites.Choice("float32", (32,), quick=True, length=256, heads=2, repeats=2)
TINY = Shape(192, 16, 1, 2, 2, "float32")


def session(**options) -> Session:
    return Session("cpu", rounds=2, dense_size=(256, 2), **options)


# -- masks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 17, 512, 1024, 2304])
def test_each_pattern_is_its_mask_mod(n):
    from torch.nn.attention.flex_attention import create_mask

    for case in [*cases.seventeen(n).values(), cases.neighborhood_2d(n)]:
        wanted = create_mask(case.mask_mod("cpu"), 1, 1, n, n, device="cpu")[0, 0].numpy()
        assert np.array_equal(case.pattern.dense(n), wanted), case.name


def test_there_are_seventeen_and_they_are_those_of_the_baselines():
    found = cases.seventeen(8192)
    assert len(found) == 17
    stated = {"causal": 0.5001, "causal_win1024": 0.1172, "causal_win256": 0.0308, "win_pm256": 0.0616,
              "longformer": 0.0767, "dilated4_pm1024": 0.0587, "dilated2_pm512": 0.0607, "st_strided128": 0.0193,
              "strided64": 0.0156, "strided8": 0.125, "st_fixed128_16": 0.0694, "blocked256": 0.0312,
              "sink_win1024": 0.1176, "prefix_lm1024": 0.5079}  # fmt: skip
    for name, density in stated.items():
        assert splatc.analyze(found[name].pattern, 8192).density == pytest.approx(density, abs=6e-5), name
    assert set(targets.SHARES) <= set(found) and set(suites.QUICK_CASES) <= set(found)


def test_bands_say_what_the_pattern_says():
    q, k = np.arange(600)[:, None], np.arange(600)[None, :]
    banded = [case for case in cases.seventeen(600).values() if case.band is not None]
    assert len(banded) == 5
    for case in banded:
        left, right = case.band or (0, 0)
        mask = ((left < 0) | (k >= q - left)) & ((right < 0) | (k <= q + right))
        assert np.array_equal(case.pattern.dense(600), np.broadcast_to(mask, (600, 600))), case.name


def test_the_grid_of_the_baselines():
    assert "64 x 128" in cases.neighborhood_2d(8192).formula


def test_documents_add_up():
    for n in (1, 2, 11, 12, 13, 8192):
        lengths = cases.document_lengths(n)
        assert sum(lengths) == n and min(lengths) >= 1 and len(lengths) == min(12, n)


# -- contestants -------------------------------------------------------------------------------------------------------


def reference(case, shape, q, k, v):
    return oracle.attention(q.numpy(), k.numpy(), v.numpy(), case.pattern.dense(shape.seq_len))[0]


@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize("name", ["causal", "longformer"])
def test_contestants_compute_the_mask(name, kv_heads):
    case, shape = cases.seventeen(192)[name], replace(TINY, kv_heads=kv_heads)
    q, k, v = shape.inputs("cpu")
    took_part = []
    for who, build in BUILDERS.items():
        try:
            o = build(case, shape, "cpu").call(q, k, v)
        except NotApplicable:
            continue
        took_part.append(who)
        assert oracle.relative_error(o.numpy(), reference(case, shape, q, k, v)) < 1e-5, who
    assert set(took_part) >= ({"splatc", "flex", "masked"} | ({"cudnn", "flash"} if name == "causal" else set()))


def attend(q, k, v, mask):
    """(seq, heads, dim) each, as other libraries have them."""
    s = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("hqk,khd->qhd", s.masked_fill(~mask, -math.inf).softmax(-1), v)


def band(n, left, right):
    q, k = torch.arange(n)[:, None], torch.arange(n)[None, :]
    return ((k >= q - left) | (left < 0)) & ((k <= q + right) | (right < 0))


def flash_attn_func(q, k, v, causal=False, window_size=(-1, -1)):
    left, right = window_size
    return attend(q[0], k[0], v[0], band(q.shape[1], left, 0 if causal else right))[None]


def single_prefill_with_kv_cache(q, k, v, causal=False, window_left=-1):
    return attend(q, k, v, band(q.shape[0], window_left, 0 if causal else -1))


@pytest.mark.parametrize("name", ["full", "causal", "causal_win256", "win_pm256", "strided8"])
def test_packages_are_asked_for_the_mask(name, monkeypatch):
    """Layouts and options, with stand-ins that follow the packages' documented meaning."""
    flash, fi = types.ModuleType("flash_attn"), types.ModuleType("flashinfer")
    flash.flash_attn_func, fi.single_prefill_with_kv_cache = flash_attn_func, single_prefill_with_kv_cache
    monkeypatch.setitem(sys.modules, "flash_attn", flash)
    monkeypatch.setitem(sys.modules, "flashinfer", fi)
    shape = replace(TINY, seq_len=600)
    case = cases.seventeen(600)[name]
    q, k, v = shape.inputs("cpu")
    bands = {"full": 2, "causal": 2, "causal_win256": 2, "win_pm256": 1, "strided8": 0}
    ran = 0
    for build in (peers.build_flash_attn, peers.build_flashinfer):
        try:
            o = build(case, shape, "cpu").call(q, k, v)
        except NotApplicable:
            continue
        ran += 1
        assert oracle.relative_error(o.numpy(), reference(case, shape, q, k, v)) < 1e-5
    assert ran == bands[name]


def test_natten_gets_the_grid(monkeypatch):
    def na2d(q, k, v, kernel_size):
        assert q.shape == (1, 12, 16, 2, 16) and kernel_size == (13, 13)
        return q

    module = types.ModuleType("natten")
    module.na2d = na2d
    monkeypatch.setitem(sys.modules, "natten", module)
    contestant = peers.build_natten(cases.neighborhood_2d(192), TINY, "cpu")
    q, k, v = TINY.inputs("cpu")
    assert not contestant.exact and torch.equal(contestant.call(q, k, v), q)
    with pytest.raises(NotApplicable):
        peers.build_natten(cases.seventeen(192)["causal"], TINY, "cpu")


def test_what_is_not_installed_takes_no_part():
    with pytest.raises(NotApplicable):
        peers._installed("no_such_package")


def test_shapes():
    shape = Shape(8192, 128)
    assert shape.least_bytes == 4 * 8192 * 16 * 128 * 2 and shape.sets == 6
    assert Shape(32768, 128, 1, 64, 8).input_bytes == shape.q_bytes * 16 * 5 // 4
    assert Shape(1 << 20, 128).sets == 2
    assert shape.flops(100) == 4 * 100 * 128 * 16 and Shape.of(shape.to_dict() | {"more": 1}) == shape


# -- checks ------------------------------------------------------------------------------------------------------------


def attention_of(pattern, n, heads=3, dim=16, dtype=torch.float64):
    q, k, v = (torch.randn(1, heads, n, dim, dtype=dtype) for _ in range(3))
    o, lse = oracle.attention(q.numpy(), k.numpy(), v.numpy(), pattern.dense(n))
    return q, k, v, torch.from_numpy(o), torch.from_numpy(lse)


@pytest.mark.parametrize("n", [1, 40, 300])
def test_errors_see_one_wrong_head_a_wrong_lse_and_nan(n):
    pattern = P.causal() & P.window(9, 0)
    q, k, v, o, lse = attention_of(pattern, n)
    sample = check.sample_rows(pattern, n, 3)
    right = check.errors(o, lse, q, k, v, sample)
    assert right.o < 1e-12 and right.lse < 1e-12
    wrong = o.clone()
    wrong[0, 1] += 1
    assert check.errors(wrong, lse, q, k, v, sample).o > 0.1
    shifted = lse.clone()
    shifted[0, 2] += 0.25
    assert check.errors(o, shifted, q, k, v, sample).lse == pytest.approx(0.25)
    wrong[0, 1], shifted[0, 0] = math.nan, math.nan
    broken = check.errors(wrong, shifted, q, k, v, sample)
    assert math.isnan(broken.o) and math.isnan(broken.lse)


def test_empty_rows_are_zero_and_minus_infinity():
    pattern = P.window(-8, 16)  # beyond the end the last rows have no keys
    q, k, v, o, lse = attention_of(pattern, 64)
    assert torch.isinf(lse).any()
    sample = check.sample_rows(pattern, 64, 3)
    found = check.errors(o, lse, q, k, v, sample)
    assert found.o < 1e-12 and found.lse < 1e-12
    assert check.errors(o, lse.masked_fill(lse.isinf(), 0.0), q, k, v, sample).lse == math.inf


def test_sampled_rows():
    sample = check.sample_rows(P.causal(), 8192, 16)
    assert sample.rows.shape == (16, 64) and sample.mask.shape == (16, 64, 8192)
    assert all({0, 1, 8190, 8191} <= set(rows) for rows in sample.rows.tolist())
    assert len(np.unique(sample.rows)) == 4 + 16 * 60  # other rows for every head
    assert (sample.mask.sum(2) == sample.rows + 1).all()
    assert check.sample_rows(P.causal(), 1 << 20, 2).rows.shape == (2, 6)
    assert check.sample_rows(P.causal(), 17, 2).rows.tolist() == [list(range(17))] * 2


def test_equal_runs_count_bits():
    counted = iter(range(10))

    def call():
        lse = torch.zeros(3)
        if next(counted) == 2:
            lse[1] = -0.0  # equal as a number
        return torch.full((2, 2), math.nan, dtype=torch.bfloat16), lse

    assert check.equal_runs(call, 5) == 4


# -- one case ----------------------------------------------------------------------------------------------------------


def fake(function, **options):
    return lambda case, shape, device: Contestant(function, **options)


def boom(*_):
    raise RuntimeError("no kernel\nfor you")


def absent(*_):
    raise NotApplicable


def test_contestants_that_fail_are_said_to_and_the_others_are_timed():
    builders = {**BUILDERS, "flex": boom, "flash": fake(boom), "masked": fake(lambda q, k, v: q * 0 + 7),
                "natten": fake(lambda q, k, v: q, exact=False), "flashinfer": absent}  # fmt: skip
    peer_names = ("flex", "cudnn", "flash", "masked", "natten", "flashinfer")
    job = Job("patterns", cases.seventeen(192)["causal"], TINY, peer_names, repeats=3)
    record = measure(job, session(builders=builders))
    values = record["contestants"]
    assert list(values) == ["splatc", "flex", "cudnn", "flash", "masked", "natten"]
    assert values["flex"] == values["flash"] == {"failed": "RuntimeError: no kernel"}
    assert "wrong result" in values["masked"]["failed"] and "median_ms" not in values["masked"]
    assert values["splatc"]["error"] < 1e-5 and values["splatc"]["lse_error"] < 1e-5
    assert values["splatc"]["equal_runs"] == values["splatc"]["runs"] == 3
    assert {"median_ms", "min_ms", "max_ms", "useful_tflops"} <= set(values["natten"])
    assert record["nnz"] == 192 * 193 // 2 and record["dense"]["contestant"] == "cudnn" and "failed" not in record
    json.dumps(record, allow_nan=False)
    assert "splatc" in tables.summary(record)


def test_ours_may_fail_too():
    job = Job("patterns", cases.seventeen(192)["causal"], TINY, ("cudnn",))
    record = measure(job, session(builders={**BUILDERS, "splatc": boom}))
    assert record["contestants"]["splatc"] == {"failed": "RuntimeError: no kernel"}
    assert record["contestants"]["cudnn"]["median_ms"] > 0
    everything = Results([machine.describe(["x"], "cpu")], [record | {"run": 0}])
    assert "no kernel" in tables.markdown(everything)


def test_a_failure_outside_the_contestants_is_the_record_s(monkeypatch):
    monkeypatch.setattr(check, "sample_rows", boom)
    assert measure(Job("patterns", cases.seventeen(192)["causal"], TINY), session())["failed"].startswith("Runtime")


def test_a_lost_device_ends_the_run(monkeypatch):
    def lost(self):
        raise DeviceLost("illegal address")

    monkeypatch.setattr(Session, "check_alive", lost)
    mine = session(builders={**BUILDERS, "cudnn": boom, "flash": boom})
    found = run.run(["dense", "host"], SMALL, mine, ["x"], budget=60, keep=lambda *_: None)
    assert "illegal address" in found.runs[0]["ended"] and not found.records
    assert found.runs[0]["left_out"] == ["dense: 4 of 4", "host: 5 of 5"]


def test_a_spent_budget_leaves_the_rest_out():
    found = run.run(["dense"], SMALL, session(), ["x"], budget=0.0, keep=lambda *_: None)
    assert not found.records and found.runs[0]["left_out"] == ["dense: 4 of 4"]
    assert "out of time" in tables.headline(found)[0]


# -- suites ------------------------------------------------------------------------------------------------------------


def test_suites_have_the_stated_sizes():
    choice = suites.Choice()
    patterns = suites.jobs("patterns", choice)
    assert len(patterns) == 34 and {j.shape.head_dim for j in patterns} == {64, 128}
    assert all(j.shape.seq_len == 8192 and j.shape.heads == 16 for j in patterns)
    assert {(j.case.name, j.shape.seq_len) for j in suites.jobs("dense", choice)} == {
        (name, length) for name in ("full", "causal") for length in (8192, 16384)}  # fmt: skip
    assert {j.shape.seq_len for j in suites.jobs("growth", choice)} == {1 << n for n in range(12, 19)} | {1 << 20}
    assert {(j.case.name, j.shape.seq_len) for j in suites.jobs("short", choice)} == {
        (name, length) for name in ("full", "causal", "causal_win256") for length in (256, 1024, 2048)}  # fmt: skip
    assert (64, 8) in {(j.shape.heads, j.shape.kv_heads) for j in suites.jobs("shapes", choice)}
    assert sum(run._count(name, choice) for name in suites.SUITES) == run.count(suites.SUITES, choice)
    assert len(suites.jobs("patterns", suites.Choice.small(head_dims=(64,)))) == len(suites.QUICK_CASES)


@pytest.fixture(scope="module")
def measured() -> Results:
    """Small runs of all suites that need no process of their own."""
    kept = []
    timed = ["dense", "patterns", "shapes", "short", "pruned", "growth"]
    found = run.run(timed, SMALL, session(), ["splatc", "bench"], budget=300,
                    keep=lambda r, record: kept.append(record))  # fmt: skip
    assert len(kept) == len(found.records) == run.count(timed, SMALL)
    assert not found.runs[0]["left_out"]
    return found


def test_records_are_right_and_json(measured):
    for record in measured.records:
        assert "failed" not in record, record
        for name, values in record["contestants"].items():
            assert "failed" not in values, (record["case"], name, values)
            assert not values["exact"] or values["error"] < 1e-5
            assert values["exact"] == (record["suite"] != "pruned" or name == "splatc")
        assert tables.summary(record).startswith(record["suite"])
    again = results.from_dict(json.loads(json.dumps(measured.to_dict(), allow_nan=False)))
    assert again.records == json.loads(json.dumps(measured.records))


def test_small_sizes_meet_no_stated_target(measured):
    judged = [v for v in targets.judge(measured) if v.met is not None]
    # Correctness of 16-bit types is not measured in float32; what remains is independent of size.
    assert {v.what for v in judged} <= {"runs that are not bitwise equal", "measurements without failure"}


def test_tables_of_a_real_run(measured):
    text = tables.markdown(measured, "img/bench.png")
    assert "img/bench.png" in text and "longformer" in text and "not measured" in text
    for section in tables.sections(measured):
        assert all(len(row.cells) == len(section.columns) for row in section.rows), section.title


def test_odd_lengths_are_checked():
    small = replace(SMALL, head_dims=(16,))
    found = Results([machine.describe(["x"], "cpu")])
    for record in checks.run(small, session()):
        found.add(record)
    assert len(found.records) == checks.count(small)
    for record in found.records:
        assert [(x["dtype"], x["head_dim"]) for x in record["results"]] == [("bfloat16", 16), ("float16", 16)]
        for x in record["results"]:
            assert not x["failed"] and x["differing_runs"] == 0 and 0 < x["error"] < targets.MAX_ERROR[x["dtype"]]
    met = {v.what: v.met for v in targets.judge(found)}
    assert met["relative error of O, bfloat16"] and met["error of LSE, float16"]
    assert "Correctness" in tables.markdown(found)


def test_a_failed_check_names_its_length():
    small = replace(SMALL, head_dims=(16,))
    record = next(checks.run(small, session(builders={"splatc": boom})))
    assert record["results"][0]["failed"] == ["S=17: RuntimeError: no kernel", "S=127: RuntimeError: no kernel"]
    verdicts = targets.judge(Results([machine.describe(["x"], "cpu")], [record | {"run": 0}]))
    assert any(v.what == "measurements without failure" and v.met is False for v in verdicts)


def test_host_measurements(monkeypatch):
    monkeypatch.setattr(host, "BATCH", 5)
    monkeypatch.setattr(host, "NEW_LENGTHS", 2)
    monkeypatch.setattr(host, "STARTUPS", ("warm",))
    found = Results([machine.describe(["x"], "cpu")])
    for record in host.run(SMALL, session()):
        assert "failed" not in record, record
        found.add(record)
        assert record["case"] in tables.summary(record)
    eager, length, warm = found.records
    assert set(eager["contestants"]) == {"splatc", "cudnn", "flash", "flex"}
    assert all(v["p10_us"] <= v["median_us"] <= v["p90_us"] for v in eager["contestants"].values())
    assert length["plan_ms"] > 0 and length["lengths"] == 2
    assert warm["seconds"] > 0 and len(warm["all_seconds"]) == 1
    judged = {v.what: v.measured for v in targets.judge(found) if v.met is not None}
    assert {"warm process", "new length, after the plan", "eager call, host time"} <= set(judged)
    assert "A new process" in tables.markdown(found)


def test_the_plot_of_a_run_without_ceilings(measured, tmp_path):
    pytest.importorskip("matplotlib")
    plot.save(measured, tmp_path / "bench.svg")
    assert "longformer" in (tmp_path / "bench.svg").read_text()


# -- compiled beforehand -----------------------------------------------------------------------------------------------


def test_kernels_are_compiled_beforehand_by_other_processes(monkeypatch, tmp_path):
    monkeypatch.setenv("SPLATC_CACHE_DIR", str(tmp_path))
    names, counted = ("dense", "growth", "host"), []
    warm.fill(names, SMALL, "cpu", 2, lambda: counted.append(1))
    assert len(counted) == warm.count(names, SMALL) == len(suites.jobs("dense", SMALL)) > 0
    assert list(tmp_path.glob("v1/*/attention_*float32*/report.json"))
