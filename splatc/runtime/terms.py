"""The terms of a call: what people pass for a Score, made what kernels read, and checked."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import numpy as np

from splatc.errors import InvalidInput
from splatc.ir.score import Alibi, BlockBias, RelativeBias, Score
from splatc.ir.terms import LEARNABLE, Terms
from splatc.patterns.library import ALIGN
from splatc.runtime.tensors import Shape, computed_in

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Asked", "Convert", "TermOptions", "Terms", "asked_by", "asked_in", "asked_of", "check_align", "check_asked",
           "check_probability", "check_seed", "check_terms", "terms_by", "terms_of"]  # fmt: skip


class TermOptions(TypedDict, total=False):
    """What calls take for a Score (ir/score.py), each where it was compiled for; tensors are floating-point, of q's
    kind and device, and have gradients.

    alibi_slopes (heads,); relative_bias (heads, 2 r + 1), the last and first for all that is further away; block_bias
    (heads, ceil(q_len / block_size), ceil(kv_len / block_size)); sinks (heads,). bias_align: "top_left" counts k - q
    from the beginnings of both sequences, "bottom_right" from their ends. dropout_p: 0 <= p < 1. seed: a whole number
    or a tensor of one, default: drawn from torch's generator.
    """

    alibi_slopes: Any
    relative_bias: Any
    block_bias: Any
    block_size: int | None
    sinks: Any
    bias_align: str
    dropout_p: float
    seed: Any


class Asked(NamedTuple):
    """What has to be compiled for a call: options of ``splatc.compile``."""

    alibi: bool = False
    relative_bias: bool = False
    block_bias: bool = False
    sinks: bool = False
    dropout: bool = False


NOTHING = Asked()


def asked_by(options: Mapping[str, Any]) -> Asked:
    """What the options of a call ask for."""
    if not options:
        return NOTHING
    dropout = check_probability(options.get("dropout_p", 0.0)) > 0
    return _asked((options.get(name) for name in LEARNABLE), dropout)


def asked_of(terms: Terms | None) -> Asked:
    """What has to be compiled for these terms."""
    return NOTHING if terms is None else _asked(terms.learnable, terms.seed is not None)


def _asked(learnable: Iterable[Any], dropout: bool) -> Asked:
    alibi, relative_bias, block_bias, sinks = (x is not None for x in learnable)
    return Asked(alibi, relative_bias, block_bias, sinks, dropout)


def asked_in(score: Score) -> Asked:
    """What a Score was compiled for."""
    return Asked(score.has(Alibi), score.has(RelativeBias), score.has(BlockBias), score.sinks, score.dropout)


class Convert(NamedTuple):
    """How arrays of one kind become terms: tensor(name, x), contiguous and of the type of computations; seed(given or
    None, probability of dropping) as a kernel takes it."""

    tensor: Callable[[str, Any], Any]
    seed: Callable[[Any, float], Any]


def terms_of(q: Any, k: Any, layout: str, dtype: str, score: Score | None = None,
             **options: Unpack[TermOptions]) -> Terms:  # fmt: skip
    """The terms of a call with torch tensors or NumPy arrays q and k of ``dtype``; conversions are differentiable, and
    compilers can trace it. See ``terms_by``."""
    if not (hasattr(q, "requires_grad") or isinstance(q, np.ndarray)):
        raise InvalidInput(f"q is a {type(q).__name__}: give torch tensors or NumPy arrays")
    convert = Convert(lambda name, x: _tensor(name, x, q, dtype), lambda seed, p: _seed(seed, q, p))
    return terms_by(convert, q, k, layout, score, **options)


def terms_by(convert: Convert, q: Any, k: Any, layout: str, score: Score | None = None, *, alibi_slopes: Any = None,
             relative_bias: Any = None, block_bias: Any = None, block_size: Any = None, sinks: Any = None,
             bias_align: str = "top_left", dropout_p: float = 0.0, seed: Any = None,
             **unknown: Any) -> Terms:  # fmt: skip
    """The terms of a call with q and k, made by ``convert``.

    score: what was compiled for, None for whatever is asked. Raises InvalidInput for what is missing, too much or no
    such thing, and TypeError for unknown options; shapes are for ``check_terms``.
    """
    if unknown:
        name = next(iter(unknown))
        masks = name in ("is_causal", "attn_mask")  # as PyTorch's attention has them
        instead = "it is the pattern that says who attends" if masks else ", ".join(TermOptions.__annotations__)
        raise TypeError(f"attention has no option {name!r}: {instead}")
    p = check_probability(dropout_p)
    check_align(bias_align)
    given = alibi_slopes, relative_bias, block_bias, sinks
    asked = _asked(given, p > 0)
    if score is not None:
        asked = _check_asked(asked, asked_in(score))
    slopes, relative, blocks, logits = (
        None if x is None else convert.tensor(name, x) for name, x in zip(LEARNABLE, given, strict=True)
    )
    at = 2 if layout == "bhsd" else 1
    ends = bias_align == "bottom_right" and (asked.alibi or asked.relative_bias) and q.ndim == k.ndim == 4
    return Terms(
        slopes, relative, blocks, logits, seed=convert.seed(seed, p) if asked.dropout else None,
        block_size=_check_block_size(block_size) if asked.block_bias else 0,
        shift=k.shape[at] - q.shape[at] if ends else 0, dropout_p=p,
    )  # fmt: skip


def check_terms(terms: Terms, shape: Shape) -> None:
    """Raise InvalidInput unless the shapes of terms suit a call."""
    heads, size = shape.heads, max(terms.block_size, 1)
    for name, x in (("alibi_slopes", terms.alibi_slopes), ("sinks", terms.sinks)):
        if x is not None and x.shape != (heads,):
            raise InvalidInput(f"{name} has shape {tuple(x.shape)}: q has {heads} heads, so it must be ({heads},)")
    table = terms.relative_bias
    if table is not None and (table.ndim != 2 or table.shape[0] != heads or table.shape[1] % 2 == 0):
        raise InvalidInput(f"relative_bias has shape {tuple(table.shape)}: it must be ({heads}, 2 r + 1): the heads of "
                           "q, and an odd number of distances")  # fmt: skip
    wanted = heads, -(-shape.q_len // size), -(-shape.kv_len // size)
    if terms.block_bias is not None and terms.block_bias.shape != wanted:
        raise InvalidInput(f"block_bias has shape {tuple(terms.block_bias.shape)}: for blocks of {size} in "
                           f"{shape.q_len} x {shape.kv_len} and {heads} heads it must be {wanted}")  # fmt: skip


def check_asked(asked: Asked) -> Asked:
    """``asked`` itself; InvalidInput where an option is not True or False: tensors come with calls."""
    for name, value in asked._asdict().items():
        if not isinstance(value, bool):
            raise InvalidInput(f"{name} is a {type(value).__name__}: compile takes True or False, calls the numbers")
    return asked


def _check_asked(asked: Asked, compiled: Asked) -> Asked:
    """What was compiled for, if no more and no less is asked; dropout may be 0."""
    for name, option, here, there in zip((*LEARNABLE, "dropout_p"), Asked._fields, asked, compiled, strict=True):
        if here and not there:
            raise InvalidInput(f"{name} is given, but this mask was not compiled for it: compile with {option}=True")
        if there and not here and option != "dropout":
            raise InvalidInput(f"{name} is missing: this mask was compiled with {option}=True")
    return compiled


def check_align(align: Any) -> str:
    """``align`` itself, if it is one of ALIGN."""
    if align not in ALIGN:
        raise InvalidInput(f"bias_align is {repr(align)[:40]}: it must be one of {', '.join(ALIGN)}")
    return str(align)


def check_probability(p: Any) -> float:
    """The probability of dropping: 0 <= p < 1."""
    try:
        value = float(p)
    except (TypeError, ValueError, OverflowError):
        raise InvalidInput(f"dropout_p is {repr(p)[:40]}: it must be a number from 0 on, below 1") from None
    if not 0 <= value < 1:
        raise InvalidInput(f"dropout_p is {value}: it must be at least 0 and below 1")
    return value


def _check_block_size(size: Any) -> int:
    if size is None:
        raise InvalidInput("block_size is missing: block_bias has a number for each block of that many positions")
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise InvalidInput(f"block_size is {repr(size)[:40]}: it must be a positive whole number")
    return size


def _tensor(name: str, x: Any, q: Any, dtype: str) -> Any:
    """x contiguous and in the type that ``dtype`` is computed in."""
    if isinstance(q, np.ndarray):
        if not isinstance(x, np.ndarray):
            raise InvalidInput(f"{name} is a {type(x).__name__}: give a NumPy array, as q is one")
        floating = x.dtype.kind == "f"
    else:
        if not hasattr(x, "requires_grad"):
            raise InvalidInput(f"{name} is a {type(x).__name__}: give a torch tensor, as q is one")
        if x.device != q.device:
            raise InvalidInput(f"{name} is on {x.device} but q is on {q.device}: move it")
        floating = x.is_floating_point()
    if not floating:
        raise InvalidInput(f"{name} has dtype {str(x.dtype).removeprefix('torch.')}: give floating-point numbers")
    if isinstance(q, np.ndarray):
        return np.ascontiguousarray(x, computed_in(dtype))
    import torch

    return x.to(torch.float64 if dtype == "float64" else torch.float32).contiguous()


def _seed(seed: Any, q: Any, p: float) -> Any:
    """int64 (1,) of q's kind, on its device; drawn if it is None and anything is dropped."""
    if seed is None and p == 0:
        seed = 0
    if isinstance(q, np.ndarray):
        if seed is None:
            raise InvalidInput("seed is missing: dropout of NumPy arrays needs a whole number as its seed")
        return np.array([check_seed(seed)], np.int64)
    import torch

    if seed is None:
        return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=q.device)
    if not isinstance(seed, torch.Tensor):
        return torch.tensor([check_seed(seed)], dtype=torch.int64, device=q.device)
    if seed.numel() != 1 or seed.is_floating_point() or seed.is_complex():
        raise InvalidInput(f"seed is a tensor of shape {tuple(seed.shape)} and {seed.dtype}: give one whole number")
    return seed.reshape(1).to(q.device, torch.int64)


def check_seed(seed: Any) -> int:
    """A whole number of 64 bits with a sign."""
    try:
        value = operator.index(seed)
    except TypeError:
        raise InvalidInput(f"seed is {repr(seed)[:40]}: it must be a whole number, or a tensor of one") from None
    if not -(2**63) <= value < 2**63:
        raise InvalidInput(f"seed is {value}: it must fit 64 bits with a sign")
    return value
