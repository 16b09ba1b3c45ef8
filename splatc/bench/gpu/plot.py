"""The figures as a picture (matplotlib): useful rate of each mask by contestant, and the roofline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from splatc.bench.gpu.cells import title
from splatc.bench.gpu.measure import Record
from splatc.bench.gpu.results import Results
from splatc.bench.gpu.shapes import Shape
from splatc.bench.gpu.targets import copy_tb_s, useful_tflops
from splatc.draw.figure import KINDS, OTHERS
from splatc.errors import InvalidInput, Unsupported

SHOWN = {"splatc": "#0072B2", "flex": "#E69F00", "masked": "#CC79A7"}  # contestant: colour
WIDE, LINE = 7.0, 0.30  # inches: a panel, and a mask in the bars


def save(results: Results, path: Path) -> None:
    """Write the picture: .png, .svg or .pdf. Raises InvalidInput for another kind or if no masks were measured."""
    if path.suffix.lower() not in KINDS:
        raise InvalidInput(f"{path}: the plot must be one of {', '.join(KINDS)}")
    drawn = figure(results)
    drawn.savefig(path, dpi=130, facecolor="white")


def figure(results: Results) -> Any:
    """A matplotlib Figure: for each head dim of the "patterns" records, bars on the left, a roofline on the right."""
    try:
        import matplotlib as mpl
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise Unsupported("plots need matplotlib: pip install 'splatc[plot]'") from None
    groups = _by_head_dim(results)
    if not groups:
        raise InvalidInput("there is nothing to plot: the results hold no masks (`--suite patterns`)")
    high = max(len(records) for records in groups.values()) * LINE + 1.4
    style: Any = {"font.size": 8, "axes.linewidth": 0.6, "axes.spines.top": False, "axes.spines.right": False}
    with mpl.rc_context(style):
        out = Figure(figsize=(2 * WIDE, high * len(groups)), layout="constrained")
        FigureCanvasAgg(out)
        shape = Shape.of(next(iter(groups.values()))[0])
        out.suptitle(f"S={shape.seq_len}, batch {shape.batch}, {shape.heads} heads, {shape.dtype}", fontsize=9)
        panels = out.subplots(len(groups), 2, squeeze=False)
        for (left, right), (head_dim, records) in zip(panels, groups.items(), strict=True):
            _bars(left, head_dim, records)
            _roofline(right, head_dim, records, copy_tb_s(results, records[0]))
    return out


def _by_head_dim(results: Results) -> dict[int, list[Record]]:
    groups: dict[int, list[Record]] = {}
    for record in results.of("patterns"):
        groups.setdefault(record["head_dim"], []).append(record)
    return dict(sorted(groups.items(), reverse=True))


def _bars(ax: Any, head_dim: int, records: Sequence[Record]) -> None:
    """Useful TFLOP/s of each mask: one bar a contestant; a line where full attention by cuDNN is."""
    thick = 0.8 / len(SHOWN)
    longest = max((useful_tflops(r, name) or 0.0 for r in records for name in SHOWN), default=0.0)
    for i, (name, colour) in enumerate(SHOWN.items()):
        rates = [useful_tflops(r, name) or 0.0 for r in records]
        places = [row + (i - (len(SHOWN) - 1) / 2) * thick for row in range(len(records))]
        ax.barh(places, rates, thick, color=colour, label=title(name))
        for place, rate in zip(places, rates, strict=True):
            if rate:
                ax.text(rate + longest * 0.008, place, f"{rate:.0f}" if rate >= 10 else f"{rate:.1f}", va="center",
                        fontsize=5.5)  # fmt: skip
    dense = _dense_rate(records)
    if dense:
        ax.axvline(dense, color=OTHERS, linewidth=0.8, linestyle="--", label="cuDNN, no mask")
    ax.set_yticks(range(len(records)), [f"{r['case']}  {r['density']:.1%}  [{i}]" for i, r in enumerate(records, 1)])
    ax.invert_yaxis()
    ax.margins(y=0.01)
    ax.set_xlabel("useful TFLOP/s")
    ax.set_title(f"D={head_dim}", loc="left")
    ax.legend(frameon=False, fontsize=7, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(SHOWN) + 1)


def _roofline(ax: Any, head_dim: int, records: Sequence[Record], copy_rate: float | None) -> None:
    """Useful rate over useful operations a byte, under what a copy and full attention reach; masks by their number."""
    every = [_intensity(r) for r in records if "nnz" in r]
    dense = _dense_rate(records)
    if dense and copy_rate and every:
        left, right = min(every) / 1.5, max(every) * 1.5
        knee = min(max(dense / copy_rate, left), right)
        ax.plot([left, knee, right], [min(left * copy_rate, dense), min(knee * copy_rate, dense), dense], color=OTHERS,
                linewidth=0.9, label=f"{copy_rate:.1f} TB/s; cuDNN, no mask")  # fmt: skip
    for name in ("flex", "splatc"):
        points = [(_intensity(r), rate, i) for i, r in enumerate(records, 1) if (rate := useful_tflops(r, name))]
        if points:
            ax.plot([p[0] for p in points], [p[1] for p in points], "o", markersize=3.5, color=SHOWN[name],
                    label=title(name))  # fmt: skip
        for x, y, number in points:
            ax.annotate(str(number), (x, y), xytext=(0, 4), textcoords="offset points", fontsize=6, ha="center",
                        color=SHOWN[name])  # fmt: skip
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("useful operations for each byte of q, k, v and o")
    ax.set_ylabel("useful TFLOP/s")
    ax.set_title(f"D={head_dim}", loc="left")
    if every:
        ax.legend(frameon=False, fontsize=7, loc="lower right", bbox_to_anchor=(1, 1), ncols=3)


def _intensity(record: Record) -> float:
    """Useful operations a byte that must move."""
    shape = Shape.of(record)
    return shape.flops(record["nnz"]) / shape.least_bytes


def _dense_rate(records: Sequence[Record]) -> float | None:
    """The median of the dense rates beside the records, 10**12 operations a second."""
    rates = sorted(r["dense"]["tflops"] for r in records if "dense" in r)
    return rates[len(rates) // 2] if rates else None
