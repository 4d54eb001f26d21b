"""Write mode, at the destination: chunks become orders, which the source carries out. In the loop's thread."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from kv_transfer.plan import IntArray
from kv_transfer.transports.rdma.batches import Batch, Batcher, Chunk, Staged
from kv_transfer.transports.rdma.connecting import Connection, Lane
from kv_transfer.transports.rdma.operations import PartMoves
from kv_transfer.transports.rdma.orders import MAX_UNITS, Order, pack_order, unpack_answer
from kv_transfer.transports.rdma.queue_pair import Completion
from kv_transfer.transports.rdma.staging import Staging
from kv_transfer.transports.rdma.wire import RemoteRegion

# An order costs a message and a wake-up at the source: what is smaller is not shared out over queue pairs.
_SHARED_BYTES = 1 << 20


class OrderBatcher(Batcher):
    """A lane's room is the orders that may be under way on it, each of which has a receive posted for its answer."""

    @property
    def offered(self) -> list[RemoteRegion]:
        staging = [] if self._staging is None else [self._staging.region.for_peer]
        return [*(region.for_peer for region in self._regions), *staging]

    def post(self, batch: Batch, lane: Lane, connection: Connection, number: int) -> None:
        assert batch.order is not None
        lane.pair.expect()
        connection.tell(pack_order(number, lane.index, batch.order))

    def answer(self, completion: Completion) -> tuple[int | None, bool]:
        if completion.immediate is None:
            return None, False
        return unpack_answer(completion.immediate)

    def _direct(self, chunk: Chunk, src_ids: IntArray, dst_ids: IntArray) -> Iterator[Batch]:
        if not any(part.is_direct for part in self._parts):
            return
        # Neighbours in our pool, which one write can fill, stay in one order.
        order = np.argsort(dst_ids, kind="stable")
        most = max(-(-len(order) // self._num_lanes), -(-_SHARED_BYTES // self._unit_bytes))
        for some in _cut(order, most):
            yield Batch(chunk, 0, order=Order(chunk.token, src_ids[some], dst_ids[some]))

    def _fill(self, batch: Batch, staged: Staged, slot: int) -> list[Batch]:
        pitch, orders, done = self._parts[batch.part].staged_unit_bytes, [], 0
        for some in _cut(staged.src_ids, MAX_UNITS):
            orders.append(Order(batch.chunk.token, some, None, batch.part, slot + done * pitch))
            done += len(some)
        return [Batch(batch.chunk, batch.part, order=order, staged=staged) for order in orders]

    def _make_staging(self, parts: Sequence[PartMoves]) -> Staging:
        return Staging(self._device, parts, is_writable=True)


def _cut(ids: IntArray, most: int) -> Iterator[IntArray]:
    most = min(most, MAX_UNITS)
    for start in range(0, len(ids), most):
        yield ids[start : start + most]
