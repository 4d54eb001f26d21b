"""A pool in host memory of the engine's own."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from kv_transfer.errors import InvalidLayout
from kv_transfer.layout import KVLayout
from kv_transfer.plan import PairPlan
from kv_transfer.pool import BlockPool
from kv_transfer.tensors import Memory, place_tensors
from kv_transfer.views import BlockView, ByteArray, HostView


class TensorPool(BlockPool):
    """KV blocks in tensors that an engine has allocated, in any strides that a placement can say.

    The memory is private to this process: peers fetch from it by ``rdma`` or ``tcp``, on the same host too. For
    ``shm`` the engine must compute in a ``KVPool``, in views of its ``regions``. Into it, blocks can be fetched by all.

    Keeps the tensors alive.
    """

    def __init__(self, layout: KVLayout, tensors: Sequence[Any], names: Sequence[str]) -> None:
        """See ``place_tensors`` for the arguments.

        Raises:
            InvalidLayout: the tensors are not what the layout says, or not in host memory.
        """
        placed, memory = place_tensors(layout, tensors, names)
        if memory[0].device != "cpu":
            raise InvalidLayout("placement", f"is on {memory[0].device}: use a CudaPool")
        super().__init__(placed)
        self._tensors = tuple(tensors)
        self.regions = tuple(_bytes_at(region) for region in memory)

    @property
    def memory(self) -> tuple[Memory, ...]:
        return tuple(Memory(region.ctypes.data, region.nbytes, "cpu") for region in self.regions)

    def view(self, plan: PairPlan, side: str) -> BlockView:
        return HostView(plan, side, self.layout.num_blocks, self.regions)


def _bytes_at(memory: Memory) -> ByteArray:
    """No copy; whoever asks keeps the memory alive."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * memory.num_bytes).from_address(memory.address))
