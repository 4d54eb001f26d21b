"""Made-up sysfs trees: machines with GPUs and NICs that nobody has here."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

ROCE_V1, ROCE_V2 = "IB/RoCE v1", "RoCE v2"
LINK_LOCAL = "fe80:0000:0000:0000:0a00:00ff:fe00:0001"
GLOBAL_V6 = "2001:0db8:0000:0000:0000:0000:0000:0001"
NO_GID = ":".join(["0000"] * 8)


def ipv4_gid(last: int) -> str:
    return f"0000:0000:0000:0000:0000:ffff:0a00:{last:04x}"


def usual_gids(last: int = 1) -> list[tuple[str, str]]:
    """As a RoCE port with an IPv4 address has them: each address under both versions, then empty slots."""
    values = (LINK_LOCAL, ipv4_gid(last))
    return [(value, kind) for value in values for kind in (ROCE_V1, ROCE_V2)] + [(NO_GID, "")] * 2


class SysfsTree:
    def __init__(self, root: Path) -> None:
        self.root = root

    def gpu(self, path: Sequence[str], numa_node: int = 0, bridge: str = "pci0000:00") -> None:
        device = self._pci(bridge, path, numa_node)
        self._write(f"{device}/vendor", "0x10de")
        self._write(f"{device}/class", "0x030200")

    def nic(
        self,
        name: str,
        path: Sequence[str],
        numa_node: int = 0,
        bridge: str = "pci0000:00",
        *,
        state: str = "4: ACTIVE",
        rate: str = "400 Gb/sec (4X NDR)",
        link_layer: str = "Ethernet",
        gids: Sequence[tuple[str, str]] | None = None,
        netdev: str = "",
        bond: str = "",
        physical: Sequence[str] = (),
        num_ports: int = 1,
    ) -> None:
        """``physical``: path of the device that this one is a virtual function of."""
        device = self._pci(bridge, path, numa_node)
        self._write(f"{device}/vendor", "0x15b3")
        self._write(f"{device}/class", "0x020700" if link_layer == "InfiniBand" else "0x020000")
        if physical:
            self._link(f"{device}/physfn", f"devices/{bridge}/{'/'.join(physical)}")
        if netdev:
            self._write(f"{device}/net/{netdev}/mtu", "9000")
            self._write(f"class/net/{netdev}/mtu", "9000")
        if bond:
            self._write(f"class/net/{bond}/bonding/mode", "802.3ad 4")
            if bond != netdev:
                self._link(f"class/net/{netdev}/master", f"class/net/{bond}")
        infiniband = f"{device}/infiniband/{name}"
        self._link(f"{infiniband}/device", device)
        for number in range(1, num_ports + 1):
            port = f"{infiniband}/ports/{number}"
            for file, text in (("state", state), ("rate", rate), ("link_layer", link_layer), ("lid", "0x1")):
                self._write(f"{port}/{file}", text)
            for index, (value, kind) in enumerate(usual_gids() if gids is None else gids):
                self._write(f"{port}/gids/{index}", value)
                if kind:
                    self._write(f"{port}/gid_attrs/types/{index}", kind)
                    self._write(f"{port}/gid_attrs/ndevs/{index}", bond or netdev or "eth0")
        self._link(f"class/infiniband/{name}", infiniband)

    def _pci(self, bridge: str, path: Sequence[str], numa_node: int) -> str:
        device = f"devices/{bridge}/{'/'.join(path)}"
        self._write(f"{device}/numa_node", str(numa_node))
        self._link(f"bus/pci/devices/{path[-1]}", device)
        return device

    def _write(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n", encoding="utf-8")

    def _link(self, path: str, target: str) -> None:
        link = self.root / path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(self.root / target, link.parent))


def behind_switch(bus: int, slot: int) -> list[str]:
    """A device in a slot of the switch on a root port: root port, upstream port, downstream port, device."""
    return [
        f"0000:{bus:02x}:01.0",
        f"0000:{bus + 1:02x}:00.0",
        f"0000:{bus + 2:02x}:{slot:02x}.0",
        f"0000:{bus + 3 + slot:02x}:00.0",
    ]
