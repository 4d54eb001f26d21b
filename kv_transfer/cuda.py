"""CUDA memory behind ``kv_transfer.staging``, through cupy. Not run by the tests: they have no such device.

Blocks are packed by one gather kernel for each part of a plan and copied into page-locked memory, and the other way
round, on a stream of its own, which does not wait for the engine's.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from kv_transfer.errors import DeviceUnavailable
from kv_transfer.plan import IntArray
from kv_transfer.staging import Device
from kv_transfer.tensors import Memory
from kv_transfer.views import AnyArray, ByteArray


class CudaDevice(Device):
    """One GPU of this process.

    Raises:
        DeviceUnavailable: cupy is not installed, or finds no such device.
    """

    def __init__(self, number: int = 0) -> None:
        try:
            self._cupy: Any = importlib.import_module("cupy")
        except ImportError as exc:
            raise DeviceUnavailable(f"cuda:{number}", "needs cupy: pip install 'splitwise-sched[cuda]'") from exc
        try:
            self._device = self._cupy.cuda.Device(number)
            with self._device:
                self._stream = self._cupy.cuda.Stream(non_blocking=True)
        except Exception as exc:
            # cupy raises errors of the driver, of the runtime, and its own, by what is missing.
            raise DeviceUnavailable(f"cuda:{number}", str(exc)) from exc

    def strided(self, memory: Memory, shape: tuple[int, ...], strides: tuple[int, ...], offset: int, word: str) -> Any:
        cuda = self._cupy.cuda
        owned = cuda.UnownedMemory(memory.address, memory.num_bytes, None, self._device.id)
        pointer = cuda.MemoryPointer(owned, offset)
        return self._cupy.ndarray(shape, word, pointer, strides)

    def staging(self, num_bytes: int) -> ByteArray:
        with self._device:
            pinned = self._cupy.cuda.alloc_pinned_memory(max(1, num_bytes))
        return np.frombuffer(pinned, np.uint8, num_bytes)

    def download(self, array: Any, index: tuple[IntArray, ...], out: AnyArray) -> None:
        with self._device, self._stream:
            packed = array[self._index(index)]
            packed.get(stream=self._stream, out=out)
            self._stream.synchronize()

    def upload(self, array: Any, index: tuple[IntArray, ...], data: AnyArray) -> None:
        with self._device, self._stream:
            packed = self._cupy.empty(data.shape, data.dtype)
            packed.set(data, stream=self._stream)
            array[self._index(index)] = packed
            self._stream.synchronize()

    def _index(self, index: tuple[IntArray, ...]) -> tuple[Any, ...]:
        return tuple(self._cupy.asarray(ids) for ids in index)
