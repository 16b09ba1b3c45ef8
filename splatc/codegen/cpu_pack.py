"""Packing for CPU kernels: rows of a tensor to buffers that stay in L1 and L2, and back.

Packing does the views, the strides, the zero fill and the dtype: arithmetic (cpu_tile.py) sees none of them.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as I

from splatc.codegen.cpu_tile import Shape
from splatc.codegen.cpu_vector import Expr, constant, lane_range, load, pieces, store, transpose, vector_type

At = tuple[Expr, Expr]  # batch, head


def emit_pack_rows(dst: Expr, pitch: int, src: Expr, at: At, pos: Expr, count: int, dim: int, s: Shape) -> None:
    """dst[j * pitch + d] = src[*at, pos[j], d] for j < count and d < dim; 0 where pos[j] < 0."""
    with I.serial(0, count) as j:
        p = I.Bind(pos[j])
        with I.If(p >= 0):
            with I.Then():
                for d, width in pieces(dim, s.lanes):
                    value = src[at[0], at[1], p, lane_range(d, width)].astype(vector_type(width, s.acc))
                    store(dst, j * pitch + d, value, width)
            with I.Else():
                for d, width in pieces(dim, s.lanes):
                    store(dst, j * pitch + d, constant(0.0, width, s.acc), width)


def emit_unpack_rows(
    dst: Expr, at: At, pos: Expr, src: Expr, pitch: int, dim: int, s: Shape, add: Expr | None = None
) -> None:
    """dst[*at, pos[i], d] = src[i * pitch + d] for the valid rows i of a tile; where add is true, added to what is
    there."""
    with I.serial(0, s.m) as i:
        p = I.Bind(pos[i])
        with I.If(p >= 0), I.Then():
            for d, width in pieces(dim, s.lanes):
                value, where = load(src, i * pitch + d, width), [at[0], at[1], p, lane_range(d, width)]
                if add is None:
                    I.buffer_store(dst, value.astype(vector_type(width, dst.dtype)), where)
                    continue
                with I.If(add):
                    with I.Then():
                        I.buffer_store(dst, dst[at[0], at[1], p, lane_range(d, width)] + value, where)
                    with I.Else():
                        I.buffer_store(dst, value, where)


def emit_pack_transposed(
    dst: Expr, rows: Expr, src: Expr, at: At, pos: Expr, dim: int, pitch: int, s: Shape, factor: Expr
) -> None:
    """dst = a row tile of src, transposed, times factor (0 for invalid rows); rows: space for s.m * pitch values."""
    emit_pack_rows(rows, pitch, src, at, pos, s.m, dim, s)
    emit_transpose_in(dst, rows, s, pitch, factor)


def emit_transpose_in(dst: Expr, rows: Expr, s: Shape, pitch: int, factor: Expr) -> None:
    """dst[block, d, i] = rows[block * width + i, d] * factor."""
    n = s.lanes
    scale = I.Bind(T.Broadcast(factor, n))
    with I.serial(0, s.blocks) as block, I.serial(0, s.vecs) as v, I.serial(0, pitch // n) as c:
        row = block * s.width + v * n
        square = transpose([I.Bind(load(rows, (row + i) * pitch + c * n, n)) for i in range(n)])
        for d in range(n):
            store(dst, (block * pitch + c * n + d) * s.width + v * n, square[d] * scale, n)


def emit_transpose_out(rows: Expr, src: Expr, s: Shape, pitch: int, factor: Callable[[Expr], Expr]) -> None:
    """rows[block * width + i, d] = src[block, d, i] * factor(block * width + i); factor gives vectors of rows."""
    n = s.lanes
    with I.serial(0, s.blocks) as block, I.serial(0, s.vecs) as v:
        row = block * s.width + v * n
        scale = I.Bind(factor(row))
        with I.serial(0, pitch // n) as c:
            first = block * pitch + c * n
            square = [load(src, (first + d) * s.width + v * n, n) * scale for d in range(n)]
            for i, vector in enumerate(transpose([I.Bind(x) for x in square])):
                store(rows, (row + i) * pitch + c * n, vector, n)


def emit_fill(dst: Expr, count: int, value: Expr, s: Shape) -> None:
    """dst[:count] = value; count: a multiple of the lanes."""
    with I.serial(0, count // s.lanes) as x:
        store(dst, x * s.lanes, T.Broadcast(s.scalar(value), s.lanes), s.lanes)
