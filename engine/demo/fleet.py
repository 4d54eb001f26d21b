"""Starts the processes of a small deployment, waits until they serve, and ends them whatever happens."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree

import httpx

from splitwise_sched.embedded import EmbeddedServer, die_with_parent
from splitwise_sched.errors import SplitwiseError, StoreUnavailable
from splitwise_sched.records import InstanceRecord
from splitwise_sched.setting_fields import ENV_PREFIX
from splitwise_sched.settings import SchedulerSettings
from splitwise_sched.store import Store

TOPIC = "demo"
READY_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 10.0
LOG_TAIL_CHARS = 2000


def free_port() -> int:
    """A loopback port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class FleetFailed(SplitwiseError):
    """A process of the demo ended early, or did not come up; the end of its log is in the message."""


@dataclass
class Member:
    """One process of the fleet."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    arguments: Sequence[str]
    env: Mapping[str, str]

    @property
    def log_tail(self) -> str:
        try:
            return self.log.read_text(encoding="utf-8", errors="replace")[-LOG_TAIL_CHARS:]
        except OSError:
            return ""


class Fleet:
    """A private Redis, instances and a gateway, all on this machine; ``close`` (or ``with``) ends them all.

    They end with this process too, even when it is killed.
    """

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="splitwise-demo-"))
        self.redis = EmbeddedServer()
        self.members: dict[str, Member] = {}
        try:
            self.redis.start()
        except BaseException:
            rmtree(self.directory, ignore_errors=True)
            raise

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def settings(self) -> SchedulerSettings:
        return SchedulerSettings(scheduler_host=self.redis.host, scheduler_port=self.redis.port, scheduler_topic=TOPIC)

    def start(self, name: str, arguments: Sequence[str], env: Mapping[str, str] | None = None) -> Member:
        """``splitwise-sched <arguments>`` on this fleet's Redis and topic."""
        scheduler = ("--scheduler-host", self.redis.host, "--scheduler-port", str(self.redis.port))
        log = self.directory / f"{name}.log"
        # A setting that its user exported is not meant for every member at once.
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(ENV_PREFIX)}
        command = [sys.executable, die_with_parent.__file__, str(os.getpid()), sys.executable, "-m", "splitwise_sched"]
        with log.open("ab") as out:
            process = subprocess.Popen(
                [*command, *arguments, *scheduler, "--scheduler-topic", TOPIC],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**inherited, "OMP_NUM_THREADS": "1", **(env or {})},
            )
        self.members[name] = member = Member(name, process, log, arguments, env or {})
        return member

    def kill(self, name: str) -> None:
        """SIGKILL, and wait until it is gone; the caller starts it again before ``check`` is called."""
        process = self.members[name].process
        process.kill()
        process.wait()

    def restart(self, name: str) -> Member:
        """The same once more, after ``kill``; call it in the thread that is to outlive it."""
        member = self.members.pop(name)
        return self.start(name, member.arguments, member.env)

    def start_instance(self, role: str, index: int, model: Path | str, arguments: Sequence[str]) -> Member:
        name = f"{role}-{index}"
        flags = ("--model", str(model), "--splitwise-role", role, "--instance-name", name, "--num-threads", "1")
        return self.start(name, ("serve", *flags, *arguments))

    def check(self) -> None:
        """Raises FleetFailed when a process has ended by itself."""
        for member in self.members.values():
            if (code := member.process.poll()) is not None:
                raise FleetFailed(f"{member.name} ended with exit code {code}; its log ends with: {member.log_tail}")

    async def wait_for_instances(self, count: int, timeout_s: float = READY_TIMEOUT_S) -> list[InstanceRecord]:
        """Until ``count`` instances hold a lease."""
        store = Store(self.settings)
        deadline = time.monotonic() + timeout_s
        try:
            await store.connect()
            while len(records := await store.live_instances()) < count:
                self.check()
                if time.monotonic() > deadline:
                    names = ", ".join(r.name for r in records) or "none"
                    raise FleetFailed(f"after {timeout_s:g} s only these of {count} instances serve: {names}")
                await asyncio.sleep(0.1)
            return records
        except StoreUnavailable as exc:
            raise FleetFailed(f"the demo's Redis is gone: {exc}") from exc
        finally:
            await store.close()

    async def wait_for_gateway(self, port: int, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Until ``/health`` on ``port`` says that requests can be served."""
        deadline = time.monotonic() + timeout_s
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            while True:
                try:
                    response = await client.get("/health", timeout=5)
                    if response.status_code == 200:
                        return
                    state = f"HTTP {response.status_code}: {response.text[:500]}"
                except httpx.HTTPError as exc:
                    state = repr(exc)
                self.check()
                if time.monotonic() > deadline:
                    raise FleetFailed(f"after {timeout_s:g} s the gateway is not ready: {state}")
                await asyncio.sleep(0.1)

    def close(self) -> None:
        """End all processes, the gateway first, and remove their logs. Idempotent."""
        members, self.members = list(self.members.values()), {}
        for member in reversed(members):
            if member.process.poll() is None:
                member.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for member in members:
            try:
                member.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                member.process.kill()
                member.process.wait()
        self.redis.close()
        rmtree(self.directory, ignore_errors=True)
