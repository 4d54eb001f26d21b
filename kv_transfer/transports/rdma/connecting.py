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
from kv_transfer.transports.rdma.queue_pair import Completion, CompletionQueue, QueuePair
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


@dataclass(eq=False, slots=True)
class Lane:
    """One queue pair, and how many reads are posted on it."""

    pair: QueuePair
    num_reads: int = 0


class Connection:
    """One life of the queue pairs: after a failure it is closed, and another one made.

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

    async def open(self, on_completions: Callable[[], None], depth: int) -> None:
        """
        Args:
            on_completions: called when there is something to ``take``.
            depth: reads that may be posted on a queue pair.
        Raises:
            TransportFailed: the peer cannot be reached, or does not want it; ``close`` is still to be called.
        """
        host, patience_s = self._peer.host, self._options.silence_s
        port = int(self._peer.transports["rdma"]["port"])
        try:
            reader, writer = await asyncio.wait_for(asyncio.open_connection(host, port), patience_s)
            self._reader, self._writer = reader, writer
            self._check_open()
            self._make_pairs(on_completions, depth)
            await asyncio.wait_for(self._agree(reader, writer), patience_s)
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

    async def ended(self) -> None:
        """Until the peer, or its process, has ended the connection."""
        assert self._reader is not None
        try:
            await self._reader.read(1)
        except OSError:
            # A reset is an end, too.
            pass

    def take(self) -> list[Completion]:
        return [] if self._queue is None else self._queue.take()

    def close(self) -> None:
        """From the return on nothing is read into our memory. Idempotent."""
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

    def _make_pairs(self, on_completions: Callable[[], None], depth: int) -> None:
        device, count = self._device, self._options.rdma.queue_pairs
        self._queue = CompletionQueue(device, count * depth)
        asyncio.get_running_loop().add_reader(self._queue.fd, on_completions)
        for _ in range(count):
            pair = QueuePair(device, self._queue.verbs_queue, depth=depth, max_pieces=device.max_pieces)
            self.lanes.append(Lane(pair))
            self._count("queue_pairs_made", 1)

    async def _agree(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        device, own = self._device, self._device.address
        request = PortAddress(own.gid, own.lid, own.mtu, device.own_read_depth, own.is_roce)
        writer.write(pack_request(self._data_token, request, [lane.pair.address for lane in self.lanes]))
        (status,) = await reader.readexactly(1)
        if status != STATUS_OK:
            raise TransportFailed(STATUS_REASONS.get(status, f"the peer answers with status {status}"))
        port, num_regions = unpack_answer_head(await reader.readexactly(ANSWER_HEAD_BYTES))
        remote = unpack_regions(await reader.readexactly(regions_bytes(num_regions)))
        peers = unpack_pairs(await reader.readexactly(pairs_bytes(len(self.lanes))))
        if tuple(region.num_bytes for region in remote) != placement_of(self._peer.layout).region_bytes:
            raise TransportFailed("the peer has another pool than the one announced")
        for lane, peer in zip(self.lanes, peers, strict=True):
            lane.pair.connect(port, peer, min(port.read_depth, device.own_read_depth))
        self.remote = remote

    def _closed(self, close: Callable[[], Any]) -> None:
        try:
            close()
        except self._device.verbs.Error:
            # The device is gone, and has taken it along.
            pass
