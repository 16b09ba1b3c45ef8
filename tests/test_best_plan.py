"""The choice of tile shapes: what is left out could not have won."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest

from splatc import patterns as P
from splatc.codegen.hopper.shape import can_gather
from splatc.codegen.kernel import KernelSpec, gradient_spec, kernel_spec, tile_shapes, two_walks
from splatc.codegen.target import Target
from splatc.compile import best_plan, make_plan
from splatc.formats.acsr import analyze_heads
from splatc.patterns.base import Pattern
from splatc.runtime.explain import least_seconds

HOPPER = Target("cuda", "sm_90a")
DOCUMENTS = P.documents([700, 90, 1500, 33, 410]) & P.causal()
PATTERNS = [
    P.full(), P.causal(), DOCUMENTS, P.causal() & P.window(100, 0), P.causal() & (P.window(63, 0) | P.strided(64)),
    P.strided(9), P.blocked(128), P.bigbird(64, 3, 2, seed=1), P.longformer(100, 3), P.window(-3000, 3001),
    P.PerHead((P.causal(), P.window(30, 30))),
]  # fmt: skip


def length_of(pattern: Pattern) -> int:
    lengths = pattern.own_lengths()
    return lengths[0] if lengths else 2048


def every_plan(pattern: Pattern, length: int, spec: KernelSpec) -> list[Any]:
    sized = [replace(spec, tile_m=m, tile_n=n) for m, n in tile_shapes(spec)]
    return [make_plan(pattern, length, length, replace(one, gather=can_gather(one))) for one in sized]


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_best_of_all_shapes_is_found(pattern, head_dim):
    forward = kernel_spec(head_dim, None, "bfloat16", HOPPER)
    length = length_of(pattern)
    for spec in (forward, *two_walks(forward), gradient_spec(forward)):
        plans = every_plan(pattern, length, spec)
        acsrs = analyze_heads(pattern, length, length).values()
        for plan in plans:
            assert least_seconds(acsrs, plan.spec) <= plan.explanation.seconds * (1 + 1e-9)
        best = best_plan(pattern, length, length, spec)
        assert best.explanation.seconds == min(plan.explanation.seconds for plan in plans)


def test_shapes_that_cannot_win_are_not_planned(monkeypatch):
    planned: list[Any] = []

    def counted(*given: Any, **options: Any) -> Any:
        planned.append(given)
        return make_plan(*given, **options)

    monkeypatch.setattr(sys.modules["splatc.compile"], "make_plan", counted)
    spec = kernel_spec(64, None, "bfloat16", HOPPER)
    best_plan(DOCUMENTS, 2733, 2733, spec)
    assert len(planned) < len(tile_shapes(spec))
