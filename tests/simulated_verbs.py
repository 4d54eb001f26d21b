"""Verbs without a device: reads and writes are copies inside this process.

It checks keys, bounds, rights and the room of queues; it can hold what is posted, and let go of it later, or fail.

What it stands for is the part of pyverbs that the RDMA transport uses; the real one runs in a VM (tests/rdma_vm).
"""

from __future__ import annotations

import ctypes
import itertools
import os
import threading
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kv_transfer.sysfs import Gid, PciPlace, RdmaPort
from kv_transfer.transports.rdma import device, queue_pair
from kv_transfer.transports.rdma.verbs import Verbs

SIGNALED = 2
REMOTE_WRITE, REMOTE_READ = 2, 4
WRITE, WRITE_WITH_IMMEDIATE, SEND_WITH_IMMEDIATE, READ = 0, 1, 3, 4
WITH_IMMEDIATE = 2
PORT = RdmaPort(
    "sim0", 1, "ACTIVE", "Ethernet", 100.0, 0,
    (Gid(0, "0000:0000:0000:0000:0000:ffff:7f00:0001", "RoCE v2", "lo"),),
    ("lo",), "", False, PciPlace("", (), 0),
)  # fmt: skip


class SimulatedError(Exception):
    """As PyverbsError."""

    error_code = 5


class Fabric:
    """All that is open.

    Attributes:
        is_stuck: what is posted stays under way, until ``release``.
        is_deaf: what is posted is carried out, but whoever has posted it does not hear so.
        fail_next: so many signalled operations complete with an error.
        num_reads, num_writes: posted so far.
        num_lost: that were still under way when the other end's queue pair was gone.
        violations: what a device would not have stood for.
        open: number of open things by kind.
        device: overrides of its attributes.
    """

    def __init__(self) -> None:
        self.is_stuck = self.is_deaf = False
        self.fail_next = 0
        self.num_reads = self.num_writes = self.num_lost = 0
        self.open: Counter[str] = Counter()
        self.regions: dict[int, tuple[int, int, int]] = {}
        self.pairs: dict[int, Any] = {}
        self.violations: list[str] = []
        # A device ends a queue pair between two operations of it, never in the middle of one.
        self.lock = threading.RLock()
        self._held: deque[tuple[Any, Any]] = deque()
        self.device: dict[str, int] = {}
        self._keys = itertools.count(1)

    def check(self, is_right: object, wrong: str) -> None:
        """Whoever did it may be in a thread whose exceptions nobody sees."""
        if not is_right:
            self.violations.append(wrong)
            raise AssertionError(wrong)

    @property
    def num_held(self) -> int:
        return len(self._held)

    def release(self) -> None:
        """Carry out what is under way, as far as its queue pairs still are."""
        self.is_stuck = False
        with self.lock:
            while self._held:
                pair, request = self._held.popleft()
                pair.carry_out(request)

    def in_use(self) -> dict[str, int]:
        return {kind: count for kind, count in self.open.items() if count}

    def verbs(self) -> Verbs:
        fabric = self

        class Thing:
            def __init__(self) -> None:
                self.is_open = True
                fabric.open[type(self).__name__] += 1

            def close(self) -> None:
                if self.is_open:
                    self.is_open = False
                    fabric.open[type(self).__name__] -= 1

        class Context(Thing):
            def __init__(self, name: str) -> None:
                super().__init__()
                self.fd = -1

            def query_device(self) -> Any:
                usual = {"max_qp_rd_atom": 16, "max_qp_init_rd_atom": 16, "max_sge": 8, "max_sge_rd": 8}
                return SimpleNamespace(**{**usual, "max_qp_wr": 1024, "max_cqe": 4096, **fabric.device})

            def query_port(self, number: int) -> Any:
                return SimpleNamespace(lid=0, active_mtu=5, max_msg_sz=1 << 30)

        class PD(Thing):
            def __init__(self, context: Context) -> None:
                super().__init__()

        class MR(Thing):
            def __init__(self, pd: PD, length: int, access: int, address: int) -> None:
                super().__init__()
                self.lkey = self.rkey = next(fabric._keys)
                fabric.regions[self.lkey] = address, length, access

            def close(self) -> None:
                fabric.regions.pop(self.lkey, None)
                super().close()

        class CompChannel(Thing):
            def __init__(self, context: Context) -> None:
                super().__init__()
                self.fd = os.eventfd(0, os.EFD_NONBLOCK)

            def get_cq_event(self, queue: Any) -> None:
                try:
                    os.eventfd_read(self.fd)
                except BlockingIOError as exc:
                    raise SimulatedError("no event") from exc

            def close(self) -> None:
                if self.is_open:
                    os.close(self.fd)
                super().close()

        class CQ(Thing):
            def __init__(self, context: Context, capacity: int, _: None, channel: CompChannel, vector: int) -> None:
                super().__init__()
                self.channel, self.entries, self.is_armed = channel, deque[Any](), False
                self.capacity = capacity

            def req_notify(self) -> None:
                self.is_armed = True

            def ack_events(self, count: int) -> None:
                pass

            def poll(self, most: int) -> tuple[int, list[Any]]:
                found = [self.entries.popleft() for _ in range(min(most, len(self.entries)))]
                return len(found), found

            def push(self, wr_id: int, status: int, number: int, immediate: int | None = None) -> None:
                fabric.check(len(self.entries) < self.capacity, "the completion queue overflows")
                flags, word = (0, 0) if immediate is None else (WITH_IMMEDIATE, immediate)
                fields = {"vendor_err": 0, "wc_flags": flags, "imm_data": word}
                self.entries.append(SimpleNamespace(wr_id=wr_id, status=status, qp_num=number, **fields))
                if self.is_armed:
                    self.is_armed = False
                    os.eventfd_write(self.channel.fd, 1)

        class QP(Thing):
            def __init__(self, pd: PD, attributes: Any) -> None:
                super().__init__()
                self.qp_num, self.attributes, self.state = next(fabric._keys), attributes, "reset"
                self.num_posted = self.num_receives = self.access = self.peer_number = 0
                fabric.pairs[self.qp_num] = self

            def to_init(self, attributes: Any) -> None:
                self.state, self.access = "init", attributes.qp_access_flags

            def to_rtr(self, attributes: Any) -> None:
                assert self.state == "init" and attributes.dest_qp_num
                self.state, self.peer_number = "rtr", attributes.dest_qp_num

            def to_rts(self, attributes: Any) -> None:
                assert self.state == "rtr"
                self.state = "rts"

            def post_recv(self, request: Any) -> None:
                assert self.is_open and self.state != "reset"
                self.num_receives += 1
                fabric.check(self.num_receives <= self.attributes.cap.max_recv_wr, "the receive queue overflows")

            def post_send(self, request: Any) -> None:
                assert self.is_open and self.state == "rts"
                with fabric.lock:
                    while request is not None:
                        self.num_posted += 1
                        fabric.check(self.num_posted <= self.attributes.cap.max_send_wr, "the send queue overflows")
                        pieces = len(request.elements[: request.num_sge])
                        fabric.check(pieces <= self.attributes.cap.max_send_sge, "too many pieces")
                        fabric.num_reads += request.opcode == READ
                        fabric.num_writes += request.opcode in (WRITE, WRITE_WITH_IMMEDIATE)
                        # The caller may change it, or let go of it, once it is posted.
                        copied, request = request.copied(), request.next_wr
                        if fabric.is_stuck or any(pair is self for pair, _ in fabric._held):
                            fabric._held.append((self, copied))
                        else:
                            self.carry_out(copied)

            def carry_out(self, request: Any) -> None:
                if not self.is_open and request.opcode == READ:
                    return
                is_signalled, status, peer = request.send_flags & SIGNALED, 0, fabric.pairs.get(self.peer_number)
                self.num_posted -= 1
                if is_signalled and fabric.fail_next:
                    fabric.fail_next, status = fabric.fail_next - 1, 12
                elif peer is None:
                    fabric.num_lost, status = fabric.num_lost + 1, 12
                else:
                    self.copy(request, peer)
                if self.is_open and not fabric.is_deaf and (is_signalled or status):
                    self.attributes.scq.push(request.wr_id, status, self.qp_num)

            def copy(self, request: Any, peer: Any) -> None:
                if request.opcode != SEND_WITH_IMMEDIATE:
                    needed = REMOTE_READ if request.opcode == READ else REMOTE_WRITE
                    begin, size, access = fabric.regions[request.rkey]
                    if request.sent is not None:
                        ctypes.memmove(request.remote_addr, request.sent, len(request.sent))
                        request.elements = []
                    fabric.check(peer.access & access & needed, "the peer does not allow it")
                    remote = request.remote_addr
                    for element in request.elements:
                        local, local_size, _ = fabric.regions[element.lkey]
                        inside = begin <= remote and remote + element.length <= begin + size
                        fabric.check(inside, "outside the peer's region")
                        inside = local <= element.addr and element.addr + element.length <= local + local_size
                        fabric.check(inside, "outside our region")
                        ends = (element.addr, remote) if request.opcode == READ else (remote, element.addr)
                        ctypes.memmove(*ends, element.length)
                        remote += element.length
                if request.opcode in (WRITE_WITH_IMMEDIATE, SEND_WITH_IMMEDIATE):
                    fabric.check(peer.num_receives, "no receive is posted for an immediate")
                    peer.num_receives -= 1
                    peer.attributes.rcq.push(0, 0, peer.qp_num, request.imm_data)

            def close(self) -> None:
                with fabric.lock:
                    for pair, request in fabric._held:
                        if pair is self and request.opcode in (WRITE, WRITE_WITH_IMMEDIATE) and request.sent is None:
                            # It may be on the wire already, where nobody stops it.
                            request.sent = b"".join(ctypes.string_at(e.addr, e.length) for e in request.elements)
                    fabric.pairs.pop(self.qp_num, None)
                    super().close()

        class SGE:
            def __init__(self, addr: int, length: int, lkey: int) -> None:
                self.addr, self.length, self.lkey = addr, length, lkey
                fabric.open["SGE"] += 1

            def close(self) -> None:
                fabric.open["SGE"] -= 1

        class SendWR:
            def __init__(self, *values: Any) -> None:
                wr_id, opcode, num_sge, immediate, sg, flags, next_wr = values
                self.elements: list[Any] = [_copy(element) for element in sg[:num_sge]]
                self.wr_id, self.opcode, self.send_flags, self.next_wr = wr_id, opcode, flags, next_wr
                self.imm_data, self.num_sge = immediate, num_sge
                self.rkey = self.remote_addr = 0
                self.owns_element = False
                fabric.open["SendWR"] += 1

            @property
            def sg_list(self) -> None:
                return None

            @sg_list.setter
            def sg_list(self, element: SGE) -> None:
                self.elements, self.owns_element = [element], True

            def set_wr_rdma(self, rkey: int, address: int) -> None:
                self.rkey, self.remote_addr = rkey, address

            def copied(self) -> Any:
                """As a device takes it over."""
                names = ("wr_id", "opcode", "send_flags", "imm_data", "rkey", "remote_addr")
                elements = [_copy(element) for element in self.elements[: self.num_sge]]
                return SimpleNamespace(elements=elements, sent=None, **{name: getattr(self, name) for name in names})

            def close(self) -> None:
                fabric.open["SendWR"] -= 1
                if self.owns_element:
                    self.elements[0].close()

        class RecvWR(Thing):
            def __init__(self, wr_id: int, num_sge: int, sg: list[SGE]) -> None:
                super().__init__()
                self.num_sge = num_sge

        bag = SimpleNamespace
        return Verbs(
            Context=Context, PD=PD, MR=MR, DmaBufMR=None, CQ=CQ, CompChannel=CompChannel, QP=QP, QPInitAttr=bag,
            QPAttr=bag, QPCap=bag, AHAttr=bag, GlobalRoute=bag, GID=str, SGE=SGE, SendWR=SendWR, RecvWR=RecvWR,
            enums=SimpleNamespace(
                IBV_ACCESS_LOCAL_WRITE=1, IBV_ACCESS_REMOTE_WRITE=REMOTE_WRITE, IBV_ACCESS_REMOTE_READ=REMOTE_READ,
                IBV_ACCESS_RELAXED_ORDERING=1 << 20, IBV_QPT_RC=2, IBV_SEND_SIGNALED=SIGNALED,
                IBV_WR_RDMA_WRITE=WRITE, IBV_WR_RDMA_WRITE_WITH_IMM=WRITE_WITH_IMMEDIATE,
                IBV_WR_SEND_WITH_IMM=SEND_WITH_IMMEDIATE, IBV_WR_RDMA_READ=READ, IBV_WC_WITH_IMM=WITH_IMMEDIATE,
            ),
            Error=SimulatedError,
        )  # fmt: skip


def _copy(element: Any) -> Any:
    return SimpleNamespace(addr=element.addr, length=element.length, lkey=element.lkey)


def install(monkeypatch: pytest.MonkeyPatch) -> Fabric:
    """Let the transport find this instead of a device."""
    fabric = Fabric()
    verbs = fabric.verbs()

    def opened(make: Any) -> tuple[Any, int]:
        made = make()
        return made, made.fd

    def choose(options: Any, rank: int, host: str, root: Path) -> RdmaPort:
        return PORT

    monkeypatch.setattr(device, "load_verbs", lambda: verbs)
    monkeypatch.setattr(device, "choose_port", choose)
    for module in (device, queue_pair):
        monkeypatch.setattr(module, "opened_descriptor", opened)
    return fabric


@pytest.fixture
def fabric(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fabric]:
    made = install(monkeypatch)
    yield made
    # Whatever a test did, what it made is closed by now.
    assert made.in_use() == {}, made.in_use()
    assert made.violations == [], made.violations
