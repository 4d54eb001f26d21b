"""Which NIC serves which GPU, on machines that exist as made-up sysfs trees."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from kv_transfer.cli.rdma_nics import command
from kv_transfer.errors import NicUnavailable
from kv_transfer.options import RdmaOptions
from kv_transfer.sysfs import gpus, rdma_ports
from kv_transfer.topology import Distance, assign, choose_gid, distance, parse_nics, usable_ports
from kv_transfer.transports.rdma.device import choose_port
from tests.sysfs_tree import GLOBAL_V6, LINK_LOCAL, ROCE_V1, ROCE_V2, SysfsTree, behind_switch, ipv4_gid

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tree(tmp_path: Path) -> SysfsTree:
    return SysfsTree(tmp_path)


def chosen(tree: SysfsTree) -> list[tuple[str, str]]:
    return [(a.port.device, a.distance.name) for a in assign(gpus(tree.root), rdma_ports(tree.root))]


def dgx(tree: SysfsTree, *, num_nics: int) -> None:
    """Four switches with two GPUs each, two to a NUMA node; ``num_nics`` spread over the switches."""
    for switch in range(4):
        bus, bridge, node = 0x10 + 0x20 * switch, f"pci0000:{switch}0", switch // 2
        for slot in range(2):
            tree.gpu(behind_switch(bus, slot), node, bridge)
        for slot in range(num_nics // 4):
            number = switch * (num_nics // 4) + slot
            tree.nic(f"mlx5_{number}", behind_switch(bus, 4 + slot), node, bridge, netdev=f"eth{number}")


def test_eight_gpus_with_eight_nics_have_one_each_behind_their_own_switch(tree: SysfsTree) -> None:
    dgx(tree, num_nics=8)
    assert chosen(tree) == [(f"mlx5_{i}", "PIX") for i in range(8)]


def test_eight_gpus_share_four_nics_two_by_two(tree: SysfsTree) -> None:
    dgx(tree, num_nics=4)
    assert chosen(tree) == [(f"mlx5_{i // 2}", "PIX") for i in range(8)]


def test_where_no_nic_is_near_the_same_numa_node_is_better_than_the_other_one(tree: SysfsTree) -> None:
    tree.gpu(["0000:10:01.0", "0000:11:00.0"], 0, "pci0000:10")
    tree.gpu(["0000:80:01.0", "0000:81:00.0"], 1, "pci0000:80")
    tree.nic("mlx5_0", ["0000:a0:01.0", "0000:a1:00.0"], 1, "pci0000:a0")
    assert chosen(tree) == [("mlx5_0", "SYS"), ("mlx5_0", "NODE")]
    tree.nic("mlx5_1", ["0000:30:01.0", "0000:31:00.0"], 0, "pci0000:30", rate="100 Gb/sec (4X EDR)")
    assert chosen(tree) == [("mlx5_1", "NODE"), ("mlx5_0", "NODE")]


def test_distances_are_those_of_the_bridges_in_between(tree: SysfsTree) -> None:
    near, cascade = behind_switch(0x10, 0), ["0000:10:01.0", "0000:11:00.0", "0000:12:07.0", "0000:40:00.0"]
    tree.gpu(near, 0, "pci0000:10")
    tree.nic("same_switch", behind_switch(0x10, 1), 0, "pci0000:10")
    tree.nic("switch_below", [*cascade, "0000:41:00.0", "0000:42:00.0"], 0, "pci0000:10")
    tree.nic("same_root_port", ["0000:10:01.0", "0000:51:00.0"], 0, "pci0000:10")
    tree.nic("same_bridge", ["0000:10:02.0", "0000:61:00.0"], 0, "pci0000:10")
    tree.nic("same_node", ["0000:70:01.0", "0000:71:00.0"], 0, "pci0000:70")
    tree.nic("other_node", ["0000:80:01.0", "0000:81:00.0"], 1, "pci0000:80")
    place = gpus(tree.root)[0].place
    found = {port.device: distance(place, port.place) for port in rdma_ports(tree.root)}
    assert found == {
        "same_switch": Distance.PIX,
        "switch_below": Distance.PXB,
        "same_root_port": Distance.PXB,
        "same_bridge": Distance.NODE,
        "same_node": Distance.NODE,
        "other_node": Distance.SYS,
    }


def test_ports_that_are_down_or_have_no_address_are_passed_over(tree: SysfsTree) -> None:
    tree.gpu(behind_switch(0x10, 0))
    tree.nic("mlx5_0", behind_switch(0x10, 1), state="1: DOWN")
    tree.nic("mlx5_1", behind_switch(0x10, 2), gids=[(LINK_LOCAL, ROCE_V1)])
    tree.nic("mlx5_2", ["0000:70:01.0", "0000:71:00.0"], 1, "pci0000:70")
    assert chosen(tree) == [("mlx5_2", "SYS")]


def test_without_any_usable_port_each_ones_reason_is_given(tree: SysfsTree) -> None:
    tree.gpu(behind_switch(0x10, 0))
    tree.nic("mlx5_0", behind_switch(0x10, 1), state="1: DOWN")
    tree.nic("mlx5_1", behind_switch(0x10, 2), gids=[])
    with pytest.raises(NicUnavailable) as caught:
        chosen(tree)
    assert "mlx5_0 port 1: its state is DOWN" in str(caught.value)
    assert "mlx5_1 port 1: it has no RoCE v2 GID: give its network interface an IP address" in str(caught.value)


@pytest.mark.parametrize(
    ("gids", "index"),
    [
        ([(LINK_LOCAL, ROCE_V1), (LINK_LOCAL, ROCE_V2), (ipv4_gid(1), ROCE_V1), (ipv4_gid(1), ROCE_V2)], 3),
        ([(LINK_LOCAL, ROCE_V2), (GLOBAL_V6, ROCE_V2)], 1),
        ([(GLOBAL_V6, ROCE_V2), (ipv4_gid(1), ROCE_V2)], 1),
        ([(LINK_LOCAL, ROCE_V1), (LINK_LOCAL, ROCE_V2)], 1),
        ([(ipv4_gid(1), ROCE_V2), (ipv4_gid(2), ROCE_V2)], 0),
    ],
)
def test_roce_gid_is_version_two_and_ipv4_where_there_is_one(
    tree: SysfsTree, gids: list[tuple[str, str]], index: int
) -> None:
    tree.nic("mlx5_0", behind_switch(0x10, 0), gids=gids)
    assert choose_gid(rdma_ports(tree.root)[0]).index == index


def test_a_gid_index_that_is_given_is_taken_or_refused_with_those_that_are_set(tree: SysfsTree) -> None:
    tree.nic("mlx5_0", behind_switch(0x10, 0))
    port = rdma_ports(tree.root)[0]
    assert choose_gid(port, 1).value == LINK_LOCAL
    with pytest.raises(NicUnavailable, match="GID index 9 is not set; those that are: 0, 1, 2, 3"):
        choose_gid(port, 9)


def test_infiniband_needs_no_ip_address(tree: SysfsTree) -> None:
    tree.gpu(behind_switch(0x10, 0))
    gid = "fe80:0000:0000:0000:b859:9f03:00d4:1234"
    tree.nic("mlx5_0", behind_switch(0x10, 1), link_layer="InfiniBand", gids=[(gid, "")])
    assert chosen(tree) == [("mlx5_0", "PIX")]
    port = rdma_ports(tree.root)[0]
    assert (choose_gid(port).index, port.is_roce, port.lid) == (0, False, 1)


def test_a_bond_is_reported_and_its_address_is_used(tree: SysfsTree) -> None:
    tree.gpu(behind_switch(0x10, 0))
    tree.nic("mlx5_bond_0", behind_switch(0x10, 1), netdev="bond0", bond="bond0", rate="800 Gb/sec (8X NDR)")
    tree.nic("mlx5_2", behind_switch(0x10, 2), netdev="eth2", bond="bond1")
    assert chosen(tree) == [("mlx5_bond_0", "PIX")]
    lone, bond = rdma_ports(tree.root)
    assert (lone.device, lone.bond, bond.device, bond.bond) == ("mlx5_2", "bond1", "mlx5_bond_0", "bond0")
    assert choose_gid(bond).netdev == "bond0"


def test_a_virtual_function_is_taken_only_where_its_device_is_not_to_be_seen(tree: SysfsTree) -> None:
    physical, virtual = behind_switch(0x10, 1), [*behind_switch(0x10, 1)[:3], "0000:14:00.1"]
    tree.gpu(behind_switch(0x10, 0))
    tree.nic("mlx5_9", virtual, physical=physical)
    assert chosen(tree) == [("mlx5_9", "PIX")]
    tree.nic("mlx5_10", physical)
    assert chosen(tree) == [("mlx5_10", "PIX")]
    assert [p.is_virtual_function for p in rdma_ports(tree.root)] == [False, True]


def test_names_sort_by_number_and_the_fast_ports_come_first(tree: SysfsTree) -> None:
    for number in (10, 9, 2):
        tree.nic(f"mlx5_{number}", behind_switch(0x10, number))
    tree.nic("bnxt_0", behind_switch(0x10, 1), rate="25 Gb/sec (1X EDR)")
    assert [p.device for p in usable_ports(rdma_ports(tree.root))] == ["mlx5_2", "mlx5_9", "mlx5_10", "bnxt_0"]


def test_one_device_alone_can_be_read_and_is_the_same_as_among_all(tree: SysfsTree) -> None:
    for number in (1, 2):
        tree.nic(f"mlx5_{number}", behind_switch(0x10, number))
    assert rdma_ports(tree.root, only="mlx5_2") == rdma_ports(tree.root)[1:]
    assert rdma_ports(tree.root, only="mlx5_3") == []


@pytest.mark.parametrize(
    ("text", "by_rank"),
    [
        ("", [None, None, None]),
        ("mlx5_0", ["mlx5_0"] * 3),
        (" mlx5_0, mlx5_1 ", ["mlx5_0", "mlx5_1", "mlx5_0"]),
        ('{"0": "mlx5_0", "2": "mlx5_4,mlx5_5"}', ["mlx5_0", None, "mlx5_4"]),
    ],
)
def test_devices_may_be_named_as_one_as_a_list_and_by_gpu(text: str, by_rank: list[str | None]) -> None:
    assert [parse_nics(text).for_rank(rank) for rank in range(3)] == by_rank


def test_devices_may_be_named_in_a_json_file(tmp_path: Path) -> None:
    file = tmp_path / "nics.json"
    file.write_text('{"1": "mlx5_7"}')
    assert parse_nics(str(file)).for_rank(1) == "mlx5_7"


@pytest.mark.parametrize("text", ["mlx5 0", "../x", '{"a": "mlx5_0"}', '{"0": 1}', "{", "/nowhere.json", '{"0": ""}'])
def test_what_names_no_device_is_refused(text: str) -> None:
    with pytest.raises(NicUnavailable):
        parse_nics(text)


def verb(*arguments: str, env: dict[str, str] | None = None) -> str:
    done = CliRunner().invoke(command, arguments, env=env or {}, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_json_has_every_gpu_and_every_port(tree: SysfsTree) -> None:
    dgx(tree, num_nics=4)
    tree.nic("mlx5_9", behind_switch(0xA0, 0), 1, "pci0000:a0", state="1: DOWN")
    found = json.loads(verb("gpu", "--json", "--sysfs-root", str(tree.root)))
    assert found["kind"] == "gpu"
    assert found["nics"] == [f"mlx5_{i // 2}" for i in range(8)]
    assert found["gpus"][3] == {
        "index": 3,
        "pci_address": "0000:34:00.0",
        "vendor": "NVIDIA",
        "numa_node": 0,
        "nic": "mlx5_1",
        "port": 1,
        "distance": "PIX",
    }
    assert found["ports"][0] == {
        "device": "mlx5_0",
        "port": 1,
        "state": "ACTIVE",
        "link_layer": "Ethernet",
        "rate_gbps": 400.0,
        "numa_node": 0,
        "pci_address": "0000:17:00.0",
        "netdevs": ["eth0"],
        "bond": "",
        "is_virtual_function": False,
        "gid_index": 3,
        "gid": ipv4_gid(1),
        "problem": None,
    }
    assert found["ports"][4]["problem"] == "its state is DOWN"


def test_one_line_for_the_environment(tree: SysfsTree) -> None:
    dgx(tree, num_nics=4)
    root = ("--sysfs-root", str(tree.root))
    assert verb("gpu", "--env", *root) == "KVCACHE_RDMA_NICS=" + ",".join(f"mlx5_{i // 2}" for i in range(8)) + "\n"
    assert verb("cpu", "--env", *root) == "KVCACHE_RDMA_NICS=mlx5_0,mlx5_1,mlx5_2,mlx5_3\n"


def test_what_the_environment_names_is_used_instead_of_the_nearest(tree: SysfsTree) -> None:
    dgx(tree, num_nics=8)
    env = {"KVCACHE_RDMA_NICS": "mlx5_7,mlx5_0", "KVCACHE_RDMA_GID_INDEX": "1"}
    found = json.loads(verb("gpu", "--json", "--sysfs-root", str(tree.root), env=env))
    assert found["nics"] == ["mlx5_7", "mlx5_0"] * 4
    assert [g["distance"] for g in found["gpus"][:2]] == ["SYS", "PIX"]
    assert found["ports"][0]["gid_index"] == 1


def test_a_device_that_is_named_and_not_here_or_down_is_an_error(tree: SysfsTree) -> None:
    tree.nic("mlx5_0", behind_switch(0x10, 0), state="1: DOWN")
    for name, words in (("mlx5_5", "no such device here; those that are: mlx5_0"), ("mlx5_0", "state is DOWN")):
        with pytest.raises(NicUnavailable, match=words):
            verb("cpu", "--nics", name, "--sysfs-root", str(tree.root))


@pytest.mark.parametrize(("kind", "words"), [("gpu", "no GPU on its PCI bus"), ("cpu", "no RDMA device")])
def test_the_script_of_a_machine_without_devices_ends_in_a_paragraph(kind: str, words: str, tmp_path: Path) -> None:
    sched = tmp_path / "sched"
    sched.write_text(f'#!/bin/sh\nexec {sys.executable} -m splitwise_sched "$@" --sysfs-root {tmp_path}\n')
    sched.chmod(0o755)
    done = subprocess.run(
        [ROOT / "scripts/get_rdma_nics.sh", kind],
        env={"SPLITWISE_SCHED": str(sched), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr and "Traceback" not in done.stderr


def test_without_names_a_rank_takes_the_device_of_its_address_else_ranks_share_the_fastest(
    tree: SysfsTree,
) -> None:
    for number in range(3):
        gids = [(LINK_LOCAL, ROCE_V2), (ipv4_gid(number + 1), ROCE_V2)]
        rate = "25 Gb/sec (1X EDR)" if number == 2 else "400 Gb/sec (4X NDR)"
        tree.nic(f"mlx5_{number}", behind_switch(0x10, number), gids=gids, rate=rate)

    def taken(rank: int, host: str, **options: tuple[str, ...]) -> str:
        return choose_port(RdmaOptions(**options), rank, host, tree.root).device

    assert [taken(0, host) for host in ("10.0.0.2", "10.0.0.3", "10.9.9.9", "a-name", "")] == [
        "mlx5_1",
        "mlx5_2",
        "mlx5_0",
        "mlx5_0",
        "mlx5_0",
    ]
    assert [taken(rank, "") for rank in range(3)] == ["mlx5_0", "mlx5_1", "mlx5_0"]
    assert [taken(rank, "10.0.0.2", nics=("mlx5_2", "mlx5_0")) for rank in range(3)] == ["mlx5_2", "mlx5_0", "mlx5_2"]
