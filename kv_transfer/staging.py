"""A pool that the host cannot address: blocks go through a buffer of the host, piece by piece.

What a device must be able to do is ``Device``. ``HostDevice`` does it in host memory: the twin that tests run, as a
real device is not always there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from kv_transfer.layout import KVLayout
from kv_transfer.plan import IntArray, PairPlan, Part, Side
from kv_transfer.pool import BlockPool
from kv_transfer.tensors import Memory, place_tensors
from kv_transfer.views import AnyArray, BlockView, ByteArray

# Of the host's buffer, and of what the device packs at a time.
STAGING_BYTES = 4 << 20


class Device(ABC):
    """Copies between strided memory of a device and the host. Calls come from one thread at a time for each view."""

    @abstractmethod
    def strided(self, memory: Memory, shape: tuple[int, ...], strides: tuple[int, ...], offset: int, word: str) -> Any:
        """An array of the device's own kind over a region; ``word`` is its dtype, offset and strides are in bytes."""

    @abstractmethod
    def staging(self, num_bytes: int) -> ByteArray:
        """A buffer of the host that the device copies from and to at its best. Called a few times for each peer."""

    @abstractmethod
    def download(self, array: Any, index: tuple[IntArray, ...], out: AnyArray) -> None:
        """``out[...] = array[index]``; ``out`` lies in the staging buffer, and is complete when this returns."""

    @abstractmethod
    def upload(self, array: Any, index: tuple[IntArray, ...], data: AnyArray) -> None:
        """``array[index] = data``; ``data`` lies in the staging buffer. The device has all when this returns."""


class HostDevice(Device):
    """Host memory in the part of a device's."""

    def __init__(self, regions: Sequence[ByteArray]) -> None:
        self._regions = {region.ctypes.data: region for region in regions}

    def strided(self, memory: Memory, shape: tuple[int, ...], strides: tuple[int, ...], offset: int, word: str) -> Any:
        return np.ndarray(shape, word, self._regions[memory.address].data, offset, strides)

    def staging(self, num_bytes: int) -> ByteArray:
        return np.empty(num_bytes, np.uint8)

    def download(self, array: Any, index: tuple[IntArray, ...], out: AnyArray) -> None:
        out[...] = array[index]

    def upload(self, array: Any, index: tuple[IntArray, ...], data: AnyArray) -> None:
        array[index] = data


class DevicePool(BlockPool):
    """KV blocks in tensors of a device.

    Peers fetch from it by ``tcp``, and by ``rdma`` where the NIC can register its memory; into it, blocks can be
    fetched by ``shm`` too. Blocks must be complete on the device, not just queued there, when they are given to
    ``send_blocks``. Keeps the tensors alive.
    """

    def __init__(self, layout: KVLayout, tensors: Sequence[Any], names: Sequence[str], device: Device) -> None:
        """See ``place_tensors`` for the arguments.

        Raises:
            InvalidLayout: the tensors are not what the layout says.
        """
        placed, self._memory = place_tensors(layout, tensors, names)
        super().__init__(placed)
        self._tensors, self._device = tuple(tensors), device

    @property
    def memory(self) -> tuple[Memory, ...]:
        return tuple(self._memory)

    def view(self, plan: PairPlan, side: str) -> BlockView:
        return StagedView(plan, side, self.layout.num_blocks, self._memory, self._device)


class StagedView(BlockView):
    """One side of a plan on a device's pool."""

    def __init__(self, plan: PairPlan, side: str, num_blocks: int, memory: Sequence[Memory], device: Device) -> None:
        super().__init__(plan)
        self._device, self._units = device, plan.src_units if side == "src" else plan.dst_units
        self._parts = [
            (part, self._array(part, part.src if side == "src" else part.dst, num_blocks, memory))
            for part in plan.parts
        ]
        largest = max((part.num_bytes for part in plan.parts), default=1)
        self._most = max(1, STAGING_BYTES // largest)
        self._staging = device.staging(self._most * largest)

    def gather(self, ids: IntArray, out: ByteArray | None = None) -> ByteArray:
        packed = np.empty(len(ids) * self.unit_bytes, np.uint8) if out is None else out
        for array, index, staged, piece in self._pieces(ids):
            self._device.download(array, index, staged)
            packed[piece] = staged.reshape(-1).view(np.uint8)
        return packed

    def scatter(self, ids: IntArray, data: ByteArray) -> None:
        for array, index, staged, piece in self._pieces(ids):
            staged.reshape(-1).view(np.uint8)[:] = data[piece]
            self._device.upload(array, index, staged)

    def _pieces(self, ids: IntArray) -> list[tuple[Any, tuple[IntArray, ...], AnyArray, slice]]:
        """What is copied at a time: from or to where on the device, through what, and which of the packed bytes."""
        found: list[tuple[Any, tuple[IntArray, ...], AnyArray, slice]] = []
        start = 0
        for part, array in self._parts:
            for first in range(0, len(ids), self._most):
                some = ids[first : first + self._most]
                num_bytes = len(some) * part.num_bytes
                shape = (len(some), *array.shape[2:])
                staged = self._staging[:num_bytes].view(array.dtype).reshape(shape)
                index = (some // self._units, some % self._units)
                found.append((array, index, staged, slice(start, start + num_bytes)))
                start += num_bytes
        return found

    def _array(self, part: Part, side: Side, num_blocks: int, memory: Sequence[Memory]) -> Any:
        """[num_blocks, units of a block, ...] of words."""
        numbers = [part.shape[-1], side.offset, side.block_stride, side.unit_stride, *side.strides]
        word = np.dtype(np.uint8) if any(number % 8 for number in numbers) else np.dtype(np.uint64)
        *counts, run = part.shape
        return self._device.strided(
            memory[side.region],
            (num_blocks, self._units, *counts, run // word.itemsize),
            (side.block_stride, side.unit_stride, *side.strides, word.itemsize),
            side.offset,
            word.name,
        )
