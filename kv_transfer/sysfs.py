"""What sysfs says of RDMA ports, GPUs and where they sit on the PCI bus. Reads files only; no device is opened."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SYSFS = Path("/sys")
_ADDRESS = re.compile(r"[0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
_HOST_BRIDGE = re.compile(r"pci[0-9a-f]{4,}:[0-9a-f]{2}")
_GPU_VENDORS = {"0x10de": "NVIDIA", "0x1002": "AMD"}
# PCI classes: VGA controller, 3D controller, other display controller (AMD Instinct).
_GPU_CLASSES = ("0x0300", "0x0302", "0x0380")
_NO_GID = "0000:0000:0000:0000:0000:0000:0000:0000"
_IPV4_GID = "0000:0000:0000:0000:0000:ffff:"
_LINK_LOCAL_GID = "fe80:"
# A file of sysfs has no more.
_PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class PciPlace:
    """Where a device sits.

    Attributes:
        host_bridge: such as "pci0000:10"; empty for what is on no PCI bus.
        path: addresses from the root port down to the device itself.
        numa_node: -1 when the machine does not say.
    """

    host_bridge: str
    path: tuple[str, ...]
    numa_node: int


@dataclass(frozen=True, slots=True)
class Gid:
    """One address of a port.

    Attributes:
        value: eight groups of four hex digits.
        kind: "RoCE v2", "IB/RoCE v1", or empty where the kernel does not say.
        netdev: network interface that it belongs to; empty on InfiniBand.
    """

    index: int
    value: str
    kind: str
    netdev: str

    @property
    def is_roce_v2(self) -> bool:
        return self.kind == "RoCE v2"

    @property
    def is_ipv4(self) -> bool:
        return self.value.startswith(_IPV4_GID)

    @property
    def is_link_local(self) -> bool:
        return self.value.startswith(_LINK_LOCAL_GID)


@dataclass(frozen=True, slots=True)
class RdmaPort:
    """One port of an RDMA device.

    Attributes:
        state: such as "ACTIVE" or "DOWN".
        link_layer: "Ethernet" (RoCE) or "InfiniBand".
        rate_gbps: of the link as it is now.
        bond: the bonding interface that the port's addresses are on, or that its own interface belongs to; or empty.
        is_virtual_function: an SR-IOV slice of another device.
    """

    device: str
    port: int
    state: str
    link_layer: str
    rate_gbps: float
    lid: int
    gids: tuple[Gid, ...]
    netdevs: tuple[str, ...]
    bond: str
    is_virtual_function: bool
    place: PciPlace

    @property
    def is_active(self) -> bool:
        return self.state == "ACTIVE"

    @property
    def is_roce(self) -> bool:
        return self.link_layer == "Ethernet"


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU; ``index`` counts in the order of PCI addresses (CUDA_DEVICE_ORDER=PCI_BUS_ID)."""

    index: int
    address: str
    vendor: str
    place: PciPlace


def rdma_devices(root: Path = SYSFS) -> list[str]:
    """Names of all RDMA devices."""
    return [path.name for path in _children(root / "class/infiniband")]


def rdma_ports(root: Path = SYSFS, *, only: str | None = None) -> list[RdmaPort]:
    """All ports of all RDMA devices, active or not, by name.

    Args:
        only: the one device of this name: reading all addresses of a NIC takes a thousand files and more.
    """
    return [
        _port(root, device, port)
        for device in _children(root / "class/infiniband")
        if only is None or device.name == only
        for port in _numbered(device / "ports")
    ]


def gpus(root: Path = SYSFS) -> list[Gpu]:
    """All GPUs of the vendors that run inference, by PCI address."""
    found: list[Gpu] = []
    for device in _children(root / "bus/pci/devices"):
        vendor = _GPU_VENDORS.get(_read(device / "vendor"))
        if vendor is not None and _read(device / "class").startswith(_GPU_CLASSES):
            found.append(Gpu(len(found), device.name, vendor, _place(device)))
    return found


def _port(root: Path, device: Path, port: Path) -> RdmaPort:
    gids = tuple(_gids(port))
    own = {path.name for path in _children(device / "device/net")}
    netdevs = tuple(sorted(own | {gid.netdev for gid in gids if gid.netdev}))
    return RdmaPort(
        device=device.name,
        port=int(port.name),
        state=_read(port / "state").partition(":")[2].strip() or "unknown",
        link_layer=_read(port / "link_layer") or "unknown",
        rate_gbps=_leading_number(_read(port / "rate")),
        lid=_number(_read(port / "lid")),
        gids=gids,
        netdevs=netdevs,
        bond=next((bond for name in netdevs if (bond := _bond(root / "class/net" / name))), ""),
        is_virtual_function=(device / "device/physfn").exists(),
        place=_place(device / "device"),
    )


def _gids(port: Path) -> Iterator[Gid]:
    directory = os.fspath(port / "gids")
    try:
        indices = sorted(int(name) for name in os.listdir(directory) if name.isdigit())
    except OSError:
        return
    for index in indices:
        # A table has up to a thousand places, of which few are set.
        value = _read(f"{directory}/{index}").lower()
        if len(value) == len(_NO_GID) and value != _NO_GID:
            kind, netdev = (_read(f"{port}/gid_attrs/{what}/{index}") for what in ("types", "ndevs"))
            yield Gid(index, value, kind, netdev)


def _bond(netdev: Path) -> str:
    """The bond that an interface is or belongs to; or empty."""
    if (netdev / "bonding").is_dir():
        return netdev.name
    master = netdev / "master"
    return Path(os.path.realpath(master)).name if (master / "bonding").is_dir() else ""


def _place(device: Path) -> PciPlace:
    if not device.exists():
        return PciPlace("", (), -1)
    parts = Path(os.path.realpath(device)).parts
    bridges = [part for part in parts if _HOST_BRIDGE.fullmatch(part)]
    path = tuple(part for part in parts if _ADDRESS.fullmatch(part))
    return PciPlace(bridges[0] if bridges else "", path, _number(_read(device / "numa_node"), default=-1))


def _children(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except OSError:
        return []


def _numbered(directory: Path) -> list[Path]:
    return sorted((path for path in _children(directory) if path.name.isdigit()), key=lambda path: int(path.name))


def _read(path: Path | str) -> str:
    """A file's text, without blanks around; empty when it cannot be read, as with the GIDs that are not set."""
    try:
        # Not open(): it takes ten times as long.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.read(fd, _PAGE_BYTES).decode(errors="replace").strip()
        finally:
            os.close(fd)
    except OSError:
        return ""


def _number(text: str, default: int = 0) -> int:
    try:
        return int(text, 0)
    except ValueError:
        return default


def _leading_number(text: str) -> float:
    """``"400 Gb/sec (4X NDR)"`` → 400."""
    try:
        return float(text.split(maxsplit=1)[0])
    except (ValueError, IndexError):
        return 0.0
