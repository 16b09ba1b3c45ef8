"""The consumer of kernels that prune scores: between mask and softmax half of them are kept, and PV is sparse."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from splatc.codegen.hopper.consumer import Consumer
from splatc.codegen.hopper.emit import Expr
from splatc.codegen.hopper.products import SparseOutput
from splatc.codegen.hopper.prune import Pruner
from splatc.codegen.hopper.softmax import mask_values


class PruningConsumer(Consumer):
    """A warpgroup that computes 64 rows of every row tile, from the largest two of every four scores, or one of two."""

    out: SparseOutput

    def run(self) -> None:
        assert self.s.score.pruning is not None
        self.pruner = Pruner(self.s.n, self.block.lane, self.s.score.pruning)
        super().run()

    def mask(self) -> None:
        mask_values(self.scores.s, self.scores.count, self.words, self.pruner.masked)

    def prune(self, masked: Expr | bool) -> None:
        self.pruner.prune(self.scores.s, masked)

    def take(self) -> None:
        super().take()
        self.pruner.finish(self.out.words)
