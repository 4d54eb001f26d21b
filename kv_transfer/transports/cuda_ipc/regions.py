"""A pool's regions in device memory: where they are, and how another process comes to see the same memory."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kv_transfer.errors import PoolNotServed, PoolUnavailable
from kv_transfer.transports.cuda_ipc.runtime import Runtime

EXPANDABLE_REMEDY = (
    "set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False (and leave backend:cudaMallocAsync out of it), or allocate "
    "the pool with cudaMalloc"
)


@dataclass(frozen=True, slots=True)
class DeviceRegion:
    """One stretch of device memory.

    Attributes:
        owner: what must live for the memory to stay.
    """

    address: int
    num_bytes: int
    owner: object


def region_of(tensor: Any) -> DeviceRegion:
    """Of a torch or cupy tensor.

    Raises:
        PoolUnavailable: it is not in device memory, or not contiguous.
    """
    kind = f"{type(tensor).__module__.partition('.')[0]} tensor"
    if hasattr(tensor, "data_ptr"):
        address, num_bytes = int(tensor.data_ptr()), int(tensor.numel()) * int(tensor.element_size())
        on_device, contiguous = bool(tensor.is_cuda), bool(tensor.is_contiguous())
    elif hasattr(tensor, "__cuda_array_interface__"):
        address, num_bytes = int(tensor.data.ptr), int(tensor.nbytes)
        on_device, contiguous = True, bool(tensor.flags.c_contiguous)
    else:
        raise PoolUnavailable(0, f"a {kind} is neither torch's nor cupy's")
    if not on_device:
        raise PoolUnavailable(num_bytes, f"the {kind} is in host memory: a CUDA pool is made of tensors on a device")
    if not contiguous:
        raise PoolUnavailable(num_bytes, f"the {kind} is not contiguous")
    return DeviceRegion(address, num_bytes, tensor)


@dataclass(frozen=True, slots=True)
class SharedRegion:
    """A region as another process finds it: at ``offset`` of the allocation that ``handle`` opens."""

    handle: bytes
    offset: int
    num_bytes: int


def share(runtime: Runtime, regions: Sequence[DeviceRegion]) -> list[SharedRegion]:
    """Handles for the allocations that regions lie in; each is exported once.

    Raises:
        PoolNotServed: an allocation cannot be shared; names the setting to change.
    """
    handles: dict[int, bytes] = {}
    shared = []
    for region in regions:
        found = runtime.allocation(region.address)
        offset = region.address - found.base
        if not found.can_be_shared or offset + region.num_bytes > found.num_bytes:
            raise PoolNotServed(
                "the pool's memory was not allocated in one piece by cudaMalloc, so that no other process can open "
                f"it: {EXPANDABLE_REMEDY}"
            )
        if found.base not in handles:
            handles[found.base] = runtime.export_memory(found.base)
        shared.append(SharedRegion(handles[found.base], offset, region.num_bytes))
    return shared


class Imports:
    """Allocations of other processes that this process has mapped: each once for a device, however many links use it.

    Thread-safe; one for the whole process, since that is what CUDA counts by.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[tuple[int, int, bytes], list[int]] = {}

    def open(self, runtime: Runtime, device: int, handle: bytes) -> int:
        """Map an allocation for ``device``, or find it mapped; the address of its base. ``close`` for each."""
        with self._lock:
            entry = self._open.get((id(runtime), device, handle))
            if entry is None:
                entry = self._open[id(runtime), device, handle] = [runtime.import_memory(device, handle), 0]
            entry[1] += 1
            return entry[0]

    def close(self, runtime: Runtime, device: int, handle: bytes) -> None:
        with self._lock:
            entry = self._open[id(runtime), device, handle]
            entry[1] -= 1
            if not entry[1]:
                del self._open[id(runtime), device, handle]
                runtime.close_memory(device, entry[0])

    def __len__(self) -> int:
        return len(self._open)


IMPORTS = Imports()
