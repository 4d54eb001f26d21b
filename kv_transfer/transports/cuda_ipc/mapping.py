"""A peer's pool as this process has mapped it: addresses, its order page, and everything that is to be given back."""

from __future__ import annotations

import os
import weakref
from bisect import bisect_left
from collections.abc import Sequence
from contextlib import suppress

from kv_transfer.errors import TransportFailed
from kv_transfer.layout import KVLayout
from kv_transfer.plan import PairPlan
from kv_transfer.transports.cuda_ipc.order import NUM_SETS, PeerOrder, group_ends, map_page
from kv_transfer.transports.cuda_ipc.pool import CudaPool
from kv_transfer.transports.cuda_ipc.regions import IMPORTS
from kv_transfer.transports.cuda_ipc.runtime import CudaFailed, Runtime
from kv_transfer.transports.cuda_ipc.wire import Description

# Pools that this process serves, by their transport's nonce: CUDA does not let a process open its own handles.
OWN_POOLS: weakref.WeakValueDictionary[str, CudaPool] = weakref.WeakValueDictionary()


class MappedPool:
    """Mapped on construction; whoever made it closes it when no copy reads from it any more.

    Attributes:
        device: that the pool is on, as this process numbers them.
        is_reachable: whether kernels on our device can address it; if not, it is mapped for its own device.
        bases, region_bytes: addresses and sizes of its regions.
    """

    def __init__(
        self, runtime: Runtime, our_device: int, described: Description, page_fd: int, layout: KVLayout
    ) -> None:
        """Takes ownership of ``page_fd``.

        Raises:
            TransportFailed: its device is not to be seen from here, or a handle cannot be opened.
        """
        self._runtime = runtime
        self.region_bytes = [region.num_bytes for region in described.regions]
        self._handles: list[tuple[int, bytes]] = []
        self._events: list[int] = []
        self._is_ordered = False
        try:
            self.device = device_of(runtime, described.uuid)
            self.is_reachable = self.device == our_device or runtime.can_access_peer(our_device, self.device)
            if described.pid == os.getpid():
                self._use_own(described)
            else:
                self._open(our_device if self.is_reachable else self.device, described, page_fd, layout)
        except BaseException:
            self.close()
            raise
        finally:
            os.close(page_fd)

    def close(self) -> None:
        """Unmap. Idempotent."""
        for event in self._events:
            with suppress(CudaFailed):
                self._runtime.destroy_event(event)
        for device, handle in self._handles:
            with suppress(CudaFailed):
                IMPORTS.close(self._runtime, device, handle)
        if self._is_ordered:
            self.order.close()
        self._events, self._handles = [], []

    def _use_own(self, described: Description) -> None:
        pool = OWN_POOLS.get(described.nonce)
        if pool is None:
            raise TransportFailed("it is a pool of this very process, which is closed")
        self.bases: Sequence[int] = pool.bases
        self.order = PeerOrder(self._runtime, pool.order.page, pool.order.events, pool.order.num_groups)
        self._is_ordered = True

    def _open(self, device: int, described: Description, page_fd: int, layout: KVLayout) -> None:
        if described.num_groups != len(group_ends(layout.num_rank_layers)) or len(described.events) != (
            NUM_SETS * described.num_groups
        ):
            raise TransportFailed("its events are not those of its layers")
        bases = []
        for region in described.regions:
            base = IMPORTS.open(self._runtime, device, region.handle)
            self._handles.append((device, region.handle))
            bases.append(base + region.offset)
        self.bases = bases
        for handle in described.events:
            self._events.append(self._runtime.import_event(device, handle))
        try:
            page = map_page(page_fd, layout.num_blocks)
        except (OSError, ValueError) as exc:
            raise TransportFailed(f"its order page cannot be mapped: {exc}") from exc
        self.order = PeerOrder(self._runtime, page, self._events, described.num_groups)
        self._is_ordered = True


def device_of(runtime: Runtime, uuid: bytes) -> int:
    """
    Raises:
        TransportFailed: this process does not see the device; says what to do.
    """
    for device in range(runtime.num_devices()):
        if runtime.uuid(device) == uuid:
            return device
    raise TransportFailed(
        f"its GPU {uuid.hex()} is not visible to this process: name it in CUDA_VISIBLE_DEVICES as well, after our own"
    )


def groups_of(plan: PairPlan, layout: KVLayout) -> list[int]:
    """For each layer of a plan, the group that the source computes it in."""
    ends = group_ends(layout.num_rank_layers)
    return [bisect_left(ends, layer - layout.first_layer) for layer, _ in plan.layers]
