"""The few things that this lane asks of CUDA, and nothing else: the seam between it and a driver.

Pointers, streams and events are plain integers. Everything that may be done from more than one thread says so; the rest
belongs to the thread that works for a transport.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from kv_transfer.errors import TransportFailed
from kv_transfer.transports.cuda_ipc.kernel import Launch
from kv_transfer.views import ByteArray

# A device and an address on it.
Place = tuple[int, int]
HANDLE_BYTES = 64
UUID_BYTES = 16


class CudaFailed(TransportFailed):
    """A call of CUDA did not work; ``call`` names it.

    Attributes:
        is_final: the device or this process's use of it is beyond help: nothing that was enqueued will run.
    """

    def __init__(self, call: str, why: str, *, is_final: bool = False) -> None:
        super().__init__(f"{call}: {why}")
        self.call, self.is_final = call, is_final


@dataclass(frozen=True, slots=True)
class Allocation:
    """The allocation that an address lies in.

    Attributes:
        can_be_shared: whether another process may open it by handle; not so for memory that was mapped piecemeal
            (expandable segments, stream-ordered pools).
    """

    device: int
    base: int
    num_bytes: int
    can_be_shared: bool


class Runtime(ABC):
    """One process's CUDA. Every method may raise CudaFailed."""

    # Devices.

    @abstractmethod
    def num_devices(self) -> int: ...

    @abstractmethod
    def uuid(self, device: int) -> bytes:
        """[16], the same in every process."""

    @abstractmethod
    def describe(self, device: int) -> str:
        """For people: the device's name."""

    @abstractmethod
    def num_multiprocessors(self, device: int) -> int: ...

    @abstractmethod
    def can_access_peer(self, device: int, peer: int) -> bool:
        """Whether kernels on ``device`` can address the memory of ``peer``, another device."""

    # Memory. ``allocation``, ``allocate`` and ``free`` may be called from any thread.

    @abstractmethod
    def allocation(self, address: int) -> Allocation: ...

    @abstractmethod
    def allocate(self, device: int, num_bytes: int) -> int:
        """Memory that can be shared; aligned to 256 bytes at least."""

    @abstractmethod
    def free(self, device: int, address: int) -> None: ...

    @abstractmethod
    def allocate_pinned(self, num_bytes: int) -> ByteArray:
        """Host memory that a device copies from and to; ``address_of`` has its address."""

    @abstractmethod
    def free_pinned(self, memory: ByteArray) -> None: ...

    @abstractmethod
    def export_memory(self, base: int) -> bytes:
        """The handle of an allocation; [64]."""

    @abstractmethod
    def import_memory(self, device: int, handle: bytes) -> int:
        """Map an allocation of another process for ``device``; the address of its base. Not one of our own."""

    @abstractmethod
    def close_memory(self, device: int, base: int) -> None: ...

    # Streams and events. ``record`` and ``wait`` may be called from any thread.

    @abstractmethod
    def create_stream(self, device: int) -> int:
        """Of the highest priority; it waits for no other stream unasked."""

    @abstractmethod
    def destroy_stream(self, stream: int) -> None: ...

    @abstractmethod
    def create_event(self, device: int, *, timed: bool = False, shared: bool = False) -> int: ...

    @abstractmethod
    def destroy_event(self, event: int) -> None:
        """Of our own or imported."""

    @abstractmethod
    def export_event(self, event: int) -> bytes:
        """The handle of a shared event; [64]."""

    @abstractmethod
    def import_event(self, device: int, handle: bytes) -> int:
        """Of another process."""

    @abstractmethod
    def record(self, device: int, event: int, stream: int) -> None:
        """The event is done when everything is that the stream was given so far."""

    @abstractmethod
    def is_done(self, event: int) -> bool:
        """Whether all is done that was recorded last; True when nothing was. Never waits."""

    @abstractmethod
    def wait(self, stream: int, event: int) -> None:
        """What the stream is given from now on begins after the event. Returns at once."""

    @abstractmethod
    def elapsed_ms(self, first: int, last: int) -> float:
        """Between two timed events that are done."""

    # Copies; all return at once, and run in the order of their stream.

    @property
    @abstractmethod
    def has_batches(self) -> bool:
        """Whether ``copy_batch`` is there."""

    @abstractmethod
    def copy_from_host(self, address: int, data: ByteArray, stream: int) -> None:
        """``data`` is of pinned memory, and stays as it is until the copy is done."""

    @abstractmethod
    def copy_to_host(self, data: ByteArray, address: int, stream: int) -> None: ...

    @abstractmethod
    def copy_peer(self, dst: Place, src: Place, num_bytes: int, stream: int) -> None:
        """Between devices, which may be one; through the host where they cannot reach each other."""

    @abstractmethod
    def copy_batch(self, dst: Sequence[int], src: Sequence[int], num_bytes: Sequence[int], stream: int) -> None:
        """Many copies in one call, in no particular order among themselves."""

    @abstractmethod
    def launch(self, device: int, launch: Launch, max_thread_blocks: int, stream: int) -> None:
        """Run the copy kernel."""


def open_runtime() -> Runtime:
    """CUDA as this process has it.

    Raises:
        TransportFailed: cupy, a driver or a device is missing; says which, and what to do.
    """
    from kv_transfer.transports.cuda_ipc.cupy_runtime import open_cupy

    return open_cupy()
