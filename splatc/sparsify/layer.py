"""A layer that attends to everything until it is told by which blocks."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray

from splatc.errors import InvalidInput, Unsupported
from splatc.nn import SparseAttention
from splatc.nn.any_length import any_length
from splatc.nn.module import SHOWN
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

    The blocks are part of ``state_dict``, and are for one length (or others with as many blocks). ``pattern`` and
    prune_to are given when a layer is made, as sizes are: loading blocks that belong to others raises InvalidInput
    (older checkpoints do not say). Switched "zero" layers do not trace under ``torch.compile(fullgraph=True)``; without
    fullgraph they run eagerly.
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
        self.paused = False  # whether calls are left out while watched
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
        self._seen, self.paused = MeanMap(per_head), False

    def watched(self) -> torch.Tensor | None:
        """The mean attention since `watch`, of all calls, batch entries and heads (or of each head), float32 (q_len,
        kv_len) or (heads, q_len, kv_len); None if there was no call. Padding does not count: see `mean_attention`.
        Processes of ``torch.distributed`` share their calls, however many each had; all of them have to ask."""
        seen, self._seen = self._seen, None
        return None if seen is None else seen.mean()

    def unwatch(self) -> None:
        """Forget what was added up since `watch`."""
        self._seen = None

    def _run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, return_lse: bool,
             padding: torch.Tensor | None) -> Any:  # fmt: skip
        turned = self._attend.layout == "bshd"
        if self._seen is not None and not self.paused:
            rows, keys = (x.transpose(1, 2) if turned else x for x in (q, k))
            self._seen.add(rows, keys, None if self.pattern == full() else self.pattern, self.scale, padding)
        if self.blocks is None or self.prune_to != "zero":
            return super()._run(q, k, v, return_lse, padding)
        o, lse = super()._run(q, k, v, True, padding)
        pruned = self._pruned_in(q, k, padding)
        o, lse = prune_to_zero(o.transpose(1, 2) if turned else o, lse, pruned)
        o = o.transpose(1, 2) if turned else o
        return (o, lse) if return_lse else o

    def _pruned_in(self, q: torch.Tensor, k: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
        """How many entries each row has lost, as `prune_to_zero` takes it. Padding has none to lose."""
        at = 2 if self._attend.layout == "bhsd" else 1
        q_len, kv_len = q.shape[at], k.shape[at]
        key = q_len, kv_len, q.device, padding is None
        if key not in self._pruned:
            lost: NDArray[Any] = (
                pruned_counts(self.base, self.pattern, q_len, kv_len, self.num_heads) if padding is None
                else (self.base & ~self.pattern).dense(q_len, kv_len).reshape(-1, q_len, kv_len)
            )  # fmt: skip
            self._pruned[key] = torch.from_numpy(lost).to(q.device)
        pruned = self._pruned[key]
        if padding is None:
            return pruned
        with torch.autocast(q.device.type, enabled=False):  # numbers up to kv_len
            return (pruned.float() @ (~padding).float().mT).movedim(-1, 0)

    def get_extra_state(self) -> torch.Tensor:
        """The blocks and what they change, int32: nothing while dense, else the numbers of block matrices (1 or heads)
        and of their rows n; those matrices, with the side of a block where it attends and 0 elsewhere; the bytes of
        what the layer was made with. One tensor, as some formats of checkpoints know nothing else."""
        if self.blocks is None:
            return torch.zeros(0, dtype=torch.int32)
        heads = self.blocks.heads if isinstance(self.blocks, PerHead) else (self.blocks,)
        each = [torch.from_numpy(one.matrix * one.size[0]).int() for one in heads if isinstance(one, BlockMatrix)]
        parts = torch.tensor([len(each), len(each[0])]), *map(torch.flatten, each), torch.tensor([*self._made.encode()])
        return torch.cat(parts).int()

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Switch to saved blocks, or back to none. Raises InvalidInput for those of a layer that was made otherwise."""
        if state.numel() == 0:
            self.switch(None)
            return
        if state.ndim == 1:  # else of an older version: the matrices alone
            heads, n = state[:2].tolist()
            made = bytes(state[2 + heads * n * n :].tolist()).decode()
            if made != self._made:
                raise InvalidInput(f"these blocks are of a SpionAttention with {made:.{SHOWN}} and this one has "
                                   f"{self._made:.{SHOWN}}: make it with the same")  # fmt: skip
            state = state[2 : 2 + heads * n * n].view(heads, n, n)
        size, masks = int(state.max()), state.cpu().numpy() > 0
        each = [block_mask(mask, size) for mask in masks]
        self.switch(each[0] if len(each) == 1 else per_head(each))

    @property
    def _made(self) -> str:
        """What else decides what blocks mean."""
        return f"prune_to={self.prune_to}, pattern={self.base}"

    def extra_repr(self) -> str:
        return super().extra_repr() + (", prune_to=zero" if self.prune_to == "zero" else "")


def _check_blocks(pattern: Pattern, heads: int) -> None:
    """InvalidInput unless a pattern is of square blocks, for all heads of one size and number."""
    each = heads_of(pattern, heads)
    sizes = {(*one.size, *one.shape) for one in each if isinstance(one, BlockMatrix) and one.size[0] == one.size[1]}
    if len(sizes) != 1 or not all(isinstance(one, BlockMatrix) for one in each):
        raise InvalidInput(f"{pattern} is no block_mask of square blocks of one size: give find_pattern(...).pattern")
