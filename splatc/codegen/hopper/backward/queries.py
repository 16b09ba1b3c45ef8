"""The row kernel: dQ of row tiles, over the tables of the mask itself; three products of a tile.

    S = Q K^T    P = exp(S - LSE)    dP = dO V^T    dS = P * (dP - delta) * slope of the softcap    dQ += dS K

It is the forward kernel's walk, with its producers: Q and dO of a row tile stay, K and V come by. Rows are queries, so
LSE and delta are two numbers of a thread each, and dS is an A operand as it lies in registers.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as I

from splatc.codegen.constants import ceil_div
from splatc.codegen.hopper import block
from splatc.codegen.hopper.backward.bias_sums import BiasSums, SumArguments
from splatc.codegen.hopper.backward.products import Places, RowProducts
from splatc.codegen.hopper.backward.scores import POSITION, WORD, RowScores
from splatc.codegen.hopper.backward.shape import STATISTICS, RowShape
from splatc.codegen.hopper.block import (
    BATCH,
    ENTRIES,
    FIRST,
    HEAD,
    MASKED,
    MESSAGE,
    TILES,
    int_arg,
    start_block,
    table,
)
from splatc.codegen.hopper.copies import Maps, Point, Rows, load_tile
from splatc.codegen.hopper.emit import Expr, emit_if, let, loop, registers, store, when
from splatc.codegen.hopper.epilogue import stage_output
from splatc.codegen.hopper.forward import producer_of
from splatc.codegen.hopper.producer import Producer
from splatc.codegen.hopper.products import fence, hidden, wait_products
from splatc.codegen.hopper.row_tiles import RowTiles
from splatc.codegen.hopper.shape import MAX_VIEWS, STRIDES, WARPGROUP_ROWS
from splatc.codegen.hopper.shared_memory import SharedMemory
from splatc.codegen.hopper.terms import Pairs, Query, TermArguments
from splatc.codegen.hopper.walk import walking_kernel

NAME = "splatc_gradient_rows"


def row_kernel(s: RowShape):
    """(dQ of row tiles; bytes of dynamic shared memory)."""
    return walking_kernel(NAME, s, Arguments, Block, lambda b: row_producer_of(b).run(), lambda b: Consumer(b).run())


class Arguments:
    """The kernel's parameters (docs/architecture.md says what each holds)."""

    def __init__(self, s: RowShape) -> None:
        rows, cols = MAX_VIEWS
        self.q, self.do, self.statistics, self.out = (
            Maps(name, rows) for name in ("q", "do", "statistics", "dq"))  # fmt: skip
        self.k, self.v = Maps("k", cols), Maps("v", cols)
        self.part = Maps("part_q", 1)
        self.out_steps = [[int_arg(f"row_step{view}_{axis}") for axis in (1, 2, 3)] for view in range(rows)]
        names = ("total", "blocks", "group", "merge")
        self.total, self.blocks, self.group, self.merge = map(int_arg, names)
        self.scale = I.arg("scale", I.float32())
        self.cap = I.arg("cap", I.float32())
        self.work = table("work", "int32", MESSAGE)
        self.entries = table("entries", "int32", 8)
        self.bits = table("bits", "uint32", s.bits_bytes // 4)
        if s.gather:
            self.gather = table("gather", "int32", s.n)
            self.k_rows, self.v_rows = Rows("k", s.dtype, s.d, self.k), Rows("v", s.dtype, s.dv, self.v)
        self.counter = table("queue", "int32", 1)
        self.terms, self.bias_sums = TermArguments(s.score, table), SumArguments(s.learning, table)
        if s.positional:
            self.columns = table("columns", "int32", STRIDES + s.n)
        for maps in (self.q, self.do, self.statistics, self.out, self.k, self.v, self.part):
            maps.declare()


class Block(block.Block):
    """The forward kernel's block, whose Q stages hold Q, dO and the statistics of queries."""

    s: RowShape

    def allocate_rows(self, pool: SharedMemory) -> None:
        super().allocate_rows(pool)
        s = self.s
        self.statistics = pool.alloc((s.q_stages * s.statistics_bytes // 4,), "float32", align=1024)

    def tile_places(self) -> Places:
        """Of the tiles: all sizes are multiples of 1024, so that they lie one after the other."""
        s = self.s
        k = s.q_stages * (s.q_slot + s.statistics_bytes)
        offsets = {"q": 0, "do": s.q_bytes, "k": k, "v": k + s.stages * s.k_bytes}
        return Places(self.q, offsets, {"q": s.q_slot, "do": s.q_slot, "k": s.k_bytes, "v": s.v_bytes})

    def load_rows(self, stage: Expr, view: Expr, at: Point) -> None:
        s, a, full = self.s, self.a, self.q_ring.full(stage)
        self.q_ring.expect(stage, T.uint32(s.q_bytes + s.do_bytes + s.statistics_bytes))
        q = stage * (s.q_slot // s.item_bytes)
        load_tile(a.q, view, at, self.q, q, s.d_chunks, s.m, full)
        load_tile(a.do, view, at, self.q, q + s.q_bytes // s.item_bytes, s.dv_chunks, s.m, full)
        load_tile(a.statistics, view, at, self.statistics, stage * (s.statistics_bytes // 4), 1, s.m, full)

    def start(self) -> None:
        a = self.a
        start_block(self.thread, (a.q, a.do, a.statistics, a.k, a.v, a.out), self.rings)


class LateProducer(Producer):
    """Where there is but one Q stage: K and V of a row tile's first column tile are asked for before its Q, whose place
    is free later than theirs."""

    def run(self) -> None:
        with when(T.EQ(self.block.warp, 0)), when(T.cuda.elect_sync()):
            self.start()
            self.fetch_next()
            with I.While(self.queue.number() < self.a.total):
                self.row_tile()
            self.tell_end()

    def row_tile(self) -> None:
        """All column tiles of the row tile whose words are here; after the first, its Q, and the next one's words."""
        words = {"batch": BATCH, "head": HEAD, "first": FIRST, "entries": ENTRIES}
        batch, head, first, entries = (let(name, self.row[word]) for name, word in words.items())
        self.done.set(0)
        for _ in self.column_tiles(batch, T.truncdiv(head, self.a.group), first, entries):
            with when(T.EQ(self.done(), 0)):
                self.announce_next()
                self.take()
                self.fetch_next()
                self.done.set(1)


def row_producer_of(b: Block) -> Producer:
    """The producer for the block's sizes."""
    return LateProducer(b) if b.s.q_stages == 1 and not b.s.gather else producer_of(b)


class Consumer(RowTiles):
    """A warpgroup that computes dQ of 64 queries of every row tile.

    dQ of a tile is started with the scores of the next one; K of a tile stays until then. ptxas wants no product in
    flight at the end of a loop.
    """

    def run(self) -> None:
        b, s, a = self.block, self.s, self.a
        self.take_number()
        self.products = RowProducts(s, b.tile_places(), self.me)
        self.scores = RowScores(s, a.scale, a.cap, a.terms.kept if s.score.dropout else None)
        self.count = ceil_div(s.d, 16) * 8
        self.dq = registers("dq", self.count)
        self.words = registers("mask", s.bit_words, "uint32")
        self.enter_rings()
        self.used_at = b.k_ring.consumer("used")  # the tile whose dS is in registers
        self.bias_sums = BiasSums(a.bias_sums, s.learning, self.terms, self.scores) if s.learning else None
        self.walk()

    def row_tile(self) -> None:
        """dQ of 64 queries."""
        b = self.block
        for i in range(self.count):
            store(self.dq, i, T.float32(0.0))
        tiles = let("tiles", b.messages[self.message + TILES])
        masked = let("masked", b.messages[self.message + MASKED])  # tiles with mask bits: they come first
        self.ask_scores()
        self.read_statistics()
        self.release_last_slot()  # before V is waited for: its producer may be waiting for the slot
        self.take_tile(masked > 0)
        with loop(masked - 1):
            self.next_tile(masked=True)
        with loop(tiles - T.max(masked, 1)):
            self.next_tile(masked=False)
        self.read_message()
        with when(self.merging()):
            self.fetch_earlier()
        self.ask_query_gradients()
        self.take_query_gradients(pending=0)
        if self.bias_sums is not None:
            first = let("first_statistics", self.first_row() * STATISTICS)
            self.bias_sums.finish(self.batch, b.lane, lambda r: self.position(first + 8 * r * STATISTICS))
        self.finish()

    def next_tile(self, masked: bool) -> None:
        """dQ of the tile before, and what it takes of this one."""
        self.ask_query_gradients()
        self.ask_scores()
        self.take_query_gradients(pending=1)  # the scores
        self.take_tile(masked)

    def take_tile(self, masked: Expr | bool) -> None:
        """dS of a tile whose scores are under way."""
        b = self.block
        b.v_ring.wait_full(self.v_at)
        self.products.score_gradients(self.scores.dp, self.q_at.stage(), self.v_at.stage())
        emit_if(masked, self.read_bits)
        if self.s.positional:
            self.find_columns()
            self.scores.pairs.sweep()
        self.k_at.advance()
        wait_products(1)
        fence(self.scores.s, self.scores.count)
        self.scores.probabilities()
        wait_products(0)
        fence(self.scores.dp, self.scores.count)
        self.leave(b.v_ring, self.v_at)
        if self.s.positional:
            self.scores.pairs.sweep()
        self.scores.gradients()
        emit_if(masked, self.mask)
        if self.bias_sums is not None:
            self.bias_sums.add()

    def ask_scores(self) -> None:
        self.block.k_ring.wait_full(self.k_at)
        self.products.scores(self.scores.s, self.q_at.stage(), self.k_at.stage())

    def ask_query_gradients(self) -> None:
        self.products.query_gradients(self.dq, self.scores.ds, self.used_at.stage())

    def take_query_gradients(self, pending: int) -> None:
        """dQ has arrived, and its K is done with; ``pending`` products were started after it."""
        wait_products(pending)
        fence(self.dq, self.count)
        self.leave(self.block.k_ring, self.used_at)

    def mask(self) -> None:
        self.scores.mask(self.words)

    def read_statistics(self) -> None:
        """LSE and delta of this thread's two queries."""
        b = self.block
        row = let("row", self.first_row())
        self.scores.read_rows([b.statistics[(row + 8 * r) * STATISTICS + word] for word in range(2) for r in range(2)])
        if self.s.positional:
            self.terms.begin(None, let("its_head", b.messages[self.message + HEAD]))
            queries = [self.query(let("statistics", (row + 8 * r) * STATISTICS)) for r in range(2)]
            self.scores.pairs = Pairs(self.terms, queries, self.key_of)

    def first_row(self) -> Expr:
        """The first of this thread's two rows, counted through the Q stages; the other is 8 rows on."""
        b = self.block
        return self.q_at.stage() * self.s.m + self.me * WARPGROUP_ROWS + b.warp * 16 + b.lane // 4

    def query(self, at: Expr) -> Query:
        """A query, of its statistics."""
        word = T.reinterpret("uint32", self.block.statistics[at + WORD])
        return self.terms.query_side(let("query_position", self.position(at)), let("query_word", word))

    def position(self, at: Expr) -> Expr:
        """Where a query is, of its statistics."""
        return T.reinterpret("int32", self.block.statistics[at + POSITION])

    def finish(self) -> None:
        """dQ of this warpgroup's queries to where it belongs."""
        b, s = self.block, self.s
        stage = (self.dq, s.d, [self.a.scale] * 2, b.q, self.slot_base(), s.m, b.warp, hidden(b.lane, "int32"))
        with I.If(self.merging()):
            with I.Then():
                self.wait_earlier()
                stage_output(*stage, [T.float32(1.0)] * 2)
            with I.Else():
                stage_output(*stage)
        self.send_output()
