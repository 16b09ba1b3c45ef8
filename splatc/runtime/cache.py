"""Compiled kernels on disk: built once, shared by all processes of one user, checked before each use.

    <root>/v1/<target>/<label>-<first 16 of key>/   an entry: what `build` wrote, and manifest.json
    <root>/.locks/                                  an empty file per entry; a dead holder's lock is free
    <root>/.tmp/                                    entries being built or thrown away

An entry appears by one rename, so it is seen whole or not at all. Whoever has a folder in `.tmp` holds the
lock of its entry: a folder whose lock is free was left by a killed process. The kernel is code that we load,
so nobody else may have been able to write it: see `splatc.runtime.guard`.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import re
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from splatc.errors import CacheError, InvalidInput
from splatc.runtime.guard import check_ancestors, check_file, check_folder, make_folder

FORMAT = 1  # of the folder and its manifest; what changes the kernel itself belongs in the key
MANIFEST = "manifest.json"
GRACE_S = 10.0  # an entry used this recently is not evicted: a caller may be between lookup and dlopen
POLL_S = 0.02
PATIENCE_S = 60.0  # between two "still waiting" messages

Build = Callable[[Path], None]
_ENTRY_NAME = re.compile(r"(?P<label>.+)-(?P<key>[0-9a-f]{16})")
_log = logging.getLogger("splatc.cache")


class Entry(NamedTuple):
    """One cached kernel. size: bytes; created, last_used: seconds since the epoch."""

    path: Path
    version: str
    target: str
    label: str
    key: str
    size: int
    created: float
    last_used: float

    @property
    def name(self) -> str:
        """The folder's name: label and the first 16 hex digits of the key."""
        return self.path.name


class KernelCache:
    """A folder of compiled kernels of at most `max_bytes`. Nothing is read or written before the first call.

    root: the folder, or None for no cache on disk: each kernel then lives as long as the process.
    """

    def __init__(self, root: Path | str | None, max_bytes: int) -> None:
        self.root = None if root is None else Path(os.path.realpath(root))
        self.max_bytes = max_bytes

    # -- use --------------------------------------------------------------------------------------

    def get_or_build(self, key_fields: Mapping[str, Any], build: Build, *, label: str) -> Path:
        """The verified folder of the kernel that `key_fields` identify; build(folder) fills a new one.

        key_fields: JSON values that together hold all that changes the kernel; "target" names the sub-folder.
        label: a few words for people. Raises CacheError if others could have written to the folder, and what
        `build` raises. On a read-only or full disk: one warning, and the kernel lives as long as the process.
        """
        key = key_of(key_fields)
        if self.root is None or key in _private:  # the disk failed before
            return _private_folder(key, build)
        target = _slug(str(key_fields.get("target", "any")), 40)
        entry = self.root / f"v{FORMAT}" / target / f"{_slug(label, 80)}-{key[:16]}"
        fields = json.loads(_canonical(key_fields))
        failures: list[Exception] = []
        try:
            if self._fault(entry, fields) is None:
                return self._touched(entry)
            with self._locked(entry):
                if (fault := self._fault(entry, fields)) is None:  # another process built it while we waited
                    return self._touched(entry)
                self._discard_leftovers(entry)
                if os.path.lexists(entry):
                    _log.warning("cached kernel %s: %s; building it again", entry, fault)
                    self._discard(entry)
                self._publish(entry, fields, _judged(build, failures), label)
            self._make_room(entry)
            return entry
        except OSError as error:
            if any(error is failure for failure in failures):
                raise  # the compiler's own
            return _private_folder(key, build, why=f"{self.root}: {error}")

    def _fault(self, entry: Path, fields: dict[str, Any]) -> str | None:
        """What is wrong with an entry; None: load it. Raises CacheError if others may write to it."""
        assert self.root is not None
        check_ancestors(self.root)
        for folder in (self.root, entry.parent.parent, entry.parent):
            if not check_folder(folder):
                return "absent"
        if entry.is_file() and not entry.is_symlink():
            return "it is a file, not a folder"
        if not check_folder(entry):
            return "absent"
        try:
            check_file(entry / MANIFEST)
            manifest = json.loads((entry / MANIFEST).read_bytes())
            files = {str(n): (int(f["size"]), str(f["sha256"])) for n, f in manifest["files"].items()}
            if manifest["format"] != FORMAT or manifest["key_fields"] != fields:
                return "it was built for another key"
            for name, (size, digest) in files.items():
                if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                    return f"{MANIFEST} names {name!r}, outside the entry"
                for parent in PurePosixPath(name).parents[:-1]:
                    check_folder(entry / parent)
                if (found := check_file(entry / name).st_size) != size:
                    return f"{name} has {found} bytes, not {size}"
                if _sha256(entry / name) != digest:
                    return f"{name} has changed since it was built"
        except FileNotFoundError as error:
            return f"{Path(error.filename).name} is missing"
        except OSError as error:
            return f"it cannot be read ({error})"
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return f"{MANIFEST} is unreadable"
        return None

    def _touched(self, entry: Path) -> Path:
        with contextlib.suppress(OSError):  # a read-only disk still serves what it has
            os.utime(entry / MANIFEST)
        return entry

    def _publish(self, entry: Path, fields: dict[str, Any], build: Build, label: str) -> None:
        """Build in a private folder, add the manifest, make it durable, rename it into place. Lock held."""
        temp = self._temp(entry)
        make_folder(temp)
        try:
            build(temp)
            files = {name: _seal(temp / name) for name in sorted(_files(temp))}
            manifest = {
                "format": FORMAT,
                "splatc": _splatc_version(),
                "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "label": label,
                "key": key_of(fields),
                "key_fields": fields,
                "files": files,
            }
            (temp / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
            _seal(temp / MANIFEST)
            _sync(temp)
            make_folder(entry.parent)
            os.rename(temp, entry)
            _sync(entry.parent)
        finally:
            _delete(temp)

    # -- locks and temporary folders --------------------------------------------------------------

    @contextlib.contextmanager
    def _locked(self, entry: Path) -> Iterator[None]:
        """Hold the entry's lock, waiting for another process that builds it. A holder's death frees it."""
        from filelock import FileLock, Timeout

        assert self.root is not None
        for folder in (self.root / ".locks", self.root / ".tmp", entry.parent):
            make_folder(folder)
        check_ancestors(self.root)
        for folder in (self.root, self.root / ".locks", self.root / ".tmp", *entry.parents[:2]):
            check_folder(folder)
        lock = FileLock(self.root / ".locks" / f"{self._tag(entry)}.lock", mode=0o600)
        patience = 0.0
        while not lock.is_locked:
            try:
                lock.acquire(timeout=patience, poll_interval=POLL_S)
            except Timeout:
                _log.info("waiting for another process to build %s", entry.name)
                patience = PATIENCE_S
        try:
            yield
        finally:
            lock.release()

    @contextlib.contextmanager
    def _try_lock(self, tag: str, timeout: float = 0.0) -> Iterator[bool]:
        """Hold the lock `tag` if it is free or becomes so in `timeout` seconds; yields whether we hold it."""
        from filelock import FileLock, Timeout

        assert self.root is not None
        lock = FileLock(self.root / ".locks" / f"{tag}.lock", mode=0o600)
        try:
            lock.acquire(timeout=timeout, poll_interval=POLL_S)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def _tag(self, entry: Path) -> str:
        return "~".join((entry.parent.parent.name, entry.parent.name, entry.name))

    def _temp(self, entry: Path) -> Path:
        assert self.root is not None
        return self.root / ".tmp" / f"{self._tag(entry)}~{secrets.token_hex(4)}"

    def _discard(self, entry: Path) -> None:
        """Take an entry away in one step, then delete it. Lock held."""
        doomed = self._temp(entry)
        os.rename(entry, doomed)
        _delete(doomed)

    def _discard_leftovers(self, entry: Path) -> None:
        assert self.root is not None
        for folder in (self.root / ".tmp").glob(f"{self._tag(entry)}~*"):
            _delete(folder)

    def _sweep(self) -> None:
        """Delete what killed processes left in `.tmp`: the folders whose entry nobody has locked."""
        assert self.root is not None
        for folder in (self.root / ".tmp").glob("v*~*~*~*"):
            with self._try_lock(folder.name.rpartition("~")[0]) as free:
                if free:
                    _delete(folder)

    # -- size -------------------------------------------------------------------------------------

    def _make_room(self, keep: Path) -> None:
        """After a publish: drop what dead processes left, and the least recently used beyond max_bytes."""
        with contextlib.suppress(OSError):  # housekeeping never fails a compile
            self._sweep()
            if sum(entry.size for entry in self.entries()) > self.max_bytes:
                self._evict(self.max_bytes, keep, grace=GRACE_S)

    def _evict(self, max_bytes: int, keep: Path | None, grace: float) -> list[Entry]:
        gone: list[Entry] = []
        with self._try_lock("evict", timeout=5.0) as free:  # two at once would each free the whole excess
            entries = self.entries() if free else []
            excess = sum(entry.size for entry in entries) - max_bytes
            for entry in reversed(entries):
                if excess <= 0:
                    break
                recent = abs(time.time() - entry.last_used) < grace
                if entry.path != keep and not recent and self._remove(entry):
                    gone.append(entry)
                    excess -= entry.size
        return gone

    def _remove(self, entry: Entry) -> bool:
        """Delete an entry unless a process has it locked."""
        with self._try_lock(self._tag(entry.path)) as free, contextlib.suppress(FileNotFoundError):
            if free:
                self._discard(entry.path)
            return free
        return True  # another process was faster

    # -- the command line -------------------------------------------------------------------------

    def entries(self) -> list[Entry]:
        """All entries, of every format version, the most recently used first. Reads no kernel."""
        found: list[Entry] = []
        for version in _subfolders(self.root) if self.root is not None else ():
            if re.fullmatch(r"v\d+", version.name):
                for target in _subfolders(version):
                    found += filter(None, map(_describe, _subfolders(target)))
        return sorted(found, key=lambda e: -e.last_used)

    def show(self, name: str) -> tuple[Entry, dict[str, Any]]:
        """The entry whose folder name or key starts with `name`, and its manifest ({} if unreadable).

        Raises InvalidInput if there is none, or more than one.
        """
        matches = [e for e in self.entries() if e.name.startswith(name) or e.key.startswith(name)]
        if len(matches) != 1:
            which = ", ".join(e.name for e in matches[:5]) or f"nothing in {self.root} has that name"
            raise InvalidInput(f"cache entry {name!r}: {which}; `splatc cache list` shows the names")
        try:
            manifest = json.loads((matches[0].path / MANIFEST).read_bytes())
        except (OSError, ValueError, RecursionError):
            manifest = {}
        return matches[0], manifest if isinstance(manifest, dict) else {}

    def clear(self) -> list[Entry]:
        """Delete every entry that no process has locked, and what killed ones left. Returns the entries."""
        return self.prune(older_than=-math.inf)

    def prune(self, *, max_bytes: int | None = None, older_than: float | None = None) -> list[Entry]:
        """Delete entries unused for `older_than` seconds, then the least recently used beyond `max_bytes`.

        Entries that a process has locked stay. Returns the entries deleted.
        """
        if self.root is None or not self.root.is_dir():
            return []
        check_folder(self.root)
        make_folder(self.root / ".locks")
        self._sweep()
        now = time.time()
        gone: list[Entry] = []
        if older_than is not None:
            gone += [e for e in self.entries() if e.last_used <= now - older_than and self._remove(e)]
        if max_bytes is not None:
            gone += self._evict(max_bytes, None, grace=0.0)
        return gone


def key_of(key_fields: Mapping[str, Any]) -> str:
    """The sha256 of the fields as canonical JSON. Raises TypeError or ValueError for what is not JSON."""
    return hashlib.sha256(_canonical(key_fields).encode()).hexdigest()


@cache
def source_fingerprint() -> str:
    """A digest of the code generator's own source: a changed emitter must not find its old kernels."""
    folder = Path(__file__).resolve().parent.parent / "codegen"
    digest = hashlib.sha256()
    sources = sorted(folder.rglob("*.py"))
    if not sources:
        raise CacheError(f"no source in {folder} to tell cached kernels apart by: set SPLATC_DISABLE_CACHE=1")
    for source in sources:
        digest.update(f"{source.relative_to(folder).as_posix()}\0{_sha256(source)}\n".encode())
    return digest.hexdigest()


# -- no disk -------------------------------------------------------------------------------------

_private: dict[str, Path] = {}
_private_root: tuple[int, Path] | None = None  # (pid, folder): a forked child makes its own
_private_lock = threading.RLock()
_warned = False


def _private_folder(key: str, build: Build, why: str | None = None) -> Path:
    """Build into a folder that lives as long as this process; `why` is logged once per process."""
    global _private_root, _warned
    with _private_lock:
        if why is not None and not _warned:
            _warned = True
            _log.warning("no kernel cache, so every process compiles its own (%s): set SPLATC_CACHE_DIR", why)
        if _private_root is None or _private_root[0] != os.getpid():
            _private.clear()
            _private_root = os.getpid(), Path(tempfile.mkdtemp(prefix="splatc-"))
            atexit.register(_remove_private, *_private_root)
        if key not in _private:
            folder = _private_root[1] / f"{key[:16]}-{secrets.token_hex(4)}"
            make_folder(folder)
            build(folder)
            _private[key] = folder
        return _private[key]


def _remove_private(pid: int, folder: Path) -> None:
    if pid == os.getpid():  # not in a forked child
        _delete(folder)


def _judged(build: Build, failures: list[Exception]) -> Build:
    """`build`, but a failure that the disk explains becomes an OSError; any other is noted in `failures`."""

    def judged(folder: Path) -> None:
        try:
            build(folder)
        except Exception as error:
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EROFS, errno.EDQUOT)
            if full or not folder.is_dir() or shutil.disk_usage(folder).free < 1 << 20:
                # also a compiler in a subprocess, which reports a full disk in words of its own
                raise OSError(errno.ENOSPC, f"the disk is full, read-only or was cleared: {error}") from error
            failures.append(error)
            raise

    return judged


# -- files ---------------------------------------------------------------------------------------


def _canonical(fields: Mapping[str, Any]) -> str:
    return json.dumps(dict(fields), sort_keys=True, separators=(",", ":"), allow_nan=False)


def _slug(text: str, limit: int) -> str:
    """`text` as a part of a file name: letters, digits and ._+- only."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", text).strip("-.")[:limit] or "kernel"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _files(folder: Path) -> Iterator[str]:
    """The files that a build wrote, relative to `folder`; its sub-folders are closed to others on the way."""
    for parent, folders, names in os.walk(folder):
        for name in folders:
            os.chmod(os.path.join(parent, name), 0o700)
        yield from ((Path(parent) / name).relative_to(folder).as_posix() for name in names)


def _seal(path: Path) -> dict[str, int | str]:
    """Close a file to others, make it durable, and return what the manifest says of it."""
    if path.is_symlink() or not path.is_file():
        raise CacheError(f"kernel cache: the build left {path.name}, which is not a regular file")
    os.chmod(path, 0o600)
    _sync(path)
    return {"size": path.stat().st_size, "sha256": _sha256(path)}


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # no handle on a folder there
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _delete(path: Path) -> None:
    """Delete a file, or a folder and what is in it; what cannot be deleted is left for a later sweep."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _subfolders(folder: Path) -> list[Path]:
    """The folders directly in `folder`, symbolic links apart; none if it cannot be read."""
    try:
        with os.scandir(folder) as items:
            return [Path(item.path) for item in items if item.is_dir(follow_symlinks=False)]
    except OSError:
        return []


def _describe(folder: Path) -> Entry | None:
    """The entry in `folder`; None if it is none, or is deleted while we look."""
    match = _ENTRY_NAME.fullmatch(folder.name)
    try:
        created = folder.stat().st_mtime
        size = sum(path.lstat().st_size for path in folder.rglob("*"))
        last_used = (folder / MANIFEST).stat().st_mtime if (folder / MANIFEST).exists() else created
    except OSError:
        return None
    if match is None:
        return None
    version, target = folder.parent.parent.name, folder.parent.name
    return Entry(folder, version, target, match["label"], match["key"], size, created, last_used)


def _splatc_version() -> str:
    from importlib import metadata

    try:
        return metadata.version("splatc")
    except metadata.PackageNotFoundError:
        return "unknown"
