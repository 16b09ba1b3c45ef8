"""Views show each position once, pieces seen through any view are the same pieces, and tiles waste little."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from splatc import patterns as P
from splatc.codegen.tables import build_tables
from splatc.formats.acsr import ACSR
from splatc.formats.remainder import BlockBits
from splatc.formats.strips import row_runs, unit_runs
from splatc.ir.cover import cover, origins, tile_count
from splatc.ir.interpret import elements
from splatc.ir.passes import Schedule, lower, run_passes
from splatc.ir.patches import boxes_of
from splatc.ir.program import Cover, Region
from splatc.ir.see import see
from splatc.ir.views import View, blocks, contiguous, residue
from tests import library

LANES = st.sampled_from([32, 64, 80, 96, 112, 128, 192])


# -- views -------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 700), st.integers(1, 200), LANES)
@example(1000, 7, 192)
@example(8191, 7, 112)
@example(17, 200, 96)
def test_tiles_of_a_view_hold_each_position_once(length, step, lanes):
    for view in (contiguous(length, lanes), residue(length, step, lanes)):
        assert view.lanes == lanes and view.step == (1 if view.kind == "contiguous" else step)
        position = view.positions(origins(view, np.arange(tile_count(view))))
        found = np.sort(position[position >= 0])
        np.testing.assert_array_equal(found, np.arange(length))


@given(st.integers(1, 700), st.integers(1, 200), LANES)
def test_positions_within_the_extents_exist(length, step, lanes):
    """So a tensor map that is zero-filled outside them needs no other check."""
    for view in (contiguous(length, lanes), residue(length, step, lanes), blocks(length, step, 0, 1, lanes)):
        for extents in view.shown:
            last = sum((n - 1) * s for n, s in zip(extents, view.strides, strict=True))
            assert not view.extents[1] or (min(extents) > 0 and last < length)


@given(st.integers(1, 700), st.integers(1, 200), st.sampled_from([64, 128, 192]))
def test_tiles_of_rows_have_parts_of_64_lanes(length, step, lanes):
    recur = blocks(length, step, step // 3, min(step - step // 3, 64), lanes, lanes // 64)
    for view in (contiguous(length, lanes), residue(length, step, lanes), recur):
        origin = origins(view, np.arange(tile_count(view)))
        whole, (box, move) = view.positions(origin), view.sub_box(lanes // 64)
        for i in range(lanes // 64):
            part = replace(view, box=box).positions(origin + i * np.array(move))
            wanted = whole[:, 64 * i : 64 * i + 64]
            same = (part == wanted).all(1)
            assert same.all() or view.seam  # a part that begins beyond the seam is no part of its tile


def test_a_box_that_has_no_such_parts_is_refused():
    with pytest.raises(ValueError, match="no 3 equal parts"):
        contiguous(100, 64).sub_box(3)


@pytest.mark.parametrize("lanes", [64, 80, 96, 112, 128, 192])
def test_boxes_of_patches_have_exactly_the_lanes_of_a_tile(lanes):
    for grid in ((64, 128, 1), (16, 16, 32), (7, 300, 1)):
        boxes = boxes_of(lanes, grid, max(lanes // 64, 1) if lanes % 64 == 0 else 1)
        assert (boxes.prod(1) == lanes).all()
        assert len(boxes) or lanes == 192


@given(st.integers(1, 700), st.integers(2, 200), st.data())
def test_tiles_of_a_blocks_view_hold_the_columns_that_recur(length, size, data):
    lanes = data.draw(LANES)
    offset = data.draw(st.integers(0, size - 1))
    width = data.draw(st.integers(1, min(lanes // 2, size)))
    view = blocks(length, size, offset, width, lanes)
    assert view.lanes == lanes and view.box[0] >= width
    position = view.positions(origins(view, np.arange(tile_count(view))))
    lane = np.arange(lanes) % view.box[0]
    wanted = np.arange(0, length, size)[:, None] + offset + np.arange(width)
    np.testing.assert_array_equal(np.sort(position[position >= 0]), wanted[wanted[:, -1] < length].ravel())
    assert (position[:, lane >= width] == -1).all()


@pytest.mark.parametrize(
    "view, text",
    [
        (contiguous(100, 64), "contiguous(100:1) box 64"),
        (residue(100, 4, 64), "residue(25:4, 4:1) box 32x2"),
        (blocks(100, 16, 12, 4, 64), "blocks(16:1, 6:16) from 12 box 4x16"),
    ],
)
def test_views_print(view, text):
    assert str(view) == text


# -- pieces seen through views -----------------------------------------------------------------------------------------


def position_of(view: View, line: np.ndarray, u: np.ndarray) -> np.ndarray:
    """The position at (line, u) of a view, by its definition."""
    if view.kind == "contiguous":
        return u
    if view.kind == "residue":
        return line + view.strides[0] * u
    return u // view.box[0] * view.strides[1] + view.offset + u % view.box[0]


def recurring(length: int, lanes: int, draw: st.DrawFn) -> View:
    size = draw(st.integers(2, 20))
    return blocks(length, size, draw(st.integers(0, size - 1)), draw(st.integers(1, size)), lanes)


@st.composite
def seen_through(draw):
    """A mask without a remainder, and any two views, not the ones that the compiler would choose."""
    pattern, q_len, kv_len = draw(library.sized_patterns(100, 3))
    lanes = draw(st.sampled_from([32, 64]))
    step = draw(st.integers(1, 12))
    rows = draw(st.sampled_from([contiguous(q_len, lanes), residue(q_len, step, lanes), recurring(q_len, lanes, draw)]))
    kind = draw(st.sampled_from(["contiguous", "residue", "blocks"]))
    if kind == "residue":
        cols = residue(kv_len, step if draw(st.booleans()) else draw(st.integers(1, 12)), lanes)
    elif kind == "blocks":
        cols = recurring(kv_len, lanes, draw)
    else:
        cols = contiguous(kv_len, lanes)
    return pattern, q_len, kv_len, rows, cols


@settings(max_examples=400)
@given(seen_through())
def test_pieces_and_tiles_are_the_same_through_any_view(case):
    pattern, q_len, kv_len, rows, cols = case
    acsr = ACSR.from_pattern(pattern, q_len, kv_len)
    pieces = acsr.pieces.table
    shown = [i for i in range(len(pieces)) if see(pieces[i : i + 1], rows, cols) is not None]
    mask = ACSR(q_len, kv_len, type(acsr.pieces)(pieces[shown])).to_dense()
    seen = see(pieces[shown], rows, cols)
    assert seen is not None  # each alone can be shown, so all of them can
    held = np.zeros((q_len, kv_len), np.int32)
    for strip, row_line, col_line in zip(seen.strips, seen.row_line, seen.col_line):
        for u, start, stop in zip(*unit_runs(row_runs(strip[None]))):
            q, k = position_of(rows, row_line, u), position_of(cols, col_line, np.arange(start, stop))
            held[q, k] += 1
    np.testing.assert_array_equal(held, mask)
    if cols.kind == "residue" and (rows.kind, rows.step) != ("residue", cols.step):
        return  # never chosen: a tile holds lines of one step
    tiles = cover(q_len, kv_len, (Region(rows, cols, pieces[shown], BlockBits.none()),), every_row=True)
    np.testing.assert_array_equal(elements(tiles), mask)
    build_tables(tiles)


# -- waste -------------------------------------------------------------------------------------------------------------


def tile_area(acsr: ACSR) -> int:
    """Elements that the tiles of all passes compute."""
    program = run_passes(lower(acsr), Schedule())
    return sum(build_tables(domain).tiles * domain.rows.lanes * domain.cols[0].lanes
               for _, domain in program.domains if isinstance(domain, Cover))  # fmt: skip


def block_area(mask: np.ndarray, side: int = 128) -> int:
    """Elements that 128 x 128 blocks with bit masks would compute."""
    q, k = mask.shape
    padded = np.zeros((-(-q // side) * side, -(-k // side) * side), bool)
    padded[:q, :k] = mask
    return int(padded.reshape(len(padded) // side, side, -1, side).any((1, 3)).sum()) * side * side


@pytest.mark.parametrize(
    "pattern",
    [P.window(256, 256), P.dilated(1024, 1024, 4), P.strided(64), P.strided(8), P.fixed(128, 16),
     P.causal() & P.fixed(128, 16)],
    ids=str,
)  # fmt: skip
def test_regular_masks_waste_little(pattern):
    acsr = ACSR.from_pattern(pattern, 8192)
    assert tile_area(acsr) <= 1.35 * acsr.nnz


def test_a_view_shows_those_of_many_pieces_that_it_can():
    mask = P.fixed(128, 8) & P.window(0, 9999) | P.fixed(64, 3) & P.window(9999, -1)
    per_row = [tile_area(ACSR.from_pattern(mask, n)) / n for n in (2048, 4001, 4097)]
    assert max(per_row) < 2 * min(per_row)


@pytest.mark.parametrize("lanes, tiles", [(64, 129), (128, 66), (192, 45)])
def test_classes_that_nearly_fill_tiles_share_them(lanes, tiles):
    """127 classes of 64 positions and one of 65: only that one needs a second tile along its line."""
    view = residue(64 * 128 + 1, 128, lanes)
    position = view.positions(origins(view, np.arange(tile_count(view))))
    assert (position >= 0).any(1).sum() == tiles and view.box[0] == 64


@pytest.mark.usefixtures("eager_views")
def test_a_pass_has_as_many_column_views_as_the_kernel():
    q, k = np.arange(2048)[:, None], np.arange(2048)[None, :]
    band = q * 5 // 2048 * 16 + 4
    mask = (k % 128 >= band) & (k % 128 < band + 6)
    acsr = ACSR.from_dense(mask)
    counts = []
    for most in (None, 4, 3, 1):
        ((_, tiles),) = run_passes(lower(acsr), Schedule(max_col_views=most)).domains
        assert isinstance(tiles, Cover)
        np.testing.assert_array_equal(elements(tiles), mask)
        assert most is None or sum(len(view.shown) for view in tiles.cols) <= most
        counts.append(tiles.tiles)
    assert counts == sorted(counts) and counts[0] < counts[-1]  # each view less costs tiles


def test_rows_have_as_many_views_as_the_kernel():
    acsr = ACSR.from_pattern(P.strided(7), 1000)
    for most, kind in ((1, "contiguous"), (2, "residue")):
        ((_, tiles),) = run_passes(lower(acsr), Schedule(max_row_views=most)).domains
        assert isinstance(tiles, Cover) and tiles.rows.kind == kind and len(tiles.rows.shown) == most


@pytest.mark.parametrize("length", [2000, 2048, 2200])
def test_rows_that_recur_are_side_by_side(length):
    """The keys that all later blocks attend to, seen from the keys: few full row tiles, in a pass of their own."""
    pattern = (P.causal() & P.fixed(128, 16)).transposed()
    acsr = ACSR.from_pattern(pattern, length)
    program = run_passes(lower(acsr), Schedule(128, 64, max_row_views=2, max_col_views=4))
    kinds = [tiles.rows.kind for _, tiles in program.domains]
    assert kinds == ["contiguous", "blocks"]
    np.testing.assert_array_equal(sum(elements(tiles) for _, tiles in program.domains), pattern.dense(length, length))
    recurring = program.domains[1][1]
    assert len(recurring.items) == -(-(length // 128) // 8)
    assert (recurring.entries[:, 5] == 0).any()  # tiles that eight strips fill together are full
    assert tile_area(acsr) < 2 * acsr.nnz


@pytest.mark.parametrize("name", library.NAMES)
@pytest.mark.parametrize("shape", [(127, 127), (1000, 1000), (127, 1000), (1000, 129)],
                         ids=lambda s: f"{s[0]}x{s[1]}")  # fmt: skip
def test_never_more_than_128_blocks(name, shape):
    pattern = library.pattern(name, *shape)
    if pattern is None:
        return  # it needs q_len == kv_len
    mask = pattern.dense(*shape)
    assert tile_area(ACSR.from_pattern(pattern, *shape)) <= block_area(mask)
    assert tile_area(ACSR.from_dense(mask)) <= block_area(mask)


@settings(max_examples=150)
@given(library.sized_patterns(400, 3), st.booleans())
@example((P.causal() | P.strided(2), 65, 65), False)
@example((P.fixed(100, 7) | P.dilated(30, 20, 3), 1000, 1000), False)
def test_random_compositions_never_take_more_than_128_blocks(case, from_matrix):
    pattern, q_len, kv_len = case
    mask = pattern.dense(q_len, kv_len)
    acsr = ACSR.from_dense(mask) if from_matrix else ACSR.from_pattern(pattern, q_len, kv_len)
    assert tile_area(acsr) <= block_area(mask)


@settings(max_examples=150)
@given(library.masks())
def test_random_masks_never_take_more_than_128_blocks(mask):
    assert tile_area(ACSR.from_dense(mask)) <= block_area(mask)


@pytest.mark.parametrize("name", ["full", "window", "causal", "blocked", "mask"])
def test_without_views_everything_is_contiguous(name):
    pattern = library.pattern(name, 300)
    program = run_passes(lower(ACSR.from_pattern(pattern, 300)), Schedule(64, 128, views=False))
    ((_, tiles),) = program.domains
    assert [view.kind for view in (tiles.rows, *tiles.cols)] == ["contiguous"] * 2
    np.testing.assert_array_equal(elements(tiles), pattern.dense(300))


@pytest.mark.parametrize(("grid", "size"), [((32, 64), 9), ((8, 12, 20), 3), ((8, 16, 20), (3, 5, 5))])
def test_clamped_windows_are_patches_too(grid, size):
    """Their windows stand still at borders; that hides neither the grid nor how far a query sees."""
    tiles = []
    for border in ("cut", "clamp"):
        n = int(np.prod(grid))
        acsr = ACSR.from_pattern(P.neighborhood(grid, size, border=border), n, n)
        program = run_passes(lower(acsr), Schedule(64, 64))
        covers = [d for _, d in program.domains if isinstance(d, Cover)]
        assert [cover.rows.kind for cover in covers] == ["patches"]
        tiles.append(covers[0].tiles)
    assert tiles[1] < 1.25 * tiles[0]
