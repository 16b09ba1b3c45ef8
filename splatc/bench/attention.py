"""Attention on the CPU: splatc against torch's scaled_dot_product_attention with the boolean mask, in one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

import splatc
from splatc import oracle
from splatc.bench.cases import attention_cases
from splatc.bench.report import Row
from splatc.bench.timing import Timing, interleaved
from splatc.errors import Unsupported
from splatc.patterns.base import Pattern

SAMPLED_ROWS = 32  # query rows a head that the float64 reference computes
MAX_ERROR = 1e-5
SPEEDUPS = {"window": 4.0, "dilated4": 4.0, "strided64": 4.0, "bigbird": 4.0, "full": 0.6}


@dataclass(frozen=True)
class Setting:
    """The sizes of the benchmark. Batch is 1 and everything is float32."""

    seq_len: int = 4096
    heads: int = 8
    head_dim: int = 64
    rounds: int = 9

    @property
    def stated(self) -> bool:
        """Whether these are the sizes that the targets are stated for."""
        return (self.seq_len, self.heads, self.head_dim) == (4096, 8, 64)


def count(setting: Setting) -> int:
    """Rows that ``run`` yields."""
    return len(attention_cases(setting.seq_len)) + 2


def run(setting: Setting) -> Iterator[Row]:
    """One row a pattern, and two more: full and causal against torch without a mask matrix."""
    try:
        import torch
    except ImportError:
        raise Unsupported("the comparison needs torch: pip install 'splatc[torch]'") from None
    sdpa = torch.nn.functional.scaled_dot_product_attention
    generator = torch.Generator().manual_seed(0)
    shape = (1, setting.heads, setting.seq_len, setting.head_dim)
    q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
    with torch.no_grad():
        for name, pattern in attention_cases(setting.seq_len).items():
            attend = splatc.compile(
                pattern, seq_len=setting.seq_len, head_dim=setting.head_dim, dtype="float32", target="cpu"
            )
            error = sampled_error(attend(q, k, v).numpy(), q.numpy(), k.numpy(), v.numpy(), pattern)
            mask = torch.from_numpy(pattern.dense(setting.seq_len))

            masked = partial(sdpa, q, k, v, attn_mask=mask)
            yield _row(name, "boolean mask", setting, partial(attend, q, k, v), masked, error, attend.explain())
            if name in ("full", "causal"):
                causal = name == "causal"
                other = f"is_causal={causal}" if causal else "no mask"

                plain = partial(sdpa, q, k, v, is_causal=causal)
                yield _row(
                    f"{name}, torch: {other}", other, setting, partial(attend, q, k, v), plain, error, attend.explain()
                )


def _row(
    name: str, other: str, setting: Setting, ours: Callable[[], Any], theirs: Callable[[], Any], error: float, e: Any
) -> Row:
    timings: dict[str, Timing] = interleaved({"splatc": ours, "torch": theirs}, setting.rounds)
    mine, torchs = timings["splatc"], timings["torch"]
    speedup = torchs.median / mine.median
    missed = []
    if not error < MAX_ERROR:
        missed.append(f"{name}: relative error {error:.1e}, the target is below {MAX_ERROR:.0e}")
    wanted = SPEEDUPS.get(name) if setting.stated else None
    if wanted is not None and speedup < wanted:
        missed.append(f"{name}: {speedup:.2f} times torch, the target is at least {wanted:g}")
    values = {
        "pattern": e.pattern,
        "torch": other,
        "splatc": mine.to_dict(),
        "sdpa": torchs.to_dict(),
        "speedup": speedup,
        "target": wanted,
        "error": error,
        "sampled_rows": SAMPLED_ROWS,
        "density": e.density,
        "waste": e.waste,
        "predicted_ms": e.seconds * setting.heads * 1e3,
    }
    spread = (f"{t.median * 1e3:.2f} ({t.fastest * 1e3:.2f}-{t.slowest * 1e3:.2f})" for t in (mine, torchs))
    cells = (
        name,
        f"{e.density:.1%}",
        *spread,
        f"{speedup:.2f}x",
        f"{wanted:g}x" if wanted else "",
        f"{error:.1e}",
        f"{e.waste:.2f}",
        f"{values['predicted_ms']:.2f}",
    )
    return Row(cells, {"name": name, **values}, tuple(missed))


COLUMNS = (
    "pattern",
    "density",
    "splatc ms (min-max)",
    "torch ms (min-max)",
    "speed-up",
    "target",
    "error",
    "waste",
    "predicted ms",
)


def sampled_error(o: Any, q: Any, k: Any, v: Any, pattern: Pattern, rows: int = SAMPLED_ROWS) -> float:
    """Relative error of o (1, heads, seq, dim) to float64 on random rows of each head, fresh ones every call."""
    rng = np.random.default_rng()
    q_len, kv_len = q.shape[2], k.shape[2]
    got, wanted = [], []
    for head in range(q.shape[1]):
        chosen = np.sort(rng.choice(q_len, min(rows, q_len), replace=False))
        mask = pattern.contains(chosen[:, None], np.arange(kv_len)[None, :], q_len, kv_len)
        mask = np.broadcast_to(mask, (len(chosen), kv_len))
        mine = slice(head, head + 1)
        wanted.append(oracle.attention(q[:, mine, chosen], k[:, mine], v[:, mine], mask)[0][0, 0])
        got.append(o[0, head, chosen])
    return oracle.relative_error(np.stack(got), np.stack(wanted))
