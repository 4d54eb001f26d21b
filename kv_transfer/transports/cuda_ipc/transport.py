"""GPU memory on one host: the destination maps the source's pool by IPC handle, and its own GPU copies blocks out.

The source takes no part in copying. As with shared memory it cannot take the mapping back, and need not: what was read
after a lease ended is not confirmed by it, and thrown away. There is no thread: everything is enqueued on a stream of
the destination, and asked after from the messenger's loop.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import time
from collections import Counter
from collections.abc import Mapping

from kv_transfer.endpoint import Offer, RankEndpoint
from kv_transfer.errors import InvalidOptions, PoolNotServed, TransportFailed
from kv_transfer.identity import host_id
from kv_transfer.leases import LeaseTable
from kv_transfer.options import TransferOptions
from kv_transfer.plan import PairPlan
from kv_transfer.pool import BlockPool
from kv_transfer.reactor import Reactor
from kv_transfer.transports.base import Link, Post, Transport
from kv_transfer.transports.cuda_ipc.calibration import calibrate
from kv_transfer.transports.cuda_ipc.copies import StreamCopies
from kv_transfer.transports.cuda_ipc.link import CudaLink
from kv_transfer.transports.cuda_ipc.mapping import OWN_POOLS, MappedPool, device_of
from kv_transfer.transports.cuda_ipc.movers import DirectMover, Mover, StagedMover
from kv_transfer.transports.cuda_ipc.paths import Choice, Path, only
from kv_transfer.transports.cuda_ipc.pool import CudaPool
from kv_transfer.transports.cuda_ipc.regions import share
from kv_transfer.transports.cuda_ipc.runtime import UUID_BYTES, CudaFailed, open_runtime
from kv_transfer.transports.cuda_ipc.serving import Listener
from kv_transfer.transports.cuda_ipc.timer import Timer
from kv_transfer.transports.cuda_ipc.wire import NONCE_BYTES, Description, socket_name

log = logging.getLogger("kv_transfer")

# Between looks at copies that are under way, and at events of a source that still computes.
_BUSY_US = 30
_WAITING_US = 200
# Enough for a memory-bound kernel: more threads than this do not copy faster.
_THREAD_BLOCKS_PER_MULTIPROCESSOR = 4
_CLOSE_TIMEOUT_S = 5.0


class CudaIpcTransport(Transport):
    name = "cuda_ipc"

    def __init__(self, pool: BlockPool, options: TransferOptions, leases: LeaseTable, post: Post) -> None:
        super().__init__(pool, options, leases, post)
        self._reactor: Reactor | None = None
        self._timer: Timer | None = None
        self._listener: Listener | None = None
        self._links: list[CudaLink] = []
        self._streams: dict[int, int] = {}
        self._choices: dict[int, Choice] = {}
        self._calibrated: list[StreamCopies] = []
        self._counts: Counter[str] = Counter()
        self._nonce = secrets.token_hex(NONCE_BYTES)
        self._is_closed = False

    @property
    def chunk_bytes(self) -> int:
        return self.options.cuda.chunk_bytes

    @property
    def cuda_pool(self) -> CudaPool:
        """The pool, which is on a device: ``offer`` and ``obstacle`` have made sure."""
        assert isinstance(self.pool, CudaPool)
        return self.pool

    @property
    def reactor(self) -> Reactor:
        assert self._reactor is not None, "attach() comes first"
        return self._reactor

    @classmethod
    def preflight(cls, options: TransferOptions) -> None:
        open_runtime()

    def attach(self, reactor: Reactor) -> None:
        self._reactor = reactor

    def offer(self) -> Offer:
        if not isinstance(self.pool, CudaPool):
            raise PoolNotServed(
                "cuda_ipc moves blocks between GPUs, and this pool is not a CudaPool; use shm or tcp for host memory"
            )
        pool = self.pool
        self._timer = Timer(self._on_time)
        self.reactor.add(self._timer)
        shared = share(pool.runtime, pool.regions)
        self._choose(pool.device)
        # Freeing device memory waits for all that runs on the device: now that is nothing, later it may be a lot.
        while self._calibrated:
            self._calibrated.pop().close()
        description = Description(
            nonce=self._nonce,
            pid=os.getpid(),
            uuid=pool.runtime.uuid(pool.device),
            regions=tuple(shared),
            events=tuple(pool.runtime.export_event(event) for event in pool.order.events),
            num_groups=pool.order.num_groups,
        )
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            sock.bind(socket_name(self._nonce))
            sock.listen(256)
        except OSError as exc:
            sock.close()
            raise TransportFailed(f"cuda_ipc cannot listen on a local socket: {exc}") from exc
        OWN_POOLS[self._nonce] = pool
        self._listener = Listener(sock, self.reactor, self.leases, (description.encode(), pool.order.fd))
        self.reactor.add(self._listener)
        return {"nonce": self._nonce, "device": description.uuid.hex()}

    def obstacle(self, peer: RankEndpoint) -> str | None:
        if not isinstance(self.pool, CudaPool):
            return "our own pool is in host memory"
        if peer.process.host != host_id():
            return "it is on another host, or in another PID namespace"
        if not peer.process.is_visible:
            return "its process is gone"
        nonce, uuid = peer.transports[self.name].get("nonce"), peer.transports[self.name].get("device")
        if not _is_hex(nonce, NONCE_BYTES) or not _is_hex(uuid, UUID_BYTES):
            return "its offer names no socket and device"
        try:
            device_of(self.pool.runtime, bytes.fromhex(str(uuid)))
        except TransportFailed as exc:
            return str(exc)
        return None

    def open_link(self, peer: RankEndpoint, data_token: bytes, plan: PairPlan) -> Link:
        address = socket_name(str(peer.transports[self.name]["nonce"]))
        link = CudaLink(self, peer, address, data_token, plan)
        self._links = [x for x in self._links if not x.is_down] + [link]
        return link

    def hang_up(self, data_token: bytes) -> None:
        if self._listener is not None:
            self._listener.hang_up(data_token)

    def counters(self) -> Mapping[str, int]:
        return {**self._counts, "chunks_under_way": sum(link.depth for link in self._links)}

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        for link in self._links:
            link.close()
        self._drain()
        if self._listener is not None:
            if not self._listener.release_all(_CLOSE_TIMEOUT_S):
                self.cuda_pool.is_mapped_by_others = True
            self.reactor.drop(self._listener, "the transport was closed")
        OWN_POOLS.pop(self._nonce, None)
        if all(link.is_down for link in self._links):
            for copies in self._calibrated:
                copies.close()
            for stream in self._streams.values():
                try:
                    self.cuda_pool.runtime.destroy_stream(stream)
                except CudaFailed as exc:
                    log.warning("cuda_ipc could not tidy up: %s", exc)
        self._links, self._streams = [], {}
        if self._timer is not None:
            self.reactor.drop(self._timer, "the transport was closed")

    def count(self, what: str) -> None:
        """For ``counters``."""
        self._counts[what] += 1

    def look_after(self) -> None:
        """Look at the links again soon, as long as there is something to look at."""
        if self._timer is not None and not self._is_closed:
            busy = any(link.is_busy for link in self._links)
            waiting = busy or any(link.is_waiting for link in self._links)
            self._timer.set(_BUSY_US if busy else _WAITING_US if waiting else 0)

    def make_mover(self, mapped: MappedPool, plan: PairPlan, group_of_layer: list[int], name: str) -> Mover:
        """What carries out a plan on a peer's pool. Says so when it goes through the host."""
        pool = self.cuda_pool
        here = self._copies(pool.device)
        if mapped.is_reachable:
            choice = self._choose(mapped.device, mapped)
            return DirectMover(plan, group_of_layer, (mapped.bases, pool.bases), here, choice)
        self.count("staged_links")
        log.warning(
            "GPU %d cannot address the memory of GPU %d: KV from %s goes through the host, many times slower; see "
            "`nvidia-smi topo -p2p r`, or let the two share a GPU pair with peer access",
            pool.device,
            mapped.device,
            name,
        )
        there = self._copies(mapped.device)
        return StagedMover(plan, group_of_layer, (mapped.bases, pool.bases), pool.runtime, (there, here))

    def _choose(self, src_device: int, mapped: MappedPool | None = None) -> Choice:
        """How to copy from a device; measured once for each."""
        if src_device in self._choices:
            return self._choices[src_device]
        pool = self.cuda_pool
        forced = self.options.cuda.path
        if forced == "auto":
            copies = self._copies(pool.device)
            if mapped is None:
                choice = calibrate(pool.runtime, copies, src_device, None)
            else:
                largest = max(zip(mapped.region_bytes, mapped.bases, strict=True))
                choice = calibrate(pool.runtime, copies, src_device, largest)
            self._calibrated.append(copies)
        else:
            if forced == Path.BATCH.value and not pool.runtime.has_batches:
                raise InvalidOptions(
                    "cuda.path", "is 'batch': that needs cuda-bindings 12.8 or newer; install it, or use 'auto'"
                )
            choice = only(src_device, Path(forced))
        self._choices[src_device] = choice
        log.info(
            "cuda_ipc from GPU %d to GPU %d (%s): %s",
            src_device,
            pool.device,
            pool.runtime.describe(pool.device),
            choice.describe(),
        )
        return choice

    def _copies(self, device: int) -> StreamCopies:
        """On this transport's one stream of a device."""
        runtime = self.cuda_pool.runtime
        if device not in self._streams:
            self._streams[device] = runtime.create_stream(device)
        blocks = self.options.cuda.thread_blocks or _THREAD_BLOCKS_PER_MULTIPROCESSOR * runtime.num_multiprocessors(
            device
        )
        return StreamCopies(runtime, device, self._streams[device], blocks)

    def _on_time(self) -> None:
        for link in self._links:
            link.poll()
        self.look_after()

    def _drain(self) -> None:
        """Wait for what the device has been given."""
        until = time.monotonic() + _CLOSE_TIMEOUT_S
        while any(not link.is_down for link in self._links):
            if time.monotonic() > until:
                log.error("GPU %d is still copying: what it reads from stays mapped", self.cuda_pool.device)
                return
            for link in self._links:
                link.poll()
            time.sleep(0.0002)


def _is_hex(value: object, num_bytes: int) -> bool:
    try:
        return isinstance(value, str) and len(bytes.fromhex(value)) == num_bytes
    except ValueError:
        return False
