"""Before and after: a language model of transformers, dense and with sparse patterns, trained on the same text.

    python examples/ten_minutes.py           # some minutes on two CPU cores
    python examples/ten_minutes.py --tiny    # seconds; the numbers mean nothing

The text is this repository's documentation and code, by bytes. Both models start from the same weights and see the same
pieces in the same order. Times are medians.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from side_by_side import milliseconds, report

from splatc.integrations.transformers import register, set_patterns

PATTERN = "causal & (window(255, 0) | strided(64))"


@dataclass(frozen=True)
class Size:
    """What is run."""

    tokens: int
    layers: int
    hidden: int
    steps: int


FULL = Size(4096, 4, 256, 60)
TINY = Size(512, 2, 64, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    size = TINY if parser.parse_args().tiny else FULL
    register()
    text, held = corpus(size.tokens)
    models = {"before: sdpa": build(size), "after: splatc": build(size)}
    ours = models["after: splatc"]
    ours.set_attn_implementation("splatc")
    set_patterns(ours, dict.fromkeys(range(size.layers), PATTERN))
    rows = [{"model": name, **row} for name, row in zip(models, train([*models.values()], text, size), strict=True)]
    for row, model in zip(rows, models.values(), strict=True):
        row |= test(model, held)
    report("ten_minutes", rows)


def build(size: Size) -> Any:
    """The same weights each time."""
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=size.hidden, intermediate_size=2 * size.hidden, num_hidden_layers=size.layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=size.tokens, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config)


def corpus(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pieces of text as bytes, int64 (pieces, length): shuffled ones to learn, and eight to test on."""
    root = Path(__file__).parent.parent
    files = sorted([*root.glob("*.md"), *root.glob("docs/**/*.md"), *root.glob("splatc/**/*.py")])
    data = torch.frombuffer(bytearray(b"\n\n".join(path.read_bytes() for path in files)), dtype=torch.uint8).long()
    pieces = data[: len(data) // length * length].view(-1, length)
    pieces = pieces[torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0))]
    return pieces[8:], pieces[:8]


def train(models: list[Any], text: torch.Tensor, size: Size) -> list[dict[str, Any]]:
    """Of each: milliseconds of a training step, and the loss of the last ten in nats a byte. Models take turns, so that
    a busy machine is as busy for all."""
    optimizers = [torch.optim.AdamW(model.parameters(), lr=2e-3) for model in models]
    times, losses = np.zeros((size.steps, len(models))), np.zeros((size.steps, len(models)))
    for step in range(size.steps):
        ids = text[step % len(text)][None]
        for i, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            began = time.perf_counter()
            loss = model(ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            times[step, i], losses[step, i] = (time.perf_counter() - began) * 1e3, float(loss.detach())
    return [{"training step, ms": float(ms), "training loss": float(loss)}
            for ms, loss in zip(np.median(times, 0), losses[-10:].mean(0), strict=True)]  # fmt: skip


def test(model: Any, held: torch.Tensor) -> dict[str, Any]:
    """The loss on text that was not learned, and milliseconds of a forward pass."""
    model.eval()
    with torch.no_grad():
        losses = [float(model(ids[None], labels=ids[None], use_cache=False).loss) for ids in held]
        forward = milliseconds(lambda: model(held[:1], use_cache=False), torch.device("cpu"), 9)
    return {"forward, ms": forward, "test loss": sum(losses) / len(losses)}


if __name__ == "__main__":
    main()
