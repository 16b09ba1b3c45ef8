"""Tables hold the mask exactly: read back from the kernel ABI alone, by code that knows nothing of the compiler."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from splatc import patterns as P
from splatc.codegen.costs import Costs
from splatc.codegen.tables import Tables, accumulator_bits, build_tables, check_nnz
from splatc.errors import VerifyError
from splatc.formats.acsr import ACSR
from splatc.ir.passes import PASSES, Schedule, lower, run_passes
from splatc.ir.program import Cover
from splatc.runtime.plan import Launch, launches
from splatc.runtime.work import work_of
from tests import library

PORTABLE = Schedule()
# Cutting rows is free: wherever it helps at all, it is done.
EAGER = Costs(tile=1.0, bits=0.0, item=0.0, launch=0.0, combine=0.0, bandwidth=1e6, workers=7, source="a test")
TILES = [(64, 64), (128, 128), (192, 128), (128, 64), (128, 32), (128, 112), (64, 80), (192, 96)]
FIELDS = {"work": 2, "items": 8, "entries": 8, "row_views": 12, "col_views": 12}


def hopper(tile_m: int, tile_n: int, **changes) -> Schedule:
    """A schedule with all that the tensor-core kernel can do."""
    options = {"max_row_views": 2, "max_col_views": 4, "gather": tile_n % 64 == 0} | changes
    return Schedule(tile_m, tile_n, **options)


def lanes_at(view: list[int], x: tuple[int, int, int], length: int) -> np.ndarray:
    """The position of each lane of a box at x as a tensor map reads it: inside the extents it exists, outside is -1."""
    n, s, b = view[0:3], view[3:6], view[6:9]
    lane = np.arange(b[0] * b[1] * b[2])
    at = [x[0] + lane % b[0], x[1] + lane // b[0] % b[1], x[2] + lane // (b[0] * b[1])]
    position = np.sum([p * stride for p, stride in zip(at, s, strict=True)], axis=0)
    inside = np.logical_and.reduce([(p >= 0) & (p < extent) for p, extent in zip(at, n, strict=True)])
    assert (position[inside] < length).all()
    return np.where(inside, position, -1)


def column_tiles(launch: Launch, entries: np.ndarray, kv_len: int):
    """(bits, key of each lane) of every column tile of entries."""
    for x1, x2, x3, repeat, bits, view, d1, d2 in entries.tolist():
        assert repeat >= 1 and (repeat == 1 or bits == 0)
        if view < 0:
            assert repeat == 1 and x2 == x3 == 0
            yield bits, launch.gather[x1]
            continue
        assert [d1, d2, 0] == launch.col_views[view, 9:12].tolist()
        for i in range(repeat):
            yield bits, lanes_at(launch.col_views[view].tolist(), (x1 + i * d1, x2 + i * d2, x3), kv_len)


def rebuild(launch: Launch, heads: int, q_len: int, kv_len: int) -> tuple[np.ndarray, np.ndarray]:
    """(times each pair is attended to, times each row is written) of one launch, head by head, by the ABI."""
    written = np.zeros((heads, q_len), np.int32)
    seen_by: list[list[np.ndarray]] = [[np.zeros(0, np.int64)] for _ in range(heads)]  # pairs, as query * kv_len + key
    work = work_of(launch, 1, EAGER)
    held: dict[tuple[int, int, int], np.ndarray] = {}  # pairs of an item's entries
    scratch: dict[int, tuple[int, int]] = {}  # by scratch tile: the head and item whose part it holds
    for _, head, number, part, x1, x2, x3, first, count, view, tiles, masked in work.rows.tolist():
        rows = lanes_at(launch.row_views[view].tolist(), (x1, x2, x3), q_len)
        np.testing.assert_array_equal(launch.positions[number], rows)
        if (number, first, count) not in held:
            pairs, seen = [np.zeros(0, np.int64)], []
            for bits, cols in column_tiles(launch, work.entries[first : first + count], kv_len):
                seen.append(bits > 0)
                tile = np.ones((len(rows), len(cols)), bool)
                if bits:
                    lane = np.arange(len(rows))
                    tile = (launch.bits[bits - 1][:, lane // 32] >> (lane % 32).astype(np.uint32) & 1).astype(bool).T
                i, j = np.nonzero(tile & (rows >= 0)[:, None])
                assert (cols[j] >= 0).all()  # a full tile has no invalid column, and bits hide theirs
                pairs.append(np.ravel_multi_index((rows[i], cols[j]), (q_len, kv_len)))
            assert seen == [i < masked for i in range(tiles)]  # those with bits come first
            held[number, first, count] = np.concatenate(pairs)
        seen_by[head].append(held[number, first, count])
        if part:
            assert part - 1 not in scratch
            scratch[part - 1] = head, number
        else:
            written[head, rows[rows >= 0]] += 1
    for _, head, number, first, parts, *_ in work.combine.tolist():
        lanes = launch.positions[number]
        assert all(scratch.pop(at) == (head, number) for at in range(first, first + parts))
        written[head, lanes[lanes >= 0]] += 1
    assert not scratch  # every part is put together once
    times = [np.bincount(np.concatenate(pairs), minlength=q_len * kv_len) for pairs in seen_by]
    return np.reshape(times, (heads, q_len, kv_len)), written


def tables_of(acsr: ACSR, schedule: Schedule = PORTABLE, fill_empty: bool = False) -> tuple[Tables, ...]:
    program = run_passes(lower(acsr), schedule, PASSES)
    return tuple(build_tables(domain, fill_empty) for _, domain in program.domains if isinstance(domain, Cover))


def assert_holds(tables: list[tuple[Tables, ...]], of_head: list[int], wanted: np.ndarray,
                 *limits: int) -> list[Launch]:  # fmt: skip
    """The launches together hold bool[heads, q_len, kv_len] once; the first pass writes all rows, none one twice."""
    plan = launches(tables, of_head, *limits)
    total = np.zeros(wanted.shape, np.int32)
    first = np.zeros(wanted.shape[:2], np.int32)
    for launch in plan:
        for name, width in FIELDS.items():
            array = getattr(launch, name)
            assert array.dtype == np.int32 and array.flags.c_contiguous and array.shape[1] == width
            assert len(array)
        assert launch.bits.dtype == np.uint32 and launch.bits.flags.c_contiguous and len(launch.bits)
        sides = (launch.row_views, launch.positions.shape[1]), (launch.col_views, launch.gather.shape[1])
        for (views, lanes), limit in zip(sides, limits or (99, 99), strict=True):
            assert (views[:, 6:9].prod(1) == lanes).all() and len(views) <= limit and (views[:, :9] > 0).all()
        assert launch.bits.shape[1:] == (launch.gather.shape[1], launch.positions.shape[1] // 32)
        assert launch.gather.dtype == launch.positions.dtype == np.int32
        heads, q_len, kv_len = wanted.shape
        times, written = rebuild(launch, heads, q_len, kv_len)
        assert (written <= 1).all()
        first += written * (not launch.merge)
        total += times
    np.testing.assert_array_equal(total, wanted)
    assert (first == 1).all()
    return plan


@pytest.mark.parametrize("name", library.NAMES)
@pytest.mark.parametrize("shape", [(129, 129), (400, 400), (63, 200)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_tables_hold_the_mask(name, shape):
    pattern = library.pattern(name, *shape)
    if pattern is None:
        return  # it needs q_len == kv_len
    mask = pattern.dense(*shape)
    tables = tables_of(ACSR.from_pattern(pattern, *shape))
    assert_holds([tables], [0], mask[None])
    check_nnz(tables, int(mask.sum()))


@settings(max_examples=100)
@given(library.sized_patterns(200), st.booleans(), st.sampled_from([(64, 64), (64, 128), (128, 64)]))
@example((P.fixed(128, 16), 600, 600), False, (64, 64))  # full tiles one after the other in a view of blocks
@example((~P.strided(9), 42, 42), True, (64, 64))  # columns that begin in one block and end in the next
def test_tables_hold_random_patterns(case, from_matrix, tile):
    pattern, q_len, kv_len = case
    mask = pattern.dense(q_len, kv_len)
    acsr = ACSR.from_dense(mask) if from_matrix else ACSR.from_pattern(pattern, q_len, kv_len)
    assert_holds([tables_of(acsr, Schedule(*tile))], [0], mask[None])


@settings(max_examples=60)
@given(case=library.strided_patterns())
@pytest.mark.usefixtures("eager_views")
def test_tables_hold_strided_patterns(case):
    pattern, q_len, kv_len = case
    mask = pattern.dense(q_len, kv_len)
    assert_holds([tables_of(ACSR.from_pattern(pattern, q_len, kv_len))], [0], mask[None])


@settings(max_examples=60)
@given(library.masks())
def test_tables_hold_random_masks(mask):
    assert_holds([tables_of(ACSR.from_dense(mask))], [0], mask[None])


@pytest.mark.parametrize("of_head", [[0, 1, 2], [2, 0, 0, 1], [0, 2], [1, 1, 1], [2]])
def test_heads_are_put_together(of_head):
    patterns = [P.causal() & (P.window(20, 0) | P.strided(32)), P.fixed(32, 8), P.mask(P.strided(3).dense(700))]
    acsrs = [ACSR.from_pattern(p, 700) for p in patterns]
    tables = [tables_of(acsr) for acsr in acsrs]
    assert {len(t) for t in tables} != {1}  # not all take one pass
    used = sorted(set(of_head))
    dense = np.stack([acsrs[p].to_dense() for p in of_head])
    plan = launches([tables[p] for p in used], [used.index(p) for p in of_head])
    assert_holds([tables[p] for p in used], [used.index(p) for p in of_head], dense)
    first = plan[0]
    assert first.work[:, 0].tolist() == sorted(first.work[:, 0].tolist())  # head after head


def test_tiles_that_turn_out_empty_or_full_are_neither_stored_nor_kept():
    acsr = ACSR.from_pattern(P.causal() & P.window(63, 0) | P.strided(5) & ~P.strided(5), 640)
    (tables,) = tables_of(acsr)
    assert len(np.unique(tables.bits.reshape(len(tables.bits), -1), axis=0)) == len(tables.bits) <= 2
    filled = tables.bits.any(axis=(1, 2)) & (tables.bits != 0xFFFFFFFF).any(axis=(1, 2))
    assert filled.all()
    blocked = P.block_mask(np.random.default_rng(0).random((10, 10)) < 0.5, 64)
    (tables,) = tables_of(ACSR.from_dense(blocked.dense(640)))
    assert tables.bit_tiles == 0 and tables.tiles * 4096 == blocked.dense(640).sum()


def test_the_empty_mask_has_tables_too():
    tables = tables_of(ACSR.from_dense(np.zeros((70, 90), bool)))
    (launch,) = assert_holds([tables], [0, 0], np.zeros((2, 70, 90), bool))
    assert len(launch.work) == 4 and tables[0].tiles == 0


# -- other tiles, and what only the tensor-core kernel can do ----------------------------------------------------------


def assert_hopper(acsr: ACSR, tile: tuple[int, int], **changes) -> tuple[Tables, ...]:
    """The tables of a schedule for tensor cores hold the mask, have no empty item, and rows in parts of 64."""
    fits = not len(acsr.remainder.rows) or tile[1] % 64 == 0
    if not fits:
        tile = tile[0], 64
    tables = tables_of(acsr, hopper(*tile, **changes), fill_empty=True)
    check_nnz(tables, acsr.nnz)
    assert_holds([tables], [0], acsr.to_dense()[None], 2, 4)
    for t in tables:
        assert (t.items[:, 4] > 0).all() and (t.items[:, 6] > 0).all()
        for *_, b1, b2, b3 in t.row_views[:, :9].tolist():
            last = b3 if b3 > 1 else b2 if b2 > 1 else b1
            assert last % (tile[0] // 64) == 0
    return tables


@pytest.mark.parametrize("tile", TILES, ids=lambda t: f"{t[0]}x{t[1]}")
@pytest.mark.parametrize("name", library.NAMES)
@pytest.mark.parametrize("shape", [(400, 400), (127, 1000), (1, 17)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_hopper_tables_hold_the_mask(name, shape, tile):
    pattern = library.pattern(name, *shape)
    if pattern is not None:  # else it needs q_len == kv_len
        assert_hopper(ACSR.from_pattern(pattern, *shape), tile)


@pytest.mark.parametrize("length", [1, 7, 17, 127, 1000, 1023])
@pytest.mark.parametrize("tile", TILES, ids=lambda t: f"{t[0]}x{t[1]}")
@pytest.mark.usefixtures("eager_views")
def test_hopper_tables_of_views_at_odd_lengths(length, tile):
    for pattern in (P.strided(7), P.dilated(300, 90, 7), P.fixed(13, 3), P.fixed(48, 7), ~P.strided(9),
                    P.causal() & (P.window(9, 0) | P.strided(64))):  # fmt: skip
        assert_hopper(ACSR.from_pattern(pattern, length), tile)


@settings(max_examples=150)
@given(library.sized_patterns(500), st.booleans(), st.sampled_from(TILES))
def test_hopper_tables_hold_random_patterns(case, from_matrix, tile):
    pattern, q_len, kv_len = case
    mask = pattern.dense(q_len, kv_len)
    acsr = ACSR.from_dense(mask) if from_matrix else ACSR.from_pattern(pattern, q_len, kv_len)
    assert_hopper(acsr, tile)


@settings(max_examples=150)
@given(library.strided_patterns(700), st.sampled_from(TILES))
@pytest.mark.usefixtures("eager_views")
def test_hopper_tables_hold_strided_patterns(case, tile):
    pattern, q_len, kv_len = case
    assert_hopper(ACSR.from_pattern(pattern, q_len, kv_len), tile)


@settings(max_examples=60)
@given(library.masks(300), st.sampled_from(TILES))
def test_hopper_tables_hold_random_masks(mask, tile):
    assert_hopper(ACSR.from_dense(mask), tile)


@pytest.mark.parametrize("tile", TILES, ids=lambda t: f"{t[0]}x{t[1]}")
def test_accumulator_bits(tile):
    """Element by element, as the tensor cores' accumulators hold a tile."""
    tile_m, tile_n = tile
    dense = np.random.default_rng(tile_m + tile_n).random((3, tile_m, tile_n)) < 0.5
    packed = np.packbits(dense.transpose(0, 2, 1), axis=2, bitorder="little")
    ours = accumulator_bits(np.ascontiguousarray(packed).view(np.uint32), tile_m, tile_n)
    assert ours.dtype == np.uint32 and ours.shape == (3, tile_m // 64, 128, -(-tile_n // 64))
    wanted = np.zeros_like(ours)
    for b, r, c in np.argwhere(dense).tolist():
        thread = 32 * ((r % 64) // 16) + 4 * (r % 8) + (c % 8) // 2
        i = 4 * (c // 8) + 2 * ((r % 16) // 8) + c % 2
        wanted[b, r // 64, thread, i // 32] |= np.uint32(1 << (i % 32))
    np.testing.assert_array_equal(ours, wanted)


@pytest.mark.parametrize("of_head", [[0, 0], [0, 1, 2, 1], [2, 1], [1]])
def test_heads_share_a_launch(of_head):
    rng = np.random.default_rng(0)
    patterns = [P.longformer(9, 70), P.full(), P.mask((rng.random((700, 700)) < 0.003) | P.global_rows(2).dense(700))]
    acsrs = [ACSR.from_pattern(p, 700) for p in patterns]
    tables = [tables_of(acsr, hopper(128, 64), fill_empty=True) for acsr in acsrs]
    assert len(tables[2][0].gather)
    dense = np.stack([acsrs[p].to_dense() for p in of_head])
    assert len(assert_holds(tables, of_head, dense, 2, 4)) == 1


def test_heads_whose_views_are_too_many_take_several_launches():
    patterns = [P.strided(5), P.strided(7), P.causal(), P.strided(9) | P.global_cols(3)]
    acsrs = [ACSR.from_pattern(p, 700) for p in patterns]
    tables = [tables_of(acsr, hopper(64, 64), fill_empty=True) for acsr in acsrs]
    of_head = [0, 1, 2, 3, 2, 0]
    dense = np.stack([acsrs[p].to_dense() for p in of_head])
    plan = assert_holds(tables, of_head, dense, 2, 4)
    assert len([launch for launch in plan if not launch.merge]) > 1
    heads = np.concatenate([np.unique(launch.work[:, 0]) for launch in plan if not launch.merge])
    assert sorted(heads.tolist()) == list(range(6))
    equal = [P.strided(5), P.strided(5) & P.causal()]
    tables = [tables_of(ACSR.from_pattern(p, 700), hopper(64, 64), fill_empty=True) for p in equal]
    (launch,) = launches(tables, [0, 1, 0])
    np.testing.assert_array_equal(launch.views[launch.joined_entries[:, 5]], launch.col_views[launch.entries[:, 5]])
    np.testing.assert_array_equal(launch.views[launch.items[:, 5]], launch.row_views[launch.items[:, 5]])
    assert len(launch.col_views) == len(tables[0][0].col_views)  # equal views are stored once


def test_tables_that_lose_elements_are_refused():
    tables = tables_of(ACSR.from_pattern(P.causal(), 300))
    check_nnz(tables, 300 * 301 // 2)
    with pytest.raises(VerifyError, match="attend to 45150 elements but the mask has 45151"):
        check_nnz(tables, 300 * 301 // 2 + 1)


def test_a_new_length_is_a_new_table_of_the_same_size():
    """Regular masks: few distinct bits at any length."""
    for pattern in (P.window(128, 128), P.strided(32), P.dilated(256, 256, 4)):
        sizes = [len(tables_of(ACSR.from_pattern(pattern, n))[0].bits) for n in (2048, 4096)]
        assert max(sizes) <= 21


# -- shares of the work ------------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(st.lists(st.floats(0.4, 500), min_size=1, max_size=40), st.integers(1, 5), st.integers(1, 64))
def test_chunks_cover_all_work(cost, batch, workers):
    none = np.zeros((0, 8), np.int32)
    work, bits = np.zeros((len(cost), 2), np.int32), np.zeros((1, 64, 2), np.uint32)
    launch = Launch(False, work, none, none, none, none, bits, none, none, np.array(cost))
    bounds = launch.chunks(batch, workers)
    assert bounds.dtype == np.int32 and len(bounds) == workers + 1
    assert bounds[0] == 0 and bounds[-1] == batch * len(cost) and (np.diff(bounds) >= 0).all()
    spent = np.concatenate([[0], np.cumsum(np.tile(cost, batch))])
    share = np.diff(spent[bounds])
    assert share.max() <= spent[-1] / workers + 2 * max(cost) + 1e-6  # nobody has much more than a fair share


def test_cost_follows_the_tiles():
    tables = tables_of(ACSR.from_pattern(P.causal(), 1024))
    (launch,) = launches([tables], [0, 0])
    tiles = launch.cost - launch.cost.min()
    entries = [launch.entries[first : first + n, 3].sum() for *_, first, n in launch.items[:, :5].tolist()]
    np.testing.assert_allclose(tiles, np.tile(entries, 2) - min(entries))
