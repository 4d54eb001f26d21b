"""Write mode, at the source: carries out one destination's orders. In the loop's thread.

Orders of a queue pair are carried out one after the other; the last write of an order brings its answer, and all that
was written before has arrived by then. The destination has no more orders under way than it has said, each with a
receive posted for its answer, so that no answer waits for one; our own queue is kept below its depth here.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from kv_transfer.leases import LeaseTable
from kv_transfer.plan import IntArray, PairPlan
from kv_transfer.transports.rdma.device import MAX_BATCH, Device
from kv_transfer.transports.rdma.operations import Operation, PartMoves, group, merged_operations, moves_of
from kv_transfer.transports.rdma.orders import HEAD_BYTES, BadOrder, Order, ids_bytes, pack_answer, unpack_order
from kv_transfer.transports.rdma.queue_pair import BAD_ORDER, GAVE_UP, LOCAL_ERROR, CompletionQueue, QueuePair
from kv_transfer.transports.rdma.requests import LocalRegion
from kv_transfer.transports.rdma.served import PairsFailed, Served
from kv_transfer.transports.rdma.wire import RemoteRegion, Request

log = logging.getLogger("kv_transfer")


@dataclass(frozen=True, slots=True)
class _Writes:
    """What is posted in one go."""

    operations: tuple[Operation, ...]
    target: RemoteRegion
    source: LocalRegion


class _Job:
    """An order that is being carried out.

    Attributes:
        next: to be posted; None when only a refusal is.
    """

    def __init__(self, number: int, token: bytes, writes: Iterator[_Writes] | None) -> None:
        """``writes`` are made as they are needed; None for an order that is refused."""
        self.number, self.token, self._writes = number, token, writes
        self.next: _Writes | None = None
        self._is_begun = False

    def prepare(self) -> None:
        """Find out what comes first. Raises BadOrder."""
        if self._writes is not None and not self._is_begun:
            self._is_begun, self.next = True, next(self._writes, None)
            if self.next is None:
                raise BadOrder("an order for nothing")

    def advance(self) -> bool:
        """What was next is posted; whether it was the last. Raises BadOrder."""
        assert self._writes is not None
        self.next = next(self._writes, None)
        return self.next is None

    def revoke(self) -> None:
        self._writes = self.next = None


@dataclass(eq=False, slots=True)
class _Lane:
    """
    Attributes:
        jobs: not wholly posted; the first one is being posted.
        taken: operations that are posted.
    """

    pair: QueuePair
    jobs: deque[_Job] = field(default_factory=deque)
    taken: int = 0


@dataclass(frozen=True, slots=True)
class _Posted:
    lane: _Lane
    token: bytes
    size: int
    is_write: bool


class Pusher(Served):
    def __init__(
        self,
        device: Device,
        leases: LeaseTable,
        *,
        session: bytes,
        regions: Sequence[LocalRegion],
        request: Request,
        changed: Callable[[], None],
        count: Callable[[str, int], None],
    ) -> None:
        """Takes hold of nothing yet.

        Args:
            session: data token by which the destination was let in.
            regions: of our pool.
            changed: called when something that was posted is done.
        """
        super().__init__(device, count)
        self._leases, self._session, self._regions, self._request = leases, session, regions, request
        self._changed = changed
        self._queue: CompletionQueue | None = None
        self._lanes: list[_Lane] = []
        self._posted: dict[int, _Posted] = {}
        self._next_id = 0
        self._depth = 1
        self._moves: tuple[PairPlan, list[PartMoves]] | None = None
        self._failed: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def open(self) -> None:
        """Make the queue pairs. Raises the verbs' error; ``close`` is still to be called."""
        device, number = self.device, len(self._request.pairs)
        limits = device.attributes
        self._depth = max(1, min(device.options.queue_depth, limits.max_qp_wr, limits.max_cqe // number))
        self._queue = CompletionQueue(device, number * self._depth)
        asyncio.get_running_loop().add_reader(self._queue.fd, self._on_completions)
        self.make_pairs(number, self._queue.verbs_queue, depth=self._depth, max_pieces=device.max_write_pieces)
        self._lanes = [_Lane(pair) for pair in self.pairs]

    async def serve(self, reader: asyncio.StreamReader) -> None:
        orders = asyncio.get_running_loop().create_task(self._take_orders(reader))
        try:
            await asyncio.wait((orders, self._failed), return_when=asyncio.FIRST_COMPLETED)
        finally:
            orders.cancel()
        if self._failed.done():
            raise PairsFailed(self._failed.result())

    def revoke(self, token: bytes) -> None:
        for lane in list(self._lanes):
            for job in lane.jobs:
                if job.token == token:
                    job.revoke()
            self._pump(lane)

    def is_reading(self, token: bytes) -> bool:
        return any(posted.is_write and posted.token == token for posted in self._posted.values())

    def give_up(self) -> None:
        self._fail(GAVE_UP)

    def close(self) -> None:
        super().close()
        if self._queue is not None:
            asyncio.get_running_loop().remove_reader(self._queue.fd)
            self.closed(self._queue.close)
            self._queue = None
        for lane in self._lanes:
            lane.jobs.clear()
        self._lanes.clear()
        self._posted.clear()
        self._failed.cancel()
        self._changed()

    async def _take_orders(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                head = await reader.readexactly(HEAD_BYTES)
                self._take(*unpack_order(head, await reader.readexactly(ids_bytes(head))))
        except (asyncio.IncompleteReadError, OSError):
            return
        except BadOrder as exc:
            self._bad_order(exc)

    def _take(self, number: int, lane_index: int, order: Order) -> None:
        """Raises BadOrder."""
        if not self._lanes:
            # They have failed; what still comes in was on its way.
            return
        if lane_index >= len(self._lanes):
            raise BadOrder(f"an order for queue pair {lane_index} of {len(self._lanes)}")
        lane = self._lanes[lane_index]
        # Those whose last write is posted do not count: it may have arrived before we hear that it has.
        if len(lane.jobs) >= self._request.num_orders:
            raise BadOrder(f"more than {self._request.num_orders} orders at a time")
        lease = self._leases.find(order.token, self._session, order.src_ids)
        writes = None if lease is None else self._writes(order, lease.plan)
        lane.jobs.append(_Job(number, order.token, writes))
        self._pump(lane)

    def _pump(self, lane: _Lane) -> None:
        """Post what may be posted now."""
        try:
            while lane.jobs and self._post_next(lane, lane.jobs[0]):
                pass
        except BadOrder as exc:
            self._bad_order(exc)
        except self.device.verbs.Error as exc:
            log.warning("RDMA writes cannot be posted: %s", exc)
            self._fail(LOCAL_ERROR)

    def _post_next(self, lane: _Lane, job: _Job) -> bool:
        """Whether something was posted. Raises BadOrder, the verbs' error."""
        job.prepare()
        writes = job.next
        size = 1 if writes is None else len(writes.operations)
        if lane.taken + size > self._depth:
            return False
        self._next_id += 1
        is_last = True
        if writes is None:
            lane.pair.say(pack_answer(job.number, is_refused=True), self._next_id)
            self._count("orders_refused", 1)
        else:
            is_last = job.advance()
            immediate = pack_answer(job.number, is_refused=False) if is_last else None
            lane.pair.write(writes.operations, writes.target, writes.source, self._next_id, immediate)
            self._count("writes_posted", size)
        self._posted[self._next_id] = _Posted(lane, job.token, size, writes is not None)
        lane.taken += size
        if is_last:
            lane.jobs.popleft()
        return True

    def _on_completions(self) -> None:
        if self._queue is None:
            return
        for completion in self._queue.take():
            if completion.status:
                self._fail(completion.status)
                return
            posted = self._posted.pop(completion.wr_id)
            posted.lane.taken -= posted.size
        for lane in list(self._lanes):
            self._pump(lane)
        self._changed()

    def _writes(self, order: Order, plan: PairPlan) -> Iterator[_Writes]:
        """Raises BadOrder, also where it is in the middle."""
        if self._moves is None or self._moves[0] is not plan:
            self._moves = plan, [moves_of(part, plan.src_units, plan.dst_units) for part in plan.parts]
        moves, theirs = self._moves[1], self._request.regions
        if order.dst_ids is not None:
            for part in moves:
                if not part.is_direct:
                    continue
                if part.part.dst.region >= len(theirs):
                    raise BadOrder(f"an order to write to region {part.part.dst.region} of {len(theirs)}")
                yield from self._part(part, order, part.targets(order.dst_ids), theirs[part.part.dst.region])
            return
        if order.part >= len(moves) or moves[order.part].is_direct or order.slot > theirs[-1].num_bytes:
            raise BadOrder(f"an order to stage part {order.part} at {order.slot}")
        part = moves[order.part]
        yield from self._part(part, order, order.slot + part.staged(len(order.src_ids)), theirs[-1])

    def _part(self, part: PartMoves, order: Order, targets: IntArray, target: RemoteRegion) -> Iterator[_Writes]:
        if int(targets.max()) + part.stretch_bytes > target.num_bytes:
            raise BadOrder("an order to write past the end of a region")
        writes = merged_operations(
            targets,
            part.sources(order.src_ids),
            part.stretch_bytes,
            max_pieces=self.device.max_write_pieces,
            max_bytes=self.device.max_message_bytes,
        )
        for operations in group(writes, min(MAX_BATCH, self._depth)):
            yield _Writes(operations, target, self._regions[part.part.src.region])

    def _bad_order(self, exc: BadOrder) -> None:
        log.warning("an RDMA peer is hung up on: %s", exc)
        self._fail(BAD_ORDER)

    def _fail(self, code: int) -> None:
        """Close at once; the destination will be told."""
        if not self._failed.done():
            self._failed.set_result(code)
        self.close()
