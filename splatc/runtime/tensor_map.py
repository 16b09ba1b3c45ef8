"""Tensor maps: how the tensor memory accelerator sees a tensor through a view, as plain numbers.

A map has five dimensions: (head_dim, x1, x2, x3, batch and head). The first is contiguous; x1 x2 x3 are the view's; the
last holds every head of every batch entry at ``batch * step + head``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from splatc.codegen.hopper.shape import ROW_BYTES

ALIGNMENT = 16  # of addresses and strides, in bytes
_MAX_STRIDE = 1 << 40  # bytes
_MAX_EXTENT = 1 << 31  # coordinates are int32

Quintuple = tuple[int, int, int, int, int]
Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Layout:
    """A tensor as (batch, heads, seq, dim): its sizes, and its strides in elements; dim is contiguous."""

    batch: int
    heads: int
    length: int
    dim: int
    batch_stride: int
    head_stride: int
    seq_stride: int
    itemsize: int

    @property
    def step(self) -> int:
        """What a batch entry adds to the last coordinate."""
        if self.batch == 1 or self.batch_stride == 0:
            return 0
        return 1 if self.heads == 1 else self.batch_stride // self.head_stride

    @property
    def last(self) -> tuple[int, int]:
        """(extent, stride in elements) of the last dimension."""
        stride = self.batch_stride if self.heads == 1 else self.head_stride
        return (self.batch - 1) * self.step + self.heads, stride

    def one_head(self) -> Layout:
        """The first head alone: enough where all heads are one and the same (head_stride 0)."""
        return replace(self, heads=1)

    def mappable(self) -> bool:
        """Whether maps of this layout exist: strides and sizes allow it. (A contiguous tensor's always do.)"""
        used = [self.seq_stride] if self.length > 1 else []
        if self.heads > 1:
            used.append(self.head_stride)
        if min(used, default=1) <= 0:
            return False
        if self.step:
            used.append(self.batch_stride)
            if self.heads > 1 and self.batch_stride % self.head_stride:
                return False
        sizes = [stride * self.itemsize for stride in used]
        fits = all(size % ALIGNMENT == 0 and size < _MAX_STRIDE for size in sizes)
        return fits and self.last[0] < _MAX_EXTENT and self.dim * self.itemsize % ALIGNMENT == 0


@dataclass(frozen=True)
class Geometry:
    """The numbers of a CUtensorMap: dims and box in elements, strides in bytes (of all dimensions but the first).

    swizzled: rows of the box are 128 bytes in shared memory, with the swizzle of wgmma; else they lie as they are.
    """

    dims: Quintuple
    strides: tuple[int, int, int, int]
    box: Quintuple
    swizzled: bool = True


def geometry(view: Sequence[int], box: Sequence[int], layout: Layout) -> Geometry:
    """The map of boxes of ``box`` (b1, b2, b3) rows in a row of a view table (extents, strides, ...)."""
    n1, n2, n3 = (max(int(n), 1) for n in view[:3])
    b1, b2, b3 = (int(b) for b in box)
    last, last_stride = layout.last
    steps = [*(int(s) * layout.seq_stride for s in view[3:6]), last_stride]
    s1, s2, s3, s4 = (  # of a dimension of one: any valid stride
        (step if n > 1 else layout.dim) * layout.itemsize for n, step in zip((n1, n2, n3, last), steps, strict=True)
    )
    return Geometry((layout.dim, n1, n2, n3, last), (s1, s2, s3, s4), (ROW_BYTES // layout.itemsize, b1, b2, b3, 1))


def grouped(view: Sequence[int], box: Sequence[int], layout: Layout) -> Geometry:
    """The map of a pruned kernel's keys, of tiles of a contiguous view: (head_dim, 2, groups of 4, 2, last).

    Key 4c + 2h + e of a box is row h n/2 + 2c + e of it in shared memory (codegen/hopper/prune.py). The length is a
    multiple of 4: maps know no other end.
    """
    n, step, (last, last_stride) = int(box[0]), layout.seq_stride, layout.last
    steps = step, 4 * step, 2 * step, last_stride if last > 1 else layout.dim
    s1, s2, s3, s4 = (size * layout.itemsize for size in steps)
    dims = layout.dim, 2, layout.length // 4, 2, last
    return Geometry(dims, (s1, s2, s3, s4), (ROW_BYTES // layout.itemsize, 2, n // 4, 2, 1))


def unswizzled(view: Sequence[int], box: Sequence[int], layout: Layout) -> Geometry:
    """The same for boxes of whole rows that lie one after the other in shared memory."""
    swizzled = geometry(view, box, layout)
    return replace(swizzled, box=(layout.dim, *swizzled.box[1:]), swizzled=False)


def sub_box(box: Sequence[int], parts: int) -> tuple[Triple, Triple]:
    """(box, step) of ``parts`` equal parts of a box, in the order of its lanes: part i lies i * step further."""
    axis = max((i for i in range(3) if box[i] > 1), default=0)
    side = int(box[axis]) // parts
    part, step = [int(b) for b in box], [0, 0, 0]
    part[axis] = step[axis] = side
    return (part[0], part[1], part[2]), (step[0], step[1], step[2])
