"""The Hopper kernels, compiled here without a GPU: no spills, no serialised products, the instructions that we want."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from splatc import patterns as P
from splatc.codegen.build import build
from splatc.codegen.hopper.backward.shape import row_shape_of
from splatc.codegen.hopper.backward.shape import shape_of as gradient_shape
from splatc.codegen.hopper.shape import SMEM_BYTES, Shape, shape_of, smem_limit
from splatc.codegen.kernel import (
    BACKWARD,
    COLUMNS,
    DK_ALONE,
    DV_ALONE,
    HOPPER_TILES,
    ROWS,
    KernelSpec,
    by_tensor_cores,
    gradient_spec,
    gradient_specs,
    kernel_spec,
    no_gradients,
    not_hopper,
    not_pruned,
    only_two_walks,
    patch_tiles,
    tile_shapes,
    two_walks,
    with_pruning,
)
from splatc.codegen.target import Target
from splatc.codegen.toolchain import find_compiler
from splatc.compile import best_plan
from splatc.errors import CompileError, InvalidInput, Unsupported
from splatc.ir.score import Score, score_of
from splatc.patterns.pruned import split

HOPPER = Target("cuda", "sm_90a")
needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no CUDA compiler (nvcc or NVRTC) is installed")


def spec_of(d: int, dv: int | None = None, dtype: str = "bfloat16", tile: tuple[int, int] | None = None,
            softcap: bool = False, gather: bool = False, **score: bool) -> KernelSpec:  # fmt: skip
    return replace(kernel_spec(d, dv, dtype, HOPPER, score_of(softcap, **score), tile), gather=gather)


# Between them every head dim that people use, both types, every shape of tile and every feature.
SPECS = [
    spec_of(64), spec_of(64, softcap=True), spec_of(64, tile=(128, 128), dtype="float16"), spec_of(128),
    spec_of(128, dtype="float16", softcap=True, gather=True), spec_of(256, softcap=True),
    spec_of(64, tile=(128, 128), gather=True),
    spec_of(192, 128), spec_of(128, 256),
    spec_of(96, gather=True), spec_of(16), spec_of(72, 40, "float16"), spec_of(32, tile=(64, 64)),
    spec_of(64, tile=(64, 64), softcap=True), spec_of(128, tile=(64, 64)), spec_of(128, tile=(64, 80)),
    spec_of(64, tile=(64, 80)), spec_of(64, tile=(64, 128), dtype="float16"),
    spec_of(64, 128, tile=(64, 64)), spec_of(8, 104, "float16", tile=(64, 64)), spec_of(64, 32, tile=(64, 128)),
    spec_of(96, 8, tile=(128, 128), gather=True), spec_of(128, 16, tile=(128, 112), gather=True),
    spec_of(96, 104, tile=(128, 128), gather=True, sinks=True),
]  # fmt: skip
SPECS += [spec_of(d, tile=tile) for d, tile in (
    (64, (128, 64)), (64, (128, 32)), (64, (128, 112)), (64, (192, 64)), (128, (128, 64)), (128, (128, 32)),
    (128, (128, 112)), (32, None))]  # fmt: skip
EVERYTHING = dict.fromkeys(("softcap", "alibi", "relative", "block", "sinks", "dropout"), True)
SPECS += [spec_of(64, alibi=True), spec_of(128, dropout=True, gather=True), spec_of(128, **EVERYTHING),
          spec_of(64, dtype="float32", **EVERYTHING), spec_of(256, relative=True), spec_of(256, alibi=True),
          spec_of(256, dtype="float16", dropout=True)]  # fmt: skip
TF32_DIMS = (16, 16), (64, 64), (96, 96), (128, 128), (192, 192), (192, 128), (256, 256)
SPECS += [spec_of(d, dv, "float32") for d, dv in TF32_DIMS]  # with a softcap: the most registers of each tile
SPECS += [spec_of(d, dv, "float32", softcap=True) for d, dv in ((64, 64), (192, 192), (256, 256))]
SPECS += [spec_of(64, dtype="float32", tile=(192, 64), softcap=True), spec_of(64, dtype="float32", tile=(128, 64)),
          spec_of(72, 40, "float32")]  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_compiles_without_spills(spec: KernelSpec, tmp_path: Path) -> None:
    build(spec, tmp_path)  # raises CompileError for spills, local memory and C75xx remarks
    report = json.loads((tmp_path / "report.json").read_text())
    attention = next(f for f in report["functions"] if "attention" in f["name"])
    assert attention["spill_bytes"] == attention["stack_bytes"] == 0
    assert attention["smem_bytes"] <= SMEM_BYTES
    assert attention["threads"] == 128 * (1 + spec.tile_m // 64)
    source = (tmp_path / "kernel.cu").read_text()
    assert "wgmma" in source
    assert "cp.async.bulk.tensor" in source
    assert ("q_words" in source) == shape_of(spec).keeps_q


LEARNING = [
    spec_of(64), spec_of(64, dtype="float16", softcap=True), spec_of(128), spec_of(128, dtype="float16", softcap=True),
    spec_of(96, 64), spec_of(64, 128, "float16"), spec_of(16)]  # fmt: skip
WIDE_HEADS = (256, 256), (192, 192), (192, 128), (256, 128), (128, 256), (192, 64), (200, 136), (8, 256)
LEARNING += [spec_of(*dims, dtype) for dims, dtype in zip(WIDE_HEADS, itertools.cycle(("bfloat16", "float16")))]
LEARNING += [spec_of(256, softcap=True), spec_of(192, 128, "float16", softcap=True), spec_of(256, dropout=True),
             spec_of(192, 128, alibi=True), spec_of(256, 128, "float16", relative=True),
             spec_of(192, dtype="float16", relative=True, block=True, dropout=True)]  # fmt: skip
GRADIENTS = [one for spec in LEARNING for one in gradient_specs(spec)]
GRADIENTS += [
    replace(two_walks(spec_of(d, dtype=dtype, softcap=softcap))[0], tile_n=tile_n, gather=gather)
    for d, dtype, softcap, tile_n, gather in (
        (64, "float16", True, 64, True), (64, "bfloat16", False, 112, False), (128, "bfloat16", False, 64, False),
        (128, "float16", False, 128, True), (128, "bfloat16", True, 112, True))
]  # fmt: skip
GRADIENTS += [replace(two_walks(spec_of(*dims))[0], tile_n=128, gather=True) for dims in ((104, 64), (24, 128))]
LOW_TILES = spec_of(64), spec_of(96, dtype="float16"), spec_of(8), spec_of(128, 64), spec_of(64, 128)
GRADIENTS += [replace(one, tile_m=64, tile_n=64) for spec in LOW_TILES for one in two_walks(spec)]
BIASED = [spec_of(64, alibi=True), spec_of(128, **EVERYTHING), spec_of(256, alibi=True, dropout=True),
          spec_of(192, dtype="float16", relative=True, block=True, dropout=True)]  # fmt: skip
GRADIENTS += [replace(two_walks(one)[0], learning=Score(one.score.biases)) for one in BIASED]
FUNCTIONS = {BACKWARD: 5, ROWS: 3, COLUMNS: 2, DV_ALONE: 2, DK_ALONE: 2}


@needs_compiler
@pytest.mark.parametrize("spec", GRADIENTS, ids=lambda spec: spec.name)
def test_gradients_compile_without_spills(spec: KernelSpec, tmp_path: Path) -> None:
    build(spec, tmp_path)  # raises CompileError for spills, local memory and C75xx remarks
    functions = json.loads((tmp_path / "report.json").read_text())["functions"]
    assert [f["spill_bytes"] + f["stack_bytes"] for f in functions] == [0] * FUNCTIONS[spec.role]
    sizes = row_shape_of(spec) if spec.role == ROWS else gradient_shape(spec)
    walk = next(f for f in functions if f["smem_bytes"])
    assert sizes.smem_bytes <= smem_limit(sizes.blocks) and walk["smem_bytes"] <= sizes.smem_bytes
    producer, consumer = sizes.registers
    share = 65536 // (walk["threads"] * sizes.blocks) // 8 * 8
    assert producer + sizes.warpgroups * consumer <= (sizes.warpgroups + 1) * share


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_budgets(spec: KernelSpec) -> None:
    """Registers handed over by setmaxnreg exist, or the kernel would wait for ever."""
    s = shape_of(spec)
    producer, consumer = s.registers
    assert producer % 8 == consumer % 8 == 0
    assert s.register_pool >= 0 and s.product_registers <= s.start_registers
    assert s.live_registers < consumer
    assert s.smem_bytes <= SMEM_BYTES


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(Unsupported, match="fit neither"):
        shape_of(spec_of(256, tile=(192, 128)))
    with pytest.raises(Unsupported, match="listed keys"):
        shape_of(spec_of(64, tile=(192, 128), gather=True))
    with pytest.raises(Unsupported, match="listed keys"):
        shape_of(spec_of(64, dtype="float32", gather=True))
    with pytest.raises(Unsupported, match="nor the registers"):
        row_shape_of(replace(two_walks(spec_of(128, softcap=True))[0], tile_n=128))
    with pytest.raises(Unsupported, match="no tile"):
        shape_of(replace(spec_of(64, dtype="float32"), tile_n=112))
    with pytest.raises(Unsupported, match="listed keys"):
        row_shape_of(replace(two_walks(spec_of(128, 64))[0], gather=True))
    for dim, names in ((192, EVERYTHING), (208, ("relative", "block"))):
        rows = two_walks(spec_of(dim, **dict.fromkeys(names, True)))[0]
        with pytest.raises(Unsupported, match="nor the registers"):
            row_shape_of(replace(rows, learning=Score(rows.score.biases)))
    with pytest.raises(Unsupported, match="nor the registers"):
        gradient_shape(replace(two_walks(spec_of(256))[1], tile_n=128))
    with pytest.raises(Unsupported, match="two walks"):
        gradient_shape(gradient_spec(spec_of(192, 128)))
    assert {tile for tile in HOPPER_TILES if _fits(tile)} == {(64, 64), (64, 80), (128, 64), (128, 32)}


@pytest.mark.parametrize("pruning", [None, "nm(2, 4)", "nm(1, 2)"], ids=str)
@pytest.mark.parametrize("names", [(), ("softcap",), ("alibi",), ("dropout",), tuple(EVERYTHING)], ids=str)
def test_there_is_a_kernel_for_every_tile_that_is_considered(names: tuple[str, ...], pruning: str | None) -> None:
    """Plans take the fastest tile without asking whether a kernel has it."""
    dims = 8, 16, 40, 64, 72, 96, 128, 136, 160, 192, 200, 256
    known = dims[:9] if len(names) > 1 else dims  # all expressions together are refused beyond 176
    for dim, v_dim in itertools.product(known, known):
        for dtype in ("bfloat16", "float32"):
            spec = spec_of(dim, v_dim, dtype, **dict.fromkeys(names, True))
            if pruning is not None:
                if not_pruned(spec) is not None:
                    continue
                spec = with_pruning(spec, split(P.as_pattern(pruning))[1])
            for tile_m, tile_n in (*tile_shapes(spec), *patch_tiles(spec)):
                shape_of(replace(spec, tile_m=tile_m, tile_n=tile_n))
            if by_tensor_cores(spec) and not no_gradients(spec):
                rows, *columns = two_walks(spec)
                for tile_m, tile_n in (*tile_shapes(rows), *patch_tiles(rows)):
                    row_shape_of(replace(rows, tile_m=tile_m, tile_n=tile_n))
                for one in columns:
                    for tile_m, tile_n in tile_shapes(one):
                        gradient_shape(replace(one, tile_m=tile_m, tile_n=tile_n))
                if not only_two_walks(spec):
                    gradient_shape(gradient_spec(spec))


def test_kernels_of_gradients() -> None:
    """dK and dV are computed together where their accumulators fit; tiles are as large as fit."""

    def kernels(*options: Any, **score: bool) -> dict[str, int]:
        return {one.role.removeprefix("backward_"): one.tile_n for one in gradient_specs(spec_of(*options, **score))}

    assert kernels(128) == {"backward": 64, "rows": 128, "columns": 64}
    assert kernels(192, 64) == {"rows": 64, "columns": 64}
    assert kernels(192, 128) == kernels(128, 256) == kernels(192) == {"rows": 64, "values": 64, "keys": 64}
    assert kernels(200, 192) == kernels(256) == {"rows": 32, "values": 32, "keys": 32}
    assert kernels(192, 128, softcap=True) == kernels(192, 128)
    assert kernels(192, 128, alibi=True) == kernels(256, 128, softcap=True) == kernels(256)
    stages = {d: [gradient_shape(one).key_stages for one in two_walks(spec_of(d, 128))[1:]] for d in (128, 192, 256)}
    assert stages == {128: [2], 192: [2, 1], 256: [1, 1]}


def test_tiles_of_float32() -> None:
    """Wider head dims leave less shared memory: fewer keys."""
    default = {d: (spec.tile_m, spec.tile_n) for d in (8, 64, 72, 192, 200, 256) for spec in [spec_of(d, 8, "float32")]}
    assert default == {8: (128, 128), 64: (128, 128), 72: (128, 64), 192: (128, 64), 200: (128, 32), 256: (128, 32)}
    assert spec_of(64, dtype="float32", softcap=True).tile_n == 128


def test_float32_is_tf32_unless_told_otherwise() -> None:
    assert kernel_spec(64, None, "float32", HOPPER).kernel == "hopper"
    assert kernel_spec(64, None, "float32", HOPPER, allow_tf32=False).kernel == "portable"
    assert kernel_spec(64, None, "bfloat16", HOPPER, allow_tf32=False).kernel == "hopper"
    assert "allow_tf32 is False" in str(not_hopper(64, 64, "float32", HOPPER, allow_tf32=False))
    plan = best_plan(P.causal(), 500, 500, kernel_spec(64, None, "float32", HOPPER))
    assert "tf32" in str(plan.explanation) and not plan.spec.gather
    with pytest.raises(InvalidInput, match="tile"):
        kernel_spec(64, None, "float32", HOPPER, tile=(128, 112))


@pytest.mark.parametrize(("options", "why"), [
    ({"d": 64}, None), ({"d": 256}, "head dims up to 128"), ({"d": 64, "dtype": "float32"}, "16-bit types"),
    ({"d": 64, "alibi": True, "sinks": True, "dropout": True}, "too many expressions")])  # fmt: skip
def test_it_is_said_why_scattered_elements_are_not_gathered(options: dict[str, Any], why: str | None) -> None:
    scattered = P.mask(np.random.default_rng(0).random((1000, 1000)) < 0.002)
    plan = best_plan(scattered, 1000, 1000, spec_of(**options))
    text = str(plan.explanation)
    assert plan.spec.gather == (why is None) == ("gathered" in text)
    assert ("no lists" in text) == (why is not None) and (why or "") in text
    assert "no lists" not in str(best_plan(P.window(9, 9), 1000, 1000, spec_of(**options)).explanation)


def _fits(tile: tuple[int, int]) -> bool:
    try:
        shape_of(spec_of(256, tile=tile))
    except Unsupported:
        return False
    return True


def test_statements_of_products() -> None:
    """Every operand of the assembly is a parameter and the other way round; long products share accumulators only."""
    from splatc.codegen.hopper.wgmma import STEPS, Statement

    shape = "m64n96k16.f32.bf16.bf16"
    seen: dict[str, Statement] = {}
    for a_registers, b_transposed, first, last, fresh in itertools.product((False, True), repeat=5):
        for steps in (1, STEPS):
            one = Statement(shape, steps, a_registers, b_transposed, first, last, fresh)
            count = one.accumulators + one.a_size + steps
            assert {int(n) for n in re.findall(r"%(\d+)", one.assembly)} == set(range(count))
            assert one.source.partition(")")[0].count(",") + 1 == count
            assert one.assembly.count("wgmma.mma_async.sync.aligned." + shape) == steps
            assert one.assembly.count(", fresh, ") == fresh  # the predicate of the first step
            assert ("wgmma.fence" in one.assembly, "commit_group" in one.assembly) == (first, last)
            assert seen.setdefault(one.name, one) == one
    assert one.accumulators == 48


@needs_compiler
def test_a_spilling_kernel_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check can fail: a consumer with too few registers spills."""
    from splatc.codegen.hopper import forward

    class Starved(Shape):
        registers = (24, 120)  # type: ignore[assignment]

    monkeypatch.setattr(forward, "shape_of", lambda spec: Starved(**vars(shape_of(spec))))
    with pytest.raises(CompileError, match=r"ptxas says"):
        build(spec_of(128), tmp_path)
