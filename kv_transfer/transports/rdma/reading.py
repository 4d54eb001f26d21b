"""Read mode: chunks become batches of RDMA READs, which we post. In the loop's thread."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kv_transfer.plan import IntArray
from kv_transfer.transports.rdma.batches import Batch, Batcher, Chunk, Staged
from kv_transfer.transports.rdma.connecting import Connection, Lane
from kv_transfer.transports.rdma.device import MAX_BATCH
from kv_transfer.transports.rdma.operations import PartMoves, group, merged_operations
from kv_transfer.transports.rdma.queue_pair import Completion
from kv_transfer.transports.rdma.staging import Staging
from kv_transfer.transports.rdma.wire import RemoteRegion


class ReadBatcher(Batcher):
    """A lane's room is the reads that may be posted on it. The last read of a batch is signalled."""

    @property
    def offered(self) -> list[RemoteRegion]:
        return []

    def post(self, batch: Batch, lane: Lane, connection: Connection, number: int) -> None:
        part = self._parts[batch.part].part
        source = connection.remote[part.src.region]
        target = self._regions[part.dst.region]
        if batch.staged is not None and self._staging is not None:
            target = self._staging.region
        lane.pair.read(batch.reads, source, target, number)

    def answer(self, completion: Completion) -> tuple[int | None, bool]:
        return completion.wr_id, False

    def _direct(self, chunk: Chunk, src_ids: IntArray, dst_ids: IntArray) -> Iterator[Batch]:
        for number, part in enumerate(self._parts):
            if not part.is_direct:
                continue
            reads = list(
                merged_operations(
                    part.sources(src_ids),
                    part.targets(dst_ids),
                    part.stretch_bytes,
                    max_pieces=self._device.max_read_pieces,
                    max_bytes=self._device.max_message_bytes,
                )
            )
            # A large chunk keeps all queue pairs busy.
            most = max(1, min(self._most_reads, -(-len(reads) // self._num_lanes)))
            for together in group(reads, most):
                yield Batch(chunk, number, together)

    def _fill(self, batch: Batch, staged: Staged, slot: int) -> list[Batch]:
        part = self._parts[batch.part]
        reads = merged_operations(
            part.sources(staged.src_ids),
            slot + part.staged(len(staged.src_ids)),
            part.stretch_bytes,
            max_pieces=1,
            max_bytes=self._device.max_message_bytes,
        )
        return [Batch(batch.chunk, batch.part, some, staged=staged) for some in group(reads, self._most_reads)]

    @property
    def _most_reads(self) -> int:
        return min(MAX_BATCH, self.room)

    def _make_staging(self, parts: Sequence[PartMoves]) -> Staging:
        return Staging(self._device, parts, is_writable=False)
