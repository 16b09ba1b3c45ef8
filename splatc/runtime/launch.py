"""Calling a kernel on GPUs: checks and preparations once for each kind of tensors, then as little as possible."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from numpy.typing import NDArray

from splatc.codegen.hopper.shape import MAX_VIEWS
from splatc.ir.terms import Terms
from splatc.runtime.gpu import DeviceTables, FindGpu, Gpu, gpu, load_functions
from splatc.runtime.gpu_call import GpuCall, Request
from splatc.runtime.kernel import Kernel
from splatc.runtime.launch_hopper import hopper_steps, hopper_tables, hopper_work
from splatc.runtime.launch_portable import portable_steps, portable_tables
from splatc.runtime.plan import Launch
from splatc.runtime.tensor_map import ALIGNMENT, Layout
from splatc.runtime.tensors import Shape, check_call, check_gradients, check_scale, outputs, to_bhsd
from splatc.runtime.terms import check_terms
from splatc.runtime.work import Work

if TYPE_CHECKING:
    from splatc.runtime.likeness import Like

GROUP = 4  # keys that a pruned kernel reads together
REMEMBERED = 64  # kinds of calls, and tables on a device, that a launcher keeps

Ready = Callable[[Any, Any, Any, float | None, Terms | None], tuple[Any, Any]]
Launches = Callable[[Shape, tuple[int | None, int | None]], list[Launch]]
_log = logging.getLogger("splatc")


class Launcher:
    """Attention on GPUs by one compiled kernel, for tensors in one layout ("bhsd" or "bshd").

    check(shape) raises InvalidInput for tensors that the kernel is not for; launches(shape, (row views, column views))
    plans them, with at most so many views each. cap: the softcap of scores, 0 for none.
    """

    def __init__(self, kernel: Kernel, layout: str, check: Callable[[Shape], None], launches: Launches,
                 cap: float = 0.0, find_gpu: FindGpu = gpu) -> None:  # fmt: skip
        self._kernel, self._layout, self._check, self._launches = kernel, layout, check, launches
        self._cap, self._find_gpu = cap, find_gpu
        self._hopper = kernel.spec.kernel == "hopper"
        self._pruned = self._hopper and kernel.spec.score.pruning is not None
        self._ready: dict[tuple[Any, ...], _Known] = {}
        self._latest: _Known | None = None  # of these
        self._merging: dict[tuple[Any, ...], GpuCall | None] = {}
        self._planned: dict[tuple[int, ...], tuple[Launch, ...]] = {}  # by lengths and heads
        self._laid_out: dict[tuple[int, ...], _LaidOut] = {}  # these, batch and GPU
        self._tables: dict[tuple[int, ...], DeviceTables] = {}  # the same
        self._last: tuple[Shape, Gpu] | None = None  # that a call was prepared for

    def __call__(self, q: Any, k: Any, v: Any, scale: float | None, enable_gqa: bool,
                 terms: Terms | None = None) -> tuple[Any, Any]:  # fmt: skip
        """(o, lse) as CompiledAttention returns them. Raises what ``check_call`` and the checks of the kernel raise."""
        known = self._latest
        if known is None or known.enable_gqa is not enable_gqa or not known.like(q, k, v):
            known = self._latest = self._find(q, k, v, enable_gqa)
        return known.ready(q, k, v, scale, terms)

    def merge(self, o: Any, lse: Any, q: Any, k: Any, v: Any, scale: float | None, enable_gqa: bool) -> bool:
        """Put attention together, by its LSE, with what o and lse hold of the same queries: as __call__ returns them,
        or some rows of such. False, and nothing is done, for what no kernel does so: that people do in two steps."""
        key = call_key(q, k, v, enable_gqa), o.stride(), lse.stride()
        if key not in self._merging:
            remember(self._merging, key, self._prepare_merge(o, lse, q, k, v, enable_gqa))
        call, number = self._merging[key], check_scale(scale, q.shape[-1])
        q_at, k_at, v_at, o_at = (x.data_ptr() for x in (q, k, v, o))
        if call is None or number <= 0 or (q_at | k_at | v_at | o_at) % ALIGNMENT:
            return False
        call.into(q_at, k_at, v_at, o_at, lse.data_ptr(), number)
        return True

    def _prepare_merge(self, o: Any, lse: Any, q: Any, k: Any, v: Any, enable_gqa: bool) -> GpuCall | None:
        shape, score = check_call(q, k, v, self._layout, enable_gqa), self._kernel.spec.score
        self._check(shape)
        batch_step, head_step, step = lse.stride()
        tensors = [to_bhsd(x, self._layout) for x in (q, k, v, o)]
        *layouts, of_o = (layout_of(x) for x in tensors)
        if (not self._hopper or self._pruned or score.positional or score.sinks or not shape.q_len or not shape.kv_len
                or step != 1 or batch_step != head_step * shape.heads
                or any(x.stride(-1) != 1 for x in tensors) or not all(one.mappable() for one in (*layouts, of_o))):
            return None  # fmt: skip
        return self.prepared(shape, layouts, q.device.index, (of_o, head_step))

    def expect(self, q_len: int, kv_len: int) -> None:
        """Calls of these lengths will come: lay their tables out now, for the batch, heads and GPU of the last call,
        and bring them there."""
        if self._last is not None and q_len and kv_len:
            shape, on = self._last
            shape = replace(shape, q_len=q_len, kv_len=kv_len)
            self._lay_out(on, shape)
            if not on.framework.capturing():
                self._uploaded(on, shape)

    def _find(self, q: Any, k: Any, v: Any, enable_gqa: bool) -> _Known:
        try:
            return self._ready[call_key(q, k, v, enable_gqa)]
        except (KeyError, AttributeError, TypeError, RuntimeError):  # not seen yet, or no tensors that have strides
            ready = self._prepare(q, k, v, enable_gqa)
            from splatc.runtime.likeness import likeness  # needed by calls on a GPU only

            known = _Known(likeness(q, k, v), enable_gqa, ready)
            remember(self._ready, call_key(q, k, v, enable_gqa), known)
            return known

    def _prepare(self, q: Any, k: Any, v: Any, enable_gqa: bool) -> Ready:
        shape = check_call(q, k, v, self._layout, enable_gqa)
        self._check(shape)
        check_gradients(q, k, v)

        def again(q: Any, k: Any, v: Any, scale: float | None, terms: Terms | None) -> tuple[Any, Any]:
            return self(q, k, v, scale, enable_gqa, terms)

        tensors = [to_bhsd(x, self._layout) for x in (q, k, v)]
        layouts = [layout_of(x) for x in tensors]
        padded = self._pruned and shape.kv_len % GROUP > 0
        if padded:
            layouts[1] = padded_layout(layouts[1])
        elif self._hopper and layouts[1].head_stride == layouts[2].head_stride == 0:
            layouts[1:] = [one.one_head() for one in layouts[1:]]
        copied = [self._must_copy(x, one) for x, one in zip(tensors, layouts, strict=True)]
        ready: Ready
        if not (shape.q_len and shape.kv_len):
            ready = _Empty(shape, self._layout)
        elif any(copied):
            ready = _Copied(copied, again)
        else:
            call = self.prepared(shape, layouts, q.device.index)
            grad = any(x.requires_grad for x in (q, k, v))
            ready = _Launched(call, shape, grad, self._hopper, again)
            ready = _Padded(ready, self._layout) if padded else ready
        return ready

    def _must_copy(self, x: Any, one: Layout) -> bool:
        if x.stride(-1) != 1 and x.shape[-1] != 1:
            _say_copied("numbers of a head_dim are not neighbours in memory (its last stride is not 1)")
            return True
        if not self._hopper or one.mappable():
            return False
        _say_copied(f"its strides {tuple(x.stride())} do not suit the tensor memory accelerator")
        return True

    def prepared(self, shape: Shape, layouts: list[Layout], ordinal: int,
                 into: tuple[Layout, int] | None = None) -> GpuCall:  # fmt: skip
        """A call for q, k and v of these sizes and strides, seen as bhsd, on a GPU. into: of an o that it is merged
        into, and how far the heads of its lse lie apart."""
        on = self._find_gpu(ordinal)
        spec = self._kernel.spec
        with on.framework.on(on.ordinal) if on.framework.device() != on.ordinal else nullcontext():
            self._last = shape, on
            laid_out, tables = self._lay_out(on, shape), self._uploaded(on, shape)
            functions = load_functions(self._kernel.folder, spec.target.arch, on)
            named = dict(zip("qkv", layouts, strict=True))
            named["o"], lse_rows = into or (output_layout(shape, self._layout, layouts[0].itemsize), 0)
            request = Request(on, spec, shape, functions, laid_out.launches, laid_out.works, tables, named,
                              self._cap, lse_rows)  # fmt: skip
            return GpuCall(request, hopper_steps(request) if self._hopper else portable_steps(request), self._layout)

    def _uploaded(self, on: Gpu, shape: Shape) -> DeviceTables:
        """The tables of calls with these sizes on the GPU."""
        key = self._key(on, shape)
        if key not in self._tables:
            remember(self._tables, key, DeviceTables(on, self._lay_out(on, shape).arrays))
        return self._tables[key]

    def _lay_out(self, on: Gpu, shape: Shape) -> _LaidOut:
        """What calls with these sizes read and hand out."""
        key = self._key(on, shape)
        if key not in self._laid_out:
            lengths = key[:3]
            if lengths not in self._planned:
                planned = tuple(self._launches(shape, MAX_VIEWS if self._hopper else (None, None)))
                remember(self._planned, lengths, planned)
            launches, spec = self._planned[lengths], self._kernel.spec
            works: tuple[Work, ...] = ()
            arrays: list[Mapping[str, NDArray[Any]]]
            if self._hopper:
                works = tuple(hopper_work(one, spec, shape.batch, on) for one in launches)
                arrays = [hopper_tables(one, work, spec) for one, work in zip(launches, works, strict=True)]
            else:
                arrays = [portable_tables(one) for one in launches]
            remember(self._laid_out, key, _LaidOut(launches, works, arrays))
        return self._laid_out[key]

    def _key(self, on: Gpu, shape: Shape) -> tuple[int, ...]:
        return shape.q_len, shape.kv_len, shape.heads, shape.batch if self._hopper else 0, on.ordinal


class _Known(NamedTuple):
    """A prepared call, and what it is for: tensors that are ``like`` some others, with enable_gqa or without."""

    like: Like
    enable_gqa: bool
    ready: Ready


@dataclass(frozen=True)
class _LaidOut:
    """The launches of calls of certain sizes, what they hand out (hopper), and of each the arrays for the GPU."""

    launches: tuple[Launch, ...]
    works: tuple[Work, ...]
    arrays: list[Mapping[str, NDArray[Any]]]


def call_key(q: Any, k: Any, v: Any, enable_gqa: bool) -> tuple[Any, ...]:
    """All of three torch tensors that checks and preparations depend on."""
    return (
        q.shape, q.stride(), q.dtype, q.device, k.shape, k.stride(), k.dtype, k.device, v.shape, v.stride(), v.dtype,
        v.device, q.requires_grad or k.requires_grad or v.requires_grad, enable_gqa,
    )  # fmt: skip


def remember(memory: dict[Any, Any], key: Any, value: Any) -> None:
    """Keep at most REMEMBERED values, forgetting the oldest."""
    memory[key] = value
    while len(memory) > REMEMBERED:
        memory.pop(next(iter(memory)))


def layout_of(x: Any) -> Layout:
    """The sizes and strides of a (batch, heads, seq, dim) torch tensor."""
    (batch, heads, length, dim), strides = x.shape, x.stride()
    return Layout(batch, heads, length, dim, strides[0], strides[1], strides[2], x.element_size())


def output_layout(shape: Shape, layout: str, itemsize: int) -> Layout:
    """Of o, seen as bhsd: contiguous in its own layout."""
    dim = shape.v_head_dim
    seq = dim if layout == "bhsd" else dim * shape.heads
    head = dim * shape.q_len if layout == "bhsd" else dim
    batch = dim * shape.heads * shape.q_len
    return Layout(shape.batch, shape.heads, shape.q_len, dim, batch, head, seq, itemsize)


class _Launched:
    """A prepared call and what must be asked of each scale, address and gradient."""

    def __init__(self, call: GpuCall, shape: Shape, grad: bool, strict: bool, again: Ready) -> None:
        """strict: the kernel needs aligned tensors and a positive scale; ``again`` takes tensors made so."""
        self._call, self._shape, self._grad, self._strict, self._again = call, shape, grad, strict, again
        self._default = 1 / math.sqrt(shape.head_dim)

    def __call__(self, q: Any, k: Any, v: Any, scale: float | None, terms: Terms | None = None) -> tuple[Any, Any]:
        number = self._default if scale is None else check_scale(scale, self._shape.head_dim)
        if terms is not None:
            check_terms(terms, self._shape)
        if self._grad:
            check_gradients(q, k, v)
        q_at, k_at, v_at = q.data_ptr(), k.data_ptr(), v.data_ptr()
        if self._strict:
            if number <= 0:  # exact: what is scaled is q
                return self._again(q.neg() if number else q.mul(0), k, v, -number or 1.0, terms)
            if (q_at | k_at | v_at) % ALIGNMENT:
                _say_copied(f"its address is not a multiple of {ALIGNMENT} bytes")
                q, k, v = (x if x.data_ptr() % ALIGNMENT == 0 else contiguous_copy(x) for x in (q, k, v))
                return self._again(q, k, v, number, terms)
        return self._call(q_at, k_at, v_at, number, terms)


class _Copied:
    """Tensors that no kernel reads as they are."""

    def __init__(self, copied: list[bool], again: Ready) -> None:
        self._copied, self._again = copied, again

    def __call__(self, q: Any, k: Any, v: Any, scale: float | None, terms: Terms | None = None) -> tuple[Any, Any]:
        check_gradients(q, k, v)
        q, k, v = (contiguous_copy(x) if bad else x for x, bad in zip((q, k, v), self._copied, strict=True))
        return self._again(q, k, v, scale, terms)


class _Padded:
    """Keys whose length is no multiple of GROUP: the last group is read whole."""

    def __init__(self, launched: Ready, layout: str) -> None:
        self._launched, self._layout = launched, layout

    def __call__(self, q: Any, k: Any, v: Any, scale: float | None, terms: Terms | None = None) -> tuple[Any, Any]:
        return self._launched(q, to_bhsd(padded_keys(to_bhsd(k, self._layout)), self._layout), v, scale, terms)


class _Empty:
    """No queries or no keys: nothing attends to anything."""

    def __init__(self, shape: Shape, layout: str) -> None:
        self._shape, self._layout = shape, layout

    def __call__(self, q: Any, k: Any, v: Any, scale: float | None, terms: Terms | None = None) -> tuple[Any, Any]:
        check_scale(scale, self._shape.head_dim)
        check_gradients(q, k, v)
        o, lse = outputs(q, self._shape, self._layout)
        lse.fill_(-math.inf)
        if terms is not None and terms.sinks is not None:
            lse.copy_(terms.sinks[:, None].expand(lse.shape))
        return to_bhsd(o.zero_(), self._layout), lse


def padded_keys(k: Any) -> Any:
    """The same keys (batch, heads, seq, dim), in memory that has whole groups: of ``padded_layout``."""
    batch, heads, length, dim = k.shape
    padded = k.new_zeros(batch, heads, length + -length % GROUP, dim)
    padded[:, :, :length] = k
    return padded[:, :, :length]


def padded_layout(one: Layout) -> Layout:
    """Of ``padded_keys``."""
    rows = one.length + -one.length % GROUP
    head = rows * one.dim
    return replace(one, length=rows, batch_stride=one.heads * head, head_stride=head, seq_stride=one.dim)


def contiguous_copy(x: Any) -> Any:
    """x in memory of its own, contiguous even if it was so already."""
    import torch

    return x.clone(memory_format=torch.contiguous_format)


@cache
def _say_copied(why: str) -> None:
    """Once for each reason: a copy costs time and memory that people may want to save."""
    _log.warning("splatc copies an input at every call: %s", why)
