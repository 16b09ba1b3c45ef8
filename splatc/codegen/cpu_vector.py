"""Vectors of TIRx for the CPU kernel: loads, stores, registers, a transpose, and exp2 from arithmetic only.

Every function emits into the IRBuilder that is active when it is called.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as I

Expr = Any  # TVM's expressions carry no static types

LOG2E = 1.0 / math.log(2.0)
LN2 = math.log(2.0)


def vector_type(lanes: int, dtype: str = "float32") -> str:
    """TVM's name of a vector type: "float32x16"."""
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def constant(value: float, lanes: int, dtype: str = "float32") -> Expr:
    """A vector of equal constants."""
    scalar = getattr(T, dtype)(value)
    return scalar if lanes == 1 else T.Broadcast(scalar, lanes)


def lane_range(base: Expr, lanes: int) -> Expr:
    """The last index of a buffer access that reads or writes `lanes` neighbours from `base`."""
    return base if lanes == 1 else T.Ramp(base, 1, lanes)


def load(buffer: Expr, base: Expr, lanes: int) -> Expr:
    """`lanes` neighbours of a flat buffer, from index `base`."""
    return buffer[lane_range(base, lanes)]


def store(buffer: Expr, base: Expr, value: Expr, lanes: int) -> None:
    """Write `lanes` neighbours of a flat buffer, from index `base`."""
    I.buffer_store(buffer, value, [lane_range(base, lanes)])


def pieces(size: int, lanes: int) -> Iterator[tuple[int, int]]:
    """Cut [0, size) into (offset, width), each width a power of two and at most `lanes`."""
    at = 0
    while at < size:
        width = min(lanes, 1 << ((size - at).bit_length() - 1))
        yield at, width
        at += width


def scratch(size: int, dtype: str = "float32") -> Expr:
    """Memory of the worker: from TVM's thread-local workspace, or the stack when it is below a kilobyte."""
    return I.alloc_buffer((size,), dtype, align=64)


class Register:
    """A mutable vector: a stack slot that LLVM promotes to a register, as all accesses have a constant index.

    TVM's simplifier does not look through it, so it also hides a value from algebra that floats do not obey.
    """

    def __init__(self, lanes: int, value: Expr | None = None, dtype: str = "float32") -> None:
        self.lanes = lanes
        self.slot = scratch(lanes, dtype)
        if value is not None:
            self.set(value)

    def get(self) -> Expr:
        return load(self.slot, 0, self.lanes)

    def set(self, value: Expr) -> None:
        store(self.slot, 0, value, self.lanes)


def converted(value: Expr, lanes: int, dtype: str) -> Expr:
    """A loaded vector in another float type. TVM converts a bfloat16 rightly only where the result is stored at once;
    elsewhere it takes the bits for a whole number."""
    return Register(lanes, value.astype(vector_type(lanes, dtype)), dtype).get()


def transpose(vectors: list[Expr]) -> list[Expr]:
    """Transpose n vectors of n lanes, n a power of two.

    Interleaving the first half of n * n values with the second rotates the bits of their index by one;
    after log2(n) rounds the bits of the row and of the lane have changed places.
    """
    n = len(vectors)
    low, high = ([half + i // 2 + n * (i % 2) for i in range(n)] for half in (0, n // 2))
    for _ in range(n.bit_length() - 1):
        pairs = zip(vectors[: n // 2], vectors[n // 2 :], strict=True)
        vectors = [I.Bind(T.Shuffle([a, b], order)) for a, b in pairs for order in (low, high)]
    return vectors


def exp2_polynomial(degree: int) -> list[float]:
    """Coefficients, constant first, of 2^f on [-1/2, 1/2], interpolated at Chebyshev nodes."""
    nodes = 0.5 * np.cos(np.pi * (np.arange(degree + 1) + 0.5) / (degree + 1))
    return [float(c) for c in np.polynomial.polynomial.polyfit(nodes, 2.0**nodes, degree)]


@dataclass(frozen=True)
class Exp2:
    """How 2^x is put together in a float type: a polynomial, and where the exponent lies."""

    polynomial: tuple[float, ...]
    fraction: int  # bits
    bias: int  # of the exponent
    bits: str  # the unsigned integer of that size

    @property
    def round(self) -> float:
        """x + round has n + bias in its low bits, n the integer nearest to x."""
        return 1.5 * 2.0**self.fraction + self.bias


FLUSHED = 17
EXP2 = {
    "float32": Exp2(tuple(exp2_polynomial(5)), 23, 127, "uint32"),  # relative error 1.0e-7
    "float64": Exp2(tuple(exp2_polynomial(11)), 52, 1023, "uint64"),
}


def exp2(x: Expr, lanes: int, dtype: str = "float32", flush: bool = False) -> Expr:
    """2^x for x <= 0, or not far above: relative error 2e-7 (float64: 1e-15), 0 below -bias and for -inf, NaN for NaN.

    libm's exp2 would be called lane by lane. 2^x = p(x - n) * 2^n, and 2^n has n + bias as its exponent field:
    0 at n = -bias, where the float is 0 too. flush: 0 below 2^(FLUSHED - bias), so that products of a result with
    numbers of usual size are no denormals, with which processors are slow.
    """
    form = EXP2[dtype]
    least = constant(-float(form.bias), lanes, dtype)
    if flush:
        x = I.Bind(x)
        x = I.Bind(T.Select(x < constant(float(FLUSHED - form.bias), lanes, dtype), least, x))  # keeps a NaN
    else:
        x = I.Bind(T.max(least, x))  # (a > b ? a : b): keeps a NaN in x
    # hidden: TVM takes (x + c) - c for x
    shifted = Register(lanes, x + constant(form.round, lanes, dtype), dtype)
    whole = T.reinterpret(vector_type(lanes, form.bits), shifted.get()) << constant(form.fraction, lanes, form.bits)
    f = I.Bind(x - (shifted.get() - constant(form.round, lanes, dtype)))
    p = constant(form.polynomial[-1], lanes, dtype)
    for c in reversed(form.polynomial[:-1]):
        p = p * f + constant(c, lanes, dtype)
    return p * T.reinterpret(vector_type(lanes, dtype), whole)
