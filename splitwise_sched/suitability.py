"""Whether a server can carry a topic, by what INFO says, and what its owner had better change."""

from __future__ import annotations

from collections.abc import Mapping

from splitwise_sched.errors import StoreUnsuitable
from splitwise_sched.settings import ServerSettings

MIN_VERSION = (6, 2, 0)
SECTIONS = ("server", "memory", "persistence", "replication")


def info_fields(text: str) -> dict[str, str]:
    """The fields of an INFO reply."""
    pairs = (line.partition(":") for line in text.splitlines() if not line.startswith("#"))
    return {name: value for name, colon, value in pairs if colon}


def check_server(info: Mapping[str, str], address: str, settings: ServerSettings | None = None) -> str:
    """Whether a server with this INFO can carry a topic, reached in the way that ``settings`` say.

    Returns:
        Its name and version.
    Raises:
        StoreUnsuitable: too old, it may evict keys, or it is another kind of server than the settings have it.
    """
    version = info.get("redis_version", "0")
    numbers = tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
    if numbers < MIN_VERSION:
        raise StoreUnsuitable(
            f"the server at {address} is Redis {version}, but 6.2.0 or newer is needed: upgrade it, or run "
            "`splitwise-sched redis` for a private one"
        )
    if settings is not None:
        _check_kind(info.get("redis_mode", "standalone"), address, settings)
    policy = info.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        raise StoreUnsuitable(
            f"the server at {address} has maxmemory-policy {policy!r}, under which queued requests can vanish: set "
            "maxmemory-policy noeviction there (conf/redis.conf is an example)"
        )
    return f"valkey {info['valkey_version']}" if "valkey_version" in info else f"redis {version}"


def _check_kind(kind: str, address: str, settings: ServerSettings) -> None:
    if kind == "sentinel":
        raise StoreUnsuitable(
            f"the server at {address} is a Sentinel, which holds no data: give it with --scheduler-sentinels and "
            "--scheduler-sentinel-service, and leave --scheduler-host out"
        )
    if kind == "cluster" and not settings.scheduler_cluster_nodes:
        raise StoreUnsuitable(
            f"the server at {address} is a node of a Cluster: give it with --scheduler-cluster-nodes {address}"
        )


def _is_for_trying(info: Mapping[str, str], address: str) -> bool:
    """On this machine, and started without a configuration file: a private server, or somebody's experiment."""
    is_here = address.startswith(("127.", "localhost:", "[::1]:", "/"))
    return is_here and info.get("config_file", "-") == ""


def advice(info: Mapping[str, str], address: str, settings: ServerSettings) -> list[str]:
    """What the owner of a server that can carry a topic had better change there, a sentence each."""
    found = []
    if info.get("aof_enabled") == "0" and not _is_for_trying(info, address):
        found.append(
            f"the server at {address} keeps no append-only file, so a restart loses what was written since its last "
            "snapshot: set appendonly yes and appendfsync everysec there (conf/redis.conf is an example)"
        )
    elif info.get("aof_last_write_status", "ok") != "ok":
        found.append(
            f"the server at {address} cannot write its append-only file (aof_last_write_status is "
            f"{info['aof_last_write_status']!r}): make room on its disk, and see its log"
        )
    num_replicas = int(info.get("connected_slaves", "0") or 0)
    # INFO has the field only when the setting is not 0.
    if num_replicas and "min_slaves_good_slaves" not in info:
        found.append(
            f"the server at {address} has replicas, and takes writes without them too, which a failover then loses: "
            "set min-replicas-to-write 1 and min-replicas-max-lag 10 there"
        )
    if settings.durability == "wait" and not num_replicas:
        found.append(
            f"--durability is 'wait', but the server at {address} has no replica: every submit waits for "
            f"{settings.durability_timeout_ms} ms and is not confirmed; add a replica, or set --durability master"
        )
    return found
