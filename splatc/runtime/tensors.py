"""The caller's tensors: torch or NumPy, checked once, with errors that say what to change."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from splatc.errors import InvalidInput, Unsupported

LAYOUTS = ("bhsd", "bshd")
DETACH = "call under torch.no_grad() or pass detached tensors"
NO_TANGENTS = (
    "attention has no derivatives in forward mode (jvp, dual tensors): use reverse mode, or splatc.nn.functional."
    "dense_attention"
)
NO_TRANSFORMS = ("splatc does not work inside torch.func (vmap, grad, jvp, ...): fold a mapped dimension into batch, "
                 "use torch.autograd for gradients")  # fmt: skip
MAX_SCALE = 1e38  # times log2(e), still finite in float32


@dataclass(frozen=True)
class Shape:
    """The sizes of one call."""

    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    v_head_dim: int
    dtype: str
    device: str  # "cpu", "cuda:0", ...


def is_torch(x: Any) -> bool:
    """Whether x is a torch tensor (without importing torch)."""
    return _is_torch(type(x))  # type: ignore[arg-type]


@cache
def _is_torch(kind: type) -> bool:
    return any(base.__module__.partition(".")[0] == "torch" for base in kind.__mro__)


def dtype_name(x: Any) -> str:
    """The dtype of a torch tensor or a NumPy array as "float32", "bfloat16", ..."""
    return str(x.dtype).removeprefix("torch.")


def to_bhsd(x: Any, layout: str) -> Any:
    """The tensor as (batch, heads, seq, dim), without a copy."""
    if layout == "bhsd":
        return x
    return x.transpose(1, 2) if is_torch(x) else x.swapaxes(1, 2)


def check_call(q: Any, k: Any, v: Any, layout: str, enable_gqa: bool) -> Shape:
    """The sizes of torch tensors or NumPy arrays q, k, v given in ``layout``; raises InvalidInput with one line that
    says what to do."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not (is_torch(x) or isinstance(x, np.ndarray)):
            raise InvalidInput(f"{name} is a {type(x).__name__}: give torch tensors or NumPy arrays "
                               "(JAX arrays: to splatc.jax.attention)")  # fmt: skip
        if is_torch(x) != is_torch(q):
            raise InvalidInput(f"q is a {type(q).__name__} but {name} is a {type(x).__name__}: give three of one kind")
        if is_torch(x) and x.is_nested:
            raise InvalidInput(f"{name} is a nested tensor: pack the sequences into one, over documents(lengths)")
        if is_torch(x) and str(x.layout) != "torch.strided":
            raise InvalidInput(f"{name} is a sparse tensor: give a dense one, only masks may be sparse")
    return check_sizes(q, k, v, layout, enable_gqa)


def check_sizes(q: Any, k: Any, v: Any, layout: str, enable_gqa: bool) -> Shape:
    """As ``check_call``, for three arrays of any one kind; what is neither torch nor NumPy counts as on the CPU."""
    named = (("q", q), ("k", k), ("v", v))
    for name, x in named:
        if x.ndim != 4:
            raise InvalidInput(f"{name} has shape {tuple(x.shape)}: it must have 4 dimensions, {_words(layout)}")
    devices = {name: str(x.device) if is_torch(x) else "cpu" for name, x in named}
    if len(set(devices.values())) > 1:
        raise InvalidInput(f"q, k and v are on different devices ({_list(devices)}): move them to one")
    if devices["q"].partition(":")[0] not in ("cpu", "cuda"):
        raise InvalidInput(f"q, k and v are on {devices['q']}: move them to the CPU or a CUDA GPU")
    dtypes = {name: dtype_name(x) for name, x in named}
    if len(set(dtypes.values())) > 1:
        raise InvalidInput(f"q, k and v have different dtypes ({_list(dtypes)}): convert them to one")
    q, k, v = (to_bhsd(x, layout) for x in (q, k, v))
    batch, heads, q_len, head_dim = (int(n) for n in q.shape)
    if (k.shape[0], v.shape[0]) != (batch, batch):
        raise InvalidInput(f"q, k and v have batch sizes {batch}, {k.shape[0]} and {v.shape[0]}: they must be equal")
    if k.shape[1] != v.shape[1] or k.shape[2] != v.shape[2]:
        raise InvalidInput(f"k is {tuple(k.shape)} and v is {tuple(v.shape)} (bhsd): they must share heads and length")
    if k.shape[3] != head_dim:
        raise InvalidInput(f"q has head_dim {head_dim} but k has {k.shape[3]}: they must be equal")
    kv_heads = int(k.shape[1])
    if heads != kv_heads and not enable_gqa:
        raise InvalidInput(f"q has {heads} heads but k and v have {kv_heads}: pass enable_gqa=True for grouped queries")
    if kv_heads == 0 or heads % kv_heads:
        raise InvalidInput(f"{heads} query heads cannot share {kv_heads} key/value heads: give a multiple")
    if 0 in (batch, heads, head_dim, int(v.shape[3])):
        raise InvalidInput(
            f"q {tuple(q.shape)} and v {tuple(v.shape)} (bhsd) have an empty dimension: nothing to compute"
        )
    return Shape(batch, heads, kv_heads, q_len, int(k.shape[2]), head_dim, int(v.shape[3]), dtypes["q"], devices["q"])


def for_autocast(q: Any, k: Any, v: Any, dtype: str | None = None) -> tuple[Any, Any, Any]:
    """Torch tensors as they are; under autocast of their device in ``dtype``, default: the one that it asks for, which
    leaves float64 alone."""
    import torch

    kind = q.device.type
    if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
        wanted = torch.get_autocast_dtype(kind) if dtype is None else getattr(torch, dtype)
        kept = torch.float64 if dtype is None else None
        q, k, v = (x.to(wanted) if x.is_floating_point() and x.dtype != kept else x for x in (q, k, v))
    return q, k, v


def refuse_compilation(x: Any, what: str, instead: str) -> None:
    """Raise Unsupported where torch.compile traces what plans a mask as it goes."""
    if hasattr(x, "requires_grad"):  # a torch tensor
        import torch

        if torch.compiler.is_compiling():
            raise Unsupported(f"{what} plans a mask at each call, which torch.compile cannot trace: {instead}")


def check_scale(scale: Any, head_dim: int) -> float:
    """The scale of scores: 1/sqrt(head_dim) for None, else a finite number."""
    if scale is None:
        return 1 / math.sqrt(head_dim)
    value = number_of(scale)
    if not abs(value) <= MAX_SCALE:
        raise InvalidInput(f"scale is {value}: it must be finite in float32, or None for 1/sqrt(head_dim)")
    return value


def number_of(scale: Any) -> float:
    """A scale as a number."""
    if getattr(scale, "requires_grad", False):
        raise InvalidInput("scale is a tensor that requires gradients, and there are none of a scale: multiply q by it")
    try:
        return float(scale)
    except (TypeError, ValueError, OverflowError):
        raise InvalidInput(f"scale is {repr(scale)[:40]}: it must be a number, or None for 1/sqrt(head_dim)") from None


def check_softcap(softcap: Any) -> float:
    """The cap of scores: 0 for None, else a positive finite number."""
    if softcap is None:
        return 0.0
    if getattr(softcap, "requires_grad", False):
        raise InvalidInput("softcap is a tensor that requires gradients, and there are none of a cap: give a number")
    try:
        value = float(softcap)
    except (TypeError, ValueError, OverflowError):
        raise InvalidInput(f"softcap is {repr(softcap)[:40]}: it must be a positive number, or None") from None
    if not 0 < value <= MAX_SCALE:
        raise InvalidInput(f"softcap is {value}: it must be positive and finite in float32, or None for no cap")
    return value


def recorded() -> bool:
    """Whether something but autograd must see what is called: torch.compile, torch.jit.trace, a dispatch mode."""
    import torch

    return bool(torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
                or torch._C._get_tracing_state() is not None)  # fmt: skip


def has_tangents(*tensors: Any) -> bool:
    """Whether one of some torch tensors is differentiated in forward mode."""
    from torch.autograd import forward_ad

    return any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)  # type: ignore[no-untyped-call]


def check_gradients(*tensors: Any) -> None:
    """Refuse to drop gradients in silence."""
    if is_torch(tensors[0]) and any(t.requires_grad for t in tensors):
        import torch

        if torch.is_grad_enabled():
            raise Unsupported(f"this call computes no gradients: {DETACH}")


def last_axis_contiguous(x: Any) -> Any:
    """x itself if its last axis is contiguous (any other strides are fine), else a contiguous copy."""
    if is_torch(x):
        return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
    return x if x.strides[-1] == x.itemsize else np.ascontiguousarray(x)


def computed_in(dtype: str) -> str:
    """The type of accumulation, and so of LSE, for tensors of ``dtype``."""
    return "float64" if dtype == "float64" else "float32"


def outputs(q: Any, shape: Shape, layout: str) -> tuple[Any, Any]:
    """(o as bhsd view of memory in ``layout``, lse (batch, heads, q_len) of ``computed_in``), not initialised."""
    order = (shape.batch, shape.heads, shape.q_len) if layout == "bhsd" else (shape.batch, shape.q_len, shape.heads)
    rows = (shape.batch, shape.heads, shape.q_len)
    if is_torch(q):
        import torch

        o = torch.empty((*order, shape.v_head_dim), dtype=q.dtype, device=q.device)
        return to_bhsd(o, layout), torch.empty(rows, dtype=getattr(torch, computed_in(shape.dtype)), device=q.device)
    return to_bhsd(np.empty((*order, shape.v_head_dim), q.dtype), layout), np.empty(rows, computed_in(shape.dtype))


def _words(layout: str) -> str:
    return "(batch, heads, seq, dim)" if layout == "bhsd" else "(batch, seq, heads, dim)"


def _list(values: dict[str, str]) -> str:
    return ", ".join(f"{name}: {value}" for name, value in values.items())
