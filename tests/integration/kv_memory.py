"""Pools for transfer tests, in the memory that a lane moves; and that memory as arrays, wherever it is."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from kv_transfer import BlockPool, KVLayout, KVPool, TransferOptions, TransportFailed
from kv_transfer.transports.cuda_ipc.pool import CudaPool
from kv_transfer.transports.cuda_ipc.runtime import Runtime, open_runtime
from tests.cuda_twin import TwinRuntime

# The number of devices: for this process and its children, CUDA is played by the twin, whatever is here.
TWIN = "KV_TEST_CUDA_TWIN"
# On which device a process makes its pools.
DEVICE = "KV_TEST_CUDA_DEVICE"
_WAIT_S = 30.0


@lru_cache(maxsize=1)
def twin(num_devices: int) -> TwinRuntime:
    """The one of this process, as a process has one CUDA."""
    return TwinRuntime(num_devices)


def environment() -> dict[str, str]:
    """What a process started by this one must have of ours."""
    return {name: os.environ[name] for name in (TWIN, DEVICE) if name in os.environ}


def cuda_runtime() -> Runtime:
    """The device's, if there is one and no test wants the twin; else the twin."""
    wanted = os.environ.get(TWIN)
    if wanted:
        return twin(int(wanted))
    try:
        return open_runtime()
    except TransportFailed:
        return twin(1)


def spare_time(options: TransferOptions) -> TransferOptions:
    """The same without a calibration, which tells nothing about the twin."""
    if options.protocols[0] == "cuda_ipc" and options.cuda.path == "auto" and isinstance(cuda_runtime(), TwinRuntime):
        return replace(options, cuda=replace(options.cuda, path="kernel"))
    return options


def make_pool(layout: KVLayout, options: TransferOptions) -> BlockPool:
    """In the memory that the first lane of the options moves."""
    if options.protocols[0] != "cuda_ipc":
        return KVPool.allocate(layout)
    return CudaPool.allocate(layout, int(os.environ.get(DEVICE, "0")), cuda_runtime())


def regions_of(pool: Any) -> Sequence[Any]:
    """Arrays, or what works like arrays: ``region[...]``, ``region[...] = ``, ``np.asarray(region)``."""
    if not isinstance(pool, CudaPool):
        return list(pool.regions)
    return [DeviceArray(pool.runtime, pool.device, (r.address, r.num_bytes)) for r in pool.regions]


def view_of(pool: BlockPool, layout: KVLayout) -> Any:
    """All blocks of a block-major pool, [num_blocks, block_bytes]; None for other packings."""
    if layout.placement is not None or not layout.packing.startswith("block-major"):
        return None
    if isinstance(pool, KVPool):
        return pool.as_array()
    shape = (layout.num_blocks, layout.block_bytes)
    (region,) = regions_of(pool)
    return DeviceArray(region.runtime, region.device, region.place, shape)


class Fetched:
    """An array of bytes that has to be fetched to be looked at; no more of its rows than are meant."""

    def __init__(self, fetch: Callable[[int, int], np.ndarray], shape: tuple[int, ...]) -> None:
        """
        Args:
            fetch: gives the bytes of some rows, the first one's number and the end.
        """
        self._fetch, self.shape = fetch, shape
        self.dtype = np.dtype(np.uint8)

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self._fetch(0, len(self)).reshape(self.shape)

    def __getitem__(self, index: Any) -> np.ndarray:
        return self._some(index)[0][index]

    def copy(self) -> np.ndarray:
        return np.asarray(self)

    def _some(self, index: Any) -> tuple[np.ndarray, slice]:
        """An array that holds the rows that are meant, and which these are."""
        rows = np.atleast_1d(np.arange(len(self))[index[0] if isinstance(index, tuple) else index])
        first, end = (int(rows.min()), int(rows.max()) + 1) if len(rows) else (0, 1)
        data = np.empty(self.shape, np.uint8)
        data[first:end] = self._fetch(first, end).reshape(-1, *self.shape[1:])
        return data, slice(first, end)


class DeviceArray(Fetched):
    """Memory of a device, as bytes."""

    def __init__(
        self, runtime: Runtime, device: int, place: tuple[int, int], shape: tuple[int, ...] | None = None
    ) -> None:
        super().__init__(lambda first, end: self._transfer(first, end, None), shape or (place[1],))
        self.runtime, self.device, self.place = runtime, device, place

    def __setitem__(self, index: Any, value: Any) -> None:
        # Not the rows beside: they may be written from elsewhere at this moment.
        data, rows = self._some(index)
        data[index] = value
        self._transfer(rows.start, rows.stop, data[rows].reshape(-1))

    def _transfer(self, first: int, end: int, data: np.ndarray | None) -> np.ndarray:
        row_bytes = self.place[1] // len(self)
        address, num_bytes = self.place[0] + first * row_bytes, (end - first) * row_bytes
        pinned = self.runtime.allocate_pinned(num_bytes)
        stream = self.runtime.create_stream(self.device)
        done = self.runtime.create_event(self.device)
        try:
            if data is None:
                self.runtime.copy_to_host(pinned, address, stream)
            else:
                pinned[:] = data
                self.runtime.copy_from_host(address, pinned, stream)
            self.runtime.record(self.device, done, stream)
            until = time.monotonic() + _WAIT_S
            while not self.runtime.is_done(done):
                assert time.monotonic() < until, "the device does not answer"
                time.sleep(0.0001)
            return pinned.copy()
        finally:
            self.runtime.destroy_event(done)
            self.runtime.destroy_stream(stream)
            self.runtime.free_pinned(pinned)
