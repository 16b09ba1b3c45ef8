"""Names for objects that PyTorch's operators refer to: an operator takes tensors, numbers and text only."""

from __future__ import annotations

import hashlib
import itertools
from typing import Any
from weakref import WeakValueDictionary

from splatc.errors import InvalidInput

_counter = itertools.count()
_objects: WeakValueDictionary[str, Any] = WeakValueDictionary()


def new_handle(owner: Any, words: str, meaning: str) -> str:
    """A handle that finds ``owner`` as long as something else keeps it alive; it begins with ``words``.

    words: all that the shapes and types of an operator's results depend on: compilers keep results by an operator's
    arguments, beyond this process. meaning: all else that the results depend on: a program that was exported finds in
    another process what means the same, and nothing else.
    """
    digest = hashlib.sha256(f"{words} {meaning}".encode()).hexdigest()[:16]
    handle = f"{words}#{digest}.{next(_counter)}"
    _objects[handle] = owner
    return handle


def find(handle: str) -> Any:
    """What has this handle, or the same words and meaning; InvalidInput if there is nothing any more, or not here."""
    found = _objects.get(handle)
    if found is None:
        same = handle.rpartition(".")[0] + "."
        found = next((owner for other, owner in list(_objects.items()) if other.startswith(same)), None)
    if found is None:
        raise InvalidInput(
            f"no compiled mask has the handle {handle!r}: it is of another process, or its CompiledAttention was "
            "dropped; make one for the same mask and options before, and keep it as long as its operator may run"
        )
    return found
