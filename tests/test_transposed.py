"""Masks with queries and keys exchanged: equal to the transposed matrix, as symbolic as the pattern itself."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings

from splatc import patterns as P
from splatc.codegen.kernel import kernel_spec
from splatc.codegen.target import Target
from splatc.compile import make_plan
from splatc.errors import InvalidInput
from splatc.formats.acsr import ACSR
from splatc.patterns.base import Pattern
from tests import library
from tests.test_patterns import assert_law

SPEC = kernel_spec(16, None, "float32", Target("cpu", "native"))


def check(pattern: Pattern, q_len: int, kv_len: int) -> None:
    turned, wanted = pattern.transposed(), pattern.dense(q_len, kv_len).T
    np.testing.assert_array_equal(turned.dense(kv_len, q_len), wanted)
    assert (turned.lines(kv_len, q_len) is None) == (pattern.lines(q_len, kv_len) is None)
    if turned.lines(kv_len, q_len) is not None:
        assert_law(turned, kv_len, q_len)
    np.testing.assert_array_equal(ACSR.from_pattern(turned, kv_len, q_len).to_dense(), wanted)
    np.testing.assert_array_equal(turned.transposed().dense(q_len, kv_len), wanted.T)
    own = pattern.own_lengths()
    assert turned.own_lengths() == (own and own[::-1])
    if "<" not in str(turned):  # data has no text form
        assert P.parse(str(turned)) == turned


@pytest.mark.parametrize("shape", [(1, 1), (17, 17), (130, 130), (300, 300), (100, 233), (233, 100)])
@pytest.mark.parametrize("name", library.NAMES)
def test_every_pattern(name, shape):
    pattern = library.pattern(name, *shape)
    if pattern is not None:
        check(pattern, *shape)


@settings(max_examples=200)
@given(library.sized_patterns(100))
def test_random_compositions(case):
    check(*case)


@settings(max_examples=50)
@given(library.masks())
def test_matrices(mask):
    check(P.mask(mask), *mask.shape)
    sparse = pytest.importorskip("scipy.sparse").csr_array(mask)
    check(P.as_pattern(sparse), *mask.shape)


def test_a_pattern_for_each_head():
    heads = [P.causal(), P.window(9, 3), P.causal()]
    turned = P.transpose(P.per_head(heads) & P.full())
    np.testing.assert_array_equal(turned.dense(40, 30), P.per_head(heads).dense(30, 40).swapaxes(1, 2))
    with pytest.raises(InvalidInput, match="expected a pattern, not a str"):
        P.transpose("causal")


def test_what_does_not_say_its_lines_is_evaluated_densely():
    class Odd(Pattern):
        def member(self, q, k, q_len, kv_len):
            return (q * k) % 3 == 1

        def __repr__(self):
            return "<odd>"

    check(Odd(), 31, 20)


@pytest.mark.parametrize(
    "pattern",
    [
        P.causal(),
        P.window(256, 100),
        P.dilated(1024, 0, 4),
        P.fixed(128, 16),
        P.block_window(128, 2, 0),
        P.longformer(256, 16),
        P.documents([1024] * 1024) & P.causal(),
        P.causal() & (P.sink(4) | P.window(512, 0)),
        P.neighborhood((1024, 1024), 5, causal=True),
        P.causal() & P.strided(1024),
    ],
    ids=lambda x: str(x)[:30],
)
def test_a_million_keys_need_no_matrix(pattern):
    """Not more than the mask itself takes, but for a constant factor."""
    n = 1 << 20
    forward = ACSR.from_pattern(pattern, n)
    tracemalloc.start()
    try:
        turned = ACSR.from_pattern(pattern.transposed(), n)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 500e6 and turned.nnz == forward.nnz
    assert len(turned.strips) < 3 * len(forward.strips) + 3 * 16384


@pytest.mark.parametrize("pattern", [P.window(256, 0), P.dilated(512, 0, 8), P.causal() & P.blocked(512)], ids=str)
def test_tables_stay_linear(pattern):
    sizes = []
    for n in (1 << 14, 1 << 15):
        plan = make_plan(pattern.transposed(), n, n, SPEC, watched=False)
        assert plan.explanation.nnz == make_plan(pattern, n, n, SPEC, watched=False).explanation.nnz
        sizes.append(sum(t.nbytes for passes in plan.tables for t in passes))
    assert sizes[1] < 2.5 * sizes[0]
