"""SPION's rules as they are published, one cell after the other: slow, and what `splatc.sparsify.spion` must equal."""

from __future__ import annotations

import numpy as np


def filtered(scores: np.ndarray, length: int) -> list[list[float]]:
    """A filter with ones on its main diagonal, zeros beyond the map."""
    n, reach = len(scores), length // 2
    out = [[0.0] * n for _ in range(n)]
    for i in range(n):
        for j in range(n):
            for t in range(-reach, reach + 1):
                if 0 <= i + t < n and 0 <= j + t < n:
                    out[i][j] += float(scores[i + t, j + t])
    return out


def pooled(cells: list[list[float]], block: int) -> np.ndarray:
    """The mean of each block; blocks at the end may be smaller."""
    n = len(cells)
    edges = range(0, n, block)
    out = np.zeros((len(edges), len(edges)))
    for a, i in enumerate(edges):
        for b, j in enumerate(edges):
            inside = [x for row in cells[i : i + block] for x in row[j : j + block]]
            out[a, b] = sum(inside) / len(inside)
    return out


def flood(means: np.ndarray, threshold: float) -> set[tuple[int, int]]:
    """From every cell of the first row, then of the first column: step to the largest of down, right and diagonal."""
    n = len(means)
    padded = np.zeros((n + 1, n + 1))
    padded[:n, :n] = means
    marked = set()
    for x, y in [(0, y) for y in range(n)] + [(x, 0) for x in range(n)]:
        while x < n and y < n:
            down, right, diagonal = padded[x + 1, y], padded[x, y + 1], padded[x + 1, y + 1]
            if down > right and down > diagonal:
                x = x + 1
            elif right > down and right > diagonal:
                y = y + 1
            else:
                x, y = x + 1, y + 1
            if padded[x, y] > threshold:
                marked.add((x, y))
    return marked


def blocks(scores: np.ndarray, block: int, quantile: float, length: int, variant: str) -> np.ndarray:
    """The pattern of a variant, bool (n, n)."""
    means = pooled(filtered(scores, length) if "C" in variant else scores.tolist(), block)
    n = len(means)
    if variant == "C":
        density = 1 - quantile + 1 / n
        order = sorted((-means[x, y], x, y) for x in range(n) for y in range(n))
        marked = {(x, y) for _, x, y in order[: max(int(round(density * n * n - n, 6)), 0)]}
    else:
        threshold = float(np.quantile(means, quantile))
        every = {(x, y) for x in range(n) for y in range(n) if means[x, y] > threshold}
        marked = flood(means, threshold) if "F" in variant else every
    out = np.zeros((n, n), bool)
    for x, y in marked | {(x, x) for x in range(n)}:
        out[x, y] = True
    return out
