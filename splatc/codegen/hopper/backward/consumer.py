"""A consumer warpgroup: dK, dV or both of 64 keys of every column tile; where wanted its share of each tile's dQ."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as I

from splatc.codegen.constants import ceil_div
from splatc.codegen.hopper.backward.block import Block
from splatc.codegen.hopper.backward.products import Products
from splatc.codegen.hopper.backward.scores import QuerySums, Scores, ValueScores
from splatc.codegen.hopper.block import BATCH, HEAD, ITEM, MESSAGE, PART, TILES, VIEW, X1, X2, X3
from splatc.codegen.hopper.copies import (
    Maps,
    Point,
    commit_stores,
    load_tile,
    store_tile,
    wait_stores,
    wait_stores_read,
)
from splatc.codegen.hopper.emit import Cell, Expr, do, let, loop, registers, store, when
from splatc.codegen.hopper.epilogue import stage_output
from splatc.codegen.hopper.products import fence, hidden, wait_products
from splatc.codegen.hopper.ring import Ring
from splatc.codegen.hopper.shape import ROW_BYTES, WARPGROUP_ROWS, chunk
from splatc.codegen.hopper.terms import Pairs, TermEmitter
from splatc.codegen.hopper.warpgroup import Warpgroup

BOTH = 1  # the named barrier of both warpgroups


class End(NamedTuple):
    """Where a result of a column tile goes: accumulators o of 64 x dim, times a factor, through place[base:], the place
    of K or V, whose ring it is."""

    o: Expr
    dim: int
    chunks: int
    place: Expr
    base: Expr
    factor: Expr
    maps: Maps
    part_maps: Maps
    ring: Ring


class Consumer(Warpgroup):
    """A warpgroup that computes dK and dV of 64 keys of every column tile, by four products of each of its tiles of
    queries; or dK alone, by three.

    ptxas wants no product in flight at the end of the loop, so a pass of it begins with the products of one tile and
    ends with the scores of the next.
    """

    kind_of_scores = Scores

    def run(self) -> None:
        b, s = self.block, self.s
        self.take_number()
        self.start_products()
        self.counts = {name: ceil_div(dim, 16) * 8 for name, dim in s.ends.items()}  # of accumulators
        self.results = {name: registers(name, count) for name, count in self.counts.items()}
        self.bits = registers("mask", s.bit_words, "uint32")
        self.enter_rings()
        self.old_phase = Cell("old_phase", 0)
        if s.key_stages > 1:
            self.unreleased = Cell("unreleased", 0)  # whether the last column tile's places are still stored from
        b.k_ring.wait_full(self.keys_at)
        with I.While(b.messages[b.slot(self.keys_at) * MESSAGE + TILES] > 0):
            self.column_tile()
            b.k_ring.wait_full(self.keys_at)
        wait_stores()

    def start_products(self) -> None:
        """What products and the scores between them need."""
        b, s, a = self.block, self.s, self.a
        self.products = Products(s, b.tile_places(), self.me)
        self.scores = self.kind_of_scores(s, a.scale, a.cap, b.statistics, b.lane,
                                          a.terms.kept if s.score.dropout else None)  # fmt: skip
        if s.positional:
            self.terms = TermEmitter(a.terms)

    def enter_rings(self) -> None:
        """Stand at the beginning of the rings."""
        b = self.block
        self.keys_at, self.at = b.k_ring.consumer("keys"), b.q_ring.consumer("q")

    def column_tile(self) -> None:
        """The results of 64 keys."""
        b = self.block
        for name, array in self.results.items():
            for i in range(self.counts[name]):
                store(array, i, T.float32(0.0))
        steps = let("steps", b.messages[b.slot(self.keys_at) * MESSAGE + TILES] * self.a.members)
        if self.s.positional:
            self.find_keys()
        self.first_tile()
        self.release_last_places()
        with loop(steps - 1) as done:
            self.next_tile(done > 0)
        self.last_tile(steps > 1)
        self.at.advance()
        self.finish()
        self.keys_at.advance()

    def first_tile(self) -> None:
        """Scores and dP."""
        self.ask_scores()
        self.block.v_ring.wait_full(self.keys_at)
        self.ask_score_gradients()
        self.take_scores()

    def next_tile(self, before: Expr) -> None:
        """What a tile's scores and dP are for, and those of the next one. before: whether there was a tile before."""
        self.use(before)
        self.at.advance()
        self.ask_scores()
        self.settle(before, pending=1)  # the scores
        self.ask_score_gradients()
        self.take_scores()

    def last_tile(self, before: Expr) -> None:
        """What the last tile's scores and dP are for."""
        self.use(before)
        self.settle(before, pending=0)

    # -- scores of a tile ----------------------------------------------------------------------------------------------

    def ask_scores(self) -> None:
        self.block.q_ring.wait_full(self.at)
        self.products.scores(self.scores.s, self.block.slot(self.keys_at), self.at.stage())

    def ask_score_gradients(self) -> None:
        self.block.do_ring.wait_full(self.at)
        self.products.score_gradients(self.scores.dp, self.block.slot(self.keys_at), self.at.stage())

    def take_scores(self) -> None:
        """Probabilities, masked; then dP has arrived too."""
        wait_products(1)
        self.take_probabilities()
        wait_products(0)
        fence(self.scores.dp, self.scores.count)

    def take_probabilities(self) -> None:
        """Those of scores that have arrived, masked."""
        b, stage = self.block, self.at.stage()
        fence(self.scores.s, self.scores.count)
        if self.s.positional:
            self.begin_terms(stage)
        self.scores.probabilities(stage)
        with when(b.masked[stage] != 0):
            self.read_bits_of(stage, self.bits)
            self.scores.mask(self.bits)

    def find_keys(self) -> None:
        """Positions of this thread's two keys."""
        b = self.block
        row = let("row", self.me * WARPGROUP_ROWS + b.warp * 16 + b.lane // 4)
        (item,) = b.message(self.keys_at, ("item", ITEM))
        self.key_positions = [let("key_position", self.a.positions[item, row + 8 * r]) for r in range(2)]

    def begin_terms(self, stage: Expr) -> None:
        """What they need of a tile's head, this thread's keys and, as they come, its queries."""
        self.terms.begin(None, let("its_head", self.block.heads[stage]))
        keys = [self.terms.key_side(position) for position in self.key_positions]
        self.scores.pairs = Pairs(self.terms, keys, lambda i: self.terms.query_side(*self.scores.of_query(stage, i)),
                                  rows_are_keys=True)  # fmt: skip

    # -- what they are used for ----------------------------------------------------------------------------------------

    def use(self, before: Expr) -> None:
        """Take dV of a tile, where that is wanted, and start its dK. before: whether there was a tile before."""
        self.used = stage = let("used", self.at.stage())
        if self.s.makes("dv"):
            self.products.value_gradients(self.results["dv"], self.scores.p, stage)
        self.scores.gradients(stage)
        self.products.key_gradients(self.results["dk"], self.scores.ds, stage)
        if self.s.makes("dv"):
            wait_products(1)  # frees the registers of P: without that, ptxas finds too few for the next scores
            self.take_result("dv")
        self.block.do_ring.release_by_warp(stage, self.block.lane)

    def settle(self, before: Expr, pending: int) -> None:
        """Wait for what ``use`` has left under way; ``pending`` products were started after it."""
        wait_products(pending)
        self.take_result("dk")
        do(T.cuda.warp_sync())
        self.block.q_ring.release_by_warp(self.used, self.block.lane)

    def take_result(self, name: str) -> None:
        """A result that has been waited for may be used."""
        fence(self.results[name], self.counts[name])

    # -- the end of a column tile --------------------------------------------------------------------------------------

    def finish(self) -> None:
        """The results of this warpgroup's keys to where they belong, through the places of K and V."""
        b, s, a = self.block, self.s, self.a
        batch, head, self.part, self.view, *x = b.message(
            self.keys_at, ("batch", BATCH), ("head", HEAD), ("part", PART), ("view", VIEW), ("x1", X1), ("x2", X2),
            ("x3", X3))  # fmt: skip
        first, second = a.row_steps
        x1, x2, x3 = (at + self.me * T.if_then_else(T.EQ(self.view, 0), one, two)
                      for at, one, two in zip(x, first, second, strict=True))  # fmt: skip
        self.box = Point(x1, x2, x3, batch, head)
        self.finish_products()
        for place in b.keys.keys() - s.places.values():  # nothing leaves through it
            b.key_rings[place].release(b.slot(self.keys_at), only=self.speaker)
        ends = [self.end(name) for name in s.places]
        one = T.float32(1.0)
        merging = T.And(a.merge != 0, T.EQ(self.part, 0))
        with when(merging):
            self.load_earlier(ends)
        for end in ends:
            stage = (end.o, end.dim, [end.factor] * 2, end.place, end.base, s.keys, b.warp, hidden(b.lane, "int32"))
            with I.If(merging):
                with I.Then():
                    stage_output(*stage, [one] * 2)
                with I.Else():
                    stage_output(*stage)
        do(T.ptx.fence.proxy.async_.shared__cta())
        self.own_barrier()
        with when(self.leader):
            for end in ends:
                self.store(end)
        with when(self.speaker):
            if s.key_stages > 1:
                self.unreleased.set(1)
            else:
                for n, end in enumerate(ends):
                    wait_stores_read(len(ends) - 1 - n)
                    end.ring.release(0)

    def end(self, name: str) -> End:
        """Of the result with this name."""
        b, s, a, place = self.block, self.s, self.a, self.s.places[name]
        dim, factor = s.ends[name], a.scale if name == "dk" else T.float32(1.0)
        mine = self.me * (WARPGROUP_ROWS * (ROW_BYTES // s.item_bytes))
        base = mine + b.slot(self.keys_at) * (b.stage_bytes[place] // s.item_bytes)
        return End(self.results[name], dim, ceil_div(dim, chunk(s.dtype)), b.keys[place], base, factor, a.ends[name],
                   a.parts[name], b.key_rings[place])  # fmt: skip

    def release_last_places(self) -> None:
        """Give the places of the column tile before back as soon as its results have left, if they were not waited
        for."""
        b = self.block
        if self.s.key_stages > 1:
            with when(T.And(self.speaker, self.unreleased() != 0)):
                wait_stores_read()
                for place in self.s.places.values():
                    b.key_rings[place].release(T.bitwise_xor(b.slot(self.keys_at), 1))

    def finish_products(self) -> None:
        """Until no product reads the keys and values that results will take the place of."""
        self.own_barrier()

    def load_earlier(self, ends: Sequence[End]) -> None:
        """Fetch what an earlier pass left of these keys to where the sums go."""
        b, s = self.block, self.s
        full = b.old_ring.full(self.me)
        with when(self.leader):
            b.old_ring.expect(self.me, T.uint32(WARPGROUP_ROWS * ROW_BYTES * sum(end.chunks for end in ends)))
            for end in ends:
                load_tile(end.maps, self.view, self.box, end.place, end.base, end.chunks, s.keys, full)
        do(T.cuda.mbarrier_wait(full, self.old_phase()))
        self.old_phase.set(T.bitwise_xor(self.old_phase(), 1))

    def store(self, end: End) -> None:
        keys = self.s.keys
        with I.If(T.EQ(self.part, 0)):
            with I.Then():
                store_tile(end.maps, self.view, self.box, end.place, end.base, end.chunks, keys)
            with I.Else():
                at = Point((self.part - 1) * keys + self.me * WARPGROUP_ROWS, 0, 0, 0, 0)
                store_tile(end.part_maps, T.int32(0), at, end.place, end.base, end.chunks, keys)
        commit_stores()


class ValuesConsumer(Consumer):
    """A warpgroup that computes dV alone, by two products: the exponentials of a tile beside dV of the one before."""

    kind_of_scores = ValueScores
    scores: ValueScores

    def first_tile(self) -> None:
        self.ask_scores()
        wait_products(0)
        self.take_probabilities()
        self.leave_queries()
        self.scores.pack()

    def next_tile(self, before: Expr) -> None:
        used = let("used", self.at.stage())
        self.block.do_ring.wait_full(self.at)
        self.at.advance()
        self.ask_scores()
        self.products.value_gradients(self.results["dv"], self.scores.p, used)
        wait_products(1)  # the scores
        self.take_probabilities()
        self.leave_queries()
        self.take_value_gradients(used)
        self.scores.pack()

    def last_tile(self, before: Expr) -> None:
        used = let("used", self.at.stage())
        self.block.do_ring.wait_full(self.at)
        self.products.value_gradients(self.results["dv"], self.scores.p, used)
        self.take_value_gradients(used)

    def leave_queries(self) -> None:
        """Q of a tile is done with, and what was read beside it."""
        do(T.cuda.warp_sync())
        self.block.q_ring.release_by_warp(self.at.stage(), self.block.lane)

    def take_value_gradients(self, used: Expr) -> None:
        """dV has arrived; its dO, in the stage ``used``, is done with."""
        wait_products(0)
        self.take_result("dv")
        self.block.do_ring.release_by_warp(used, self.block.lane)


class SummingConsumer(Consumer):
    """A warpgroup that also adds up its share of dQ of every tile, a fifth product.

    dQ of a tile is computed while the next tile is under way: so neither warpgroup waits for the other's dS, and they
    drift apart until one computes exponentials while the other has the tensor cores.
    """

    def start_products(self) -> None:
        super().start_products()
        self.sums = QuerySums(self.s, self.block.statistics, self.me, self.block.warp, self.block.lane)

    def enter_rings(self) -> None:
        super().enter_rings()
        b = self.block
        self.made_at, self.ds_at = b.ds_ring.consumer("made"), b.ds_ring.producer("ds")
        self.sums_phase = Cell("sums_phase", 1)

    def use(self, before: Expr) -> None:
        """dV, dK and, for the tile ``before`` (if there is one), dQ, which stays in flight."""
        b, stage = self.block, self.at.stage()
        self.products.value_gradients(self.results["dv"], self.scores.p, stage)
        self.scores.gradients(stage)
        b.ds_ring.wait_empty(self.ds_at)
        self.scores.stage_gradients(b.ds, self.ds_at.stage(), self.me * WARPGROUP_ROWS + b.warp * 16, b.lane)
        do(T.ptx.fence.proxy.async_.shared__cta())
        do(T.cuda.warp_sync())
        b.ds_ring.fill_by_warp(self.ds_at.stage(), b.lane)
        self.products.key_gradients(self.results["dk"], self.scores.ds, stage)
        with when(before):
            b.ds_ring.wait_full(self.made_at)
        # Without a tile before, the product of what lies there is dropped: products do not like branches.
        self.products.query_gradients(self.sums.dq, T.bitwise_xor(self.ds_at.stage(), 1))
        self.sums.next_scale()
        self.sums.read_scale(stage)
        wait_products(1)
        self.take_result("dv")
        self.take_result("dk")
        do(T.cuda.warp_sync())
        b.do_ring.release_by_warp(stage, b.lane)
        b.q_ring.release_by_warp(stage, b.lane)
        self.ds_at.advance()

    def settle(self, before: Expr, pending: int) -> None:
        """Send dQ of the tile before away."""
        wait_products(pending)
        fence(self.sums.dq, self.sums.count)
        with when(before):
            self.send()

    def last_tile(self, before: Expr) -> None:
        """And its dQ."""
        super().last_tile(before)
        b = self.block
        b.ds_ring.wait_full(self.made_at)
        self.products.query_gradients(self.sums.dq, T.bitwise_xor(self.ds_at.stage(), 1))
        self.sums.next_scale()
        wait_products(0)
        fence(self.sums.dq, self.sums.count)
        self.send()

    def send(self) -> None:
        """Leave dQ where the sender finds it; its dS is done with."""
        b = self.block
        self.leave(b.ds_ring, self.made_at)
        do(T.cuda.mbarrier_wait(b.sums_ring.empty(self.me), self.sums_phase()))
        self.sums.stage(b.sums)
        do(T.ptx.fence.proxy.async_.shared__cta())
        do(T.cuda.warp_sync())
        b.sums_ring.fill_by_warp(self.me, b.lane)
        self.sums_phase.set(T.bitwise_xor(self.sums_phase(), 1))

    def finish_products(self) -> None:
        """dQ of both warpgroups reads all of K."""
        do(T.ptx.bar.sync(T.uint32(BOTH), T.uint32(128 * self.s.warpgroups)))


def consumer_of(block: Block) -> Consumer:
    """The consumer for the block's sizes."""
    s = block.s
    return (SummingConsumer if s.makes("dq") else Consumer if s.makes("dk") else ValuesConsumer)(block)
