"""A stack of video transformer blocks whose tokens attend to their neighbourhood in time, height and width.

    python examples/video.py           # on a GPU: 32 x 48 x 48 tokens, 9 x 9 x 9 neighbours, bfloat16
    python examples/video.py --tiny    # a few seconds on a CPU

The model calls ``F.scaled_dot_product_attention``, as timm's and diffusers' do; ``splatc.patch_sdpa`` and, beside it, a
compiled FlexAttention with the same mask take its place. Dense attention to all tokens is what the model would do.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from side_by_side import attempt, difference, milliseconds, report
from torch.nn import functional
from torch.overrides import TorchFunctionMode

import splatc
from splatc import patterns as P


@dataclass(frozen=True)
class Size:
    """What is run."""

    grid: tuple[int, int, int]
    near: tuple[int, int, int]
    layers: int
    heads: int
    head_dim: int
    repeats: int


FULL = Size((32, 48, 48), (9, 9, 9), 4, 8, 64, 9)
TINY = Size((4, 8, 8), (3, 5, 5), 2, 4, 16, 3)


class Block(torch.nn.Module):
    """A block of a diffusion transformer: attention and an MLP, scaled and shifted by an embedding of the time step."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, width = heads, heads * head_dim
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.modulation = torch.nn.Linear(width, 6 * width)
        self.qkv, self.proj = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)
        self.mlp = torch.nn.Sequential(
            torch.nn.Linear(width, 4 * width), torch.nn.GELU(approximate="tanh"), torch.nn.Linear(4 * width, width)
        )

    def forward(self, x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """x (batch, tokens, width), step (batch, width)."""
        change = self.modulation(functional.silu(step))[:, None].chunk(6, -1)
        x = x + change[2] * self.attend(self.norms[0](x) * (1 + change[1]) + change[0])
        return x + change[5] * self.mlp(self.norms[1](x) * (1 + change[4]) + change[3])

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        """Attention of all tokens to all tokens, if nobody changes it."""
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return self.proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Stack(torch.nn.Module):
    """Blocks one after the other."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(Block(size.heads, size.head_dim) for _ in range(size.layers))

    def forward(self, x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """x (batch, tokens, width), step (batch, width)."""
        for block in self.blocks:
            x = block(x, step)
        return x


class Flex(TorchFunctionMode):
    """``F.scaled_dot_product_attention`` by FlexAttention with a neighbourhood."""

    def __init__(self, size: Size, device: torch.device) -> None:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        super().__init__()
        depth, height, width = size.grid
        sides = [n // 2 for n in size.near]

        def near(b: Any, h: Any, q: Any, k: Any) -> Any:
            z = (q // (height * width) - k // (height * width)).abs() <= sides[0]
            y = (q // width % height - k // width % height).abs() <= sides[1]
            return z & y & ((q % width - k % width).abs() <= sides[2])

        tokens = depth * height * width
        self.blocks = create_block_mask(near, None, None, tokens, tokens, device=device.type, _compile=True)
        self.attend = torch.compile(flex_attention)

    def __torch_function__(self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:  # fmt: skip
        if func is functional.scaled_dot_product_attention:
            return self.attend(*args, block_mask=self.blocks)
        return func(*args, **(kwargs or {}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--near", type=int, default=9, help="neighbours along each axis")
    given = parser.parse_args()
    tiny = given.tiny or not torch.cuda.is_available()
    size = TINY if tiny else replace(FULL, near=(given.near,) * 3)
    device, dtype = (torch.device("cpu"), torch.float32) if tiny else (torch.device("cuda"), torch.bfloat16)
    pattern = P.neighborhood(size.grid, size.near)
    torch.manual_seed(0)
    model = Stack(size).to(device, dtype)
    tokens, width = size.grid[0] * size.grid[1] * size.grid[2], size.heads * size.head_dim
    x, step = torch.randn(1, tokens, width).to(device, dtype), torch.randn(1, width).to(device, dtype)
    q = torch.randn(1, size.heads, tokens, size.head_dim).to(device, dtype)
    print(f"{size.layers} blocks of {size.heads} heads of {size.head_dim}, {tokens} tokens, {pattern}, {device}")

    masked: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "splatc": lambda: splatc.patch_sdpa(pattern), "SDPA, all tokens": nullcontext
    }  # fmt: skip
    if tiny:
        dense = torch.from_numpy(pattern.dense(tokens))
        masked["SDPA, dense mask"] = lambda: Masked(dense)
    else:
        masked["FlexAttention"] = cache(lambda: Flex(size, device))
    rows: list[dict[str, Any]] = []
    first: list[torch.Tensor] = []
    for name, context in masked.items():
        row = compare(name, context, model, x, step, q, size, device)
        out = row.pop("out")
        if name != "SDPA, all tokens" and out is not None:
            first = first or [out]
            row["to splatc"] = difference(out, first[0])
        rows.append(row)
        print(row, flush=True)
    report("video", rows)


def compare(name: str, context: Callable[[], AbstractContextManager[Any]], model: Stack, x: torch.Tensor,
            step: torch.Tensor, q: torch.Tensor, size: Size, device: torch.device) -> dict[str, Any]:  # fmt: skip
    """Milliseconds: of attention alone, of the whole stack, of its training step."""
    outputs: list[torch.Tensor] = []

    def attend() -> None:
        with torch.no_grad(), context():
            functional.scaled_dot_product_attention(q, q, q)

    def stack() -> None:
        with torch.no_grad(), context():
            outputs[:] = [model(x, step)]

    def train() -> None:
        with context():
            loss = model(x, step).float().square().mean()
        loss.backward()
        model.zero_grad()

    return {
        "attention": name,
        "alone, ms": attempt(lambda: milliseconds(attend, device, size.repeats)),
        "stack, ms": attempt(lambda: milliseconds(stack, device, size.repeats)),
        "training, ms": attempt(lambda: milliseconds(train, device, size.repeats)),
        "out": outputs[0] if outputs else None,
    }


class Masked(TorchFunctionMode):
    """``F.scaled_dot_product_attention`` with a dense mask."""

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.mask = mask

    def __torch_function__(self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:  # fmt: skip
        given = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            given = {**given, "attn_mask": self.mask}
        return func(*args, **given)


if __name__ == "__main__":
    main()
