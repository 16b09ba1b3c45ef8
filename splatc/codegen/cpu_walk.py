"""How CPU kernels walk over tables: row tiles, their column tiles, and the positions of the lanes of both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as I

from splatc.codegen.cpu_tile import Bits, Shape
from splatc.codegen.cpu_vector import Expr

ALIGN = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}  # bytes of an element


@dataclass(frozen=True)
class Walk:
    """The tables that a function is called with (docs/architecture.md)."""

    work: Expr
    items: Expr
    entries: Expr
    views: Expr
    bits: Expr
    chunks: Expr


def match_walk(s: Shape) -> Walk:
    """Declare the table arguments, in the order of the ABI."""
    return Walk(
        work=match_array("work", (I.int32(), 2), "int32"),
        items=match_array("items", (I.int32(), 8), "int32"),
        entries=match_array("entries", (I.int32(), 8), "int32"),
        views=match_array("views", (I.int32(), 12), "int32"),
        bits=match_array("bits", (I.int32(), s.n, s.m // 32), "uint32"),
        chunks=match_array("chunks", (I.int32(),), "int32"),
    )


def match_qkv(s: Shape) -> tuple[Expr, Expr, Expr]:
    """Declare q, k and v, with which every function begins; lengths and strides are symbolic."""
    batch, heads, kv_heads, q_len, kv_len = (I.int64() for _ in range(5))
    d, dv = T.int64(s.d), T.int64(s.dv)
    return (
        match_strided("q", (batch, heads, q_len, d), s.dtype),
        match_strided("k", (batch, kv_heads, kv_len, d), s.dtype),
        match_strided("v", (batch, kv_heads, kv_len, dv), s.dtype),
    )


def group_size(q: Expr, k: Expr) -> Expr:
    """Query heads that share a key head."""
    return I.Bind(T.cast(T.truncdiv(q.shape[1], k.shape[1]), "int32"))


def match_array(name: str, shape: tuple[Expr, ...], dtype: str) -> Expr:
    """Declare a contiguous argument."""
    return I.match_buffer(I.arg(name, I.handle()), shape, dtype, align=ALIGN.get(dtype, 4))


def match_strided(name: str, shape: tuple[Expr, ...], dtype: str) -> Expr:
    """Declare an argument of any strides whose last axis is contiguous."""
    strides = [*(I.int64() for _ in shape[1:]), T.int64(1)]
    return I.match_buffer(I.arg(name, I.handle()), shape, dtype, strides=strides, align=ALIGN[dtype])


def emit_items(t: Walk, worker: Expr, body: Callable[[Expr, Expr, Expr], None]) -> None:
    """body(batch, head, item) for all items of one worker, one after the other."""
    works = t.work.shape[0]
    with I.serial(t.chunks[worker], t.chunks[worker + 1]) as w:
        slot = I.Bind(T.truncmod(w, works))
        batch = I.Bind(T.truncdiv(w, works))
        body(batch, I.Bind(t.work[slot, 0]), I.Bind(t.work[slot, 1]))


def emit_row_positions(t: Walk, item: Expr, pos: Expr, length: Expr) -> None:
    """pos[lane] = the position of each lane of an item, -1 if it is invalid."""
    emit_positions(pos, t.views, t.items[item, 5], [t.items[item, i] for i in range(3)], length)


def emit_tiles(
    t: Walk, item: Expr, pos: Expr, length: Expr, pack: Callable[[], None], compute: Callable[[Bits | None], None]
) -> None:
    """For every column tile of an item: pos[lane] is set, then pack(), then compute(its bits, None for a full one)."""
    first = I.Bind(t.items[item, 3])
    with I.serial(first, first + t.items[item, 4]) as e:
        view = I.Bind(t.entries[e, 5])
        bits = I.Bind(t.entries[e, 4])
        with I.serial(0, t.entries[e, 3]) as r:
            origin = [I.Bind(t.entries[e, i] + r * t.views[view, 9 + i]) for i in range(3)]
            emit_positions(pos, t.views, view, origin, length)
            pack()
            with I.If(T.EQ(bits, 0)):
                with I.Then():
                    compute(None)
                with I.Else():
                    compute(Bits(t.bits, bits - 1))


def emit_positions(pos: Expr, views: Expr, view: Expr, origin: list[Expr], length: Expr) -> None:
    """pos[lane] = the position of each lane of the view's box at `origin`, -1 if it is invalid."""
    n, stride, box = ([I.Bind(views[view, 3 * g + i]) for i in range(3)] for g in range(3))
    length = I.Bind(T.cast(length, "int32"))
    with I.serial(0, box[2]) as i3, I.serial(0, box[1]) as i2:
        x2, x3 = I.Bind(origin[1] + i2), I.Bind(origin[2] + i3)
        inside = I.Bind(T.And(T.And(x2 >= 0, x2 < n[1]), T.And(x3 >= 0, x3 < n[2])))
        base = I.Bind(x2 * stride[1] + x3 * stride[2])
        lane = I.Bind((i3 * box[1] + i2) * box[0])
        with I.serial(0, box[0]) as i1:
            x1 = I.Bind(origin[0] + i1)
            p = I.Bind(x1 * stride[0] + base)
            valid = T.And(T.And(inside, T.And(x1 >= 0, x1 < n[0])), p < length)
            I.buffer_store(pos, T.Select(valid, p, T.int32(-1)), [lane + i1])
