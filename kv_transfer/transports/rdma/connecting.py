"""The destination's queue pairs to one source: made, agreed on over TCP, and destroyed. In the loop's thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kv_transfer.endpoint import RankEndpoint
from kv_transfer.errors import TransportFailed
from kv_transfer.layout import placement_of
from kv_transfer.options import TransferOptions
from kv_transfer.transports.rdma.device import Device
from kv_transfer.transports.rdma.queue_pair import Access, Completion, CompletionQueue, QueuePair
from kv_transfer.transports.rdma.wire import (
    ANSWER_HEAD_BYTES,
    MODE_WRITE,
    MODES,
    STATUS_OK,
    STATUS_REASONS,
    BadHandshake,
    PortAddress,
    RemoteRegion,
    Request,
    pack_request,
    pairs_bytes,
    regions_bytes,
    unpack_answer_head,
    unpack_pairs,
    unpack_regions,
)


@dataclass(eq=False, slots=True)
class Lane:
    """One queue pair, and how much of its room is taken."""

    index: int
    pair: QueuePair
    taken: int = 0


class Connection:
    """One life of the queue pairs: after a failure it is closed, and another one made.

    In write mode the source's queue pairs may write into our regions, and orders are given by ``tell``.

    Attributes:
        lanes: usable once ``remote`` is known.
        remote: where the source's regions are; empty until ``open`` is done, and after ``close``.
    """

    def __init__(
        self,
        device: Device,
        options: TransferOptions,
        peer: RankEndpoint,
        data_token: bytes,
        count: Callable[[str, int], None],
    ) -> None:
        """Takes hold of nothing yet. ``count`` takes the name of a counter and what to add."""
        self._device, self._options, self._peer, self._data_token = device, options, peer, data_token
        self._count = count
        self._queue: CompletionQueue | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._is_closed = False
        self.lanes: list[Lane] = []
        self.remote: list[RemoteRegion] = []

    async def open(self, on_completions: Callable[[], None], room: int, offered: list[RemoteRegion]) -> None:
        """
        Args:
            on_completions: called when there is something to ``take``.
            room: reads that may be posted on a queue pair, or orders that may be under way on it.
            offered: regions of ours that the peer may write to.
        Raises:
            TransportFailed: the peer cannot be reached, or does not want it; ``close`` is still to be called.
        """
        host, patience_s = self._peer.host, self._options.silence_s
        port = int(self._peer.transports["rdma"]["port"])
        try:
            reader, writer = await asyncio.wait_for(asyncio.open_connection(host, port), patience_s)
            self._reader, self._writer = reader, writer
            self._check_open()
            self._make_pairs(on_completions, room)
            await asyncio.wait_for(self._agree(reader, writer, room, offered), patience_s)
            self._check_open()
        except BadHandshake as exc:
            raise TransportFailed(str(exc)) from exc
        except asyncio.IncompleteReadError as exc:
            raise TransportFailed("the peer hung up in the middle of connecting") from exc
        except asyncio.TimeoutError as exc:
            raise TransportFailed(f"connecting to {host} took more than {patience_s:g} s") from exc
        except OSError as exc:
            raise TransportFailed(f"cannot connect to {host}: {exc}") from exc
        except self._device.verbs.Error as exc:
            raise TransportFailed(f"no queue pair can be made: {exc}") from exc

    async def ended(self) -> int | None:
        """Wait until the peer, or its process, has ended the connection: why its queue pairs failed, if it says so."""
        assert self._reader is not None
        try:
            said = await self._reader.read(1)
        except OSError:
            # A reset is an end, too.
            return None
        return said[0] if said else None

    def tell(self, order: bytes) -> None:
        """Give the source an order; it goes out as soon as it can."""
        assert self._writer is not None
        self._writer.write(order)

    def take(self) -> list[Completion]:
        return [] if self._queue is None else self._queue.take()

    def close(self) -> None:
        """From the return on nothing is read or written into our memory. Idempotent."""
        self._is_closed, self.remote = True, []
        if self._writer is not None:
            self._writer.close()
        for lane in self.lanes:
            self._closed(lane.pair.close)
            self._count("queue_pairs_closed", 1)
        self.lanes.clear()
        if self._queue is not None:
            asyncio.get_running_loop().remove_reader(self._queue.fd)
            self._closed(self._queue.close)
            self._queue = None

    def _check_open(self) -> None:
        """``wait_for`` may swallow that its task was cancelled, if what it waits for has just ended."""
        if self._is_closed:
            if self._writer is not None:
                self._writer.close()
            raise asyncio.CancelledError

    @property
    def _mode(self) -> int:
        return MODES[self._options.rdma.mode]

    def _make_pairs(self, on_completions: Callable[[], None], room: int) -> None:
        device, count = self._device, self._options.rdma.queue_pairs
        self._queue = CompletionQueue(device, count * room)
        asyncio.get_running_loop().add_reader(self._queue.fd, on_completions)
        queue = self._queue.verbs_queue
        for index in range(count):
            if self._mode == MODE_WRITE:
                pair = QueuePair(device, queue, depth=1, max_pieces=1, num_receives=room)
            else:
                pair = QueuePair(device, queue, depth=room, max_pieces=device.max_read_pieces)
            self.lanes.append(Lane(index, pair))
            self._count("queue_pairs_made", 1)

    async def _agree(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, room: int, offered: list[RemoteRegion]
    ) -> None:
        device, own, is_write = self._device, self._device.address, self._mode == MODE_WRITE
        request = Request(
            port=PortAddress(own.gid, own.lid, own.mtu, device.own_read_depth, own.is_roce),
            mode=self._mode,
            num_orders=room if is_write else 0,
            pairs=[lane.pair.address for lane in self.lanes],
            regions=offered,
        )
        writer.write(pack_request(self._data_token, request))
        (status,) = await reader.readexactly(1)
        if status != STATUS_OK:
            raise TransportFailed(STATUS_REASONS.get(status, f"the peer answers with status {status}"))
        port, num_regions = unpack_answer_head(await reader.readexactly(ANSWER_HEAD_BYTES))
        remote = unpack_regions(await reader.readexactly(regions_bytes(num_regions)))
        peers = unpack_pairs(await reader.readexactly(pairs_bytes(len(self.lanes))))
        if tuple(region.num_bytes for region in remote) != placement_of(self._peer.layout).region_bytes:
            raise TransportFailed("the peer has another pool than the one announced")
        for lane, peer in zip(self.lanes, peers, strict=True):
            allowed = Access.WRITE if is_write else Access.NONE
            lane.pair.connect(port, peer, min(port.read_depth, device.own_read_depth), allowed)
        self.remote = remote

    def _closed(self, close: Callable[[], Any]) -> None:
        try:
            close()
        except self._device.verbs.Error:
            # The device is gone, and has taken it along.
            pass
