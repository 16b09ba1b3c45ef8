"""The end of a row tile: normalise, merge with what an earlier pass left, and store through the Q slot."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from tvm.script import tirx as T

from splatc.codegen.constants import LOG2E, NEG_INF, ceil_div
from splatc.codegen.hopper.emit import Expr, do, let, registers, store
from splatc.codegen.hopper.products import PTX_TYPE, fence, lane_of_block
from splatc.codegen.hopper.shape import chunk
from splatc.codegen.hopper.stored import unpack


def finite(x: Expr) -> Expr:
    """x, or 0 for -inf: so that exp2(-inf - x) is 0 and not NaN."""
    return T.if_then_else(T.EQ(x, T.float32(NEG_INF)), T.float32(0.0), x)


def merge_weights(inverse: Expr, lse: Expr, old_lse: Expr, old_weight: Expr) -> None:
    """Fold the weight of the new part into ``inverse``; old_weight[r] is the earlier part's; lse becomes the sum's."""
    w = registers("merged", 3)
    for r in range(2):
        top = let("top", finite(T.max(lse[r], old_lse[r])))
        store(w, 0, T.exp2((lse[r] - top) * T.float32(LOG2E)))
        store(w, 1, T.exp2((old_lse[r] - top) * T.float32(LOG2E)))
        store(w, 2, w[0] + w[1])
        store(lse, r, top + T.log(w[2]))
        share = let("share", T.if_then_else(T.EQ(w[2], T.float32(0.0)), T.float32(0.0), T.float32(1.0) / w[2]))
        store(inverse, r, inverse[r] * w[0] * share)
        store(old_weight, r, w[1] * share)


def stage_output(o: Expr, dv: int, inverse: Expr, slot: Expr, base: Expr, rows: int, warp: Expr,
                 lane: Expr, old_weight: Expr | None = None) -> None:  # fmt: skip
    """Write o * inverse (o: accumulators of 64 x dv) to slot[base:], swizzled chunks that lie ``rows`` rows apart.

    With old_weight the slot holds an earlier part's output, which is added with that weight.
    """
    stage = _stage_words if slot.dtype == "float32" else _stage_halves
    stage(o, dv, inverse, slot, base, rows, warp, lane, old_weight)


def _stage_halves(o: Expr, dv: int, inverse: Expr, slot: Expr, base: Expr, rows: int, warp: Expr,
                  lane: Expr, old_weight: Expr | None) -> None:  # fmt: skip
    """16 columns at a time, by the matrix loads and stores of 16-bit values."""
    kind = PTX_TYPE[slot.dtype]
    words = registers("words", 4, "uint32")
    old = registers("old", 4, "uint32")
    row = let("row", warp * 16 + lane % 16)
    for i in range(ceil_div(dv, 16)):
        at = slot.ptr_to([lane_of_block(i, base, row, lane, rows, chunk(slot.dtype))])
        if old_weight is not None:
            do(T.ptx["ldmatrix.sync.aligned.m8n8.x4.shared.b16"](*(old[j] for j in range(4)), at))
        for pair in range(2):
            for r in range(2):
                first = i * 8 + pair * 4 + 2 * r
                low, high = o[first] * inverse[r], o[first + 1] * inverse[r]
                if old_weight is not None:
                    before = unpack(old[pair * 2 + r], slot.dtype)
                    low, high = low + old_weight[r] * before[0], high + old_weight[r] * before[1]
                do(T.ptx[f"cvt.rn.{kind}x2.f32"](words[pair * 2 + r], high, low))
        do(T.ptx["stmatrix.sync.aligned.m8n8.x4.shared.b16"](at, *(words[j] for j in range(4))))


def _stage_words(o: Expr, dv: int, inverse: Expr, slot: Expr, base: Expr, rows: int, warp: Expr,
                 lane: Expr, old_weight: Expr | None) -> None:  # fmt: skip
    """Two columns of two rows at a time, as the accumulators lie."""
    width = chunk(slot.dtype)
    pair, old = registers("pair", 2), registers("old", 2)
    place = registers("place", 1, "uint32")
    store(place, 0, T.cast(warp * 32 + lane, "uint32"))
    fence(place, 1)  # or the compiler would compute all addresses early, and keep them through the loop
    thread = T.cast(place[0], "int32")
    row = let("row", thread // 32 * 16 + thread % 32 // 4)  # its neighbour 8 rows on is swizzled alike
    for i in range(ceil_div(dv, 8)):
        column16 = T.bitwise_xor(i % 4 * 2 + thread % 4 // 2, row % 8)
        for r in range(2):
            at_row = base + (row + 8 * r) * width + i // 4 * (rows * width)
            at = slot.ptr_to([at_row + column16 * 4 + thread % 2 * 2])
            if old_weight is not None:
                do(T.ptx["ld.shared.v2.f32"](old[0], old[1], at))
            for c in range(2):
                new = o[i * 4 + 2 * r + c] * inverse[r]
                store(pair, c, new if old_weight is None else new + old_weight[r] * old[c])
            do(T.ptx["st.shared.v2.f32"](at, pair[0], pair[1]))
