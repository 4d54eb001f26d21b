"""The source's end: connects queue pairs for whoever the control channel has let in, and takes them back."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable

from kv_transfer.leases import LeaseTable
from kv_transfer.transports.rdma.device import Device
from kv_transfer.transports.rdma.queue_pair import CompletionQueue, QueuePair
from kv_transfer.transports.rdma.wire import (
    REQUEST_HEAD_BYTES,
    STATUS_NO_RESOURCES,
    STATUS_NO_ROUTE,
    STATUS_OTHER_LINK,
    STATUS_REFUSED,
    BadHandshake,
    PairAddress,
    PortAddress,
    RemoteRegion,
    pack_answer,
    pack_refusal,
    pairs_bytes,
    unpack_pairs,
    unpack_request_head,
)

log = logging.getLogger("kv_transfer")

HANDSHAKE_TIMEOUT_S = 5.0
MAX_STRANGERS = 256
# A destination has one connection, and for a moment a second one when it connects anew.
MAX_CONNECTIONS_A_SESSION = 4


class _Refused(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class Server:
    """In the loop's thread. Owns the listening socket, its connections and their queue pairs."""

    def __init__(
        self,
        sock: socket.socket,
        device: Device,
        regions: list[RemoteRegion],
        leases: LeaseTable,
        count: Callable[[str, int], None],
    ) -> None:
        """``count`` takes the name of a counter and what to add."""
        self._sock, self._device, self._regions, self._leases, self._count = sock, device, regions, leases, count
        self._sessions: dict[asyncio.Task[None], bytes] = {}
        self._strangers: set[asyncio.Task[None]] = set()
        self._held: dict[asyncio.Task[None], list[QueuePair]] = {}
        self._server: asyncio.Server | None = None
        # Who is read from completes nothing; a queue pair has to have a queue all the same.
        self._queue: CompletionQueue | None = None

    async def start(self) -> None:
        self._queue = CompletionQueue(self._device, 1)
        self._server = await asyncio.start_server(self._accept, sock=self._sock)

    def hang_up(self, session: bytes) -> None:
        """Take back what was connected with a data token."""
        for task in [task for task, owner in self._sessions.items() if owner == session]:
            task.cancel()

    def close(self) -> None:
        """Stop listening and destroy every queue pair, at once."""
        if self._server is not None:
            self._server.close()
        self._sock.close()
        for task in [*self._sessions, *self._strangers]:
            task.cancel()
        for task in list(self._held):
            self._let_go(task)
        if self._queue is not None:
            self._queue.close()
            self._queue = None

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._strangers) >= MAX_STRANGERS:
            self._count("strangers", 1)
            writer.close()
            return
        self._strangers.add(task)
        try:
            await asyncio.wait_for(self._introduce(task, reader, writer), HANDSHAKE_TIMEOUT_S)
            self._strangers.discard(task)
            # Nothing more is said; this is the peer's end, or its process's.
            await reader.read(1)
        except _Refused as exc:
            self._count("strangers", 1)
            writer.write(pack_refusal(exc.status))
        except (BadHandshake, asyncio.IncompleteReadError, asyncio.TimeoutError, OSError):
            if task in self._strangers:
                self._count("strangers", 1)
        except asyncio.CancelledError:
            pass
        finally:
            self._strangers.discard(task)
            self._sessions.pop(task, None)
            self._let_go(task)
            writer.close()

    async def _introduce(
        self, task: asyncio.Task[None], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        token, port, count = unpack_request_head(await reader.readexactly(REQUEST_HEAD_BYTES))
        peers = unpack_pairs(await reader.readexactly(pairs_bytes(count)))
        if not self._leases.knows(token) or self._num_connections(token) >= MAX_CONNECTIONS_A_SESSION:
            raise _Refused(STATUS_REFUSED)
        if port.is_roce != self._device.port.is_roce:
            raise _Refused(STATUS_OTHER_LINK)
        self._sessions[task] = token
        own, depth = self._connect(task, port, peers)
        address = self._device.address
        writer.write(
            pack_answer(
                PortAddress(address.gid, address.lid, address.mtu, depth, address.is_roce),
                self._regions,
                [pair.address for pair in own],
            )
        )
        await writer.drain()

    def _connect(
        self, task: asyncio.Task[None], port: PortAddress, peers: list[PairAddress]
    ) -> tuple[list[QueuePair], int]:
        """Queue pairs that are ready to be read through, and the reads that each answers at a time."""
        assert self._queue is not None
        depth = min(port.read_depth, self._device.address.read_depth)
        held, error = self._held.setdefault(task, []), self._device.verbs.Error
        try:
            for _ in peers:
                held.append(QueuePair(self._device, self._queue.verbs_queue, depth=1, max_pieces=1))
                self._count("queue_pairs_made", 1)
        except error as exc:
            log.warning("no room for queue pairs for an RDMA peer: %s", exc)
            raise _Refused(STATUS_NO_RESOURCES) from exc
        try:
            for pair, peer in zip(held, peers, strict=True):
                pair.connect(port, peer, depth)
        except error as exc:
            log.warning("an RDMA peer cannot be reached: %s", exc)
            raise _Refused(STATUS_NO_ROUTE) from exc
        return held, depth

    def _num_connections(self, session: bytes) -> int:
        return sum(owner == session for owner in self._sessions.values())

    def _let_go(self, task: asyncio.Task[None]) -> None:
        for pair in self._held.pop(task, []):
            pair.close()
            self._count("queue_pairs_closed", 1)
