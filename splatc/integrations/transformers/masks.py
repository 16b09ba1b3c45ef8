"""What transformers says of a mask (a mask function, lengths, offsets, padding), read as patterns for batch entries.

Nothing of size q_len x kv_len is made where the mask function is known. Padding at the ends of a sequence is cut off:
entries with other padding are other ``Part``s, which packing.py joins where it can.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache, reduce
from operator import and_
from typing import Any

import numpy as np
import torch

from splatc.errors import InvalidInput, Unsupported
from splatc.integrations.transformers.tail import tail
from splatc.patterns import Pattern, as_pattern, blocked, causal, documents, from_mask_mod, full, window
from splatc.patterns.library import Full

MaskFunction = Callable[..., Any]
_FAR = 2**40  # further than any key
_PACKED = "packed_sequence_mask_function"


@dataclass(frozen=True)
class Part:
    """Batch entries whose queries [q_from, q_to) attend to their keys [k_from, k_to) by ``pattern``."""

    entries: tuple[int, ...]
    pattern: Pattern
    q_from: int
    q_to: int
    k_from: int
    k_to: int


@dataclass(frozen=True)
class Mask:
    """What our mask function gives to the layers in place of a tensor.

    before: keys before the first query. dropped: whether keys before those have been dropped (by a cache of a window).
    spans: [from, to) of each entry's keys that are no padding. parts: what to run. function: transformers' own, that
    says the same. model: its type, for messages.

    A model that works on its mask as a tensor gets Unsupported.
    """

    q_len: int
    kv_len: int
    before: int
    dropped: bool
    spans: tuple[tuple[int, int], ...] | None
    parts: tuple[Part, ...]
    function: MaskFunction | None = None
    model: str = ""

    @property
    def ndim(self) -> int:
        """What transformers asks of a mask that it made before the model's forward pass, and would pad."""
        raise Unsupported("attn_implementation='splatc' cannot generate with a static cache, whose masks "
                          "transformers makes ahead: use the default (dynamic) cache")  # fmt: skip

    def with_pattern(self, pattern: Pattern, cross: bool = False) -> tuple[Part, ...]:
        """The parts with a pattern of the user's in place of the model's; padding and documents stay. cross: queries
        are another sequence than the keys."""
        if self.spans is None:
            raise Unsupported("set_patterns: the padding mask has holes, so that patterns cannot count positions: "
                              "move padding to the ends")  # fmt: skip
        if cross:
            return self._across(pattern, self.spans)
        if self.dropped:
            raise Unsupported("set_patterns: the cache of this layer has dropped keys, so that patterns cannot count "
                              "from the first: give the model a cache that keeps them, cache=DynamicCache() (without "
                              "the config)")  # fmt: skip
        last = self.before + self.q_len  # keys from here on are a static cache's, if the model does not attend to them
        if last > self.kv_len or any(isinstance(part.pattern, Full) and part.k_to > last for part in self.parts):
            raise Unsupported(f"set_patterns: the {self.q_len} queries of this layer do not stand among its "
                              f"{self.kv_len} keys, so that patterns cannot count positions: take its pattern away "
                              "(None)")  # fmt: skip
        patterns = [pattern if together is None else pattern & together for together in self._packed]
        return parts_of(patterns, self.spans, self.q_len, self.before)

    @cached_property
    def _packed(self) -> tuple[Pattern | None, ...]:
        """Of each entry, the documents in its row, if there are several; the same for all layers."""
        return tuple(_packed(self.function, i) for i in range(len(self.spans or ())))

    def _across(self, pattern: Pattern, spans: tuple[tuple[int, int], ...]) -> tuple[Part, ...]:
        if self.q_len == 1:
            raise Unsupported("set_patterns: a decode step of cross-attention does not tell its query's position: take "
                              "the pattern away (None) to generate")  # fmt: skip
        entries: dict[tuple[int, int], list[int]] = {}
        for i, (start, end) in enumerate(spans):
            if end > start:
                entries.setdefault((start, end), []).append(i)
        return tuple(Part(tuple(group), pattern, 0, self.q_len, *span) for span, group in entries.items())

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise _NoTensor(_refusal(self, f"takes .{name} of"))

    def __getitem__(self, index: Any) -> Any:
        raise Unsupported(_refusal(self, "indexes"))

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuses all of torch's functions and operators with a mask among their arguments."""
        given = [*args, *(kwargs or {}).values()]
        mask = next((x for x in given if isinstance(x, Mask)), None)
        raise Unsupported(_refusal(mask, f"calls {getattr(function, '__name__', function)} with"))

    def _operator(self, *others: Any) -> Any:
        raise Unsupported(_refusal(self, "calculates with"))

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __neg__ = __invert__ = _operator
    __and__ = __rand__ = __or__ = __ror__ = __lt__ = __le__ = __gt__ = __ge__ = _operator


class _NoTensor(Unsupported, AttributeError):
    """Unsupported, and for hasattr what an attribute is that does not exist."""


def _refusal(mask: Mask | None, does: str) -> str:
    model = None if mask is None else mask.__dict__.get("model")
    return (f"the model{f' ({model})' if model else ''} {does} its attention mask as if that were a tensor, and "
            "attn_implementation='splatc' makes none: give this model attn_implementation='sdpa', or 'eager' if it has "
            "no 'sdpa'")  # fmt: skip


def splatc_mask(batch_size: int, q_length: int, kv_length: int, q_offset: Any, kv_offset: int,
                mask_function: MaskFunction, attention_mask: torch.Tensor | None = None,
                **kwargs: Any) -> Mask:  # fmt: skip
    """The mask function that ``register`` gives to transformers; arguments as of its AttentionMaskInterface.

    attention_mask: bool (batch, up to the last query at least), False for padding; keys after its end are padding. A
    mask function that we do not know is evaluated element by element, with a warning.
    """
    before = int(q_offset) - kv_offset
    real = None if attention_mask is None else _real_keys(
        attention_mask, batch_size, int(q_offset) + q_length, kv_offset, kv_length)  # fmt: skip
    spans = ((0, kv_length),) * batch_size if real is None else _spans(real)
    patterns = None if spans is None else [
        _read(mask_function, i, kv_offset + start, min(end, before + q_length) - start)
        for i, (start, end) in enumerate(spans)
    ]
    known = patterns is not None and all(p is not None for p in patterns)
    if known and _in_place(patterns, q_length, kv_length, before):
        parts = parts_of(patterns, spans, q_length, before)  # type: ignore[arg-type]
    else:
        parts = _by_element(mask_function, real, batch_size, q_length, kv_length, int(q_offset), kv_offset)
    model = getattr(kwargs.get("config"), "model_type", "")
    return Mask(q_length, kv_length, before, kv_offset > 0, spans, parts, mask_function, model)


def parts_of(patterns: list[Pattern], spans: tuple[tuple[int, int], ...], q_len: int, before: int) -> tuple[Part, ...]:
    """Parts of entries with these patterns, each on the positions of its span."""
    entries: dict[tuple[Any, ...], list[int]] = {}
    for i, (pattern, (start, end)) in enumerate(zip(patterns, spans, strict=True)):
        q_from, q_to = 0, q_len
        if not isinstance(pattern, Full):  # queries have positions among the keys; later ones are a static cache's
            end = min(end, before + q_len)
            q_from, q_to = max(0, start - before), end - before
        if q_to > q_from and end > start:
            square = q_to - q_from == end - start or isinstance(pattern, Full)
            key = (pattern if square else tail(pattern)), q_from, q_to, start, end
            entries.setdefault(key, []).append(i)
    return tuple(Part(tuple(group), *key) for key, group in entries.items())


def _in_place(patterns: list[Pattern | None] | None, q_len: int, kv_len: int, before: int) -> bool:
    """Whether queries stand among the keys, as patterns that count positions need it."""
    return 0 <= before <= kv_len - q_len or all(isinstance(p, Full) for p in patterns or ())


def _real_keys(attention_mask: torch.Tensor, batch: int, last: int, kv_offset: int,
               kv_len: int) -> np.ndarray[Any, np.dtype[np.bool_]]:  # fmt: skip
    """bool (batch, kv_len). last: where the queries end; a static cache has keys beyond, which are none yet."""
    if attention_mask.ndim != 2:
        raise Unsupported(f"the padding mask has shape {tuple(attention_mask.shape)}: splatc takes (batch, positions)")
    needed = min(last, kv_offset + kv_len)
    if attention_mask.shape[0] != batch or attention_mask.shape[1] < needed:
        raise InvalidInput(f"the padding mask has shape {tuple(attention_mask.shape)}: here it must be ({batch}, "
                           f"{needed}), all positions of each row of the batch, those in the cache too")  # fmt: skip
    given = attention_mask[:, kv_offset : kv_offset + kv_len].to(torch.bool).cpu().numpy()
    return np.pad(given, ((0, 0), (0, kv_len - given.shape[1])))


def _spans(real: np.ndarray[Any, np.dtype[np.bool_]]) -> tuple[tuple[int, int], ...] | None:
    """[from, to) of True in each row, None if one has a hole."""
    counts, starts = real.sum(1), real.argmax(1)
    ends = np.where(counts > 0, real.shape[1] - real[:, ::-1].argmax(1), starts)
    if (ends - starts != counts).any():
        return None
    return tuple(zip(starts.tolist(), ends.tolist(), strict=True))


def _read(function: MaskFunction, entry: int, first: int, length: int, places: Any = None) -> Pattern | None:
    """The pattern of a mask function for a batch entry, on ``length`` positions from ``first`` on; None if we do not
    know it. places (length,): of packed documents, the position of each token in its own."""
    name, values = _opened(function)
    match name:
        case "causal_mask_function":
            return causal()
        case "bidirectional_mask_function":
            return full()
        case "sliding_window_overlay":
            return window(values["sliding_window"] - 1, _FAR)
        case "sliding_window_bidirectional_overlay":
            return window(values["sliding_window"], values["sliding_window"])
        case "chunked_overlay":
            padding = int(values["left_padding"][entry])
            if places is not None:
                return _chunks_of_documents(values["chunk_size"], places - padding)
            return _chunks(values["chunk_size"], first - padding, length)
        case _ if name == _PACKED:
            return _packed(function, entry)
        case "remap_positions_for_packed_sequence":  # transformers joins it with documents, in which positions run on
            return _read(values["mask_function"], entry, first, length, values["position_ids"][entry].cpu().numpy())
        case "and_masks.<locals>.and_mask":
            each = [_read(f, entry, first, length, places) for f in values["mask_functions"]]
            known = [pattern for pattern in each if pattern is not None]
            return all_of(known) if len(known) == len(each) else None
    return None


def _opened(function: MaskFunction | None) -> tuple[str, dict[str, Any]]:
    """The name and the closure of a mask function of transformers; of others, an empty name."""
    if function is None or getattr(function, "__module__", None) != "transformers.masking_utils":
        return "", {}
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    values = dict(zip(function.__code__.co_freevars, cells, strict=True))
    return function.__qualname__.removesuffix(".<locals>.inner_mask"), values


def _packed(function: MaskFunction | None, entry: int) -> Pattern | None:
    """The documents that a mask function keeps apart in the row of a batch entry, whatever else it says."""
    name, values = _opened(function)
    if name == _PACKED:
        return documents(ids=values["packed_sequence_mask"][entry].cpu().numpy())
    if name == "and_masks.<locals>.and_mask":
        return next((p for f in values["mask_functions"] if (p := _packed(f, entry)) is not None), None)
    return None


def _chunks(size: int, first: int, length: int) -> Pattern:
    """Chunks of Llama 4 on ``length`` positions, the first of which is position ``first`` of the sequence."""
    begun = first % size  # of the first chunk, what lies before: a cache has dropped it
    if not begun or length < 1:
        return blocked(size)
    cuts = np.unique(np.clip(np.arange(0, begun + length + size, size) - begun, 0, length))
    return documents(np.diff(cuts))


def _chunks_of_documents(size: int, places: np.ndarray[Any, Any]) -> Pattern:
    """Chunks of Llama 4 that begin anew with each packed document."""
    cuts = (np.diff(places) != 1) | (np.diff(places // size) != 0)
    return documents(ids=np.concatenate([[0], np.cumsum(cuts)]))


def all_of(patterns: Iterable[Pattern]) -> Pattern:
    """What all of the patterns attend to."""
    narrow = [pattern for pattern in patterns if not isinstance(pattern, Full)]
    return reduce(and_, narrow) if narrow else full()


def _by_element(function: MaskFunction, real: Any, batch: int, q_len: int, kv_len: int, q_offset: int,
                kv_offset: int) -> tuple[Part, ...]:  # fmt: skip
    """Parts of a mask that is only known by asking for each of its elements."""
    _warn(getattr(function, "__qualname__", repr(function)), real is not None)
    entries: dict[Pattern, list[int]] = {}
    for i in range(batch):

        def mod(b: Any, h: Any, q: Any, k: Any, i: int = i) -> Any:
            return function(torch.tensor(i), h, q + q_offset, k + kv_offset)

        pattern = from_mask_mod(mod, q_len, kv_len)
        if real is not None:
            pattern = as_pattern(pattern.dense(q_len, kv_len) & real[i])
        entries.setdefault(pattern, []).append(i)
    return tuple(Part(tuple(group), pattern, 0, q_len, 0, kv_len) for pattern, group in entries.items())


@lru_cache
def _warn(name: str, padded: bool) -> None:
    warnings.warn(f"splatc: the mask {name}{' with its padding' if padded else ''} is not known as a formula: it is "
                  "evaluated element by element at each forward pass, q_len x kv_len for each batch entry",
                  stacklevel=4)  # fmt: skip
