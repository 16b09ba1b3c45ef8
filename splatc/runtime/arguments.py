"""A kernel's arguments in memory, as the driver reads them: set by name, then moved to new tensors by each launch."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from splatc.errors import VerifyError
from splatc.runtime.driver import MAP_BYTES, Driver
from splatc.runtime.tensor_map import Geometry

CELL = 8  # bytes of every argument but a map
_MAP_ALIGNMENT = 128
_SCALARS: dict[str, Any] = {
    "pointer": ctypes.c_uint64, "int64": ctypes.c_int64, "int32": ctypes.c_int32, "float32": ctypes.c_float,
}  # fmt: skip


@dataclass(frozen=True)
class Function:
    """A loaded __global__ function. kernel: the driver's handle; parameters: (kind, name) as in codegen/emitted.py."""

    name: str
    kernel: int
    threads: int
    smem_bytes: int
    parameters: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Map:
    """A CUtensorMap in memory of ours, of the tensor called ``tensor``."""

    tensor: str
    memory: Any
    address: int


class Arguments:
    """The arguments of one launch of a function.

    cells: the values; array: pointers to them and to the maps, as cuLaunchKernelEx takes them.
    """

    def __init__(self, function: Function, values: Mapping[str, float], maps: Mapping[str, Map]) -> None:
        """values: numbers and addresses by parameter; maps by parameter. Parameters that no one uses are left out by
        compilers, so what the function does not ask for is ignored; VerifyError if it asks for what is not here."""
        count = len(function.parameters)
        self._cells = (ctypes.c_uint64 * count)()
        self._slots: dict[str, Any] = {}
        self.maps = {name: maps[name] for kind, name in function.parameters if kind == "map" and name in maps}
        self.array = (ctypes.c_void_p * count)()
        for i, (kind, name) in enumerate(function.parameters):
            if name not in (maps if kind == "map" else values):
                raise VerifyError(f"{function.name} asks for {name} ({kind}), unknown to launches; please report this")
            if kind == "map":
                self.array[i] = maps[name].address
                continue
            slot = _SCALARS[kind].from_buffer(self._cells, CELL * i)
            slot.value = int(values[name]) if kind != "float32" else values[name]
            self._slots[name] = slot
            self.array[i] = ctypes.addressof(self._cells) + CELL * i

    def slot(self, name: str) -> Any:
        """The ctypes number behind a parameter, to assign ``.value`` to; None where the function has none."""
        return self._slots.get(name)


def encode(driver: Driver, tensor: str, dtype: str, geometry: Geometry, address: int) -> Map:
    """A tensor map of ``tensor``, at ``address``."""
    memory = (ctypes.c_uint8 * (MAP_BYTES + _MAP_ALIGNMENT))()
    start = -(-ctypes.addressof(memory) // _MAP_ALIGNMENT) * _MAP_ALIGNMENT
    driver.encode_map(start, dtype, address, geometry.dims, geometry.strides, geometry.box, geometry.swizzled)
    return Map(tensor, memory, start)


class Bound:
    """Whatever holds the address of one tensor: arguments and tensor maps."""

    __slots__ = ("_driver", "_maps", "_slots", "address")

    def __init__(self, driver: Driver, slots: Iterable[Any], maps: Iterable[Map], address: int) -> None:
        self._driver, self.address = driver, address
        self._slots = tuple(slot for slot in slots if slot is not None)
        self._maps = tuple({one.address: one for one in maps}.values())
        for slot in self._slots:
            slot.value = address

    def move(self, address: int) -> None:
        """The tensor is at ``address`` now."""
        for slot in self._slots:
            slot.value = address
        for one in self._maps:
            self._driver.replace_address(one.address, address)
        self.address = address
