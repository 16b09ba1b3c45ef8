"""Patterns: what a query attends to, as symbolic boolean functions of (q, k) that combine with & | ~."""

from splatc.patterns.base import And, Lines, Not, Or, Pattern, Transposed, transpose
from splatc.patterns.blocks import BigBird as bigbird
from splatc.patterns.blocks import Blocked as blocked
from splatc.patterns.blocks import BlockWindow as block_window
from splatc.patterns.blocks import RandomBlocks as random_blocks
from splatc.patterns.blocks import block_mask
from splatc.patterns.heads import PerBatch, PerHead, heads_of, per_batch, per_head
from splatc.patterns.importers import as_pattern, from_mask_mod, load_mask, parse_or_load
from splatc.patterns.library import Causal as causal
from splatc.patterns.library import Dilated as dilated
from splatc.patterns.library import Fixed as fixed
from splatc.patterns.library import Full as full
from splatc.patterns.library import GlobalCols as global_cols
from splatc.patterns.library import GlobalRows as global_rows
from splatc.patterns.library import Longformer as longformer
from splatc.patterns.library import Prefix as prefix
from splatc.patterns.library import Sink as sink
from splatc.patterns.library import Strided as strided
from splatc.patterns.library import Window as window
from splatc.patterns.library import documents
from splatc.patterns.matrix import Matrix, Sparse, mask
from splatc.patterns.neighborhood import after, neighborhood
from splatc.patterns.pruned import Pruned, nm
from splatc.patterns.text import parse

__all__ = [
    "And",
    "Lines",
    "Matrix",
    "Not",
    "Or",
    "Pattern",
    "PerBatch",
    "PerHead",
    "Pruned",
    "Sparse",
    "Transposed",
    "after",
    "as_pattern",
    "bigbird",
    "block_mask",
    "block_window",
    "blocked",
    "causal",
    "dilated",
    "documents",
    "fixed",
    "from_mask_mod",
    "full",
    "global_cols",
    "global_rows",
    "heads_of",
    "load_mask",
    "longformer",
    "mask",
    "neighborhood",
    "nm",
    "parse",
    "parse_or_load",
    "per_batch",
    "per_head",
    "prefix",
    "random_blocks",
    "sink",
    "strided",
    "transpose",
    "window",
]
