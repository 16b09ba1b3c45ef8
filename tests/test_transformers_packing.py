"""Batch entries that differ as one packed sequence: the same as a call for each, and where it is done."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from splatc import patterns as P  # noqa: E402
from splatc.integrations.transformers import attention  # noqa: E402
from splatc.integrations.transformers.masks import Part  # noqa: E402
from splatc.integrations.transformers.packing import packed  # noqa: E402

LENGTH = 40
CPU = torch.device("cpu")
NEAR = P.causal() & P.window(7, 100)


def square(entry: int, first: int, last: int, pattern: Any = NEAR) -> Part:
    return Part((entry,), pattern, first, last, first, last)


PADDED = {
    "right": (square(0, 0, 40), square(1, 0, 23), square(2, 0, 1)),
    "left": (square(2, 3, 40), square(0, 30, 40), square(1, 39, 40)),
    "causal": (square(0, 0, 40, P.causal()), square(1, 0, 23, P.causal()), square(2, 5, 30, P.causal())),
    "several entries each": (Part((0, 2), NEAR, 0, 40, 0, 40), square(1, 9, 40)),
    "an entry without tokens": (square(0, 0, 40), square(2, 0, 11)),
    "bidirectional": tuple(Part((i,), P.full(), 0, 40, *at) for i, at in enumerate([(0, 40), (3, 40), (0, 7)])),
    "bidirectional window": tuple(square(i, 0, n, P.window(5, 5)) for i, n in enumerate([40, 17, 29])),
    "documents in some rows": (square(0, 0, 40, P.documents([10, 30]) & NEAR), square(1, 0, 23),
                               square(2, 4, 40, P.documents([6, 1, 29]) & NEAR)),
}  # fmt: skip
APART = {
    "strided": tuple(square(i, 0, n, P.causal() & P.strided(4)) for i, n in enumerate([40, 23])),
    "global": tuple(square(i, 0, n, P.causal() | P.global_cols(1)) for i, n in enumerate([40, 23])),
    "two patterns": (square(0, 0, 40), square(1, 0, 23, P.causal())),
    "a chunk of queries": tuple(Part((i,), NEAR, 0, 20, 0, n) for i, n in enumerate([40, 30])),
    "each head its own": tuple(square(i, 0, n, P.per_head([P.causal(), NEAR])) for i, n in enumerate([40, 23])),
}


@pytest.mark.parametrize("name", PADDED)
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"sinks": True, "scale": 0.3}], ids=str)
def test_it_is_what_calls_for_each_give(name, options, monkeypatch):
    rng = np.random.default_rng(0)
    q, k, v = (torch.from_numpy(rng.standard_normal((3, heads, LENGTH, 8))) for heads in (4, 2, 2))
    given = {"enable_gqa": True, "scale": options.get("scale")}
    if "sinks" in options:
        given["sinks"] = torch.from_numpy(rng.standard_normal(4))

    def run():
        a, b, c = leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        o = attention._run(PADDED[name], a, b, c, options.get("softcap"), given)
        assert o.shape == (3, LENGTH, 4, 8) and o.is_contiguous()
        return o, *torch.autograd.grad((o * torch.arange(8)).sum(), leaves)

    assert packed(PADDED[name], LENGTH, LENGTH, None, CPU) is not None
    at_once = run()
    monkeypatch.setattr(attention, "packed", lambda *args: None)
    for one, each in zip(at_once, run()):
        assert torch.allclose(one, each, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", APART)
def test_what_counts_from_a_beginning_stays_apart(name):
    assert packed(APART[name], LENGTH, LENGTH, None, CPU) is None


def test_a_layer_makes_one_call():
    q, k, v = (torch.zeros(3, 4, LENGTH, 8) for _ in "qkv")
    packed.cache_clear()
    for _ in range(2):
        attention._run(PADDED["right"], q, k, v, None, {"scale": None})
    assert packed.cache_info().misses == packed.cache_info().hits == 1
    one = packed(PADDED["right"], LENGTH, LENGTH, None, CPU)
    (attend,) = one.over._compiled.values()
    assert attend._plan.q_len == len(one.queries) == 40 + 23 + 1
