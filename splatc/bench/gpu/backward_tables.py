"""The figures of the "backward" suite as tables."""

from __future__ import annotations

from splatc.bench.gpu.cells import mib, number, present, shared_sizes, times, title, us, values_of
from splatc.bench.gpu.measure import Record
from splatc.bench.gpu.results import Results
from splatc.bench.gpu.suites import BACKWARD_PEERS
from splatc.bench.gpu.targets import median_ms, share, speedup, useful_tflops
from splatc.bench.report import Row, Section

HOST = "backward host"  # the suite of the record of host times
SHOWN_KERNELS = 5
NOTE = (
    "torch.autograd.grad(o, (q, k, v), do, retain_graph=True). Useful: 10 * elements that attend * D * heads / time. "
    "Of dense: useful rate over that of cuDNN's backward without a mask, timed in the same rounds. Both: forward and "
    "backward. Other kernels: the share of the device time of a backward that its walks over tiles do not take. "
    "Errors: dQ, dK, dV against float64, two whole heads."
)


def sections(results: Results) -> list[Section]:
    """Backward passes by length and head dim, kernels of ours, memory, host times."""
    records = results.of("backward")
    kinds = dict.fromkeys((r["dtype"], r["head_dim"], r["seq_len"]) for r in records)
    alike = [[r for r in records if (r["dtype"], r["head_dim"], r["seq_len"]) == kind] for kind in kinds]
    rates = [_rates(some, NOTE if i == 0 else "") for i, some in enumerate(alike)]
    return [*rates, _kernels(records), _host(results.of(HOST))]


def host_summary(record: Record) -> str:
    """A record of host times in one line."""
    cells = []
    for name, values in record["contestants"].items():
        cells += [f"{title(name)} failed"] if "failed" in values else []
        for what, v in values.get("times", {}).items():
            cells.append(f"{title(name)} {what} " + ("failed" if "failed" in v else f"{v['median_us']:.1f}"))
    return ", ".join(cells) + " us"


def _rates(records: list[Record], note: str) -> Section:
    others = present(records, BACKWARD_PEERS)
    columns = ("mask", "density", "splatc us", *(f"{title(n)} us" for n in others), "times Flex", "times cuDNN",
               "useful TFLOP/s", "of dense", "both us", "both, times Flex", "other kernels", "error dQ, dK, dV",
               "equal runs")  # fmt: skip
    rows = [
        Row((
            r["case"], f"{r['density']:.2%}" if "density" in r else "", us(values_of(r, "splatc")),
            *(us(values_of(r, n)) for n in others), times(speedup(r, "flex")), times(speedup(r, "cudnn")),
            number(useful_tflops(r)), f"{share(r):.2f}" if share(r) else "", number(_both_us(r, "splatc")),
            times(_both_speedup(r)), "" if r.get("fixed_share") is None else f"{r['fixed_share']:.0%}", _errors(r),
            _runs(r),
        ), r)
        for r in records
    ]  # fmt: skip
    length, head_dim = (records[0][name] for name in ("seq_len", "head_dim"))
    return Section(f"Backward, S={length}, D={head_dim}{shared_sizes(records)}", columns, note, rows)


def _kernels(records: list[Record]) -> Section:
    """What a backward pass of ours consists of."""
    seen = [r for r in records if r.get("kernels_us")]
    rows = []
    for r in seen:
        longest = list(r["kernels_us"].items())[:SHOWN_KERNELS]
        extra = r.get("memory", {}).get("extra_bytes")
        text = "; ".join(f"{name.split('(')[0][:60]} {number(value)}" for name, value in longest)
        rows.append(Row((r["case"], str(r["seq_len"]), str(r["head_dim"]), mib(extra), number(_device_us(r)), text), r))
    columns = ("mask", "S", "D", "scratch MiB", "all kernels us", "kernels us")
    return Section("Kernels of a backward pass, by PyTorch's profiler", columns, "The longest first.", rows)


def _host(records: list[Record]) -> Section:
    rows = [
        Row((title(name), values.get("case", ""), what, f"{v['median_us']:.1f}",
             f"{v['p10_us']:.1f}-{v['p90_us']:.1f}"), v)
        for r in records for name, values in r["contestants"].items()
        for what, v in values.get("times", {}).items() if "failed" not in v
    ]  # fmt: skip
    note = "Until the call returns; inputs require gradients. Nothing waits for the device, whose queue is not full."
    return Section("Host time of calls with gradients", ("contestant", "mask", "call", "median us", "10%-90% us"), note,
                   rows)  # fmt: skip


def _both_us(record: Record, name: str) -> float | None:
    """Microseconds of forward and backward."""
    both = values_of(record, name).get("both", {})
    return None if median_ms(record, name) is None or "median_ms" not in both else both["median_ms"] * 1e3


def _both_speedup(record: Record) -> float | None:
    ours, theirs = (_both_us(record, name) for name in ("splatc", "flex"))
    return theirs / ours if ours and theirs else None


def _device_us(record: Record) -> float:
    return float(sum(record["kernels_us"].values()))


def _errors(record: Record) -> str:
    errors = values_of(record, "splatc").get("errors", {})
    return ", ".join(f"{x:.1e}" for x in errors.values()) or "n/a"


def _runs(record: Record) -> str:
    values = values_of(record, "splatc")
    return f"{values['equal_runs']} of {values['runs']}" if "runs" in values else ""
