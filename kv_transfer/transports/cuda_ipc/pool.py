"""A rank's KV pool in device memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from kv_transfer.errors import PoolUnavailable
from kv_transfer.layout import KVLayout, placement_of
from kv_transfer.plan import IntArray, PairPlan
from kv_transfer.pool import BlockPool
from kv_transfer.tensors import Memory, place_tensors
from kv_transfer.transports.cuda_ipc.host_view import HostStage, StagedView
from kv_transfer.transports.cuda_ipc.order import ComputeOrder
from kv_transfer.transports.cuda_ipc.regions import DeviceRegion, region_of
from kv_transfer.transports.cuda_ipc.runtime import CudaFailed, Runtime, open_runtime
from kv_transfer.views import BlockView

log = logging.getLogger("kv_transfer")


class CudaPool(BlockPool):
    """Blocks in tensors of an engine, or in memory of its own.

    ``begin_pass`` and ``layer_done`` are for engines that can say how far a forward pass has been launched: then layers
    are fetched while later ones are still computed. Without them, blocks are fetched when everything is done that had
    been launched when they were sent. Either way an engine need not synchronise with its device.
    """

    def __init__(
        self,
        layout: KVLayout,
        regions: Sequence[DeviceRegion],
        runtime: Runtime,
        stream: Callable[[], int] = lambda: 0,
    ) -> None:
        """
        Args:
            regions: as in the layout's placement.
            stream: the stream that the engine launches on just now; called in the engine's thread.
        Raises:
            PoolUnavailable: regions of other sizes than the layout's, or on several devices.
        """
        super().__init__(layout)
        sizes = placement_of(layout).region_bytes
        if tuple(region.num_bytes for region in regions) != sizes:
            got = ", ".join(str(region.num_bytes) for region in regions[:4])
            raise PoolUnavailable(layout.pool_bytes, f"the layout has regions of {sizes[:4]} bytes, the tensors {got}")
        devices = {runtime.allocation(region.address).device for region in regions}
        if len(devices) != 1:
            raise PoolUnavailable(
                layout.pool_bytes, f"its tensors are on devices {sorted(devices)}: one pool, one device"
            )
        self.runtime, self.regions = runtime, tuple(regions)
        (self.device,) = devices
        self.order = ComputeOrder(runtime, self.device, layout.num_rank_layers, layout.num_blocks, stream)
        self.is_mapped_by_others = False
        self._stage: HostStage | None = None
        self._owned: tuple[int, ...] = ()
        self._closed = False

    @classmethod
    def of_tensors(cls, layout: KVLayout, tensors: Sequence[Any], *, stream: Callable[[], int] = lambda: 0) -> CudaPool:
        """Over torch or cupy tensors, one a region; they stay alive with the pool.

        Raises:
            PoolUnavailable: a tensor is elsewhere, not contiguous, or of another size.
            TransportFailed: cupy, a driver or a device is missing.
        """
        return cls(layout, [region_of(tensor) for tensor in tensors], open_runtime(), stream)

    @classmethod
    def of_named_tensors(
        cls,
        layout: KVLayout,
        tensors: Sequence[Any],
        names: Sequence[str],
        *,
        stream: Callable[[], int] = lambda: 0,
        runtime: Runtime | None = None,
    ) -> CudaPool:
        """Over an engine's tensors in any strides, as ``TensorPool`` in host memory; they stay alive with the pool.

        Args:
            tensors, names: see ``place_tensors``.
        Raises:
            InvalidLayout: the tensors are not what the layout says.
            PoolUnavailable: they are on several devices.
            TransportFailed: cupy, a driver or a device is missing.
        """
        placed, memory = place_tensors(layout, tensors, names)
        owners = tuple(tensors)
        regions = [DeviceRegion(region.address, region.num_bytes, owners) for region in memory]
        return cls(placed, regions, runtime or open_runtime(), stream)

    @classmethod
    def allocate(cls, layout: KVLayout, device: int = 0, runtime: Runtime | None = None) -> CudaPool:
        """In memory of its own, from cudaMalloc, not zeroed.

        Raises:
            PoolUnavailable: the device has not so much memory.
            TransportFailed: cupy, a driver or a device is missing.
        """
        runtime = runtime or open_runtime()
        regions: list[DeviceRegion] = []
        try:
            for size in placement_of(layout).region_bytes:
                regions.append(DeviceRegion(runtime.allocate(device, size), size, None))
            pool = cls(layout, regions, runtime)
        except BaseException as exc:
            for region in regions:
                runtime.free(device, region.address)
            if isinstance(exc, CudaFailed):
                raise PoolUnavailable(layout.pool_bytes, str(exc)) from exc
            raise
        pool._owned = tuple(region.address for region in regions)
        return pool

    @property
    def is_on_device(self) -> bool:
        return True

    @property
    def memory(self) -> tuple[Memory, ...]:
        return tuple(Memory(region.address, region.num_bytes, f"cuda:{self.device}") for region in self.regions)

    @property
    def bases(self) -> tuple[int, ...]:
        """Addresses of the regions."""
        return tuple(region.address for region in self.regions)

    def begin_pass(self) -> None:
        """A forward pass is about to be launched. Engine's thread."""
        self.order.begin_pass()

    def layer_done(self, layer: int) -> None:
        """What writes this rank's layer ``layer``, and those before it, has been launched. Engine's thread."""
        self.order.layer_done(layer)

    def before_send(self, block_ids: IntArray) -> None:
        self.order.announce(block_ids)

    def before_receive(self) -> None:
        self.order.claim()

    def view(self, plan: PairPlan, side: str) -> BlockView:
        """For transports that move host memory: through pinned buffers that all views share."""
        if self._stage is None:
            self._stage = HostStage(self.runtime, self.device, self.order)
        return StagedView(plan, side, self.bases, self._stage)

    def close(self) -> None:
        """Let go of the tensors, or free the memory. Idempotent.

        Memory of its own that a peer still maps stays until this process ends: freeing it is undefined in CUDA.
        """
        if self._closed:
            return
        self._closed = True
        if self._stage is not None:
            self._stage.close()
        self.order.close()
        if self.is_mapped_by_others:
            if self._owned:
                log.warning("a peer still maps this KV pool: its memory stays until this process ends")
        else:
            for address in self._owned:
                self.runtime.free(self.device, address)
        self.regions = self._owned = ()
