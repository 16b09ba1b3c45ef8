"""SparseScores: a number for each element of a mask, and its forms elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from splatc.errors import InvalidInput
from splatc.patterns.importers import as_pattern
from splatc.patterns.matrix import sparse_from_pairs
from splatc.runtime.structure import Structure, structure_of
from splatc.runtime.tensors import dtype_name, is_torch

if TYPE_CHECKING:
    import scipy.sparse


@dataclass(frozen=True, eq=False)
class SparseScores:
    """Scores or probabilities of the pairs that a mask holds, in ACSR order: by query, then by key.

    values: (batch, heads, nnz), a torch tensor or a NumPy array; with a pattern for each head, whose numbers of
    elements differ, (batch, total), the heads one after the other (``head`` gives one of them). Nothing is padded, and
    no index is stored for an element: ``structure`` has the pattern and the lengths.
    """

    values: Any
    structure: Structure

    def __post_init__(self) -> None:
        shape = tuple(self.values.shape)
        wanted = self.structure.values_shape(shape[0] if shape else 1, self.heads)
        if shape != wanted:
            raise InvalidInput(f"values have shape {shape}: for {self.structure.pattern} it must be {wanted}")

    @property
    def batch(self) -> int:
        return int(self.values.shape[0])

    @property
    def heads(self) -> int:
        return len(self.structure.of_head or ()) or (int(self.values.shape[1]) if self.values.ndim > 1 else 1)

    @property
    def q_len(self) -> int:
        return self.structure.q_len

    @property
    def kv_len(self) -> int:
        return self.structure.kv_len

    @property
    def dtype(self) -> str:
        """"float32", "float64", "float16" or "bfloat16"."""
        return dtype_name(self.values)

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return int(self.values.nbytes)

    def elements(self, head: int = 0) -> tuple[Any, Any]:
        """(q, k) of a head's values, int64: O(nnz), made at each call."""
        return self.structure.order(self._head(head)).elements()

    def head(self, head: int) -> Any:
        """The values of one head, (batch, its nnz), without a copy."""
        begin, end = self.structure.bases(self.heads)[self._head(head) :][:2].tolist()
        return self.values[:, begin:end] if self.structure.of_head else self.values[:, head]

    def with_values(self, values: Any) -> SparseScores:
        """Other values of the same structure."""
        return replace(self, values=values)

    # -- conversions ---------------------------------------------------------------------------------------------------

    def to_dense(self, fill: float = 0.0) -> Any:
        """(batch, heads, q_len, kv_len), ``fill`` where the mask holds nothing; differentiable for torch."""
        shape = self.batch, self.heads, self.q_len, self.kv_len
        out = self.values.new_full(shape, fill) if is_torch(self.values) else np.full(shape, fill, self.values.dtype)
        for h in range(self.heads):
            q, k = self.elements(h)
            out[:, h, q, k] = self.head(h)
        return out

    @staticmethod
    def from_dense(dense: Any, mask: Any) -> SparseScores:
        """The elements of a mask (whatever ``splatc.compile`` takes) of dense (batch, heads, q_len, kv_len)."""
        if dense.ndim != 4:
            raise InvalidInput(f"dense has shape {tuple(dense.shape)}: it must be (batch, heads, q_len, kv_len)")
        batch, heads, q_len, kv_len = (int(n) for n in dense.shape)
        pattern = as_pattern(mask, q_len=q_len, kv_len=kv_len, heads=heads)
        structure = structure_of(pattern, q_len, kv_len)
        parts = []
        for h in range(heads):
            q, k = structure.order(h).elements()
            parts.append(dense[:, h, q, k])
        if is_torch(dense):
            import torch

            return SparseScores(torch.cat(parts, 1).reshape(structure.values_shape(batch, heads)), structure)
        return SparseScores(np.concatenate(parts, 1).reshape(structure.values_shape(batch, heads)), structure)

    def to_scipy(self, batch: int = 0, head: int = 0) -> scipy.sparse.csr_array:
        """One head as a scipy.sparse.csr_array (q_len, kv_len), every element stored; 16 bits become float32."""
        import scipy.sparse

        values, short = self.head(head)[batch], self.dtype in ("bfloat16", "float16")
        if is_torch(values):
            values = values.detach().cpu()
            values = (values.float() if short else values).numpy()
        values = values.astype(np.float32) if short else values
        _, k = self.elements(head)
        return scipy.sparse.csr_array((values, k, self._indptr(head)), shape=(self.q_len, self.kv_len))

    def to_torch(self, batch: int = 0, head: int = 0) -> Any:
        """One head as a torch sparse CSR tensor (q_len, kv_len), every element stored, where the values are."""
        import torch

        values = self.head(head)[batch]
        values = values if is_torch(values) else torch.from_numpy(values)
        _, k = self.elements(head)
        indptr, columns = (torch.from_numpy(x).to(values.device) for x in (self._indptr(head), k))
        return torch.sparse_csr_tensor(indptr, columns, values, size=(self.q_len, self.kv_len), check_invariants=True)

    @staticmethod
    def from_scipy(matrix: Any) -> SparseScores:
        """A scipy.sparse matrix or array (q_len, kv_len), one head of one batch: its entries, zeros among them, are the
        elements; those stored twice are summed."""
        if not hasattr(matrix, "tocsr") or matrix.ndim != 2:
            raise InvalidInput(f"matrix is a {type(matrix).__name__}: give a scipy.sparse matrix or array of two "
                               "dimensions (from_dense takes dense ones)")  # fmt: skip
        csr = matrix.tocsr().copy()
        csr.sum_duplicates()  # and sorts
        return SparseScores(csr.data.reshape(1, 1, -1), _structure_of_csr(csr.indptr, csr.indices, csr.shape))

    @staticmethod
    def from_torch(matrix: Any) -> SparseScores:
        """A torch sparse tensor (q_len, kv_len), CSR, CSC or COO, one head of one batch: its entries, zeros among them;
        those stored twice in COO are summed."""
        import scipy.sparse
        import torch

        sparse = torch.sparse_csr, torch.sparse_csc, torch.sparse_coo
        if not is_torch(matrix) or matrix.layout not in sparse or matrix.ndim != 2 or matrix.dense_dim():
            raise InvalidInput(f"matrix is {_described(matrix)}: give a torch sparse tensor, CSR, CSC or COO, of two "
                               "dimensions (from_dense takes dense ones)")  # fmt: skip
        matrix = matrix.to_sparse_csr()
        indptr, columns = (x.cpu().numpy() for x in (matrix.crow_indices(), matrix.col_indices()))
        number = scipy.sparse.csr_array((np.arange(len(columns)), columns, indptr), shape=tuple(matrix.shape))
        number.sort_indices()
        structure = _structure_of_csr(indptr, number.indices, number.shape)
        values = matrix.values()[torch.from_numpy(number.data).to(matrix.device)]
        return SparseScores(values.reshape(1, 1, -1), structure)

    def _indptr(self, head: int) -> Any:
        return self.structure.order(self._head(head)).indptr

    def _head(self, head: int) -> int:
        if not 0 <= head < self.heads:
            raise InvalidInput(f"head is {head}: there are {self.heads}, counted from 0")
        return head

    def __repr__(self) -> str:
        s = self.structure
        return f"<splatc scores {s.pattern} {s.q_len}x{s.kv_len} {tuple(self.values.shape)} {self.dtype}>"


def _described(x: Any) -> str:
    return f"a tensor {tuple(x.shape)}, {str(x.layout).removeprefix('torch.')}" if is_torch(x) else type(x).__name__


def _structure_of_csr(indptr: Any, columns: Any, shape: tuple[int, int]) -> Structure:
    """The structure of one head's sorted entries."""
    rows = np.repeat(np.arange(shape[0]), np.diff(indptr))
    return structure_of(sparse_from_pairs(rows, columns, *shape), *shape)
