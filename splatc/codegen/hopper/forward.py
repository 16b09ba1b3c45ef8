"""The kernel: o, lse = softmax(scale * Q K^T over the tiles of a table) V, for any mask.

A block holds the producer's warpgroup and m/64 consumer warpgroups of 64 query rows each. The producer takes row tiles
from the queue and loads Q, then K, mask bits and V of every column tile, through the rings. A consumer keeps its O in
registers; while its warpgroup does the softmax of one tile, the tensor cores do the next S = Q K^T and the last PV, and
the other warpgroups' products. Tables and parameters: docs/architecture.md.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import tvm

from splatc.codegen.emitted import DeviceFunction, Emitted
from splatc.codegen.hopper import combine
from splatc.codegen.hopper.block import Arguments, Block
from splatc.codegen.hopper.consumer import Consumer
from splatc.codegen.hopper.gathering import GatheringProducer
from splatc.codegen.hopper.producer import Producer
from splatc.codegen.hopper.pruning import PruningConsumer
from splatc.codegen.hopper.shape import shape_of
from splatc.codegen.hopper.turning import TurningProducer
from splatc.codegen.hopper.walk import walking_kernel
from splatc.codegen.kernel import KernelSpec

NAME = "splatc_attention"


def producer_of(block: Block) -> Producer:
    """The producer for the block's sizes."""
    if block.s.turned:
        return TurningProducer(block)
    return (GatheringProducer if block.s.gather else Producer)(block)


def consumer_of(block: Block) -> Consumer:
    """The consumer for the block's sizes."""
    return (PruningConsumer if block.s.pruned else Consumer)(block)


def attention_hopper(spec: KernelSpec) -> Emitted:
    """The fused forward for a spec with kernel "hopper", not lowered. Raises Unsupported if it does not fit."""
    s = shape_of(spec)
    function, smem_bytes = walking_kernel(NAME, s, Arguments, Block, lambda block: producer_of(block).run(),
                                          lambda block: consumer_of(block).run())  # fmt: skip
    functions = (DeviceFunction(f"{NAME}_kernel", s.threads, smem_bytes),
                 DeviceFunction(f"{combine.NAME}_kernel", combine.THREADS, 0))  # fmt: skip
    return Emitted(tvm.IRModule({NAME: function, combine.NAME: combine.combine_parts(s)}), functions)
