"""Enqueues the copies of units on a stream, by the kernel or stretch by stretch; and tells when they are done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kv_transfer.plan import IntArray
from kv_transfer.transports.cuda_ipc.geometry import Family, mean_stretch_bytes, stretches
from kv_transfer.transports.cuda_ipc.kernel import Launch
from kv_transfer.transports.cuda_ipc.paths import Choice, Path
from kv_transfer.transports.cuda_ipc.runtime import Runtime
from kv_transfer.views import ByteArray

_LEAST_BUFFER_BYTES = 64 << 10
_BUFFERS_AT_ONCE = 16


@dataclass(slots=True)
class _Buffer:
    """Where the numbers of some units are on their way to the device; in use until ``free_after`` is done."""

    pinned: ByteArray
    address: int
    free_after: int


class StreamCopies:
    """Of one stream. For one thread; whoever made it closes it when nothing is under way any more."""

    def __init__(self, runtime: Runtime, device: int, stream: int, max_thread_blocks: int) -> None:
        self.device, self.stream = device, stream
        self._runtime, self._max_thread_blocks = runtime, max_thread_blocks
        self._buffers: list[_Buffer] = []
        self._pinned: list[ByteArray] = []
        self._tables: dict[int, tuple[Family, int]] = {}
        self._held: list[int] = []

    def allocate(self, num_bytes: int) -> int:
        """Memory on the device for as long as this lives."""
        self._held.append(self._runtime.allocate(self.device, num_bytes))
        return self._held[-1]

    def copy(self, families: Sequence[Family], src_ids: IntArray, dst_ids: IntArray, choice: Choice) -> list[Path]:
        """Enqueue the copy of units; the path that each family took. Ids are [num_units], and valid."""
        return [self._copy(family, src_ids, dst_ids, choice) for family in families if len(src_ids)]

    def close(self) -> None:
        for buffer in self._buffers:
            self._runtime.destroy_event(buffer.free_after)
        for pinned in self._pinned:
            self._runtime.free_pinned(pinned)
        for address in self._held:
            self._runtime.free(self.device, address)
        self._buffers, self._pinned, self._tables, self._held = [], [], {}, []

    def _copy(self, family: Family, src_ids: IntArray, dst_ids: IntArray, choice: Choice) -> Path:
        path = choice.path_for(mean_stretch_bytes(family, src_ids, dst_ids))
        if path is Path.KERNEL:
            self.launch(family, family.src_step.offsets(src_ids), family.dst_step.offsets(dst_ids))
            return path
        found = stretches(family, src_ids, dst_ids)
        src, dst, sizes = found.src.tolist(), found.dst.tolist(), found.num_bytes.tolist()
        if path is Path.BATCH:
            self._runtime.copy_batch(dst, src, sizes, self.stream)
        else:
            for to, start, size in zip(dst, src, sizes, strict=True):
                self._runtime.copy_peer((self.device, to), (choice.src_device, start), size, self.stream)
        return path

    def launch(self, family: Family, src_offsets: IntArray, dst_offsets: IntArray) -> None:
        """Enqueue the kernel for units at distances from unit 0; [num_units], in bytes."""
        table = self._table(family)
        count = len(src_offsets)
        buffer = self._free_buffer(16 * count)
        numbers = buffer.pinned[: 16 * count].view(np.int64)
        numbers[:count] = src_offsets
        numbers[count:] = dst_offsets
        self._runtime.copy_from_host(buffer.address, buffer.pinned[: 16 * count], self.stream)
        most = family.units_per_launch
        for first in range(0, count, most):
            launch = Launch(
                word_bytes=family.word_bytes,
                run_src=table,
                run_dst=table + 8 * family.num_runs,
                unit_src=buffer.address + 8 * first,
                unit_dst=buffer.address + 8 * (count + first),
                run_words=family.run_words,
                num_runs=family.num_runs,
                num_units=min(most, count - first),
            )
            self._runtime.launch(self.device, launch, self._max_thread_blocks, self.stream)
        self._runtime.record(self.device, buffer.free_after, self.stream)

    def _table(self, family: Family) -> int:
        """The addresses of a family's runs, on the device: put there once."""
        found = self._tables.get(id(family))
        if found is None:
            num_bytes = 16 * family.num_runs
            address = self.allocate(num_bytes)
            buffer = self._free_buffer(num_bytes)
            buffer.pinned[:num_bytes] = np.concatenate((family.src, family.dst)).view(np.uint8)
            self._runtime.copy_from_host(address, buffer.pinned[:num_bytes], self.stream)
            self._runtime.record(self.device, buffer.free_after, self.stream)
            # The family is kept too, so that no other one gets its id.
            found = self._tables[id(family)] = family, address
        return found[1]

    def _free_buffer(self, num_bytes: int) -> _Buffer:
        for buffer in self._buffers:
            if len(buffer.pinned) >= num_bytes and self._runtime.is_done(buffer.free_after):
                return buffer
        size = max(_LEAST_BUFFER_BYTES, 1 << (num_bytes - 1).bit_length())
        # Several of the usual size at once: allocating takes longer than many a copy.
        count = _BUFFERS_AT_ONCE if size == _LEAST_BUFFER_BYTES else 1
        pinned = self._runtime.allocate_pinned(count * size)
        address = self.allocate(count * size)
        self._pinned.append(pinned)
        for start in range(0, count * size, size):
            event = self._runtime.create_event(self.device)
            self._buffers.append(_Buffer(pinned[start : start + size], address + start, event))
        return self._buffers[-1]
