"""Verbs without a device: reads are copies inside this process. It checks keys and bounds, and can get stuck or fail.

What it stands for is the part of pyverbs that the RDMA transport uses; the real one runs in a VM (tests/rdma_vm).
"""

from __future__ import annotations

import ctypes
import itertools
import os
from collections import Counter, deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kv_transfer.sysfs import Gid, PciPlace, RdmaPort
from kv_transfer.transports.rdma import device, queue_pair
from kv_transfer.transports.rdma.verbs import Verbs

SIGNALED = 2
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
        is_stuck: reads that are posted stay under way.
        fail_next: so many signalled reads complete with an error.
        open: number of open things by kind.
        device: overrides of its attributes.
    """

    def __init__(self) -> None:
        self.is_stuck = False
        self.fail_next = 0
        self.num_reads = 0
        self.open: Counter[str] = Counter()
        self.regions: dict[int, tuple[int, int]] = {}
        self.device: dict[str, int] = {}
        self._keys = itertools.count(1)

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
                fabric.regions[self.lkey] = address, length

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

            def push(self, wr_id: int, status: int, number: int) -> None:
                assert len(self.entries) < self.capacity, "the completion queue overflows"
                self.entries.append(SimpleNamespace(wr_id=wr_id, status=status, vendor_err=0, qp_num=number))
                if self.is_armed:
                    self.is_armed = False
                    os.eventfd_write(self.channel.fd, 1)

        class QP(Thing):
            def __init__(self, pd: PD, attributes: Any) -> None:
                super().__init__()
                self.qp_num, self.attributes, self.state = next(fabric._keys), attributes, "reset"
                self.num_posted = 0

            def to_init(self, attributes: Any) -> None:
                self.state = "init"

            def to_rtr(self, attributes: Any) -> None:
                assert self.state == "init" and attributes.dest_qp_num
                self.state = "rtr"

            def to_rts(self, attributes: Any) -> None:
                assert self.state == "rtr"
                self.state = "rts"

            def post_send(self, request: Any) -> None:
                assert self.is_open and self.state == "rts"
                posted = 0
                while request is not None:
                    posted += 1
                    assert len(request.elements) <= self.attributes.cap.max_send_sge
                    if not fabric.is_stuck:
                        self.carry_out(request)
                    request = request.next_wr
                assert posted <= self.attributes.cap.max_send_wr
                fabric.num_reads += posted

            def carry_out(self, request: Any) -> None:
                status = 0
                if request.send_flags & SIGNALED and fabric.fail_next:
                    fabric.fail_next, status = fabric.fail_next - 1, 12
                begin, size = fabric.regions[request.rkey]
                source = request.remote_addr
                for element in request.elements:
                    local, local_size = fabric.regions[element.lkey]
                    assert begin <= source and source + element.length <= begin + size, "outside the source's region"
                    assert local <= element.addr and element.addr + element.length <= local + local_size
                    ctypes.memmove(element.addr, source, element.length)
                    source += element.length
                if request.send_flags & SIGNALED:
                    self.attributes.scq.push(request.wr_id, status, self.qp_num)

        class SGE:
            def __init__(self, addr: int, length: int, lkey: int) -> None:
                self.addr, self.length, self.lkey = addr, length, lkey
                fabric.open["SGE"] += 1

            def close(self) -> None:
                fabric.open["SGE"] -= 1

        class SendWR:
            def __init__(self, *values: Any) -> None:
                wr_id, _, num_sge, _, sg, flags, next_wr = values
                copies = [SimpleNamespace(addr=e.addr, length=e.length, lkey=e.lkey) for e in sg[:num_sge]]
                self.elements: list[Any] = copies
                self.wr_id, self.send_flags, self.next_wr = wr_id, flags, next_wr
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

            def close(self) -> None:
                fabric.open["SendWR"] -= 1
                if self.owns_element:
                    self.elements[0].close()

        bag = SimpleNamespace
        return Verbs(
            Context=Context, PD=PD, MR=MR, DmaBufMR=None, CQ=CQ, CompChannel=CompChannel, QP=QP, QPInitAttr=bag,
            QPAttr=bag, QPCap=bag, AHAttr=bag, GlobalRoute=bag, GID=str, SGE=SGE, SendWR=SendWR,
            enums=SimpleNamespace(
                IBV_ACCESS_LOCAL_WRITE=1, IBV_ACCESS_REMOTE_READ=4, IBV_ACCESS_RELAXED_ORDERING=1 << 20,
                IBV_QPT_RC=2, IBV_SEND_SIGNALED=SIGNALED, IBV_WR_RDMA_READ=4,
            ),
            Error=SimulatedError,
        )  # fmt: skip


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
