"""The source's end: connects queue pairs for whoever the control channel has let in, and takes them back."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Sequence

from kv_transfer.leases import LeaseTable
from kv_transfer.transports.rdma.device import Device
from kv_transfer.transports.rdma.pushing import Pusher
from kv_transfer.transports.rdma.queue_pair import CompletionQueue
from kv_transfer.transports.rdma.requests import LocalRegion
from kv_transfer.transports.rdma.served import PairsFailed, Readable, Served
from kv_transfer.transports.rdma.wire import (
    MODE_WRITE,
    PREFACE_BYTES,
    REQUEST_HEAD_BYTES,
    STATUS_NO_RESOURCES,
    STATUS_NO_ROUTE,
    STATUS_OTHER_LINK,
    STATUS_OTHER_VERSION,
    STATUS_REFUSED,
    BadHandshake,
    OtherVersion,
    PortAddress,
    Request,
    pack_answer,
    pack_refusal,
    request_rest_bytes,
    unpack_preface,
    unpack_request,
)

log = logging.getLogger("kv_transfer")

HANDSHAKE_TIMEOUT_S = 5.0
# How long a destination may take to hang up, once it has been told that it gets no queue pairs, or has none any more.
_FAREWELL_TIMEOUT_S = 5.0
# How long what is being written for a transfer that was revoked may take to complete by itself.
REVOKE_GRACE_S = 0.25
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
        *,
        regions: Sequence[LocalRegion],
        leases: LeaseTable,
        on_revoked: Callable[[bytes], None],
        count: Callable[[str, int], None],
    ) -> None:
        """
        Args:
            regions: of our pool.
            on_revoked: called when our device reads the pool for a revoked token no more.
            count: takes the name of a counter and what to add.
        """
        self._sock, self._device, self._regions, self._leases, self._count = sock, device, regions, leases, count
        self._on_revoked = on_revoked
        self._sessions: dict[asyncio.Task[None], bytes] = {}
        self._strangers: set[asyncio.Task[None]] = set()
        self._held: dict[asyncio.Task[None], Served] = {}
        self._revoking: dict[bytes, asyncio.TimerHandle] = {}
        self._server: asyncio.Server | None = None
        # In read mode nothing completes here; a queue pair has to have a queue all the same.
        self._queue: CompletionQueue | None = None

    async def start(self) -> None:
        self._queue = CompletionQueue(self._device, 1)
        self._server = await asyncio.start_server(self._accept, sock=self._sock)

    def hang_up(self, session: bytes) -> None:
        """Take back what was connected with a data token."""
        for task in [task for task, owner in self._sessions.items() if owner == session]:
            task.cancel()

    def revoke(self, token: bytes) -> None:
        """Write no more for a transfer: what is under way may end for a moment, then its queue pairs are destroyed."""
        for served in list(self._held.values()):
            served.revoke(token)
        if not any(served.is_reading(token) for served in self._held.values()):
            self._on_revoked(token)
        elif token not in self._revoking:
            loop = asyncio.get_running_loop()
            self._revoking[token] = loop.call_later(REVOKE_GRACE_S, self._give_up, token)

    def close(self) -> None:
        """Stop listening and destroy every queue pair, at once."""
        if self._server is not None:
            self._server.close()
        self._sock.close()
        for task in [*self._sessions, *self._strangers]:
            task.cancel()
        for timer in self._revoking.values():
            timer.cancel()
        self._revoking.clear()
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
            await self._held[task].serve(reader)
        except PairsFailed as exc:
            self._count("pairs_failed", 1)
            await _say_last(reader, writer, bytes([exc.code]))
        except _Refused as exc:
            self._count("strangers", 1)
            await _say_last(reader, writer, pack_refusal(exc.status))
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
        try:
            token = unpack_preface(await reader.readexactly(PREFACE_BYTES))
        except OtherVersion as exc:
            log.warning("an RDMA peer connects by another version: %s; run one release on both", exc)
            raise _Refused(STATUS_OTHER_VERSION) from exc
        head = await reader.readexactly(REQUEST_HEAD_BYTES)
        request = unpack_request(head, await reader.readexactly(request_rest_bytes(head)))
        if not self._leases.knows(token) or self._num_connections(token) >= MAX_CONNECTIONS_A_SESSION:
            raise _Refused(STATUS_REFUSED)
        if request.port.is_roce != self._device.port.is_roce:
            raise _Refused(STATUS_OTHER_LINK)
        self._sessions[task] = token
        depth = min(request.port.read_depth, self._device.address.read_depth)
        served = self._serve(task, token, request)
        self._connect(served, request, depth)
        address = self._device.address
        writer.write(
            pack_answer(
                PortAddress(address.gid, address.lid, address.mtu, depth, address.is_roce),
                [region.for_peer for region in self._regions],
                [pair.address for pair in served.pairs],
            )
        )
        await writer.drain()

    def _serve(self, task: asyncio.Task[None], token: bytes, request: Request) -> Served:
        """Queue pairs that are not connected yet."""
        assert self._queue is not None
        served: Served
        try:
            if request.mode == MODE_WRITE:
                served = self._held[task] = pusher = Pusher(
                    self._device,
                    self._leases,
                    session=token,
                    regions=self._regions,
                    request=request,
                    changed=self._look_at_revoked,
                    count=self._count,
                )
                pusher.open()
            else:
                served = self._held[task] = Readable(self._device, self._count)
                served.make_pairs(len(request.pairs), self._queue.verbs_queue, depth=1, max_pieces=1)
        except self._device.verbs.Error as exc:
            log.warning("no room for queue pairs for an RDMA peer: %s", exc)
            raise _Refused(STATUS_NO_RESOURCES) from exc
        return served

    def _connect(self, served: Served, request: Request, depth: int) -> None:
        """``depth`` is of the reads that each queue pair answers at a time."""
        try:
            for pair, peer in zip(served.pairs, request.pairs, strict=True):
                pair.connect(request.port, peer, depth, served.allowed)
        except self._device.verbs.Error as exc:
            log.warning("an RDMA peer cannot be reached: %s", exc)
            raise _Refused(STATUS_NO_ROUTE) from exc

    def _look_at_revoked(self) -> None:
        """Something that was posted is done."""
        for token in list(self._revoking):
            if not any(served.is_reading(token) for served in self._held.values()):
                self._revoking.pop(token).cancel()
                self._on_revoked(token)

    def _give_up(self, token: bytes) -> None:
        for served in [served for served in self._held.values() if served.is_reading(token)]:
            served.give_up()

    def _num_connections(self, session: bytes) -> int:
        return sum(owner == session for owner in self._sessions.values())

    def _let_go(self, task: asyncio.Task[None]) -> None:
        served = self._held.pop(task, None)
        if served is not None:
            served.close()


async def _say_last(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, said: bytes) -> None:
    """Say it, and see that it arrives: closing a socket in which something lies that nobody reads would drop it."""

    async def read_on() -> None:
        while await reader.read(1 << 16):
            pass

    try:
        writer.write(said)
        writer.write_eof()
        await asyncio.wait_for(read_on(), _FAREWELL_TIMEOUT_S)
    except (asyncio.TimeoutError, OSError):
        pass
