"""CUDA's part in the tests, played by shared memory: allocations, streams and events that other processes can open.

Bytes really move, between processes too, by the same calls in the same order; only speed is not alike. It is stricter
than a device: an access outside of an allocation, or to a device that cannot be reached, is an error at once.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from kv_transfer.transports.cuda_ipc.kernel import Launch
from kv_transfer.transports.cuda_ipc.runtime import HANDLE_BYTES, Allocation, CudaFailed, Place, Runtime
from kv_transfer.views import ByteArray
from tests.cuda_kernel_twin import locate

_HANDLE = struct.Struct("<8sIIQI")
_MAX_EVENTS = 4096
_IMPORTED = 1 << 32
LEGACY_STREAM = 0


@dataclass
class _Segment:
    """One mapped stretch of memory."""

    base: int
    num_bytes: int
    device: int
    mapping: mmap.mmap
    fd: int = -1
    can_be_shared: bool = True


@dataclass
class _Stream:
    """Does what it is given, in order, in a thread of its own; the legacy stream within the call."""

    device: int
    thread: threading.Thread | None = None
    work: deque[Callable[[], None]] = field(default_factory=deque)
    changed: threading.Condition = field(default_factory=threading.Condition)
    is_held: bool = False
    is_ending: bool = False

    def run(self) -> None:
        while True:
            with self.changed:
                while self.is_held or not self.work:
                    if self.is_ending and not self.work:
                        return
                    self.changed.wait()
                act = self.work.popleft()
            act()


class TwinRuntime(Runtime):
    """
    Attributes:
        peers: pairs of devices whose kernels can address each other's memory.
        seconds_a_call: what a copy of each path costs beside its bytes, for calibration: by path's name.
        fails: calls that fail, by name, with how many more times.
        calls: names of the calls so far.
    """

    def __init__(self, num_devices: int = 1, peers: Sequence[tuple[int, int]] = ()) -> None:
        self._num_devices = num_devices
        self.peers = {frozenset(pair) for pair in peers}
        self.batches = False
        self.seconds_a_call = {"kernel": 10e-6, "copies": 5e-6, "batch": 1e-6}
        self.gigabytes_per_s = {"kernel": 100.0, "copies": 120.0, "batch": 120.0}
        self.fails: dict[str, int] = {}
        self.calls: list[str] = []
        self._segments: dict[int, _Segment] = {}
        self._lock = threading.RLock()
        self._streams: dict[int, _Stream] = {LEGACY_STREAM: _Stream(0)}
        self._next_stream = 1
        # (times recorded, times done) of each event of this process, where others can look at them.
        self._page_fd = os.memfd_create("cuda-twin-events", os.MFD_CLOEXEC)
        os.ftruncate(self._page_fd, 16 * _MAX_EVENTS)
        self._page = np.frombuffer(mmap.mmap(self._page_fd, 16 * _MAX_EVENTS), np.uint64).reshape(-1, 2)
        self._free_events = list(range(_MAX_EVENTS - 1, 0, -1))
        self._imported: dict[int, np.ndarray] = {}
        self._clocks: dict[int, float] = {}
        self._busy_s: dict[int, float] = {}

    # What tests do to it.

    def hold(self, stream: int) -> None:
        """The stream does nothing until ``release``."""
        self._streams[stream].is_held = True

    def release(self, stream: int) -> None:
        held = self._streams[stream]
        with held.changed:
            held.is_held = False
            held.changed.notify()
        while stream == LEGACY_STREAM and held.work:
            held.work.popleft()()

    def step(self, stream: int) -> None:
        """A held stream does one thing that it was given."""
        self._streams[stream].work.popleft()()

    def streams(self) -> list[int]:
        """Those that were created, oldest first."""
        return [stream for stream in self._streams if stream != LEGACY_STREAM]

    def leftovers(self) -> dict[str, int]:
        """What was not given back."""
        return {
            "segments": len(self._segments),
            "streams": len(self._streams) - 1,
            "events": _MAX_EVENTS - 1 - len(self._free_events) + len(self._imported),
        }

    def make_unshareable(self, address: int) -> None:
        """As memory of an allocator with expandable segments is."""
        self._find(address, 1).can_be_shared = False

    def bytes_at(self, address: int, num_bytes: int, device: int | None = None) -> ByteArray:
        """Memory as an array, if it may be accessed, from kernels of ``device`` or by anybody."""
        segment = self._find(address, num_bytes)
        if device is not None and segment.device >= 0:
            assert self._reaches(device, segment.device), f"GPU {device} cannot address GPU {segment.device}"
        return np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(address))

    # The seam.

    def num_devices(self) -> int:
        return self._num_devices

    def uuid(self, device: int) -> bytes:
        return bytes([device]) * 16

    def describe(self, device: int) -> str:
        return f"twin {device}"

    def num_multiprocessors(self, device: int) -> int:
        return 2

    def can_access_peer(self, device: int, peer: int) -> bool:
        return self._reaches(device, peer)

    def allocation(self, address: int) -> Allocation:
        segment = self._find(address, 1)
        return Allocation(segment.device, segment.base, segment.num_bytes, segment.can_be_shared)

    def allocate(self, device: int, num_bytes: int) -> int:
        self._called("allocate")
        fd = os.memfd_create("cuda-twin", os.MFD_CLOEXEC)
        os.ftruncate(fd, num_bytes)
        return self._map(fd, num_bytes, device)

    def free(self, device: int, address: int) -> None:
        with self._lock:
            segment = self._segments.pop(address)
        assert segment.device == device
        os.close(segment.fd)

    def allocate_pinned(self, num_bytes: int) -> ByteArray:
        base = self._map(-1, num_bytes, -1)
        return np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(base))

    def free_pinned(self, memory: ByteArray) -> None:
        with self._lock:
            del self._segments[memory.ctypes.data]

    def export_memory(self, base: int) -> bytes:
        segment = self._segments[base]
        packed = _HANDLE.pack(b"memory", os.getpid(), segment.fd, segment.num_bytes, segment.device)
        return packed.ljust(HANDLE_BYTES, b"\0")

    def import_memory(self, device: int, handle: bytes) -> int:
        self._called("import_memory")
        kind, pid, fd, num_bytes, origin = _HANDLE.unpack_from(handle)
        assert kind.rstrip(b"\0") == b"memory"
        assert pid != os.getpid(), "CUDA does not open a handle in the process that made it"
        assert self._reaches(device, origin), "CUDA opens no handle for a device that cannot reach the memory"
        try:
            return self._map(os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC), num_bytes, origin)
        except OSError as exc:
            raise CudaFailed("import_memory", str(exc)) from exc

    def close_memory(self, device: int, base: int) -> None:
        with self._lock:
            os.close(self._segments.pop(base).fd)

    def create_stream(self, device: int) -> int:
        stream = self._next_stream
        self._next_stream += 1
        made = self._streams[stream] = _Stream(device)
        made.thread = threading.Thread(target=made.run, name=f"cuda-twin-{stream}", daemon=True)
        made.thread.start()
        return stream

    def destroy_stream(self, stream: int) -> None:
        ended = self._streams.pop(stream)
        with ended.changed:
            ended.is_ending = True
            ended.changed.notify()
        assert ended.thread is not None
        ended.thread.join(10)

    def create_event(self, device: int, *, timed: bool = False, shared: bool = False) -> int:
        event = self._free_events.pop()
        self._page[event] = 0
        return event

    def destroy_event(self, event: int) -> None:
        if event >= _IMPORTED:
            del self._imported[event]
        else:
            self._free_events.append(event)

    def export_event(self, event: int) -> bytes:
        return _HANDLE.pack(b"event", os.getpid(), self._page_fd, event, 0).ljust(HANDLE_BYTES, b"\0")

    def import_event(self, device: int, handle: bytes) -> int:
        kind, pid, fd, index, _ = _HANDLE.unpack_from(handle)
        assert kind.rstrip(b"\0") == b"event"
        assert pid != os.getpid(), "CUDA does not open a handle in the process that made it"
        try:
            theirs = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        except OSError as exc:
            raise CudaFailed("import_event", str(exc)) from exc
        page = np.frombuffer(mmap.mmap(theirs, 16 * _MAX_EVENTS), np.uint64).reshape(-1, 2)
        os.close(theirs)
        event = _IMPORTED + index + (len(self._imported) << 40)
        self._imported[event] = page[index]
        return event

    def record(self, device: int, event: int, stream: int) -> None:
        counts = self._counts(event)
        counts[0] += 1
        now = counts[0].copy()

        def act() -> None:
            counts[1] = now
            self._clocks[event] = self._busy_s.get(stream, 0.0)

        self._enqueue(stream, act)

    def is_done(self, event: int) -> bool:
        self._called("is_done")
        counts = self._counts(event)
        return bool(counts[1] >= counts[0])

    def wait(self, stream: int, event: int) -> None:
        counts = self._counts(event)
        recorded = counts[0].copy()

        def act() -> None:
            while counts[1] < recorded:
                time.sleep(0.0001)

        self._enqueue(stream, act)

    def elapsed_ms(self, first: int, last: int) -> float:
        return (self._clocks[last] - self._clocks[first]) * 1000

    @property
    def has_batches(self) -> bool:
        return self.batches

    def copy_from_host(self, address: int, data: ByteArray, stream: int) -> None:
        self._find(data.ctypes.data, data.nbytes)
        self._copy(address, data.ctypes.data, data.nbytes, stream)

    def copy_to_host(self, data: ByteArray, address: int, stream: int) -> None:
        self._find(data.ctypes.data, data.nbytes)
        self._copy(data.ctypes.data, address, data.nbytes, stream)

    def copy_peer(self, dst: Place, src: Place, num_bytes: int, stream: int) -> None:
        self._called("copy_peer")
        for device, address in (dst, src):
            assert self._find(address, num_bytes).device == device
        self._copy(dst[1], src[1], num_bytes, stream, "copies")

    def copy_batch(self, dst: Sequence[int], src: Sequence[int], num_bytes: Sequence[int], stream: int) -> None:
        self._called("copy_batch")
        for target, source, size in zip(dst, src, num_bytes, strict=True):
            self._copy(target, source, size, stream, "batch")

    def launch(self, device: int, launch: Launch, max_thread_blocks: int, stream: int) -> None:
        self._called("launch")
        assert self._streams[stream].device == device
        assert launch.grid(max_thread_blocks) <= max_thread_blocks

        def act() -> None:
            tables = [
                self.bytes_at(address, 8 * count, device).view(np.int64)
                for address, count in (
                    (launch.run_src, launch.num_runs),
                    (launch.run_dst, launch.num_runs),
                    (launch.unit_src, launch.num_units),
                    (launch.unit_dst, launch.num_units),
                )
            ]
            firsts = np.arange(0, launch.num_words, launch.run_words, dtype=np.uint32)
            src, dst = locate(launch, firsts, tables)
            assert not ((src | dst) % launch.word_bytes).any(), "a misaligned access"
            self._copy_runs(device, src, dst, launch.run_words * launch.word_bytes)
            self._spend(stream, "kernel", launch.num_words * launch.word_bytes)

        self._enqueue(stream, act)

    def _copy_runs(self, device: int, src: np.ndarray, dst: np.ndarray, size: int) -> None:
        try:
            ends = [(int(ids.min()), int(ids.max()) + size) for ids in (src, dst)]
            source, target = (self.bytes_at(first, end - first, device) for first, end in ends)
        except AssertionError:
            # In several allocations.
            for one, other in zip(src.tolist(), dst.tolist(), strict=True):
                self.bytes_at(other, size, device)[:] = self.bytes_at(one, size, device)
            return
        src, dst = src - ends[0][0], dst - ends[1][0]
        if size >= 4096:
            for one, other in zip(src.tolist(), dst.tolist(), strict=True):
                target[other : other + size] = source[one : one + size]
            return
        numbers = np.concatenate((src, dst, [size, len(source), len(target)]))
        word = next(n for n in (8, 4, 2, 1) if not (numbers % n).any())
        source, target = (memory.view(f"u{word}") for memory in (source, target))
        within = np.arange(size // word)
        for first in range(0, len(src), 1 << 14):
            some = slice(first, first + (1 << 14))
            target[np.add.outer(dst[some] // word, within)] = source[np.add.outer(src[some] // word, within)]

    def _copy(self, dst: int, src: int, num_bytes: int, stream: int, path: str = "") -> None:
        self._find(dst, num_bytes)
        self._find(src, num_bytes)

        def act() -> None:
            ctypes.memmove(dst, src, num_bytes)
            if path:
                self._spend(stream, path, num_bytes)

        self._enqueue(stream, act)

    def _spend(self, stream: int, path: str, num_bytes: int) -> None:
        seconds = self.seconds_a_call[path] + num_bytes / self.gigabytes_per_s[path] / 1e9
        self._busy_s[stream] = self._busy_s.get(stream, 0.0) + seconds

    def _enqueue(self, stream: int, act: Callable[[], None]) -> None:
        target = self._streams[stream]
        if target.thread is None and not target.is_held:
            act()
            return
        with target.changed:
            target.work.append(act)
            target.changed.notify()

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if self.fails.get(name, 0):
            self.fails[name] -= 1
            raise CudaFailed(name, "as the test wants it")

    def _counts(self, event: int) -> np.ndarray:
        return self._imported[event] if event >= _IMPORTED else self._page[event]

    def _reaches(self, device: int, other: int) -> bool:
        return device == other or frozenset((device, other)) in self.peers

    def _map(self, fd: int, num_bytes: int, device: int) -> int:
        mapping = mmap.mmap(fd, num_bytes)
        base = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        with self._lock:
            self._segments[base] = _Segment(base, num_bytes, device, mapping, fd)
        return base

    def _find(self, address: int, num_bytes: int) -> _Segment:
        with self._lock:
            for segment in self._segments.values():
                if segment.base <= address and address + num_bytes <= segment.base + segment.num_bytes:
                    return segment
        raise AssertionError(f"{num_bytes} bytes at {address:#x} are in no allocation")
