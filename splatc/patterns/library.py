"""The leaves: causal, windows, strides, fixed summaries, global tokens and packed documents.

Bounds are inclusive; True = attend; q and k are 0-based positions of a query and a key.
"""

# ruff: noqa: D102 (member, lines and check are documented once, on Pattern)

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from splatc.errors import InvalidInput
from splatc.patterns.base import Bool, Derived, Int, Leaf, Lines, Pattern, choice, show, whole

ALIGN = ("top_left", "bottom_right")
_MAX_PAIRS = 2**22  # pairs of runs of the same document id; beyond this lines() answers "unknown"


def _shift(align: str, q_len: int, kv_len: int) -> int:
    """The key position that stands beside query 0."""
    return kv_len - q_len if align == "bottom_right" else 0


@dataclass(frozen=True, repr=False)
class Full(Leaf):
    """full(): every query attends to every key."""

    name: ClassVar[str] = "full"

    def member(self, q: Int, k: Int, q_len: int, kv_len: int) -> Bool:
        return np.ones((1,) * max(q.ndim, k.ndim), np.bool_)

    def lines(self, q_len: int, kv_len: int) -> Lines:
        return Lines.of(q_len, kv_len)

    def transposed(self) -> Pattern:
        return self


@dataclass(frozen=True, repr=False)
class Causal(Leaf):
    """causal(align="top_left"): k <= q; with align="bottom_right", k <= q + kv_len - q_len (the last query
    sees all).

    torch's is_causal is top_left; FlashAttention >= 2.1 is bottom_right. The two agree when q_len == kv_len.
    """

    align: str = "top_left"

    name: ClassVar[str] = "causal"

    def __post_init__(self) -> None:
        choice(self.name, "align", self.align, ALIGN)

    def member(self, q: Int, k: Int, q_len: int, kv_len: int) -> Bool:
        return k <= q + _shift(self.align, q_len, kv_len)

    def lines(self, q_len: int, kv_len: int) -> Lines:
        return Lines.of(q_len, kv_len, diags=[(0, q_len, _shift(self.align, q_len, kv_len) + 1)])

    def transposed(self) -> Pattern:
        return ~self | Window(0, 0, self.align)


@dataclass(frozen=True, repr=False)
class Window(Leaf):
    """window(left, right, align="top_left"): -left <= k - q <= right, a sliding window (Longformer, Mistral).

    align="bottom_right" measures from q + kv_len - q_len instead of q, as for `causal`. Either bound may be
    negative (a window beside the diagonal) as long as left + right >= 0; there is no -1 for "unlimited": use
    `causal`.
    """

    left: int
    right: int
    align: str = "top_left"

    name: ClassVar[str] = "window"

    def __post_init__(self) -> None:
        for f in ("left", "right"):
            object.__setattr__(self, f, whole(self.name, f, getattr(self, f)))
        choice(self.name, "align", self.align, ALIGN)
        if self.left + self.right < 0:
            raise InvalidInput(
                f"{self.name}: left is {self.left} and right is {self.right}, an empty window: the bounds are"
                " -left <= k - q <= right, so left + right must be >= 0 (there is no -1 for unlimited)"
            )

    def member(self, q: Int, k: Int, q_len: int, kv_len: int) -> Bool:
        at = q + _shift(self.align, q_len, kv_len)
        return (k >= at - self.left) & (k <= at + self.right)

    def lines(self, q_len: int, kv_len: int) -> Lines:
        s = _shift(self.align, q_len, kv_len)
        return Lines.of(q_len, kv_len, diags=[(0, q_len, s - self.left), (0, q_len, s + self.right + 1)])

    def transposed(self) -> Pattern:
        return Window(self.right, self.left, self.align)


@dataclass(frozen=True, repr=False)
class Dilated(Leaf):
    """dilated(left, right, step, align="top_left"): -left <= k - q <= right and (q - k) % step == 0.

    The dilated sliding window of Longformer (arXiv:2004.05150). The bounds are in positions, not in steps.
    """

    left: int
    right: int
    step: int
    align: str = "top_left"

    name: ClassVar[str] = "dilated"

    def __post_init__(self) -> None:
        Window.__post_init__(self)  # type: ignore[arg-type]
        object.__setattr__(self, "step", whole(self.name, "step", self.step, at_least=1))

    def member(self, q: Int, k: Int, q_len: int, kv_len: int) -> Bool:
        away = k - (q + _shift(self.align, q_len, kv_len))
        out: Bool = (away >= -self.left) & (away <= self.right) & (away % self.step == 0)
        return out

    def lines(self, q_len: int, kv_len: int) -> Lines:
        s = _shift(self.align, q_len, kv_len)
        return Lines.of(
            q_len,
            kv_len,
            diags=[(0, q_len, s - self.left), (0, q_len, s + self.right + 1)],
            diff_mod=[(self.step, (s, s + 1))],
        )

    def transposed(self) -> Pattern:
        return Dilated(self.right, self.left, self.step, self.align)


@dataclass(frozen=True, repr=False)
class Strided(Leaf):
    """strided(step): (q - k) % step == 0, half of the strided Sparse Transformer (arXiv:1904.10509)."""

    step: int

    name: ClassVar[str] = "strided"

    def __post_init__(self) -> None:
        object.__setattr__(self, "step", whole(self.name, "step", self.step, at_least=1))

    def member(self, q: Int, k: Int, q_len: int, kv_len: int) -> Bool:
        out: Bool = (q - k) % self.step == 0
        return out

    def lines(self, q_len: int, kv_len: int) -> Lines:
        return Lines.of(q_len, kv_len, diff_mod=[(self.step, (0, 1))])

    def transposed(self) -> Pattern:
        return self


@dataclass(frozen=True, repr=False)
class Fixed(Leaf):
    """fixed(block, summary): q // block == k // block, or k % block >= block - summary.

    The fixed Sparse Transformer (arXiv:1904.10509): every block's last `summary` columns are seen by all.
    """

    block: int
    summary: int

    name: ClassVar[str] = "fixed"

    def __post_init__(self) -> None:
        object.__setattr__(self, "block", whole(self.name, "block", self.block, at_least=1))
        summary = whole(self.name, "summary", self.summary, at_least=1, at_most=self.block)
        object.__setattr__(self, "summary", summary)

    def member(self, q: Int, k: Int, q_len: int, kv_len: int) -> Bool:
        out: Bool = (q // self.block == k // self.block) | (k % self.block >= self.block - self.summary)
        return out

    def lines(self, q_len: int, kv_len: int) -> Lines:
        lo = np.arange(0, q_len, self.block, dtype=np.int64)
        hi = lo + self.block
        return Lines.of(
            q_len,
            kv_len,
            rows=lo,
            cols=np.concatenate([np.stack([lo, hi, lo], 1), np.stack([lo, hi, hi], 1)]),
            col_mod=[(self.block, (0, self.block - self.summary))],
        )

    def transposed_lines(self, q_len: int, kv_len: int) -> Lines:
        lo = np.arange(0, q_len, self.block, dtype=np.int64)
        summary = lo + self.block - self.summary
        cols = [np.stack([lo, summary, at], 1) for at in (lo, lo + self.block)]
        return Lines.of(q_len, kv_len, rows=np.concatenate([lo, summary]), cols=np.concatenate(cols))


@dataclass(frozen=True, repr=False)
class GlobalRows(Leaf):
    """global_rows(n): q < n, the first n queries attend to everything (Longformer, BigBird)."""

    n: int

    name: ClassVar[str] = "global_rows"

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", whole(self.name, "n", self.n, at_least=0))

    def member(self, q: Int, k: Int, q_len: int, kv_len: int) -> Bool:
        return q < self.n

    def lines(self, q_len: int, kv_len: int) -> Lines:
        return Lines.of(q_len, kv_len, rows=[self.n])

    def transposed(self) -> Pattern:
        return GlobalCols(self.n)


@dataclass(frozen=True, repr=False)
class GlobalCols(Leaf):
    """global_cols(n): k < n, everyone attends to the first n keys (Longformer, BigBird)."""

    n: int

    name: ClassVar[str] = "global_cols"

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", whole(self.name, "n", self.n, at_least=0))

    def member(self, q: Int, k: Int, q_len: int, kv_len: int) -> Bool:
        return k < self.n

    def lines(self, q_len: int, kv_len: int) -> Lines:
        return Lines.of(q_len, kv_len, cols=[(0, q_len, self.n)])

    def transposed(self) -> Pattern:
        return GlobalRows(self.n)


@dataclass(frozen=True, repr=False)
class Sink(GlobalCols):
    """sink(n): k < n, attention sinks (StreamingLLM, arXiv:2309.17453), as in

    causal() & (sink(4) | window(1023, 0)).
    """

    name: ClassVar[str] = "sink"


@dataclass(frozen=True, repr=False)
class Prefix(Derived):
    """prefix(n): k <= q or k < n, the prefix-LM mask (T5, arXiv:1910.10683)."""

    n: int

    name: ClassVar[str] = "prefix"

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", whole(self.name, "n", self.n, at_least=0))

    def body(self) -> Pattern:
        return Causal() | GlobalCols(self.n)


@dataclass(frozen=True, repr=False)
class Longformer(Derived):
    """longformer(window, global_tokens): window(w, w) | global_rows(g) | global_cols(g), arXiv:2004.05150."""

    window: int
    global_tokens: int

    name: ClassVar[str] = "longformer"

    def __post_init__(self) -> None:
        for f in ("window", "global_tokens"):
            object.__setattr__(self, f, whole(self.name, f, getattr(self, f), at_least=0))

    def body(self) -> Pattern:
        g = self.global_tokens
        return Window(self.window, self.window) | GlobalRows(g) | GlobalCols(g)


@dataclass(frozen=True, repr=False)
class Documents(Leaf):
    """Contiguous documents packed one after the other; see `documents`."""

    lengths: tuple[int, ...]
    kv_lengths: tuple[int, ...] | None = None

    name: ClassVar[str] = "documents"

    @cached_property
    def _starts(self) -> tuple[Int, Int]:
        kv = self.lengths if self.kv_lengths is None else self.kv_lengths
        q_starts, kv_starts = (
            np.concatenate([[0], np.cumsum(n, dtype=np.int64)]) for n in (self.lengths, kv)
        )
        return q_starts, kv_starts

    def member(self, q: Int, k: Int, q_len: int, kv_len: int) -> Bool:
        q_starts, kv_starts = self._starts
        doc_q: Int = np.searchsorted(q_starts, q, side="right")
        doc_k: Int = np.searchsorted(kv_starts, k, side="right")
        same: Bool = doc_q == doc_k
        return same

    def lines(self, q_len: int, kv_len: int) -> Lines:
        q, k = self._starts
        begin = np.stack([q[:-1], q[1:], k[:-1]], 1)
        end = np.stack([q[:-1], q[1:], k[1:]], 1)
        return Lines.of(q_len, kv_len, rows=q, cols=np.concatenate([begin, end]))

    def own_lengths(self) -> tuple[int, int] | None:
        q_starts, kv_starts = self._starts
        return int(q_starts[-1]), int(kv_starts[-1])

    def check(self, q_len: int, kv_len: int) -> None:
        super().check(q_len, kv_len)
        q_sum, kv_sum = (int(s[-1]) for s in self._starts)
        for name, total, length in (("q_len", q_sum, q_len), ("kv_len", kv_sum, kv_len)):
            if total != length:
                side = "kv_lengths" if name == "kv_len" and self.kv_lengths else "lengths"
                raise InvalidInput(
                    f"documents: the {side} sum to {total}, but {name} is {length}: give padding a document"
                    " of its own" + (", and keys of other lengths kv_lengths" if side == "lengths" else "")
                )

    def transposed(self) -> Pattern:
        return self if self.kv_lengths is None else Documents(self.kv_lengths, self.lengths)

    def __repr__(self) -> str:
        kv = "" if self.kv_lengths is None else f", kv_lengths={show(list(self.kv_lengths))}"
        return f"documents({show(list(self.lengths))}{kv})"


@dataclass(frozen=True, repr=False)
class DocumentIds(Leaf):
    """Documents whose positions are not contiguous: runs of `lengths` positions with document `ids`."""

    lengths: tuple[int, ...]
    ids: tuple[int, ...]

    name: ClassVar[str] = "documents"

    @cached_property
    def _runs(self) -> tuple[Int, Int]:
        return np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)]), np.array(self.ids, np.int64)

    def member(self, q: Int, k: Int, q_len: int, kv_len: int) -> Bool:
        starts, ids = self._runs
        id_q, id_k = (ids[np.searchsorted(starts, x, side="right") - 1] for x in (q, k))
        same: Bool = id_q == id_k
        return same

    def lines(self, q_len: int, kv_len: int) -> Lines | None:
        starts, ids = self._runs
        order = np.argsort(ids, kind="stable")
        counts = np.bincount(ids)  # runs of each document; ids are 0 .. n-1
        if int((counts**2).sum()) > _MAX_PAIRS:
            return None
        # Every run of queries against every run of keys of the same document.
        first = np.cumsum(counts) - counts
        mates = counts[ids]
        run_q = np.repeat(np.arange(len(ids)), mates)
        nth = np.arange(len(run_q)) - np.repeat(np.cumsum(mates) - mates, mates)
        run_k = order[first[ids[run_q]] + nth]
        lo, hi = starts[run_q], starts[run_q + 1]
        cols = [np.stack([lo, hi, starts[run_k]], 1), np.stack([lo, hi, starts[run_k + 1]], 1)]
        return Lines.of(q_len, kv_len, rows=starts, cols=np.concatenate(cols))

    def check(self, q_len: int, kv_len: int) -> None:
        super().check(q_len, kv_len)
        total = int(self._runs[0][-1])
        if q_len != total or kv_len != total:
            raise InvalidInput(
                f"documents: there are {total} ids, but q_len is {q_len} and kv_len is {kv_len}"
            )

    def transposed(self) -> Pattern:
        return self

    def __repr__(self) -> str:
        return f"documents(ids={show(np.repeat(self.ids, self.lengths).tolist())})"


def documents(
    lengths: Any = None,
    *,
    cu_seqlens: Any = None,
    ids: Any = None,
    kv_lengths: Any = None,
    cu_seqlens_kv: Any = None,
) -> Documents | DocumentIds:
    """A query attends to the keys of its own document (packed or "varlen" sequences).

    Give exactly one of
      lengths      length of each document, in positions (zero is allowed)
      cu_seqlens   the running sum of the lengths: 0, n0, n0+n1, ...
      ids          the document of each position (integers >= 0); the only form whose documents may
                   interleave.
    When keys and queries differ in number, `kv_lengths` (or `cu_seqlens_kv`) gives the keys' side, document
    by document. The documents must cover all positions: `check` raises InvalidInput otherwise. Lists, NumPy
    arrays and torch tensors are accepted.
    """
    if sum(x is not None for x in (lengths, cu_seqlens, ids)) != 1:
        raise InvalidInput("documents: give exactly one of lengths, cu_seqlens and ids")
    if kv_lengths is not None and cu_seqlens_kv is not None:
        raise InvalidInput("documents: give kv_lengths or cu_seqlens_kv, not both")
    if ids is not None:
        if kv_lengths is not None or cu_seqlens_kv is not None:
            raise InvalidInput("documents: ids are for q_len == kv_len; use lengths and kv_lengths otherwise")
        return _from_ids(_vector("ids", ids))
    q = _lengths("lengths", lengths, "cu_seqlens", cu_seqlens)
    kv = None
    if kv_lengths is not None or cu_seqlens_kv is not None:
        kv = _lengths("kv_lengths", kv_lengths, "cu_seqlens_kv", cu_seqlens_kv)
        if len(kv) != len(q):
            raise InvalidInput(f"documents: {len(q)} documents of queries but {len(kv)} of keys")
    return Documents(q, None if kv == q else kv)


def _vector(name: str, value: Any) -> Int:
    """A non-empty int64 vector of numbers >= 0 from a list, an array or a torch tensor."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    try:
        out = np.asarray(value)
    except ValueError:
        out = np.zeros((), np.object_)
    if out.ndim != 1 or out.size == 0 or out.dtype.kind not in "iu":
        raise InvalidInput(f"documents: {name} must be a non-empty list of whole numbers")
    out = out.astype(np.int64)
    if out.min() < 0:
        at = int(out.argmin())
        raise InvalidInput(f"documents: {name}[{at}] is {out[at]}, but it must be >= 0")
    return out


def _lengths(name: str, lengths: Any, cu_name: str, cu: Any) -> tuple[int, ...]:
    if cu is not None:
        sums = _vector(cu_name, cu)
        if sums[0] != 0 or len(sums) < 2:
            raise InvalidInput(f"documents: {cu_name} must start with 0 and end with the total length")
        steps = np.diff(sums)
        if steps.min() < 0:
            at = int(steps.argmin()) + 1
            raise InvalidInput(f"documents: {cu_name} decreases at index {at} ({sums[at - 1]} to {sums[at]})")
    else:
        steps = _vector(name, lengths)
    if steps.sum() == 0:
        raise InvalidInput(f"documents: {name if cu is None else cu_name} hold no position at all")
    return tuple(steps.tolist())


def _from_ids(ids: Int) -> Documents | DocumentIds:
    """Runs of equal ids, renamed 0, 1, ... in order of appearance: equal masks give equal patterns."""
    starts = np.flatnonzero(np.concatenate([[True], ids[1:] != ids[:-1]]))
    lengths = tuple(np.diff(np.concatenate([starts, [len(ids)]])).tolist())
    _, first, inverse = np.unique(ids[starts], return_index=True, return_inverse=True)
    if len(first) == len(starts):
        return Documents(lengths)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return DocumentIds(lengths, tuple(rank[inverse.reshape(-1)].tolist()))
