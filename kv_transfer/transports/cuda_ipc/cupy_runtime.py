"""CUDA through cupy, and two calls of the driver that cupy does not have. The only module that knows of either."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np

from kv_transfer.errors import TransportFailed
from kv_transfer.transports.cuda_ipc.kernel import NAME, THREADS, Launch, source_for
from kv_transfer.transports.cuda_ipc.runtime import Allocation, CudaFailed, Place, Runtime
from kv_transfer.views import ByteArray

log = logging.getLogger("kv_transfer")

Result = TypeVar("Result")

_NOT_READY = 600
# Errors after which a context runs nothing any more (cudaErrorIllegalAddress ... cudaErrorLaunchFailure,
# cudaErrorECCUncorrectable, cudaErrorContextIsDestroyed, cudaErrorSystemNotReady, cudaErrorDevicesUnavailable).
_FINAL_STATUS = frozenset({46, 214, 700, 702, 709, 714, 715, 716, 717, 718, 719, 802, 999})
# CUpointer_attribute
_IS_LEGACY_IPC_CAPABLE = 10
# cudaMemcpyKind
_HOST_TO_DEVICE, _DEVICE_TO_HOST = 1, 2
_SRC_ACCESS_ORDER_STREAM = 1
# The driver gives higher priority to lower numbers, and takes what is beyond its range for the end of it.
_HIGHEST_PRIORITY = -100


@lru_cache(maxsize=1)
def open_cupy() -> Runtime:
    """One for the process: what is mapped from peers is counted by it.

    Raises:
        TransportFailed: cupy, a driver or a device is missing; says which, and what to do.
    """
    try:
        import cupy
    except ImportError as exc:
        raise TransportFailed(
            f"cuda_ipc needs cupy, which cannot be imported ({exc}): pip install 'splitwise-sched[cuda]' for CUDA 12, "
            "or cupy-cuda13x for CUDA 13"
        ) from exc
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as exc:
        raise TransportFailed(f"there is no CUDA device here: {exc}") from exc
    if not count:
        raise TransportFailed("there is no CUDA device here: check nvidia-smi and CUDA_VISIBLE_DEVICES")
    return CupyRuntime(cupy)


class CupyRuntime(Runtime):
    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy
        self._cuda = cupy.cuda.runtime
        self._driver = _driver()
        self._batch = _find_batches()
        self._kernels: dict[int, Any] = {}
        self._streams: dict[int, Any] = {}
        self._pinned: dict[int, Any] = {}

    def num_devices(self) -> int:
        return int(self._cuda.getDeviceCount())

    def uuid(self, device: int) -> bytes:
        return bytes(self._properties(device)["uuid"])

    def describe(self, device: int) -> str:
        return str(self._properties(device)["name"].decode(errors="replace"))

    def num_multiprocessors(self, device: int) -> int:
        return int(self._properties(device)["multiProcessorCount"])

    def can_access_peer(self, device: int, peer: int) -> bool:
        return bool(self._call(self._cuda.deviceCanAccessPeer, device, peer))

    def allocation(self, address: int) -> Allocation:
        attributes = self._call(self._cuda.pointerGetAttributes, address)
        base, size = ctypes.c_uint64(), ctypes.c_size_t()
        with self._cupy.cuda.Device(attributes.device):
            self._drive("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(address))
            capable = ctypes.c_int(0)
            self._drive(
                "cuPointerGetAttribute", ctypes.byref(capable), _IS_LEGACY_IPC_CAPABLE, ctypes.c_uint64(address)
            )
        return Allocation(int(attributes.device), int(base.value), int(size.value), bool(capable.value))

    def allocate(self, device: int, num_bytes: int) -> int:
        with self._cupy.cuda.Device(device):
            return int(self._call(self._cuda.malloc, num_bytes))

    def free(self, device: int, address: int) -> None:
        with self._cupy.cuda.Device(device):
            self._call(self._cuda.free, address)

    def allocate_pinned(self, num_bytes: int) -> ByteArray:
        address = int(self._call(self._cuda.hostAlloc, num_bytes, self._cuda.hostAllocPortable))
        memory = np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(address))
        self._pinned[memory.ctypes.data] = address
        return memory

    def free_pinned(self, memory: ByteArray) -> None:
        self._call(self._cuda.freeHost, self._pinned.pop(memory.ctypes.data))

    def export_memory(self, base: int) -> bytes:
        return bytes(self._call(self._cuda.ipcGetMemHandle, base))

    def import_memory(self, device: int, handle: bytes) -> int:
        with self._cupy.cuda.Device(device):
            flags = self._cuda.cudaIpcMemLazyEnablePeerAccess
            return int(self._call(self._cuda.ipcOpenMemHandle, handle, flags))

    def close_memory(self, device: int, base: int) -> None:
        with self._cupy.cuda.Device(device):
            self._call(self._cuda.ipcCloseMemHandle, base)

    def create_stream(self, device: int) -> int:
        with self._cupy.cuda.Device(device):
            flags = self._cuda.streamNonBlocking
            stream = int(self._call(self._cuda.streamCreateWithPriority, flags, _HIGHEST_PRIORITY))
            self._streams[stream] = _wrap_stream(self._cupy, stream, device)
        return stream

    def destroy_stream(self, stream: int) -> None:
        self._streams.pop(stream, None)
        self._call(self._cuda.streamDestroy, stream)

    def create_event(self, device: int, *, timed: bool = False, shared: bool = False) -> int:
        flags = 0 if timed else self._cuda.eventDisableTiming
        if shared:
            flags |= self._cuda.eventInterprocess
        with self._cupy.cuda.Device(device):
            return int(self._call(self._cuda.eventCreateWithFlags, flags))

    def destroy_event(self, event: int) -> None:
        self._call(self._cuda.eventDestroy, event)

    def export_event(self, event: int) -> bytes:
        return bytes(self._call(self._cuda.ipcGetEventHandle, event))

    def import_event(self, device: int, handle: bytes) -> int:
        with self._cupy.cuda.Device(device):
            return int(self._call(self._cuda.ipcOpenEventHandle, handle))

    def record(self, device: int, event: int, stream: int) -> None:
        with self._cupy.cuda.Device(device):
            self._call(self._cuda.eventRecord, event, stream)

    def is_done(self, event: int) -> bool:
        status = self._cuda.eventQuery(event)
        if status not in (0, _NOT_READY):
            raise CudaFailed("cudaEventQuery", f"status {status}", is_final=status in _FINAL_STATUS)
        return bool(status == 0)

    def wait(self, stream: int, event: int) -> None:
        self._call(self._cuda.streamWaitEvent, stream, event)

    def elapsed_ms(self, first: int, last: int) -> float:
        return float(self._call(self._cuda.eventElapsedTime, first, last))

    @property
    def has_batches(self) -> bool:
        return self._batch is not None

    def copy_from_host(self, address: int, data: ByteArray, stream: int) -> None:
        self._call(self._cuda.memcpyAsync, address, data.ctypes.data, data.nbytes, _HOST_TO_DEVICE, stream)

    def copy_to_host(self, data: ByteArray, address: int, stream: int) -> None:
        self._call(self._cuda.memcpyAsync, data.ctypes.data, address, data.nbytes, _DEVICE_TO_HOST, stream)

    def copy_peer(self, dst: Place, src: Place, num_bytes: int, stream: int) -> None:
        (dst_device, dst_address), (src_device, src_address) = dst, src
        self._call(self._cuda.memcpyPeerAsync, dst_address, dst_device, src_address, src_device, num_bytes, stream)

    def copy_batch(self, dst: Sequence[int], src: Sequence[int], num_bytes: Sequence[int], stream: int) -> None:
        assert self._batch is not None
        self._batch(list(dst), list(src), list(num_bytes), stream)

    def launch(self, device: int, launch: Launch, max_thread_blocks: int, stream: int) -> None:
        pointers, numbers = launch.arguments()
        arguments = (*map(np.uint64, pointers), *map(np.uint32, numbers))
        kernel = self._kernels.get(launch.word_bytes)
        if kernel is None:
            # The kernel for each device is compiled on its first launch there; cupy keeps what it has compiled.
            kernel = self._kernels[launch.word_bytes] = self._cupy.RawKernel(source_for(launch.word_bytes), NAME)
        with self._cupy.cuda.Device(device), self._streams[stream]:
            self._call(kernel, (launch.grid(max_thread_blocks),), (THREADS,), arguments)

    def _properties(self, device: int) -> dict[str, Any]:
        found: dict[str, Any] = self._call(self._cuda.getDeviceProperties, device)
        return found

    def _call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        try:
            return function(*arguments)
        except (self._cuda.CUDARuntimeError, self._cupy.cuda.driver.CUDADriverError) as exc:
            name = getattr(function, "__name__", type(function).__name__)
            raise CudaFailed(name, str(exc), is_final=getattr(exc, "status", 0) in _FINAL_STATUS) from exc
        except self._cupy.cuda.compiler.CompileException as exc:
            raise CudaFailed("compiling the copy kernel", str(exc)) from exc

    def _drive(self, name: str, *arguments: Any) -> None:
        status = getattr(self._driver, name)(*arguments)
        if status:
            raise CudaFailed(name, f"status {status}", is_final=status in _FINAL_STATUS)


class _Foreign:
    """A stream that cupy did not make, as it wants to be told of it from version 14 on."""

    def __init__(self, stream: int) -> None:
        self._stream = stream

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._stream


def _wrap_stream(cupy: Any, stream: int, device: int) -> Any:
    if hasattr(cupy.cuda.Stream, "from_external"):
        return cupy.cuda.Stream.from_external(_Foreign(stream))
    return cupy.cuda.ExternalStream(stream, device)


def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as exc:
        raise TransportFailed(f"the CUDA driver's library cannot be loaded: {exc}") from exc


def _find_batches() -> Callable[[list[int], list[int], list[int], int], None] | None:
    """``cudaMemcpyBatchAsync`` of cuda-bindings, from CUDA 12.8 on; None where it is not to be had."""
    with suppress(ImportError, AttributeError):
        from cuda.bindings import runtime

        function = runtime.cudaMemcpyBatchAsync
        attributes = runtime.cudaMemcpyAttributes()
        attributes.srcAccessOrder = runtime.cudaMemcpySrcAccessOrder(_SRC_ACCESS_ORDER_STREAM)

        def copy(dst: list[int], src: list[int], num_bytes: list[int], stream: int) -> None:
            status = function(dst, src, num_bytes, len(dst), [attributes], [0], 1, stream)[0]
            if int(status):
                raise CudaFailed("cudaMemcpyBatchAsync", str(status), is_final=int(status) in _FINAL_STATUS)

        return copy
    return None
