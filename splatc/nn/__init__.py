"""splatc in PyTorch's terms: a module, and the function behind it. Importing this package imports torch.

SparseAttention     a layer: projections and attention over a pattern
SparseKAttention    a layer: a window, and the keys beyond it that a learned score keeps
functional          ``sparse_attention(q, k, v, pattern)``

SparseAttention and the function take any length, dtype and device without being made again, and trace under
``torch.compile(fullgraph=True, dynamic=True)``. Results and gradients are equal bit by bit from run to run, whatever
``torch.use_deterministic_algorithms`` says: there is no other kernel to choose.
"""

from splatc.nn import functional
from splatc.nn.module import SparseAttention
from splatc.nn.sparsek import SparseKAttention

__all__ = ["SparseAttention", "SparseKAttention", "functional"]
