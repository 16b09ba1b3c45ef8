"""Every pass keeps the meaning of a program; the verifier finds what is illegal; programs print as expected."""

import copy
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splatc import oracle
from splatc import patterns as P
from splatc.errors import Unsupported, VerifyError
from splatc.formats.acsr import ACSR
from splatc.ir.gather import GATHER_COST
from splatc.ir.interpret import elements, interpret, interpret_gradients
from splatc.ir.numbers import Numbers
from splatc.ir.passes import PASSES, UNFUSED, Schedule, lower, run_passes
from splatc.ir.printer import to_text
from splatc.ir.program import Attend, Cover, Mask, Program, Regions
from splatc.ir.score import Alibi, Softcap, score_of
from splatc.ir.terms import Terms
from splatc.ir.verify import verify
from splatc.ir.views import contiguous, residue
from tests import library

TILES = [(64, 64), (128, 64), (64, 128), (192, 128), (128, 112), (128, 128)]


def tensor_cores(tile_m: int = 128, tile_n: int = 128) -> Schedule:
    """All that passes can do."""
    return Schedule(tile_m, tile_n, max_row_views=2, max_col_views=4, gather=True)


def for_tiles(acsr: ACSR, tile: tuple[int, int]) -> tuple[int, int]:
    """The tile, or one that holds blocks of bits if the mask has some."""
    return tile if not len(acsr.remainder.rows) or tile[1] % 64 == 0 else (tile[0], 64)


def covered(program: Program) -> np.ndarray:
    """How many domains hold each pair."""
    return sum((elements(domain).astype(int) for _, domain in program.domains), np.zeros((), int))


def run_checked(acsr: ACSR, mask: np.ndarray, schedule: Schedule, passes=PASSES) -> Program:
    """Run passes; after each one the program is legal and holds the mask, each pair once."""

    def after(name: str, program: Program) -> None:
        verify(program)
        np.testing.assert_array_equal(covered(program), mask, err_msg=name)
        to_text(program)

    return run_passes(lower(acsr), schedule, passes, after)


@pytest.mark.parametrize("name", library.NAMES)
@pytest.mark.parametrize("shape", [(129, 129), (700, 700), (70, 200)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_every_pass_keeps_the_mask(name, shape):
    pattern = library.pattern(name, *shape)
    if pattern is None:
        return  # it needs q_len == kv_len
    mask = pattern.dense(*shape)
    for acsr in (ACSR.from_pattern(pattern, *shape), ACSR.from_dense(mask)):
        program = run_checked(acsr, mask, Schedule())
        assert all(isinstance(domain, Cover) for _, domain in program.domains)
        assert all(isinstance(op, Attend) for op in program.body)


@settings(max_examples=400)
@given(library.sized_patterns(150), st.sampled_from(TILES), st.booleans(), st.booleans())
def test_every_pass_keeps_random_patterns(case, tile, views, from_matrix):
    pattern, q_len, kv_len = case
    mask = pattern.dense(q_len, kv_len)
    acsr = ACSR.from_dense(mask) if from_matrix else ACSR.from_pattern(pattern, q_len, kv_len)
    run_checked(acsr, mask, Schedule(*for_tiles(acsr, tile), views=views))
    run_checked(acsr, mask, tensor_cores(*for_tiles(acsr, tile)))


@settings(max_examples=200)
@given(library.sized_patterns(600, 3))
def test_every_pass_keeps_longer_patterns(case):
    """Long enough for runs of full tiles in every kind of view."""
    pattern, q_len, kv_len = case
    run_checked(ACSR.from_pattern(pattern, q_len, kv_len), pattern.dense(q_len, kv_len), Schedule())


@settings(max_examples=150)
@given(case=library.strided_patterns(), from_matrix=st.booleans())
@pytest.mark.usefixtures("eager_views")
def test_every_pass_keeps_strided_patterns(case, from_matrix):
    """Through residue, block and patch views, in up to three passes."""
    pattern, q_len, kv_len = case
    mask = pattern.dense(q_len, kv_len)
    acsr = ACSR.from_dense(mask) if from_matrix else ACSR.from_pattern(pattern, q_len, kv_len)
    run_checked(acsr, mask, Schedule())
    run_checked(acsr, mask, tensor_cores())


@settings(max_examples=150)
@given(library.masks(), st.sampled_from(TILES))
def test_every_pass_keeps_random_masks(mask, tile):
    acsr = ACSR.from_dense(mask)
    run_checked(acsr, mask, Schedule(*for_tiles(acsr, tile)))
    run_checked(acsr, mask, tensor_cores(*for_tiles(acsr, tile)))


def scattered(length: int, neighbours: int, seed: int = 0) -> ACSR:
    """Every query attends to so many random keys (less where two are the same)."""
    rng = np.random.default_rng(seed)
    q = np.repeat(np.arange(length), neighbours)
    return ACSR.from_elements(q, rng.integers(0, length, len(q)), length, length)


@pytest.mark.parametrize("other", [P.window(-2000, 2001), P.window(40, 40), P.global_rows(3) | P.causal()], ids=str)
@pytest.mark.parametrize("tile", [(64, 64), (128, 128), (192, 64)], ids=str)
def test_scattered_elements_are_gathered(other, tile):
    acsr = scattered(1500, 2) | ACSR.from_pattern(other, 1500)
    schedule = tensor_cores(tile[0], tile[1])
    ((_, gathered),) = run_checked(acsr, acsr.to_dense(), schedule).domains
    ((_, plain),) = run_checked(acsr, acsr.to_dense(), replace(schedule, gather=False)).domains
    assert isinstance(gathered, Cover) and isinstance(plain, Cover)
    lists = int((gathered.entries[:, 3] == -1).sum())
    assert len(gathered.gather) == lists > 0
    assert gathered.tiles + (GATHER_COST - 1) * lists < 0.95 * plain.tiles
    full = [int(c.entries[c.entries[:, 5] == 0, 4].sum()) for c in (gathered, plain)]
    assert full[0] == full[1]  # only partly filled tiles are replaced
    for keys in gathered.gather:
        keys = keys[keys >= 0]
        assert len(keys) and (np.diff(keys) > 0).all()  # in order, each once


def test_dense_tiles_are_not_gathered():
    noise = P.mask(np.random.default_rng(0).random((600, 600)) < 0.2)
    for pattern in (P.causal(), P.window(30, 30), P.blocked(100), noise):
        (_, cover), = run_passes(lower(ACSR.from_pattern(pattern, 600)), tensor_cores()).domains  # fmt: skip
        assert not len(cover.gather) and (cover.entries[:, 3] >= 0).all()


@pytest.mark.parametrize("name", library.NAMES)
def test_every_pass_keeps_the_result(name):
    pattern = library.pattern(name, 105)
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((105, d)) for d in (5, 5, 3))
    wanted_o, wanted_lse = oracle.attention(q[None, None], k[None, None], v[None, None], pattern.dense(105), 0.7)

    def after(step: str, program: Program) -> None:
        o, lse = interpret(program, q, k, v, 0.7)
        np.testing.assert_allclose(o, wanted_o[0, 0], rtol=1e-12, atol=1e-13, err_msg=step)
        np.testing.assert_allclose(lse, wanted_lse[0, 0], rtol=1e-12, atol=1e-13, err_msg=step)

    acsr = ACSR.from_pattern(pattern, 105)
    with np.errstate(invalid="raise"):
        run_passes(lower(acsr), Schedule(), PASSES, after)
        run_passes(lower(acsr), Schedule(), UNFUSED, after)
        run_passes(lower(acsr), tensor_cores(64, 64), PASSES, after)


SCORES = [score_of(**{x: True}) for x in ("softcap", "alibi", "relative", "block", "sinks", "dropout")]
EVERYTHING = score_of(*[True] * 6)


@pytest.mark.parametrize("score", [*SCORES, EVERYTHING], ids=lambda score: "+".join(score.names))
def test_every_pass_keeps_scores(score):
    """Results and gradients of a head, at every level, against the oracle."""
    rng, heads, (q_len, kv_len) = np.random.default_rng(0), 3, (150, 170)
    pattern = P.causal() & (P.window(30, 0) | P.strided(16)) & ~P.global_rows(2)
    q, k, v, do = (rng.standard_normal((2, heads, n, d)) for n, d in ((q_len, 5), (kv_len, 5), (kv_len, 3), (q_len, 3)))
    dlse = rng.standard_normal((2, heads, q_len))
    has = score.names
    terms = Terms(
        alibi_slopes=rng.random(heads) / 8 if "alibi" in has else None,
        relative_bias=rng.standard_normal((heads, 21)) if "relative" in has else None,
        block_bias=rng.standard_normal((heads, 12, 14)) if "block" in has else None,
        sinks=rng.standard_normal(heads) if "sinks" in has else None,
        seed=np.array([2**50 + 3]) if "dropout" in has else None, block_size=13, shift=kv_len - q_len, dropout_p=0.3,
    )  # fmt: skip
    cap = 1.5 if "softcap" in has else None
    both = q, k, v, pattern.dense(q_len, kv_len)
    wanted = [*oracle.attention(*both, 0.4, cap, terms), *oracle.gradients(*both, do, dlse, 0.4, cap, terms)]
    plain = lower(ACSR.from_pattern(pattern, q_len, kv_len), score)
    turned = lower(ACSR.from_pattern(pattern.transposed(), kv_len, q_len), score)
    for passes in ((), UNFUSED, PASSES):
        rows, columns = (run_passes(one, Schedule(), passes) for one in (plain, turned))
        verify(rows)
        assert rows.score == score
        sums = [np.zeros_like(x) for x in wanted]
        for b, h in np.ndindex(2, heads):
            at = b, h
            numbers = Numbers(cap or 0.0, terms, h, b)
            first = interpret(rows, q[at], k[at], v[at], 0.4, numbers)
            got = *first, *interpret_gradients(rows, columns, q[at], k[at], v[at], do[at], dlse[at], 0.4, numbers)
            for i, (total, x) in enumerate(zip(sums, got, strict=True)):
                total[at if i < 5 else h] += x
        for x, y in zip(sums, wanted):
            np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-10)


def test_scores_are_printed_as_expressions():
    acsr = ACSR.from_pattern(P.causal() & (P.window(63, 0) | P.strided(64)), 4096)
    program = lower(acsr, EVERYTHING)
    assert to_text(program).splitlines()[-4:-1] == [
        "  s = sddmm(q, k) over m | softcap(cap) | alibi(slopes) | bias(relative) | bias(blocks)",
        "  p, lse = softmax(s, sinks) | dropout(seed)",
        "  o = spmm(p, v)",
    ]
    program = run_passes(lower(acsr, score_of(alibi=True, sinks=True)), Schedule())
    assert to_text(program).splitlines()[-3:-1] == [
        "  o, lse = attend(q, k, v) over m0 | alibi(slopes) | softmax(sinks)",
        "  o, lse = attend(q, k, v) over m1 merging (o, lse) | alibi(slopes)",
    ]


def test_passes_are_pure_and_the_hook_sees_each():
    mask = P.causal() & (P.window(20, 0) | P.strided(7))
    program = lower(ACSR.from_pattern(mask, 300))
    before = to_text(program), copy.deepcopy(program.domains[0][1].acsr.pieces.table)
    seen = []
    one = run_passes(program, Schedule(), PASSES, lambda name, _: seen.append(name))
    two = run_passes(program, Schedule(), PASSES)
    assert seen == ["lower", *(p.__name__ for p in PASSES)]
    assert to_text(one) == to_text(two) and to_text(program) == before[0]
    np.testing.assert_array_equal(program.domains[0][1].acsr.pieces.table, before[1])


def test_long_rows_come_first():
    program = run_passes(lower(ACSR.from_pattern(P.longformer(20, 9), 1000)), Schedule())
    for _, domain in program.domains:
        tiles = [domain.entries[first : first + n, 4].sum() for *_, first, n in domain.items.tolist()]
        assert tiles == sorted(tiles, reverse=True)


def test_the_first_pass_writes_every_row():
    for pattern in (P.window(-500, 510), P.causal() & (P.window(9, 0) | P.strided(64)), P.strided(16)):
        program = run_passes(lower(ACSR.from_pattern(pattern, 500)), Schedule())
        first = dict(program.domains)[program.body[0].over]
        rows = first.rows.positions(first.items[:, :3])
        np.testing.assert_array_equal(np.sort(rows[rows >= 0]), np.arange(500))


# -- what is illegal ---------------------------------------------------------------------------------------------------


def stages() -> dict[str, Program]:
    """The program after each pass, for a mask that takes two passes over its rows."""
    out: dict[str, Program] = {}
    acsr = ACSR.from_pattern(P.causal() & (P.window(63, 0) | P.strided(64)), 4096)
    run_passes(lower(acsr), Schedule(), PASSES, out.__setitem__)
    assert len(out["fuse_attention"].body) == 2
    return out


STAGES = stages()


def with_domain(program: Program, **changes) -> Program:
    name, domain = program.domains[0]
    return replace(program, domains=((name, replace(domain, **changes)), *program.domains[1:]))


def changed(table: np.ndarray, row: int, column: int, value: int) -> np.ndarray:
    table = table.copy()
    table[row, column] = value
    return table


def test_a_pair_covered_twice_is_detected():
    small = run_passes(lower(ACSR.from_pattern(P.window(3, 3), 100)), Schedule())
    (_, cover), = small.domains  # fmt: skip
    first = cover.items[0]
    again = np.concatenate([cover.entries, cover.entries[first[3] : first[3] + 1]])
    items = np.concatenate([cover.items, [[*first[:3], len(cover.entries), 1]]])
    with pytest.raises(VerifyError, match="covered 2 times"):
        elements(replace(cover, items=items, entries=again))
    regions = run_passes(lower(ACSR.from_pattern(P.window(3, 3), 100)), Schedule(), PASSES[:1]).domains[0][1]
    with pytest.raises(VerifyError, match="covered 2 times"):
        elements(replace(regions, regions=regions.regions * 2))


def test_a_tile_beyond_the_keys_is_detected():
    (_, cover), = run_passes(lower(ACSR.from_pattern(P.full(), 64)), Schedule()).domains  # fmt: skip
    with pytest.raises(VerifyError, match="keys that do not exist"):
        elements(replace(cover, entries=changed(cover.entries, 0, 0, 32)))


def test_blocks_of_bits_need_tiles_that_hold_them():
    mask = np.random.default_rng(0).random((100, 100)) < 0.5
    for tile in ((32, 64), (64, 48)):
        with pytest.raises(Unsupported, match="64 x 64 bits do not fit"):
            run_passes(lower(ACSR.from_dense(mask)), Schedule(*tile))


@pytest.mark.parametrize("density", [0.002, 0.05, 0.5])
@pytest.mark.parametrize("lanes_k", [16, 32])
def test_narrow_tiles_hold_parts_of_blocks(density: float, lanes_k: int):
    mask = np.random.default_rng(1).random((300, 333)) < density
    program = run_passes(lower(ACSR.from_dense(mask)), Schedule(128, lanes_k))
    found = [elements(domain) for _, domain in program.domains if isinstance(domain, Cover)]
    assert np.array_equal(np.logical_or.reduce(found), mask)


def faults() -> dict[str, tuple[Program, str]]:
    mask, views, fused, tiled = (STAGES[n] for n in ("lower", "choose_views", "fuse_attention", "cover_with_tiles"))
    sddmm, softmax, spmm = mask.body
    cover, regions = tiled.domains[0][1], views.domains[0][1]
    repeated = int(np.flatnonzero(cover.entries[:, 5] > 0)[0])
    shown = regions.regions[0]
    return {
        "use before definition": (replace(mask, body=(softmax, sddmm, spmm)), "uses s, which is not defined"),
        "no such domain": (replace(mask, body=(replace(sddmm, over="x"), softmax, spmm)), "x, which does not exist"),
        "nothing computed": (replace(mask, body=(sddmm,)), "o is not computed.*lse is not computed"),
        "two of one name": (replace(mask, domains=mask.domains * 2), "two domains have one name"),
        "merging with nothing": (replace(fused, body=(replace(fused.body[0], merging=True),)), "uses o, which"),
        "other scores in a pass": (
            replace(fused, body=(fused.body[0], replace(fused.body[1], score=score_of(dropout=True)))),
            "operation 0 does something else to scores",
        ),
        "sinks twice": (
            replace(fused, body=tuple(replace(op, score=score_of(sinks=True)) for op in fused.body)),
            "operation 1 counts the sinks again",
        ),
        "steps in another order": (
            replace(mask, body=(replace(sddmm, steps=(Alibi(), Softcap())), softmax, spmm)),
            "steps of scores are not in their order",
        ),
        "another size": (replace(mask, kv_len=7), "is 4096 x 4096 but the program is 4096 x 7"),
        "regions of another size": (replace(views, q_len=7), "is 4096 x 4096 but the program is 7 x 4096"),
        "a view of another length": (
            with_domain(views, regions=(replace(shown, rows=contiguous(5, 64)), *regions.regions[1:])),
            "region 0 has views of another length",
        ),
        "a view that cannot show": (
            with_domain(views, regions=(replace(shown, cols=residue(4096, 5, 64)), *regions.regions[1:])),
            "region 0 holds pieces that its column view cannot show",
        ),
        "column tiles that differ": (
            with_domain(tiled, cols=(*cover.cols, contiguous(4096, 128))),
            "tiles of different sizes",
        ),
        "entries of nobody": (with_domain(tiled, items=changed(cover.items, 0, 4, 0)), "do not partition the entries"),
        "entries too many": (with_domain(tiled, items=changed(cover.items, 0, 4, 9999)), "do not partition"),
        "no such view": (with_domain(tiled, entries=changed(cover.entries, 0, 3, 9)), "column view that does not"),
        "no such shape": (with_domain(tiled, entries=changed(cover.entries, 0, 5, 9999)), "shape that does not"),
        "bits that repeat": (with_domain(tiled, entries=changed(cover.entries, repeated, 4, 2)), "only full tiles"),
        "no repetition": (with_domain(tiled, entries=changed(cover.entries, 0, 4, 0)), "only full tiles repeat"),
        "one row twice": (
            with_domain(tiled, items=changed(changed(cover.items, 0, 0, cover.items[1, 0]), 0, 1, cover.items[1, 1])),
            "two items have one row tile",
        ),
        "no such list of keys": (with_domain(tiled, entries=changed(cover.entries, 0, 3, -1)), "list of keys that"),
        "no such key in a list": (with_domain(tiled, gather=np.full((1, 64), 4096)), "key that does not exist"),
    }


def test_legal_programs_pass():
    for program in STAGES.values():
        verify(program)


@pytest.mark.parametrize("name", faults())
def test_an_illegal_program_is_quoted(name):
    program, message = faults()[name]
    with pytest.raises(VerifyError, match=message) as e:
        verify(program)
    head, _, quoted = str(e.value).partition("\n")
    assert head.startswith("illegal program: ") and quoted == to_text(program)


def test_every_fault_is_named():
    mask = STAGES["lower"]
    with pytest.raises(VerifyError) as e:
        verify(replace(mask, kv_len=7, body=()))
    for fault in ("o is not computed", "lse is not computed", "the program is 4096 x 7"):
        assert fault in str(e.value)


def test_domains_are_what_each_stage_says():
    kinds = {name: {type(domain) for _, domain in program.domains} for name, program in STAGES.items()}
    assert kinds == {"lower": {Mask}, "choose_views": {Regions}, "fuse_attention": {Regions},
                     "cover_with_tiles": {Cover}, "gather_columns": {Cover},
                     "order_longest_first": {Cover}}  # fmt: skip


# -- text --------------------------------------------------------------------------------------------------------------

TINY = {
    "lower": (P.window(2, 1) | P.global_cols(1), 12),
    "choose_views": (P.fixed(8, 2), 40),
    "fuse_attention": (P.causal() & (P.window(3, 0) | P.strided(16)), 400),
    "cover_with_tiles": (P.strided(8), 96),
    "order_longest_first": (P.longformer(3, 2), 40),
}


@pytest.mark.parametrize("name", TINY)
def test_text(name, golden):
    pattern, n = TINY[name]
    texts: dict[str, str] = {}
    program = lower(ACSR.from_pattern(pattern, n))
    run_passes(program, Schedule(8, 8), PASSES, lambda step, p: texts.__setitem__(step, to_text(p)))
    steps = list(texts)
    before = steps[max(steps.index(name) - 1, 0)]
    golden(texts[name] if name == "lower" else f"{texts[before]}\n# {name}\n\n{texts[name]}")


def test_text_of_gathered_columns(golden):
    texts: dict[str, str] = {}
    q, k = np.arange(256)[:, None], np.arange(256)[None, :]
    few = (q * 37 + k * 101) % 1009 == 0
    schedule = Schedule(64, 64, gather=True)
    run_passes(lower(ACSR.from_dense(few)), schedule, PASSES, lambda step, p: texts.__setitem__(step, to_text(p)))
    golden(f"{texts['cover_with_tiles']}\n# gather_columns\n\n{texts['gather_columns']}")


def test_text_of_bits(golden):
    q, k = np.arange(100)[:, None], np.arange(100)[None, :]
    noise = ((q * q + 3 * k * k + q * k) % 7 < 2) & (k < 30) & (q > 50)
    golden(to_text(run_passes(lower(ACSR.from_dense(P.window(9, 9).dense(100) | noise)), Schedule())))
