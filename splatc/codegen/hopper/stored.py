"""Values as they are stored: as unsigned integers of their size, so that kernels of all types move them alike."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Sequence

from tvm.script import tirx as T

from splatc.codegen.hopper.emit import Expr, do, registers
from splatc.codegen.hopper.products import PTX_TYPE
from splatc.codegen.hopper.shape import ITEM_BYTES


def type_of(dtype: str) -> str:
    """The type that values are moved as."""
    return f"uint{8 * ITEM_BYTES[dtype]}"


def words_of(values: Sequence[Expr], dtype: str) -> list[Expr]:
    """float32 values as they are stored, in 32-bit words."""
    if dtype == "float32":
        return [T.reinterpret("uint32", x) for x in values]
    words = registers("rounded", len(values) // 2, "uint32")
    for i in range(len(values) // 2):
        do(T.ptx[f"cvt.rn.{PTX_TYPE[dtype]}x2.f32"](words[i], values[2 * i + 1], values[2 * i]))
    return [words[i] for i in range(len(values) // 2)]


def values_of(words: Sequence[Expr], dtype: str) -> list[Expr]:
    """The float32 values of words."""
    if dtype == "float32":
        return [T.reinterpret("float32", word) for word in words]
    return [value for word in words for value in unpack(word, dtype)]


def split(words: Sequence[Expr], dtype: str) -> list[Expr]:
    """The values in words, each as it is stored."""
    if dtype == "float32":
        return list(words)
    return [T.cast(T.bitwise_and(T.shift_right(word, T.uint32(16 * i)), T.uint32(0xFFFF)), "uint16")
            for word in words for i in range(2)]  # fmt: skip


def unpack(word: Expr, half: str) -> tuple[Expr, Expr]:
    """The two halves of a word as fp32."""
    if half == "bfloat16":
        low, high = T.shift_left(word, T.uint32(16)), T.bitwise_and(word, T.uint32(0xFFFF0000))
        return T.reinterpret("float32", low), T.reinterpret("float32", high)
    parts = (T.bitwise_and(word, T.uint32(0xFFFF)), T.shift_right(word, T.uint32(16)))
    low, high = (T.cast(T.reinterpret("float16", T.cast(part, "uint16")), "float32") for part in parts)
    return low, high
