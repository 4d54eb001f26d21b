"""Shared memory on one host: the destination maps the source's pool, read-only, and copies blocks into its own.

The smallest transport: the source does nothing at all. It cannot tell who reads its pool or take the mapping back,
and need not: what was read after a lease ended is thrown away by whoever read it, because its source does not confirm
it (see ``kv_transfer.sending``).
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
from collections import deque
from collections.abc import Callable

import numpy as np

from kv_transfer.copying import BlockCopier
from kv_transfer.endpoint import Offer, RankEndpoint
from kv_transfer.errors import PoolNotServed, TransportFailed
from kv_transfer.identity import host_id
from kv_transfer.layout import placement_of
from kv_transfer.leases import LeaseTable
from kv_transfer.memory import TRAILER, TRAILER_MAGIC, region_offsets
from kv_transfer.options import TransferOptions
from kv_transfer.plan import IntArray, PairPlan
from kv_transfer.pool import BlockPool
from kv_transfer.transports.base import Cancelled, Fetched, Link, LinkDown, LinkUp, Post, Transport
from kv_transfer.views import BlockView, HostView

_CLOSE_TIMEOUT_S = 5.0
# Absent from Python's mmap; Linux 5.14.
_MADV_POPULATE_READ = 22
# Chunks up to this size are copied by whoever asks, when nothing is queued: less than handing it on and back costs, or
# about as much.
_INLINE_BYTES = 1 << 20
# Mapped at a time when there is nothing to copy: about half a millisecond's work.
_POPULATE_BYTES = 4 << 20


class ShmTransport(Transport):
    name = "shm"
    crosses_hosts = False

    def __init__(self, pool: BlockPool, options: TransferOptions, leases: LeaseTable, post: Post) -> None:
        super().__init__(pool, options, leases, post)
        self._copier: _Copier | None = None
        self._links: list[_ShmLink] = []

    def offer(self) -> Offer:
        if self.pool.shared_file is None:
            raise PoolNotServed("the pool is private memory of this process, which no other one can map")
        fd, nonce = self.pool.shared_file
        return {"fd": fd, "nonce": nonce.hex()}

    def obstacle(self, peer: RankEndpoint) -> str | None:
        if peer.process.host != host_id():
            return "it is on another host, or in another PID namespace"
        if not peer.process.is_visible:
            return "its process is gone"
        return None

    def open_link(self, peer: RankEndpoint, data_token: bytes, plan: PairPlan) -> Link:
        if self._copier is None:
            self._copier = _Copier()
        link = _ShmLink(self._copier, self.post, self.pool.view(plan, "dst"), peer, plan)
        self._links = [x for x in self._links if not x.is_down] + [link]
        return link

    def close(self) -> None:
        for link in self._links:
            link.close()
        self._links.clear()
        if self._copier is not None:
            self._copier.close()
            self._copier = None


class _Copier:
    """One thread that does what it is given, in order; one core's memory bandwidth is what a rank gets."""

    def __init__(self) -> None:
        self._work: deque[Callable[[], None]] = deque()
        self._idle_work: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._is_working = False
        self._thread = threading.Thread(target=self._run, name="kv-shm", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], None]) -> None:
        with self._changed:
            self._work.append(work)
            self._changed.notify()

    @property
    def is_idle(self) -> bool:
        """Nothing was submitted that is not done."""
        with self._changed:
            return not self._work and not self._is_working

    def submit_idle(self, work: Callable[[], None]) -> None:
        """For when there is nothing else to do; from the copier's own thread."""
        self._idle_work.append(work)

    def close(self) -> None:
        """Do what was submitted, then end."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(_CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._is_working = False
                while not self._work and not self._idle_work:
                    if self._closing:
                        return
                    self._changed.wait()
                self._is_working = bool(self._work)
                work = (self._work or self._idle_work).popleft()
            work()


class _ShmLink(Link):
    """All but the constructor and the three methods of Link run in the copier's thread, small copies aside."""

    def __init__(self, copier: _Copier, post: Post, pool: BlockView, peer: RankEndpoint, plan: PairPlan) -> None:
        self._copier = copier
        self._post = post
        self._peer = peer
        self._plan = plan
        self._pool = pool
        self._blocks: BlockCopier | None = None
        self._stretches_per_unit = sum(part.num_bytes // part.shape[-1] for part in plan.parts)
        self._cancelled: set[bytes] = set()
        self._closed = False
        self.is_down = False
        copier.submit(self._map)

    def fetch(self, chunk_id: int, token: bytes, src_ids: IntArray, dst_ids: IntArray) -> None:
        if len(src_ids) * self._pool.unit_bytes <= _INLINE_BYTES and self._copier.is_idle:
            self._copy(chunk_id, token, src_ids, dst_ids)
        else:
            self._copier.submit(lambda: self._copy(chunk_id, token, src_ids, dst_ids))

    def cancel(self, token: bytes) -> None:
        # Seen at once by the chunks that are queued; the event queues behind the one that is being copied.
        self._cancelled.add(token)
        self._copier.submit(lambda: self._confirm_cancel(token))

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._copier.submit(lambda: self._unmap("closed"))

    def _map(self) -> None:
        try:
            mapping = _map_pool(self._peer)
            if not self._plan.is_empty:
                placement = placement_of(self._peer.layout)
                regions = [
                    np.frombuffer(mapping, np.uint8, size, offset)
                    for size, offset in zip(placement.region_bytes, region_offsets(placement), strict=False)
                ]
                source = HostView(self._plan, "src", self._peer.layout.num_blocks, regions)
                self._blocks = BlockCopier(source, self._pool)
        except (TransportFailed, MemoryError) as exc:
            self._unmap(str(exc) or "out of memory")
            return
        self._post(LinkUp(self))
        self._copier.submit_idle(lambda: self._populate(mapping, 0))

    def _populate(self, mapping: mmap.mmap, offset: int) -> None:
        """Fill in the mapping's page tables bit by bit, or the first copy out of every block takes page faults."""
        if self._closed or offset >= len(mapping):
            return
        try:
            mapping.madvise(_MADV_POPULATE_READ, offset, min(_POPULATE_BYTES, len(mapping) - offset))
        except OSError:
            # An older kernel: then every block takes its faults.
            return
        self._copier.submit_idle(lambda: self._populate(mapping, offset + _POPULATE_BYTES))

    def _copy(self, chunk_id: int, token: bytes, src_ids: IntArray, dst_ids: IntArray) -> None:
        if self._blocks is None:
            return
        try:
            if self._blocks.copy(src_ids, dst_ids, lambda: token in self._cancelled or self._closed):
                self.num_descriptors += len(src_ids) * self._stretches_per_unit
                self._post(Fetched(self, chunk_id))
        except MemoryError:
            self._unmap("out of memory")

    def _confirm_cancel(self, token: bytes) -> None:
        self._cancelled.discard(token)
        if not self.is_down:
            self._post(Cancelled(self, token))

    def _unmap(self, reason: str) -> None:
        # Its arrays are the mapping's only users: with them the mapping goes.
        self._blocks = None
        if not self.is_down:
            self.is_down = True
            self._post(LinkDown(self, reason))


def _map_pool(peer: RankEndpoint) -> mmap.mmap:
    """The pool of a process on this host, read-only.

    A pid and a descriptor number prove nothing: the process may have ended and another have taken its pid. So the file
    must be sealed against shrinking (reading it can then never fault), and carry the pool's nonce.

    Raises:
        TransportFailed: there is no such pool, or this process may not look at it.
    """
    offer, size = peer.transports["shm"], region_offsets(placement_of(peer.layout))[-1]
    fd_number, nonce = offer.get("fd"), offer.get("nonce")
    if not isinstance(fd_number, int) or not isinstance(nonce, str):
        raise TransportFailed("its offer names no descriptor and nonce")
    try:
        fd = os.open(f"/proc/{peer.process.pid}/fd/{fd_number}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as exc:
        raise TransportFailed(
            f"cannot open the pool of process {peer.process.pid}: {exc.strerror}; both must run as the same user"
        ) from exc
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        trailer = os.pread(fd, TRAILER.size, size)
        if not seals & fcntl.F_SEAL_SHRINK or len(trailer) != TRAILER.size:
            raise TransportFailed(f"process {peer.process.pid} has another file where its pool should be")
        if TRAILER.unpack(trailer) != (TRAILER_MAGIC, bytes.fromhex(nonce), peer.layout.pool_bytes):
            raise TransportFailed(f"process {peer.process.pid} has another pool than the one announced")
        return mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    except (OSError, ValueError) as exc:
        raise TransportFailed(f"cannot map the pool of process {peer.process.pid}: {exc}") from exc
    finally:
        os.close(fd)
