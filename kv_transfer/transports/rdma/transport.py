"""The transport: one device, one registered pool, one thread for all links and all that is served."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections import Counter
from collections.abc import Mapping
from typing import Any

from kv_transfer.endpoint import Offer, RankEndpoint
from kv_transfer.errors import InvalidOptions, PoolNotServed, TransportFailed
from kv_transfer.leases import LeaseTable
from kv_transfer.options import TransferOptions
from kv_transfer.plan import PairPlan
from kv_transfer.pool import BlockPool
from kv_transfer.transports.base import Link, Post, Revoked, Transport
from kv_transfer.transports.rdma.device import Device
from kv_transfer.transports.rdma.fetching import RdmaLink
from kv_transfer.transports.rdma.gpu_memory import choose_registration
from kv_transfer.transports.rdma.loop import LoopThread
from kv_transfer.transports.rdma.requests import LocalRegion
from kv_transfer.transports.rdma.serving import Server
from kv_transfer.transports.rdma.wire import VERSION

log = logging.getLogger("kv_transfer")

_START_TIMEOUT_S = 10.0


class RdmaTransport(Transport):
    name = "rdma"

    def __init__(self, pool: BlockPool, options: TransferOptions, leases: LeaseTable, post: Post) -> None:
        super().__init__(pool, options, leases, post)
        self._device: Device | None = None
        self._registered: list[Any] = []
        self._regions: list[LocalRegion] = []
        self._thread: LoopThread | None = None
        self._server: Server | None = None
        self._links: list[RdmaLink] = []
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    @classmethod
    def preflight(cls, options: TransferOptions) -> None:
        Device(options.rdma, 0, host=options.bind_host).close()

    def offer(self) -> Offer:
        host, port, layout = self.options.bind_host, self._own_port(), self.pool.layout
        memory = self.pool.memory
        if not memory:
            raise PoolNotServed("the pool does not tell where its memory is")
        device = self._device = Device(self.options.rdma, layout.tp_rank, host=host if layout.num_ranks == 1 else "")
        how = choose_registration(memory[0].device, device.verbs)
        is_writable = self.options.rdma.mode == "write"
        for region in memory:
            registered, address = device.register_memory(region, how, is_writable=is_writable)
            self._registered.append(registered)
            keys = int(registered.lkey), int(registered.rkey)
            self._regions.append(LocalRegion(address, *keys, region.num_bytes))
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            sock = socket.create_server((host, port), family=family, backlog=256)
        except OSError as exc:
            raise TransportFailed(f"cannot listen on {host} port {port} for RDMA peers: {exc}") from exc
        self._thread = LoopThread("kv-rdma")
        self._server = Server(
            sock, device, regions=self._regions, leases=self.leases, on_revoked=self._revoked, count=self._count
        )
        self._start(self._thread, self._server, device)
        log.info(
            "KV transfer by RDMA: %s; %s, %d bytes in %d regions",
            device.describe(),
            how.value,
            self.pool.layout.pool_bytes,
            len(memory),
        )
        return {
            "version": VERSION,
            "port": int(sock.getsockname()[1]),
            "device": device.port.device,
            "link_layer": device.port.link_layer,
        }

    def obstacle(self, peer: RankEndpoint) -> str | None:
        offer = peer.transports[self.name]
        # The first version did not say so.
        version = offer.get("version", 1)
        if version != VERSION:
            return f"it connects queue pairs by version {version}, we by {VERSION}: run one release on both"
        port = offer.get("port")
        if not isinstance(port, int) or not 1 <= port <= 65535:
            return "its offer has no usable port"
        if self._device is None or self._thread is None:
            return "our own pool is not registered"
        if offer.get("link_layer") != self._device.port.link_layer:
            return f"its device is on {offer.get('link_layer')}, ours on {self._device.port.link_layer}"
        return None

    def open_link(self, peer: RankEndpoint, data_token: bytes, plan: PairPlan) -> Link:
        assert self._thread is not None and self._device is not None
        link = RdmaLink(
            thread=self._thread,
            device=self._device,
            view=self.pool.view(plan, "dst"),
            regions=self._regions,
            options=self.options,
            peer=peer,
            data_token=data_token,
            plan=plan,
            post=self.post,
            count=self._count,
        )
        self._links = [x for x in self._links if not x.is_down] + [link]
        return link

    def revoke(self, token: bytes) -> None:
        server = self._server
        if self._thread is None or server is None or not self._thread.submit(lambda: server.revoke(token)):
            super().revoke(token)

    def hang_up(self, data_token: bytes) -> None:
        server = self._server
        if self._thread is not None and server is not None:
            self._thread.submit(lambda: server.hang_up(data_token))

    def counters(self) -> Mapping[str, int]:
        with self._lock:
            return dict(self._counts)

    def close(self) -> None:
        if self._thread is not None:
            self._thread.close(self._finish)
            self._thread = None
        elif self._server is None and self._device is not None:
            self._release()

    def _revoked(self, token: bytes) -> None:
        self.post(Revoked(self, token))

    def _own_port(self) -> int:
        """0 for any."""
        ports, layout = self.options.rdma.ports, self.pool.layout
        if ports and len(ports) != layout.tp_size:
            raise InvalidOptions(
                "rdma.ports", f"has {len(ports)} ports: give {layout.tp_size}, one for each rank of this instance"
            )
        return ports[layout.tp_rank] if ports else 0

    def _start(self, thread: LoopThread, server: Server, device: Device) -> None:
        started, failure = threading.Event(), []

        def begin() -> None:
            task = thread.loop.create_task(server.start())

            def done(_: object) -> None:
                failure.append(task.exception())
                started.set()

            task.add_done_callback(done)
            if device.async_fd >= 0:
                os.set_blocking(device.async_fd, False)
                thread.loop.add_reader(device.async_fd, self._on_device_event)

        thread.submit(begin)
        if not started.wait(_START_TIMEOUT_S) or failure[0] is not None:
            raise TransportFailed(f"RDMA cannot be served: {failure[0] if failure else 'the thread does not start'}")

    def _on_device_event(self) -> None:
        """Something has happened to the device or its port; in the loop's thread."""
        assert self._device is not None
        kind = self._device.take_event()
        if kind is None:
            return
        log.warning("RDMA device %s reports %s", self._device.port.device, kind.name)
        if kind.is_fatal:
            for link in self._links:
                link.device_is_gone(f"RDMA device {self._device.port.device} is gone")

    def _finish(self) -> None:
        """In the loop's thread: after this the device touches nothing of ours."""
        for link in self._links:
            link.shut()
        self._links.clear()
        if self._server is not None:
            self._server.close()
        self._release()

    def _release(self) -> None:
        device, self._device = self._device, None
        if device is None:
            return
        if self._thread is not None and device.async_fd >= 0:
            self._thread.loop.remove_reader(device.async_fd)
        for registered in self._registered:
            device.deregister(registered)
        self._registered.clear()
        device.close()

    def _count(self, name: str, amount: int) -> None:
        with self._lock:
            self._counts[name] += amount
