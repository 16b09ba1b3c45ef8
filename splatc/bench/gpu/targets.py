"""The stated targets, judged from the figures. Only sizes for which a target is stated count."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from splatc.bench.gpu.measure import Record
from splatc.bench.gpu.results import Results
from splatc.bench.gpu.suites import GROWTH, LENGTH, MILLION

MAX_ERROR = {"bfloat16": 1e-2, "float16": 5e-3}
MAX_LSE_ERROR = 1e-3
DENSE, CAUSAL = {64: 1.08, 128: 1.05}, 1.02  # times cuDNN
EACH, MEAN, GOAL = 1.3, 3.6, 4.5  # times FlexAttention: every pattern, the geometric mean, what we aim at
SHARES = {  # of cuDNN's dense rate, useful operations, D = 128
    "causal": 0.85, "prefix_lm1024": 0.85, "strided8": 0.85, "causal_win1024": 0.75, "win_pm256": 0.65,
    "dilated2_pm512": 0.65, "dilated4_pm1024": 0.65, "st_fixed128_16": 0.65, "blocked256": 0.65, "doc_causal": 0.65,
    "longformer": 0.55, "bigbird64": 0.40,
}  # fmt: skip
BYTES_BOUND = 1.25  # strided64: times the time of moving q, k, v and o once
NEIGHBORHOOD = 6.0  # times FlexAttention
UNEVEN = 1.3  # half of the tiles in one row block: times as many tiles evenly
LONG_TFLOPS, LONG_SHARE = 500.0, 0.85
CONSTANT = 1.15  # growth of a window: slowest over fastest time per query
SLACK = 64  # bytes a token that memory may differ from proportional
HOST = {"cold, NVRTC": ("seconds", 2.5, "s"), "warm": ("seconds", 0.3, "s"), "new length": ("added_ms", 1.0, "ms")}
HOST_TITLES = {
    "cold, NVRTC": "cold compile by NVRTC",
    "warm": "warm process",
    "new length": "new length, after the plan",
}
PRUNED = {  # full masks: head dim, peer, times that
    "cuDNN, D=128": (128, "cudnn", 1.12), "our own without, D=128": (128, "unpruned", 1.05),
    "cuDNN, D=64": (64, "cudnn", 1.05),
}  # fmt: skip
EAGER_US = 12.0
BACKWARD_DENSE = {64: 1.08, 128: 1.03}  # times cuDNN, backward
BACKWARD_MEAN = 3.5  # times FlexAttention, backward: the geometric mean; EACH holds for every pattern
FIXED_SHARE, LISTS = 0.15, "tiles128x4"  # of a backward's device time: all but walks over tiles, at 6% in lists


@dataclass(frozen=True)
class Verdict:
    """One target: what, the figure wanted, the figure measured, and whether it is met (None: not measured)."""

    what: str
    wanted: str
    measured: str = "not measured"
    met: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Bound:
    """A figure to compare with: relation is one of >=, <= and <; form shows figures."""

    relation: str
    value: float
    form: str = "{:.2f}"

    def met(self, figure: float) -> bool:
        """Whether a figure keeps to it (NaN never does)."""
        return {">=": figure >= self.value, "<=": figure <= self.value, "<": figure < self.value}[self.relation]

    def worst(self, found: Iterable[tuple[str, float]]) -> tuple[str, float]:
        """The figure furthest from it, with its name; NaN is worse than all."""
        sign = 1 if self.relation == ">=" else -1
        return min(found, key=lambda pair: -math.inf if math.isnan(pair[1]) else sign * pair[1])

    def show(self, figure: float) -> str:
        """A figure as people read it; in full where rounding would hide that it misses."""
        text = self.form.format(figure)
        return text if self.met(figure) or text != self.form.format(self.value) else f"{text} ({figure:.5g})"

    def __str__(self) -> str:
        return f"{self.relation} {self.form.format(self.value)}"


def judge(results: Results) -> list[Verdict]:
    """Every target against the results, measured or not."""
    rules = (_correct, _dense, _patterns, _shares, _shapes, _pruned, _backward, _growth, _host)
    return [verdict for rule in rules for verdict in rule(results)]


def missed(verdicts: Iterable[Verdict]) -> list[str]:
    """The targets that are measured and not met, a line each."""
    return [f"{v.what}: {v.measured}, the target is {v.wanted}" for v in verdicts if v.met is False]


# -- figures of a record -----------------------------------------------------------------------------------------------


def speedup(record: Record, peer: str) -> float | None:
    """How many times faster splatc is than a peer in the same record."""
    ours, theirs = (median_ms(record, name) for name in ("splatc", peer))
    return theirs / ours if ours and theirs else None


def median_ms(record: Record, name: str) -> float | None:
    """The median time of a contestant; None if it failed or did not take part."""
    values = record.get("contestants", {}).get(name, {})
    return None if "failed" in values else values.get("median_ms")


def share(record: Record) -> float | None:
    """Useful rate of splatc over the dense rate measured beside it."""
    useful, dense = useful_tflops(record), record.get("dense", {}).get("tflops")
    return useful / dense if useful and dense else None


def useful_tflops(record: Record, name: str = "splatc") -> float | None:
    """10**12 useful operations a second."""
    values = record.get("contestants", {}).get(name, {})
    return None if "failed" in values else values.get("useful_tflops")


def copy_tb_s(results: Results, record: Record) -> float | None:
    """The rate of a device copy in the run of a record, 10**12 bytes a second."""
    rate: float | None = results.run_of(record).get("ceilings", {}).get("copy_tb_s")
    return rate


def over_bytes(results: Results, record: Record) -> float | None:
    """Time of splatc over that of moving q, k, v and o once at the rate of a device copy of the run."""
    ours, rate = median_ms(record, "splatc"), copy_tb_s(results, record)
    return ours * 1e-3 * rate * 1e12 / float(record["least_bytes"]) if ours and rate else None


def stated(record: Record) -> bool:
    """Whether a record has the dtype, batch and heads that targets are stated for."""
    return record.get("dtype") == "bfloat16" and record.get("batch") == 1 and record.get("heads") == 16


# -- the targets, in order ---------------------------------------------------------------------------------------------


def _correct(results: Results) -> Iterator[Verdict]:
    found = [*_timed_errors(results), *_checked_errors(results)]
    for dtype, limit in MAX_ERROR.items():
        mine = [x for x in found if x[1] == dtype]
        yield _worst(f"relative error of O, {dtype}", [(x[0], x[2]) for x in mine], Bound("<", limit, "{:.1e}"))
        yield _worst(f"error of LSE, {dtype}", [(x[0], x[3]) for x in mine], Bound("<", MAX_LSE_ERROR, "{:.1e}"))
    differing = [(r["case"], v["runs"] - v["equal_runs"]) for r, v in _splatc(results) if "equal_runs" in v]
    differing += [(r["case"], x["differing_runs"]) for r in results.of("checks") for x in r["results"]]
    yield _worst("runs that are not bitwise equal", differing, Bound("<=", 0, "{:.0f}"))
    failed = [f"{r['case']} (D={r['head_dim']}): {v['failed']}" for r, v in _splatc(results) if "failed" in v]
    failed += [f"{r['suite']} {r['case']}: {r['failed']}" for r in results.records if "failed" in r]
    failed += [f"{r['case']} (D={x['head_dim']}, {x['dtype']}): {f}" for r in results.of("checks")
               for x in r["results"] for f in x["failed"]]  # fmt: skip
    if results.records:
        yield Verdict("measurements without failure", "all", f"{len(failed)} failed: {failed[0]}" if failed else "all",
                      not failed)  # fmt: skip


def _splatc(results: Results) -> Iterator[tuple[Record, Record]]:
    for record in results.of("dense", "patterns", "shapes", "short", "pruned", "growth", "backward"):
        yield record, record["contestants"].get("splatc", {})


def _timed_errors(results: Results) -> Iterator[tuple[str, str, float, float]]:
    for r, v in _splatc(results):
        if "lse_error" in v:
            yield f"{r['case']}, S={r['seq_len']}, D={r['head_dim']}", r["dtype"], v["error"], v["lse_error"]


def _checked_errors(results: Results) -> Iterator[tuple[str, str, float, float]]:
    for r in results.of("checks"):
        for x in r["results"]:
            yield f"{r['case']}, odd lengths, D={x['head_dim']}", x["dtype"], x["error"], x["lse_error"]


def _dense(results: Results) -> Iterator[Verdict]:
    for name, what in (("full", "dense"), ("causal", "causal")):
        for dim, at_least in DENSE.items():
            for length in (LENGTH, 2 * LENGTH):
                wanted = at_least if name == "full" else CAUSAL
                found = [(name, speedup(r, "cudnn")) for r in results.of("dense")
                         if stated(r) and (r["case"], r["head_dim"], r["seq_len"]) == (name, dim, length)]  # fmt: skip
                what_for = f"{what} against cuDNN, S={length}, D={dim}"
                yield _worst(what_for, found, Bound(">=", wanted, "{:.2f}x"), named=False)


def _patterns(results: Results) -> Iterator[Verdict]:
    for dim in DENSE:
        found = [(r["case"], speedup(r, "flex")) for r in _stated_patterns(results, dim)]
        yield _worst(f"each pattern against FlexAttention, D={dim}", found, Bound(">=", EACH, "{:.2f}x"))
        what = f"geometric mean against FlexAttention, D={dim}"
        yield _mean(what, found, f">= {MEAN}x (goal {GOAL}x)", MEAN)


def _stated_patterns(results: Results, head_dim: int) -> list[Record]:
    return [r for r in results.of("patterns")
            if stated(r) and r["head_dim"] == head_dim and r["seq_len"] == LENGTH]  # fmt: skip


def _shares(results: Results) -> Iterator[Verdict]:
    records = {r["case"]: r for r in _stated_patterns(results, 128)}
    for name, at_least in SHARES.items():
        found = [(name, share(records[name]))] if name in records else []
        what = f"{name}: useful rate over cuDNN's dense rate, D=128"
        yield _worst(what, found, Bound(">=", at_least, "{:.3f}"), named=False)
    times = [(name, over_bytes(results, r)) for name, r in records.items() if name == "strided64"]
    yield _worst("strided64: time over its bytes bound, D=128", times, Bound("<=", BYTES_BOUND, "{:.2f}x"), named=False)


def _shapes(results: Results) -> Iterator[Verdict]:
    found = [(f"D={r['head_dim']}", speedup(r, "flex")) for r in results.of("shapes")
             if r["case"] == "nat2d_13" and stated(r) and r["seq_len"] == LENGTH]  # fmt: skip
    what = "13 x 13 neighbourhood on 64 x 128 against FlexAttention"
    yield _worst(what, found, Bound(">=", NEIGHBORHOOD, "{:.2f}x"))
    times = {(r["case"], r["head_dim"]): median_ms(r, "splatc") for r in results.of("shapes")
             if stated(r) and r["seq_len"] == 2 * LENGTH}  # fmt: skip
    found = [(f"D={dim}", ours / even) for (case, dim), ours in times.items()
             if case == "half_in_one_row" and ours and (even := times.get(("even_rows", dim)))]  # fmt: skip
    yield _worst("half of the tiles in one row block, S=16384, against as many evenly", found,
                 Bound("<=", UNEVEN, "{:.2f}x"))  # fmt: skip
    what = "window 1024 causal, S=32768, 64:8 heads, D=128"
    wanted = f">= {LONG_TFLOPS:.0f} useful TFLOP/s or {LONG_SHARE} of the dense rate"
    for r in results.of("shapes"):
        if r["case"] == "causal_win1024" and (r["seq_len"], r["heads"], r["kv_heads"]) == (32768, 64, 8):
            rate, part = useful_tflops(r), share(r)
            if rate:
                met = rate >= LONG_TFLOPS or (part or 0) >= LONG_SHARE
                yield Verdict(what, wanted, f"{rate:.0f}, {part:.2f}" if part else f"{rate:.0f}", met)
                return
    yield Verdict(what, wanted)


def _pruned(results: Results) -> Iterator[Verdict]:
    records = [r for r in results.of("pruned") if stated(r)]
    for what, (dim, peer, at_least) in PRUNED.items():
        found = [(f"S={r['seq_len']}", speedup(r, peer)) for r in records
                 if (r["case"], r["head_dim"]) == ("nm24_full", dim)]  # fmt: skip
        yield _worst(f"2:4 attention against {what}", found, Bound(">=", at_least, "{:.2f}x"))
    found = [(f"{r['case']}, D={r['head_dim']}", speedup(r, "unpruned")) for r in records if r["case"] != "nm24_full"]
    yield _worst("2:4 of a static pattern against the pattern alone", found, Bound(">=", 1.0, "{:.2f}x"))


def _backward(results: Results) -> Iterator[Verdict]:
    records = [r for r in results.of("backward") if stated(r)]
    found = [(f"{r['case']}, S={r['seq_len']}, D={r['head_dim']}", r["contestants"].get("splatc", {}).get("error"))
             for r in results.of("backward") if r["dtype"] == "bfloat16"]  # fmt: skip
    bound = Bound("<", MAX_ERROR["bfloat16"], "{:.1e}")
    yield _worst("backward, relative error of dQ, dK and dV, bfloat16", found, bound)
    for dim, at_least in BACKWARD_DENSE.items():
        for length in (LENGTH, 2 * LENGTH):
            found = [("full", speedup(r, "cudnn")) for r in records
                     if (r["case"], r["head_dim"], r["seq_len"]) == ("full", dim, length)]  # fmt: skip
            what = f"backward, dense against cuDNN, S={length}, D={dim}"
            yield _worst(what, found, Bound(">=", at_least, "{:.2f}x"), named=False)
    for dim in BACKWARD_DENSE:
        found = [(r["case"], speedup(r, "flex")) for r in records
                 if (r["head_dim"], r["seq_len"]) == (dim, LENGTH) and r["case"] != LISTS]  # fmt: skip
        what = f"backward, each pattern against FlexAttention, D={dim}"
        yield _worst(what, found, Bound(">=", EACH, "{:.2f}x"))
        what = f"backward, geometric mean against FlexAttention, D={dim}"
        yield _mean(what, found, f">= {BACKWARD_MEAN}x", BACKWARD_MEAN)
    found = [(f"D={r['head_dim']}", r.get("fixed_share")) for r in records
             if (r["case"], r["seq_len"]) == (LISTS, LENGTH)]  # fmt: skip
    what = "backward, share of all kernels but walks over tiles, 6% in tile lists"
    yield _worst(what, found, Bound("<=", FIXED_SHARE, "{:.3f}"))


def _mean(what: str, found: Iterable[tuple[str, float | None]], wanted: str, at_least: float) -> Verdict:
    """The verdict on a geometric mean."""
    ratios = [x for _, x in found if x]
    if not ratios:
        return Verdict(what, wanted)
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    return Verdict(what, wanted, f"{mean:.2f}x over {len(ratios)} patterns", mean >= at_least)


def _growth(results: Results) -> Iterator[Verdict]:
    window = {r["seq_len"]: r for r in results.of("growth") if r["case"] == "win_pm256" and stated(r)}
    times = {n: ms / n for n, r in window.items() if n in GROWTH and (ms := median_ms(r, "splatc"))}
    what, wanted = "window, time per query from S=4K to 256K, slowest over fastest", f"<= {CONSTANT}"
    if len(times) == len(GROWTH):
        slowest = max(times, key=times.__getitem__)
        spread = times[slowest] / min(times.values())
        yield Verdict(what, wanted, f"{spread:.3f} (slowest at S={slowest})", spread <= CONSTANT)
    else:
        yield Verdict(what, wanted)
    for name in ("win_pm256", "strided64"):
        records = {r["seq_len"]: r for r in results.of("growth") if r["case"] == name and stated(r)}
        what, wanted = f"{name}: tables and scratch at 1M tokens", "<= 1.1 * 4 * those at 256K"
        before, after = (_beyond(records.get(n)) for n in (GROWTH[-1], MILLION))
        if before is None or after is None:
            yield Verdict(what, wanted)
        else:
            limit = 1.1 * 4 * before + SLACK * MILLION
            text = f"{after / 2**20:.1f} MiB, {before / 2**20:.1f} MiB at 256K"
            yield Verdict(what, wanted, text, after <= limit)


def _beyond(record: Record | None) -> float | None:
    """Bytes of a call beyond its inputs and outputs: tables and scratch."""
    if record is None or record.get("memory", {}).get("extra_bytes") is None:
        return None
    return float(record["memory"]["extra_bytes"] + record["table_bytes"])


def _host(results: Results) -> Iterator[Verdict]:
    records = {r["case"]: r for r in results.of("host")}
    for name, (field, limit, unit) in HOST.items():
        found = [(name, records[name].get(field))] if name in records else []
        yield _worst(HOST_TITLES[name], found, Bound("<=", limit, f"{{:.3g}} {unit}"), named=False)
    eager = records.get("eager call", {}).get("contestants", {}).get("splatc", {})
    found = [("eager call", eager.get("median_us"))]
    yield _worst("eager call, host time", found, Bound("<=", EAGER_US, "{:.3g} us"), named=False)


def _worst(what: str, found: Iterable[tuple[str, float | None]], bound: Bound, *, named: bool = True) -> Verdict:
    """The verdict on the worst of some figures; named: say whose it is."""
    present = [(name, figure) for name, figure in found if figure is not None]
    if not present:
        return Verdict(what, str(bound))
    name, figure = bound.worst(present)
    return Verdict(what, str(bound), bound.show(figure) + (f" ({name})" if named else ""), bound.met(figure))
