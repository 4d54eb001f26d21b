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
from kv_transfer.transports.rdma.requests import Words, WorkRequests
from kv_transfer.transports.rdma.verbs import Verbs, load_verbs
from kv_transfer.transports.rdma.wire import PortAddress

# Reads that a queue pair has under way; NICs usually allow 16.
MAX_READ_DEPTH = 16
# Reads or writes posted in one go; one completion for all of them.
MAX_BATCH = 32
MIN_RNR_TIMER, RETRY_COUNT = 12, 7
_HOP_LIMIT = 64
# Finding the descriptor that pyverbs has just opened must not see what another thread opens or closes.
_opening = threading.Lock()


@dataclass(frozen=True, slots=True)
class DeviceEvent:
    """Something that happened to a device, unasked."""

    name: str
    is_fatal: bool


class Device:
    """Owns context and protection domain. All but the constructor runs in the transport's thread.

    Attributes:
        reads, writes, words: to post with, on any of its queue pairs.
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
            self.reads = WorkRequests(verbs, verbs.enums.IBV_WR_RDMA_READ, MAX_BATCH, self.max_read_pieces)
            self.writes = WorkRequests(verbs, verbs.enums.IBV_WR_RDMA_WRITE, MAX_BATCH, self.max_write_pieces)
            self.words = Words(verbs)
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
    def max_read_pieces(self) -> int:
        """Scatter elements of one read; a few devices allow fewer for reads than for writes."""
        return self._max_pieces(self.attributes.max_sge, self.attributes.max_sge_rd)

    @property
    def max_write_pieces(self) -> int:
        """Gather elements of one write."""
        return self._max_pieces(self.attributes.max_sge)

    def _max_pieces(self, *limits: int) -> int:
        known = [int(n) for n in limits if n > 0]
        return max(1, min(*known, self.options.max_pieces)) if known else 1

    @property
    def max_message_bytes(self) -> int:
        return max(4096, min(int(self._port_attributes.max_msg_sz), self.options.max_read_bytes))

    @property
    def patience_s(self) -> float:
        """How long the device itself retries before it gives an operation up, and some."""
        return 2 * (RETRY_COUNT + 1) * 4.096e-6 * float(2**self.options.timeout_exponent)

    def describe(self) -> str:
        bond = f", bond {self.port.bond}" if self.port.bond else ""
        return (
            f"{self.port.device} port {self.port.port} ({self.port.link_layer}, {self.port.rate_gbps:g} Gb/s{bond}), "
            f"GID {self.gid_index} {self.gid}"
        )

    def register_memory(self, memory: Memory, how: Registration, *, is_writable: bool) -> tuple[Any, int]:
        """A region of a pool, for the caller to ``deregister``, and the address that work requests name it by.

        Args:
            is_writable: by peers, on queue pairs that let them.

        Raises:
            RdmaUnavailable, PoolNotServed: it cannot be registered; says what to do.
        """
        access = self._access(is_readable=True, is_writable=is_writable)
        if how is not Registration.DMABUF:
            return self._register(memory.address, memory.num_bytes, access), memory.address
        try:
            return register_dmabuf(self.verbs, self.pd, memory.address, memory.num_bytes, access)
        except self.verbs.Error as exc:
            raise PoolNotServed(f"the NIC does not take the pool's dmabuf ({exc}): load nvidia_peermem") from exc

    def register_staging(self, address: int, num_bytes: int, *, is_writable: bool) -> Any:
        """Memory that is no pool; else as ``register_memory``."""
        return self._register(address, num_bytes, self._access(is_readable=False, is_writable=is_writable))

    def _register(self, address: int, num_bytes: int, access: int) -> Any:
        try:
            return self.verbs.MR(self.pd, num_bytes, access, address=address)
        except self.verbs.Error as exc:
            raise RdmaUnavailable(_explain_registration(exc, num_bytes)) from exc

    def _access(self, *, is_readable: bool, is_writable: bool) -> int:
        """Flags; what a peer may do also takes a queue pair that lets it."""
        enums = self.verbs.enums
        access = int(enums.IBV_ACCESS_LOCAL_WRITE)
        access |= int(enums.IBV_ACCESS_REMOTE_READ) if is_readable else 0
        access |= int(enums.IBV_ACCESS_REMOTE_WRITE) if is_writable else 0
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
        for requests in (self.reads, self.writes, self.words):
            requests.close()
        for close in (self.pd.close, lambda: close_descriptor(self.context)):
            try:
                close()
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
    name = options.nics[rank % len(options.nics)] if options.nics else None
    ports = sysfs.rdma_ports(root, only=name)
    if name is None:
        usable = usable_ports(ports)
        if not usable:
            raise NicUnavailable("", explain_no_port(ports))
        at_address = [port for port in usable if _gid_of(host) in {gid.value for gid in port.gids}]
        if at_address:
            return at_address[0]
        fastest = [port for port in usable if port.rate_gbps == usable[0].rate_gbps]
        return fastest[rank % len(fastest)]
    if not ports:
        known = ", ".join(sysfs.rdma_devices(root)) or "none (ls /sys/class/infiniband)"
        raise NicUnavailable(name, f"there is no such device here; those that are: {known}")
    active = [port for port in ports if port.is_active]
    if not active:
        raise NicUnavailable(name, f"{problem(ports[0])}: bring its link up (ip link, ibstat), or name another device")
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


def close_descriptor(made: Any) -> None:
    """Close what ``opened_descriptor`` gave: not while another thread compares what is open, as numbers come again."""
    with _opening:
        made.close()


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
