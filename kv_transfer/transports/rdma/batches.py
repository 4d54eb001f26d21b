"""What carries a chunk: batches, right into the pool or by way of staging memory. In the loop's thread."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from kv_transfer.errors import TransportFailed
from kv_transfer.plan import IntArray, PairPlan
from kv_transfer.transports.rdma.connecting import Connection, Lane
from kv_transfer.transports.rdma.device import Device
from kv_transfer.transports.rdma.operations import Operation, PartMoves, moves_of
from kv_transfer.transports.rdma.orders import Order
from kv_transfer.transports.rdma.queue_pair import Completion
from kv_transfer.transports.rdma.requests import LocalRegion
from kv_transfer.transports.rdma.staging import Staging
from kv_transfer.transports.rdma.wire import RemoteRegion
from kv_transfer.views import BlockView, HostView


@dataclass(eq=False, slots=True)
class Chunk:
    """
    Attributes:
        num_batches: that are not done.
        is_given_up: cancelled, or refused by the source.
    """

    chunk_id: int
    token: bytes
    num_batches: int = 0
    is_given_up: bool = False


@dataclass(eq=False, slots=True)
class Staged:
    """Units that go through a staging slot.

    Attributes:
        src_ids, dst_ids: [num_units]
        slot: from the time on when it is known what fills it.
        num_batches: that are not done.
    """

    src_ids: IntArray
    dst_ids: IntArray
    slot: int | None = None
    num_batches: int = 1


@dataclass(eq=False, slots=True)
class Batch:
    """What is posted together: reads, or an order for the source to carry out.

    Attributes:
        part: number of the part that it is of; unused where an order is for several.
        reads: empty for an order, and for staged units without a slot.
        order: None for reads, and for staged units without a slot.
        lane: where it is posted.
    """

    chunk: Chunk
    part: int
    reads: tuple[Operation, ...] = ()
    order: Order | None = None
    staged: Staged | None = None
    lane: Lane | None = None

    @property
    def size(self) -> int:
        """What it takes of a lane's room; 0 while it waits for a slot."""
        return len(self.reads) if self.order is None else 1


class Batcher(ABC):
    """Makes and posts the batches of one link. Owns the staging memory, if its plan needs any."""

    def __init__(
        self,
        device: Device,
        plan: PairPlan,
        view: BlockView,
        regions: Sequence[LocalRegion],
        *,
        room: int,
        num_lanes: int,
    ) -> None:
        """
        Args:
            regions: of our pool.
            room: that a lane has.
        """
        self._device, self._view, self._regions, self._num_lanes = device, view, regions, num_lanes
        self.room = room
        self._parts = [moves_of(part, plan.src_units, plan.dst_units) for part in plan.parts]
        self._unit_bytes = plan.unit_bytes
        self._staging: Staging | None = None

    @property
    @abstractmethod
    def offered(self) -> list[RemoteRegion]:
        """Our regions that the source may write to; once it is ready."""

    @abstractmethod
    def post(self, batch: Batch, lane: Lane, connection: Connection, number: int) -> None:
        """Begin to carry a batch out; a completion that is the answer to ``number`` follows.

        Raises:
            the verbs' error: nothing was begun, or the queue pair is of no more use.
        """

    @abstractmethod
    def answer(self, completion: Completion) -> tuple[int | None, bool]:
        """What number a good completion is the answer to, None for none; and whether that was refused."""

    @abstractmethod
    def _direct(self, chunk: Chunk, src_ids: IntArray, dst_ids: IntArray) -> Iterator[Batch]:
        """Batches of the parts that go right into the pool."""

    @abstractmethod
    def _fill(self, batch: Batch, staged: Staged, slot: int) -> list[Batch]:
        """Batches that fill a slot."""

    def make_ready(self) -> None:
        """Register staging memory, if it is needed and not there yet.

        Raises:
            TransportFailed: it cannot be, or the pool is where runs cannot be picked out.
        """
        staged = [part for part in self._parts if not part.is_direct]
        if self._staging is not None or not staged:
            return
        if not isinstance(self._view, HostView):
            raise TransportFailed("what moves is in short runs, and cannot be picked out on the device")
        self._staging = self._make_staging(staged)

    def batches(self, chunk: Chunk, src_ids: IntArray, dst_ids: IntArray) -> Iterator[Batch]:
        """All batches of a chunk, in the order in which they are to be posted."""
        yield from self._direct(chunk, src_ids, dst_ids)
        for number, part in enumerate(self._parts):
            if part.is_direct:
                continue
            assert self._staging is not None
            order, most = np.argsort(src_ids, kind="stable"), self._staging.units_per_slot(part)
            for start in range(0, len(order), most):
                some = order[start : start + most]
                yield Batch(chunk, number, staged=Staged(src_ids[some], dst_ids[some]))

    def take_slot(self, batch: Batch) -> list[Batch]:
        """What stands for a batch of staged units once there is a slot for them; empty while there is none."""
        staged = batch.staged
        assert staged is not None and self._staging is not None
        staged.slot = self._staging.take()
        if staged.slot is None:
            return []
        batches = self._fill(batch, staged, staged.slot)
        staged.num_batches = len(batches)
        batch.chunk.num_batches += len(batches) - 1
        return batches

    def leave_slot(self, batch: Batch) -> None:
        """A batch is done, or dropped; the last one of its slot takes what has arrived out of it."""
        staged = batch.staged
        if staged is None or staged.slot is None or self._staging is None:
            return
        staged.num_batches -= 1
        if staged.num_batches:
            return
        if not batch.chunk.is_given_up and isinstance(self._view, HostView):
            self._staging.scatter(staged.slot, self._parts[batch.part], self._view.parts[batch.part], staged.dst_ids)
        self._staging.give_back(staged.slot)

    def close(self) -> None:
        """After the queue pairs that reach its memory. Idempotent."""
        if self._staging is not None:
            self._staging.close()

    @abstractmethod
    def _make_staging(self, parts: Sequence[PartMoves]) -> Staging:
        """Registered as the way of this batcher needs it. Raises RdmaUnavailable."""
