"""What ``splatc tune`` remembers, and what compile makes of it."""

from __future__ import annotations

import json
import logging
import multiprocessing
from dataclasses import replace

import numpy as np
import pytest

from splatc import patterns as P
from splatc.codegen.kernel import HOPPER_TILES, PATCH_TILES, kernel_spec, tile_shapes
from splatc.codegen.target import Target
from splatc.compile import best_plan
from splatc.errors import CacheError, InvalidInput
from splatc.formats.acsr import ACSR
from splatc.ir.passes import PASSES
from splatc.ir.score import score_of
from splatc.runtime import tuned
from splatc.runtime.tuned import remember_tile, tuned_tiles
from tests.tuning import BEST, HOPPER, MASK, SPEC, found

pytestmark = pytest.mark.usefixtures("tuned_file")


def test_nothing_is_known_of_an_untuned_mask(tuned_file):
    assert found() is None
    assert not tuned_file.parent.exists()  # asking writes nothing


def test_what_was_tuned_is_found_by_another_process(tuned_file, monkeypatch):
    assert remember_tile(MASK, 512, 512, SPEC, BEST) == tuned_file
    monkeypatch.setattr(tuned, "_read", None)
    assert found() == (BEST.tile,)
    assert found(P.parse(str(MASK))) == (BEST.tile,)  # by its text
    assert found(spec=replace(SPEC, tile_m=192, gather=True)) == (BEST.tile,)  # whatever the spec has by default
    (entry,) = json.loads(tuned_file.read_text())["tiles"].values()
    assert entry["device"] == "NVIDIA H200" and entry["pattern"] == str(MASK) and entry["date"].startswith("20")
    assert tuned_file.stat().st_mode & 0o077 == 0
    assert sorted(p.name for p in tuned_file.parent.iterdir()) == [".locks", tuned_file.name]


@pytest.mark.parametrize("other", [
    {"pattern": P.causal()}, {"q_len": 513}, {"kv_len": 1024}, {"spec": replace(SPEC, head_dim=128)},
    {"spec": replace(SPEC, v_head_dim=128)}, {"spec": replace(SPEC, dtype="float16")},
    {"spec": replace(SPEC, score=score_of(sinks=True))}, {"spec": replace(SPEC, target=Target("cuda", "sm_100a"))},
    {"spec": replace(SPEC, kernel="portable")}, {"spec": kernel_spec(64, None, "bfloat16", Target("cpu", "native"))},
])  # fmt: skip
def test_another_request_is_another_tuning(other):
    remember_tile(MASK, 512, 512, SPEC, BEST)
    assert found(**other) is None


def test_the_last_tuning_counts_and_is_seen_at_once():
    for tile in ((192, 128), (64, 64), (128, 128)):
        remember_tile(MASK, 512, 512, SPEC, replace(BEST, tile=tile))
        assert found() == (tile,)


def test_the_file_is_read_once_until_it_changes(monkeypatch):
    remember_tile(MASK, 512, 512, SPEC, BEST)
    read = []
    parse = tuned._parse

    def counted(path, status):
        read.append(path)
        return parse(path, status)

    monkeypatch.setattr(tuned, "_parse", counted)
    for _ in range(3):
        assert found() == (BEST.tile,) and found(q_len=7) is None
    assert len(read) == 1  # since remember_tile wrote it
    remember_tile(P.causal(), 512, 512, SPEC, BEST)
    assert found() == (BEST.tile,) and len(read) == 2


def test_the_oldest_tunings_are_dropped(monkeypatch, tuned_file):
    monkeypatch.setattr(tuned, "KEPT", 3)
    for n in (1, 2, 3, 1, 4):
        remember_tile(MASK, n, n, SPEC, BEST)
    assert [n for n in range(1, 5) if found(q_len=n, kv_len=n)] == [1, 3, 4]


def test_a_long_pattern_is_shortened_only_for_people(tuned_file):
    lengths = list(range(1, 200))
    long, other = P.documents(lengths), P.documents([*lengths[:-2], lengths[-1], lengths[-2]])
    n = sum(lengths)
    remember_tile(long, n, n, SPEC, BEST)
    assert found(long, n, n) and not found(other, n, n)
    assert len(next(iter(json.loads(tuned_file.read_text())["tiles"].values()))["pattern"]) == tuned.SHOWN


DAMAGED = [b"", b"{", b"\xff\xfe\x00", b"[]", b"7", b'{"format": 1}', b'{"format": 2, "tiles": {}}',
           b'{"format": "1", "tiles": {}}', b'{"format": 1, "tiles": []}', b"[" * 100_000]  # fmt: skip


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_file_is_ignored_said_once_and_written_anew(tuned_file, caplog, content):
    tuned_file.parent.mkdir()
    tuned_file.write_bytes(content)
    with caplog.at_level(logging.WARNING, "splatc.tuned"):
        assert found() is None and found() is None
        assert [str(tuned_file) in r.getMessage() for r in caplog.records] == [True]
        remember_tile(MASK, 512, 512, SPEC, BEST)
        assert found() == (BEST.tile,) and len(caplog.records) == 1
    assert len(json.loads(tuned_file.read_text())["tiles"]) == 1


def test_what_is_no_file_is_ignored(tuned_file, caplog):
    tuned_file.mkdir(parents=True)
    assert found() is None and "ignored" in caplog.text


@pytest.mark.parametrize("change", [
    {"tile": "64 x 128"}, {"tile": [64]}, {"tile": [64, 128, 1]}, {"tile": [64.0, 128]}, {"tile": [None, 128]},
    {"tile": [128, 64 * 10**30]}, {"tile": [-64, 128]}, {"tile": [96, 128]}, {"tile": {}}, {"splatc": "0.0.0"},
    {"splatc": 3}, None, "x", [64, 128],
])  # fmt: skip
def test_an_entry_that_makes_no_sense_is_not_used(tuned_file, change):
    untuned = best_plan(MASK, 512, 512, SPEC).spec
    remember_tile(MASK, 512, 512, SPEC, BEST)
    values = json.loads(tuned_file.read_text())
    for key, entry in values["tiles"].items():
        values["tiles"][key] = entry | change if isinstance(change, dict) else change
    tuned_file.write_text(json.dumps(values))
    assert found() is None
    assert best_plan(MASK, 512, 512, SPEC).spec == untuned
    remember_tile(MASK, 512, 512, SPEC, BEST)
    assert found() == (BEST.tile,)


def test_a_tile_that_does_not_fit_the_kernel_is_not_used():
    wide = kernel_spec(256, None, "bfloat16", HOPPER)
    remember_tile(MASK, 512, 512, wide, replace(BEST, tile=(192, 128)))
    assert found(spec=wide) is None


def test_without_a_cache_nothing_is_read_or_written(tuned_file, monkeypatch):
    remember_tile(MASK, 512, 512, SPEC, BEST)
    before = tuned_file.read_bytes()
    monkeypatch.setenv("SPLATC_DISABLE_CACHE", "1")
    assert found() is None
    with pytest.raises(InvalidInput, match="SPLATC_DISABLE_CACHE"):
        remember_tile(P.full(), 512, 512, SPEC, BEST)
    assert tuned_file.read_bytes() == before


def test_a_folder_that_others_may_write_to_is_refused(tuned_file):
    tuned_file.parent.mkdir()
    tuned_file.parent.chmod(0o777)
    with pytest.raises(CacheError, match="0777"):
        remember_tile(MASK, 512, 512, SPEC, BEST)


def test_a_writer_that_fails_leaves_the_old_file(tuned_file, monkeypatch):
    remember_tile(MASK, 512, 512, SPEC, BEST)
    before = tuned_file.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tuned.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        remember_tile(P.full(), 512, 512, SPEC, BEST)
    assert tuned_file.read_bytes() == before
    assert sorted(p.name for p in tuned_file.parent.iterdir()) == [".locks", tuned_file.name]
    assert found() == (BEST.tile,)


def remember_many(worker: int, count: int) -> None:
    for i in range(count):
        remember_tile(MASK, 1 + worker, 1 + i, SPEC, BEST)
        assert tuned_tiles(MASK, 1 + worker, 1 + i, SPEC) == (BEST.tile,)


def test_processes_that_write_at_once_lose_nothing():
    workers, count = 4, 12
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=remember_many, args=(w, count)) for w in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    assert all(found(q_len=1 + w, kv_len=1 + i) for w in range(workers) for i in range(count))


@pytest.mark.parametrize("tile", HOPPER_TILES)
def test_compile_takes_the_tuned_tile(tile):
    usual = best_plan(MASK, 513, 513, SPEC).spec
    remember_tile(MASK, 512, 512, SPEC, replace(BEST, tile=tile))
    plan = best_plan(MASK, 512, 512, SPEC)
    assert (plan.spec.tile_m, plan.spec.tile_n) == tile
    assert plan.tables[0][0].positions.shape[1] == tile[0]
    assert best_plan(MASK, 513, 513, SPEC).spec == usual  # other lengths were not tuned
    assert best_plan(MASK, 512, 512, SPEC, ((128, 128),)).spec.tile_m == 128  # who asks for a tile gets it


def test_neighbourhoods_have_a_tile_of_their_own_where_it_exists():
    grid = P.neighborhood((64, 64), 13)
    scattered = P.mask(np.random.default_rng(0).random((4096, 4096)) < 0.002)
    wide = kernel_spec(256, None, "bfloat16", HOPPER)
    for spec, mask, patched in ((SPEC, grid, True), (wide, grid, False), (SPEC, grid | scattered, False)):
        chosen = best_plan(mask, 4096, 4096, spec).spec
        assert ((chosen.tile_m, chosen.tile_n) in PATCH_TILES) == patched


def test_passes_are_shown_of_the_chosen_tile_only():
    seen = []
    plan = best_plan(MASK, 512, 512, SPEC, after=lambda name, program: seen.append((name, program)))
    assert [name for name, _ in seen] == ["lower", *(one.__name__ for one in PASSES)]
    assert seen[-1][1] == plan.programs[0] and plan.tables[0][0].positions.shape[1] == plan.spec.tile_m


def test_a_mask_is_analysed_once_for_all_tiles(monkeypatch):
    seen, analyse = [], ACSR.from_pattern

    def counted(*arguments, among):
        seen.append(arguments)
        return analyse(*arguments, among=among)

    monkeypatch.setattr(ACSR, "from_pattern", counted)
    heads = P.per_head([P.causal(), P.window(9, 0), P.causal()])
    shown = best_plan(heads, 512, 512, SPEC, after=lambda name, program: None)
    assert len(tile_shapes(SPEC)) > 1 and seen == [(P.causal(), 512, 512), (P.window(9, 0), 512, 512)]
    assert shown.heads == (0, 1, 0) and [t[0].nnz for t in shown.tables] == [512 * 513 // 2, 512 * 10 - 45]
