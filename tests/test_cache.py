"""The kernel cache: hits, damage, attacks, crashes, full disks, eviction, and many processes at once."""

from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import os
import random
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from splatc.errors import CacheError, InvalidInput
from splatc.runtime import cache as cache_module
from splatc.runtime.cache import MANIFEST, KernelCache, key_of, source_fingerprint

BIG = 1 << 30
unix = pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs Unix owners and modes")


class Builder:
    """A fake compiler that counts how often it ran."""

    def __init__(self, size: int = 100):
        self.calls = 0
        self.size = size

    def __call__(self, folder: Path) -> None:
        self.calls += 1
        (folder / "kernel.so").write_bytes(b"\x7fELF" + b"k" * self.size)
        (folder / "program.txt").write_text("program\n")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def kernels(root: Path) -> KernelCache:
    return KernelCache(root, BIG)


@pytest.fixture(autouse=True)
def forget_warnings(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cache_module, "_warned", False)
    monkeypatch.setattr(cache_module, "_private", {})


def fields(n: int = 0, target: str = "cpu:x86-64-v3") -> dict[str, object]:
    return {"target": target, "op": "attention", "n": n}


def get(kernels: KernelCache, build, n: int = 0) -> Path:
    return kernels.get_or_build(fields(n), build, label="attention d128 bf16")


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


# -- hits and keys -------------------------------------------------------------------------------


def test_an_entry_is_built_once_and_readable(kernels, root):
    build = Builder()
    entry = get(kernels, build)
    assert get(kernels, build) == entry == get(KernelCache(root, BIG), build)
    assert build.calls == 1
    assert entry == root / "v1" / "cpu-x86-64-v3" / f"attention-d128-bf16-{key_of(fields())[:16]}"
    manifest = json.loads((entry / MANIFEST).read_text())
    assert manifest["key_fields"] == fields()
    assert manifest["files"]["kernel.so"]["size"] == 104
    assert set(manifest["files"]) == {"kernel.so", "program.txt"}
    assert not list((root / ".tmp").iterdir())


def test_every_field_changes_the_key():
    some: list[dict[str, object]] = [{}, {"n": 1}, {"n": "0"}, {"ir": "x"}, {"ir": "y"}, {"flag": True}]
    assert len({key_of({**fields(), **more}) for more in some}) == 6
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1})
    with pytest.raises(TypeError):
        key_of({"a": object()})
    with pytest.raises(ValueError):
        key_of({"a": float("nan")})


def test_names_cannot_leave_the_cache(kernels, root):
    entry = kernels.get_or_build(fields(target="../../etc"), Builder(), label="../x/y ~\n")
    assert entry.parent.parent == root / "v1"


def test_nested_files_are_verified(kernels, caplog):
    def build(folder: Path) -> None:
        (folder / "dump").mkdir(mode=0o777)
        (folder / "dump" / "00_ir.txt").write_text("ir")

    entry = get(kernels, build)
    assert list(json.loads((entry / MANIFEST).read_text())["files"]) == ["dump/00_ir.txt"]
    assert stat.S_IMODE((entry / "dump").stat().st_mode) == 0o700
    (entry / "dump" / "00_ir.txt").write_text("IR")
    get(kernels, build)
    assert len(warnings_in(caplog)) == 1


def test_a_failed_build_leaves_nothing(kernels, root):
    def build(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise FileNotFoundError("nvcc")  # an OSError of the compiler's, not of the disk

    with pytest.raises(FileNotFoundError, match="nvcc"):
        get(kernels, build)
    assert not list((root / ".tmp").iterdir()) and not kernels.entries()
    assert get(kernels, Builder()).is_dir()


def test_source_fingerprint_is_stable():
    assert source_fingerprint() == source_fingerprint()
    assert len(source_fingerprint()) == 64


# -- damage --------------------------------------------------------------------------------------


def truncate(entry: Path) -> None:
    (entry / "kernel.so").write_bytes(b"\x7fELF")


def flip_a_bit(entry: Path) -> None:
    data = bytearray((entry / "kernel.so").read_bytes())
    data[50] ^= 1
    (entry / "kernel.so").write_bytes(data)


def foreign_key(entry: Path) -> None:
    manifest = json.loads((entry / MANIFEST).read_text())
    manifest["key_fields"]["n"] = 77
    (entry / MANIFEST).write_text(json.dumps(manifest))


def outside(entry: Path) -> None:
    manifest = json.loads((entry / MANIFEST).read_text())
    manifest["files"]["../../x"] = manifest["files"]["kernel.so"]
    (entry / MANIFEST).write_text(json.dumps(manifest))


def a_folder_for_a_file(entry: Path) -> None:
    (entry / "kernel.so").unlink()
    (entry / "kernel.so").mkdir(mode=0o700)


def a_file_for_the_entry(entry: Path) -> None:
    cache_module._delete(entry)
    entry.write_text("x")
    entry.chmod(0o600)


DAMAGE = {
    "bytes, not": truncate,
    "has changed": flip_a_bit,
    "kernel.so is missing": lambda entry: (entry / "kernel.so").unlink(),
    "manifest.json is missing": lambda entry: (entry / MANIFEST).unlink(),
    "unreadable": lambda entry: (entry / MANIFEST).write_bytes(b"\xff\x00 garbage"),
    "is unreadable": lambda entry: (entry / MANIFEST).write_text("[" * 100_000),
    "manifest.json is unreadable": lambda entry: (entry / MANIFEST).write_text("[]"),
    "another key": foreign_key,
    "outside the entry": outside,
    "not a regular file": a_folder_for_a_file,
    "not a folder": a_file_for_the_entry,
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_entry_is_rebuilt_with_one_warning(kernels, root, caplog, what):
    build = Builder()
    entry = get(kernels, build)
    DAMAGE[what](entry)
    assert get(kernels, build) == entry
    assert build.calls == 2
    assert (entry / "kernel.so").stat().st_size == 104
    assert len(warnings_in(caplog)) == 1
    assert what in warnings_in(caplog)[0] and str(entry) in warnings_in(caplog)[0]
    get(kernels, build)
    assert build.calls == 2
    assert not list((root / ".tmp").iterdir())


# -- safety --------------------------------------------------------------------------------------


@unix
def test_folders_and_files_are_for_us_alone(kernels, root):
    old = os.umask(0)
    try:
        entry = get(kernels, Builder())
    finally:
        os.umask(old)
    for path in (root, *root.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    assert entry.is_dir()


@unix
@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770])
@pytest.mark.parametrize("level", ["kernel.so", MANIFEST, ".", "..", "../..", "../../.."])
def test_what_others_can_write_is_refused(kernels, level, mode):
    entry = get(kernels, Builder())
    path = Path(os.path.normpath(entry / level))
    path.chmod(mode)
    with pytest.raises(CacheError, match=rf"{path} has mode {mode:04o}.*chmod.*SPLATC_CACHE_DIR"):
        get(kernels, Builder())


@unix
def test_an_existing_open_root_is_refused(root):
    root.mkdir()
    root.chmod(0o777)
    with pytest.raises(CacheError, match="mode 0777"):
        get(KernelCache(root, BIG), Builder())
    assert not list(root.iterdir())


@unix
def test_a_parent_open_to_all_is_refused_unless_sticky(root):
    root.parent.chmod(0o777)
    with pytest.raises(CacheError, match=r"above .* has mode 0777"):
        get(KernelCache(root, BIG), Builder())
    root.parent.chmod(0o1777)
    get(KernelCache(root, BIG), Builder())


@unix
@pytest.mark.skipif(hasattr(os, "getuid") and os.getuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("level", ["root", "entry", "file", "manifest"])
def test_another_owner_is_refused(kernels, root, level):
    entry = get(kernels, Builder())
    path = {"root": root, "entry": entry, "file": entry / "kernel.so", "manifest": entry / MANIFEST}[level]
    os.chown(path, 12345, -1)
    with pytest.raises(CacheError, match=rf"{path} belongs to uid 12345.*chown.*SPLATC_CACHE_DIR"):
        get(kernels, Builder())


@unix
@pytest.mark.parametrize("level", ["entry", "file"])
def test_symbolic_links_are_refused(kernels, tmp_path, level):
    entry = get(kernels, Builder())
    path = entry if level == "entry" else entry / "kernel.so"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CacheError, match="symbolic link"):
        get(kernels, Builder())


@unix
def test_a_link_to_the_root_is_the_users_choice(root, tmp_path):
    (tmp_path / "link").symlink_to(root)
    assert get(KernelCache(tmp_path / "link", BIG), Builder()).is_relative_to(root)


def test_messages_are_one_line(root):
    root.write_text("a file")
    root.chmod(0o600)
    with pytest.raises(CacheError, match="not a folder") as info:
        get(KernelCache(root, BIG), Builder())
    assert "\n" not in str(info.value)


# -- no disk -------------------------------------------------------------------------------------


def fail(number: int):
    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EACCES])
@pytest.mark.parametrize("where", ["mkdir", "rename", "fsync"])
def test_without_a_writable_disk_one_warning(kernels, caplog, monkeypatch, number, where):
    from splatc.runtime.guard import make_folder

    if where == "mkdir":  # in the cache only: the private folder is elsewhere

        def closed(path: Path) -> None:
            (fail(number) if path.is_relative_to(kernels.root) else make_folder)(path)

        monkeypatch.setattr("splatc.runtime.cache.make_folder", closed)
    else:
        monkeypatch.setattr(os, where, fail(number))
    build = Builder()
    entries = [get(kernels, build, n) for n in (0, 1, 0, 1)]
    calls = build.calls
    assert entries[:2] == entries[2:] and entries[0] != entries[1]
    assert get(kernels, build, 1) == entries[1] and build.calls == calls  # kept, not tried again
    assert all((entry / "kernel.so").is_file() for entry in entries)
    assert len(warnings_in(caplog)) == 1 and "SPLATC_CACHE_DIR" in warnings_in(caplog)[0]
    monkeypatch.undo()
    assert not kernels.entries()


def test_a_disk_that_fills_up_during_the_build(kernels, root, caplog):
    def build(folder: Path) -> None:
        if folder.is_relative_to(root):
            raise OSError(errno.ENOSPC, "No space left on device")
        Builder()(folder)

    assert (get(kernels, build) / "kernel.so").is_file()
    assert len(warnings_in(caplog)) == 1


def test_a_read_only_disk_still_serves_hits(kernels, monkeypatch, caplog):
    entry = get(kernels, Builder())
    for name in ("mkdir", "rename", "utime", "chmod"):
        monkeypatch.setattr(os, name, fail(errno.EROFS))
    assert get(kernels, Builder()) == entry
    assert not warnings_in(caplog)


def test_without_a_root_kernels_live_as_long_as_the_process(tmp_path):
    script = (
        "from pathlib import Path; from splatc.runtime.cache import KernelCache\n"
        "c = KernelCache(None, 0); build = lambda folder: (folder / 'k').write_text('k')\n"
        "a, b = (c.get_or_build({'n': 1}, build, label='x') for _ in range(2))\n"
        "assert a == b and (a / 'k').is_file() and a.parent.stat().st_mode & 0o77 == 0; print(a)"
    )
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=env, check=True, capture_output=True, text=True)
    assert done.stderr == "" and not Path(done.stdout.strip()).parent.exists()


# -- size ----------------------------------------------------------------------------------------


def age(entry: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(entry / MANIFEST, (then, then))


def test_the_least_recently_used_go_first(root):
    kernels, build = KernelCache(root, 25_000), Builder(size=5_000)
    entries = [get(kernels, build, n) for n in range(4)]
    for n, entry in enumerate(entries):
        age(entry, 1000 - n)
    get(kernels, build, 0)  # a hit: now the most recently used
    assert build.calls == 4
    last = get(kernels, build, 4)
    assert [e.exists() for e in entries] == [True, False, True, True] and last.exists()
    assert sum(e.size for e in kernels.entries()) <= 25_000


def test_what_is_new_in_use_or_locked_stays(root):
    kernels, build = KernelCache(root, 1), Builder()
    locked, recent = get(kernels, build, 0), get(kernels, build, 1)
    age(locked, 1000)
    with kernels._locked(locked):
        published = get(kernels, build, 2)
    assert locked.exists() and recent.exists() and published.exists()
    age(recent, 1000)
    last = get(kernels, build, 3)
    assert [p.exists() for p in (locked, recent, published, last)] == [False, False, True, True]


def test_prune_clear_list_and_show(kernels, root):
    assert kernels.entries() == [] == kernels.clear() == kernels.prune(max_bytes=0)
    assert not root.exists()  # looking creates nothing
    entries = [get(kernels, Builder(), n) for n in range(5)]
    for n, entry in enumerate(entries):
        age(entry, 100 * (5 - n))
    found = kernels.entries()
    assert [e.path for e in found] == entries[::-1]
    assert {(e.label, e.target, e.version) for e in found} == {("attention-d128-bf16", "cpu-x86-64-v3", "v1")}
    assert all(abs(e.created - time.time()) < 60 and e.size > 100 for e in found)
    entry, manifest = kernels.show(found[0].key[:10])
    assert entry == found[0] and manifest["key_fields"] == fields(4)
    for name in ("nothing", "attention"):
        with pytest.raises(InvalidInput, match="cache list"):
            kernels.show(name)

    assert {e.path for e in kernels.prune(older_than=350)} == set(entries[:2])
    assert [e.path for e in kernels.prune(max_bytes=found[0].size)] == entries[2:4]
    stranger = root / "v1" / "cpu-x86-64-v3" / "notes"
    stranger.mkdir()
    (root / "thesis.tex").write_text("x")
    age(entries[4], -1000)  # a clock that was set back
    assert [e.path for e in kernels.clear()] == entries[4:]
    assert kernels.entries() == [] and stranger.exists() and (root / "thesis.tex").exists()


# -- many processes ------------------------------------------------------------------------------

KERNELS, WORKERS = 20, 8


def _use_all(root: Path, log: Path, start, seed: int) -> None:
    """One process: ask for every kernel, in an order of its own, and check each."""
    kernels = KernelCache(root, BIG)
    start.wait()
    for n in random.Random(seed // 2).sample(range(KERNELS), KERNELS):  # pairs of processes go the same way

        def build(folder: Path, n: int = n) -> None:
            with open(log, "a") as lines:
                lines.write(f"{n}\n")
            (folder / "kernel.so").write_bytes(b"half")
            time.sleep(0.03)
            (folder / "kernel.so").write_bytes(bytes([n]) * 1000)

        entry = get(kernels, build, n)
        assert (entry / "kernel.so").read_bytes() == bytes([n]) * 1000
        assert (entry / MANIFEST).is_file()


def test_eight_processes_build_each_kernel_once(root, tmp_path):
    spawn = multiprocessing.get_context("spawn")
    start, log = spawn.Barrier(WORKERS), tmp_path / "log"
    workers = [spawn.Process(target=_use_all, args=(root, log, start, seed)) for seed in range(WORKERS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * WORKERS
    assert sorted(map(int, log.read_text().split())) == list(range(KERNELS))
    assert len(KernelCache(root, BIG).entries()) == KERNELS
    assert not list((root / ".tmp").iterdir())


def _build_forever(root: Path, n: int, ready) -> None:
    def build(folder: Path) -> None:
        (folder / "kernel.so").write_bytes(b"half")
        ready.set()
        time.sleep(600)

    get(KernelCache(root, BIG), build, n)


@unix
def test_a_killed_builder_is_replaced(root, caplog):
    spawn = multiprocessing.get_context("spawn")
    events = [spawn.Event() for _ in range(2)]
    workers = [spawn.Process(target=_build_forever, args=(root, n, events[n])) for n in range(2)]
    for worker in workers:
        worker.start()
    assert all(event.wait(30) for event in events)
    kernels = KernelCache(root, BIG)
    get(kernels, Builder(), 5)  # housekeeping must not touch what live processes build
    assert len(list((root / ".tmp").iterdir())) == 2
    for worker in workers:
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        worker.join(30)
    build = Builder()
    entry = get(kernels, build, 0)
    assert build.calls == 1 and (entry / "kernel.so").stat().st_size == 104
    assert not list((root / ".tmp").iterdir())  # and the other one's leftovers went with it
    assert not warnings_in(caplog)


@unix
def test_those_who_wait_say_so_and_survive_a_kill(root, caplog):
    spawn = multiprocessing.get_context("spawn")
    ready = spawn.Event()
    worker = spawn.Process(target=_build_forever, args=(root, 0, ready))
    worker.start()
    assert ready.wait(30)
    killer = subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {worker.pid}"])
    with caplog.at_level(logging.INFO, logger="splatc"):
        build = Builder()
        get(KernelCache(root, BIG), build, 0)
    killer.wait()
    worker.join(30)
    assert build.calls == 1
    assert "waiting for another process" in caplog.text
