"""Results of GPU benchmarks that were never run: what tests of targets and tables start from."""

from __future__ import annotations

from splatc.bench.gpu import cases, suites, targets
from splatc.bench.gpu.results import Results
from splatc.bench.gpu.shapes import Shape


def entry(ms: float, flops: float = 0.0, **more) -> dict:
    return {"median_ms": ms, "min_ms": ms * 0.99, "max_ms": ms * 1.02, "rounds": 9, "useful_tflops": flops / ms / 1e9,
            "error": 2e-3, "lse_error": 1e-6, "exact": True, **more}  # fmt: skip


def record(suite: str, case: str, ours: float, flex: float, shape: Shape, density: float = 0.1, **more) -> dict:
    nnz = int(density * shape.seq_len**2)
    flops = shape.flops(nnz)
    return {
        "suite": suite, "case": case, "formula": "", **shape.to_dict(), "run": 0, "nnz": nnz, "density": density,
        "passes": 1, "waste": 1.2, "tiles": 500, "tile_m": 128, "tile_n": 128, "table_bytes": 1 << 20,
        "predicted_us": ours * 1e3, "least_bytes": shape.least_bytes,
        "memory": {"input_bytes": shape.input_bytes, "extra_bytes": 0},
        "dense": {"contestant": "cudnn", "tflops": 600.0},
        "contestants": {"splatc": entry(ours, flops, equal_runs=50, runs=50), "flex": entry(flex, flops),
                        "cudnn": entry(ours * 1.2, flops)},
        **more,
    }  # fmt: skip


def good() -> Results:
    """Results that meet every target."""
    about: dict = {"date": "2026-11-20T00:00:00+00:00", "command": "splatc bench", "versions": {"torch": "2"},
             "machine": {"cpu": "c"}, "gpu": {"name": "GPU"}, "left_out": [], "ended": None,
             "ceilings": {"copy_tb_s": 4.2, "matmul_tflops": 700.0}}  # fmt: skip
    found = Results([about])
    for dim in (64, 128):
        for name in cases.seventeen(64):
            shape = Shape(8192, dim)
            ours = 0.0351 * dim / 128 if name == "strided64" else shape.flops(int(0.1 * 8192**2)) / 550e9
            found.records.append(record("patterns", name, ours, ours * 5, shape))
        found.records.append(record("shapes", "nat2d_13", 0.1, 0.7, Shape(8192, dim)))
        found.records.append(record("shapes", "half_in_one_row", 0.12, 1.0, Shape(16384, dim)))
        found.records.append(record("shapes", "even_rows", 0.1, 1.0, Shape(16384, dim)))
        for name, length in (("full", 4096), ("full", 8192), ("full", 16384), ("blocked256", 8192)):
            found.records.append(record("pruned", f"nm24_{name}", 1.0, 1.0, Shape(length, dim)))
            found.records[-1]["contestants"]["unpruned"] = entry(1.1, exact=False)
        for length in (8192, 16384):
            found.records += [record("dense", name, 1.0, 1.0, Shape(length, dim)) for name in ("full", "causal")]
    long = Shape(32768, 128, 1, 64, 8)
    found.records.append(record("shapes", "causal_win1024", long.flops(int(0.03 * 2**30)) / 520e9, 9.0, long, 0.03))
    for length in (*suites.GROWTH, suites.MILLION):
        for name in ("win_pm256", "strided64"):
            found.records.append(
                record("growth", name, length * 1e-5, 1, Shape(length, 128), table_bytes=length * 4)
            )
    found.records.append({"suite": "checks", "case": "causal", "lengths": [17], "heads": 3, "runs": 50, "run": 0,
                          "results": [{"dtype": d, "head_dim": 64, "error": 1e-3, "lse_error": 1e-6,
                                       "differing_runs": 0, "failed": []} for d in targets.MAX_ERROR]})  # fmt: skip
    steps = {"import_s": 0.1, "compile_s": 1.0, "first_call_s": 0.1, "second_call_s": 0.0001}
    for name, seconds in (("cold, NVRTC", 2.0), ("cold, nvcc", 3.0), ("warm", 0.2)):
        found.records.append({"suite": "host", "case": name, "seconds": seconds, "all_seconds": [seconds], "run": 0,
                              "compiler": "nvrtc", "tvm_loaded": name != "warm", **steps})  # fmt: skip
    found.records.append({"suite": "host", "case": "new length", "mask": "win_pm256", "plan_ms": 3.0, "run": 0,
                          "plan_max_ms": 4.0, "first_call_ms": 0.9, "later_call_ms": 0.1, "added_ms": 0.8})  # fmt: skip
    eager = {"median_us": 12.0, "p10_us": 11.0, "p90_us": 14.0, "calls": 2000, "case": "causal"}
    found.records.append({"suite": "host", "case": "eager call", "run": 0, "contestants": {"splatc": eager}})
    return found


def change(found: Results, suite: str, case: str, who: str, **values) -> Results:
    for r in found.records:
        if r["suite"] == suite and r["case"] == case:
            (r["contestants"][who] if who else r).update(values)
    return found
