"""Times a step of training (forward, backward, optimizer) of SPION's ListOps model, and its attention alone, by length:

    python examples/listops.py --speed 2048,8192,16384

Contestants: unfused matrix products (what SPION was compared with), PyTorch's fused attention and splatc's, all dense;
then FlexAttention (on GPUs) and splatc on the pattern of each layer. Patterns are found (SPION-CF, the published
options) in random maps of the kind that the paper shows: a band along the diagonal, lines beside it, columns that all
look at, noise. The model is not trained, so maps of its own would say nothing.

On a GPU a sample is a replay of a CUDA graph, so that launches of small kernels do not count; a step of plain calls is
given beside it. Attention is checked against float64 first. Results: listops_speed.json.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from listops_model import Classifier, Size
from listops_peers import block_mask, compiled_flex, matmuls
from rich.console import Console
from rich.table import Column, Table
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from splatc import patterns as P
from splatc.bench.gpu import gradients
from splatc.bench.gpu.backward import learning_inputs
from splatc.bench.gpu.check import peak_bytes
from splatc.bench.gpu.clock import Clock, GraphClock, HostClock, Timed
from splatc.bench.gpu.measure import WRONG, reason
from splatc.bench.gpu.peers import Contestant
from splatc.bench.gpu.shapes import Shape
from splatc.nn.functional import sparse_attention
from splatc.sparsify import costs_of, find_pattern
from splatc.sparsify.spion import Found

HOWS = {"unfused": "unfused", "sdpa": "sdpa", "dense": "dense", "flex": "flex-CF", "splatc": "spion-CF"}  # name: mode
SPARSE = ("flex", "splatc")
GENERATED = 4096, 4  # length and layers for which the generator is timed
SECONDS = 0.4  # of samples, of one contestant


@dataclass
class Figures:
    """Of one contestant at one length. Milliseconds: medians; eager: plain calls. bytes: at the peak, beyond what is
    there before and what is returned (gradients). error: of the gradients of attention, relative, the largest."""

    how: str
    step_ms: float | None = None
    step_eager_ms: float | None = None
    step_bytes: int | None = None
    attention_ms: float | None = None
    attention_bytes: int | None = None
    error: float | None = None
    timed: str = ""
    failed: str | None = None


def banded_map(length: int, seed: int, device: str) -> torch.Tensor:
    """A random map of attention as SPION's paper shows them: float32 (length, length), rows sum to one."""
    random = torch.Generator(device).manual_seed(seed)

    def places(count: int, lowest: int, highest: int) -> list[int]:
        return torch.randint(lowest, highest, (count,), generator=random, device=device).tolist()

    scores = torch.randn(length, length, generator=random, device=device) / 2
    away = torch.arange(length, device=device, dtype=torch.float32)
    away = away[None, :] - away[:, None]
    scores += 4 * torch.exp(-away.abs() / 32)
    for line in places(2, -length // 2, length // 2):
        scores += 3 * torch.exp(-(away - line).abs() / 24)
    for column, width in zip(places(3, 0, length), places(3, 4, 40), strict=True):
        scores[:, column : column + width] += 2.5
    return scores.softmax(-1)


def generator_ms(device: str) -> float:
    """Median milliseconds to find the patterns of `GENERATED` maps that lie on the device."""
    length, layers = GENERATED
    maps = [banded_map(length, seed, device) for seed in range(layers)]

    def once() -> float:
        _wait(device)
        began = time.perf_counter()
        for one in maps:
            find_pattern(one)
        return (time.perf_counter() - began) * 1e3

    once()
    return statistics.median(once() for _ in range(5))


# -- attention alone ---------------------------------------------------------------------------------------------------


def attention_of(how: str, pattern: P.Pattern, device: str) -> Callable[..., torch.Tensor]:
    """A function of q, k and v."""
    if how == "flex":
        return partial(compiled_flex(), block_mask=block_mask(pattern, device))
    dense = {"unfused": matmuls, "sdpa": scaled_dot_product_attention}
    return dense.get(how) or partial(sparse_attention, pattern=pattern if how == "splatc" else P.full())


def both(attend: Callable[..., torch.Tensor], q: Any, k: Any, v: Any, do: Any) -> tuple[torch.Tensor, ...]:
    """The gradients of attention, o computed and forgotten."""
    return torch.autograd.grad(attend(q, k, v), (q, k, v), do)


def measure_attention(out: Figures, size: Size, batch: int, pattern: P.Pattern, clock: Clock, device: str) -> None:
    """Forward and backward of one layer's heads, checked and timed."""
    dtype = "float32" if device == "cpu" else "bfloat16"
    shape = Shape(size.length, size.width // size.heads, batch, size.heads, size.heads, dtype)
    inputs = [learning_inputs(shape, device) for _ in range(2)]
    call = partial(both, attention_of(out.how, pattern, device))
    seen = pattern if out.how in SPARSE else P.full()
    mask = torch.from_numpy(seen.dense(size.length)).to(device)
    first = [x[:1] for x in inputs[0]]
    wanted = gradients.reference(*first, mask, [0])
    del mask
    out.error = max(gradients.errors([x[:1] for x in call(*inputs[0])], wanted).values())
    if not out.error < WRONG:
        raise ValueError(f"wrong result: relative error {out.error:.2g}")
    out.attention_bytes = peak_bytes(lambda: call(*inputs[0]), device)
    timed = clock.prepare(Contestant(call), inputs)
    out.attention_ms = _median_ms(timed)


# -- a step of training ------------------------------------------------------------------------------------------------


def measure_step(out: Figures, size: Size, batch: int, found: list[Found], clock: Clock, device: str) -> None:
    """Forward, backward, cut gradients, AdamW; random tokens."""
    torch.manual_seed(0)
    model = Classifier(size, HOWS[out.how]).to(device)
    if out.how in SPARSE:
        for layer, one in zip(model.layers, found, strict=True):
            layer.attention.switch(one.pattern)
    on_gpu = device != "cpu"
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=on_gpu, capturable=on_gpu)

    def step(tokens: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16, enabled=on_gpu):
            loss = cross_entropy(model(tokens).float(), values)
        loss.backward()
        torch.nn.utils.clip_grad_value_(model.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    tokens = torch.randint(1, 16, (batch, size.length), device=device)
    values = torch.randint(10, (batch,), device=device)
    out.step_bytes = peak_bytes(lambda: step(tokens, values), device)
    timed = clock.prepare(Contestant(step), [(tokens, values)])
    out.step_ms, out.timed = _median_ms(timed), timed.how
    out.step_eager_ms = None if timed.eager_s is None else timed.eager_s * 1e3


# -- all of it ---------------------------------------------------------------------------------------------------------


def measure(size: Size, batch: int, device: str) -> dict[str, Any]:
    """Every contestant at one length."""
    found = []
    for layer in range(size.layers):
        found.append(find_pattern(banded_map(size.length, layer, device), size.block))
    _forget(device)
    figures = []
    for how in HOWS:
        if how == "flex" and device == "cpu":
            continue
        out = Figures(how)
        try:
            for part in (partial(measure_attention, pattern=found[0].pattern), partial(measure_step, found=found)):
                clock = HostClock() if device == "cpu" else GraphClock(torch.cuda.Stream())
                with _running(clock):
                    part(out, size, batch, clock=clock, device=device)
                del clock
                _forget(device)
        except Exception as error:  # a fact about a contestant
            out.failed = reason(error)
            del error
            _forget(device)
        figures.append(out)
    costs = costs_of(found[0].pattern, size.length, size.heads, size.width // size.heads)
    return {"length": size.length, "batch": batch, "densities": [one.maps[0].density for one in found],
            "costs": costs.to_dict(), "contestants": [asdict(out) for out in figures]}  # fmt: skip


def table(record: dict[str, Any]) -> Table:
    """The figures of a length; ratios are to the unfused one."""
    share = statistics.fmean(record["densities"])
    names = Column("", no_wrap=True), "step, ms", "x", "plain", "attention, ms", "x", "its MiB", "x", "error"
    out = Table(*names, title=f"{record['length']} positions, batch {record['batch']}, {share:.1%} of blocks",
                caption="x: how many times less than unfused; plain: a step without a CUDA graph, ms")  # fmt: skip
    base = record["contestants"][0]

    def with_ratio(one: dict[str, Any], name: str, unit: float) -> tuple[str, str]:
        value, slow = one[name], base[name]
        ratio = f"{slow / value:.2f}x" if value and slow else "-"
        return ("-" if value is None else f"{value / unit:.3g}"), ratio

    for one in record["contestants"]:
        if one["failed"]:
            out.add_row(one["how"], "failed")
            continue
        eager = one["step_eager_ms"]
        out.add_row(one["how"], *with_ratio(one, "step_ms", 1), "-" if eager is None else f"{eager:.3g}",
                    *with_ratio(one, "attention_ms", 1), *with_ratio(one, "attention_bytes", 2**20),
                    f"{one['error']:.1e}")  # fmt: skip
    return out


def main(size: Size, lengths: list[int], tokens: int, device: str, folder: Path) -> int:
    """Measure, print and write; 1 if a contestant failed."""
    console = Console()
    saved: dict[str, Any] = {"device": device, "torch": torch.__version__, "tokens": tokens, "size": asdict(size)}
    if device != "cpu":
        saved["gpu"] = torch.cuda.get_device_name()
    saved["generator"] = {"length": GENERATED[0], "layers": GENERATED[1], "ms": generator_ms(device)}
    console.print(f"patterns of {GENERATED[1]} maps of {GENERATED[0]}: {saved['generator']['ms']:.1f} ms")
    saved["lengths"] = []
    for length in lengths:
        saved["lengths"].append(measure(replace(size, length=length), max(tokens // length, 1), device))
        console.print(table(saved["lengths"][-1]))
        for one in saved["lengths"][-1]["contestants"]:
            if one["failed"]:
                console.print(f"{one['how']} failed: {one['failed']}", soft_wrap=True)
        (folder / "listops_speed.json").write_text(json.dumps(saved, indent=1) + "\n")
    return int(any(one["failed"] for record in saved["lengths"] for one in record["contestants"]))


def _median_ms(timed: Timed) -> float:
    samples: list[float] = []
    began = time.perf_counter()
    while len(samples) < 3 or (time.perf_counter() - began < SECONDS and len(samples) < 50):
        samples.append(timed.sample())
    return statistics.median(samples) * 1e3


def _running(clock: Clock) -> AbstractContextManager[Any]:
    return clock.running() if isinstance(clock, GraphClock) else nullcontext()


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def _forget(device: str) -> None:
    """Give memory back that nobody holds any more."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
