"""Orders of the rows and columns of an irregular mask in which what belongs together lies together.

Two ways: clusters of alike rows, after SMaT (arXiv:2408.11551), and reverse Cuthill-McKee, which makes a narrow band of
what is one. Whether an order pays is for a cover to say (splatc/reordered.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from splatc.formats.strips import Ints

Bool = NDArray[np.bool_]


def clusters(matrix: Bool, size: int) -> Ints:
    """An order of the rows, int64 (rows,), in which each ``size`` are as alike as a greedy search finds them.

    A group is a row and the size - 1 others that are nearest to it by the Jaccard distance of what they have,
    1 - |both| / |either|; equal ones by place. The next group begins with the row that came nearest to this one without
    a place in it. Takes rows / size products of the sparse matrix and a row.
    """
    from scipy.sparse import csr_matrix

    rows: Any = csr_matrix(matrix, dtype=np.float32)
    counts = matrix.sum(1).astype(np.float32)
    left = np.ones(len(matrix), bool)
    order: list[Ints] = []
    seed = 0
    while left.any():
        both = rows @ matrix[seed].astype(np.float32)
        either = counts + counts[seed] - both
        near = np.where(either > 0, both / np.maximum(either, 1), 1.0)  # two empty rows are alike
        near[seed] = 2
        rest = np.flatnonzero(left)
        ranked = rest[np.argsort(-near[rest], kind="stable")]
        order.append(ranked[:size])
        left[ranked[:size]] = False
        seed = int(ranked[size]) if len(ranked) > size else 0
    return np.concatenate(order).astype(np.int64)


def cluster_both(matrix: Bool, size_q: int, size_k: int) -> tuple[Ints, Ints]:
    """Orders of rows and of columns: clusters of rows, then of columns by the groups of rows that have them."""
    rows = clusters(matrix, size_q)
    starts = np.arange(0, len(rows), size_q)
    groups = np.logical_or.reduceat(matrix[rows], starts, axis=0)
    return rows, clusters(np.ascontiguousarray(groups.T), size_k)


def band(matrix: Bool) -> Ints:
    """The reverse Cuthill-McKee order of a square matrix, for rows and columns alike, int64 (rows,)."""
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import reverse_cuthill_mckee

    return np.asarray(reverse_cuthill_mckee(csr_matrix(matrix | matrix.T), symmetric_mode=True), np.int64)


def band_both(matrix: Bool) -> tuple[Ints, Ints]:
    """Orders of rows and of columns, each its own: reverse Cuthill-McKee of the graph in which rows are linked to the
    columns that they have."""
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import reverse_cuthill_mckee

    count = matrix.shape[0]
    rows, cols = np.nonzero(matrix)
    ends = np.concatenate([rows, cols + count]), np.concatenate([cols + count, rows])
    links = csr_matrix((np.ones(len(ends[0]), bool), ends), shape=(sum(matrix.shape), sum(matrix.shape)))
    order = np.asarray(reverse_cuthill_mckee(links, symmetric_mode=True), np.int64)
    return order[order < count], order[order >= count] - count
