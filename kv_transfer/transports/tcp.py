"""TCP between hosts: the destination asks for blocks, the source streams them, the destination itself writes them.

Blocks go from the pool into the socket, and from the socket into the pool, with no buffer in between unless what moves
is in small pieces (heads are sliced) or the pool is not in host memory. One thread of each messenger carries all its
connections.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Mapping

from kv_transfer.endpoint import Offer, RankEndpoint
from kv_transfer.errors import TransportFailed
from kv_transfer.leases import LeaseTable
from kv_transfer.options import TransferOptions
from kv_transfer.plan import IntArray, PairPlan
from kv_transfer.pool import BlockPool
from kv_transfer.transports.base import (
    Cancelled,
    Fetched,
    Link,
    LinkDown,
    LinkUp,
    Post,
    Refusal,
    Revoked,
    Transport,
)
from kv_transfer.transports.tcp_fetching import FetchingChannel, start_connecting
from kv_transfer.transports.tcp_loop import TcpLoop
from kv_transfer.transports.tcp_serving import Listener


class TcpTransport(Transport):
    name = "tcp"

    def __init__(self, pool: BlockPool, options: TransferOptions, leases: LeaseTable, post: Post) -> None:
        super().__init__(pool, options, leases, post)
        self._loop: TcpLoop | None = None
        self._listener: Listener | None = None
        self._num_strangers = 0
        self._lock = threading.Lock()

    def offer(self) -> Offer:
        host, port = self.options.bind_host, self.options.data_port
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            sock = socket.create_server((host, port), family=family, backlog=256)
        except OSError as exc:
            raise TransportFailed(f"cannot listen on {host} port {port}: {exc}") from exc
        loop = self._running_loop()
        listener = Listener(sock, loop, self.leases, self._count_stranger)
        self._listener = listener
        loop.submit(lambda: loop.add(listener))
        return {"port": int(sock.getsockname()[1])}

    def obstacle(self, peer: RankEndpoint) -> str | None:
        port = peer.transports[self.name].get("port")
        if not isinstance(port, int) or not 1 <= port <= 65535:
            return "its offer has no usable port"
        return None

    def open_link(self, peer: RankEndpoint, data_token: bytes, plan: PairPlan) -> Link:
        return _TcpLink(self, self._running_loop(), peer, data_token, plan)

    def revoke(self, token: bytes) -> None:
        loop, listener = self._loop, self._listener

        def act() -> None:
            if listener is not None:
                listener.revoke(token)
            self.post(Revoked(self, token))

        if loop is None or not loop.submit(act):
            act()

    def hang_up(self, data_token: bytes) -> None:
        loop, listener = self._loop, self._listener
        if loop is not None and listener is not None:
            loop.submit(lambda: listener.hang_up(data_token))

    def counters(self) -> Mapping[str, int]:
        with self._lock:
            return {"strangers": self._num_strangers}

    def close(self) -> None:
        if self._loop is not None:
            self._loop.close()
        if self._listener is not None:
            self._listener.sock.close()

    def _running_loop(self) -> TcpLoop:
        if self._loop is None:
            self._loop = TcpLoop()
        return self._loop

    def _count_stranger(self) -> None:
        with self._lock:
            self._num_strangers += 1


class _TcpLink(Link):
    """A few connections to one source rank. Everything but the methods of Link runs in the loop's thread."""

    def __init__(
        self, transport: TcpTransport, loop: TcpLoop, peer: RankEndpoint, data_token: bytes, plan: PairPlan
    ) -> None:
        self._loop, self._post, self._peer = loop, transport.post, peer
        self._view = transport.pool.view(plan, "dst")
        self._data_token, self._num_streams = data_token, transport.options.tcp_streams
        self._channels: list[FetchingChannel] = []
        self._num_connected = 0
        self._is_down = False
        if not loop.submit(self._connect):
            self._down("the transport has stopped")

    def fetch(self, chunk_id: int, token: bytes, src_ids: IntArray, dst_ids: IntArray) -> None:
        def act() -> None:
            if not self._is_down:
                channel = min(self._channels, key=lambda c: c.num_outstanding_bytes)
                channel.request(chunk_id, token, src_ids, dst_ids)
                self._loop.update(channel)

        self._loop.submit(act)

    def cancel(self, token: bytes) -> None:
        def act() -> None:
            for channel in self._channels:
                channel.cancel(token)
            if not self._is_down:
                self._post(Cancelled(self, token))

        self._loop.submit(act)

    def close(self) -> None:
        self._loop.submit(lambda: self._down("closed"))

    def _connect(self) -> None:
        try:
            for _ in range(self._num_streams):
                sock = start_connecting(self._peer.host, int(self._peer.transports["tcp"]["port"]))
                channel = FetchingChannel(
                    sock,
                    self._view,
                    self._data_token,
                    on_up=self._up,
                    on_fetched=lambda chunk_id: self._post(Fetched(self, chunk_id)),
                    on_refused=lambda token: self._post(
                        Refusal(self, token, "the source does not allow these blocks any more")
                    ),
                    on_lost=self._down,
                )
                self._channels.append(channel)
                self._loop.add(channel)
        except OSError as exc:
            self._down(f"cannot connect to {self._peer.host}: {exc}")

    def _up(self) -> None:
        self._num_connected += 1
        if self._num_connected == self._num_streams:
            self._post(LinkUp(self))

    def _down(self, reason: str) -> None:
        if self._is_down:
            return
        self._is_down = True
        for channel in self._channels:
            self._loop.drop(channel, reason)
        self._post(LinkDown(self, reason))
