"""One RDMA port, opened: its context, its protection domain, and the regions that are registered in it."""

from __future__ import annotations

import errno
import ipaddress
import os
import resource
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kv_transfer import sysfs
from kv_transfer.errors import NicUnavailable, PoolNotServed, RdmaUnavailable
from kv_transfer.options import RdmaOptions
from kv_transfer.sysfs import RdmaPort
from kv_transfer.tensors import Memory
from kv_transfer.topology import choose_gid, explain_no_port, problem, usable_ports
from kv_transfer.transports.rdma.gpu_memory import Registration, register_dmabuf
from kv_transfer.transports.rdma.requests import WorkRequests
from kv_transfer.transports.rdma.verbs import Verbs, load_verbs
from kv_transfer.transports.rdma.wire import PortAddress

# Reads that a queue pair has under way; NICs usually allow 16.
MAX_READ_DEPTH = 16
# Reads posted in one go; one completion for all of them.
MAX_BATCH_READS = 32
MIN_RNR_TIMER, RETRY_COUNT = 12, 7
_HOP_LIMIT = 64
# Finding the descriptor that pyverbs has just opened must not see the one of another thread.
_opening = threading.Lock()


@dataclass(frozen=True, slots=True)
class DeviceEvent:
    """Something that happened to a device, unasked."""

    name: str
    is_fatal: bool


class Device:
    """Owns context and protection domain. All but the constructor runs in the transport's thread.

    Attributes:
        requests: to post with, on any of its queue pairs.
        async_fd: readable when ``take_event`` has something; -1 when there is no such descriptor.
    """

    def __init__(self, options: RdmaOptions, rank: int, *, host: str = "", root: Path = sysfs.SYSFS) -> None:
        """
        Args:
            host: address that a device is preferred for, where none is named.
        Raises:
            RdmaUnavailable: no pyverbs, no device, no active port, no GID; says what to do.
        """
        # The library first: without it a device is of no use, and its absence is the more likely news.
        self.verbs: Verbs = load_verbs()
        try:
            self.port = choose_port(options, rank, host, root)
            gid = choose_gid(self.port, options.gid_index, options.netdev)
        except NicUnavailable as exc:
            raise RdmaUnavailable(str(exc)) from exc
        self.options, self.gid_index, self.gid = options, gid.index, gid.value
        verbs = self.verbs
        try:
            self.context, self.async_fd = opened_descriptor(lambda: verbs.Context(name=self.port.device))
            self.attributes = self.context.query_device()
            self._port_attributes = self.context.query_port(self.port.port)
            self.pd = verbs.PD(self.context)
            self.requests = WorkRequests(verbs, MAX_BATCH_READS, self.max_pieces)
        except verbs.Error as exc:
            raise RdmaUnavailable(
                f"RDMA device {self.port.device} cannot be opened ({exc}): are /dev/infiniband/uverbs* there, readable "
                "by this user and passed into the container, and is the device's provider (ibverbs-providers) here?"
            ) from exc

    @property
    def address(self) -> PortAddress:
        """For a peer; ``read_depth`` is what this device answers."""
        return PortAddress(
            gid=bytes.fromhex(self.gid.replace(":", "")),
            lid=self._port_attributes.lid,
            mtu=self._port_attributes.active_mtu,
            read_depth=max(1, min(self.attributes.max_qp_rd_atom, MAX_READ_DEPTH)),
            is_roce=self.port.is_roce,
        )

    @property
    def own_read_depth(self) -> int:
        """Reads that a queue pair of this device may have under way."""
        return max(1, min(int(self.attributes.max_qp_init_rd_atom), MAX_READ_DEPTH))

    @property
    def max_pieces(self) -> int:
        """Scatter elements of one read; a few devices allow fewer for reads than for writes."""
        limits = [int(n) for n in (self.attributes.max_sge, self.attributes.max_sge_rd) if n > 0]
        return max(1, min(*limits, self.options.max_pieces)) if limits else 1

    @property
    def max_message_bytes(self) -> int:
        return max(4096, min(int(self._port_attributes.max_msg_sz), self.options.max_read_bytes))

    @property
    def patience_s(self) -> float:
        """How long the device itself retries a read before it gives it up, and some."""
        return 2 * (RETRY_COUNT + 1) * 4.096e-6 * float(2**self.options.timeout_exponent)

    def describe(self) -> str:
        bond = f", bond {self.port.bond}" if self.port.bond else ""
        return (
            f"{self.port.device} port {self.port.port} ({self.port.link_layer}, {self.port.rate_gbps:g} Gb/s{bond}), "
            f"GID {self.gid_index} {self.gid}"
        )

    def register_memory(self, memory: Memory, how: Registration) -> tuple[Any, int]:
        """A region of a pool, for the caller to ``deregister``, and the address that work requests name it by.

        Raises:
            RdmaUnavailable, PoolNotServed: it cannot be registered; says what to do.
        """
        if how is not Registration.DMABUF:
            return self.register(memory.address, memory.num_bytes, is_source=True), memory.address
        try:
            return register_dmabuf(self.verbs, self.pd, memory.address, memory.num_bytes, self._access(is_source=True))
        except self.verbs.Error as exc:
            raise PoolNotServed(f"the NIC does not take the pool's dmabuf ({exc}): load nvidia_peermem") from exc

    def register(self, address: int, num_bytes: int, *, is_source: bool) -> Any:
        """A memory region, for the caller to ``deregister``.

        Raises:
            RdmaUnavailable: the kernel refuses it, most often for the limit of locked memory.
        """
        try:
            return self.verbs.MR(self.pd, num_bytes, self._access(is_source=is_source), address=address)
        except self.verbs.Error as exc:
            raise RdmaUnavailable(_explain_registration(exc, num_bytes)) from exc

    def _access(self, *, is_source: bool) -> int:
        enums = self.verbs.enums
        access = int(enums.IBV_ACCESS_LOCAL_WRITE) | (int(enums.IBV_ACCESS_REMOTE_READ) if is_source else 0)
        return access | (int(enums.IBV_ACCESS_RELAXED_ORDERING) if self.options.relaxed_ordering else 0)

    def deregister(self, region: Any) -> None:
        """Idempotent as far as the device goes: one that is gone has done it by itself."""
        try:
            region.close()
        except self.verbs.Error:
            pass

    def take_event(self) -> DeviceEvent | None:
        """The next event that waits; None when there is none."""
        enums = self.verbs.enums
        try:
            event = self.context.get_async_event()
        except self.verbs.Error:
            return None
        kind = event.event_type
        event.ack()
        names = {value: name for name, value in vars(enums).items() if name.startswith("IBV_EVENT_")}
        name = names.get(kind, str(kind)).removeprefix("IBV_EVENT_").lower().replace("_", " ")
        return DeviceEvent(name, is_fatal=kind == enums.IBV_EVENT_DEVICE_FATAL)

    def close(self) -> None:
        """Give up everything that was made in it; what is registered and connected must be closed before."""
        self.requests.close()
        for thing in (self.pd, self.context):
            try:
                thing.close()
            except self.verbs.Error:
                # The device is gone, and has taken it along.
                pass

    def route(self, peer: PortAddress) -> Any:
        """The address handle's attributes towards a peer's port."""
        verbs = self.verbs
        text = peer.gid.hex()
        gid = ":".join(text[i : i + 4] for i in range(0, len(text), 4))
        # Within one InfiniBand subnet the LID alone is enough, and spares a header in every packet.
        is_global = peer.is_roce or gid[:19] != self.gid[:19]
        route = verbs.GlobalRoute(dgid=verbs.GID(gid), sgid_index=self.gid_index, hop_limit=_HOP_LIMIT)
        return verbs.AHAttr(port_num=self.port.port, is_global=int(is_global), gr=route, dlid=peer.lid)


def choose_port(options: RdmaOptions, rank: int, host: str, root: Path) -> RdmaPort:
    """The port that a rank uses: as its user says, or the one of the address, or the fastest, which ranks share out.

    Args:
        host: an address of ours; empty for no preference.
    Raises:
        NicUnavailable: there is none, or the one that is named is not usable.
    """
    ports = sysfs.rdma_ports(root)
    name = options.nics[rank % len(options.nics)] if options.nics else None
    if name is None:
        usable = usable_ports(ports)
        if not usable:
            raise NicUnavailable("", explain_no_port(ports))
        at_address = [port for port in usable if _gid_of(host) in {gid.value for gid in port.gids}]
        if at_address:
            return at_address[0]
        fastest = [port for port in usable if port.rate_gbps == usable[0].rate_gbps]
        return fastest[rank % len(fastest)]
    named = [port for port in ports if port.device == name]
    if not named:
        known = ", ".join(dict.fromkeys(port.device for port in ports)) or "none (ls /sys/class/infiniband)"
        raise NicUnavailable(name, f"there is no such device here; those that are: {known}")
    active = [port for port in named if port.is_active]
    if not active:
        raise NicUnavailable(name, f"{problem(named[0])}: bring its link up (ip link, ibstat), or name another device")
    return active[0]


def _gid_of(host: str) -> str | None:
    """The GID that a network interface with this IP address has."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    packed = address.packed if address.version == 6 else b"\x00" * 10 + b"\xff\xff" + address.packed
    text = packed.hex()
    return ":".join(text[i : i + 4] for i in range(0, len(text), 4))


def new_psn() -> int:
    """Random, so that a packet of an earlier life of a queue pair is not taken for one of this."""
    return secrets.randbits(24)


def opened_descriptor(make: Callable[[], Any]) -> tuple[Any, int]:
    """What ``make`` makes, and the event descriptor that came with it, which pyverbs does not tell; -1 without any."""
    with _opening:
        before = _event_descriptors()
        made = make()
        return made, max(_event_descriptors() - before, default=-1)


def _event_descriptors() -> set[int]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            if "infinibandevent" in os.readlink(f"/proc/self/fd/{name}"):
                found.add(int(name))
        except OSError:
            # The directory's own descriptor is gone by now.
            continue
    return found


def _explain_registration(exc: Exception, num_bytes: int) -> str:
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    code = getattr(exc, "error_code", 0)
    if limit != resource.RLIM_INFINITY and limit < num_bytes and code in (errno.ENOMEM, errno.EPERM, errno.EAGAIN):
        return (
            f"a KV pool of {num_bytes} bytes cannot be registered for RDMA, as this process may lock only {limit} "
            "bytes of memory: raise the limit (ulimit -l unlimited; LimitMEMLOCK=infinity in a systemd unit; --ulimit "
            "memlock=-1 for a container), or give it CAP_IPC_LOCK"
        )
    return f"a KV pool of {num_bytes} bytes cannot be registered for RDMA: {exc}"
