"""Sparse attention as a layer."""

from __future__ import annotations

from typing import Any

import torch

from splatc.errors import InvalidInput, Unsupported
from splatc.nn.any_length import any_length
from splatc.nn.padding import hide, reveal
from splatc.patterns import Pattern, as_pattern
from splatc.runtime.tensors import check_scale, check_softcap
from splatc.runtime.terms import TermOptions, check_align, check_probability

SHOWN = 120  # characters of a pattern in the module's repr


class SparseAttention(torch.nn.Module):
    """Multi-head attention over a pattern, for sequences of any length.

        layer = SparseAttention(512, 8, "causal & (window(256, 0) | strided(128))", num_kv_heads=2)
        y = layer(x)                    # x, y: (batch, seq, 512)

    With projections: ``y = layer(x)``, or ``layer(x, key, value)`` for keys and values of another sequence, all of them
    (batch, seq, embed_dim); x goes through q_proj, key through k_proj, value through v_proj, and what comes out through
    out_proj. Without (projections=False): ``o = layer(q, k, v)`` with q (batch, num_heads, q_len, head_dim) and k, v
    (batch, num_kv_heads, kv_len, head_dim), or (batch, seq, heads, dim) with layout="bshd", and no parameters.

    Nothing is compiled when a module is made: a kernel comes with the first call on a device in a dtype, for all
    lengths. Gradients are those of the device (``splatc.compile``); results and gradients are equal bit by bit from
    run to run (dropout: from equal states of torch's generator). ``state_dict`` has what is learned; in a pickle the
    pattern is its text, where that says all of it.
    """

    def __init__(self, embed_dim: int, num_heads: int, pattern: Any, *, num_kv_heads: int | None = None,
                 head_dim: int | None = None, projections: bool = True, bias: bool = True, scale: float | None = None,
                 softcap: float | None = None, alibi: bool = False, relative_bias: int | None = None,
                 sinks: bool = False, bias_align: str = "top_left", dropout: float = 0.0, layout: str = "bhsd",
                 allow_tf32: bool = True, seq_len: int | None = None, device: Any = None,
                 dtype: Any = None) -> None:  # fmt: skip
        """embed_dim: of x. num_heads, num_kv_heads: of queries; of keys and values (default: as many).

        pattern: of ``splatc.patterns``, its text, or whatever else ``splatc.patterns.as_pattern`` takes; a list is one
        for each of num_heads. head_dim: default embed_dim / num_heads. bias: of the projections. scale: of the scores,
        default 1/sqrt(head_dim). softcap: scores s become softcap * tanh(s / softcap). alibi: subtract from scores the
        distance times a slope of each head, 2^(-8 h / num_heads) for h = 1 ... num_heads. relative_bias: learn a bias
        of each head for each distance up to so many positions. bias_align: "top_left", or "bottom_right" to count
        distances from the ends of both sequences. sinks: learn a logit of each head that takes a share of every
        softmax. dropout: of the weights, in training. layout: of q, k and v without projections. allow_tf32: as of
        ``splatc.compile``. seq_len: the length to choose tiles for (default: that of the first call), and that of a
        mask_mod. device, dtype: of the parameters. Raises InvalidInput for sizes or a pattern that do not fit.
        """
        super().__init__()
        self.dropout, self.bias_align = check_probability(dropout), check_align(bias_align)
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        _check_sizes(embed_dim=embed_dim, num_heads=num_heads, num_kv_heads=kv_heads)
        if num_heads % kv_heads:
            raise InvalidInput(f"{num_heads} heads cannot share {kv_heads} key/value heads: give a divisor")
        if head_dim is None and embed_dim % num_heads:
            raise InvalidInput(f"embed_dim {embed_dim} is no multiple of {num_heads} heads: give head_dim")
        head_dim = embed_dim // num_heads if head_dim is None else head_dim
        _check_sizes(head_dim=head_dim)
        check_scale(scale, head_dim)
        check_softcap(softcap)
        self.embed_dim, self.head_dim, self.scale = embed_dim, head_dim, scale
        self.num_heads, self.num_kv_heads = num_heads, kv_heads
        self.projections = projections
        self._attend = any_length(as_pattern(pattern, q_len=seq_len, heads=num_heads),
                                  "bshd" if projections else layout, softcap, allow_tf32, seq_len)  # fmt: skip
        factory = {"device": device, "dtype": dtype}
        self.alibi = alibi
        self.relative_bias = self.sinks = None
        if relative_bias is not None:
            _check_sizes(relative_bias=relative_bias)
            self.relative_bias = torch.nn.Parameter(torch.zeros(num_heads, 2 * relative_bias + 1, **factory))
        if sinks:
            self.sinks = torch.nn.Parameter(torch.zeros(num_heads, **factory))
        if projections:

            def linear(inputs: int, outputs: int) -> torch.nn.Linear:
                return torch.nn.Linear(inputs, outputs, bias, device, dtype)

            self.q_proj = linear(embed_dim, num_heads * head_dim)
            self.k_proj = linear(embed_dim, kv_heads * head_dim)
            self.v_proj = linear(embed_dim, kv_heads * head_dim)
            self.out_proj = linear(num_heads * head_dim, embed_dim)

    @property
    def pattern(self) -> Pattern:
        """What queries attend to."""
        return self._attend.pattern

    def set_pattern(self, pattern: Any) -> None:
        """Attend by another pattern from now on; parameters and all other options stay."""
        one = self._attend
        self._attend = any_length(as_pattern(pattern, q_len=one.seq_len, heads=self.num_heads), one.layout, one.softcap,
                                  one.allow_tf32, one.seq_len)  # fmt: skip

    def forward(self, query: torch.Tensor, key: torch.Tensor | None = None, value: torch.Tensor | None = None, *,
                key_padding_mask: torch.Tensor | None = None, return_lse: bool = False) -> Any:  # fmt: skip
        """See the class. key: default query; value: default key. With return_lse also lse (batch, num_heads, q_len):
        the natural log of the sum of exponentials of the scores, float32 (for float64: float64).

        key_padding_mask: bool (batch, kv_len), True where a key is padding, which no query attends to; a query that is
        left with nothing gives 0 and -inf. Scores take 8 more coordinates for it: head_dim is at most 248, and without
        padding None is faster. Raises Unsupported with a softcap."""
        if not self.projections:
            if key is None or value is None:
                raise InvalidInput("this module has no projections: call it with q, k and v")
            self._check_heads(query, key, value)
            return self._run(query, key, value, return_lse, key_padding_mask)
        if query.ndim != 3:
            raise InvalidInput(f"the input has shape {tuple(query.shape)}: it must be (batch, seq, {self.embed_dim})")
        key = query if key is None else key
        value = key if value is None else value
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in (q, k, v))
        o, lse = self._run(q, k, v, True, key_padding_mask)
        y = self.out_proj(o.flatten(-2))
        return (y, lse) if return_lse else y

    def _run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, return_lse: bool,
             padding: torch.Tensor | None) -> Any:  # fmt: skip
        gqa, options = self.num_heads != self.num_kv_heads, self._options(q)
        if padding is None:
            return self._attend(q, k, v, scale=self.scale, return_lse=return_lse, enable_gqa=gqa, **options)
        if self._attend.softcap:
            raise Unsupported("key_padding_mask hides keys by their scores, which a softcap bounds: use one of the two")
        scale = check_scale(self.scale, self.head_dim)
        q, k = hide(q, k, padding, scale, self._attend.layout)
        o, lse = self._attend(q, k, v, scale=scale, return_lse=True, enable_gqa=gqa, **options)
        o, lse = reveal(o, lse, self._attend.layout)
        return (o, lse) if return_lse else o

    def _options(self, q: torch.Tensor) -> TermOptions:
        options: TermOptions = {}
        if self.alibi:
            options["alibi_slopes"] = alibi_slopes(self.num_heads, q.device)
        if self.relative_bias is not None:
            options["relative_bias"] = self.relative_bias
        if self.sinks is not None:
            options["sinks"] = self.sinks
        if self.dropout and self.training:
            options["dropout_p"] = self.dropout
        if options:
            options["bias_align"] = self.bias_align
        return options

    def _check_heads(self, *qkv: torch.Tensor) -> None:
        at = 1 if self._attend.layout == "bhsd" else 2
        for name, x, heads in zip("qkv", qkv, (self.num_heads, self.num_kv_heads, self.num_kv_heads), strict=True):
            if x.ndim != 4 or x.shape[at] != heads or x.shape[3] != self.head_dim:
                raise InvalidInput(f"{name} has shape {tuple(x.shape)}: this module is for {heads} heads of "
                                   f"{self.head_dim}, {self._attend.layout}")  # fmt: skip

    def extra_repr(self) -> str:
        text = str(self.pattern)
        shown: dict[str, Any] = {
            "embed_dim": self.embed_dim, "num_heads": self.num_heads, "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim, "scale": self.scale, "softcap": self._attend.softcap,
            "alibi": self.alibi or None, "sinks": None if self.sinks is None else True,
            "relative_bias": None if self.relative_bias is None else self.relative_bias.shape[1] // 2,
            "dropout": self.dropout or None,
        }  # fmt: skip
        if not self.projections:
            shown |= {"projections": False, "layout": self._attend.layout}
        words = [f"{name}={value}" for name, value in shown.items() if value is not None]
        return ", ".join([*words, f"pattern={text if len(text) <= SHOWN else text[: SHOWN - 3] + '...'}"])


def alibi_slopes(heads: int, device: Any) -> torch.Tensor:
    """float64 (heads,): 2^(-8 h / heads) for h = 1 ... heads, whatever became of a module's parameters."""
    return torch.arange(1, heads + 1, dtype=torch.float64, device=device).mul(-8 / heads).exp2()


def _check_sizes(**sizes: Any) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise InvalidInput(f"{name} is {size!r}: it must be a positive whole number")
