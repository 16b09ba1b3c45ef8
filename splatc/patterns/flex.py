"""FlexAttention's inputs: a mask_mod(b, h, q, kv) and a BlockMask, evaluated element by element and held as
bits.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from splatc.errors import InvalidInput
from splatc.patterns.base import Bool, Int, Pattern
from splatc.patterns.blocks import block_mask
from splatc.patterns.heads import PerHead, per_batch
from splatc.patterns.matrix import mask_from_rows, refuse_large

MaskMod = Callable[[Any, Any, Any, Any], Any]

_CHUNK = 2**22  # elements evaluated at a time
_SAMPLE = 256  # elements of a chunk compared with scalar calls
_BATCHES = 4  # batch indices compared when a mask_mod uses b


def from_mask_mod(
    mask_mod: MaskMod, q_len: int, kv_len: int | None = None, heads: int | None = None, batch: int | None = None
) -> Pattern:
    """The mask of a FlexAttention mask_mod(b, h, q, kv) -> bool, evaluated once here, as a dense matrix of
    bits.

    It is evaluated with torch, as FlexAttention does, if torch is loaded, and with NumPy arrays otherwise. If
    it uses h, `heads` must be given and the result is a per-head pattern; if it depends on b, `batch` and it is
    a per-batch pattern. InvalidInput if they are not given, or if the mask has more than 2**32 elements.
    """
    kv_len = q_len if kv_len is None else kv_len
    refuse_large(q_len, kv_len)
    mod = _MaskMod(mask_mod)

    def rows(b: int, h: int) -> Iterator[Bool]:
        k = np.arange(kv_len, dtype=np.int64)
        step = max(1, _CHUNK // kv_len)
        for lo in range(0, q_len, step):
            yield mod(b, h, np.arange(lo, min(lo + step, q_len), dtype=np.int64), k)

    if mod.uses_h and heads is None:
        raise InvalidInput(f"{mod.name} uses the head index h: say how many heads there are with heads=")

    def entry(b: int) -> Pattern:
        each = tuple(mask_from_rows(rows(b, h), kv_len) for h in range(heads if mod.uses_h and heads else 1))
        return each[0] if len(set(each)) == 1 else PerHead(each)

    first = entry(0)
    if batch is None:
        mod.check_batch(lambda b: entry(b) == first)
    entries = [first, *(entry(b) for b in range(1, batch if mod.uses_b and batch else 1))]
    return first if all(one == first for one in entries) else per_batch(entries)


def from_block_mask(block: Any, heads: int | None = None) -> Pattern:
    """The mask of a torch.nn.attention.flex_attention.BlockMask: its full blocks, and its partial blocks &
    mask_mod.

    Symbolic (`block_mask`) if every block is full, otherwise a matrix of bits. One pattern per head if the
    BlockMask has several heads or its mask_mod uses h; one per batch entry if it has several that differ.
    """
    q_len, kv_len = (int(n) for n in block.seq_lengths)
    bq, bk = (int(n) for n in block.BLOCK_SIZE)
    grid = (-(-q_len // bq), -(-kv_len // bk))
    some = _block_table("kv", block.kv_num_blocks, block.kv_indices, grid)
    full = np.zeros_like(some)
    if block.full_kv_num_blocks is not None:
        full = _block_table("full_kv", block.full_kv_num_blocks, block.full_kv_indices, grid)
    batches, table_heads = some.shape[:2]
    unmasked = getattr(block.mask_mod, "__name__", "") == "noop_mask"
    mod = None if unmasked or not some.any() else _MaskMod(block.mask_mod)

    def one(b: int, h: int) -> Pattern:
        at = (min(b, batches - 1), min(h, table_heads - 1))
        if mod is None or not some[at].any():
            return block_mask(full[at] | (some[at] if unmasked else False), (bq, bk))
        refuse_large(q_len, kv_len)
        return mask_from_rows((rows(mod, b, h, i, full[at], some[at]) for i in range(grid[0])), kv_len)

    def rows(mod: _MaskMod, b: int, h: int, i: int, full: Bool, some: Bool) -> Bool:
        """The mask of one row of blocks."""
        q = np.arange(i * bq, min((i + 1) * bq, q_len), dtype=np.int64)
        out = np.repeat(full[i], bk)[None, :kv_len].repeat(len(q), axis=0)
        k = np.flatnonzero(np.repeat(some[i] & ~full[i], bk)[:kv_len])
        if len(k):
            out[:, k] = mod(b, h, q, k)
        return out

    def entry(b: int) -> Pattern:
        """The pattern of a batch entry."""
        if table_heads == 1 and (mod is None or not mod.uses_h):
            return head(b, 0)
        count = table_heads if table_heads > 1 else heads
        if count is None:
            raise InvalidInput(
                f"the BlockMask's {mod and mod.name} uses the head index h: say how many heads with heads="
            )
        return PerHead(tuple(head(b, h) for h in range(count)))

    def head(b: int, h: int) -> Pattern:
        out = one(b, h)
        if mod is not None and batches == 1:
            mod.check_batch(lambda other: one(other, h) == out)
        return out

    each = [entry(b) for b in range(batches)]
    return each[0] if all(one == each[0] for one in each) else per_batch(each)


def _block_table(name: str, counts: Any, indices: Any, grid: tuple[int, int]) -> Bool:
    """bool[batch, heads, block rows, block columns] from counts[..., R] and indices[..., R, n]."""
    count: Any = counts.detach().cpu().numpy()
    index: Any = indices.detach().cpu().numpy()
    count = count.reshape((1,) * (3 - count.ndim) + count.shape)
    index = index.reshape((1,) * (4 - index.ndim) + index.shape)
    used = np.arange(index.shape[3]) < count[..., None]
    if index.shape[2] != grid[0] or (used & ((index < 0) | (index >= grid[1]))).any():
        raise InvalidInput(
            f"the BlockMask's {name}_indices do not fit its seq_lengths, {grid[0]} x {grid[1]} blocks"
        )
    out = np.zeros((*index.shape[:2], *grid), np.bool_)
    b, h, r, n = np.nonzero(used)
    out[b, h, r, index[b, h, r, n]] = True
    return out


class _OutOfRange(InvalidInput):
    pass


class _MaskMod:
    """A mask_mod to be evaluated on index vectors; knows which of b and h it uses.

    A mask_mod is defined on scalar indices. torch's own create_mask (vmap) keeps that meaning; plain
    broadcasting does not: (q == global_tokens).any() would reduce over all queries. So the NumPy way, which
    broadcasts, compares a sample with scalar calls.
    """

    def __init__(self, fn: MaskMod) -> None:
        self.fn = fn
        self.name = f"mask_mod {getattr(fn, '__name__', type(fn).__name__)!r}"
        self.torch: Any = sys.modules.get("torch")
        self.device = _device_of(fn) if self.torch else "cpu"
        if self.name == "mask_mod '_sliced_mask_mod_error'":
            raise InvalidInput(
                "this BlockMask was cut by indexing, which drops its mask_mod: pass the whole one"
            )
        if self.torch:
            try:
                self._by_vmap(0, 0, np.zeros(1, np.int64), np.zeros(1, np.int64))
            except Exception:  # a function of NumPy arrays, or a broken one: _by_broadcast will say
                self.torch = None if self._takes_numpy() else self.torch
        self(0, 0, np.zeros(1, np.int64), np.zeros(1, np.int64))  # a broken one is told here
        self.uses_b, self.uses_h = self._uses(0), self._uses(1)

    def __call__(self, b: int, h: int, q: Int, k: Int) -> Bool:
        """bool[len(q), len(k)]."""
        try:
            return self._by_vmap(b, h, q, k) if self.torch else self._by_broadcast(b, h, q, k)
        except InvalidInput:
            raise
        except IndexError as e:
            raise _OutOfRange(f"{self.name} reads past the end of a table it holds: {_first_line(e)}") from e
        except Exception as e:
            raise InvalidInput(
                f"{self.name} failed ({type(e).__name__}: {_first_line(e)}): it must be a function of"
                " (b, h, q, kv) built from tensor operations, & | ~ rather than and, or, not"
            ) from e

    def _by_vmap(self, b: int, h: int, q: Int, k: Int) -> Bool:
        from torch.nn.attention.flex_attention import create_mask

        b_t, h_t, q_t, k_t = (self._index(x) for x in (b, h, q, k))

        def at(i: Any, j: Any, x: Any, y: Any) -> Any:
            return self._boolean(self.fn(b_t + i, h_t + j, q_t[x], k_t[y]))

        got = create_mask(at, 1, 1, len(q), len(k), device=self.device)
        out: Bool = got[0, 0].cpu().numpy()
        return out

    def _by_broadcast(self, b: int, h: int, q: Int, k: Int) -> Bool:
        b_a, h_a = np.asarray(b), np.asarray(h)
        got = np.asarray(self._boolean(self.fn(b_a, h_a, q[:, None], k[None, :])))
        out = np.broadcast_to(got, (len(q), len(k))) if got.ndim in (0, 2) else None
        pick = np.random.default_rng(len(q))
        for i, j in zip(
            pick.integers(len(q), size=_SAMPLE), pick.integers(len(k), size=_SAMPLE), strict=True
        ):
            if out is None or bool(self.fn(b_a, h_a, q[i], k[j])) != out[i, j]:
                raise InvalidInput(
                    f"{self.name} is not elementwise in NumPy (does it reduce over an axis?): import torch"
                    " before, and it is evaluated as FlexAttention does"
                )
        assert out is not None
        return out

    def _boolean(self, got: Any) -> Any:
        dtype = getattr(got, "dtype", np.dtype(type(got)))
        if str(dtype) not in ("bool", "torch.bool"):
            raise InvalidInput(f"{self.name} returned {dtype}, but it must return booleans, True = attend")
        return got

    def _takes_numpy(self) -> bool:
        try:
            self._by_broadcast(0, 0, np.zeros(1, np.int64), np.zeros(1, np.int64))
        except Exception:
            return False
        return True

    def _index(self, value: int | Int) -> Any:
        if not self.torch:
            return np.asarray(value, np.int64)
        return self.torch.as_tensor(value, dtype=self.torch.int64, device=self.device)

    def check_batch(self, same: Callable[[int], bool]) -> None:
        """InvalidInput if the mask at some batch index b > 0 is not the same as at 0."""
        for b in range(1, _BATCHES if self.uses_b else 1):
            try:
                equal = same(b)
            except _OutOfRange:
                return  # its tables have no such batch entry
            if not equal:
                raise InvalidInput(
                    f"{self.name} depends on the batch index b: say how many batch entries there are with batch="
                )

    def _uses(self, argument: int) -> bool:
        """Whether the function looks at b (0) or h (1): it is handed an object that tells."""
        probe = _Probe(self._index(0))
        args = [self._index(0), self._index(0)]
        args[argument] = probe
        try:
            self.fn(args[0], args[1], self._index(0), self._index(0))
        except Exception:
            return True  # a real failure shows again, with its message, when the mask is evaluated
        return bool(probe.touched)


class _Probe:
    """Stands for an index; remembers whether its value was used. Asking it for a new tensor is not a use."""

    _FREE = (
        "new_ones",
        "new_zeros",
        "new_full",
        "new_tensor",
        "new_empty",
        "device",
        "dtype",
        "shape",
        "ndim",
    )

    def __init__(self, real: Any) -> None:
        self.__dict__.update(real=real, touched=False)

    def __getattr__(self, name: str) -> Any:
        if name not in self._FREE:
            self.__dict__["touched"] = True
        return getattr(self.__dict__["real"], name)

    __hash__ = None  # type: ignore[assignment]


def _touch(name: str) -> Callable[..., Any]:
    def method(self: _Probe, *args: Any, **kwargs: Any) -> Any:
        self.__dict__["touched"] = True
        raise TypeError(f"{name} on a probe")

    return method


_OPERATORS = (
    *(
        "add",
        "sub",
        "mul",
        "matmul",
        "truediv",
        "floordiv",
        "mod",
        "pow",
        "lshift",
        "rshift",
        "and",
        "xor",
        "or",
    ),
)
_OTHERS = (
    *("eq", "ne", "lt", "le", "gt", "ge", "neg", "pos", "abs", "invert", "bool", "int", "float", "index"),
    *("len", "iter", "getitem", "contains", "array", "str", "repr"),
)
for _name in (
    *_OPERATORS,
    *(f"r{op}" for op in _OPERATORS),
    *_OTHERS,
):
    setattr(_Probe, f"__{_name}__", _touch(_name))


def _first_line(e: Exception) -> str:
    return (str(e).strip().splitlines() or [""])[0]


def _device_of(fn: Any, depth: int = 4) -> Any:
    """The device of a tensor that `fn` refers to; one that is not the CPU is preferred."""
    found = "cpu"
    if depth == 0:
        return found
    if isinstance(fn, partial):
        held = [fn.func, *fn.args, *fn.keywords.values()]
    else:
        code, scope = getattr(fn, "__code__", None), getattr(fn, "__globals__", {})
        cells = getattr(fn, "__closure__", None) or ()
        held = [c.cell_contents for c in cells if c != type(c)()]
        held += [scope[n] for n in getattr(code, "co_names", ()) if n in scope]
        held += (
            [*(getattr(fn, "__defaults__", None) or ()), *vars(fn).values()]
            if hasattr(fn, "__dict__")
            else []
        )
    for item in held:
        for x in item if isinstance(item, (list, tuple)) else [item]:
            device = getattr(x, "device", None) if type(x).__module__.startswith("torch") else None
            if device is None and callable(x) and not isinstance(x, type):
                device = _device_of(x, depth - 1)
            if device is not None and str(device) != "cpu":
                return device
    return found
