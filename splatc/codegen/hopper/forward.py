"""The kernel: o, lse = softmax(scale * Q K^T over the tiles of a table) V, for any mask.

A block holds the producer's warpgroup and m/64 consumer warpgroups of 64 query rows each. The producer takes row tiles
from the queue and loads Q, then K, mask bits and V of every column tile, through the rings. A consumer keeps its O in
registers; while its warpgroup does the softmax of one tile, the tensor cores do the next S = Q K^T and the last PV, and
the other warpgroups' products. Tables and parameters: docs/architecture.md.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import tvm
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as I

from splatc.codegen.emitted import DeviceFunction, Emitted
from splatc.codegen.hopper import combine
from splatc.codegen.hopper.block import Arguments, Block
from splatc.codegen.hopper.consumer import Consumer
from splatc.codegen.hopper.emit import do
from splatc.codegen.hopper.gathering import GatheringProducer
from splatc.codegen.hopper.producer import Producer
from splatc.codegen.hopper.shape import shape_of
from splatc.codegen.hopper.turning import TurningProducer
from splatc.codegen.kernel import KernelSpec

NAME = "splatc_attention"


def producer_of(block: Block) -> Producer:
    """The producer for the block's sizes."""
    if block.s.turned:
        return TurningProducer(block)
    return (GatheringProducer if block.s.gather else Producer)(block)


def attention_hopper(spec: KernelSpec) -> Emitted:
    """The fused forward for a spec with kernel "hopper", not lowered. Raises Unsupported if it does not fit."""
    s = shape_of(spec)
    with IRBuilder() as builder:
        with I.prim_func():
            I.func_name(NAME)
            a = Arguments(s)
            I.device_entry()
            with I.attr({"tirx.launch_bounds_min_blocks_per_sm": 1}):
                block = Block(s, a)
                block.start()
                with I.If(T.EQ(block.warpgroup, 0)):
                    with I.Then():
                        do(T.ptx["setmaxnreg.dec.sync.aligned.u32"](s.registers[0]))
                        producer_of(block).run()
                    with I.Else():
                        Consumer(block).run()
    function = builder.get().with_attr("global_symbol", NAME)
    functions = (DeviceFunction(f"{NAME}_kernel", s.threads, block.smem_bytes),
                 DeviceFunction(f"{combine.NAME}_kernel", combine.THREADS, 0))  # fmt: skip
    return Emitted(tvm.IRModule({NAME: function, combine.NAME: combine.combine_parts(s)}), functions)
