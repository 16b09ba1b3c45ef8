"""A consumer warpgroup: scores, softmax and output of 64 query rows of every row tile."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as I

from splatc.codegen.constants import NEG_INF
from splatc.codegen.hopper.block import (
    BATCH,
    HEAD,
    ITEM,
    MASKED,
    MESSAGE,
    ORIGIN,
    PART,
    PLACE,
    ROW_OF_COLUMNS,
    TILES,
    VIEW,
    X1,
    X2,
    X3,
)
from splatc.codegen.hopper.copies import Point, commit_stores, load_tile, store_tile, wait_stores, wait_stores_read
from splatc.codegen.hopper.emit import Cell, Expr, do, emit_if, let, loop, registers, store, when
from splatc.codegen.hopper.epilogue import merge_weights, stage_output
from splatc.codegen.hopper.products import Scores, at_stage, descriptor, output_of, wait_products
from splatc.codegen.hopper.shape import STRIDES, WARPGROUP_ROWS
from splatc.codegen.hopper.softmax import Softmax, cap_scores, mask_scores
from splatc.codegen.hopper.terms import Key, Terms
from splatc.codegen.hopper.warpgroup import Warpgroup

TURN = 1  # named barriers from here on: turns of the warpgroups


class Consumer(Warpgroup):
    """A warpgroup that computes 64 rows of every row tile."""

    def run(self) -> None:
        b, s, a = self.block, self.s, self.a
        do(T.ptx["setmaxnreg.inc.sync.aligned.u32"](s.registers[1]))
        self.take_number()
        self.scores = Scores(s.dtype, s.d, s.n, s.m)
        self.out = output_of(s)
        self.words = registers("mask", s.bit_words, "uint32")
        unit = a.cap if s.softcap else a.scale
        self.softmax = Softmax(self.scores.count, T.float32(1.0) if s.score.biases else unit)
        if s.positional:
            self.unit, self.terms = unit, Terms(a.terms)
            self.place = registers("place", PLACE, "int32")
        self.inverse, self.lse, self.old_lse, self.old_weight = (
            registers(name, 2) for name in ("inverse", "row_lse", "old_lse", "old_weight"))  # fmt: skip
        self.q_base = descriptor("q_desc", b.q, self.me * (WARPGROUP_ROWS * s.chunk), 1)
        self.k_base = descriptor("k_desc", b.k, 0, 1)
        self.v_base = descriptor("v_desc", b.v, 0, self.out.leading)
        self.q_at, self.k_at, self.v_at = (
            ring.consumer(name) for ring, name in ((b.q_ring, "q"), (b.k_ring, "k"), (b.v_ring, "v")))  # fmt: skip
        self.old_phase = Cell("old_phase", 0)
        if s.q_stages > 1:
            self.unreleased = Cell("unreleased", 0)  # whether the last row tile's Q stage is still being stored from
        self.first_turn()
        b.q_ring.wait_full(self.q_at)
        with I.While(b.messages[self.q_at.stage() * MESSAGE + TILES] > 0):
            self.row_tile()
            b.q_ring.wait_full(self.q_at)
        wait_stores()

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
        self.message = let("message", self.q_at.stage() * MESSAGE)
        if s.positional:
            self.begin_terms()
        elif not s.wide:
            self.find_rows()  # asked for early, needed at the end
        q = at_stage("q_now", self.q_base, self.q_at.stage(), s.q_slot)
        self.out.clear()
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
        self.q_at.advance()

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
        self.softmax.first(self.scores.s)
        self.drop()
        self.out.take(self.scores.s)

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
        self.softmax.next(self.scores.s)
        self.drop()
        wait_products(0)
        self.out.fence()
        self.scores.fence()
        self.leave(b.v_ring, self.v_at)
        self.out.take(self.scores.s)
        self.out.scale(self.softmax.shrink)

    def last_values(self) -> None:
        """O += P V of the last tile."""
        b = self.block
        b.v_ring.wait_full(self.v_at)
        self.out.issue(at_stage("v_now", self.v_base, self.v_at.stage(), self.s.v_bytes))
        wait_products(0)
        self.out.fence()
        self.leave(b.v_ring, self.v_at)

    def read_bits(self) -> None:
        """Fetch this thread's mask bits of the K stage's tile."""
        self.read_bits_of(self.k_at.stage(), self.words)
        do(T.cuda.warp_sync())  # before lane 0 says for all that the stage is read

    def cap(self) -> None:
        """Softcap, where the kernel has it."""
        if self.s.softcap:
            cap_scores(self.scores.s, self.scores.count, self.a.scale / self.a.cap)

    def mask(self) -> None:
        mask_scores(self.scores.s, self.scores.count, self.words)

    # -- expressions that depend on positions --------------------------------------------------------------------------

    def begin_terms(self) -> None:
        """What they need of the row tile's head and of this thread's two rows."""
        b = self.block
        self.find_rows()
        self.terms.begin(b.messages[self.message + BATCH], let("its_head", b.messages[self.message + HEAD]))
        self.queries = [self.terms.query_side(position) for position in self.position]

    def find_columns(self) -> None:
        """Where the lanes of the K stage's tile are."""
        if self.s.positional:
            for word in (ROW_OF_COLUMNS, ORIGIN):
                store(self.place, word, self.block.places[self.k_at.stage() * PLACE + word])
            do(T.cuda.warp_sync())  # before lane 0 says for all that the stage is read

    def key_of(self, register: int) -> Key:
        """The key of a score register."""
        lane = 8 * (register // 4) + register % 2 + self.block.lane % 4 * 2
        offset = self.a.columns[self.place[ROW_OF_COLUMNS], STRIDES + lane]
        return self.terms.key_side(let("key_position", self.place[ORIGIN] + offset))

    def add_biases(self) -> None:
        """Scores in natural units, with their biases."""
        s = self.scores.s
        if self.s.score.biases:
            for column in (i for i in range(self.scores.count) if i % 4 < 2):
                key = self.key_of(column)
                for r, query in enumerate(self.queries):
                    at = column + 2 * r
                    store(s, at, self.terms.add(s[at] * self.unit, query, key))

    def drop(self) -> None:
        """Probabilities that dropout takes."""
        s = self.scores.s
        if self.s.score.dropout:
            for column in (i for i in range(self.scores.count) if i % 4 < 2):
                key = self.key_of(column)
                for r, query in enumerate(self.queries):
                    at = column + 2 * r
                    store(s, at, T.if_then_else(self.terms.dropped(query, key), T.float32(0.0), s[at]))

    # -- its end -------------------------------------------------------------------------------------------------------

    def find_rows(self) -> None:
        """Sequence positions of this thread's two rows."""
        b, a = self.block, self.a
        item = b.messages[self.message + ITEM]
        self.row = let("row", self.me * WARPGROUP_ROWS + b.warp * 16 + b.lane // 4)
        self.position = [let(f"position{r}", a.positions[item, self.row + 8 * r]) for r in range(2)]

    def read_message(self) -> None:
        """Whose rows these are, and where: read late, to spare registers."""
        words = (("batch", BATCH), ("head", HEAD), ("part", PART), ("view", VIEW), ("x1", X1), ("x2", X2), ("x3", X3))
        self.batch, self.head, self.part, self.view, *self.x = (
            let(name, self.block.messages[self.message + word]) for name, word in words)  # fmt: skip
        if self.s.wide or self.s.positional:
            self.find_rows()

    def lse_at(self, r: int) -> Expr:
        """Where the LSE of this thread's row r lies."""
        pair = T.cast(self.batch * self.a.heads + self.head, "int64")
        return pair * T.cast(self.a.q_len, "int64") + T.cast(self.position[r], "int64")

    def box(self) -> Point:
        """The warpgroup's 64 rows in the row view."""
        first, second = self.a.o_steps
        x1, x2, x3 = (x + self.me * T.if_then_else(T.EQ(self.view, 0), a, b)
                      for x, a, b in zip(self.x, first, second, strict=True))  # fmt: skip
        return Point(x1, x2, x3, self.batch, self.head)

    def slot_base(self) -> Expr:
        """Where the warpgroup's rows of the Q slot begin, in elements."""
        return self.q_at.stage() * (self.s.q_slot // self.s.item_bytes) + self.me * (WARPGROUP_ROWS * self.s.chunk)

    def merging(self) -> Expr:
        return T.And(self.a.merge != 0, T.EQ(self.part, 0))

    def begin_merge(self) -> None:
        """Fetch what an earlier pass left of these rows: O to the Q slot (Q is done with), LSE to registers."""
        b, s = self.block, self.s
        with when(self.merging()):
            self.own_barrier()
            with when(self.leader):
                b.old_ring.expect(self.me, T.uint32(WARPGROUP_ROWS * 128 * s.dv_chunks))
                load_tile(self.a.o, self.view, self.box(), b.q, self.slot_base(), s.dv_chunks, s.m,
                          b.old_ring.full(self.me))  # fmt: skip
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
                do(T.cuda.mbarrier_wait(b.old_ring.full(self.me), self.old_phase()))
                self.old_phase.set(T.bitwise_xor(self.old_phase(), 1))
                stage_output(*stage, self.old_weight)
            with I.Else():
                stage_output(*stage)
        do(T.ptx.fence.proxy.async_.shared__cta())
        self.own_barrier()
        with when(self.leader):
            self.store_output()
        with when(T.EQ(b.lane % 4, 0)):
            self.store_lse()

    def add_sink(self) -> None:
        """The head's sink is one more part, with no output: of the first pass, and where rows are in parts of all of
        them together (combine.py)."""
        with when(T.And(T.EQ(self.a.merge, 0), T.EQ(self.part, 0))):
            for r in range(2):
                store(self.old_lse, r, self.a.terms.sinks[self.head])
            merge_weights(self.inverse, self.lse, self.old_lse, self.old_weight)

    def store_output(self) -> None:
        b, s, a = self.block, self.s, self.a
        with I.If(T.EQ(self.part, 0)):
            with I.Then():
                store_tile(a.o, self.view, self.box(), b.q, self.slot_base(), s.dv_chunks, s.m)
            with I.Else():
                row = (self.part - 1) * s.m + self.me * WARPGROUP_ROWS
                at = Point(row, 0, 0, 0, 0)
                store_tile(a.part, T.int32(0), at, b.q, self.slot_base(), s.dv_chunks, s.m)
        commit_stores()
        if s.q_stages == 1:
            wait_stores_read()
            b.q_ring.release(0)
        else:
            self.unreleased.set(1)

    def release_last_slot(self) -> None:
        """Give the row tile before's Q stage back as soon as its O has left."""
        if self.s.q_stages > 1:
            with when(T.And(self.leader, self.unreleased() != 0)):
                wait_stores_read()
                self.block.q_ring.release(T.bitwise_xor(self.q_at.stage(), 1))

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
