"""Processes of one user find one private server, whoever comes first, and whatever was left behind before."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from splitwise_sched.connection import Connection
from splitwise_sched.embedded import (
    EmbeddedServer,
    connect_or_start,
    default_runtime_dir,
    rendezvous,
    scheduler_server,
    share,
)
from splitwise_sched.errors import ConfigError, StoreUnavailable
from splitwise_sched.settings import SchedulerSettings

COMER = (
    "import sys, pathlib\n"
    "from splitwise_sched.embedded import connect_or_start\n"
    "server = connect_or_start(pathlib.Path(sys.argv[1]))\n"
    "print(server.port, server.pid, int(server.owner), flush=True)\n"
    "sys.stdin.read()\n"
    "server.close()\n"
)


@contextmanager
def comer(runtime_dir: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that asks for the shared server, and leaves when the block ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", COMER, str(runtime_dir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.communicate(timeout=30)


def answer(process: subprocess.Popen[str]) -> tuple[int, int, bool]:
    assert process.stdout is not None
    port, pid, owner = process.stdout.readline().split()
    return int(port), int(pid), owner == "1"


def test_processes_that_come_at_once_share_one_server_with_one_owner(tmp_path: Path) -> None:
    with comer(tmp_path / "r") as a, comer(tmp_path / "r") as b, comer(tmp_path / "r") as c, comer(tmp_path / "r") as d:
        answers = [answer(process) for process in (a, b, c, d)]
        assert len({(port, pid) for port, pid, _ in answers}) == 1
        assert [owner for *_, owner in answers].count(True) == 1


def test_a_second_comer_leaves_and_the_server_stays(tmp_path: Path) -> None:
    with connect_or_start(tmp_path / "r") as first:
        with connect_or_start(tmp_path / "r") as second:
            assert (first.owner, second.owner) == (True, False)
            assert (second.port, second.description) == (first.port, first.description)
        with redis.Redis(host=first.host, port=first.port) as client:
            assert client.ping()


def test_owner_takes_server_and_record_with_it(tmp_path: Path) -> None:
    server = connect_or_start(tmp_path / "r")
    server.close()
    server.close()
    assert not psutil.pid_exists(server.pid)
    assert not (tmp_path / "r" / "server.json").exists()


def test_record_of_an_owner_that_was_killed_is_replaced(tmp_path: Path) -> None:
    with comer(tmp_path / "r") as owner:
        _, pid, _ = answer(owner)
        server = psutil.Process(pid)
        owner.send_signal(signal.SIGKILL)
        owner.wait(20)
        server.wait(20)
    assert (tmp_path / "r" / "server.json").exists()
    with connect_or_start(tmp_path / "r") as next_comer:
        assert next_comer.owner
        assert next_comer.pid != pid


def rewrite(runtime_dir: Path, text: str) -> None:
    runtime_dir.mkdir(mode=0o700, exist_ok=True)
    (runtime_dir / "server.json").write_text(text)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "not json", '{"host": 1}', "\x00" * 99_999, '{"host":"h","port":"1","pid":1}']
)
def test_a_file_that_is_no_record_is_replaced(tmp_path: Path, text: str) -> None:
    rewrite(tmp_path / "r", text)
    with connect_or_start(tmp_path / "r") as server:
        assert server.owner


def test_record_whose_process_id_went_to_another_process_is_replaced(tmp_path: Path) -> None:
    record = {"host": "127.0.0.1", "port": 1, "pid": os.getpid(), "started": "1", "password": None, "description": "x"}
    rewrite(tmp_path / "r", json.dumps(record))
    with connect_or_start(tmp_path / "r") as server:
        assert server.owner


def test_server_that_runs_but_does_not_answer_is_named_and_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous, "_PROBE_TIMEOUT_S", 0.2)
    with connect_or_start(tmp_path / "r") as server:
        os.kill(server.pid, signal.SIGSTOP)
        try:
            with pytest.raises(StoreUnavailable, match=f"kill -9 {server.pid}"):
                connect_or_start(tmp_path / "r")
        finally:
            os.kill(server.pid, signal.SIGCONT)


def test_a_server_with_a_password_brings_it_to_whoever_finds_it(tmp_path: Path) -> None:
    with connect_or_start(tmp_path / "r", password="secret"), connect_or_start(tmp_path / "r") as found:
        assert found.password == "secret"
        assert (tmp_path / "r" / "server.json").stat().st_mode & 0o777 == 0o600
        with redis.Redis(host=found.host, port=found.port, password=found.password) as client:
            assert client.ping()


def test_a_server_started_by_hand_can_be_shared_once(tmp_path: Path) -> None:
    with share(EmbeddedServer().start(), tmp_path / "r") as shared, EmbeddedServer() as other:
        assert connect_or_start(tmp_path / "r").port == shared.port
        with pytest.raises(ConfigError, match="--no-share"):
            share(other, tmp_path / "r")


def test_runtime_directory_that_others_may_enter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir(mode=0o755)
    with pytest.raises(ConfigError, match="mode 0700"):
        connect_or_start(tmp_path / "r")


def test_runtime_directory_behind_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "r").symlink_to(tmp_path / "real")
    with pytest.raises(ConfigError, match="must be a directory"):
        connect_or_start(tmp_path / "r")


def test_lock_that_never_frees_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_LOCK_TIMEOUT_S", 0.1)
    (tmp_path / "r").mkdir(mode=0o700)
    with (
        rendezvous.locked(tmp_path / "r" / "server.lock", timeout_s=1),
        pytest.raises(ConfigError, match=r"server\.lock"),
    ):
        connect_or_start(tmp_path / "r")


def test_runtime_directory_follows_xdg_where_that_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert default_runtime_dir() == tmp_path / "splitwise-sched"
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "missing"))
    assert default_runtime_dir() == tmp_path / f"splitwise-sched-{os.geteuid()}"


async def test_settings_without_a_host_come_back_with_a_server_that_carries_the_queue(
    tmp_path: Path, topic: str
) -> None:
    settings = SchedulerSettings(scheduler_topic=topic, scheduler_password="pw", scheduler_username="nobody")
    with scheduler_server(settings, tmp_path / "r") as first, scheduler_server(settings, tmp_path / "r") as second:
        assert first == second and first.scheduler_topic == topic
        connection = Connection(first)
        await connection.connect()
        await connection.close()
        assert connection.server.split()[0] in ("redis", "valkey")


def test_settings_with_a_host_start_nothing(tmp_path: Path) -> None:
    settings = SchedulerSettings(scheduler_host="redis.example")
    with scheduler_server(settings, tmp_path / "r") as same:
        assert same is settings
    assert not (tmp_path / "r").exists()


def test_the_private_server_lets_nobody_in_who_cannot_read_its_record(tmp_path: Path) -> None:
    with scheduler_server(SchedulerSettings(), tmp_path / "r") as settings:
        record = tmp_path / "r" / "server.json"
        assert record.stat().st_mode & 0o777 == 0o600 and record.parent.stat().st_mode & 0o777 == 0o700
        stranger = redis.Redis(host=settings.scheduler_host, port=settings.scheduler_port, retry=Retry(NoBackoff(), 0))
        with stranger, pytest.raises(redis.AuthenticationError):
            stranger.flushall()
        assert settings.scheduler_password is not None
        secret = settings.scheduler_password.get_secret_value()
        assert len(secret) > 20 and secret not in repr(settings)


@pytest.mark.parametrize(
    "named",
    [
        {"scheduler_sentinels": ("s:26379",), "scheduler_sentinel_service": "x"},
        {"scheduler_cluster_nodes": ("c:6379",)},
    ],
)
def test_settings_with_sentinels_or_a_cluster_start_nothing_either(tmp_path: Path, named: dict[str, object]) -> None:
    settings = SchedulerSettings(**named)  # type: ignore[arg-type]
    with scheduler_server(settings, tmp_path / "r") as same:
        assert same is settings
    assert not (tmp_path / "r").exists()
