"""The destination's end of a data connection: asks for blocks, and receives them right into the pool."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable

import numpy as np

from kv_transfer.addresses import is_connected
from kv_transfer.plan import IntArray
from kv_transfer.reactor import READ, WRITE, Channel, ConnectionLost
from kv_transfer.transports.tcp_buffers import Buffers, whole
from kv_transfer.transports.tcp_wire import MAGIC, PREFACE, REQUEST, RESPONSE, STATUS_OK, STATUS_REFUSED
from kv_transfer.views import BlockView, ByteArray, HostView

TURN_BYTES = 8 << 20
_SCRATCH_BYTES = 1 << 20


class _Request:
    """One chunk that was asked for, and where its bytes go."""

    def __init__(self, chunk_id: int, token: bytes, view: BlockView, dst_ids: IntArray) -> None:
        self.chunk_id, self.token = chunk_id, token
        self.num_bytes = self.left = view.unit_bytes * len(dst_ids)
        self.discarded = False
        self.num_stretches = 0
        self._view, self._dst_ids = view, dst_ids
        self._packed: ByteArray | None = None
        self._targets: Buffers | None = None

    def discard(self) -> None:
        """Write no more into the pool; the rest of the bytes is read and dropped."""
        self.discarded = True
        self._targets = self._packed = None

    def receive(self, sock: socket.socket, scratch: memoryview) -> int:
        """Take some bytes off the socket. Raises BlockingIOError when there are none."""
        if self.discarded:
            received = sock.recv_into(scratch[: min(self.left, len(scratch))])
        else:
            if self._targets is None:
                self._targets = self._make_targets()
                self.num_stretches = self._targets.num_stretches
            received = self._targets.receive(sock)
        if not received:
            raise ConnectionLost("closed by the peer")
        self.left -= received
        return received

    def finish(self) -> None:
        """All bytes are here: put them where they belong, if they are not."""
        if self._packed is not None:
            self._view.scatter(self._dst_ids, self._packed)
        self._targets = self._packed = None

    def _make_targets(self) -> Buffers:
        if isinstance(self._view, HostView) and self._view.is_direct:
            return Buffers(self._view.iovecs(self._dst_ids), self._view)
        self._packed = np.empty(self.num_bytes, np.uint8)
        return Buffers(whole(self._packed), self._packed)


class FetchingChannel(Channel):
    """One data connection to a source; requests are answered in order."""

    def __init__(
        self,
        sock: socket.socket,
        view: BlockView,
        data_token: bytes,
        *,
        on_up: Callable[[], None],
        on_fetched: Callable[[int, int], None],
        on_refused: Callable[[bytes], None],
        on_lost: Callable[[str], None],
    ) -> None:
        """``sock`` is connecting. ``on_fetched`` gets the chunk's id, and the stretches that it was received into."""
        self.sock = sock
        self._view = view
        self._on_up, self._on_fetched, self._on_refused, self._on_lost = on_up, on_fetched, on_refused, on_lost
        self._connected = False
        self._out = bytearray(PREFACE.pack(MAGIC, data_token))
        self._header = bytearray()
        self._in_body = False
        self._requests: deque[_Request] = deque()
        self._number = 0
        self._answered = 0
        self._scratch: memoryview | None = None

    @property
    def num_outstanding_bytes(self) -> int:
        return sum(request.left for request in self._requests)

    def request(self, chunk_id: int, token: bytes, src_ids: IntArray, dst_ids: IntArray) -> None:
        self._requests.append(_Request(chunk_id, token, self._view, dst_ids))
        self._out += REQUEST.pack(token, self._number & 0xFFFFFFFF, len(src_ids))
        self._out += src_ids.astype("<u4").tobytes()
        self._number += 1

    def cancel(self, token: bytes) -> None:
        for request in self._requests:
            if request.token == token:
                request.discard()

    def fileno(self) -> int:
        return self.sock.fileno()

    def close(self) -> None:
        self.sock.close()

    def interest(self) -> int:
        if not self._connected:
            return WRITE
        return READ | (WRITE if self._out else 0)

    def ready(self, mask: int) -> None:
        if not self._connected:
            try:
                self._connected = is_connected(self.sock)
            except OSError as exc:
                raise ConnectionLost(f"cannot connect: {exc.strerror}") from exc
            if not self._connected:
                return
            self._on_up()
        if self._out:
            self.flush()
        if mask & ~WRITE:
            self._read()

    def flush(self) -> None:
        try:
            while self._out and self._connected:
                del self._out[: self.sock.send(self._out)]
        except BlockingIOError:
            return

    def lost(self, reason: str) -> None:
        self._requests.clear()
        self._on_lost(reason)

    def _read(self) -> None:
        budget = TURN_BYTES
        try:
            while budget > 0:
                if not self._in_body:
                    self._read_header()
                    budget -= RESPONSE.size
                if self._in_body:
                    budget -= self._read_body()
        except BlockingIOError:
            return

    def _read_header(self) -> None:
        data = self.sock.recv(RESPONSE.size - len(self._header))
        if not data:
            raise ConnectionLost("closed by the peer")
        self._header += data
        if len(self._header) < RESPONSE.size:
            return
        number, status, size = RESPONSE.unpack(self._header)
        self._header.clear()
        if not self._requests or number != self._answered & 0xFFFFFFFF:
            raise ConnectionLost("the peer answers what was not asked")
        self._answered += 1
        request = self._requests[0]
        if status == STATUS_REFUSED and size == 0:
            self._requests.popleft()
            if not request.discarded:
                self._on_refused(request.token)
        elif status == STATUS_OK and size == request.num_bytes:
            self._in_body = True
        else:
            raise ConnectionLost(f"the peer answers with status {status} and {size} bytes")

    def _read_body(self) -> int:
        request = self._requests[0]
        if request.discarded and self._scratch is None:
            self._scratch = memoryview(bytearray(_SCRATCH_BYTES))
        received = request.receive(self.sock, self._scratch or memoryview(b""))
        if not request.left:
            self._requests.popleft()
            self._in_body = False
            if not request.discarded:
                request.finish()
                self._on_fetched(request.chunk_id, request.num_stretches)
        return received
