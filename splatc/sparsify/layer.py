"""A layer that attends to everything until it is told by which blocks."""

from __future__ import annotations

from typing import Any

import torch

from splatc.errors import InvalidInput, Unsupported
from splatc.nn import SparseAttention
from splatc.nn.any_length import any_length
from splatc.patterns import Pattern, PerHead, block_mask, full, heads_of, per_head
from splatc.patterns.blocks import BlockMatrix
from splatc.sparsify.scores import MeanMap
from splatc.sparsify.zero import prune_to_zero, pruned_counts

PRUNE_TO = ("-inf", "zero")


class SpionAttention(SparseAttention):
    """`splatc.nn.SparseAttention` that begins with ``pattern``, by default everything, and is later switched to blocks:
    by hand (``switch``) or by a `SpionSchedule`.

        layer = SpionAttention(64, 2)
        y = layer(x)                              # dense
        layer.switch(find_pattern(scores).pattern)
        y = layer(x)                              # the same parameters, by blocks

    prune_to says what becomes of entries that ``pattern`` has and the blocks have not. "-inf": they are masked, as
    everywhere in splatc, and what is left sums to one. "zero": they stay in the denominator of the softmax with the
    score 0, as in SPION's public code, so that rows sum to less than one; see `splatc.sparsify.zero.prune_to_zero`.

    The blocks are part of ``state_dict``, and are for one length (or others with as many blocks). Switched
    "zero" layers do not trace under ``torch.compile(fullgraph=True)``; without fullgraph they run eagerly.
    """

    def __init__(self, embed_dim: int, num_heads: int, pattern: Any = "full()", *, prune_to: str = "-inf",
                 **options: Any) -> None:  # fmt: skip
        """options: of `SparseAttention`, but for what changes scores (softcap, alibi, relative_bias, sinks): the maps
        that patterns are found in do without. Raises Unsupported for these, InvalidInput for other wrong ones."""
        for name in ("softcap", "alibi", "relative_bias", "sinks"):
            if options.get(name):
                raise Unsupported(f"SpionAttention has no {name}: its maps are of plain scores; leave it out")
        if prune_to not in PRUNE_TO:
            raise InvalidInput(f"prune_to is {prune_to!r}: it must be one of {', '.join(PRUNE_TO)}")
        super().__init__(embed_dim, num_heads, pattern, **options)
        self.prune_to = prune_to
        self.base = self.pattern
        self.blocks: Pattern | None = None
        self._seen: MeanMap | None = None
        self._pruned: dict[Any, torch.Tensor] = {}

    def switch(self, blocks: Pattern | None) -> None:
        """Attend by these blocks from now on, where ``base`` attends; None: be dense again. blocks: a `block_mask` with
        square blocks, or `per_head` of such, all of one size. Parameters, and so the optimizer's state, are untouched.
        """
        if blocks is not None:
            _check_blocks(blocks, self.num_heads)
        whole = self.base == full()
        pattern = self.base if blocks is None else blocks if whole else self.base & blocks
        old = self._attend
        self._attend = any_length(pattern, old.layout, old.softcap, old.allow_tf32, old.seq_len)
        self.blocks = blocks
        self._pruned = {}

    def set_pattern(self, pattern: Any) -> None:
        """Attend by another pattern from now on, all of it: as a layer that was made with it, and not switched."""
        super().set_pattern(pattern)
        self.base, self.blocks, self._pruned = self.pattern, None, {}

    def watch(self, per_head: bool = False) -> None:
        """Add up what is attended to in the calls from now on, until `watched`."""
        self._seen = MeanMap(per_head)

    def watched(self) -> torch.Tensor | None:
        """The mean attention since `watch`, of all calls, batch entries and heads (or of each head), float32 (q_len,
        kv_len) or (heads, q_len, kv_len); None if there was no call."""
        seen, self._seen = self._seen, None
        return None if seen is None else seen.mean()

    def _run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, return_lse: bool) -> Any:
        turned = self._attend.layout == "bshd"
        if self._seen is not None:
            rows, keys = (x.transpose(1, 2) if turned else x for x in (q, k))
            self._seen.add(rows, keys, None if self.pattern == full() else self.pattern, self.scale)
        if self.blocks is None or self.prune_to != "zero":
            return super()._run(q, k, v, return_lse)
        o, lse = super()._run(q, k, v, True)
        pruned = self._pruned_in(q, k)
        o, lse = prune_to_zero(o.transpose(1, 2) if turned else o, lse, pruned)
        o = o.transpose(1, 2) if turned else o
        return (o, lse) if return_lse else o

    def _pruned_in(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        at = 2 if self._attend.layout == "bhsd" else 1
        key = q.shape[at], k.shape[at], q.device
        if key not in self._pruned:
            counts = pruned_counts(self.base, self.pattern, q.shape[at], k.shape[at], self.num_heads)
            self._pruned[key] = torch.from_numpy(counts).to(q.device)
        return self._pruned[key]

    def get_extra_state(self) -> torch.Tensor:
        """The blocks: int32 (1 or heads, n, n), the side of a block where it attends and 0 elsewhere; nothing while
        dense. One tensor, as some formats of checkpoints know nothing else."""
        if self.blocks is None:
            return torch.zeros(0, dtype=torch.int32)
        heads = self.blocks.heads if isinstance(self.blocks, PerHead) else (self.blocks,)
        each = [torch.from_numpy(one.matrix * one.size[0]).int() for one in heads if isinstance(one, BlockMatrix)]
        return torch.stack(each)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Switch to saved blocks, or back to none."""
        if state.numel() == 0:
            self.switch(None)
            return
        size, masks = int(state.max()), state.cpu().numpy() > 0
        each = [block_mask(mask, size) for mask in masks]
        self.switch(each[0] if len(each) == 1 else per_head(each))

    def extra_repr(self) -> str:
        return super().extra_repr() + (", prune_to=zero" if self.prune_to == "zero" else "")


def _check_blocks(pattern: Pattern, heads: int) -> None:
    """InvalidInput unless a pattern is of square blocks, for all heads of one size and number."""
    each = heads_of(pattern, heads)
    sizes = {(*one.size, *one.shape) for one in each if isinstance(one, BlockMatrix) and one.size[0] == one.size[1]}
    if len(sizes) != 1 or not all(isinstance(one, BlockMatrix) for one in each):
        raise InvalidInput(f"{pattern} is no block_mask of square blocks of one size: give find_pattern(...).pattern")
