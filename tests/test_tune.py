"""``splatc tune``: tiles tried, the fit of the cost model, the command."""

from __future__ import annotations

import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

import splatc
from splatc import patterns as P
from splatc.bench.gpu import calibrate as calibration
from splatc.bench.gpu import check
from splatc.bench.gpu import tune as tuning
from splatc.bench.gpu.calibrate import Fit, Kernel, Observed, fit, least_squares
from splatc.bench.gpu.clock import Timed
from splatc.bench.gpu.tune import Sizes, Tried
from splatc.cli import tune as command
from splatc.cli.main import run
from splatc.codegen import costs
from splatc.codegen.kernel import HOPPER_TILES, kernel_spec
from splatc.compile import best_plan
from splatc.errors import CompileError, InvalidInput, Unsupported
from splatc.runtime.work import finish, work_of
from tests.tuning import HOPPER, MASK, SPEC, found

pytestmark = pytest.mark.usefixtures("tuned_file")

# -- tiles tried -------------------------------------------------------------------------------------------------------


def sizes(**other):
    return Sizes(**({"q_len": 200, "kv_len": 200, "head_dim": 32, "v_head_dim": 32, "heads": 2, "kv_heads": 2,
                     "dtype": "float32"} | other))  # fmt: skip


@pytest.mark.parametrize("pattern, other", [
    (MASK, {}), (MASK, {"kv_len": 300, "v_head_dim": 16, "heads": 4, "batch": 2}),
    (P.per_head([P.causal(), P.full()]), {"kv_heads": 1}),
])  # fmt: skip
def test_a_tile_is_checked_timed_and_told(pattern, other):
    pytest.importorskip("torch")
    s = sizes(**other)
    steps: list[str] = []
    (one,) = tuning.tune(pattern, s, ((64, 64),), 3, steps.append, device="cpu")
    assert one.problem is None and one.error < 1e-5 and len(steps) == tuning.steps(((64, 64),), 3) == 5
    assert steps[0] == "compile 64 x 64"
    fastest, slowest = one.spread_us or (0, 0)
    assert fastest <= one.measured_us <= slowest and one.predicted_us > 0
    nnz = sum(int(p.dense(s.q_len, s.kv_len).sum()) for p in P.heads_of(pattern, s.heads)) * s.batch
    assert one.useful_tflops == pytest.approx(2 * nnz * (s.head_dim + s.v_head_dim) / one.measured_us / 1e6)
    assert json.loads(json.dumps(one.to_dict()))["tile"] == [64, 64]


def test_what_cannot_be_built_or_is_wrong_comes_last(monkeypatch):
    pytest.importorskip("torch")
    compile_ = splatc.compile
    good = compile_(MASK, seq_len=200, head_dim=32, dtype="float32", target="cpu")

    class Wrong:
        kernel, plan = good.kernel, good.plan

        def __call__(self, *given, return_lse=False, enable_gqa=False):
            o, lse = good(*given, return_lse=True)
            return (o * float("nan"), lse) if return_lse else o

    def fake(*mask, tile, **options):
        if tile == (64, 128):
            raise Unsupported("fits no registers")
        if tile == (128, 64):
            raise CompileError("spills")
        return Wrong() if tile == (192, 64) else compile_(*mask, tile=(64, 64), **options)

    monkeypatch.setattr(splatc, "compile", fake)
    tried = tuning.tune(MASK, sizes(), ((64, 128), (128, 64), (192, 64), (64, 64)), 3, lambda step: None, device="cpu")
    assert [one.tile for one in tried] == [(64, 64), (64, 128), (128, 64), (192, 64)]
    assert tried[0].problem is None and tried[1].problem == "unsupported: fits no registers"
    assert tried[2].problem == "failed: spills" and tried[3].problem.startswith("wrong result: relative error nan")


def test_sampled_rows_are_those_of_each_head():
    pattern = P.per_head([P.causal(), P.window(3, 3)])
    sample = check.sample_rows(pattern, 1000, sizes().heads, 700)
    assert sample.rows.shape == (2, 64) and sample.mask.shape == (2, 64, 700)
    for rows, mask, one in zip(sample.rows, sample.mask, pattern.heads):
        assert (mask == one.dense(1000, 700)[rows]).all()


# -- calibration -------------------------------------------------------------------------------------------------------

WORKERS = 132
TRUE = Fit(4.2, {
    Kernel("bfloat16", 64, 192, 128): (1.6, 0.05, 1.5), Kernel("bfloat16", 64, 128, 128): (1.2, 0.04, 1.4),
    Kernel("bfloat16", 64, 128, 64): (0.7, 0.04, 1.3), Kernel("bfloat16", 128, 128, 128): (1.65, 0.06, 1.8),
    Kernel("bfloat16", 128, 128, 64): (1.0, 0.05, 1.9), Kernel("bfloat16", 256, 128, 64): (1.7, 0.03, 2.6),
    Kernel("bfloat16", 64, 64, 64): (0.4, 0.02, 0.5), Kernel("bfloat16", 128, 64, 64): (0.6, 0.03, 0.8),
    Kernel("float32", 64, 128, 128): (1.7, 0.1, 2.4), Kernel("float32", 128, 128, 64): (1.9, 0.07, 4.1),
    Kernel("float32", 256, 128, 32): (2.8, 0.05, 7.5),
})  # fmt: skip
COMBINE = 3.7
ABOUT = {"gpu": {"name": "NVIDIA H200"}, "date": "2026-11-20T12:00:00+00:00",
         "versions": {"splatc": "0.1.0", "torch": "2.9", "cuda": "13.0", "driver": "580", "numpy": "2"}}  # fmt: skip


@pytest.fixture(scope="module")
def plans():
    """(case, plan) of all that is measured."""
    out = []
    for spec in calibration.kernels():
        for case in calibration.cases(spec, WORKERS):
            out.append((case, best_plan(case.pattern, case.sizes.q_len, case.sizes.kv_len, spec, (case.kernel.tile,))))
    return out


def true_time(case, plan):
    """Microseconds on a device with the true constants."""
    if case.role == "fit":
        return TRUE.predict(calibration.observe(case, plan, 0.0, WORKERS))
    true = TRUE.costs(case.kernel, COMBINE, WORKERS)
    if case.role == "check":
        return case.sizes.predict(plan, true) * 1e6
    (launch,) = plan.launches(1, case.sizes.heads)
    shipped = costs.costs_of(plan.spec, WORKERS)
    work = work_of(launch, 1, shipped)
    assert len(work.combine) == 1
    parts = COMBINE + shipped.part * work.part_tiles
    return true.launch + parts + finish(true.item + true.tile * work.rows[:, 10], true.workers).max()


def test_the_fitted_masks_keep_every_multiprocessor_equally_busy(plans):
    seen = set()
    for case, plan in plans:
        (tables,) = plan.tables[0]
        tiles, rows = tables.items[:, 6], case.sizes.heads * len(tables.items)
        seen.add((case.kernel, case.role))
        if case.role == "fit":
            assert (tiles == tiles[0]).all() and (rows == 1 or rows % costs.costs_of(plan.spec, WORKERS).workers == 0)
            bits = tables.items[:, 7]
            assert (bits == bits[0]).all()
            if case.name.startswith("ring"):
                assert 0 < bits[0] < tiles[0]
            else:
                assert bits[0] == (tiles[0] if "bits" in case.name else 0)
            (launch,) = plan.launches(1, case.sizes.heads)
            assert not len(work_of(launch, 1, costs.costs_of(plan.spec, WORKERS)).combine)  # the call cuts no row
    assert len(seen) == 3 * len(TRUE.kernels)


def test_a_ring_is_a_window_whose_ends_meet():
    at = np.arange(60)
    np.testing.assert_array_equal(calibration.ring(60, 20).dense(60, 60), (at - at[:, None] + 10) % 60 < 20)


@pytest.mark.parametrize("workers", [1, 78, 114, 132, 148])
def test_whole_waves(workers):
    heads = calibration.whole_waves(workers)
    assert all(calibration.LENGTH // m * heads % workers == 0 for m in (64, 128, 192))
    assert heads <= workers


@pytest.mark.parametrize("noise", [0.0, 0.003])
def test_the_constants_are_recovered(plans, noise):
    rng = np.random.default_rng(3)
    timed = [(case, plan, true_time(case, plan) * (1 + noise * rng.standard_normal())) for case, plan in plans]
    result = calibration.conclude(timed, WORKERS, 4100.4, ABOUT)
    near = (lambda x: pytest.approx(x, rel=2e-3, abs=2e-3)) if not noise else (lambda x: pytest.approx(x, rel=0.25))
    tight = near if not noise else (lambda x: pytest.approx(x, rel=0.015))
    assert result.costs["launch_us"] == near(TRUE.launch)
    assert result.costs["combine_us"] == (pytest.approx(COMBINE, abs=0.02 if not noise else 1.0))
    got = {Kernel(*(k[x] for x in ("dtype", "head_dim", "tile_m", "tile_n"))): k for k in result.costs["kernels"]}
    assert got.keys() == TRUE.kernels.keys()
    for kernel, (tile, bits, item) in TRUE.kernels.items():
        assert got[kernel]["tile_us"] == tight(tile) and got[kernel]["item_us"] == near(item)
        assert got[kernel]["bits_us"] == pytest.approx(bits, abs=0.001 if not noise else 0.02)
    assert len(result.residuals) == len(plans) and sum(r.fitted for r in result.residuals) < len(plans)
    assert max(abs(r.gap) for r in result.residuals if r.name != "a long row") < (1e-3 if not noise else 0.03)


def test_the_file_is_one_that_the_cost_model_reads(plans, tmp_path, monkeypatch):
    shipped = json.loads(costs.FILE.read_text())
    written = calibration.conclude([(c, p, true_time(c, p)) for c, p in plans], WORKERS, 4100.4, ABOUT).costs
    assert written.keys() >= shipped.keys() - {"note"} and written["kernels"][0].keys() == shipped["kernels"][0].keys()
    assert written["date"] == "2026-11-20" and "numpy" not in written["versions"]
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(written))
    monkeypatch.setenv("SPLATC_COSTS", str(path))
    got, half, single = (costs.costs_of(kernel_spec(128, None, dtype, HOPPER))
                         for dtype in ("bfloat16", "float16", "float32"))  # fmt: skip
    assert (got.tile, got.launch, got.combine) == pytest.approx((1.65, TRUE.launch, COMBINE), rel=0.01)
    assert half == got and (single.tile, single.item) == pytest.approx((1.9, 4.1), rel=0.01)
    assert got.bandwidth == 4100e3 and got.workers == WORKERS and "H200" in got.source
    assert splatc.compile("causal", seq_len=256, head_dim=128, dtype="bfloat16", target="sm_90a").explain().costs \
        == got.source != f"{shipped['device']}, {shipped['date']}"  # fmt: skip


@pytest.mark.parametrize(("text", "wanted"), [("{", "cannot be read as JSON"), ("[1]", "has no device, date, multi"),
                                              ("7", "cannot be read"), (None, "has no kernels")])  # fmt: skip
def test_a_file_of_other_things_is_refused(text, wanted, tmp_path, monkeypatch):
    path = tmp_path / "costs.json"
    path.write_text(text or json.dumps(json.loads(costs.FILE.read_text()) | {"kernels": []}))
    monkeypatch.setenv("SPLATC_COSTS", str(path))
    with pytest.raises(InvalidInput, match=f"SPLATC_COSTS: .*{wanted}"):
        costs.costs_of(kernel_spec(128, None, "bfloat16", HOPPER))


def test_no_constant_is_negative():
    kernel = Kernel("bfloat16", 64, 128, 128)
    seen = [Observed("", kernel, 1, 132, 132 * n, 132 * n * bits, 132, 5 + 1.5 + n * 1.2 - 0.01 * bits * n)
            for n in (3, 6, 12) for bits in (0, 1)]  # fmt: skip
    seen.append(Observed("", kernel, 1, 1320, 13200, 0, 132, 5 + 10 * (1.5 + 10 * 1.2)))
    assert all(x >= 0 for x in (fit(seen).launch, *fit(seen).kernels[kernel]))
    assert fit(seen).kernels[kernel][1] == 0 and fit(seen).kernels[kernel][0] == pytest.approx(1.2, rel=0.02)


def test_least_squares():
    design = np.array([[1.0, 0, 0], [1, 1, 0], [1, 2, 0]])
    assert least_squares(design, np.array([1.0, 2, 3])).tolist() == pytest.approx([1, 1, 0])
    assert least_squares(design, np.array([3.0, 2, 1])).tolist() == pytest.approx([2, 0, 0])
    with pytest.raises(ValueError, match="do not determine"):
        least_squares(np.ones((3, 2)), np.ones(3))


@pytest.fixture
def pretended(monkeypatch, plans):
    """A GPU whose kernels take what the true constants say. The fixture is the options of each compilation."""
    pytest.importorskip("torch")
    compiled = []

    def one(plan):
        return plan

    def fake(pattern, **options):
        compiled.append(options)
        which = Kernel(options["dtype"], options["head_dim"], *options["tile"])
        for case, plan in plans:
            lengths = case.sizes.q_len, case.sizes.kv_len
            if (case.kernel, case.pattern, lengths) == (which, pattern, (options["seq_len"], options["kv_len"])):
                return SimpleNamespace(plan=partial(one, plan), seconds=true_time(case, plan) * 1e-6)
        raise AssertionError(options)

    class Clock:
        def prepare(self, contestant, inputs):
            return Timed(lambda: contestant.compiled.seconds, "as pretended")

    monkeypatch.setattr(splatc, "compile", fake)
    monkeypatch.setattr(calibration, "GraphClock", Clock)
    monkeypatch.setattr(calibration, "multiprocessors", lambda device: WORKERS)
    monkeypatch.setattr(calibration, "ceilings", lambda device: {"copy_tb_s": 4.1004})
    monkeypatch.setattr(calibration, "describe", lambda command, device: ABOUT)
    monkeypatch.setattr(Sizes, "input_sets", lambda self, device: [])
    monkeypatch.setattr(tuning, "multiprocessors", lambda device: WORKERS)
    return compiled


def test_calibrate_times_every_kernel_with_its_own_tile(pretended):
    steps: list[str] = []
    result = calibration.calibrate(["splatc", "tune"], 3, steps.append)
    assert {Kernel(o["dtype"], o["head_dim"], *o["tile"]) for o in pretended} == TRUE.kernels.keys()
    assert {o["target"] for o in pretended} == {"cuda"}
    assert len(steps) == calibration.steps(WORKERS, 3)
    assert result.costs["launch_us"] == pytest.approx(TRUE.launch, abs=0.01)
    assert result.costs["bandwidth_gb_s"] == 4100 and result.costs["multiprocessors"] == WORKERS


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    """A GPU on which tiles take so many microseconds: {tile: us}, None for what cannot be built."""
    torch = pytest.importorskip("torch")
    times = dict.fromkeys(HOPPER_TILES) | {(64, 64): 30.0, (64, 128): 20.0, (128, 128): 12.0, (192, 64): 13.0}

    def fake(pattern, sizes, tiles, rounds, tell):
        for _ in range(tuning.steps(tiles, rounds)):
            tell("x")
        out = [Tried(t, "unsupported: too large") if times[t] is None
               else Tried(t, None, 1.5, 11.0, 1e-3, times[t], (times[t], times[t]), 400.0) for t in tiles]  # fmt: skip
        return sorted(out, key=lambda one: (one.measured_us is None, one.measured_us))

    monkeypatch.delenv("COLUMNS", raising=False)  # tables of full width, also where pytest-xdist sets it
    monkeypatch.setattr(command, "gpu_arch", lambda: "sm_90a")
    monkeypatch.setattr(command, "find_compiler", lambda: "a compiler")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(tuning, "tune", fake)
    return times


def test_the_fastest_is_printed_and_remembered(gpu, capsys, tuned_file):
    assert run(["tune", str(MASK), "-s", "512"]) == 0
    out = capsys.readouterr().out
    assert "128 x 128" in out and "fastest" in out and "unsupported: too large" in out and "NVIDIA H200" in out
    assert f"remembered in {tuned_file}" in out
    assert found() == ((128, 128),)
    assert best_plan(MASK, 512, 512, SPEC).spec.tile_m == 128


def test_no_remember(gpu, capsys, tuned_file, monkeypatch):
    monkeypatch.setenv("SPLATC_DISABLE_CACHE", "1")
    assert run(["tune", str(MASK), "-s", "512"]) == 2
    assert "--no-remember" in capsys.readouterr().err
    assert run(["tune", str(MASK), "-s", "512", "--no-remember"]) == 0
    assert "not remembered" in capsys.readouterr().out and not tuned_file.exists()


def test_json(gpu, capsys, tuned_file):
    assert run(["tune", str(MASK), "-s", "512", "--kv-len", "1024", "-d", "128", "--kv-heads", "4", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["best"] == [128, 128] and values["remembered"] == str(tuned_file) and values["pattern"] == str(MASK)
    assert values["kv_len"] == 1024 and values["kv_heads"] == 4 and values["v_head_dim"] == 128
    assert [one["measured_us"] for one in values["tiles"]] [:5] == [12.0, 13.0, 20.0, 30.0, None]
    assert found(kv_len=1024, spec=kernel_spec(128, None, "bfloat16", HOPPER)) == ((128, 128),)


def test_the_verdict_says_what_the_cost_model_would_lose(gpu, capsys, monkeypatch):
    for choice, words in (((192, 64), "takes 8.3% longer"), ((192, 128), "was not timed"), ((128, 128), "model says")):
        monkeypatch.setattr(command.Request, "model_tile", lambda self, choice=choice: choice)
        assert run(["tune", "causal", "-s", "512", "--no-remember"]) == 0
        assert words in capsys.readouterr().out


def test_no_tile_that_works_is_an_error(gpu, capsys, tuned_file):
    gpu.update(dict.fromkeys(gpu))
    assert run(["tune", "causal", "-s", "512"]) == 1
    assert "too large" in capsys.readouterr().err and not tuned_file.exists()


def test_too_little_memory_is_one_line(gpu, capsys, monkeypatch):
    import torch

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")

    monkeypatch.setattr(tuning, "tune", fail)
    assert run(["tune", "causal", "-s", "512"]) == 2
    assert "memory is too small" in capsys.readouterr().err


def test_calibrate_writes_the_costs(gpu, pretended, capsys, tmp_path, monkeypatch):
    path = tmp_path / "costs.json"
    assert run(["tune", "--calibrate", "--rounds", "3", "-o", str(path)]) == 0
    err = capsys.readouterr().err
    assert "blocks of 768, bits" in err and "bfloat16, D=64, 192 x 128" in err and f"wrote {path}" in err
    assert json.loads(path.read_text())["launch_us"] == pytest.approx(TRUE.launch, abs=0.01)
    assert run(["tune", "--calibrate", "--rounds", "3"]) == 0
    assert json.loads(capsys.readouterr().out)["device"] == "NVIDIA H200"


@pytest.mark.parametrize("arguments, words", [
    ([], "give a pattern"), (["causal"], "--seq-len"), (["causal", "--calibrate"], "no pattern"),
    (["--calibrate", "--json"], "no --json"), (["causal", "-s", "8", "-o", "x"], "for --calibrate"),
    (["causal", "-s", "8", "-d", "12"], "multiples of 8"),
    (["causal", "-s", "8", "--dtype", "int8"], "int8"), (["causal", "-s", "8", "--rounds", "0"], "--rounds is 0"),
    (["causal", "-s", "8", "--heads", "6", "--kv-heads", "4"], "--heads is 6"), (["causl", "-s", "8"], "causl"),
    (["per_head([causal, full])", "-s", "8", "--heads", "3"], "2 heads"),
])  # fmt: skip
def test_wrong_options(arguments, words, capsys):
    assert run(["tune", *arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("arch, words", [(None, "splatc doctor"), ("sm_80", "this one is sm_80")])
@pytest.mark.parametrize("arguments", [["causal", "-s", "8"], ["--calibrate"]])
def test_without_a_hopper_gpu(arch, words, arguments, capsys, monkeypatch):
    monkeypatch.setattr(command, "gpu_arch", lambda: arch)
    assert run(["tune", *arguments]) == 1
    assert words in capsys.readouterr().err


def test_without_a_compiler(gpu, capsys, monkeypatch):
    monkeypatch.setattr(command, "find_compiler", lambda: None)
    assert run(["tune", "causal", "-s", "8"]) == 1
    assert "NVRTC or nvcc" in capsys.readouterr().err


def test_help(capsys):
    assert run(["tune", "--help"]) == 0
    out = capsys.readouterr().out
    assert "Examples:" in out and "--calibrate" in out and "--no-remember" in out
