"""Dynamic shared memory of a block, handed out piece by piece."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from tvm.script import tirx as T
from tvm.tirx import AttrStmt, Evaluate, IntImm
from tvm.tirx.script.builder import ir as I

from splatc.codegen.hopper.emit import Expr


class SharedMemory:
    """TVM's pool, on memory that is declared here: a pool that declares its own reads the source of every function on
    Python's stack for it, which is a third of the time of emitting a kernel.

    size: bytes handed out so far.
    """

    def __init__(self) -> None:
        self._pool = T.SMEMPool(I.alloc_buffer([0], "uint8", scope="shared.dyn").data)

    @property
    def size(self) -> int:
        return int(self._pool.offset)

    def alloc(self, shape: tuple[int, ...], dtype: str, align: int) -> Expr:
        """A piece, beginning at a multiple of ``align`` bytes."""
        return self._pool.alloc(shape, dtype, align=align)

    def commit(self) -> None:
        """There will be no more."""
        I.add_to_parent(AttrStmt(0, "tirx.dyn_smem_bytes", IntImm("int64", self.size), Evaluate(0)))
