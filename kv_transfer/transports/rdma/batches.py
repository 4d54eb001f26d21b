"""What carries a chunk: batches of reads, right into the pool or by way of staging memory. In the loop's thread."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from kv_transfer.errors import TransportFailed
from kv_transfer.plan import IntArray, PairPlan
from kv_transfer.transports.rdma.connecting import Lane
from kv_transfer.transports.rdma.device import MAX_BATCH_READS, Device
from kv_transfer.transports.rdma.reads import Read, group, merged_reads, reads_of
from kv_transfer.transports.rdma.requests import LocalRegion
from kv_transfer.transports.rdma.staging import Staging
from kv_transfer.transports.rdma.wire import RemoteRegion
from kv_transfer.views import BlockView, HostView


@dataclass(eq=False, slots=True)
class Chunk:
    """
    Attributes:
        num_batches: that are not done.
    """

    chunk_id: int
    token: bytes
    num_batches: int = 0
    is_cancelled: bool = False


@dataclass(eq=False, slots=True)
class Staged:
    """Units that go through a staging slot.

    Attributes:
        src_ids, dst_ids: [num_units]
        slot: from the time on when their reads are made.
        num_batches: that are not done.
    """

    src_ids: IntArray
    dst_ids: IntArray
    slot: int | None = None
    num_batches: int = 1


@dataclass(eq=False, slots=True)
class Batch:
    """Reads that are posted together.

    Attributes:
        part: number of the part that they are of.
        reads: empty for staged units without a slot.
        lane: where they are posted.
    """

    chunk: Chunk
    part: int
    reads: tuple[Read, ...] = ()
    staged: Staged | None = None
    lane: Lane | None = None


class Batcher:
    """For one link. Owns the staging memory, if its plan needs any."""

    def __init__(
        self,
        device: Device,
        plan: PairPlan,
        view: BlockView,
        regions: Sequence[LocalRegion],
        *,
        depth: int,
        num_lanes: int,
    ) -> None:
        """
        Args:
            regions: of our pool.
            depth: reads that may be posted on a lane.
        """
        self._device, self._view, self._regions, self._num_lanes = device, view, regions, num_lanes
        self._parts = [reads_of(part, plan.src_units, plan.dst_units) for part in plan.parts]
        self._most_reads = min(MAX_BATCH_READS, depth)
        self._staging: Staging | None = None

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
        self._staging = Staging(self._device, staged)

    def batches(self, chunk: Chunk, src_ids: IntArray, dst_ids: IntArray) -> Iterator[Batch]:
        """All batches of a chunk, in the order in which they are to be posted."""
        for number, part in enumerate(self._parts):
            if not part.is_direct:
                assert self._staging is not None
                order, most = np.argsort(src_ids, kind="stable"), self._staging.units_per_slot(part)
                for start in range(0, len(order), most):
                    some = order[start : start + most]
                    yield Batch(chunk, number, staged=Staged(src_ids[some], dst_ids[some]))
                continue
            reads = list(
                merged_reads(
                    part.sources(src_ids),
                    part.targets(dst_ids),
                    part.stretch_bytes,
                    max_pieces=self._device.max_pieces,
                    max_bytes=self._device.max_message_bytes,
                )
            )
            # A large chunk keeps all queue pairs busy.
            most = max(1, min(self._most_reads, -(-len(reads) // self._num_lanes)))
            for together in group(reads, most):
                yield Batch(chunk, number, together)

    def take_slot(self, batch: Batch) -> list[Batch]:
        """What stands for a batch of staged units once there is a slot for them; empty while there is none."""
        staged, part = batch.staged, self._parts[batch.part]
        assert staged is not None and self._staging is not None
        staged.slot = self._staging.take()
        if staged.slot is None:
            return []
        reads = list(
            merged_reads(
                part.sources(staged.src_ids),
                staged.slot + part.staged(len(staged.src_ids)),
                part.stretch_bytes,
                max_pieces=1,
                max_bytes=self._device.max_message_bytes,
            )
        )
        batches = [Batch(batch.chunk, batch.part, some, staged) for some in group(reads, self._most_reads)]
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
        if not batch.chunk.is_cancelled and isinstance(self._view, HostView):
            self._staging.scatter(staged.slot, self._parts[batch.part], self._view.parts[batch.part], staged.dst_ids)
        self._staging.give_back(staged.slot)

    def ends(self, batch: Batch, remote: Sequence[RemoteRegion]) -> tuple[RemoteRegion, LocalRegion]:
        """The regions that a batch is read from and into."""
        part = self._parts[batch.part].part
        if batch.staged is not None and self._staging is not None:
            return remote[part.src.region], self._staging.region
        return remote[part.src.region], self._regions[part.dst.region]

    def close(self) -> None:
        """After the queue pairs that read into its memory. Idempotent."""
        if self._staging is not None:
            self._staging.close()
