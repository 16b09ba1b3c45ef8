"""One mask at one shape, with every tile that its kernel can be built with: checked, and timed in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import splatc
from splatc.bench.gpu import check
from splatc.bench.gpu.clock import GraphClock, HostClock, Timed
from splatc.bench.gpu.measure import WRONG
from splatc.bench.gpu.peers import Contestant, kind_of
from splatc.bench.gpu.shapes import LARGE, LARGE_SETS, SETS
from splatc.bench.timing import Timing, interleave
from splatc.codegen.costs import Costs, costs_of
from splatc.codegen.hopper.shape import ITEM_BYTES
from splatc.errors import CompileError, CudaError, Unsupported
from splatc.patterns.base import Pattern
from splatc.runtime.attention import Plan
from splatc.runtime.tuned import Tile

PREPARATIONS = 2  # steps of a tile before it is timed: compile and check, warm up
SECONDS = 20.0  # of timing, unless 3 rounds take longer

Tell = Callable[[str], None]  # is told each step when it begins


@dataclass(frozen=True)
class Sizes:
    """Of one call: q (batch, heads, q_len, head_dim), k and v (batch, kv_heads, kv_len, head_dim or v_head_dim)."""

    q_len: int
    kv_len: int
    head_dim: int
    v_head_dim: int
    batch: int = 1
    heads: int = 16
    kv_heads: int = 16
    dtype: str = "bfloat16"

    @property
    def input_bytes(self) -> int:
        """Bytes of q, k and v."""
        keys = self.kv_heads * self.kv_len * (self.head_dim + self.v_head_dim)
        return self.batch * ITEM_BYTES[self.dtype] * (self.heads * self.q_len * self.head_dim + keys)

    def input_sets(self, device: str) -> list[tuple[Any, Any, Any]]:
        """Fresh normal (q, k, v), as many as keep the L2 cache from holding the next."""
        import torch

        def normal(heads: int, length: int, dim: int) -> Any:
            return torch.randn(self.batch, heads, length, dim, device=device, dtype=getattr(torch, self.dtype))

        return [
            (normal(self.heads, self.q_len, self.head_dim), normal(self.kv_heads, self.kv_len, self.head_dim),
             normal(self.kv_heads, self.kv_len, self.v_head_dim))
            for _ in range(SETS if self.input_bytes < LARGE else LARGE_SETS)
        ]  # fmt: skip

    def predict(self, plan: Plan, costs: Costs) -> float:
        """Seconds of a call by the cost model."""
        return plan.predict(self.batch, self.heads, self.kv_heads, costs)

    def flops(self, nnz: int) -> int:
        """Useful operations of a call over masks of nnz elements, in all heads together."""
        return 2 * nnz * (self.head_dim + self.v_head_dim) * self.batch


@dataclass
class Tried:
    """What became of a tile. problem: why it was not timed. error: relative, against float64 on sampled rows."""

    tile: Tile
    problem: str | None = None
    waste: float | None = None
    predicted_us: float | None = None
    error: float | None = None
    measured_us: float | None = None
    spread_us: tuple[float, float] | None = None  # fastest and slowest round
    useful_tflops: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def tune(pattern: Pattern, sizes: Sizes, tiles: Sequence[Tile], rounds: int, tell: Tell,
         device: str = "cuda") -> list[Tried]:  # fmt: skip
    """Every tile compiled, checked and timed in interleaved rounds; the fastest first, those with a problem last.

    Timings are those of ``GraphClock``, on a CPU (for tests) of ``HostClock``.
    """
    import torch

    sample = check.sample_rows(pattern, sizes.q_len, sizes.heads, sizes.kv_len)
    inputs = sizes.input_sets(device)
    clock = HostClock() if kind_of(device) == "cpu" else GraphClock()
    tried: dict[str, Tried] = {}
    samplers: dict[str, Callable[[], float]] = {}
    nnz = 0
    with torch.no_grad():
        for tile in tiles:
            label = f"{tile[0]} x {tile[1]}"
            tell(f"compile {label}")
            tried[label], compiled = _try(pattern, sizes, tile, inputs[0], sample, device)
            if compiled is not None:
                tell(f"prepare {label}")
                samplers[label] = told(f"time {label}", clock.prepare(contestant(compiled), inputs), tell)
                nnz = sum(_nnz(compiled.plan(), sizes.heads))
        for label, timing in interleave(samplers, rounds, SECONDS).items():
            _note_timing(tried[label], timing, sizes.flops(nnz))
    return sorted(tried.values(), key=lambda one: (one.measured_us is None, one.measured_us))


def steps(tiles: Sequence[Tile], rounds: int) -> int:
    """How often ``tune`` tells a step, at most."""
    return len(tiles) * (PREPARATIONS + rounds)


def contestant(compiled: Any) -> Contestant:
    """A compiled mask as a clock takes it."""
    return Contestant(lambda q, k, v: compiled(q, k, v, enable_gqa=True), compiled=compiled)


def multiprocessors(device: str) -> int:
    """Those of a GPU; of a CPU one."""
    if kind_of(device) == "cpu":
        return 1
    import torch

    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def told(step: str, timed: Timed, tell: Tell) -> Callable[[], float]:
    """The sampler of a timing, telling each sample."""

    def sample() -> float:
        tell(step)
        return timed.sample()

    return sample


def _try(pattern: Pattern, sizes: Sizes, tile: Tile, given: tuple[Any, Any, Any], sample: check.Sample,
         device: str) -> tuple[Tried, Any]:  # fmt: skip
    """A tile compiled and run once: what is known of it, and what to time (None: nothing)."""
    try:
        compiled = splatc.compile(pattern, seq_len=sizes.q_len, kv_len=sizes.kv_len, head_dim=sizes.head_dim,
                                  v_head_dim=sizes.v_head_dim, dtype=sizes.dtype, target=kind_of(device),
                                  tile=tile)  # fmt: skip
        o, lse = compiled(*given, return_lse=True, enable_gqa=True)
    except Unsupported as error:
        return Tried(tile, f"unsupported: {error}"), None
    except (CompileError, CudaError) as error:
        return Tried(tile, f"failed: {error}"), None
    found = check.errors(o, lse, *given, sample)
    plan = compiled.plan()
    one = Tried(tile, waste=plan.explanation.waste, error=found.o,
                predicted_us=sizes.predict(plan, costs_of(plan.spec, multiprocessors(device))) * 1e6)  # fmt: skip
    if found.o < WRONG and found.lse < WRONG:
        return one, compiled
    one.problem = f"wrong result: relative error {found.o:.2g}, of the lse {found.lse:.2g}; please report this mask"
    return one, None


def _note_timing(one: Tried, timing: Timing, flops: int) -> None:
    one.measured_us = timing.median * 1e6
    one.spread_us = timing.fastest * 1e6, timing.slowest * 1e6
    one.useful_tflops = flops / timing.median / 1e12


def _nnz(plan: Plan, heads: int) -> Iterator[int]:
    """Elements that each head attends to."""
    for p in plan.heads or (0,) * heads:
        yield sum(t.nnz for t in plan.tables[p])
