"""``splitwise-sched rdma-nics``: the NIC of each GPU, as the KV transfer would choose it."""

from __future__ import annotations

import json
from pathlib import Path

import click

from kv_transfer import sysfs
from kv_transfer.errors import NicUnavailable
from kv_transfer.sysfs import Gpu, RdmaPort
from kv_transfer.topology import (
    Assignment,
    NicNames,
    assign,
    choose_gid,
    distance,
    explain_no_port,
    parse_nics,
    problem,
    usable_ports,
)


@click.command("rdma-nics")
@click.argument("kind", type=click.Choice(["gpu", "cpu"]), default="gpu")
@click.option("--json", "as_json", is_flag=True, help="Everything that was found, as JSON.")
@click.option("--env", "as_env", is_flag=True, help="One line to be set in the environment: KVCACHE_RDMA_NICS=a,b.")
@click.option(
    "--nics",
    "given",
    envvar=["KVCACHE_RDMA_NICS", "SPLITWISE_RDMA_NICS"],
    metavar="NAMES",
    help="Use these devices instead of choosing: names, or JSON by GPU.  [env: KVCACHE_RDMA_NICS]",
)
@click.option(
    "--gid-index",
    envvar=["KVCACHE_RDMA_GID_INDEX", "SPLITWISE_RDMA_GID_INDEX"],
    type=click.IntRange(0, 1023),
    help="Use this GID instead of choosing.  [env: KVCACHE_RDMA_GID_INDEX]",
)
@click.option(
    "--sysfs-root",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=sysfs.SYSFS,
    help="Look there instead of /sys.",
)
def command(
    kind: str, *, as_json: bool, as_env: bool, given: str | None, gid_index: int | None, sysfs_root: Path
) -> None:
    """Show which RDMA NIC the KV transfer takes: for each GPU the nearest active one, or all that a CPU pool may use.

    The list has one entry a GPU (rank i takes entry i modulo their number), so that it stays right where several GPUs
    share a NIC.
    """
    ports, gpus = sysfs.rdma_ports(sysfs_root), sysfs.gpus(sysfs_root) if kind == "gpu" else []
    if kind == "gpu" and not gpus:
        raise NicUnavailable("", "this machine shows no GPU on its PCI bus: ask for `rdma-nics cpu`")
    names = parse_nics(given or "")
    if names == NicNames():
        assignments = assign(gpus, ports)
        chosen = [a.port for a in assignments] if kind == "gpu" else usable_ports(ports)
    else:
        chosen = [_named(names, rank, ports) for rank in range(len(gpus) if kind == "gpu" else len(names.shared))]
        assignments = [Assignment(g, p, distance(g.place, p.place)) for g, p in zip(gpus, chosen, strict=False)]
    if not chosen:
        raise NicUnavailable("", explain_no_port(ports))
    if as_env:
        click.echo(f"KVCACHE_RDMA_NICS={','.join(port.device for port in chosen)}")
    elif as_json:
        click.echo(json.dumps(_report(kind, chosen, assignments, ports, gid_index), indent=1))
    else:
        _print(chosen, assignments, ports, gid_index)


def _named(names: NicNames, rank: int, ports: list[RdmaPort]) -> RdmaPort:
    """The port that its user has named for a rank; a port that is down is worse news now than later."""
    name = names.for_rank(rank)
    if name is None:
        raise NicUnavailable("", f"no device is named for GPU {rank}: name one for each, or leave all out")
    of_device = [port for port in ports if port.device == name]
    if not of_device:
        known = ", ".join(dict.fromkeys(port.device for port in ports)) or "none"
        raise NicUnavailable(name, f"there is no such device here; those that are: {known}")
    good = [port for port in of_device if problem(port) is None]
    if not good:
        raise NicUnavailable(name, f"it is named and cannot be used: {problem(of_device[0])}")
    return good[0]


def _report(
    kind: str, chosen: list[RdmaPort], assignments: list[Assignment], ports: list[RdmaPort], gid_index: int | None
) -> dict[str, object]:
    return {
        "kind": kind,
        "nics": [port.device for port in chosen],
        "gpus": [_gpu_report(a.gpu, a) for a in assignments],
        "ports": [_port_report(port, gid_index) for port in ports],
    }


def _gpu_report(gpu: Gpu, assignment: Assignment) -> dict[str, object]:
    return {
        "index": gpu.index,
        "pci_address": gpu.address,
        "vendor": gpu.vendor,
        "numa_node": gpu.place.numa_node,
        "nic": assignment.port.device,
        "port": assignment.port.port,
        "distance": assignment.distance.name,
    }


def _port_report(port: RdmaPort, gid_index: int | None) -> dict[str, object]:
    fault, gid = problem(port), None
    if fault is None:
        gid = choose_gid(port, gid_index)
    return {
        "device": port.device,
        "port": port.port,
        "state": port.state,
        "link_layer": port.link_layer,
        "rate_gbps": port.rate_gbps,
        "numa_node": port.place.numa_node,
        "pci_address": port.place.path[-1] if port.place.path else "",
        "netdevs": list(port.netdevs),
        "bond": port.bond,
        "is_virtual_function": port.is_virtual_function,
        "gid_index": None if gid is None else gid.index,
        "gid": None if gid is None else gid.value,
        "problem": fault,
    }


def _print(chosen: list[RdmaPort], assignments: list[Assignment], ports: list[RdmaPort], gid_index: int | None) -> None:
    for port in ports:
        fault = problem(port)
        facts = [port.link_layer, f"{port.rate_gbps:g} Gb/s", f"NUMA node {port.place.numa_node}"]
        facts += [f"bond {port.bond}"] if port.bond else []
        facts += ["virtual function"] if port.is_virtual_function else []
        if fault is None:
            gid = choose_gid(port, gid_index)
            facts.append(f"GID {gid.index} {gid.value}")
        click.echo(f"{port.device} port {port.port}: {', '.join(facts)}" + (f"; not usable: {fault}" if fault else ""))
    for a in assignments:
        click.echo(f"GPU {a.gpu.index} {a.gpu.address} ({a.gpu.vendor}): {a.port.device} ({a.distance.name})")
    click.echo(f"KVCACHE_RDMA_NICS={','.join(port.device for port in chosen)}")
