"""Which NIC serves which GPU, and which of a port's addresses is used. Decides; ``sysfs`` has read the facts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

from kv_transfer.errors import NicUnavailable
from kv_transfer.sysfs import Gid, Gpu, PciPlace, RdmaPort

MAX_NIC_FILE_BYTES = 1 << 16


class Distance(IntEnum):
    """What lies between two PCI devices, nearest first, in the words of ``nvidia-smi topo``; NODE includes its PHB."""

    PIX = 0
    PXB = 1
    NODE = 2
    SYS = 3


@dataclass(frozen=True, slots=True)
class Assignment:
    """The NIC of one GPU."""

    gpu: Gpu
    port: RdmaPort
    distance: Distance


@dataclass(frozen=True, slots=True)
class NicNames:
    """RDMA devices as their user named them; checked against the machine only when one is used.

    Attributes:
        shared: rank i takes the one at i modulo their number.
        by_rank: for ranks (GPUs) that were named one by one; they take precedence.
    """

    shared: tuple[str, ...] = ()
    by_rank: Mapping[int, str] = field(default_factory=dict)

    def for_rank(self, rank: int) -> str | None:
        """None: nobody has said, so it is to be detected."""
        if rank in self.by_rank:
            return self.by_rank[rank]
        return self.shared[rank % len(self.shared)] if self.shared else None


def parse_nics(text: str) -> NicNames:
    """What a user may say: ``mlx5_0``, ``mlx5_0,mlx5_1``, ``{"0": "mlx5_0", "1": "mlx5_1"}``, or a file with the last.

    Of several devices for one GPU the first is used.

    Raises:
        NicUnavailable: none of these.
    """
    stripped = text.strip()
    if stripped.endswith(".json"):
        stripped = _read_nic_file(Path(stripped))
    if stripped.startswith("{"):
        return NicNames(by_rank=_per_rank(stripped))
    names = tuple(name.strip() for name in stripped.split(",") if name.strip())
    return NicNames(shared=tuple(_checked_name(name) for name in names))


def distance(a: PciPlace, b: PciPlace) -> Distance:
    """How far two devices are from each other."""
    common = 0
    for one, other in zip(a.path[:-1], b.path[:-1], strict=False):
        if one != other:
            break
        common += 1
    if common >= 1:
        # Below the last bridge that they share, each has at most the port it hangs on: one switch, no more.
        is_one_switch = common >= 2 and max(len(a.path), len(b.path)) - common <= 2
        return Distance.PIX if is_one_switch else Distance.PXB
    if a.host_bridge and a.host_bridge == b.host_bridge:
        return Distance.NODE
    return Distance.NODE if a.numa_node == b.numa_node else Distance.SYS


def problem(port: RdmaPort) -> str | None:
    """Why a port cannot carry anything; or None."""
    if not port.is_active:
        return f"its state is {port.state}"
    try:
        choose_gid(port)
    except NicUnavailable as exc:
        return exc.why
    return None


def choose_gid(port: RdmaPort, index: int | None = None, netdev: str | None = None) -> Gid:
    """The address that a port is used under.

    On RoCE: version 2, IPv4 before IPv6 before link-local, the lowest index of the best kind. On InfiniBand the first.

    Args:
        index: take this one instead.
        netdev: only addresses of this interface, where the port has any.
    Raises:
        NicUnavailable: there is none that will do.
    """
    if index is not None:
        for gid in port.gids:
            if gid.index == index:
                return gid
        known = ", ".join(str(gid.index) for gid in port.gids) or "none"
        raise NicUnavailable(port.device, f"GID index {index} is not set; those that are: {known}")
    candidates = [gid for gid in port.gids if gid.netdev == netdev] or list(port.gids)
    if port.is_roce:
        candidates = sorted(
            (gid for gid in candidates if gid.is_roce_v2),
            key=lambda gid: (not gid.is_ipv4, gid.is_link_local, gid.index),
        )
    if not candidates:
        what = (
            "RoCE v2 GID: give its network interface an IP address"
            if port.is_roce
            else "GID: is there a subnet manager?"
        )
        raise NicUnavailable(port.device, f"it has no {what}")
    return candidates[0]


def usable_ports(ports: Sequence[RdmaPort]) -> list[RdmaPort]:
    """Those that can carry something, the best first; virtual functions only where there is nothing else."""
    good = [port for port in ports if problem(port) is None]
    physical = [port for port in good if not port.is_virtual_function]
    return sorted(physical or good, key=lambda port: (-port.rate_gbps, _natural(port.device), port.port))


def assign(gpus: Sequence[Gpu], ports: Sequence[RdmaPort]) -> list[Assignment]:
    """For each GPU the nearest usable port; among equally near ones the fastest, and then the one least used so far.

    Raises:
        NicUnavailable: no port is usable.
    """
    usable = usable_ports(ports)
    if not usable and gpus:
        raise NicUnavailable("", explain_no_port(ports))
    used: Counter[str] = Counter()
    assigned = []
    for gpu in gpus:
        best = min(
            usable,
            key=lambda p: (
                distance(gpu.place, p.place),
                -p.rate_gbps,
                used[p.device],
                _natural(p.device),
                p.port,
            ),
        )
        used[best.device] += 1
        assigned.append(Assignment(gpu, best, distance(gpu.place, best.place)))
    return assigned


def explain_no_port(ports: Sequence[RdmaPort]) -> str:
    """Why no port is usable, for whoever has to repair it."""
    if not ports:
        return (
            "this machine shows no RDMA device (ls /sys/class/infiniband): load the NIC's driver (mlx5_ib, bnxt_re, "
            "irdma ...), or pass /dev/infiniband and the device into the container; without RDMA, use tcp"
        )
    why = "; ".join(f"{port.device} port {port.port}: {problem(port)}" for port in ports)
    return f"no RDMA port is usable ({why}): bring the link up (ip link, ibstat) and give it an address"


def _per_rank(text: str) -> dict[int, str]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise NicUnavailable(text[:80], f"it looks like JSON and cannot be read: {exc}") from exc
    found = {}
    for key, value in data.items():
        names = parse_nics(value).shared if isinstance(value, str) and not value.strip().startswith("{") else ()
        if not key.isdigit() or not names:
            raise NicUnavailable(text[:80], 'give each GPU its device, such as {"0": "mlx5_0", "1": "mlx5_1"}')
        found[int(key)] = names[0]
    return found


def _read_nic_file(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_NIC_FILE_BYTES).strip()
    except (OSError, UnicodeDecodeError) as exc:
        raise NicUnavailable(str(path), f"the file cannot be read: {exc}") from exc
    if not text.startswith("{"):
        raise NicUnavailable(str(path), 'the file must hold JSON such as {"0": "mlx5_0", "1": "mlx5_1"}')
    return text


def _checked_name(name: str) -> str:
    if len(name) > 64 or not all(c.isalnum() or c in "_-." for c in name):
        raise NicUnavailable(name[:80], "that is no name of an RDMA device, such as mlx5_0 (ls /sys/class/infiniband)")
    return name


def _natural(name: str) -> tuple[str, int]:
    """So that mlx5_10 comes after mlx5_9."""
    stem = name.rstrip("0123456789")
    return stem, int(name[len(stem) :] or 0)
