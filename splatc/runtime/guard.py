"""Who may have written here? The kernel cache holds code that we load: nobody but its owner may write to it.

Inside the cache every folder and file must be ours, with no write permission for group or others, and no
symbolic link. Above the cache we only ask that no stranger can swap it for another: a folder open to all must
be sticky, as /tmp is. Where there are no Unix owners (Windows) nothing is checked.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from splatc.errors import CacheError

_ELSEWHERE = "or set SPLATC_CACHE_DIR to a folder of your own"


def check_folder(path: Path) -> bool:
    """Whether `path` exists; raises CacheError if it is not a folder that only we can write to."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return False
    _check(path, found)
    if not stat.S_ISDIR(found.st_mode):
        raise CacheError(f"kernel cache: {path} is not a folder: delete it, {_ELSEWHERE}")
    return True


def check_file(path: Path) -> os.stat_result:
    """The lstat of a file. Raises CacheError if others can write to it, OSError if it is no file."""
    found = os.lstat(path)
    _check(path, found)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return found


def check_ancestors(path: Path) -> None:
    """Raise CacheError if anybody could swap a folder above `path` (absolute, no links) for another."""
    if not hasattr(os, "getuid"):
        return
    for folder in path.parents:
        try:
            mode = os.lstat(folder).st_mode
        except OSError:
            continue  # absent: we create it, closed; or unreadable, and then using the cache fails by itself
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise CacheError(
                f"kernel cache: {folder}, above {path}, has mode {stat.S_IMODE(mode):04o}, so anybody could "
                f"put code of theirs in its place: run `chmod o-w {folder}` (or +t), {_ELSEWHERE}"
            )


def make_folder(path: Path) -> None:
    """Create `path` and the folders above it that are missing, each for us alone (0700)."""
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        return
    except FileNotFoundError:
        if path.parent == path:
            raise
        make_folder(path.parent)
        make_folder(path)


def _check(path: Path, found: os.stat_result) -> None:
    if stat.S_ISLNK(found.st_mode):
        raise CacheError(f"kernel cache: {path} is a symbolic link, never followed: delete it, {_ELSEWHERE}")
    if not hasattr(os, "getuid"):
        return
    uid = os.getuid()
    if found.st_uid != uid:
        raise CacheError(
            f"kernel cache: {path} belongs to uid {found.st_uid} and you are uid {uid}, so its code is not "
            f"loaded: run `chown -R {uid} {path}` if you trust what is in it, {_ELSEWHERE}"
        )
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise CacheError(
            f"kernel cache: {path} has mode {stat.S_IMODE(found.st_mode):04o}, so others can write code into "
            f"it: run `chmod -R go-w {path}` if you trust what is in it, {_ELSEWHERE}"
        )
