"""The source's end of data connections: checks each request against the leases, and streams the blocks."""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Callable

import numpy as np

from kv_transfer.leases import Lease, LeaseTable
from kv_transfer.listening import ListeningChannel
from kv_transfer.plan import IntArray
from kv_transfer.reactor import READ, WRITE, Channel, ConnectionLost, Reactor
from kv_transfer.transports.tcp_buffers import Buffers, whole
from kv_transfer.transports.tcp_wire import (
    MAGIC,
    MAX_IDS_PER_REQUEST,
    MAX_QUEUED_REQUESTS,
    MAX_RESPONSE_BYTES,
    MAX_STRANGERS,
    PREFACE,
    PREFACE_TIMEOUT_S,
    REQUEST,
    RESPONSE,
    STATUS_OK,
    STATUS_REFUSED,
)
from kv_transfer.views import BlockView, HostView

# Bytes that a connection may move before others get their turn.
TURN_BYTES = 8 << 20
_ZEROS = memoryview(bytes(1 << 20))


class Listener(ListeningChannel):
    """Takes in data connections. ``on_stranger`` is called for each one that turns out to be unwelcome."""

    def __init__(
        self, sock: socket.socket, reactor: Reactor, leases: LeaseTable, on_stranger: Callable[[], None]
    ) -> None:
        super().__init__(sock)
        self.served: set[ServingChannel] = set()
        self._reactor, self._leases, self._on_stranger = reactor, leases, on_stranger

    def take_in(self, sock: socket.socket) -> None:
        if sum(channel.session is None for channel in self.served) >= MAX_STRANGERS:
            sock.close()
            self._on_stranger()
            return
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        channel = ServingChannel(sock, self)
        self.served.add(channel)
        self._reactor.add(channel)

    def revoke(self, token: bytes) -> None:
        """Read no more blocks for a transfer."""
        for channel in self.served:
            channel.revoke(token)

    def hang_up(self, session: bytes) -> None:
        """Close what was opened with a data token."""
        for channel in [c for c in self.served if c.session == session]:
            self._reactor.drop(channel, "hung up")

    def hang_up_all(self) -> None:
        for channel in list(self.served):
            self._reactor.drop(channel, "the transport was closed")

    def find(self, token: bytes, session: bytes, ids: IntArray) -> Lease | None:
        return self._leases.find(token, session, ids)

    def knows(self, session: bytes) -> bool:
        return self._leases.knows(session)

    def forget(self, channel: ServingChannel) -> None:
        self.served.discard(channel)
        if channel.session is None:
            self._on_stranger()


class _Response:
    """One answer being sent: a header, then blocks of the pool.

    Blocks are copied into the socket. sendfile would spare that copy, but has been measured to cost twice the CPU time
    on either side where the pool's file is made of small pages, and would leave pages of the pool in the socket's queue
    after a transfer has ended.
    """

    def __init__(self, number: int, token: bytes, view: BlockView | None, ids: IntArray) -> None:
        self.token = token
        self._view, self._ids = view, ids
        self._left = 0 if view is None else view.unit_bytes * len(ids)
        status = STATUS_REFUSED if view is None else STATUS_OK
        self._header = memoryview(RESPONSE.pack(number, status, self._left))
        self._body: Buffers | None = None
        self._revoked = False

    def revoke(self) -> None:
        """Send zeros for what is left: the stream stays in step, and who asked will not use it."""
        self._revoked = True
        self._body = None

    def send(self, sock: socket.socket) -> int:
        """Send some; the number of bytes, or 0 when all is sent. Raises BlockingIOError when the socket is full."""
        if self._header:
            sent = sock.send(self._header, socket.MSG_MORE if self._left else 0)
            self._header = self._header[sent:]
            return sent
        if not self._left or self._view is None:
            return 0
        if self._revoked:
            sent = sock.send(_ZEROS[: self._left])
        else:
            if self._body is None:
                self._body = self._make_body(self._view)
            sent = self._body.send(sock)
        self._left -= sent
        return sent

    def _make_body(self, view: BlockView) -> Buffers:
        if isinstance(view, HostView) and view.is_direct:
            return Buffers(view.iovecs(self._ids), view)
        packed = view.gather(self._ids)
        return Buffers(whole(packed), packed)


class ServingChannel(Channel):
    """One data connection from a destination.

    Attributes:
        session: the data token that it presented; None while it is a stranger.
    """

    def __init__(self, sock: socket.socket, listener: Listener) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.session: bytes | None = None
        self._listener = listener
        self._received = bytearray()
        self._responses: deque[_Response] = deque()
        self._preface_until = time.monotonic() + PREFACE_TIMEOUT_S

    def fileno(self) -> int:
        return self.sock.fileno()

    def close(self) -> None:
        self.sock.close()

    def interest(self) -> int:
        return (WRITE if self._responses else 0) | (READ if len(self._responses) < MAX_QUEUED_REQUESTS else 0)

    def ready(self, mask: int) -> None:
        if mask & ~WRITE:
            self._read()
        self._write()

    def lost(self, reason: str) -> None:
        self._responses.clear()
        self._listener.forget(self)

    def tick(self, now: float) -> None:
        if self.session is None and now > self._preface_until:
            raise ConnectionLost("no preface in time")

    def revoke(self, token: bytes) -> None:
        for response in self._responses:
            if response.token == token:
                response.revoke()

    def _read(self) -> None:
        try:
            data = self.sock.recv(1 << 16)
        except BlockingIOError:
            return
        if not data:
            raise ConnectionLost("closed by the peer")
        self._received += data
        if self.session is None:
            self._read_preface()
        while self.session is not None and self._read_request(self.session):
            pass

    def _read_preface(self) -> None:
        if not MAGIC.startswith(self._received[: len(MAGIC)]):
            raise ConnectionLost("not a data connection")
        if len(self._received) < PREFACE.size:
            return
        _, session = PREFACE.unpack_from(self._received)
        if not self._listener.knows(session):
            raise ConnectionLost("a data token that was not given out")
        del self._received[: PREFACE.size]
        self.session = session

    def _read_request(self, session: bytes) -> bool:
        if len(self._received) < REQUEST.size:
            return False
        token, number, num_ids = REQUEST.unpack_from(self._received)
        if not 1 <= num_ids <= MAX_IDS_PER_REQUEST:
            raise ConnectionLost(f"a request for {num_ids} blocks")
        end = REQUEST.size + 4 * num_ids
        if len(self._received) < end:
            return False
        ids = np.frombuffer(bytes(self._received[REQUEST.size : end]), "<u4").astype(np.int64)
        del self._received[:end]
        lease = self._listener.find(token, session, ids)
        view = None if lease is None else lease.view
        if view is not None and view.unit_bytes * num_ids > MAX_RESPONSE_BYTES:
            raise ConnectionLost("a request for too many bytes")
        self._responses.append(_Response(number, token, view, ids))
        return True

    def _write(self) -> None:
        budget = TURN_BYTES
        try:
            while self._responses and budget > 0:
                sent = self._responses[0].send(self.sock)
                if not sent:
                    self._responses.popleft()
                budget -= sent
        except BlockingIOError:
            return
