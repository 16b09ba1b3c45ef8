"""A pattern to attend by, compiled when tensors come: what modules and functions keep."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from splatc.compile import compile
from splatc.errors import InvalidInput
from splatc.ir.terms import NO_TERMS, Terms
from splatc.patterns import Pattern, parse
from splatc.runtime import torch_ops
from splatc.runtime.attention import CompiledAttention
from splatc.runtime.handles import new_handle
from splatc.runtime.tensors import LAYOUTS, check_call, check_softcap, for_autocast, number_of
from splatc.runtime.terms import NOTHING, Asked, TermOptions, asked_by, asked_of, terms_of

if TYPE_CHECKING:
    from typing_extensions import Unpack


@lru_cache(maxsize=256)
def any_length(
    pattern: Pattern, layout: str, softcap: float | None, allow_tf32: bool, seq_len: int | None
) -> AnyLength:
    """An AnyLength; the same one for the same arguments, so that the layers of a model share plans and tables."""
    return AnyLength(pattern, layout, softcap, allow_tf32, seq_len)


class AnyLength:
    """Attention over one pattern at any lengths, head dims, dtype and device: a kernel for each of the last three is
    compiled, or found in the cache, at the first call that needs it.

    To a compiler it is one operator whatever the tensors are, as nothing is compiled while it traces. Copies of it are
    itself; pickled, it is its pattern and options.
    """

    def __init__(
        self, pattern: Pattern, layout: str, softcap: float | None, allow_tf32: bool, seq_len: int | None
    ) -> None:
        """Options as of ``splatc.compile``. seq_len: the length that kernels are tuned for, default: that of the call
        that compiles one; a pattern with lengths of its own has those."""
        if layout not in LAYOUTS:
            raise InvalidInput(f"layout is {layout!r}: it must be one of {', '.join(LAYOUTS)}")
        check_softcap(softcap)
        self.pattern, self.layout, self.softcap, self.allow_tf32 = pattern, layout, softcap, allow_tf32
        self.seq_len = seq_len
        meaning = f"{pattern} {softcap} {allow_tf32} {seq_len}"
        self._handle = new_handle(self, f"attention at any length {layout}", meaning)
        self._compiled: dict[tuple[Any, ...], CompiledAttention] = {}

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None = None,
                 return_lse: bool = False, enable_gqa: bool = False,
                 **options: Unpack[TermOptions]) -> Any:  # fmt: skip
        """As ``CompiledAttention``, but under autocast in the dtype that autocast asks for, and with any options."""
        if torch.compiler.is_compiling():
            return by_operator(self._handle, self.layout, q, k, v, scale, return_lse, enable_gqa, options)
        if isinstance(q, torch.Tensor) and torch.is_autocast_enabled("cuda" if q.is_cuda else "cpu"):
            q, k, v = for_autocast(q, k, v)
        attend = self.compiled(q, k, v, enable_gqa, asked_by(options))
        return attend(q, k, v, scale=scale, return_lse=return_lse, enable_gqa=enable_gqa, **options)

    @property
    def handle(self) -> str:
        """What the operator calls it."""
        return self._handle

    def run(self, q: Any, k: Any, v: Any, scale: float | None, enable_gqa: bool,
            terms: Terms | None = None) -> tuple[Any, Any]:  # fmt: skip
        """(o, lse), without gradients: the operator's forward."""
        return self.compiled(q, k, v, enable_gqa, asked_of(terms)).run(q, k, v, scale, enable_gqa, terms)

    def backward(self, q: Any, k: Any, v: Any, o: Any, lse: Any, do: Any, dlse: Any, scale: float | None,
                 enable_gqa: bool, terms: Terms | None = None,
                 learning: Sequence[bool] | None = None) -> tuple[Any, Any, Any, list[Any]]:  # fmt: skip
        """The gradients that ``CompiledAttention.backward`` gives: the operator's backward."""
        attend = self.compiled(q, k, v, enable_gqa, asked_of(terms))
        return attend.backward(q, k, v, o, lse, do, dlse, scale, enable_gqa, terms, learning)

    def compiled(self, q: Any, k: Any, v: Any, enable_gqa: bool = False, asked: Asked = NOTHING) -> CompiledAttention:
        """The compiled mask for tensors like these and what is asked. Raises InvalidInput for what does not fit."""
        if not all(isinstance(x, torch.Tensor) and x.ndim == 4 for x in (q, k, v)):
            raise InvalidInput(f"q, k and v must be torch tensors of 4 dimensions, {self.layout}")
        key = q.dtype, q.shape[-1], v.shape[-1], q.device.type, asked
        if key not in self._compiled:
            s = check_call(q, k, v, self.layout, enable_gqa)
            lengths = (max(s.q_len, 1), max(s.kv_len, 1)) if self.seq_len is None else (self.seq_len, self.seq_len)
            q_len, kv_len = self.pattern.own_lengths() or lengths
            self._compiled[key] = compile(
                self.pattern, seq_len=q_len, kv_len=kv_len, head_dim=s.head_dim, v_head_dim=s.v_head_dim, dtype=s.dtype,
                softcap=self.softcap, target=s.device.partition(":")[0], layout=self.layout,
                allow_tf32=self.allow_tf32, **asked._asdict(),
            )  # fmt: skip
        return self._compiled[key]

    def __deepcopy__(self, memory: Any) -> AnyLength:
        """Itself: nothing that a copy of a module could change."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        options = self.layout, self.softcap, self.allow_tf32, self.seq_len
        return _restore, (_text(self.pattern), *options)


def by_operator(handle: str, layout: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None,
                return_lse: bool, enable_gqa: bool, options: Any) -> Any:  # fmt: skip
    """The call of an AnyLength as a compiler records it."""
    q, k, v = for_autocast(q, k, v)
    number = None if scale is None else number_of(scale)
    dtype = "float64" if q.dtype == torch.float64 else "float32"
    terms = terms_of(q, k, layout, dtype, **options) if options else NO_TERMS
    o, lse = torch_ops.attention(q, k, v, handle, number, enable_gqa, *terms.arguments)
    return (o, lse) if return_lse else o


def _text(pattern: Pattern) -> Pattern | str:
    """The text form of a pattern that reads back as it, which outlives changes of ours; else the pattern itself."""
    try:
        return text if parse(text := str(pattern)) == pattern else pattern
    except InvalidInput:  # it holds data
        return pattern


def _restore(pattern: Pattern | str, *options: Any) -> AnyLength:
    return any_length(parse(pattern) if isinstance(pattern, str) else pattern, *options)
