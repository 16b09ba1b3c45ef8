"""Rings: circular buffers in shared memory, each stage behind a full and an empty mbarrier."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from tvm.script import tirx as T

from splatc.codegen.hopper.emit import Cell, Expr, do, when
from splatc.codegen.hopper.shared_memory import SharedMemory

EVERY_LANE = False  # whether all threads arrive at barriers, not one for many: docs/decisions/35-racecheck.md


def of_warps(count: int) -> int:
    """Arrivals of so many warps."""
    return count * 32 if EVERY_LANE else count


def of_warpgroups(count: int) -> int:
    """Arrivals of so many warpgroups."""
    return of_warps(4 * count) if EVERY_LANE else count


def speaks(first: Expr) -> Expr:
    """Whether a thread arrives for those that have met it before: where it is the first of them."""
    return T.bool(True) if EVERY_LANE else first


class Ring:
    """``stages`` slots that a producer fills and consumers empty.

    A slot's full barrier counts the arrivals of ``writers`` (one of them with the bytes that bulk copies will bring);
    its empty barrier those of ``readers``.
    """

    def __init__(self, pool: SharedMemory, stages: int, readers: int, writers: int = 1) -> None:
        self.stages = stages
        self._readers, self._writers = readers, writers
        self._full = pool.alloc((stages,), "uint64", align=8)
        self._empty = pool.alloc((stages,), "uint64", align=8)

    def init(self) -> None:
        """Set the barriers up: one thread, before the first use."""
        for stage in range(self.stages):
            do(T.ptx.mbarrier.init.shared.b64(self._full.ptr_to([stage]), T.uint32(self._writers)))
            do(T.ptx.mbarrier.init.shared.b64(self._empty.ptr_to([stage]), T.uint32(self._readers)))

    def full(self, stage: Expr) -> Expr:
        """The full barrier of a stage: where copies report."""
        return self._full.ptr_to([stage])

    def empty(self, stage: Expr) -> Expr:
        """The empty barrier of a stage."""
        return self._empty.ptr_to([stage])

    def expect(self, stage: Expr, size: Expr) -> None:
        """Arrive on the full barrier and announce ``size`` bytes of copies."""
        do(T.ptx.mbarrier.arrive.expect_tx.shared.b64(self._full.ptr_to([stage]), size))

    def fill(self, stage: Expr) -> None:
        """Arrive on the full barrier without copies."""
        do(T.ptx.mbarrier.arrive.shared.b64(self._full.ptr_to([stage])))

    def release(self, stage: Expr, only: Expr | None = None) -> None:
        """Arrive on the empty barrier (where ``only`` holds): this reader is done with the stage."""
        pointer = self._empty.ptr_to([stage])
        arrive = T.ptx.mbarrier.arrive.shared.b64
        do(arrive(pointer) if only is None else arrive(pointer, pred=only))

    def fill_by_warp(self, stage: Expr, lane: Expr) -> None:
        """The same, of a warp whose lanes have met: one of them says so for all."""
        with when(speaks(T.EQ(lane, 0))):
            self.fill(stage)

    def release_by_warp(self, stage: Expr, lane: Expr) -> None:
        """Of a warp whose lanes have met: one of them says for all that it is done with the stage."""
        self.release(stage, only=speaks(T.EQ(lane, 0)))

    def wait_full(self, at: Cursor) -> None:
        do(T.cuda.mbarrier_wait(self._full.ptr_to([at.stage()]), at.phase()))

    def wait_empty(self, at: Cursor) -> None:
        do(T.cuda.mbarrier_wait(self._empty.ptr_to([at.stage()]), at.phase()))

    def producer(self, name: str) -> Cursor:
        """A cursor for filling: the first round waits for nobody."""
        return Cursor(name, self.stages, 1)

    def consumer(self, name: str) -> Cursor:
        """A cursor for reading."""
        return Cursor(name, self.stages, 0)


class Cursor:
    """A place in a ring: its stage, and the parity that its barriers show when the stage is ready."""

    def __init__(self, name: str, stages: int, phase: int) -> None:
        self._stages = stages
        self.stage = Cell(f"{name}_stage", 0)
        self.phase = Cell(f"{name}_phase", phase)

    def advance(self) -> None:
        """On to the next stage."""
        if self._stages == 1:
            self.phase.set(T.bitwise_xor(self.phase(), 1))
            return
        self.stage.set(self.stage() + 1)
        with when(T.EQ(self.stage(), self._stages)):
            self.stage.set(0)
            self.phase.set(T.bitwise_xor(self.phase(), 1))
