"""sddmm, softmax and spmm on a CPU: against the oracle, the fused kernel and each other; where values lie; how many."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings

import splatc
from splatc import oracle
from splatc import patterns as P
from splatc.cli.main import app
from splatc.codegen.kernel import COMPRESSED, PRODUCTS, product_spec
from splatc.codegen.target import Target
from splatc.codegen.values import ValueTables
from splatc.errors import InvalidInput, Unsupported
from splatc.formats.acsr import ACSR
from splatc.formats.order import Order
from splatc.ir.interpret import interpret
from splatc.ir.score import score_of
from splatc.runtime.attention import CompiledAttention
from splatc.runtime.structure import structure_of, tile_values
from tests import library

TOLERANCE = {"float64": 1e-13, "float32": 1e-5, "float16": 1e-2, "bfloat16": 2e-2}
SHAPES = [(1, 17), (129, 127), (200, 200), (70, 300)]
MASKS = {
    "window": P.window(40, 30),
    "blocked": P.blocked(64),
    "strided": P.strided(8),
    "strided_long": P.strided(2),
    "global": P.longformer(9, 2),
    "bottom": P.causal("bottom_right"),
    "no_rows": P.causal() & P.window(-10, 60),
    "views": P.causal() & (P.window(31, 0) | P.strided(32)),
    "fixed": P.fixed(16, 3),
    "full": P.full(),
    "empty": P.window(-2000, 2005),
}


def tensors(batch, heads, kv_heads, lengths, d, dv, dtype="float64", grad=False) -> Any:
    """Random q, k, v in torch."""
    generator = torch.Generator().manual_seed(d + lengths[0])
    shapes = (batch, heads, lengths[0], d), (batch, kv_heads, lengths[1], d), (batch, kv_heads, lengths[1], dv)
    made = [torch.randn(s, generator=generator, dtype=torch.float64).to(getattr(torch, dtype)) for s in shapes]
    return [x.requires_grad_(grad) for x in made]


def numpy(*tensors) -> Any:
    return [x.detach().double().numpy() for x in tensors]


def attention(q, k, v, mask, scale=None):
    """The oracle's (o, lse) of torch tensors."""
    return oracle.attention(numpy(q)[0], numpy(k)[0], numpy(v)[0], mask, scale)


def gradients(q, k, v, mask, do, dlse=None, scale=None):
    """The oracle's (dq, dk, dv) of torch tensors."""
    return oracle.gradients(numpy(q)[0], numpy(k)[0], numpy(v)[0], mask, do, dlse, scale)


def dense_scores(q, k, mask, scale):
    q, k = numpy(q, k)
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    return np.where(mask, q @ k.swapaxes(-1, -2) * scale, 0.0)


# -- order and tables --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", library.NAMES)
def test_ranks_count_the_elements_before(name):
    for shape in ((65, 65), (40, 90)):
        pattern = library.pattern(name, *shape)
        if pattern is None:
            continue
        mask = pattern.dense(*shape)
        order = Order(ACSR.from_pattern(pattern, *shape))
        before: np.ndarray = (np.cumsum(mask) - mask.ravel()).reshape(shape)
        np.testing.assert_array_equal(order.ranks(*np.indices(shape)), before)
        np.testing.assert_array_equal(order.indptr, np.concatenate([[0], np.cumsum(mask.sum(1))]))


def numbered(values: ValueTables, queries_are_rows: bool, shape: tuple[int, int]) -> np.ndarray:
    """The numbers of elements as a kernel finds them by the tables: int64 (q_len, kv_len), -1 where no tile is."""
    tables, out = values.tables, np.full(shape, -1)
    for item, rows in zip(tables.items.tolist(), tables.positions, strict=True):
        for e in range(item[3], item[3] + item[4]):
            *_, repeat, bits, view, _, _ = tables.entries[e].tolist()
            assert repeat == 1
            n, stride, box = tables.col_views[view, :9].reshape(3, 3)
            lane = np.arange(box.prod())
            x = np.stack([lane % box[0], lane // box[0] % box[1], lane // (box[0] * box[1])], 1) + tables.entries[e, :3]
            cols = np.where(((x >= 0) & (x < n)).all(1), (x * stride).sum(1), -1)
            held = np.ones((len(cols), len(rows)), bool)
            if bits:
                octets = np.ascontiguousarray(tables.bits[bits - 1]).view(np.uint8)
                held = np.unpackbits(octets, axis=1, bitorder="little").astype(bool)
            held = held & (rows >= 0)
            cursor = values.first[e].astype(np.int64)
            for j, i in np.argwhere(held).tolist():
                line, (q, k) = (i, (rows[i], cols[j])) if queries_are_rows else (j, (cols[j], rows[i]))
                assert min(q, k) >= 0 and out[q, k] == -1
                out[q, k] = cursor[line]
                cursor[line] += 1
    return out


def check_tables(pattern, q_len, kv_len):
    mask = pattern.dense(q_len, kv_len)
    wanted = np.where(mask, np.cumsum(mask).reshape(mask.shape) - 1, -1)
    order = Order(ACSR.from_pattern(pattern, q_len, kv_len))
    _, rows = tile_values(order.acsr, order, queries_are_rows=True)
    turned = ACSR.from_pattern(pattern.transposed(), kv_len, q_len)
    _, columns = tile_values(turned, order, queries_are_rows=False)
    np.testing.assert_array_equal(numbered(rows, True, mask.shape), wanted)
    np.testing.assert_array_equal(numbered(columns, False, mask.shape), wanted)


@pytest.mark.parametrize("name", library.NAMES)
def test_tables_number_every_element(name):
    for shape in ((130, 130), (60, 170)):
        pattern = library.pattern(name, *shape)
        if pattern is not None:
            check_tables(pattern, *shape)


@settings(max_examples=60)
@given(library.sized_patterns(100))
def test_tables_number_random_patterns(case):
    check_tables(*case)


@settings(max_examples=40)
@given(library.strided_patterns(200))
@pytest.mark.usefixtures("eager_views")
def test_tables_number_elements_through_views(case):
    check_tables(*case)


def test_strided_masks_keep_their_views():
    """Tiles of a residue class are full: plain ones would be 8 times as many."""
    structure = structure_of(P.strided(8), 1024, 1024)
    for (side,) in (structure._rows, structure._columns):
        assert side.tables.tiles == side.tables.full_tiles == 32


# -- results -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_the_three_agree_with_the_oracle_and_the_fused_kernel(name, shape):
    pattern, (q_len, kv_len) = MASKS[name], shape
    q, k, v = tensors(2, 4, 2, shape, 16, 9)
    scores = splatc.sddmm(q, k, pattern, scale=0.3, enable_gqa=True)
    probs, lse = splatc.softmax(scores, return_lse=True)
    o = splatc.spmm(probs, v, enable_gqa=True)
    mask = pattern.dense(q_len, kv_len)
    assert scores.values.shape == probs.values.shape == (2, 4, mask.sum())
    wanted = dense_scores(q, k, mask, 0.3)
    np.testing.assert_allclose(scores.to_dense(), wanted, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(scores.values, wanted[:, :, mask], rtol=1e-12, atol=1e-12)
    wanted_o, wanted_lse = attention(q, k, v, mask, 0.3)
    np.testing.assert_allclose(o, wanted_o, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(lse, wanted_lse, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(probs.to_dense().sum(-1), np.broadcast_to(mask.any(1), (2, 4, q_len)), atol=1e-12)
    fused = splatc.attention(q, k, v, pattern, scale=0.3, return_lse=True, enable_gqa=True)
    np.testing.assert_allclose(o, fused[0], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(lse, fused[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MASKS)
def test_the_unfused_program_means_the_same(name):
    """What is lowered to the tables is a program that the interpreter runs."""
    q, k, v = tensors(1, 1, 1, (129, 140), 16, 9)
    order = structure_of(MASKS[name], 129, 140).orders[0]
    program, _ = tile_values(order.acsr, order, queries_are_rows=True)
    heads = tuple(x[0, 0] for x in numpy(q, k, v))
    o, lse = interpret(program, heads[0], heads[1], heads[2], 0.25)
    probs, got_lse = splatc.softmax(splatc.sddmm(q, k, MASKS[name]), return_lse=True)
    np.testing.assert_allclose(splatc.spmm(probs, v)[0, 0], o, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(got_lse[0, 0], lse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_dtypes(dtype):
    for pattern in (MASKS["window"], MASKS["strided"], MASKS["global"]):
        q, k, v = tensors(1, 2, 2, (150, 150), 9, 17, dtype)
        scores = splatc.sddmm(q, k, pattern)
        probs, lse = splatc.softmax(scores, return_lse=True)
        o = splatc.spmm(probs, v)
        assert scores.dtype == probs.dtype == dtype and str(o.dtype) == f"torch.{dtype}"
        assert str(lse.dtype) == ("torch.float64" if dtype == "float64" else "torch.float32")
        wanted, wanted_lse = attention(q, k, v, pattern.dense(150))
        assert oracle.relative_error(numpy(o)[0], wanted) < TOLERANCE[dtype]
        assert oracle.relative_error(numpy(lse)[0], wanted_lse) < TOLERANCE[dtype]


def test_numpy_and_any_strides():
    q, k, v = (x.astype(np.float32) for x in numpy(*tensors(2, 3, 3, (90, 90), 9, 17)))
    q, k, v = (np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) for x in (q, k, v))  # heads beside dims
    probs, lse = splatc.softmax(splatc.sddmm(q, k, "causal"), return_lse=True)
    o = splatc.spmm(probs, v)
    assert isinstance(probs.values, np.ndarray) and isinstance(o, np.ndarray) and isinstance(lse, np.ndarray)
    assert oracle.relative_error(o, oracle.attention(q, k, v, P.causal().dense(90))[0]) < 1e-5


def test_runs_are_equal_bit_by_bit_for_any_number_of_threads():
    q, k, v = tensors(2, 2, 2, (300, 300), 9, 9, "float32", grad=True)

    def run():
        structure_of.cache_clear()
        probs, lse = splatc.softmax(splatc.sddmm(q, k, MASKS["global"]), return_lse=True)
        o = splatc.spmm(probs, v)
        return [o, lse, *torch.autograd.grad((o.sum() * 3 + lse.sum()), (q, k, v))]

    threads = torch.get_num_threads()
    first = run()
    try:
        torch.set_num_threads(1)
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
    finally:
        torch.set_num_threads(threads)


def test_what_is_not_finite_reaches_those_that_attend_to_it():
    q, k, v = tensors(1, 1, 1, (200, 200), 16, 16)
    v[0, 0, 150] = torch.inf
    k[0, 0, 20] = torch.nan
    mask = (P.causal() & P.window(30, 0)).dense(200)
    scores = splatc.sddmm(q, k, P.causal() & P.window(30, 0))
    np.testing.assert_array_equal(torch.isnan(scores.to_dense())[0, 0], mask & (np.arange(200) == 20))
    o = splatc.spmm(splatc.softmax(scores), v)
    np.testing.assert_array_equal(~torch.isfinite(o).all(-1)[0, 0], mask[:, 20] | mask[:, 150])


def test_a_pattern_for_each_head():
    heads = [P.causal(), P.strided(8), P.window(-2000, 2005), P.causal(), P.longformer(5, 3)]
    q, k, v = tensors(2, 5, 5, (140, 140), 16, 9, grad=True)
    masks = np.stack([p.dense(140) for p in heads])
    scores = splatc.sddmm(q, k, heads)
    assert scores.values.shape == (2, masks.sum()) and scores.heads == 5
    probs, lse = splatc.softmax(scores, return_lse=True)
    for h in range(5):
        got = scores.head(h).detach()
        np.testing.assert_allclose(got, dense_scores(q, k, masks, 0.25)[:, h, masks[h]], atol=1e-12)
    o = splatc.spmm(probs, v)
    wanted, wanted_lse = attention(q, k, v, masks)
    np.testing.assert_allclose(o.detach(), wanted, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(lse.detach(), wanted_lse, rtol=1e-12, atol=1e-12)
    do = torch.ones_like(o)
    got = torch.autograd.grad(o, (q, k, v), do)
    for a, b in zip(got, gradients(q, k, v, masks, do.numpy()), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


# -- gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("shape", SHAPES[1:], ids=lambda s: f"{s[0]}x{s[1]}")
def test_gradients_through_all_three(name, shape):
    pattern = MASKS[name]
    q, k, v = tensors(2, 4, 2, shape, 16, 9, grad=True)
    probs, lse = splatc.softmax(splatc.sddmm(q, k, pattern, scale=0.3, enable_gqa=True), return_lse=True)
    o = splatc.spmm(probs, v, enable_gqa=True)
    do, dlse = torch.randn_like(o), torch.randn_like(lse)
    got = torch.autograd.grad((o, lse), (q, k, v), (do, dlse))
    wanted = gradients(q, k, v, pattern.dense(*shape), do.numpy(), dlse.numpy(), 0.3)
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("pattern", [P.causal() & P.window(3, 0), P.strided(3), P.longformer(1, 1)], ids=str)
def test_gradcheck(pattern):
    q, k, v = tensors(1, 2, 1, (9, 9), 16, 9, grad=True)
    scores = splatc.sddmm(q, k, pattern, enable_gqa=True)
    values = scores.values.detach().requires_grad_()

    def sddmm(q, k):
        return splatc.sddmm(q, k, pattern, scale=0.7, enable_gqa=True).values

    def spmm(values, v):
        return splatc.spmm(scores.with_values(values), v, enable_gqa=True)

    def softmax(values):
        probs, lse = splatc.softmax(scores.with_values(values), return_lse=True)
        return probs.values, lse

    for function, inputs in ((sddmm, (q, k)), (spmm, (values, v))):
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradcheck(softmax, (values,))
    assert torch.autograd.gradcheck(lambda values: scores.with_values(values).to_dense(), (values,))


# -- compiled masks, bad input, the command line -----------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_probabilities_of_a_compiled_mask(layout):
    attend = splatc.compile("causal", seq_len=64, head_dim=16, dtype="float64", layout=layout, target="cpu")
    for length in (64, 33):  # other lengths too
        q, k, v = tensors(2, 4, 2, (length, length), 16, 16)
        inputs = [x if layout == "bhsd" else x.transpose(1, 2) for x in (q, k, v)]
        probs = attend.probabilities(*inputs[:2], enable_gqa=True)
        o = splatc.spmm(probs, v, enable_gqa=True)
        fused = attend(*inputs, enable_gqa=True)
        np.testing.assert_allclose(o, fused if layout == "bhsd" else fused.transpose(1, 2), atol=1e-12)
    capped = CompiledAttention(replace(attend.kernel, spec=replace(attend.kernel.spec, score=score_of(True))),
                               attend.plan(), lambda *lengths: attend.plan())  # fmt: skip
    with pytest.raises(InvalidInput, match="this was compiled for float64 with 16"):
        attend.probabilities(*(x.float() for x in inputs[:2]), enable_gqa=True)
    with pytest.raises(Unsupported, match="compile the mask without"):
        capped.probabilities(*tensors(2, 2, 2, (64, 64), 16, 16)[:2])


def test_dump_unfused(capsys):
    def dump(*options):
        line = ["dump", "causal", "-s", "100", "-d", "16", "--dtype", "float64", "--arch", "cpu", "--unfused", *options]
        app(line, standalone_mode=False)
        return capsys.readouterr().out

    text = dump()
    assert all(f"; {role}_cpu_d" in text for role in PRODUCTS)
    names = "sddmm", "softmax", "softmax_backward", "spmm", "spmm_transposed"
    assert all(f"splatc_{name}(" in text for name in names)
    text = dump("--what", "ir")
    assert "cover m = 3 tiles" in text and "s = sddmm(q, k) over m" in text


def test_dump_unfused_for_a_gpu(capsys):
    def dump(mask, *options):
        app(["dump", mask, "-s", "256", "-d", "64", "--arch", "sm_90a", "--unfused", *options], standalone_mode=False)
        return capsys.readouterr().out

    text = dump("causal")
    assert all(f"// {role}_hopper_d" in text for role in PRODUCTS) and "splatc_spmm_transposed_kernel(" in text
    pruned = dump("nm(1, 2)")
    assert all(f"// attention_{role}_hopper" in pruned for role in COMPRESSED) and "sparse" in pruned
    for options in (["causal & nm(2, 4)"], ["nm(2, 4)", "--what", "ir"]):
        with pytest.raises(InvalidInput, match=r"--unfused has kernels for nm\(2, 4\) alone"):
            dump(*options)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_autocast(dtype):
    q, k, v = (x.float() for x in tensors(1, 2, 2, (40, 40), 16, 16))
    kept, wide = P.window(9, 0), splatc.spmm(splatc.softmax(splatc.sddmm(q, k, P.window(9, 0))), v)
    with torch.autocast("cpu", getattr(torch, dtype)):
        o = splatc.spmm(splatc.softmax(splatc.sddmm(q, k, kept)), v)
        pruned = splatc.nm_scores(q, k).softmax().spmm(v)
        probs = splatc.compile(kept, seq_len=40, head_dim=16, dtype="float32").probabilities(q, k)
    assert o.dtype == pruned.dtype == getattr(torch, dtype) and probs.dtype == "float32"
    assert oracle.relative_error(o.double(), wide.double()) < 2e-2


def test_no_queries_and_no_keys():
    q, k = np.ones((1, 2, 0, 16), np.float16), np.ones((1, 2, 8, 16), np.float16)
    assert splatc.nm_scores(q, k).softmax().spmm(k).shape == (1, 2, 0, 16)
    assert splatc.nm_scores(k, q).values.shape == (1, 2, 8, 0)


def test_bad_input():
    q, k, v = tensors(2, 4, 2, (20, 20), 16, 16)
    for call, words in (
        (lambda: splatc.sddmm(q, k, "causal"), "enable_gqa=True"),
        (lambda: splatc.sddmm(q, k[0], "causal"), "4 dimensions"),
        (lambda: splatc.sddmm(q, k.float(), "causal"), "different dtypes"),
        (lambda: splatc.sddmm(q, q, [P.causal()] * 3), "3 heads"),
        (lambda: splatc.sddmm(q, q, np.ones((19, 20), bool)), "19"),
        (lambda: splatc.sddmm(q, q, "causal", scale=float("nan")), "scale"),
        (lambda: splatc.softmax(q), "SparseScores"),
    ):
        with pytest.raises(InvalidInput, match=words):
            call()
    probs = splatc.softmax(splatc.sddmm(q, q, "causal"))
    wrong = (v, "2 heads"), (v[:, :, :19], "19"), (v.float(), "float32"), (v.numpy(), "ndarray"), (3, "int")
    for bad, words in wrong:
        with pytest.raises(InvalidInput, match=words):
            splatc.spmm(probs, bad)
    for bad in (probs.values[..., 1:], probs.values[0]):
        with pytest.raises(InvalidInput, match="values have shape"):
            probs.with_values(bad)
    with pytest.raises(InvalidInput, match="counted from 0"):
        probs.head(4)


def test_other_devices_are_refused_by_name():
    for role in PRODUCTS:
        with pytest.raises(Unsupported, match=r"not for cuda:sm_100a: use splatc\.attention"):
            product_spec(role, 64, "bfloat16", Target("cuda", "sm_100a"))
    q = torch.empty(1, 1, 8, 8, device="meta")
    with pytest.raises(InvalidInput, match="meta"):
        splatc.sddmm(q, q, "causal")
    q, k, _ = tensors(1, 1, 1, (8, 8), 16, 16)
    scores = splatc.sddmm(q, k, "causal")
    with pytest.raises(InvalidInput, match="values are on meta"):
        splatc.softmax(scores.with_values(scores.values.to("meta")))
    with pytest.raises(InvalidInput, match="v is on meta"):
        splatc.spmm(scores, torch.empty(1, 1, 8, 8, device="meta", dtype=torch.float64))
