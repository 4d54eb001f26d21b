"""A destination's way to one source: asks for its pool, maps it, copies, and knows when what is copied is here."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from kv_transfer.endpoint import RankEndpoint
from kv_transfer.errors import TransportFailed
from kv_transfer.layout import placement_of
from kv_transfer.plan import IntArray, PairPlan
from kv_transfer.reactor import READ, WRITE, Channel, ConnectionLost, Reactor
from kv_transfer.transports.base import Cancelled, Fetched, LaneEvent, Link, LinkDown, LinkUp
from kv_transfer.transports.cuda_ipc.mapping import MappedPool, groups_of
from kv_transfer.transports.cuda_ipc.movers import Mover
from kv_transfer.transports.cuda_ipc.paths import Path
from kv_transfer.transports.cuda_ipc.pool import CudaPool
from kv_transfer.transports.cuda_ipc.runtime import CudaFailed
from kv_transfer.transports.cuda_ipc.wire import LENGTH, MAGIC, MAX_DESCRIPTION_BYTES, PREFACE, Description

log = logging.getLogger("kv_transfer")

_CONNECT_TIMEOUT_S = 10.0
# A copy takes microseconds to milliseconds: after this the device is not slow, but stuck.
COPY_TIMEOUT_S = 20.0


class Owner(Protocol):
    """What a link asks of the transport."""

    @property
    def cuda_pool(self) -> CudaPool: ...

    @property
    def reactor(self) -> Reactor: ...

    def post(self, event: LaneEvent) -> None: ...

    def make_mover(self, mapped: MappedPool, plan: PairPlan, group_of_layer: list[int], name: str) -> Mover: ...

    def count(self, what: str) -> None: ...

    def look_after(self) -> None:
        """Call ``poll`` of every link soon, and again as long as one ``is_busy``."""


@dataclass(slots=True)
class _Job:
    """One chunk.

    Attributes:
        mark: of its blocks in the source's order page.
        next_group: of layers, the first that is not enqueued.
        done: recorded after its last copy; 0 before.
    """

    chunk_id: int
    token: bytes
    src_ids: IntArray
    dst_ids: IntArray
    mark: int
    next_group: int = 0
    done: int = 0
    enqueued_at: float = field(default=0.0)


class CudaLink(Link):
    """Everything runs under the messenger's lock.

    Nothing that was given to the device can be taken back; so whoever must know that no more is written (``Cancelled``,
    ``LinkDown``) is told when the last copy's event is done.
    """

    def __init__(self, owner: Owner, peer: RankEndpoint, address: str, data_token: bytes, plan: PairPlan) -> None:
        self.is_down = False
        self._owner, self._peer, self._plan = owner, peer, plan
        self._pool = owner.cuda_pool
        self._mapped: MappedPool | None = None
        self._mover: Mover | None = None
        self._waiting: list[_Job] = []
        self._running: deque[_Job] = deque()
        self._cancelling: set[bytes] = set()
        self._free_events: list[int] = []
        self._num_claims = 0
        self._ending: str | None = None
        self._is_stuck = False
        self._channel: _Channel | None = None
        try:
            self._channel = _Channel(address, data_token, self._described, self._end)
            owner.reactor.add(self._channel)
        except OSError as exc:
            self._end(f"cannot connect to the process of {peer.describe()}: {exc}")

    @property
    def is_busy(self) -> bool:
        """Whether ``poll`` is wanted soon."""
        return bool(self._running)

    @property
    def is_waiting(self) -> bool:
        """Whether ``poll`` is wanted at all."""
        return bool(self._running or self._waiting)

    @property
    def depth(self) -> int:
        """Chunks that are not here yet."""
        return len(self._running) + len(self._waiting)

    def fetch(self, chunk_id: int, token: bytes, src_ids: IntArray, dst_ids: IntArray) -> None:
        if self._mapped is None or self._ending is not None:
            return
        units = self._plan.src_units
        mark = self._mapped.order.mark(src_ids if units == 1 else src_ids // units)
        self._waiting.append(_Job(chunk_id, token, src_ids, dst_ids, mark))
        self.poll()
        self._owner.look_after()

    def cancel(self, token: bytes) -> None:
        self._drop(lambda job: job.token == token)
        self._cancelling.add(token)
        self._confirm_cancelled()
        self._owner.look_after()

    def close(self) -> None:
        self._end("closed")

    def poll(self) -> None:
        """Enqueue what has become ready, and report what is done."""
        if self.is_down:
            return
        try:
            self._report_done()
            if self._ending is None:
                self._enqueue_ready()
        except CudaFailed as exc:
            self._fail(exc)
        self._confirm_cancelled()
        if self._ending is not None and not self._running:
            self._down(self._ending)

    def _described(self, text: bytes, page_fd: int) -> None:
        """The source has said where its pool is."""
        try:
            described = Description.decode(text, placement_of(self._peer.layout).region_bytes)
        except TransportFailed:
            os.close(page_fd)
            raise
        mapped = MappedPool(self._pool.runtime, self._pool.device, described, page_fd, self._peer.layout)
        self._mapped = mapped
        groups = groups_of(self._plan, self._peer.layout)
        self._mover = self._owner.make_mover(mapped, self._plan, groups, self._peer.describe())
        self._owner.post(LinkUp(self))

    def _enqueue_ready(self) -> None:
        mover, mapped = self._mover, self._mapped
        if mover is None or mapped is None:
            return
        for job in list(self._waiting):
            done = mapped.order.groups_done(job.mark, job.next_group)
            if done == job.next_group:
                continue
            self._num_claims = self._pool.order.hold_back(mover.stream, self._num_claims)
            is_whole = job.next_group == 0 and done == mapped.order.num_groups
            groups = None if is_whole else range(job.next_group, done)
            # Before the call: should it fail half-way, some of it may be under way.
            job.next_group = done
            for path in mover.enqueue(groups, job.src_ids, job.dst_ids):
                self._owner.count(f"{path.value}_copies" if path is not Path.KERNEL else "kernel_launches")
            if done == mapped.order.num_groups:
                self._waiting.remove(job)
                self._run(job, mover)
            elif not is_whole:
                self._owner.count("layered_fetches")

    def _run(self, job: _Job, mover: Mover) -> None:
        """Everything of a job is enqueued that will be."""
        runtime, device = self._pool.runtime, self._pool.device
        job.done = self._free_events.pop() if self._free_events else runtime.create_event(device)
        runtime.record(device, job.done, mover.stream)
        job.enqueued_at = time.monotonic()
        self._running.append(job)

    def _report_done(self) -> None:
        while self._running and self._pool.runtime.is_done(self._running[0].done):
            job = self._running.popleft()
            self._free_events.append(job.done)
            if job.token not in self._cancelling and job.chunk_id >= 0:
                self._owner.post(Fetched(self, job.chunk_id))
        if self._running and not self._is_stuck and time.monotonic() - self._running[0].enqueued_at > COPY_TIMEOUT_S:
            self._is_stuck = True
            self._owner.count("stuck_copies")
            log.error(
                "GPU %d has not carried out a copy from %s within %g s; its blocks are kept until it does",
                self._pool.device,
                self._peer.describe(),
                COPY_TIMEOUT_S,
            )
            self._end("the GPU does not carry out its copies")

    def _confirm_cancelled(self) -> None:
        busy = {job.token for job in self._running}
        for token in [t for t in self._cancelling if t not in busy]:
            self._cancelling.discard(token)
            if not self.is_down:
                self._owner.post(Cancelled(self, token))

    def _drop(self, unwanted: Callable[[_Job], bool]) -> None:
        """Forget waiting jobs; what is enqueued of them already is waited for."""
        for job in [job for job in self._waiting if unwanted(job)]:
            self._waiting.remove(job)
            if job.next_group and self._mover is not None:
                job.chunk_id = -1
                try:
                    self._run(job, self._mover)
                except CudaFailed as exc:
                    self._fail(exc)

    def _end(self, reason: str) -> None:
        """Take on nothing more; go down when the device is done with what it has."""
        if self.is_down or self._ending is not None:
            return
        self._ending = reason
        self._drop(lambda job: True)
        if self._running:
            self._owner.look_after()
        elif not self.is_down:
            self._down(reason)

    def _fail(self, exc: CudaFailed) -> None:
        if exc.is_final:
            # The context is gone, and with it all that was enqueued in it.
            self._running.clear()
            self._waiting.clear()
            self._down(str(exc))
        else:
            self._end(str(exc))

    def _down(self, reason: str) -> None:
        if self.is_down:
            return
        self.is_down = True
        self._ending = self._ending or reason
        self._release()
        if self._channel is not None:
            self._owner.reactor.drop(self._channel, reason)
        self._owner.post(LinkDown(self, reason))

    def _release(self) -> None:
        """Unmap, before the source learns of it by the socket's end."""
        try:
            if self._mover is not None:
                self._mover.close()
            for event in self._free_events:
                self._pool.runtime.destroy_event(event)
        except CudaFailed as exc:
            log.warning("cuda_ipc could not tidy up after %s: %s", self._peer.describe(), exc)
        if self._mapped is not None:
            self._mapped.close()
        self._mover = self._mapped = None
        self._free_events.clear()


class _Channel(Channel):
    """The socket to the source."""

    def __init__(
        self,
        address: str,
        data_token: bytes,
        on_described: Callable[[bytes, int], None],
        on_lost: Callable[[str], None],
    ) -> None:
        """Raises OSError: nobody listens there."""
        self._on_described, self._on_lost = on_described, on_lost
        self._unsent = PREFACE.pack(MAGIC, data_token)
        self._received = bytearray()
        self._fds: list[int] = []
        self._is_described = False
        self._until = time.monotonic() + _CONNECT_TIMEOUT_S
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._sock.setblocking(False)
            self._sock.connect(address)
        except OSError:
            self._sock.close()
            raise

    def fileno(self) -> int:
        return self._sock.fileno()

    def interest(self) -> int:
        return READ | (WRITE if self._unsent else 0)

    def ready(self, mask: int) -> None:
        if self._unsent:
            self._unsent = self._unsent[self._sock.send(self._unsent) :]
        if mask & ~WRITE:
            self._read()

    def tick(self, now: float) -> None:
        if not self._is_described and now > self._until:
            raise ConnectionLost("it does not say where its pool is")

    def close(self) -> None:
        self._sock.close()
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()

    def lost(self, reason: str) -> None:
        self._on_lost(reason)

    def _read(self) -> None:
        try:
            data, fds, _, _ = socket.recv_fds(self._sock, 1 << 16, 4)
        except BlockingIOError:
            return
        self._fds += fds
        if not data:
            raise ConnectionLost("the source has let go of its pool" if self._is_described else "the source hangs up")
        if self._is_described or len(self._fds) > 1:
            raise ConnectionLost("the source says more than it should")
        self._received += data
        if len(self._received) < LENGTH.size:
            return
        (length,) = LENGTH.unpack_from(self._received)
        if length > MAX_DESCRIPTION_BYTES or len(self._received) > LENGTH.size + length or not self._fds:
            raise ConnectionLost("the source describes its pool in a way that cannot be")
        if len(self._received) < LENGTH.size + length:
            return
        self._is_described = True
        try:
            self._on_described(bytes(self._received[LENGTH.size :]), self._fds.pop())
        except TransportFailed as exc:
            raise ConnectionLost(str(exc)) from exc
