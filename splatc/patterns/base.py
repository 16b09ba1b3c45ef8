"""What a pattern is: a symbolic boolean function of (query position, key position), closed under & | ~.

A pattern answers two questions: `contains` (is this key attended to? the definition of the mask) and `lines`
(where in the plane may that answer change?). The second lets the compiler describe a mask over a million rows
by evaluating it at a few points, so a missing line is a miscompiled mask: see the law in `Lines`.
"""

# ruff: noqa: D102 (member, lines and check are documented once, on Pattern)

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from splatc.errors import InvalidInput

Int = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]
Mod = tuple[int, tuple[int, ...]]

MAX_DENSE = 2**32  # elements; more than this is never materialised
_CHUNK = 2**23  # elements evaluated at a time by dense()
_NONE3 = np.zeros((0, 3), np.int64)


@dataclass(frozen=True, eq=False)
class Lines:
    """Where membership may change in the q_len x kv_len plane. A superset is allowed; an omission is a bug.

    rows      int64[n], sorted: something may change between rows r-1 and r; 0 < r < q_len
    cols      int64[n, 3] of (row_lo, row_hi, k): in rows [row_lo, row_hi) membership may change between k-1
              and k
    diags     int64[n, 3] of (row_lo, row_hi, d): in those rows it may change between columns q+d-1 and q+d
    col_mod   ((m, thresholds), ...): membership may depend on k mod m, changing at the sorted thresholds, 0
              first
    diff_mod  ((m, thresholds), ...): the same for (k - q) mod m

    The law: fix the band between two consecutive `rows` and, for each line whose row range covers that band,
    a side of it; fix an interval between thresholds for every modulus. Then membership is constant. Every
    row_lo and row_hi is 0, q_len or one of `rows`, so no line starts or ends inside a band. Use `Lines.of`,
    which ensures this.
    """

    rows: Int
    cols: Int
    diags: Int
    col_mod: tuple[Mod, ...] = ()
    diff_mod: tuple[Mod, ...] = ()

    @staticmethod
    def of(
        q_len: int,
        kv_len: int,
        *,
        rows: Iterable[int] | Int = (),
        cols: Sequence[tuple[int, int, int]] | Int = (),
        diags: Sequence[tuple[int, int, int]] | Int = (),
        col_mod: Iterable[Mod] = (),
        diff_mod: Iterable[Mod] = (),
    ) -> Lines:
        """Lines from unsorted, unclipped parts: clips to the plane, joins what abuts, completes `rows`."""
        col, diag = _triples(cols, q_len), _triples(diags, q_len)
        col = col[(col[:, 2] > 0) & (col[:, 2] < kv_len)]
        # A diagonal matters only if it runs between two columns of the plane in one of its rows.
        diag = diag[(diag[:, 1] - 1 + diag[:, 2] > 0) & (diag[:, 0] + diag[:, 2] < kv_len)]
        col, diag = _join(col), _join(diag)
        row = np.concatenate([_ints(rows), col[:, 0], col[:, 1], diag[:, 0], diag[:, 1]])
        row = np.unique(row[(row > 0) & (row < q_len)])
        return Lines(row, col, diag, _join_mods(col_mod), _join_mods(diff_mod))

    @staticmethod
    def merge(parts: Sequence[Lines]) -> Lines:
        """The lines of any boolean combination of patterns whose lines are `parts`."""
        if len(parts) == 1:
            return parts[0]
        return Lines(
            np.unique(np.concatenate([p.rows for p in parts])),
            _join(np.concatenate([p.cols for p in parts])),
            _join(np.concatenate([p.diags for p in parts])),
            _join_mods(m for p in parts for m in p.col_mod),
            _join_mods(m for p in parts for m in p.diff_mod),
        )

    def union(self, other: Lines) -> Lines:
        """The lines of a & b, a | b or a ^ b."""
        return Lines.merge((self, other))


def _ints(values: Iterable[int] | Int) -> Int:
    if isinstance(values, np.ndarray):
        return values.astype(np.int64, copy=False).reshape(-1)
    return np.array(list(values), np.int64)


def _triples(values: Sequence[tuple[int, int, int]] | Int, q_len: int) -> Int:
    """int64[n, 3] with row ranges clipped to [0, q_len) and empty ones dropped."""
    out = np.array(values, np.int64).reshape(-1, 3)
    out[:, :2] = np.clip(out[:, :2], 0, q_len)
    return out[out[:, 0] < out[:, 1]]


def _join(lines: Int) -> Int:
    """Union the row ranges of lines at one place: (0,4,k) (4,8,k) -> (0,8,k). Sorted by (place, row_lo)."""
    if len(lines) == 0:
        return _NONE3
    lines = lines[np.lexsort((lines[:, 0], lines[:, 2]))]
    lo, hi, at = lines[:, 0], lines[:, 1], lines[:, 2]
    new_place = np.concatenate([[True], at[1:] != at[:-1]])
    # Running maximum of hi inside each place: lift every place above the one before it.
    lift = np.cumsum(new_place) * (int(hi.max()) + 1)
    reach = np.maximum.accumulate(hi + lift) - lift
    first = new_place.copy()
    first[1:] |= lo[1:] > reach[:-1]
    start = np.flatnonzero(first)
    last = np.concatenate([start[1:] - 1, [len(lines) - 1]])
    return np.stack([lo[start], reach[last], at[start]], axis=1)


def _join_mods(mods: Iterable[Mod]) -> tuple[Mod, ...]:
    found: dict[int, set[int]] = {}
    for m, thresholds in mods:
        found.setdefault(m, {0}).update(t % m for t in thresholds)
    return tuple((m, tuple(sorted(ts))) for m, ts in sorted(found.items()) if m > 1 and len(ts) > 1)


class Pattern:
    """Which keys each query attends to; True = attend. Immutable, hashable; combine with & | ~.

    str(p) and repr(p) are the text form, which `splatc.patterns.parse` reads back to an equal pattern.
    """

    def contains(self, q: Int, k: Int, q_len: int, kv_len: int) -> Bool:
        """Membership of the pairs (q, k): int64 arrays that broadcast, 0 <= q < q_len, 0 <= k < kv_len.

        Returns a bool array of the broadcast shape.
        """
        out = self.member(np.asarray(q, np.int64), np.asarray(k, np.int64), q_len, kv_len)
        shape = np.broadcast_shapes(np.shape(q), np.shape(k))
        return out if out.shape == shape else np.broadcast_to(out, shape).copy()

    def member(self, q: Int, k: Int, q_len: int, kv_len: int) -> Bool:
        """What a pattern defines for `contains`: the result may still have to be broadcast."""
        raise NotImplementedError

    def lines(self, q_len: int, kv_len: int) -> Lines | None:
        """Where membership may change (see `Lines`); None: unknown, the mask must be evaluated densely."""
        return None

    def transposed(self) -> Pattern:
        """The same mask with queries and keys exchanged: which queries attend to each key. As symbolic as this one."""
        return Transposed(self)

    def transposed_lines(self, q_len: int, kv_len: int) -> Lines | None:
        """The lines of `Transposed(self)`, whose q_len are this pattern's keys; None: unknown. Only for leaves that
        `transposed` cannot say with other patterns.
        """
        return None

    def check(self, q_len: int, kv_len: int) -> None:
        """Raises InvalidInput unless the pattern is defined on q_len queries and kv_len keys."""
        for name, value in (("q_len", q_len), ("kv_len", kv_len)):
            if value < 1:
                raise InvalidInput(f"{name} is {value}: a pattern needs at least one position")

    def own_lengths(self) -> tuple[int, int] | None:
        """(q_len, kv_len) if the pattern is for these alone (a matrix, documents, a grid), else None."""
        return None

    def dense(self, q_len: int, kv_len: int | None = None) -> Bool:
        """The mask as bool[q_len, kv_len], for small sizes; kv_len defaults to q_len. Calls check() first."""
        kv_len = q_len if kv_len is None else kv_len
        self.check(q_len, kv_len)
        if q_len * kv_len > MAX_DENSE:
            raise InvalidInput(
                f"a dense {q_len} x {kv_len} mask has more than 2**32 elements: too large to hold"
            )
        out = np.empty((q_len, kv_len), np.bool_)
        k = np.arange(kv_len, dtype=np.int64)[None, :]
        step = max(1, _CHUNK // kv_len)
        for lo in range(0, q_len, step):
            hi = min(lo + step, q_len)
            q = np.arange(lo, hi, dtype=np.int64)[:, None]
            out[lo:hi] = self.contains(q, k, q_len, kv_len)
        return out

    def __and__(self, other: object) -> Pattern:
        return other._under(And, self) if isinstance(other, Pattern) else NotImplemented

    def __or__(self, other: object) -> Pattern:
        return other._under(Or, self) if isinstance(other, Pattern) else NotImplemented

    def __invert__(self) -> Pattern:
        return Not(self)

    def _under(self, op: type[And | Or], left: Pattern) -> Pattern:
        """`left op self`; per-head patterns override it to distribute over the heads."""
        return op((left, self))

    def __bool__(self) -> bool:
        # `a and b`, `not a`, `a if p else b` would silently drop a pattern.
        raise InvalidInput("a pattern has no truth value: write & | ~ instead of and, or, not")

    def __repr__(self) -> str:
        raise NotImplementedError


@dataclass(frozen=True, repr=False)
class Leaf(Pattern):
    """A named pattern with parameters. In text, fields with a default go by keyword, the rest by position."""

    name: ClassVar[str]

    def __repr__(self) -> str:
        args = []
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.default is dataclasses.MISSING:
                args.append(show(value))
            elif value != f.default:
                args.append(f"{f.name}={show(value)}")
        return f"{self.name}({', '.join(args)})"


@dataclass(frozen=True, repr=False)
class Derived(Leaf):
    """A named pattern that stands for a combination of others, `body`."""

    def body(self) -> Pattern:
        raise NotImplementedError

    def member(self, q: Int, k: Int, q_len: int, kv_len: int) -> Bool:
        return self.body().member(q, k, q_len, kv_len)

    def lines(self, q_len: int, kv_len: int) -> Lines | None:
        return self.body().lines(q_len, kv_len)

    def check(self, q_len: int, kv_len: int) -> None:
        self.body().check(q_len, kv_len)

    def own_lengths(self) -> tuple[int, int] | None:
        return self.body().own_lengths()

    def transposed(self) -> Pattern:
        return self.body().transposed()


@dataclass(frozen=True, repr=False)
class _Combination(Pattern):
    """And / Or over at least two parts, flattened: (a & b) & c and a & (b & c) are the same pattern."""

    parts: tuple[Pattern, ...]

    symbol: ClassVar[str]

    def __post_init__(self) -> None:
        flat: list[Pattern] = []
        for p in self.parts:
            flat += p.parts if isinstance(p, type(self)) else (p,)
        object.__setattr__(self, "parts", tuple(flat))

    def lines(self, q_len: int, kv_len: int) -> Lines | None:
        found = []
        for p in self.parts:
            part = p.lines(q_len, kv_len)
            if part is None:
                return None
            found.append(part)
        return Lines.merge(found)

    def check(self, q_len: int, kv_len: int) -> None:
        for p in self.parts:
            p.check(q_len, kv_len)

    def own_lengths(self) -> tuple[int, int] | None:
        return first_lengths(self.parts)

    def transposed(self) -> Pattern:
        return type(self)(tuple(p.transposed() for p in self.parts))

    def __repr__(self) -> str:
        # Python's precedence: ~ over & over |.
        return f" {self.symbol} ".join(f"({p})" if isinstance(p, Or) else repr(p) for p in self.parts)


@dataclass(frozen=True, repr=False)
class And(_Combination):
    """Attends where every part attends."""

    symbol: ClassVar[str] = "&"

    def member(self, q: Int, k: Int, q_len: int, kv_len: int) -> Bool:
        out = self.parts[0].member(q, k, q_len, kv_len)
        for p in self.parts[1:]:
            out = out & p.member(q, k, q_len, kv_len)
        return out


@dataclass(frozen=True, repr=False)
class Or(_Combination):
    """Attends where any part attends."""

    symbol: ClassVar[str] = "|"

    def member(self, q: Int, k: Int, q_len: int, kv_len: int) -> Bool:
        out = self.parts[0].member(q, k, q_len, kv_len)
        for p in self.parts[1:]:
            out = out | p.member(q, k, q_len, kv_len)
        return out


@dataclass(frozen=True, repr=False)
class Not(Pattern):
    """Attends where `part` does not. ~~p is p."""

    part: Pattern

    def member(self, q: Int, k: Int, q_len: int, kv_len: int) -> Bool:
        return ~self.part.member(q, k, q_len, kv_len)

    def lines(self, q_len: int, kv_len: int) -> Lines | None:
        return self.part.lines(q_len, kv_len)

    def check(self, q_len: int, kv_len: int) -> None:
        self.part.check(q_len, kv_len)

    def own_lengths(self) -> tuple[int, int] | None:
        return self.part.own_lengths()

    def transposed(self) -> Pattern:
        return ~self.part.transposed()

    def __invert__(self) -> Pattern:
        return self.part

    def __repr__(self) -> str:
        return f"~({self.part})" if isinstance(self.part, _Combination) else f"~{self.part!r}"


@dataclass(frozen=True, repr=False)
class Transposed(Pattern):
    """Key k takes the place of a query: attends to q where `part` has q attend to k."""

    part: Pattern

    def member(self, q: Int, k: Int, q_len: int, kv_len: int) -> Bool:
        return self.part.member(k, q, kv_len, q_len)

    def lines(self, q_len: int, kv_len: int) -> Lines | None:
        return self.part.transposed_lines(q_len, kv_len)

    def check(self, q_len: int, kv_len: int) -> None:
        self.part.check(kv_len, q_len)

    def own_lengths(self) -> tuple[int, int] | None:
        lengths = self.part.own_lengths()
        return None if lengths is None else (lengths[1], lengths[0])

    def transposed(self) -> Pattern:
        return self.part

    def __repr__(self) -> str:
        return f"transpose({self.part!r})"


def transpose(pattern: Pattern) -> Pattern:
    """The mask with queries and keys exchanged; of window(5, 0) that is window(0, 5)."""
    if not isinstance(pattern, Pattern):
        raise InvalidInput(f"transpose: expected a pattern, not a {type(pattern).__name__}")
    return pattern.transposed()


def first_lengths(parts: Iterable[Pattern]) -> tuple[int, int] | None:
    """The lengths of the first part that has its own."""
    return next((lengths for p in parts if (lengths := p.own_lengths()) is not None), None)


def show(value: object) -> str:
    """A parameter in the text form: ints, booleans, strings in double quotes, tuples of these."""
    if isinstance(value, str):
        return '"' + value + '"'
    if isinstance(value, tuple):
        return f"({', '.join(map(show, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, list):
        return f"[{', '.join(map(show, value))}]"
    return repr(value)


def whole(
    owner: str, name: str, value: Any, *, at_least: int | None = None, at_most: int | None = None
) -> int:
    """`value` as an int, or InvalidInput that names the parameter, the value and what is allowed."""
    if at_least is None:
        allowed = "a whole number"
    elif at_most is None:
        allowed = f"a whole number >= {at_least}"
    else:
        allowed = f"a whole number from {at_least} to {at_most}"
    wrong = f"{owner}: {name} is {value!r}, but it must be {allowed}"
    if isinstance(value, (bool, np.bool_)):
        raise InvalidInput(wrong)
    try:
        out = int(value.__index__())
    except (AttributeError, TypeError):
        raise InvalidInput(wrong) from None
    if (
        (at_least is not None and out < at_least)
        or (at_most is not None and out > at_most)
        or abs(out) > 2**40
    ):
        raise InvalidInput(
            wrong if abs(out) <= 2**40 else f"{owner}: {name} is {value!r}, which is too large"
        )
    return out


def choice(owner: str, name: str, value: Any, allowed: Sequence[str]) -> str:
    """`value` if it is one of `allowed`, or InvalidInput."""
    if value not in allowed:
        options = " or ".join(f'"{a}"' for a in allowed)
        raise InvalidInput(f"{owner}: {name} is {value!r}, but it must be {options}")
    return str(value)
