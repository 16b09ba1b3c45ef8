"""What every example does beside its mask: random tensors, the check against the float64 reference, the picture."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from splatc import oracle
from splatc import patterns as P
from splatc.draw import Drawing, save


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


def draw(mask, seq_len: int) -> None:
    """Write <name of the example>.png: the mask coloured by piece, then the tiles of each pass."""
    pattern = P.as_pattern(mask, q_len=seq_len)
    path = out_folder() / f"{Path(sys.argv[0]).stem}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    save(Drawing.of(pattern, seq_len), path)
    print(f"picture      {path}")


def out_folder() -> Path:
    parser = argparse.ArgumentParser(description="Compiles one mask, checks the result, draws the mask.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="folder for the picture")
    return parser.parse_args().out
