"""Dynamic N:M patterns: how they combine, what refuses them by name, and the programs that they lower to."""

import json
from typing import Any

import numpy as np
import pytest

import splatc
from splatc import patterns as P
from splatc.cli.main import run as main
from splatc.errors import InvalidInput, Unsupported, VerifyError
from splatc.formats.acsr import ACSR
from splatc.ir.interpret import interpret, interpret_gradients
from splatc.ir.numbers import Numbers
from splatc.ir.passes import PASSES, Schedule, lower, run_passes
from splatc.ir.printer import to_text
from splatc.ir.program import Attend, Cover
from splatc.ir.score import Score, score_of
from splatc.ir.verify import verify
from splatc.ir.views import residue
from splatc.oracle import attention, gradients, relative_error
from splatc.patterns.pruned import Pruning, joined, split

NM24, NM12 = P.nm(2, 4), P.nm(1, 2)


def test_order_and_brackets_do_not_matter():
    a, b = P.causal(), P.window(9, 0)
    assert a & b & NM24 == a & NM24 & b == (NM24 & a) & b == a & (b & NM24)
    assert P.full() & NM24 == NM24 & P.full() == NM24 == NM24 & NM24
    assert a & NM24 & NM24 == a & NM24 and hash(a & NM24) == hash(a & NM24) and a & NM24 != a & NM12
    assert str(a & (b | P.sink(2)) & NM12) == "causal() & (window(9, 0) | sink(2)) & nm(1, 2)"


def test_split_and_joined_are_inverse():
    for static in (P.full(), P.causal(), P.causal() | P.sink(3), P.per_head([P.causal(), P.full()])):
        for pruning in (None, Pruning(2, 4)):
            assert split(joined(static, pruning)) == (static, pruning)


def test_heads():
    heads = P.per_head([P.causal(), P.full()])
    assert heads & NM24 == NM24 & heads == P.per_head([P.causal() & NM24, NM24])
    assert split(P.as_pattern(["causal & nm(2, 4)", NM24])) == (heads, Pruning(2, 4))
    for mixed in ([NM24, P.full()], [NM24, NM12]):
        with pytest.raises(Unsupported, match="heads are pruned in different ways"):
            splatc.compile(mixed, seq_len=64, head_dim=16, dtype="float32", target="cpu")


@pytest.mark.parametrize("refused", [
    lambda: ~NM24, lambda: NM24 | P.full(), lambda: P.causal() | NM24, lambda: P.transpose(P.causal() & NM24),
    lambda: P.per_head([P.full()]) | NM24, lambda: NM24 | P.per_head([P.full()]),
])  # fmt: skip
def test_what_is_no_mask_has_no_complement_union_or_transpose(refused):
    with pytest.raises(InvalidInput, match="depends on scores, not on positions"):
        refused()


def test_other_refusals():
    for n, m in ((0, 4), (2, 2), (1, 4), (4, 8), (True, 2), (2.0, 4)):
        with pytest.raises(InvalidInput, match="nm"):
            P.nm(n, m)
    with pytest.raises(InvalidInput, match="static part"):
        NM24.dense(8)
    with pytest.raises(InvalidInput, match=r"analyze its static part, causal\(\)"):
        splatc.analyze("causal & nm(2, 4)", 64)
    with pytest.raises(InvalidInput, match="q_len is 0"):
        NM24.check(0, 1)
    for arch, dtype, ratio in (("sm_80", "float16", "2, 4"), ("sm_80", "float16", "1, 2"),
                               ("sm_90a", "float32", "1, 2")):  # fmt: skip
        with pytest.raises(Unsupported, match=r"compile for the CPU, or let splatc\.nn\.functional\.dense_attention"):
            splatc.compile(f"causal & nm({ratio})", seq_len=64, head_dim=64, dtype=dtype, target=arch)


def test_explain():
    attend = splatc.compile(P.causal() & NM12, seq_len=100, head_dim=16, dtype="float32", target="cpu")
    e = attend.explain()
    assert e.pattern == "causal() & nm(1, 2)" and e.pruning == "nm(1, 2)" and e.nnz == 5050
    assert "pruned       nm(1, 2)" in str(e) and "nm(1, 2)" in repr(attend)
    assert attend.kernel.spec.name == "attention_cpu_d16_float32_m64n64_nm12"


def test_command_line(capsys):
    def run(*words):
        code = main(list(words))
        return code, *capsys.readouterr()

    code, out, _ = run("analyze", "causal & nm(2, 4)", "-s", "100", "--json")
    assert code == 0 and json.loads(out)["pruning"] == "nm(2, 4)"
    for way in ((), ("--backward",)):
        code, out, _ = run("dump", "causal & nm(2, 4)", "-s", "100", "--what", "ir", *way)
        assert code == 0 and "attend(q, k, v) over m0 | prune(2, 4)" in out
    code, _, err = run("show", "nm(2, 4)", "-s", "100")
    assert code and "it is no mask" in err
    code, _, err = run("compile", "nm(2, 4)", "-s", "100", "--arch", "sm_80")
    assert code and "has no kernel for cuda:sm_80 here" in err


# -- programs ----------------------------------------------------------------------------------------------------------


def program(pattern, q_len, kv_len, score, passes=PASSES):
    return run_passes(lower(ACSR.from_pattern(pattern, q_len, kv_len), score), Schedule(), passes)


def test_text():
    score = Score(score_of(softcap=True).steps, pruning=Pruning(2, 4))
    assert score and not score.positional and score.names == ("softcap", "nm24")
    first = to_text(program(P.causal(), 80, 80, score, ()))
    assert "  s = prune(s, 2, 4)\n  p, lse = softmax(s)" in first
    last = to_text(program(P.causal(), 80, 80, score))
    assert "o, lse = attend(q, k, v) over m0 | softcap(cap) | prune(2, 4)" in last


@pytest.mark.parametrize("pruning", [Pruning(2, 4), Pruning(1, 2)])
@pytest.mark.parametrize("pattern", [P.causal(), P.causal() & (P.window(30, 0) | P.strided(16)), P.fixed(16, 3)])
def test_every_level_computes_the_same(pattern, pruning):
    rng = np.random.default_rng(2)
    q_len, kv_len = 150, 131
    q, k, v = (rng.standard_normal((n, 8)) for n in (q_len, kv_len, kv_len))
    do, dlse = rng.standard_normal((q_len, 8)), rng.standard_normal(q_len)
    score = Score(score_of(softcap=True).steps, pruning=pruning)
    dense = pattern.dense(q_len, kv_len)
    a, b, c = (x[None, None] for x in (q, k, v))
    options: Any = {"scale": 0.5, "softcap": 2.0, "pruning": pruning}
    o, lse = attention(a, b, c, dense, **options)
    wanted = gradients(a, b, c, dense, do[None, None], dlse[None, None], **options)
    for n in range(len(PASSES) + 1):
        forward = program(pattern, q_len, kv_len, score, PASSES[:n])
        backward = program(pattern.transposed(), kv_len, q_len, score, PASSES[:n])
        for one in (forward, backward):
            verify(one)
        got = interpret(forward, q, k, v, 0.5, Numbers(2.0))
        np.testing.assert_allclose(got[0], o[0, 0], atol=1e-12)
        np.testing.assert_allclose(got[1], lse[0, 0], atol=1e-12)
        found = interpret_gradients(forward, backward, q, k, v, do, dlse, 0.5, Numbers(2.0))
        assert max(relative_error(x, y[0, 0]) for x, y in zip(found, wanted, strict=True)) < 1e-12


def test_groups_stay_whole():
    """A mask that would be seen through strided views is not, and a program that does so is illegal."""
    score = Score(pruning=Pruning(2, 4))
    plain = program(P.strided(128), 2048, 2048, Score())
    assert any(view.kind != "contiguous" for _, d in plain.domains if isinstance(d, Cover) for view in d.cols)
    pruned = program(P.strided(128), 2048, 2048, score)
    (name, cover), = pruned.domains  # fmt: skip
    verify(pruned)

    def broken(**change):
        return type(pruned)(2048, 2048, ((name, type(cover)(**{**vars(cover), **change})),), pruned.body)

    with pytest.raises(VerifyError, match="a column view cuts groups of 4 keys"):
        verify(broken(cols=(residue(2048, 128, 64),)))
    entries = cover.entries.copy()
    entries[0, 0] += 2
    with pytest.raises(VerifyError, match="begins inside a group of 4 keys"):
        verify(broken(entries=entries))
    again = Attend("o", "lse", "q", "k", "v", name, merging=True, score=score)
    with pytest.raises(VerifyError, match="pruned in more than one pass"):
        verify(type(pruned)(2048, 2048, pruned.domains, (*pruned.body, again)))
