"""The producer of kernels with lists of keys: a warpgroup that copies the listed rows of K and V, 16 bytes a thread."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as I

from splatc.codegen.hopper.copies import Point, commit_copies, gather_rows, wait_copies
from splatc.codegen.hopper.emit import Cell, Expr, do, let, store, when
from splatc.codegen.hopper.producer import Producer
from splatc.codegen.hopper.shape import TEAM

TEAM_BARRIER = 7


class GatheringProducer(Producer):
    """All threads of the warpgroup walk through the tiles; thread 0 does what a lone producer does.

    A stage of K or V is full when every thread has arrived on its barrier. Copies of one stage run while those of the
    stage before are waited for: K of a tile is reported after V of it is asked for, V after K of the next tile is.
    """

    def run(self) -> None:
        self.thread = let("team_thread", self.block.warp * 32 + self.block.lane)
        self.start()
        self.late_stage = Cell("late_stage", -1)  # of V: asked for and not reported
        self.announce_next()
        with I.While(self.queue.number() < self.a.total):
            self.sync_team()  # everybody reads what thread 0 has told
            self.row_tile()
        wait_copies(0)
        self.report_late()
        self.tell_end()

    def leads(self) -> Expr:
        return T.EQ(self.thread, 0)

    def take(self) -> None:
        with when(self.leads()):
            super().take()

    def fetch_next(self) -> None:
        """Not before it is needed: these threads have no registers to spare."""

    def announce_next(self) -> None:
        number, shared = self.queue.number, self.block.next_row
        if self.s.q_stages == 1:  # Q's place is free when consumers have had all of V
            wait_copies(0)
            self.report_late()
            self.late_stage.set(-1)
        with when(self.leads()):
            store(shared, 0, number())
        self.sync_team()
        number.set(shared[0])
        super().fetch_next()
        super().announce_next()

    def sync_team(self) -> None:
        do(T.ptx.bar.sync(T.uint32(TEAM_BARRIER), T.uint32(TEAM)))

    def column_tile(self, view: Expr, at: Point, bits: Expr) -> None:
        b, s, a = self.block, self.s, self.a
        stage = self.kv_at.stage()
        boxed = view >= 0
        ahead = not s.positional and s.d == s.dv  # else registers are spoken for
        b.k_ring.wait_empty(self.kv_at)
        with when(self.leads()):
            self.k_box(view, at, bits, T.if_then_else(boxed, T.int32(s.k_bytes), T.int32(0)))
        with when(view < 0):
            gather_rows(a.k_rows, a.gather, at, b.k, stage * (s.k_bytes // s.item_bytes), s.n, self.thread, ahead)
        commit_copies()
        wait_copies(1)
        self.report_late()
        b.v_ring.wait_empty(self.kv_at)
        with when(self.leads()):
            self.v_box(view, at, T.if_then_else(boxed, T.int32(s.v_bytes), T.int32(0)))
        with when(view < 0):
            gather_rows(a.v_rows, a.gather, at, b.v, stage * (s.v_bytes // s.item_bytes), s.n, self.thread, ahead)
        commit_copies()
        wait_copies(1)
        b.k_ring.fill(stage)
        self.late_stage.set(stage)
        self.kv_at.advance()

    def report_late(self) -> None:
        """V of the tile before has arrived."""
        with when(self.late_stage() >= 0):
            self.block.v_ring.fill(self.late_stage())
