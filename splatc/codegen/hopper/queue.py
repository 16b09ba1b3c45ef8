"""Which row tile a block computes next: a dynamic queue over the rows of a launch's work (runtime/work.py)."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from tvm.script import tirx as T

from splatc.codegen.hopper.emit import Cell, Expr, do, let, store, when


class Queue:
    """``total`` numbers handed out to ``blocks`` blocks: the first to each by its index, the others by a counter.

    counter: int32 (2) in global memory, zero before the launch; the last block to finish zeroes it again.
    """

    def __init__(self, counter: Expr, block: Expr, blocks: Expr) -> None:
        self._counter, self._blocks = counter, blocks
        self.number = Cell("number", block)

    def take(self) -> None:
        """The next number: one thread."""
        self.number.set(T.cuda.atomic_add(self._counter.ptr_to([0]), T.int32(1)) + self._blocks)

    def close(self) -> None:
        """Say that this block takes no more: the last one resets the counter."""
        do(T.cuda.thread_fence())
        finished = let("finished", T.cuda.atomic_add(self._counter.ptr_to([1]), T.int32(1)))
        with when(T.EQ(finished, self._blocks - 1)):
            store(self._counter, 0, 0)
            store(self._counter, 1, 0)
