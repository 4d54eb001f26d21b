"""The destination's end: a link that reads chunks out of one source's pool. Everything runs in the loop's thread.

A chunk becomes batches of reads; a batch is posted in one go on the queue pair that has least to do, and its last read
is signalled. What has been posted is never waited for without end: when a transfer is cancelled while its reads are
under way, they may complete for a moment, and then the queue pairs are destroyed, which no peer can delay, and
connected anew for the other transfers.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kv_transfer.endpoint import RankEndpoint
from kv_transfer.errors import TransportFailed
from kv_transfer.layout import placement_of
from kv_transfer.options import TransferOptions
from kv_transfer.plan import IntArray, PairPlan
from kv_transfer.transports.base import Cancelled, Fetched, Link, LinkDown, LinkUp, Post
from kv_transfer.transports.rdma.device import MAX_BATCH_READS, Device
from kv_transfer.transports.rdma.loop import LoopThread
from kv_transfer.transports.rdma.queue_pair import CompletionQueue, QueuePair, explain
from kv_transfer.transports.rdma.reads import Read, group, merged_reads, reads_of
from kv_transfer.transports.rdma.requests import LocalRegion
from kv_transfer.transports.rdma.staging import Staging
from kv_transfer.transports.rdma.wire import (
    ANSWER_HEAD_BYTES,
    STATUS_OK,
    STATUS_REASONS,
    BadHandshake,
    PortAddress,
    RemoteRegion,
    pack_request,
    pairs_bytes,
    regions_bytes,
    unpack_answer_head,
    unpack_pairs,
    unpack_regions,
)
from kv_transfer.views import BlockView, HostView

# How long the reads of a cancelled transfer may take to complete by themselves.
CANCEL_GRACE_S = 0.25
_WATCH_S = 0.5


@dataclass(eq=False, slots=True)
class _Chunk:
    chunk_id: int
    token: bytes
    num_batches: int = 0
    is_cancelled: bool = False


@dataclass(eq=False, slots=True)
class _Staged:
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
class _Batch:
    """Reads that are posted together.

    Attributes:
        part: number of the part that they are of.
        reads: empty for staged units without a slot.
    """

    chunk: _Chunk
    part: int
    reads: tuple[Read, ...] = ()
    staged: _Staged | None = None
    lane: _Lane | None = None


@dataclass(eq=False, slots=True)
class _Lane:
    """One queue pair, and the reads that are posted on it."""

    pair: QueuePair
    num_reads: int = 0


@dataclass(slots=True)
class _Draining:
    """A cancelled transfer whose reads are still under way."""

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
        self._thread, self._device, self._view, self._regions = thread, device, view, regions
        self._options = options
        self._peer, self._data_token, self._post, self._count = peer, data_token, post, count
        self._parts = [reads_of(part, plan.src_units, plan.dst_units) for part in plan.parts]
        self._lanes: list[_Lane] = []
        self._queue: CompletionQueue | None = None
        self._remote: list[RemoteRegion] = []
        self._staging: Staging | None = None
        self._waiting: deque[_Batch] = deque()
        self._posted: dict[int, _Batch] = {}
        self._draining: dict[bytes, _Draining] = {}
        self._next_id = 0
        self._depth = self._batch_reads = 1
        self._was_up = False
        self._has_completed = False
        self._last_progress = 0.0
        self._connection: asyncio.Task[None] | None = None
        self._watch: asyncio.TimerHandle | None = None
        self.is_down = False
        if not thread.submit(self._begin):
            self._down("the transport has stopped")

    def fetch(self, chunk_id: int, token: bytes, src_ids: IntArray, dst_ids: IntArray) -> None:
        self._thread.submit(lambda: self._fetch(_Chunk(chunk_id, token), src_ids, dst_ids))

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
            self._connection = self._thread.loop.create_task(self._run_connection())

    async def _run_connection(self) -> None:
        """Connect the queue pairs, and wait for the end of the connection that they were agreed on over."""
        writer = None
        try:
            reader, writer = await asyncio.wait_for(
                asyncio.open_connection(self._peer.host, int(self._peer.transports["rdma"]["port"])),
                self._options.silence_s,
            )
            await asyncio.wait_for(self._agree(reader, writer), self._options.silence_s)
            self._connected()
            await reader.read(1)
            self._down("the peer has closed it")
        except asyncio.CancelledError:
            pass
        except (BadHandshake, TransportFailed) as exc:
            self._down(str(exc))
        except asyncio.IncompleteReadError:
            self._down("the peer hung up in the middle of connecting")
        except asyncio.TimeoutError:
            self._down(f"connecting to {self._peer.host} took more than {self._options.silence_s:g} s")
        except OSError as exc:
            self._down(f"cannot connect to {self._peer.host}: {exc}")
        except self._device.verbs.Error as exc:
            self._down(f"no queue pair can be made: {exc}")
        finally:
            if writer is not None:
                writer.close()

    async def _agree(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        device, rdma = self._device, self._options.rdma
        count = rdma.queue_pairs
        staged = [part for part in self._parts if not part.is_direct]
        if staged and not isinstance(self._view, HostView):
            raise TransportFailed("what moves is in short runs, and cannot be picked out on the device")
        if self._staging is None and staged:
            self._staging = Staging(device, staged)
        self._depth = max(1, min(rdma.queue_depth, device.attributes.max_qp_wr, device.attributes.max_cqe // count))
        self._batch_reads = min(MAX_BATCH_READS, self._depth)
        self._queue = CompletionQueue(device, count * self._depth)
        self._thread.loop.add_reader(self._queue.fd, self._on_completions)
        for _ in range(count):
            pair = QueuePair(device, self._queue.verbs_queue, depth=self._depth, max_pieces=device.max_pieces)
            self._lanes.append(_Lane(pair))
            self._count("queue_pairs_made", 1)
        own = device.address
        request = PortAddress(own.gid, own.lid, own.mtu, device.own_read_depth, own.is_roce)
        writer.write(pack_request(self._data_token, request, [lane.pair.address for lane in self._lanes]))
        (status,) = await reader.readexactly(1)
        if status != STATUS_OK:
            raise TransportFailed(STATUS_REASONS.get(status, f"the peer answers with status {status}"))
        port, num_regions = unpack_answer_head(await reader.readexactly(ANSWER_HEAD_BYTES))
        remote = unpack_regions(await reader.readexactly(regions_bytes(num_regions)))
        peers = unpack_pairs(await reader.readexactly(pairs_bytes(count)))
        if tuple(region.num_bytes for region in remote) != placement_of(self._peer.layout).region_bytes:
            raise TransportFailed("the peer has another pool than the one announced")
        for lane, peer in zip(self._lanes, peers, strict=True):
            lane.pair.connect(port, peer, min(port.read_depth, device.own_read_depth))
        self._remote = remote

    def _connected(self) -> None:
        self._has_completed, self._last_progress = False, self._thread.loop.time()
        if not self._was_up:
            self._was_up = True
            self._post(LinkUp(self))
        self._pump()

    def _fetch(self, chunk: _Chunk, src_ids: IntArray, dst_ids: IntArray) -> None:
        if self.is_down:
            return
        batches = list(self._batches(chunk, src_ids, dst_ids))
        chunk.num_batches = len(batches)
        self._waiting.extend(batches)
        self._pump()

    def _batches(self, chunk: _Chunk, src_ids: IntArray, dst_ids: IntArray) -> Iterable[_Batch]:
        for number, part in enumerate(self._parts):
            if not part.is_direct:
                assert self._staging is not None
                order, most = np.argsort(src_ids, kind="stable"), self._staging.units_per_slot(part)
                for start in range(0, len(order), most):
                    some = order[start : start + most]
                    yield _Batch(chunk, number, staged=_Staged(src_ids[some], dst_ids[some]))
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
            most = max(1, min(self._batch_reads, -(-len(reads) // self._options.rdma.queue_pairs)))
            for together in group(reads, most):
                yield _Batch(chunk, number, together)

    def _pump(self) -> None:
        """Post what may be posted now."""
        if not self._remote:
            return
        while self._waiting:
            if not self._waiting[0].reads and not self._prepare(self._waiting[0]):
                return
            batch, lane = self._waiting[0], min(self._lanes, key=lambda x: x.num_reads)
            if lane.num_reads + len(batch.reads) > self._depth:
                return
            self._waiting.popleft()
            source, target = self._ends(batch)
            self._next_id += 1
            try:
                lane.pair.post(batch.reads, source, target, self._next_id)
            except self._device.verbs.Error as exc:
                self._waiting.appendleft(batch)
                self._broken(f"reads cannot be posted: {exc}")
                return
            batch.lane = lane
            lane.num_reads += len(batch.reads)
            self._posted[self._next_id] = batch
            self._count("reads_posted", len(batch.reads))
            self._count("batches_posted", 1)

    def _prepare(self, batch: _Batch) -> bool:
        """Make the reads of staged units, the first in the queue; False while there is no slot for them."""
        staged, part = batch.staged, self._parts[batch.part]
        assert staged is not None and self._staging is not None
        staged.slot = self._staging.take()
        if staged.slot is None:
            return False
        reads = list(
            merged_reads(
                part.sources(staged.src_ids),
                staged.slot + part.staged(len(staged.src_ids)),
                part.stretch_bytes,
                max_pieces=1,
                max_bytes=self._device.max_message_bytes,
            )
        )
        batches = [_Batch(batch.chunk, batch.part, some, staged) for some in group(reads, self._batch_reads)]
        staged.num_batches = len(batches)
        batch.chunk.num_batches += len(batches) - 1
        self._waiting.popleft()
        self._waiting.extendleft(reversed(batches))
        return True

    def _ends(self, batch: _Batch) -> tuple[RemoteRegion, LocalRegion]:
        """The regions that a batch is read from and into."""
        part = self._parts[batch.part].part
        if batch.staged is not None and self._staging is not None:
            return self._remote[part.src.region], self._staging.region
        return self._remote[part.src.region], self._regions[part.dst.region]

    def _on_completions(self) -> None:
        if self._queue is None:
            return
        for completion in self._queue.take():
            if completion.status:
                self._broken(str(explain(completion)))
                return
            self._has_completed, self._last_progress = True, self._thread.loop.time()
            batch = self._posted.pop(completion.wr_id, None)
            if batch is not None:
                self._complete(completion.wr_id, batch)
        self._pump()

    def _complete(self, wr_id: int, batch: _Batch) -> None:
        chunk = batch.chunk
        if batch.lane is not None:
            batch.lane.num_reads -= len(batch.reads)
        self._leave_slot(batch)
        chunk.num_batches -= 1
        if not chunk.num_batches and not chunk.is_cancelled:
            self._post(Fetched(self, chunk.chunk_id))
        draining = self._draining.get(chunk.token)
        if draining is not None:
            draining.batches.discard(wr_id)
            if not draining.batches:
                self._drained(chunk.token)

    def _cancel(self, token: bytes) -> None:
        if self.is_down:
            # Its LinkDown has said the same.
            return
        for batch in self._waiting:
            if batch.chunk.token == token:
                batch.chunk.is_cancelled = True
                self._leave_slot(batch)
        self._waiting = deque(batch for batch in self._waiting if batch.chunk.token != token)
        under_way = {wr_id for wr_id, batch in self._posted.items() if batch.chunk.token == token}
        if not under_way:
            self._post(Cancelled(self, token))
            return
        for wr_id in under_way:
            self._posted[wr_id].chunk.is_cancelled = True
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
            if batch.chunk.is_cancelled:
                self._leave_slot(batch)
            else:
                self._waiting.appendleft(batch)
        for token in list(self._draining):
            self._drained(token)
        self._connection = self._thread.loop.create_task(self._run_connection())

    def _leave_slot(self, batch: _Batch) -> None:
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

    def _look(self) -> None:
        """Reads that do not end although the device should have given them up: it has not."""
        if self.is_down:
            return
        self._watch = self._thread.loop.call_later(_WATCH_S, self._look)
        if not self._posted:
            self._last_progress = self._thread.loop.time()
        elif self._thread.loop.time() - self._last_progress > max(self._options.silence_s, self._device.patience_s):
            self._broken("its reads do not complete")

    def _disconnect(self) -> None:
        """From the return on nothing is read into our memory."""
        if self._connection is not None and self._connection is not asyncio.current_task(self._thread.loop):
            self._connection.cancel()
        self._connection, self._remote = None, []
        for lane in self._lanes:
            self._closed(lane.pair.close)
            self._count("queue_pairs_closed", 1)
        self._lanes.clear()
        if self._queue is not None:
            self._thread.loop.remove_reader(self._queue.fd)
            self._closed(self._queue.close)
            self._queue = None

    def _closed(self, close: Callable[[], Any]) -> None:
        try:
            close()
        except self._device.verbs.Error:
            # The device is gone, and has taken it along.
            pass

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
        if self._staging is not None:
            self._closed(self._staging.close)
        self._waiting.clear()
        self._posted.clear()
        self._post(LinkDown(self, reason))
