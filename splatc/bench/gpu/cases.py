"""The masks of the GPU benchmarks: each as a pattern of splatc and as a FlexAttention mask_mod, the same mask."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from splatc import patterns as P
from splatc.patterns.base import Pattern
from splatc.patterns.pruned import split

# (b, h, q, k) -> bool tensor, of index tensors
MaskMod = Callable[[Any, Any, Any, Any], Any]
DOCUMENTS = 12


@dataclass(frozen=True)
class Case:
    """One mask. mask_mod(device): it as a FlexAttention mask_mod, with its tables on that device.

    band: the mask as (left, right), keys from q - left to q + right and -1 for no bound, for libraries that have such
    an option; None where the mask is no band.
    """

    name: str
    formula: str
    pattern: Pattern
    mask_mod: Callable[[str], MaskMod]
    band: tuple[int, int] | None = None

    @property
    def causal_flag(self) -> bool | None:
        """What ``is_causal`` has to be for this mask; None if neither will do."""
        return {(-1, -1): False, (-1, 0): True}.get(self.band) if self.band else None

    @property
    def static(self) -> Pattern:
        """The pattern without its pruning, which only ours knows."""
        return split(self.pattern)[0]

    @property
    def pruned(self) -> bool:
        """Whether scores prune the mask: then ``mask_mod`` and ``band`` are of the static part."""
        return split(self.pattern)[1] is not None

    def pruned_by(self, n: int, m: int) -> Case:
        """The same mask, of whose every m keys the n with the largest scores stay."""
        return replace(self, name=f"nm{n}{m}_{self.name}", formula=f"{n} of every {m} keys of: {self.formula}",
                       pattern=self.pattern & P.nm(n, m))  # fmt: skip


def seventeen(n: int) -> dict[str, Case]:
    """The 17 masks that docs/performance.md compares, for n positions (random ones the same for every n)."""
    return {case.name: case for case in (*_dense(), *_windows(), *_strides(), *_blocks(n), *_language(n))}


def neighborhood_2d(n: int, size: int = 13) -> Case:
    """A size x size neighbourhood on the most square grid of n positions whose width is at least its height."""
    height = next(h for h in range(math.isqrt(n), 0, -1) if n % h == 0)
    width = n // height
    reach = size // 2

    def mod(b: Any, h: Any, q: Any, k: Any) -> Any:
        return ((q // width - k // width).abs() <= reach) & ((q % width - k % width).abs() <= reach)

    return Case(f"nat2d_{size}", f"{size} x {size} neighbourhood on {height} x {width}",
                P.neighborhood((height, width), size), lambda device: mod)  # fmt: skip


def tile_lists(n: int, per_row: int = 4, tile: int = 128, seed: int = 0) -> Case:
    """Random whole tiles, ``per_row`` in every row and in every column of tiles: 6.25% of 8,192 positions."""
    rng, rows = np.random.default_rng(seed), -(-n // tile)
    per_row = min(per_row, rows)
    column_of, shifts = rng.permutation(rows), rng.permutation(rows)[:per_row]
    chosen = np.zeros((rows, rows), np.bool_)
    for shift in shifts:
        chosen[np.arange(rows), column_of[(np.arange(rows) + shift) % rows]] = True

    return Case(f"tiles{tile}x{per_row}", f"{per_row} random {tile} x {tile} tiles in every row and column of tiles",
                P.block_mask(chosen, (tile, tile)), _blocks_of(chosen, tile))  # fmt: skip


def random_tiles(n: int, chance: float = 0.125, tile: int = 128, seed: int = 0) -> Case:
    """Whole tiles that chance has chosen one by one: rows of unequal length, whose keys lie anywhere."""
    rows = -(-n // tile)
    chosen = np.random.default_rng(seed).random((rows, rows)) < chance
    return Case(f"random{tile}", f"each {tile} x {tile} tile with a chance of {chance:g}", P.block_mask(chosen, tile),
                _blocks_of(chosen, tile))  # fmt: skip


def half_in_one_row(n: int, tile: int = 128, seed: int = 0) -> tuple[Case, Case]:
    """Two masks of about as many random whole tiles: all of one row block and one in every other; two in each."""
    rng, rows = np.random.default_rng(seed), -(-n // tile)
    column_of = rng.permutation(rows)
    even = np.zeros((rows, rows), np.bool_)
    uneven = np.zeros((rows, rows), np.bool_)
    even[np.arange(rows), column_of] = even[np.arange(rows), np.roll(column_of, 1)] = True
    uneven[np.arange(rows), column_of] = True
    uneven[rows // 3] = True
    return (Case("half_in_one_row", f"all in one {tile}-block of rows, one {tile}-block in every other",
                 P.block_mask(uneven, tile), _blocks_of(uneven, tile)),
            Case("even_rows", f"two {tile}-blocks in every {tile}-block of rows", P.block_mask(even, tile),
                 _blocks_of(even, tile)))  # fmt: skip


def _blocks_of(chosen: NDArray[np.bool_], tile: int) -> Callable[[str], MaskMod]:
    """A mask_mod that looks blocks up."""

    def mod(device: str) -> MaskMod:
        import torch

        table = torch.from_numpy(chosen).to(device)
        return lambda b, h, q, k: table[q // tile, k // tile]

    return mod


def causal_window(size: int) -> Case:
    """0 <= q - k < size."""
    return Case(f"causal_win{size}", f"0<=q-k<{size}", P.window(size - 1, 0),
                _plain(lambda q, k: (q >= k) & (q - k < size)), (size - 1, 0))  # fmt: skip


def _plain(mask: Callable[[Any, Any], Any]) -> Callable[[str], MaskMod]:
    """A mask_mod without tables, from a function of q and k."""
    return lambda device: lambda b, h, q, k: mask(q, k)


def _dense() -> tuple[Case, ...]:
    return (
        Case("full", "all", P.full(), _plain(lambda q, k: q >= 0), (-1, -1)),
        Case("causal", "q>=k", P.causal(), _plain(lambda q, k: q >= k), (-1, 0)),
    )


def _windows() -> tuple[Case, ...]:
    return (
        causal_window(1024),
        causal_window(256),
        Case("win_pm256", "abs(q-k)<=256", P.window(256, 256), _plain(lambda q, k: (q - k).abs() <= 256), (256, 256)),
        Case("longformer", "abs(q-k)<=256, or q<64, or k<64", P.longformer(256, 64),
             _plain(lambda q, k: ((q - k).abs() <= 256) | (q < 64) | (k < 64))),
        Case("dilated4_pm1024", "abs(q-k)<=1024 and (q-k)%4==0", P.dilated(1024, 1024, 4),
             _plain(lambda q, k: ((q - k).abs() <= 1024) & ((q - k) % 4 == 0))),
        Case("dilated2_pm512", "abs(q-k)<=512 and (q-k)%2==0", P.dilated(512, 512, 2),
             _plain(lambda q, k: ((q - k).abs() <= 512) & ((q - k) % 2 == 0))),
    )  # fmt: skip


def _strides() -> tuple[Case, ...]:
    return (
        Case("st_strided128", "q>=k and (q-k<128 or (q-k)%128==0)",
             P.causal() & (P.window(127, 0) | P.strided(128)),
             _plain(lambda q, k: (q >= k) & ((q - k < 128) | ((q - k) % 128 == 0)))),
        Case("strided64", "(q-k)%64==0", P.strided(64), _plain(lambda q, k: (q - k) % 64 == 0)),
        Case("strided8", "(q-k)%8==0", P.strided(8), _plain(lambda q, k: (q - k) % 8 == 0)),
        Case("st_fixed128_16", "q>=k and (q//128==k//128 or k%128>=112)", P.causal() & P.fixed(128, 16),
             _plain(lambda q, k: (q >= k) & ((q // 128 == k // 128) | (k % 128 >= 112)))),
    )  # fmt: skip


def _blocks(n: int) -> tuple[Case, ...]:
    def bigbird(device: str) -> MaskMod:
        import torch

        drawn = P.random_blocks(64, 3).table(n, n)
        chosen = np.zeros((len(drawn), -(-n // 64)), np.bool_)
        np.put_along_axis(chosen, drawn, True, axis=1)
        table = torch.from_numpy(chosen).to(device)

        def mod(b: Any, h: Any, q: Any, k: Any) -> Any:
            i, j = q // 64, k // 64
            return ((i - j).abs() <= 1) | (i < 2) | (j < 2) | table[i, j]

        return mod

    text = "64-blocks: 3-block window, first 2 blocks global (rows and columns), 3 random blocks a row"
    return (
        Case("bigbird64", text, P.bigbird(64), bigbird),
        Case("blocked256", "q//256==k//256", P.blocked(256), _plain(lambda q, k: q // 256 == k // 256)),
    )


def _language(n: int) -> tuple[Case, ...]:
    lengths = document_lengths(n)

    def doc_causal(device: str) -> MaskMod:
        import torch

        document = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)).to(device)
        return lambda b, h, q, k: (q >= k) & (document[q] == document[k])

    return (
        Case("doc_causal", f"causal within {len(lengths)} documents of random length",
             P.documents(lengths) & P.causal(), doc_causal),
        Case("sink_win1024", "q>=k and (q-k<1024 or k<4)", P.causal() & (P.sink(4) | P.window(1023, 0)),
             _plain(lambda q, k: (q >= k) & ((q - k < 1024) | (k < 4)))),
        Case("prefix_lm1024", "q>=k or k<1024", P.prefix(1024), _plain(lambda q, k: (q >= k) | (k < 1024))),
    )  # fmt: skip


def document_lengths(n: int, count: int = DOCUMENTS, seed: int = 0) -> list[int]:
    """Lengths of ``count`` documents (fewer where n is shorter) that add up to n: random cuts, each at least 1."""
    count = min(count, n)
    cuts = np.random.default_rng(seed).permutation(np.arange(1, n))[: count - 1]
    return [int(x) for x in np.diff([0, *np.sort(cuts), n])]
