"""What gradients need before and after the walks over tiles, a few rows a warp: memory-bound, 16 bytes a lane.

prepare   a query's statistics: (LSE in the log2 domain, delta, its word of dropout, its position); integers, where
          a term asks for them

Where the column kernel adds up dQ, instead:

bounds    the largest |K| and row norm of V of every head, by blocks of rows
prepare   a query's statistics, and zeros for its sums: (LSE in the log2 domain, delta, scale in, scale out)
finish    dQ = its sums times the scale out, rounded

dQ is then summed as integers: sum over tiles of round(dQ_tile * scale in), where scale in is the largest power of two
that keeps the sum below 2^30:

    |dQ_id| <= sum_j P_ij (|dP_ij| + |delta_i|) |K_jd| <= (|dO_i| max_j |V_j| + |delta_i|) max |K|

delta = rowsum(dO * O) - dLSE. Where delta is no finite number, scale out is NaN, and so is the row of dQ: integers
know no NaN.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as I

from splatc.codegen.constants import LOG2E, NEG_INF
from splatc.codegen.cuda_parts import from_lane
from splatc.codegen.hopper.backward.shape import (
    PASSES,
    STATISTICS,
    THREADS,
    VALUES,
    WARPS,
    RowShape,
    Shape,
    lanes_of,
)
from splatc.codegen.hopper.combine import array, wide
from splatc.codegen.hopper.emit import (
    MIN_BLOCKS,
    Cell,
    Expr,
    do,
    follow_kernels_before,
    kept,
    kernel_function,
    let,
    loop,
    registers,
    store,
    when,
)
from splatc.codegen.hopper.products import PTX_TYPE
from splatc.codegen.hopper.stored import unpack
from splatc.codegen.hopper.terms import query_word

NAN = T.uint32(0x7FC00000)
WORDS = VALUES // 2
BOUNDS, PREPARE, FINISH = "splatc_gradient_bounds", "splatc_gradient_prepare", "splatc_gradient_finish"


class Rows:
    """A tensor (batch, heads, seq, dim) of any strides with a contiguous last axis, read and written by rows.

    Kernel parameters: its address and int64 ``{name}_batch``, ``{name}_head``, ``{name}_seq``, in elements.
    """

    def __init__(self, name: str, dtype: str, dim: int) -> None:
        self.dim, self.dtype = dim, dtype
        self._data = array(name, dtype)
        self._strides = [I.arg(f"{name}_{axis}", I.int64()) for axis in ("batch", "head", "seq")]

    def at(self, batch: Expr, head: Expr, position: Expr, column: Expr) -> Expr:
        """A pointer to an element."""
        return self._data.ptr_to([self._offset(batch, head, position, column)])

    def element(self, batch: Expr, head: Expr, position: Expr, column: Expr) -> Expr:
        return self._data[self._offset(batch, head, position, column)]

    def write(self, batch: Expr, head: Expr, position: Expr, column: Expr, value: Expr) -> None:
        """An element = value, rounded."""
        store(self._data, self._offset(batch, head, position, column), T.cast(value, self.dtype))

    def _offset(self, *index: Expr) -> Expr:
        *rows, column = index
        return sum((wide(i) * stride for i, stride in zip(rows, self._strides, strict=True)), wide(column))


class Place:
    """Which rows a thread works on: blocks lie along the rows of a head, then along heads and batch entries."""

    def __init__(self, block: Expr, thread: Expr, blocks_a_head: Expr, heads: Expr, dim: int) -> None:
        lanes = lanes_of(dim)
        self.pair = kept("pair", T.truncdiv(block, blocks_a_head))
        self.block = kept("block_of_head", block - self.pair * blocks_a_head)
        self.batch = kept("batch", T.truncdiv(self.pair, heads))
        self.head = kept("head", self.pair - self.batch * heads)
        self.column = let("column", thread % lanes * VALUES)
        self.row = let("row_of_block", thread // lanes)
        self.step = THREADS // lanes  # rows that a block reads at a time
        self.leads = T.EQ(thread % lanes, 0)
        self.lanes, self.lane, self.warp = lanes, let("lane", thread % 32), thread // 32


def kernel(name: str, declare: Callable[[], dict[str, Expr]], body: Callable[..., None], resident: int = 0):
    """A function of ``blocks`` blocks of THREADS: declare() its own parameters, body(block, thread, **parameters).

    resident: its blocks that a multiprocessor must have room for, 0 for as many as ptxas likes.
    """
    with kernel_function(name) as made:
        parameters = declare()
        blocks = I.arg("blocks", I.int32())
        I.device_entry()
        with I.attr({MIN_BLOCKS: resident}) if resident else nullcontext():
            block, thread = I.cta_id([blocks]), I.thread_id([THREADS])
            follow_kernels_before()
            body(block, thread, **parameters)
    return made()


def ints(*names: str) -> dict[str, Expr]:
    """int32 parameters."""
    return {name: I.arg(name, I.int32()) for name in names}


def load_words(words: Expr, first: int, pointer: Expr, inside: Expr) -> None:
    """16 bytes to words[first:], zeros where not inside."""
    for i in range(WORDS):
        store(words, first + i, T.uint32(0))
    with when(inside):
        do(T.ptx["ld.global.v4.b32"](*(words[first + i] for i in range(WORDS)), pointer))


def sum_of_lanes(value: Expr, lanes: int) -> None:
    """value[0] summed over groups of lanes."""
    for distance in _distances(lanes):
        store(value, 0, value[0] + from_lane(value[0], distance))


def most_of_lanes(value: Expr, at: int, lanes: int) -> None:
    """The largest value[at] of groups of lanes."""
    for distance in _distances(lanes):
        store(value, at, T.max(value[at], from_lane(value[at], distance)))


def _distances(lanes: int) -> list[int]:
    return [1 << i for i in range(lanes.bit_length() - 1)]


def is_finite(x: Expr) -> Expr:
    """Whether x is neither infinite nor NaN: comparisons with a NaN are false."""
    return T.abs(x) <= T.float32(3.4028234663852886e38)


def find_bounds(s: Shape):
    """bounds: float32 (batch * kv_heads, blocks_a_head, 2): of a block of rows the largest |K| and |row of V|.

    What is not finite does not count: it makes the rows that attend to it non-finite by itself. A grid of (batch *
    kv_heads * blocks_a_head) blocks, each of ``rows`` rows.
    """
    dim = max(s.d, s.dv)

    def declare() -> dict[str, Expr]:
        tensors = {"k": Rows("k", s.dtype, s.d), "v": Rows("v", s.dtype, s.dv)}
        return {**tensors, "bounds": array("bounds", "float32"), **ints("kv_heads", "kv_len", "blocks_a_head", "rows")}

    def body(block, thread, k, v, bounds, kv_heads, kv_len, blocks_a_head, rows):
        place = Place(block, thread, blocks_a_head, kv_heads, dim)
        top, norm, words = registers("top", 2), registers("norm", PASSES), registers("words", 2 * PASSES * WORDS,
                                                                                     "uint32")  # fmt: skip
        store(top, 0, T.float32(0.0))
        store(top, 1, T.float32(0.0))
        with loop(T.truncdiv(rows, place.step * PASSES)) as turn:
            first = let("first", place.block * rows + turn * (place.step * PASSES) + place.row)
            load_two(words, place, first, (k, v), kv_len)
            for p in range(PASSES):
                store(norm, 0, T.float32(0.0))
                for w in range(WORDS):
                    for x in unpack(words[2 * p * WORDS + w], s.dtype):
                        store(top, 0, T.max(top[0], T.if_then_else(is_finite(x), T.abs(x), T.float32(0.0))))
                    for x in unpack(words[(2 * p + 1) * WORDS + w], s.dtype):
                        store(norm, 0, norm[0] + x * x)
                sum_of_lanes(norm, place.lanes)
                store(top, 1, T.max(top[1], T.if_then_else(is_finite(norm[0]), norm[0], T.float32(0.0))))
        for i in range(2):
            most_of_lanes(top, i, 32)
        both = shared_pairs()
        with when(T.EQ(place.lane, 0)):
            for i in range(2):
                store(both, place.warp * 2 + i, top[i])
        do(T.cuda.cta_sync())
        with when(thread < 2):
            best = Cell("best", T.float32(0.0), "float32")
            for w in range(WARPS):
                best.set(T.max(best(), both[w * 2 + thread]))
            value = T.if_then_else(T.EQ(thread, 1), T.sqrt(best()), best())
            store(bounds, wide(block) * 2 + wide(thread), value)

    return kernel(BOUNDS, declare, body)


def shared_pairs() -> Expr:
    """Shared memory: two float32 a warp."""
    return I.alloc_shared((2 * WARPS,), "float32")


def prepare_rows(s: Shape):
    """statistics: float32 (batch * heads, q_len, 4); sums: int32 (batch * heads, q_len, head_dim), zeroed.

    A grid of (batch * heads * blocks_a_head) blocks. bounds, bound_blocks: of ``find_bounds``. dlse: float32, like
    lse, (batch, heads, q_len).
    """
    dim = max(s.d, s.dv)

    def declare() -> dict[str, Expr]:
        tensors = {"o": Rows("o", s.dtype, s.dv), "do_": Rows("do", s.dtype, s.dv)}
        arrays = {name: array(name, "float32") for name in ("lse", "dlse", "bounds", "statistics")}
        numbers = ints("heads", "group", "q_len", "blocks_a_head", "bound_blocks")
        return {**tensors, **arrays, "sums": array("sums", "int32"), **numbers, "scale": I.arg("scale", I.float32())}

    def body(block, thread, o, do_, lse, dlse, bounds, statistics, sums, heads, group, q_len, blocks_a_head,
             bound_blocks, scale):  # fmt: skip
        place = Place(block, thread, blocks_a_head, heads, dim)
        words, first = load_outputs(place, o, do_, q_len)
        ends = load_ends(place, lse, dlse, first, q_len)
        largest = HeadBounds(bounds, place, heads, group, bound_blocks)
        dots = registers("dots", 1)
        squares = registers("squares", 1)
        zero = registers("zero", WORDS, "int32")
        for i in range(WORDS):
            store(zero, i, 0)
        for p in range(PASSES):
            position = let("position", first + p * place.step)
            row = let("row", wide(place.pair) * wide(q_len) + wide(position))
            store(dots, 0, T.float32(0.0))
            store(squares, 0, T.float32(0.0))
            for w in range(WORDS):
                outs, gradients = (unpack(words[(2 * p + i) * WORDS + w], s.dtype) for i in range(2))
                for x, y in zip(outs, gradients, strict=True):
                    store(dots, 0, dots[0] + x * y)
                    store(squares, 0, squares[0] + y * y)
            sum_of_lanes(dots, place.lanes)
            sum_of_lanes(squares, place.lanes)
            with when(position < q_len):
                with when(place.leads):
                    delta = let("delta", dots[0] - ends[2 * p + 1])
                    bound = let("bound", (T.sqrt(squares[0]) * largest.norm + T.abs(delta)) * largest.entry)
                    scale_in = let("scale_in", power_below(bound))
                    log2 = log2_of(ends[2 * p])
                    at = row * STATISTICS
                    out = T.if_then_else(is_finite(delta), scale / scale_in, T.reinterpret("float32", NAN))
                    do(T.ptx["st.global.v4.f32"](statistics.ptr_to([at]), log2, delta, scale_in, out))
                for half in range(2):
                    column = place.column + half * WORDS
                    with when(column < s.d):
                        at = sums.ptr_to([row * s.d + wide(column)])
                        do(T.ptx["st.global.v4.b32"](at, *(zero[i] for i in range(WORDS))))

    return kernel(PREPARE, declare, body)


def load_outputs(place: Place, o: Rows, do_: Rows, q_len: Expr) -> tuple[Expr, Expr]:
    """(words of a thread's PASSES rows, of O and dO in turn; the position of the first)."""
    words = registers("words", 2 * PASSES * WORDS, "uint32")
    first = let("first", place.block * (place.step * PASSES) + place.row)
    load_two(words, place, first, (o, do_), q_len)
    return words, first


def load_ends(place: Place, lse: Expr, dlse: Expr, first: Expr, q_len: Expr) -> Expr:
    """A thread's PASSES rows of lse and dlse in turn, asked for before anything that was asked for is used: plain reads
    the compiler would put off."""
    ends = registers("ends", 2 * PASSES)
    for p in range(PASSES):
        position = T.min(first + p * place.step, q_len - 1)  # one that exists, so that nothing branches
        row = let("end_row", wide(place.pair) * wide(q_len) + wide(position))
        for i, x in enumerate((lse, dlse)):
            do(T.ptx["ld.global.f32"](ends[2 * p + i], x.ptr_to([row])))
    return ends


def load_two(words: Expr, place: Place, first: Expr, tensors: tuple[Rows, Rows], length: Expr) -> None:
    """words = a thread's PASSES rows from position ``first`` on, of both tensors in turn; 0 beyond ``length``."""
    for p in range(PASSES):
        position = let("position", first + p * place.step)
        for i, x in enumerate(tensors):
            inside = T.And(position < length, place.column < x.dim)
            at = x.at(place.batch, place.head, position, place.column)
            load_words(words, (2 * p + i) * WORDS, at, inside)


def log2_of(lse: Expr) -> Expr:
    """LSE in the log2 domain; of a row that attends to nothing, whose scores are masked, any number will do."""
    value = let("row_lse", lse)
    return T.if_then_else(T.EQ(value, T.float32(NEG_INF)), T.float32(0.0), value * T.float32(LOG2E))


def prepare_statistics(s: RowShape):
    """What ``prepare_rows`` does where nothing is to be summed."""
    dim = max(s.d, s.dv)

    def declare() -> dict[str, Expr]:
        tensors = {"o": Rows("o", s.dtype, s.dv), "do_": Rows("do", s.dtype, s.dv)}
        arrays = {name: array(name, "float32") for name in ("lse", "dlse", "statistics")}
        seed = {"seed": array("seed", "uint32")} if s.score.dropout else {}
        return {**tensors, **arrays, **seed, **ints("heads", "q_len", "blocks_a_head")}

    def body(block, thread, o, do_, lse, dlse, statistics, heads, q_len, blocks_a_head, seed=None):
        place = Place(block, thread, blocks_a_head, heads, dim)
        words, first = load_outputs(place, o, do_, q_len)
        ends = load_ends(place, lse, dlse, first, q_len)
        dots = registers("dots", 1)
        for p in range(PASSES):
            position = let("position", first + p * place.step)
            store(dots, 0, T.float32(0.0))
            for w in range(WORDS):
                outs, gradients = (unpack(words[(2 * p + i) * WORDS + w], s.dtype) for i in range(2))
                for x, y in zip(outs, gradients, strict=True):
                    store(dots, 0, dots[0] + x * y)
            sum_of_lanes(dots, place.lanes)
            with when(T.And(position < q_len, place.leads)):
                row = let("row", wide(place.pair) * wide(q_len) + wide(position))
                at, word, place_of = statistics.ptr_to([row * STATISTICS]), T.float32(0.0), T.float32(0.0)
                if s.positional:
                    place_of = T.reinterpret("float32", position)
                if seed is not None:
                    word = T.reinterpret("float32", query_word(seed, position, place.head, place.batch))
                do(T.ptx["st.global.v4.f32"](at, log2_of(ends[2 * p]), dots[0] - ends[2 * p + 1], word, place_of))

    return kernel(PREPARE, declare, body)


class HeadBounds:
    """The largest |K| (entry) and norm of a row of V (norm) of the head that a block's queries attend to."""

    def __init__(self, bounds: Expr, place: Place, heads: Expr, group: Expr, blocks: Expr) -> None:
        top = registers("top", 2)
        for i in range(2):
            store(top, i, T.float32(0.0))
        kv_head = let("kv_head", place.batch * T.truncdiv(heads, group) + T.truncdiv(place.head, group))
        with loop(T.truncdiv(blocks + 31, 32)) as turn:
            one = let("one", turn * 32 + place.lane)
            with when(one < blocks):
                at = let("at_bound", wide(kv_head * blocks + one) * 2)
                for i in range(2):
                    store(top, i, T.max(top[i], bounds[at + i]))
        for i in range(2):
            most_of_lanes(top, i, 32)
        self.entry, self.norm = top[0], top[1]


def power_below(bound: Expr) -> Expr:
    """The largest power of two p with p * bound <= 2^30, within 2^-100 to 2^100."""
    most = let("most", T.min(T.max(T.float32(2.0**30) / bound, T.float32(2.0**-100)), T.float32(2.0**100)))
    bits = T.bitwise_and(T.reinterpret("uint32", most), T.uint32(0x7F800000))
    return T.reinterpret("float32", bits)


def finish_rows(s: Shape):
    """dq = sums * scale out. A grid of (batch * heads * blocks_a_head) blocks."""

    def declare() -> dict[str, Expr]:
        arrays = {"statistics": array("statistics", "float32"), "sums": array("sums", "int32")}
        return {"dq": Rows("dq", s.dtype, s.d), **arrays, **ints("heads", "q_len", "blocks_a_head")}

    def body(block, thread, dq, statistics, sums, heads, q_len, blocks_a_head):
        place = Place(block, thread, blocks_a_head, heads, s.d)
        values = registers("values", PASSES * VALUES, "int32")
        factors = registers("factors", PASSES)
        words = registers("words", WORDS, "uint32")
        first = let("first", place.block * (place.step * PASSES) + place.row)
        inside = [T.And(first + p * place.step < q_len, place.column < s.d) for p in range(PASSES)]
        for p in range(PASSES):
            row = let("row", wide(place.pair) * wide(q_len) + wide(first + p * place.step))
            with when(inside[p]):
                for half in range(2):
                    at = sums.ptr_to([row * s.d + wide(place.column) + half * WORDS])
                    four = (values[p * VALUES + half * WORDS + i] for i in range(WORDS))
                    do(T.ptx["ld.global.v4.b32"](*four, at))
                store(factors, p, statistics[row * STATISTICS + (STATISTICS - 1)])
        for p in range(PASSES):
            with when(inside[p]):
                for w in range(WORDS):
                    low, high = (T.cast(values[p * VALUES + 2 * w + i], "float32") * factors[p] for i in range(2))
                    do(T.ptx[f"cvt.rn.{PTX_TYPE[s.dtype]}x2.f32"](words[w], high, low))
                at = dq.at(place.batch, place.head, first + p * place.step, place.column)
                do(T.ptx["st.global.v4.b32"](at, *(words[w] for w in range(WORDS))))

    return kernel(FINISH, declare, body)
