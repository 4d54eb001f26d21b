"""The destination's end: a link that fetches chunks out of one source's pool. Everything runs in the loop's thread.

A chunk becomes batches, of reads or of orders to write; a batch is posted on the queue pair that has least to do, and
answered by one completion. What has been posted is never waited for without end: when a transfer is cancelled while
some of it is under way, that may complete for a moment, and then the queue pairs are destroyed, which no peer can
delay, and connected anew for the other transfers.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kv_transfer.endpoint import RankEndpoint
from kv_transfer.errors import TransportFailed
from kv_transfer.options import TransferOptions
from kv_transfer.plan import IntArray, PairPlan
from kv_transfer.transports.base import Cancelled, Fetched, Link, LinkDown, LinkUp, Post, Refusal
from kv_transfer.transports.rdma.batches import Batch, Batcher, Chunk
from kv_transfer.transports.rdma.connecting import Connection, Lane
from kv_transfer.transports.rdma.device import Device
from kv_transfer.transports.rdma.loop import LoopThread
from kv_transfer.transports.rdma.ordering import OrderBatcher
from kv_transfer.transports.rdma.orders import NUMBERS
from kv_transfer.transports.rdma.queue_pair import GAVE_UP, explain
from kv_transfer.transports.rdma.reading import ReadBatcher
from kv_transfer.transports.rdma.requests import LocalRegion
from kv_transfer.transports.rdma.wire import MAX_ORDERS
from kv_transfer.views import BlockView

# How long what is under way of a cancelled transfer may take to complete by itself.
CANCEL_GRACE_S = 0.25
_WATCH_S = 0.5


@dataclass(slots=True)
class _Draining:
    """A cancelled transfer of which something is still under way."""

    batches: set[int] = field(default_factory=set)
    timer: asyncio.TimerHandle | None = None


class RdmaLink(Link):
    def __init__(
        self,
        *,
        thread: LoopThread,
        device: Device,
        view: BlockView,
        regions: Sequence[LocalRegion],
        options: TransferOptions,
        peer: RankEndpoint,
        data_token: bytes,
        plan: PairPlan,
        post: Post,
        count: Callable[[str, int], None],
    ) -> None:
        self._thread, self._device, self._options, self._post, self._count = thread, device, options, post, count
        self._peer, self._data_token = peer, data_token
        rdma, limits = options.rdma, device.attributes
        room = max(1, min(rdma.queue_depth, limits.max_qp_wr, limits.max_cqe // rdma.queue_pairs))
        batcher, most = (OrderBatcher, MAX_ORDERS) if rdma.mode == "write" else (ReadBatcher, room)
        self._batcher: Batcher = batcher(device, plan, view, regions, room=min(room, most), num_lanes=rdma.queue_pairs)
        self._connection: Connection | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._waiting: deque[Batch] = deque()
        self._posted: dict[int, Batch] = {}
        self._draining: dict[bytes, _Draining] = {}
        self._next_id = 0
        self._was_up = False
        self._has_completed = False
        self._last_progress = 0.0
        self._watch: asyncio.TimerHandle | None = None
        self.is_down = False
        if not thread.submit(self._begin):
            self._down("the transport has stopped")

    def fetch(self, chunk_id: int, token: bytes, src_ids: IntArray, dst_ids: IntArray) -> None:
        self._thread.submit(lambda: self._fetch(Chunk(chunk_id, token), src_ids, dst_ids))

    def cancel(self, token: bytes) -> None:
        self._thread.submit(lambda: self._cancel(token))

    def close(self) -> None:
        self._thread.submit(lambda: self._down("closed"))

    def shut(self) -> None:
        """``close``, by the loop itself, at once."""
        self._down("closed")

    def device_is_gone(self, reason: str) -> None:
        self._down(reason)

    def _begin(self) -> None:
        if not self.is_down:
            self._watch = self._thread.loop.call_later(_WATCH_S, self._look)
            self._connect()

    def _connect(self) -> None:
        self._connection = Connection(self._device, self._options, self._peer, self._data_token, self._count)
        self._connecting = self._thread.loop.create_task(self._run(self._connection))

    async def _run(self, connection: Connection) -> None:
        """Connect the queue pairs, and wait for the end of the connection that they were agreed on over."""
        try:
            self._batcher.make_ready()
            await connection.open(self._on_completions, self._batcher.room, self._batcher.offered)
            self._connected()
            failure = await connection.ended()
            if failure is None:
                self._down("the peer has closed it")
            elif failure == GAVE_UP:
                # Of a transfer that has ended there; it says nothing of the way between us.
                self._rebuild()
            else:
                self._broken(f"the peer's queue pairs failed: {explain(failure)}")
        except asyncio.CancelledError:
            pass
        except TransportFailed as exc:
            self._down(str(exc))

    def _connected(self) -> None:
        self._has_completed, self._last_progress = False, self._thread.loop.time()
        if not self._was_up:
            self._was_up = True
            self._post(LinkUp(self))
        self._pump()

    def _fetch(self, chunk: Chunk, src_ids: IntArray, dst_ids: IntArray) -> None:
        if self.is_down:
            return
        batches = list(self._batcher.batches(chunk, src_ids, dst_ids))
        chunk.num_batches = len(batches)
        self._waiting.extend(batches)
        self._pump()

    def _pump(self) -> None:
        """Post what may be posted now."""
        connection = self._connection
        if connection is None or not connection.remote:
            return
        while self._waiting:
            if not self._waiting[0].size:
                staged = self._batcher.take_slot(self._waiting[0])
                if not staged:
                    return
                self._waiting.popleft()
                self._waiting.extendleft(reversed(staged))
            batch, lane = self._waiting[0], min(connection.lanes, key=lambda x: x.taken)
            if lane.taken + batch.size > self._batcher.room:
                return
            self._next_id = (self._next_id + 1) % NUMBERS
            try:
                self._batcher.post(batch, lane, connection, self._next_id)
            except self._device.verbs.Error as exc:
                self._broken(f"nothing can be posted: {exc}")
                return
            self._waiting.popleft()
            batch.lane = lane
            lane.taken += batch.size
            self._posted[self._next_id] = batch
            self._count("orders_posted" if batch.order is not None else "reads_posted", batch.size)
            self._count("batches_posted", 1)

    def _on_completions(self) -> None:
        if self._connection is None:
            return
        for completion in self._connection.take():
            if completion.status:
                failure = explain(completion.status)
                self._broken(f"its queue pair failed: {failure} (vendor error {completion.vendor_error:#x})")
                return
            number, is_refused = self._batcher.answer(completion)
            batch = None if number is None else self._posted.get(number)
            if number is None or batch is None or batch.lane is None:
                self._broken("the peer answers what was not asked")
                return
            if batch.lane.pair.number != completion.pair_number:
                self._broken("the peer answers on another queue pair")
                return
            self._has_completed, self._last_progress = True, self._thread.loop.time()
            self._complete(number, batch, batch.lane, is_refused=is_refused)
        self._pump()

    def _complete(self, number: int, batch: Batch, lane: Lane, *, is_refused: bool) -> None:
        chunk = batch.chunk
        del self._posted[number]
        lane.taken -= batch.size
        if is_refused and not chunk.is_given_up:
            chunk.is_given_up = True
            self._post(Refusal(self, chunk.token, "the source does not allow these blocks, or not any more"))
        self._batcher.leave_slot(batch)
        chunk.num_batches -= 1
        if not chunk.num_batches and not chunk.is_given_up:
            self._post(Fetched(self, chunk.chunk_id))
        draining = self._draining.get(chunk.token)
        if draining is not None:
            draining.batches.discard(number)
            if not draining.batches:
                self._drained(chunk.token)

    def _cancel(self, token: bytes) -> None:
        if self.is_down:
            # Its LinkDown has said the same.
            return
        for batch in self._waiting:
            if batch.chunk.token == token:
                batch.chunk.is_given_up = True
                self._batcher.leave_slot(batch)
        self._waiting = deque(batch for batch in self._waiting if batch.chunk.token != token)
        under_way = {number for number, batch in self._posted.items() if batch.chunk.token == token}
        if not under_way:
            self._post(Cancelled(self, token))
            return
        for number in under_way:
            self._posted[number].chunk.is_given_up = True
        timer = self._thread.loop.call_later(CANCEL_GRACE_S, self._rebuild)
        self._draining[token] = _Draining(under_way, timer)

    def _drained(self, token: bytes) -> None:
        draining = self._draining.pop(token)
        if draining.timer is not None:
            draining.timer.cancel()
        self._post(Cancelled(self, token))

    def _broken(self, reason: str) -> None:
        """The queue pairs are of no use any more. Once they have done something, new ones are tried."""
        if self._has_completed:
            self._rebuild()
        else:
            self._down(reason)

    def _rebuild(self) -> None:
        """Destroy the queue pairs, and do over, on new ones, what was under way and is still wanted."""
        if self.is_down:
            return
        self._count("rebuilds", 1)
        self._disconnect()
        posted, self._posted = list(self._posted.values()), {}
        for batch in reversed(posted):
            batch.lane = None
            if batch.chunk.is_given_up:
                self._batcher.leave_slot(batch)
            else:
                self._waiting.appendleft(batch)
        for token in list(self._draining):
            self._drained(token)
        self._connect()

    def _look(self) -> None:
        """What does not end although a device should have given it up: it has not."""
        if self.is_down:
            return
        self._watch = self._thread.loop.call_later(_WATCH_S, self._look)
        if not self._posted:
            self._last_progress = self._thread.loop.time()
        elif self._thread.loop.time() - self._last_progress > max(self._options.silence_s, self._device.patience_s):
            self._broken("what is under way does not complete")

    def _disconnect(self) -> None:
        """From the return on nothing is read or written into our memory."""
        if self._connecting is not None and self._connecting is not asyncio.current_task(self._thread.loop):
            self._connecting.cancel()
        if self._connection is not None:
            self._connection.close()
        self._connection = self._connecting = None

    def _down(self, reason: str) -> None:
        if self.is_down:
            return
        self.is_down = True
        if self._watch is not None:
            self._watch.cancel()
        for draining in self._draining.values():
            if draining.timer is not None:
                draining.timer.cancel()
        self._disconnect()
        self._batcher.close()
        self._waiting.clear()
        self._posted.clear()
        self._post(LinkDown(self, reason))
