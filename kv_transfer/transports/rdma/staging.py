"""Where stretches of a source land when only some runs of each are wanted. In the loop's thread."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np

from kv_transfer.plan import IntArray
from kv_transfer.transports.rdma.device import Device
from kv_transfer.transports.rdma.operations import PartMoves
from kv_transfer.transports.rdma.requests import LocalRegion
from kv_transfer.views import PartView

NUM_SLOTS = 4
_SLOT_BYTES = 1 << 20


class Staging:
    """A few registered slots of one size; each for some units of one part."""

    def __init__(self, device: Device, parts: Sequence[PartMoves], *, is_writable: bool) -> None:
        """
        Args:
            parts: those that do not go right into the pool.
            is_writable: by the source.
        Raises:
            RdmaUnavailable: it cannot be registered.
        """
        self._slot_bytes = max(_SLOT_BYTES, *(part.staged_unit_bytes for part in parts))
        size = NUM_SLOTS * self._slot_bytes
        self._bytes = np.frombuffer(mmap.mmap(-1, size), np.uint8)
        address = int(self._bytes.ctypes.data)
        self._device = device
        self._registered: Any = device.register_staging(address, size, is_writable=is_writable)
        self.region = LocalRegion(address, int(self._registered.lkey), int(self._registered.rkey), size)
        self._free = list(range(NUM_SLOTS))

    def units_per_slot(self, part: PartMoves) -> int:
        return max(1, self._slot_bytes // part.staged_unit_bytes)

    def take(self) -> int | None:
        """A slot, as its offset; None when all are in use."""
        return self._free.pop() * self._slot_bytes if self._free else None

    def give_back(self, slot: int) -> None:
        self._free.append(slot // self._slot_bytes)

    def scatter(self, slot: int, part: PartMoves, view: PartView, dst_ids: IntArray) -> None:
        """Put what has arrived in a slot where it belongs.

        Args:
            dst_ids: of units, [num_units], in the order in which they lie there.
        """
        word = view.array.dtype
        arrived = np.ndarray(
            (len(dst_ids), *part.part.shape[:-1], part.part.shape[-1] // word.itemsize),
            word,
            self._bytes.data,
            slot,
            (*part.staged_strides(), word.itemsize),
        )
        view.write(dst_ids, arrived)

    def close(self) -> None:
        """After all queue pairs that reach it."""
        if self._registered is not None:
            self._device.deregister(self._registered)
            self._registered = None
