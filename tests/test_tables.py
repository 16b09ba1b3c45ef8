"""Tables hold the mask exactly: read back from the kernel ABI alone, by code that knows nothing of the compiler."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from splatc import patterns as P
from splatc.codegen.tables import Tables, build_tables, check_nnz
from splatc.errors import VerifyError
from splatc.formats.acsr import ACSR
from splatc.ir.passes import PASSES, Schedule, lower, run_passes
from splatc.ir.program import Cover
from splatc.runtime.plan import Launch, launches
from tests import library


def lanes_at(view: list[int], x: tuple[int, int, int], length: int) -> np.ndarray:
    """The position of each lane of a box at x, -1 where it is invalid."""
    n, s, b = view[0:3], view[3:6], view[6:9]
    out = []
    for i in range(b[0] * b[1] * b[2]):
        at = x[0] + i % b[0], x[1] + i // b[0] % b[1], x[2] + i // (b[0] * b[1])
        position = sum(p * stride for p, stride in zip(at, s))
        inside = all(0 <= p < extent for p, extent in zip(at, n)) and position < length
        out.append(position if inside else -1)
    return np.array(out)


def rebuild(launch: Launch, heads: int, q_len: int, kv_len: int) -> tuple[np.ndarray, np.ndarray]:
    """(times each pair is attended to, times each row is written) of one launch, head by head, by the ABI."""
    times, written = np.zeros((heads, q_len, kv_len), np.int32), np.zeros((heads, q_len), np.int32)
    by_item: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for item in set(launch.work[:, 1].tolist()):
        *x, first, count, q_view, _, _ = launch.items[item].tolist()
        rows = lanes_at(launch.views[q_view].tolist(), tuple(x), q_len)
        held = np.zeros((q_len, kv_len), np.int32)
        for x1, x2, x3, repeat, bits, k_view, *_ in launch.entries[first : first + count].tolist():
            view = launch.views[k_view].tolist()
            assert repeat >= 1 and (repeat == 1 or bits == 0)
            for i in range(repeat):
                cols = lanes_at(view, tuple(x + i * step for x, step in zip((x1, x2, x3), view[9:12])), kv_len)
                if bits:
                    words = launch.bits[bits - 1]
                    lane = np.arange(len(rows))
                    tile = (words[:, lane // 32] >> (lane % 32).astype(np.uint32) & 1).astype(bool).T
                else:
                    tile = np.ones((len(rows), len(cols)), bool)
                tile = tile[rows >= 0]
                assert not tile[:, cols < 0].any()  # a full tile has no invalid column, and bits hide theirs
                np.add.at(held, np.ix_(rows[rows >= 0], cols[cols >= 0]), tile[:, cols >= 0])
        by_item[item] = rows[rows >= 0], held
    for head, item in launch.work.tolist():
        rows, held = by_item[item]
        times[head] += held
        written[head, rows] += 1
    return times, written


def tables_of(acsr: ACSR, schedule: Schedule = Schedule()) -> tuple[Tables, ...]:  # noqa: B008
    program = run_passes(lower(acsr), schedule, PASSES)
    return tuple(build_tables(domain) for _, domain in program.domains if isinstance(domain, Cover))


def assert_holds(tables: list[tuple[Tables, ...]], of_head: list[int], wanted: np.ndarray) -> list[Launch]:
    """The launches together hold bool[heads, q_len, kv_len] once; the first writes all rows, none writes one twice."""
    plan = launches(tables, of_head)
    assert len(plan) == max(len(t) for t in tables)
    total = np.zeros(wanted.shape, np.int32)
    for i, launch in enumerate(plan):
        for array, dtype, width in ((launch.work, np.int32, 2), (launch.items, np.int32, 8),
                                    (launch.entries, np.int32, 8), (launch.views, np.int32, 12)):  # fmt: skip
            assert array.dtype == dtype and array.flags.c_contiguous and array.shape[1] == width and len(array)
        assert launch.bits.dtype == np.uint32 and launch.bits.flags.c_contiguous and len(launch.bits)
        boxes = launch.views[:, 6:9].prod(1)
        assert set(boxes.tolist()) <= {launch.bits.shape[1], 32 * launch.bits.shape[2]}
        times, written = rebuild(launch, *wanted.shape)
        assert (written == 1).all() if i == 0 else (written <= 1).all()
        total += times
    np.testing.assert_array_equal(total, wanted)
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
    launch = Launch(work, none, none, none, bits, np.array(cost))
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
