"""What every example does beside its mask: random tensors, the check against the float64 reference, the picture."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

import splatc
from splatc import oracle

COLOURS = np.array([(31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189), (140, 86, 75)])


def tensors(heads: int, seq_len: int, head_dim: int = 64, seed: int = 0) -> list[np.ndarray]:
    """Random q, k, v: float32 (1, heads, seq_len, head_dim)."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((1, heads, seq_len, head_dim), np.float32) for _ in "qkv"]


def check(o, q, k, v, mask: np.ndarray) -> None:
    """Compare with dense attention in float64; mask: boolean (seq, seq) or (heads, seq, seq)."""
    wanted, _ = oracle.attention(q, k, v, mask)
    error = oracle.relative_error(o, wanted)
    print(f"error        {error:.1e} relative to float64")
    assert error < 1e-5, error


def draw(mask, seq_len: int | None = None) -> None:
    """Write <name of the example>.png: each piece of the mask in a colour of its own, the remainder grey."""
    from matplotlib.image import imsave

    from splatc.formats.fold import unnest
    from splatc.formats.strips import paint

    acsr = splatc.analyze(mask, seq_len)
    picture = np.where(acsr.to_dense()[..., None], 150, 255).repeat(3, axis=2).astype(np.uint8)
    for i in range(len(acsr.pieces)):
        strips = unnest(acsr.pieces.table[i : i + 1])
        picture[paint(strips, acsr.q_len, acsr.kv_len) > 0] = COLOURS[i % len(COLOURS)]
    scale = max(1, 512 // max(picture.shape[:2]))
    path = out_folder() / f"{Path(sys.argv[0]).stem}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    imsave(path, picture.repeat(scale, axis=0).repeat(scale, axis=1))
    print(f"picture      {path}")


def out_folder() -> Path:
    parser = argparse.ArgumentParser(description="Compiles one mask, checks the result, draws the mask.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="folder for the picture")
    return parser.parse_args().out
