"""A consumer warpgroup: scores, softmax and output of 64 query rows of every row tile."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as I

from splatc.codegen.constants import NEG_INF
from splatc.codegen.hopper.block import BATCH, HEAD, ITEM, MASKED, TILES
from splatc.codegen.hopper.emit import Expr, do, emit_if, let, loop, registers, store, when
from splatc.codegen.hopper.epilogue import merge_weights, stage_output
from splatc.codegen.hopper.products import (
    ScoresOfKept,
    at_stage,
    descriptor,
    hidden,
    output_of,
    scores_of,
    wait_products,
)
from splatc.codegen.hopper.row_tiles import RowTiles
from splatc.codegen.hopper.shape import WARPGROUP_ROWS
from splatc.codegen.hopper.softmax import Softmax, cap_scores, mask_values
from splatc.codegen.hopper.terms import Pairs

TURN = 1  # named barriers from here on: turns of the warpgroups


class Consumer(RowTiles):
    """A warpgroup that computes 64 rows of every row tile."""

    def run(self) -> None:
        b, s, a = self.block, self.s, self.a
        self.take_number()
        self.scores = scores_of(s)
        self.out = output_of(s)
        self.words = registers("mask", s.bit_words, "uint32")
        unit = a.cap if s.softcap else a.scale
        self.softmax = Softmax(s.kept // 2, T.float32(1.0) if s.score.biases else unit)
        if s.positional:
            self.unit = unit
        self.inverse, self.lse, self.old_lse, self.old_weight = (
            registers(name, 2) for name in ("inverse", "row_lse", "old_lse", "old_weight"))  # fmt: skip
        self.q_base = descriptor("q_desc", b.q, self.me * (WARPGROUP_ROWS * s.chunk), 1)
        self.k_base = descriptor("k_desc", b.k, 0, 1)
        self.v_base = descriptor("v_desc", b.v, 0, self.out.leading)
        self.enter_rings()
        self.first_turn()
        self.walk()

    # -- turns: one warpgroup at a time issues its products ------------------------------------------------------------

    def first_turn(self) -> None:
        if self.s.turns:
            with when(T.EQ(self.me, self.s.warpgroups - 1)):
                do(T.ptx.bar.arrive(T.uint32(TURN), T.uint32(256)))

    def wait_turn(self) -> None:
        if self.s.turns:
            do(T.ptx.bar.sync(T.uint32(TURN) + T.cast(self.me, "uint32"), T.uint32(256)))

    def pass_turn(self) -> None:
        if self.s.turns:
            last = T.EQ(self.me, self.s.warpgroups - 1)
            do(T.ptx.bar.arrive(T.Select(last, T.uint32(TURN), T.cast(self.me, "uint32") + T.uint32(TURN + 1)),
                                T.uint32(256)))  # fmt: skip

    # -- a row tile ----------------------------------------------------------------------------------------------------

    def row_tile(self) -> None:
        """O and LSE of 64 rows."""
        b, s = self.block, self.s
        if s.positional:
            self.begin_terms()
        elif not s.wide:
            self.find_rows()  # asked for early, needed at the end
        q = at_stage("q_now", self.q_base, self.q_at.stage(), s.q_slot)
        self.out.clear()
        if isinstance(self.scores, ScoresOfKept):
            self.scores.keep(b.q, self.slot_base(), b.warp, hidden(b.lane, "int32"))
        tiles = let("tiles", b.messages[self.message + TILES])
        masked = let("masked", b.messages[self.message + MASKED])  # tiles with mask bits: they come first
        self.first_tile(q, masked)
        if s.wide or s.positional:  # one loop needs fewer registers
            with loop(tiles - 1) as done:
                self.next_tile(q, masked=done < masked - 1)
        else:
            with loop(masked - 1):
                self.next_tile(q, masked=True)
            with loop(tiles - T.max(masked, 1)):
                self.next_tile(q, masked=False)
        self.read_message()
        self.begin_merge()
        self.last_values()
        self.finish()

    def first_tile(self, q: Expr, masked: Expr) -> None:
        """S of the first tile and its softmax; nothing to overlap with yet."""
        b = self.block
        b.k_ring.wait_full(self.k_at)
        self.scores.issue(q, at_stage("k_now", self.k_base, self.k_at.stage(), self.s.k_bytes))
        emit_if(masked > 0, self.read_bits)
        self.find_columns()
        wait_products(0)
        self.scores.fence()
        self.leave(b.k_ring, self.k_at)
        self.release_last_slot()
        self.cap()
        self.add_biases()
        emit_if(masked > 0, self.mask)
        self.prune(masked > 0)
        self.softmax.first(self.scores.s)
        self.drop()
        self.take()

    def next_tile(self, q: Expr, masked: Expr | bool) -> None:
        """S of a tile and O += P V of the one before, both in flight during the softmax."""
        b, s = self.block, self.s
        b.k_ring.wait_full(self.k_at)
        self.wait_turn()
        self.scores.issue(q, at_stage("k_now", self.k_base, self.k_at.stage(), s.k_bytes))
        b.v_ring.wait_full(self.v_at)
        self.out.issue(at_stage("v_now", self.v_base, self.v_at.stage(), s.v_bytes))
        self.pass_turn()
        emit_if(masked, self.read_bits)
        self.find_columns()
        wait_products(1)
        self.scores.fence()
        self.leave(b.k_ring, self.k_at)
        self.cap()
        self.add_biases()
        emit_if(masked, self.mask)
        self.prune(masked)
        self.softmax.next(self.scores.s)
        self.drop()
        wait_products(0)
        self.out.fence()
        self.scores.fence()
        self.leave(b.v_ring, self.v_at)
        self.take()
        emit_if(self.softmax.moved, lambda: self.out.scale(self.softmax.shrink))

    def last_values(self) -> None:
        """O += P V of the last tile."""
        b = self.block
        b.v_ring.wait_full(self.v_at)
        self.out.issue(at_stage("v_now", self.v_base, self.v_at.stage(), self.s.v_bytes))
        wait_products(0)
        self.out.fence()
        self.leave(b.v_ring, self.v_at)

    def cap(self) -> None:
        """Softcap, where the kernel has it."""
        if self.s.softcap:
            cap_scores(self.scores.s, self.scores.count, self.a.scale / self.a.cap)

    def mask(self) -> None:
        mask_values(self.scores.s, self.scores.count, self.words)

    def prune(self, masked: Expr | bool) -> None:
        """Of a pruned kernel: keep some of the scores. masked: whether some are not in the mask."""

    def take(self) -> None:
        """Probabilities to where the product with V reads them: none may be in flight."""
        self.out.take(self.scores.s)

    # -- expressions that depend on positions --------------------------------------------------------------------------

    def begin_terms(self) -> None:
        """What they need of the row tile's head and of this thread's two rows."""
        b = self.block
        self.find_rows()
        self.terms.begin(b.messages[self.message + BATCH], let("its_head", b.messages[self.message + HEAD]))
        queries = [self.terms.query_side(position) for position in self.position]
        self.pairs = Pairs(self.terms, queries, self.key_of)

    def add_biases(self) -> None:
        """Scores in natural units, with their biases."""
        s = self.scores.s
        if self.s.score.biases:
            pairs = self.pairs.sweep()
            for i in range(self.scores.count):
                store(s, i, pairs.add(i, s[i] * self.unit))

    def drop(self) -> None:
        """Probabilities that dropout takes."""
        s = self.scores.s
        if self.s.score.dropout:
            pairs = self.pairs.sweep()
            for i in range(self.scores.count):
                store(s, i, pairs.kept(i, s[i]))

    # -- its end -------------------------------------------------------------------------------------------------------

    def find_rows(self) -> None:
        """Sequence positions of this thread's two rows."""
        b, a = self.block, self.a
        item = b.messages[self.message + ITEM]
        self.row = let("row", self.me * WARPGROUP_ROWS + b.warp * 16 + b.lane // 4)
        self.position = [let(f"position{r}", a.positions[item, self.row + 8 * r]) for r in range(2)]

    def read_message(self) -> None:
        super().read_message()
        if self.s.wide or self.s.positional:
            self.find_rows()

    def lse_at(self, r: int) -> Expr:
        """Where the LSE of this thread's row r lies."""
        pair = T.cast(self.batch * self.a.heads + self.head, "int64")
        return pair * T.cast(self.a.q_len, "int64") + T.cast(self.position[r], "int64")

    def begin_merge(self) -> None:
        """Fetch what an earlier pass left of these rows: O to the Q slot (Q is done with), LSE to registers."""
        with when(self.merging()):
            self.fetch_earlier()
            for r in range(2):
                store(self.old_lse, r, T.float32(NEG_INF))
                with when(self.position[r] >= 0):
                    store(self.old_lse, r, self.a.lse[self.lse_at(r)])

    def finish(self) -> None:
        """O and LSE of this warpgroup's rows to where they belong."""
        b, s = self.block, self.s
        self.softmax.finish(self.inverse, self.lse)
        if s.score.sinks:
            self.add_sink()
        if s.score.dropout:
            for r in range(2):
                store(self.inverse, r, self.inverse[r] * self.a.terms.kept)
        stage = (self.out.o, s.dv, self.inverse, b.q, self.slot_base(), s.m, b.warp, b.lane)
        with I.If(self.merging()):
            with I.Then():
                merge_weights(self.inverse, self.lse, self.old_lse, self.old_weight)
                self.wait_earlier()
                stage_output(*stage, self.old_weight)
            with I.Else():
                stage_output(*stage)
        self.send_output()
        with when(T.EQ(b.lane % 4, 0)):
            self.store_lse()

    def add_sink(self) -> None:
        """The head's sink is one more part, with no output: of the first pass, and where rows are in parts of all of
        them together (combine.py)."""
        with when(T.And(T.EQ(self.a.merge, 0), T.EQ(self.part, 0))):
            for r in range(2):
                store(self.old_lse, r, self.a.terms.sinks[self.head])
            merge_weights(self.inverse, self.lse, self.old_lse, self.old_weight)

    def store_lse(self) -> None:
        a = self.a
        with I.If(T.EQ(self.part, 0)):
            with I.Then():
                for r in range(2):
                    with when(self.position[r] >= 0):
                        store(a.lse, self.lse_at(r), self.lse[r])
            with I.Else():
                for r in range(2):
                    store(a.part_lse, (self.part - 1) * self.s.m + self.row + 8 * r, self.lse[r])
