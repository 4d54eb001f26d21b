"""TCP between hosts: the destination asks for blocks, the source streams them, the destination itself writes them.

Blocks go from the pool into the socket, and from the socket into the pool, with no buffer in between unless what moves
is in small pieces (heads are sliced) or the pool is not in host memory. The messenger's own thread carries all
connections.

With a secret, who does not prove on the control connection that it knows it is given no data token, and so reaches no
block. What goes over the data connections after that is neither encrypted nor signed: who can read or change packets
on the way can read and change KV, and ``checksum`` notices accidents only. Where that matters, use a tunnel (WireGuard,
IPsec), which leaves the copying as it is; TLS in this process would take sendmsg's place.
"""

from __future__ import annotations

from collections.abc import Mapping

from kv_transfer.addresses import Address, listen, resolve, start_connecting
from kv_transfer.endpoint import Offer, RankEndpoint
from kv_transfer.errors import TransportFailed
from kv_transfer.leases import LeaseTable
from kv_transfer.options import TransferOptions
from kv_transfer.plan import IntArray, PairPlan
from kv_transfer.pool import BlockPool
from kv_transfer.reactor import Reactor
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
from kv_transfer.transports.tcp_fetching import FetchingChannel
from kv_transfer.transports.tcp_serving import Listener


class TcpTransport(Transport):
    name = "tcp"

    def __init__(self, pool: BlockPool, options: TransferOptions, leases: LeaseTable, post: Post) -> None:
        super().__init__(pool, options, leases, post)
        self._reactor: Reactor | None = None
        self._listener: Listener | None = None
        self._links: list[_TcpLink] = []
        self._num_strangers = 0

    def attach(self, reactor: Reactor) -> None:
        self._reactor = reactor

    @property
    def reactor(self) -> Reactor:
        assert self._reactor is not None, "attach() comes first"
        return self._reactor

    def offer(self) -> Offer:
        host, port = self.options.bind_host, self.options.data_port
        try:
            sock = listen(host, port)
        except OSError as exc:
            raise TransportFailed(f"cannot listen on {host} port {port}: {exc}") from exc
        self._listener = Listener(sock, self.reactor, self.leases, self._count_stranger)
        self.reactor.add(self._listener)
        return {"port": int(sock.getsockname()[1])}

    def obstacle(self, peer: RankEndpoint) -> str | None:
        port = peer.transports[self.name].get("port")
        if not isinstance(port, int) or not 1 <= port <= 65535:
            return "its offer has no usable port"
        return None

    def open_link(self, peer: RankEndpoint, data_token: bytes, plan: PairPlan) -> Link:
        link = _TcpLink(self, self.reactor, peer, data_token, plan)
        self._links = [x for x in self._links if not x.is_down] + [link]
        return link

    def revoke(self, token: bytes) -> None:
        if self._listener is not None:
            self._listener.revoke(token)
        self.post(Revoked(self, token))

    def hang_up(self, data_token: bytes) -> None:
        if self._listener is not None:
            self._listener.hang_up(data_token)

    def counters(self) -> Mapping[str, int]:
        return {"strangers": self._num_strangers}

    def close(self) -> None:
        for link in self._links:
            link.close()
        self._links.clear()
        if self._listener is not None:
            self._listener.hang_up_all()
            self.reactor.drop(self._listener, "the transport was closed")
            self._listener = None

    def _count_stranger(self) -> None:
        self._num_strangers += 1


class _TcpLink(Link):
    """A few connections to one source rank."""

    def __init__(
        self, transport: TcpTransport, reactor: Reactor, peer: RankEndpoint, data_token: bytes, plan: PairPlan
    ) -> None:
        self._reactor, self._post, self._peer = reactor, transport.post, peer
        self._view = transport.pool.view(plan, "dst")
        self._data_token, self._num_streams = data_token, transport.options.tcp_streams
        self._channels: list[FetchingChannel] = []
        self._num_connected = 0
        self.is_down = False
        resolve(peer.host, int(peer.transports["tcp"]["port"]), self._connect, reactor.submit)

    def fetch(self, chunk_id: int, token: bytes, src_ids: IntArray, dst_ids: IntArray) -> None:
        if self.is_down:
            return
        channel = min(self._channels, key=lambda c: c.num_outstanding_bytes)
        channel.request(chunk_id, token, src_ids, dst_ids)
        self._reactor.flush_later(channel)

    def cancel(self, token: bytes) -> None:
        for channel in self._channels:
            channel.cancel(token)
        if not self.is_down:
            self._post(Cancelled(self, token))

    def close(self) -> None:
        self._down("closed")

    def _connect(self, address: Address | OSError) -> None:
        if self.is_down:
            return
        try:
            if isinstance(address, OSError):
                raise address
            for _ in range(self._num_streams):
                channel = FetchingChannel(
                    start_connecting(address),
                    self._view,
                    self._data_token,
                    on_up=self._up,
                    on_fetched=self._fetched,
                    on_refused=lambda token: self._post(
                        Refusal(self, token, "the source does not allow these blocks any more")
                    ),
                    on_lost=self._down,
                )
                self._channels.append(channel)
                self._reactor.add(channel)
        except OSError as exc:
            self._down(f"cannot connect to {self._peer.host}: {exc}")

    def _fetched(self, chunk_id: int, num_stretches: int) -> None:
        self.num_descriptors += num_stretches
        self._post(Fetched(self, chunk_id))

    def _up(self) -> None:
        self._num_connected += 1
        if self._num_connected == self._num_streams:
            self._post(LinkUp(self))

    def _down(self, reason: str) -> None:
        if self.is_down:
            return
        self.is_down = True
        for channel in self._channels:
            self._reactor.drop(channel, reason)
        self._post(LinkDown(self, reason))
