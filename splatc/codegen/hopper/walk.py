"""The shell of every kernel that walks over tiles: one warpgroup copies, the others compute."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as I

from splatc.codegen.hopper.emit import MIN_BLOCKS, do, kernel_function


def walking_kernel(name: str, s: Any, arguments: Callable[[Any], Any], block_of: Callable[[Any, Any], Any],
                   produce: Callable[[Any], None], consume: Callable[[Any], None]):  # fmt: skip
    """(the function, its bytes of dynamic shared memory).

    s: sizes, with ``registers`` of a thread of either kind. arguments(s) declares parameters, block_of(s, arguments)
    what all threads of a block share; produce(block) is for its first warpgroup, consume(block) for the others.
    """
    with kernel_function(name) as made:
        a = arguments(s)
        I.device_entry()
        with I.attr({MIN_BLOCKS: s.blocks}):
            block = block_of(s, a)
            block.start()
            of_producer, of_consumer = s.registers
            with I.If(T.EQ(block.warpgroup, 0)):
                with I.Then():
                    do(T.ptx["setmaxnreg.dec.sync.aligned.u32"](of_producer))
                    produce(block)
                with I.Else():
                    do(T.ptx["setmaxnreg.inc.sync.aligned.u32"](of_consumer))
                    consume(block)
    return made(), block.smem_bytes
