"""The figures as tables: the same for terminals and for docs/performance.md."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from splatc.bench.gpu import backward_tables
from splatc.bench.gpu.cells import (
    error_of_ours,
    mib,
    number,
    present,
    shared_sizes,
    times,
    title,
    us,
    values_of,
)
from splatc.bench.gpu.measure import Record
from splatc.bench.gpu.peers import PACKAGES
from splatc.bench.gpu.results import Results
from splatc.bench.gpu.shapes import Shape
from splatc.bench.gpu.suites import PRUNED_PEERS, SHORT_PEERS
from splatc.bench.gpu.targets import Verdict, copy_tb_s, judge, median_ms, missed, share, speedup, useful_tflops
from splatc.bench.report import Row, Section, table_lines

BOUND_BY_BYTES = 0.7  # share of the time from which bytes are what limits a kernel
NEAR = 0.05  # a loss below this is none


def sections(results: Results) -> list[Section]:
    """Targets, then a table for each suite that has records."""
    makers = (_targets, _dense, _patterns, _shapes, _short, _pruned, backward_tables.sections, _growth, _host, _start,
              _checks, _memory, _failures)  # fmt: skip
    return [section for maker in makers for section in maker(results) if section.rows]


def headline(results: Results) -> list[str]:
    """What the figures were measured on, as Markdown lines: one for each distinct machine and set of versions."""
    lines: dict[str, list[str]] = {}
    for run in results.runs:
        gpu, rates = run.get("gpu", {}), run.get("ceilings", {})
        versions = ", ".join(f"{name} {v}" for name, v in run["versions"].items() if v != "not installed")
        where = f"{gpu.get('name', 'no GPU')} ({run['machine']['cpu']}); {versions}"
        what = f"`{run['command']}` on {run['date'][:10]}"
        if "copy_tb_s" in rates:
            what += f" (device copy {rates['copy_tb_s']:.2f} TB/s, matrix product {rates['matmul_tflops']:.0f} TFLOP/s)"
        if run.get("left_out"):
            what += f" (out of time for {'; '.join(run['left_out'])})"
        if run.get("ended"):
            what += f" (ended: {run['ended']})"
        lines.setdefault(where, []).append(what)
    return [f"{'; '.join(what)}: {where}." for where, what in lines.items()]


def markdown(results: Results, picture: str | None = None) -> str:
    """The GPU part of docs/performance.md. picture: the path of the plot, relative to the file."""
    lines = ["## On a GPU", "", *headline(results), "", NOTE, ""]
    if picture:
        lines += [f"![useful rate of each mask, and the roofline]({picture})", ""]
    for section in sections(results):
        lines += [f"### {section.title}", "", *([section.note, ""] if section.note else []), *table_lines(section), ""]
    gone = missed(judge(results))
    lines += ["Targets missed:", "", *(f"- {line}" for line in gone)] if gone else ["No measured target is missed."]
    return "\n".join(lines) + "\n"


NOTE = (
    "Times are medians (min-max) of interleaved rounds: replays of CUDA graphs of up to 6 calls, each on other random "
    "inputs. Useful: 4 * elements that attend * D * heads / time. Of dense: useful rate over that of full attention by "
    "cuDNN (S=8192, 16 heads, same D), timed in the same rounds. Waste: area of the visited tiles / elements. "
    "Errors: against float64 on sampled rows of every head. Every ratio is of times of one run. What limits it: the "
    "dense rate is reached, or moving q, k, v and o takes most of the time, or so much is lost to tile waste and to "
    "tiles that are slower than those of full attention (rows of few tiles share the fixed cost of a row among few)."
)


def summary(record: Record) -> str:
    """A record in one line, for people who wait."""
    name = " ".join(str(x) for x in (record["suite"], record["case"]))
    if "failed" in record:
        return f"{name}: failed: {record['failed']}"
    if record["suite"] == backward_tables.HOST:
        return f"{name}: {backward_tables.host_summary(record)}"
    if record["suite"] == "host":
        figures: dict[str, Any] = {key: record[key] for key in ("seconds", "plan_ms", "added_ms") if key in record}
        figures |= {title(n): v.get("median_us", v.get("failed")) for n, v in record.get("contestants", {}).items()}
        cells = [f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items()]
        return f"{name}: {', '.join(cells)}"
    if record["suite"] == "checks":
        worst = max((x["error"] for x in record["results"]), default=math.nan)
        return f"{name}: error {worst:.1e}, {sum(len(x['failed']) for x in record['results'])} failed"
    cells = [f"{title(n)} {us(v)}" for n, v in record["contestants"].items()]
    return f"{name} S={record['seq_len']} D={record['head_dim']}: {', '.join(cells)} us"


def limit(record: Record, copy_rate: float | None) -> str:
    """What keeps splatc from the dense rate, from bytes, tile waste and the rate of visited tiles, in a few words."""
    ours, part = median_ms(record, "splatc"), share(record)
    if not ours or not part:
        return ""
    seconds = ours * 1e-3
    moved = _moved_bytes(record) / (copy_rate * 1e12) / seconds if copy_rate else 0.0
    if moved >= BOUND_BY_BYTES:
        return f"bytes: {moved:.0%} of the time is a copy of them"
    if part >= 1 - NEAR:
        return "arithmetic: the dense rate"
    waste = record["waste"]
    rate = part * waste  # of visited tiles, over the dense rate
    rows = math.ceil(record["seq_len"] / record["tile_m"]) if record.get("tile_m") else 0
    losses = [(math.log(max(waste, 1.0)), f"tile waste {waste:.2f}")]
    tiles = f"tiles at {rate:.2f} of the dense rate" + (f", {record['tiles'] / rows:.1f} a row" if rows else "")
    losses.append((-math.log(rate), tiles))
    if moved >= BOUND_BY_BYTES / 2:
        losses.append((NEAR * 1.01, f"bytes {moved:.0%}"))
    passes = [f"{record['passes']} passes"] if record["passes"] > 1 else []
    return "; ".join(passes + [text for loss, text in sorted(losses, reverse=True) if loss > NEAR])


def _moved_bytes(record: Record) -> int:
    """The least bytes of the passes that a record's kernel makes: a later pass reads o and its inputs again."""
    shape = Shape.of(record)
    return shape.least_bytes + (int(record["passes"]) - 1) * (shape.least_bytes + shape.q_bytes)


# -- one function a table ----------------------------------------------------------------------------------------------


def _targets(results: Results) -> list[Section]:
    def row(v: Verdict) -> Row:
        return Row((v.what, v.wanted, v.measured, {True: "yes", False: "NO", None: "-"}[v.met]), v.to_dict())

    return [Section("Targets", ("what", "wanted", "measured", "met"), "", [row(v) for v in judge(results)])]


def _dense(results: Results) -> list[Section]:
    records = results.of("dense")
    others = present(records, ("cudnn", "flash", *PACKAGES))
    columns = ("mask", "S", "D", "splatc us", *(f"{title(n)} us" for n in others), "times cuDNN", "TFLOP/s", "cuDNN",
               "predicted us", "error")  # fmt: skip
    rows = [
        Row((r["case"], str(r["seq_len"]), str(r["head_dim"]), us(values_of(r, "splatc")),
             *(us(values_of(r, n)) for n in others), times(speedup(r, "cudnn")), number(useful_tflops(r)),
             number(useful_tflops(r, "cudnn")), number(r.get("predicted_us")), error_of_ours(r)), r)
        for r in records
    ]  # fmt: skip
    return [Section(f"Dense and causal{shared_sizes(records)}", columns, "", rows)]


def _patterns(results: Results) -> list[Section]:
    records = results.of("patterns")
    kinds = dict.fromkeys((r["dtype"], r["head_dim"], r["seq_len"]) for r in records)
    return [_rates(results, [r for r in records if (r["dtype"], r["head_dim"], r["seq_len"]) == kind],
                   f"Masks, S={kind[2]}, D={kind[1]}") for kind in kinds]  # fmt: skip


def _shapes(results: Results) -> list[Section]:
    heading = "Neighbourhood, random tiles, and a long context with grouped heads"
    return [_rates(results, results.of("shapes"), heading, sizes=True)]


def _short(results: Results) -> list[Section]:
    return [_rates(results, results.of("short"), "Short sequences", sizes=True, peers=SHORT_PEERS)]


def _pruned(results: Results) -> list[Section]:
    """Of 2:4 attention; errors are against the same selection in float64."""
    records = results.of("pruned")
    others = present(records, PRUNED_PEERS)
    columns = ("mask", "S", "D", "splatc us", *(f"{title(n)} us" for n in others), "times not pruned", "times cuDNN",
               "predicted us", "error")  # fmt: skip
    rows = [
        Row((r["case"], str(r["seq_len"]), str(r["head_dim"]), us(values_of(r, "splatc")),
             *(us(values_of(r, n)) for n in others), times(speedup(r, "unpruned")), times(speedup(r, "cudnn")),
             number(r.get("predicted_us")), error_of_ours(r)), r)
        for r in records
    ]  # fmt: skip
    note = "cuDNN and flash attend to all keys of the static part, as ours without pruning does."
    return [Section(f"2:4 attention{shared_sizes(records)}", columns, note, rows)]


def _rates(results: Results, records: list[Record], heading: str, sizes: bool = False,
           peers: Sequence[str] = ("flex", "masked", *PACKAGES)) -> Section:  # fmt: skip
    """Times, rates and what limits them."""
    others = present(records, peers)
    columns = ("mask", *(("S", "heads", "D") if sizes else ()), "density", "splatc us",
               *(f"{title(n)} us" for n in others), "times Flex", "useful TFLOP/s", "of dense", "waste", "tiles",
               "predicted us", "error", "what limits it")  # fmt: skip
    rows = []
    for r in records:
        shape = (str(r["seq_len"]), f"{r['heads']}:{r['kv_heads']}", str(r["head_dim"])) if sizes else ()
        rows.append(Row((
            r["case"], *shape, f"{r['density']:.2%}" if "density" in r else "", us(values_of(r, "splatc")),
            *(us(values_of(r, n)) for n in others), times(speedup(r, "flex")), number(useful_tflops(r)),
            f"{share(r):.2f}" if share(r) else "", f"{r['waste']:.2f}" if "waste" in r else "", str(r.get("tiles", "")),
            number(r.get("predicted_us")), error_of_ours(r), limit(r, copy_tb_s(results, r)),
        ), r))  # fmt: skip
    return Section(heading + ("" if sizes else shared_sizes(records)), columns, "", rows)


def _growth(results: Results) -> list[Section]:
    columns = ("mask", "S", "D", "us", "ns a query", "useful TFLOP/s", "tables MiB", "scratch MiB", "tensors MiB",
               "predicted us", "set-up s", "error")  # fmt: skip
    rows = []
    for r in results.of("growth"):
        ours, memory = median_ms(r, "splatc"), r.get("memory", {})
        rows.append(Row((
            r["case"], f"{r['seq_len']:,}", str(r["head_dim"]), us(values_of(r, "splatc")),
            f"{ours * 1e6 / r['seq_len']:.2f}" if ours else "n/a", number(useful_tflops(r)),
            mib(r.get("table_bytes")), mib(memory.get("extra_bytes")), mib(r.get("least_bytes")),
            number(r.get("predicted_us")), f"{values_of(r, 'splatc').get('setup_s', math.nan):.2f}", error_of_ours(r),
        ), r))  # fmt: skip
    return [Section(f"Growth with the length{shared_sizes(results.of('growth'))}", columns,
                    "Set-up: analysis, plan, tables and the first call.", rows)]  # fmt: skip


def _host(results: Results) -> list[Section]:
    eager = [r for r in results.of("host") if r["case"] == "eager call"]
    rows = [
        Row((title(name), v.get("case", ""), f"{v['median_us']:.1f}", f"{v['p10_us']:.1f}-{v['p90_us']:.1f}"), v)
        for r in eager for name, v in r["contestants"].items() if "failed" not in v
    ]  # fmt: skip
    note = "Until the call returns, inside `torch.no_grad()`; nothing waits for the device, whose queue is not full."
    made = [Section("Host time of an eager call", ("contestant", "mask", "median us", "10%-90% us"), note, rows)]
    lengths = [r for r in results.of("host") if r["case"] == "new length"]
    columns = ("mask", "plan ms (median)", "plan ms (max)", "first call ms", "later calls ms", "added ms")
    rows = [Row((r["mask"], *(f"{r[name]:.3f}" for name in ("plan_ms", "plan_max_ms", "first_call_ms", "later_call_ms",
                                                            "added_ms"))), r) for r in lengths]  # fmt: skip
    return [*made, Section("A new length: planned, then called", columns, "Each call until the device is done.", rows)]


def _start(results: Results) -> list[Section]:
    columns = ("process", "compiler", "seconds", "import splatc", "compile", "first call", "second call", "loads TVM",
               "all runs")  # fmt: skip
    rows = [
        Row((r["case"], str(r.get("compiler") or ""), f"{r['seconds']:.3f}",
             *(f"{r[name]:.4f}" for name in ("import_s", "compile_s", "first_call_s", "second_call_s")),
             "yes" if r["tvm_loaded"] else "no", ", ".join(f"{x:.2f}" for x in r["all_seconds"])), r)
        for r in results.of("host") if "all_seconds" in r
    ]  # fmt: skip
    note = ("From after the import of torch (cold: and of TVM, which only compiling needs) and the first CUDA call to "
            "the end of the first call of a window.")  # fmt: skip
    return [Section("A new process", columns, note, rows)]


def _checks(results: Results) -> list[Section]:
    records = results.of("checks")
    kinds = list(dict.fromkeys((x["dtype"], x["head_dim"]) for r in records for x in r["results"]))
    rows = []
    for r in records:
        by_kind = {(x["dtype"], x["head_dim"]): x for x in r["results"]}
        cells = (_checked(by_kind[kind]) if kind in by_kind else "" for kind in kinds)
        rows.append(Row((r["case"], *cells), r))
    lengths = ", ".join(str(n) for n in dict.fromkeys(n for r in records for n in r["lengths"]))
    note = f"The worst relative error of O / absolute error of LSE at S = {lengths}; {_runs(records)} bitwise equal."
    return [Section("Correctness", ("mask", *(f"{dtype}, D={dim}" for dtype, dim in kinds)), note, rows)]


def _runs(records: Sequence[Record]) -> str:
    differing = sum(x["differing_runs"] for r in records for x in r["results"])
    runs = max((r["runs"] for r in records), default=0)
    return f"{runs} runs of each" + (f", all but {differing}," if differing else "")


def _checked(values: dict[str, Any]) -> str:
    if values["failed"]:
        return "failed"
    return f"{values['error']:.1e} / {values['lse_error']:.0e}"


def _memory(results: Results) -> list[Section]:
    records = [r for r in results.of("patterns", "shapes") if r.get("memory", {}).get("extra_bytes") is not None]
    columns = ("mask", "S", "D", "tables KiB", "scratch KiB", "inputs MiB")
    rows = [
        Row((r["case"], str(r["seq_len"]), str(r["head_dim"]), f"{r['table_bytes'] / 1024:.0f}",
             f"{r['memory']['extra_bytes'] / 1024:.0f}", mib(r["memory"]["input_bytes"])), r)
        for r in records
    ]  # fmt: skip
    return [Section("Memory of a call beyond inputs and outputs", columns, "", rows)]


def _failures(results: Results) -> list[Section]:
    rows = []
    for r in results.records:
        where = f"{r['suite']} {r['case']}" + (f", S={r['seq_len']}, D={r['head_dim']}" if "seq_len" in r else "")
        if "failed" in r:
            rows.append(Row((where, "all", r["failed"]), r))
        if "kernels_failed" in r:
            rows.append(Row((where, "profiler", r["kernels_failed"]), r))
        for name, v in r.get("contestants", {}).items():
            if "failed" in v:
                rows.append(Row((where, title(name), v["failed"]), v))
        for x in r.get("results", []):
            rows += [Row((where, f"{x['dtype']}, D={x['head_dim']}", f), x) for f in x["failed"]]
    return [Section("What failed", ("measurement", "contestant", "reason"), "", rows)]
