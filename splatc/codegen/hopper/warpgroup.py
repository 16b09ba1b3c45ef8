"""What consumer warpgroups of every kernel do alike: leave stages, meet, and read mask bits."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from splatc.codegen.hopper.emit import Expr, do, let, store
from splatc.codegen.hopper.ring import Cursor, Ring, speaks

OWN = 8  # named barriers from here on: each warpgroup's own


class Warpgroup:
    """A consumer warpgroup of a block; ``me`` is its number among them."""

    def __init__(self, block: Any) -> None:
        self.block, self.s, self.a = block, block.s, block.a
        self.me: Expr = None

    def take_number(self) -> None:
        """Find ``me``, the thread that acts for all, and the one that arrives at barriers for all."""
        self.me = let("consumer", self.block.warpgroup - 1)
        self.leader = T.And(T.EQ(self.block.warp, 0), T.EQ(self.block.lane, 0))
        self.speaker = speaks(self.leader)

    def leave(self, ring: Ring, at: Cursor) -> None:
        """Release a stage, one arrival a warp, and go on."""
        ring.release_by_warp(at.stage(), self.block.lane)
        at.advance()

    def read_bits_of(self, stage: Expr, words: Expr) -> None:
        """words = this thread's mask bits of the tile in a stage."""
        b, count = self.block, self.s.bit_words
        thread = self.me * 128 + b.warp * 32 + b.lane
        at = let("bits_at", stage * (self.s.bits_bytes // 4) + thread * count)
        for w in range(count):
            store(words, w, b.bits[at + w])

    def own_barrier(self) -> None:
        """All threads of this warpgroup."""
        do(T.ptx.bar.sync(T.uint32(OWN) + T.cast(self.me, "uint32"), T.uint32(128)))
