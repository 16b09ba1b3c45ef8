"""A Mistral of Hugging Face transformers with random weights, by three implementations of attention.

Prefill, a training step, a decode step.

    python examples/mistral.py           # on a GPU: 1.1 billion parameters, bfloat16, window 1,024 of 16,384 tokens
    python examples/mistral.py --tiny    # a few seconds on a CPU
    python examples/mistral.py --implementations splatc,sdpa    # flex_attention is compiled for minutes, for each mask
    python examples/mistral.py --masks window                   # not the causal one too

One process and one set of weights for all: only ``set_attn_implementation`` changes. Times are medians.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from side_by_side import attempt, difference, milliseconds, report

from splatc.integrations.transformers import register

IMPLEMENTATIONS = ("splatc", "sdpa", "flex_attention")
MASKS = ("window", "causal")
DECODE_ROUNDS = 3


@dataclass(frozen=True)
class Size:
    """What is run."""

    tokens: int
    window: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    vocabulary: int
    repeats: int
    steps: int  # of decoding


FULL = Size(16384, 1024, 16, 2048, 32, 8, 32000, 9, 32)
TINY = Size(256, 32, 2, 64, 4, 2, 97, 3, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--implementations", default=",".join(IMPLEMENTATIONS), help="comma-separated")
    parser.add_argument("--masks", default=",".join(MASKS), help="comma-separated")
    given = parser.parse_args()
    names, masks = given.implementations.split(","), given.masks.split(",")
    for what, wanted, known in (("implementation", names, IMPLEMENTATIONS), ("mask", masks, MASKS)):
        if unknown := set(wanted) - set(known):
            parser.error(f"no {what} {', '.join(sorted(unknown))}: there are {', '.join(known)}")
    tiny = given.tiny or not torch.cuda.is_available()
    size = TINY if tiny else FULL
    device = torch.device("cpu" if tiny else "cuda")
    register()
    model = build(size, device, torch.float32 if tiny else torch.bfloat16)
    names = [name for name in names if not (tiny and name == "flex_attention")]
    print(f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f} billion parameters, {size.tokens} tokens, {device}")
    rows = []
    for mask in masks:
        window = size.window if mask == "window" else None
        model.config.sliding_window = window
        rows += compare(model, names, window, size, device)
    report("mistral", rows)


def build(size: Size, device: torch.device, dtype: torch.dtype) -> Any:
    """A model with random weights."""
    config = transformers.MistralConfig(
        vocab_size=size.vocabulary, hidden_size=size.hidden, intermediate_size=4 * size.hidden,
        num_hidden_layers=size.layers, num_attention_heads=size.heads, num_key_value_heads=size.kv_heads,
        head_dim=size.hidden // size.heads, max_position_embeddings=2 * size.tokens, sliding_window=size.window,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    with device:
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")


def compare(model: Any, names: list[str], window: int | None, size: Size, device: torch.device) -> list[dict[str, Any]]:
    """A row for each implementation."""
    ids = torch.randint(3, size.vocabulary, (1, size.tokens), device=device)
    first: list[torch.Tensor] = []
    rows = []
    for name in names:
        model.set_attn_implementation(name)
        row: dict[str, Any] = {"mask": "causal" if window is None else f"window {window}", "implementation": name}
        logits: list[torch.Tensor] = []

        def prefill(logits: list[torch.Tensor] = logits) -> None:
            with torch.no_grad():
                logits[:] = [model(ids, use_cache=False, logits_to_keep=64).logits]

        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)  # the same weights for all

        def train(optimizer: torch.optim.Optimizer = optimizer) -> None:
            model(ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        model.eval()
        row["prefill, ms"] = attempt(lambda: milliseconds(prefill, device, size.repeats))  # noqa: B023 (called here)
        if logits:
            first = first or logits
            row[f"to {names[0]}"] = difference(logits[0], first[0])
        model.train()
        row["training, ms"] = attempt(lambda: milliseconds(train, device, size.repeats))  # noqa: B023
        optimizer.zero_grad()
        rows.append(row)
        print(row, flush=True)
    model.eval()
    rounds: list[list[float | str]] = [[] for _ in names]
    caches = [transformers.DynamicCache(config=model.config) for _ in names]
    for turn in range(DECODE_ROUNDS):  # bound by the host, whose speed changes: each is first once
        for i in sorted(range(len(names)), key=lambda i: (i + turn) % len(names)):
            model.set_attn_implementation(names[i])
            rounds[i].append(attempt(lambda: decode(model, ids, caches[i], size.steps, device)))  # noqa: B023
    for row, times in zip(rows, rounds, strict=True):
        failed = [time for time in times if isinstance(time, str)]
        row["decode, ms"] = failed[0] if failed else statistics.median(times)
    return rows


def decode(model: Any, ids: torch.Tensor, cache: Any, steps: int, device: torch.device) -> float:
    """A step with a cache, which first takes the prompt. Each has a key more than the last, as in ``generate``."""

    def forward(tokens: torch.Tensor) -> Callable[[], None]:
        def call() -> None:
            with torch.no_grad():
                model(tokens, past_key_values=cache, logits_to_keep=1)

        return call

    if not cache.get_seq_length():
        forward(ids)()
    return milliseconds(forward(ids[:, :1]), device, steps)


if __name__ == "__main__":
    main()
