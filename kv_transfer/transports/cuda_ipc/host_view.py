"""A pool in device memory for transports that move host memory: packed on the device, carried through pinned memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from kv_transfer.plan import IntArray, PairPlan
from kv_transfer.transports.cuda_ipc.copies import StreamCopies
from kv_transfer.transports.cuda_ipc.geometry import Family, Packing
from kv_transfer.transports.cuda_ipc.order import ComputeOrder
from kv_transfer.transports.cuda_ipc.runtime import CudaFailed, Runtime
from kv_transfer.views import BlockView, ByteArray

_STAGE_BYTES = 16 << 20
_TIMEOUT_S = 10.0
_POLL_S = 0.00005


class HostStage:
    """Buffers and a stream that all views of a pool share, one at a time. For any thread; the pool closes it."""

    def __init__(self, runtime: Runtime, device: int, order: ComputeOrder) -> None:
        self.runtime, self.order = runtime, order
        self.lock = threading.Lock()
        self.stream = 0
        self._copies: StreamCopies | None = None
        self._done = 0
        self._device = device
        self._num_claims = 0
        self._size = 0
        self.pinned: ByteArray = np.empty(0, np.uint8)
        self.address = 0
        self._families: dict[tuple[Packing, int], Sequence[Family]] = {}

    @property
    def copies(self) -> StreamCopies:
        assert self._copies is not None, "reserve() comes first"
        return self._copies

    def reserve(self, num_bytes: int) -> None:
        """Buffers of this size at least. Nothing is taken hold of before the first call."""
        if self._copies is None:
            blocks = 4 * self.runtime.num_multiprocessors(self._device)
            self.stream = self.runtime.create_stream(self._device)
            self._done = self.runtime.create_event(self._device)
            self._copies = StreamCopies(self.runtime, self._device, self.stream, blocks)
        if num_bytes > self._size:
            if self._size:
                self.runtime.free_pinned(self.pinned)
            self._size = max(num_bytes, _STAGE_BYTES)
            self.pinned = self.runtime.allocate_pinned(self._size)
            self.address = self.copies.allocate(self._size)

    @property
    def size(self) -> int:
        return self._size

    def families(self, packing: Packing) -> Sequence[Family]:
        key = packing, self.address
        if key not in self._families:
            self._families[key] = packing.by_part(self.address)
        return self._families[key]

    def hold_back(self) -> None:
        """What follows writes into the pool: not before the engine is done with the blocks."""
        self._num_claims = self.order.hold_back(self.stream, self._num_claims)

    def finish(self) -> None:
        """Wait until everything is done. Raises OSError when the device does not do it."""
        self.runtime.record(self._device, self._done, self.stream)
        until = time.monotonic() + _TIMEOUT_S
        while not self.runtime.is_done(self._done):
            if time.monotonic() > until:
                raise TimeoutError(f"device {self._device} has not carried out a copy within {_TIMEOUT_S:g} s")
            time.sleep(_POLL_S)

    def close(self) -> None:
        if self._copies is None:
            return
        self._copies.close()
        if self._size:
            self.runtime.free_pinned(self.pinned)
        self.runtime.destroy_event(self._done)
        self.runtime.destroy_stream(self.stream)


class StagedView(BlockView):
    """Raises OSError where the device fails: whoever moves the bytes treats it as a broken connection."""

    def __init__(self, plan: PairPlan, side: str, bases: Sequence[int], stage: HostStage) -> None:
        super().__init__(plan)
        self._plan, self._stage = plan, stage
        self._out = Packing(plan, side, tuple(bases), is_out=True)
        self._in = Packing(plan, side, tuple(bases), is_out=False)

    def gather(self, ids: IntArray, out: ByteArray | None = None) -> ByteArray:
        stage, packed = self._stage, out if out is not None else np.empty(len(ids) * self.unit_bytes, np.uint8)

        def fetch(first: int, count: int) -> None:
            # The stream does wait here: the events are of this process, which does not outlive itself.
            stage.order.follow(stage.stream)
            self._launch(self._out, ids[first : first + count])
            num_bytes = count * self.unit_bytes
            stage.runtime.copy_to_host(stage.pinned[:num_bytes], stage.address, stage.stream)
            stage.finish()
            for whole, piece in self._stretches(len(ids), first, count):
                packed[whole] = stage.pinned[piece]

        self._in_pieces(len(ids), fetch)
        return packed

    def scatter(self, ids: IntArray, data: ByteArray) -> None:
        stage = self._stage

        def put(first: int, count: int) -> None:
            for whole, piece in self._stretches(len(ids), first, count):
                stage.pinned[piece] = data[whole]
            stage.hold_back()
            num_bytes = count * self.unit_bytes
            stage.runtime.copy_from_host(stage.address, stage.pinned[:num_bytes], stage.stream)
            self._launch(self._in, ids[first : first + count])
            stage.finish()

        self._in_pieces(len(ids), put)

    def _in_pieces(self, num_units: int, move: Callable[[int, int], None]) -> None:
        with self._stage.lock:
            try:
                self._stage.reserve(self.unit_bytes)
                most = self._stage.size // max(1, self.unit_bytes)
                for first in range(0, num_units, most):
                    move(first, min(most, num_units - first))
            except CudaFailed as exc:
                raise OSError(str(exc)) from exc

    def _launch(self, packing: Packing, ids: IntArray) -> None:
        """Pack units into the device's buffer, or unpack them out of it."""
        start = 0
        for family in self._stage.families(packing):
            packed = start + np.arange(len(ids), dtype=np.int64) * family.unit_bytes
            if packing.is_out:
                self._stage.copies.launch(family, family.src_step.offsets(ids), packed)
            else:
                self._stage.copies.launch(family, packed, family.dst_step.offsets(ids))
            start += len(ids) * family.unit_bytes

    def _stretches(self, num_units: int, first: int, count: int) -> list[tuple[slice, slice]]:
        """Where each part of some units lies among the bytes of all, and in the buffer."""
        found, before = [], 0
        for part in self._plan.parts:
            size = part.num_bytes
            whole, piece = before * num_units + first * size, before * count
            found.append((slice(whole, whole + count * size), slice(piece, piece + count * size)))
            before += size
        return found
