"""The consumer of kernels that prune scores 2:4: between mask and softmax two of four are kept, and PV is sparse."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from splatc.codegen.hopper.consumer import Consumer
from splatc.codegen.hopper.emit import Expr, emit_if
from splatc.codegen.hopper.products import SparseOutput
from splatc.codegen.hopper.prune import MASKED, Pruner
from splatc.codegen.hopper.softmax import mask_values


class PruningConsumer(Consumer):
    """A warpgroup that computes 64 rows of every row tile, from the largest two of every four scores."""

    out: SparseOutput

    def run(self) -> None:
        self.pruner = Pruner(self.s.n, self.block.lane)
        super().run()

    def mask(self) -> None:
        mask_values(self.scores.s, self.scores.count, self.words, MASKED)

    def prune(self, masked: Expr | bool) -> None:
        self.pruner.select(self.scores.s)
        self.pruner.encode(self.scores.s)
        emit_if(masked, lambda: self.pruner.unmask(self.scores.s))

    def take(self) -> None:
        super().take()
        self.pruner.finish(self.out.words)
