"""Words for emitting TIRx with an IRBuilder: what Python's own syntax says in a parsed function."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as I

from splatc.codegen.constants import FULL_WARP

Expr = Any
MIN_BLOCKS = "tirx.launch_bounds_min_blocks_per_sm"  # an attribute around a kernel's body


@contextmanager
def kernel_function(name: str) -> Iterator[Callable[[], Expr]]:
    """In it: the parameters of a function of this name, I.device_entry(), its body. After it, call what this gives: the
    function, not lowered."""
    with IRBuilder() as builder, I.prim_func():
        I.func_name(name)
        yield lambda: builder.get().with_attr("global_symbol", name)


@contextmanager
def when(condition: Expr) -> Iterator[None]:
    """if condition: ..."""
    with I.If(condition), I.Then():
        yield


def emit_if(condition: Expr | bool, body: Callable[[], None]) -> None:
    """if condition: body(), decided now where the condition is known."""
    if condition is True:
        body()
    elif condition is not False:
        with when(condition):
            body()


@contextmanager
def loop(count: Expr) -> Iterator[Expr]:
    """for i in range(count): ..."""
    with I.serial(0, count) as i:
        yield i


class Cell:
    """A mutable scalar in a register: call it to read, ``set`` it to write."""

    def __init__(self, name: str, value: Expr, dtype: str = "int32") -> None:
        self._buffer = named(name, I.alloc_local((1,), dtype))
        self.set(value)

    def __call__(self) -> Expr:
        return self._buffer[0]

    def set(self, value: Expr) -> None:
        I.buffer_store(self._buffer, value, [0])


def named(name: str, value: Expr) -> Expr:
    """value, called ``name`` in the generated code."""
    IRBuilder.name(name, value)
    return value


def let(name: str, value: Expr) -> Expr:
    """A constant of this scope."""
    return named(name, I.Bind(value))


def kept(name: str, value: Expr, dtype: str = "int32") -> Expr:
    """A constant in a register: what TVM knows the value of it may compute anew wherever it is used."""
    return Cell(name, value, dtype)()


def from_lane(value: Expr, lane: Expr) -> Expr:
    """The value of another lane of the warp."""
    return T.tvm_warp_shuffle(T.uint32(FULL_WARP), value, lane, 32, 32)


def do(call: Expr) -> None:
    """Emit a call for its effect."""
    I.evaluate(call)


def call_source(function: tuple[str, str], *arguments: Expr) -> None:
    """Call a device function given as (name, its source)."""
    name, source = function
    do(T.cuda.func_call(name, *arguments, source_code=source))


def store(buffer: Expr, index: Expr, value: Expr) -> None:
    """buffer[index] = value, for a flat buffer."""
    I.buffer_store(buffer, value, [index])


def registers(name: str, count: int, dtype: str = "float32") -> Expr:
    """An array in registers: index it with Python integers only."""
    return named(name, I.alloc_local((count,), dtype))


def follow_kernels_before() -> None:
    """All threads: wait for the kernels before in the stream, and let the next one start setting itself up.

    For launches that allow programmatic dependence; else both do nothing.
    """
    wait_for_kernels_before()
    let_next_kernel_start()


def wait_for_kernels_before() -> None:
    """Until the kernels before in the stream have ended, and what they wrote is there."""
    do(T.ptx.griddepcontrol.wait())


def let_next_kernel_start() -> None:
    """When all blocks have said so, the next kernel in the stream may set itself up, and run where there is room."""
    do(T.ptx.griddepcontrol.launch_dependents())
