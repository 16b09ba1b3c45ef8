"""Names for objects that PyTorch's operators refer to: an operator takes tensors, numbers and text only."""

from __future__ import annotations

import itertools
from typing import Any
from weakref import WeakValueDictionary

from splatc.errors import InvalidInput

_counter = itertools.count()
_objects: WeakValueDictionary[str, Any] = WeakValueDictionary()


def new_handle(owner: Any, words: str) -> str:
    """A handle that finds ``owner`` as long as something else keeps it alive; it begins with ``words``.

    words: all that the shapes and types of an operator's results depend on: compilers keep results by an operator's
    arguments, beyond this process.
    """
    handle = f"{words}#{next(_counter)}"
    _objects[handle] = owner
    return handle


def find(handle: str) -> Any:
    """What has this handle; InvalidInput if it is no more."""
    try:
        return _objects[handle]
    except KeyError:
        raise InvalidInput(
            f"no compiled mask has the handle {handle!r}: it is of another process, or its CompiledAttention was "
            "dropped; keep it as long as its operator may run"
        ) from None
