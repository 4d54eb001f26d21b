"""``splitwise-sched redis`` as a process of its own, and against servers that are fine or not."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis

from splitwise_sched.cli.main import main
from splitwise_sched.embedded import connect_or_start


@contextmanager
def command(runtime_dir: Path, *args: str) -> Iterator[tuple[subprocess.Popen[str], str, int]]:
    """The running verb, what it said, and its server's port."""
    process = subprocess.Popen(
        [sys.executable, "-m", "splitwise_sched", "redis", *args],
        env={**os.environ, "XDG_RUNTIME_DIR": str(runtime_dir)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout is not None
        said = ""
        while "Ctrl-C" not in said:
            line = process.stdout.readline()
            assert line, said
            said += line
        port = re.search(r"--scheduler-port (\d+)", said)
        assert port is not None, said
        yield process, said, int(port[1])
    finally:
        process.kill()
        process.communicate(timeout=30)


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_server_serves_is_found_and_ends_cleanly_with_its_signal(tmp_path: Path, end: signal.Signals) -> None:
    with command(tmp_path) as (process, said, port):
        with redis.Redis(port=port) as client:
            version = client.info("server")["redis_version"]
        assert (
            re.match(r"(redis|valkey) \d+\.\d+\.\d+ \(", said)
            and f"--scheduler-host 127.0.0.1 --scheduler-port {port}" in said
        )
        assert version in said or "valkey" in said
        with connect_or_start(tmp_path / "splitwise-sched") as found:
            assert (found.port, found.owner) == (port, False)
            server = psutil.Process(found.pid)
        process.send_signal(end)
        assert process.communicate(timeout=30)[0].endswith("stopped\n")
        assert process.returncode == 0
        assert not server.is_running()
        assert not (tmp_path / "splitwise-sched" / "server.json").exists()


def test_port_socket_directory_and_password_are_as_given(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path, data = tmp_path / "r.sock", tmp_path / "data"
    args = ["--port", str(port), "--unix-socket", str(path), "--data-dir", str(data), "--scheduler-password", "s3"]
    with command(tmp_path, *args) as (_, said, actual):
        assert actual == port and str(data) in said and "s3" not in said
        with redis.Redis(unix_socket_path=str(path), password="s3") as client:
            assert client.set("a", "b")
    assert list(data.glob("appendonly*"))


def test_a_server_that_is_not_shared_is_not_found(tmp_path: Path) -> None:
    with command(tmp_path, "--no-share") as (_, _, port), connect_or_start(tmp_path / "splitwise-sched") as other:
        assert other.owner and other.port != port


def test_a_second_shared_server_is_refused(tmp_path: Path) -> None:
    with command(tmp_path) as (_, _, port):
        again = subprocess.run(
            [sys.executable, "-m", "splitwise_sched", "redis"],
            env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert again.returncode == 2
        assert (
            again.stderr.startswith("error: ") and f"127.0.0.1:{port}" in again.stderr and "--no-share" in again.stderr
        )


def test_a_server_that_dies_ends_the_command_with_an_error(tmp_path: Path) -> None:
    with command(tmp_path) as (process, _, _):
        pid = json.loads((tmp_path / "splitwise-sched" / "server.json").read_text())["pid"]
        os.kill(pid, signal.SIGKILL)
        assert "error: the private server ended by itself" in process.communicate(timeout=30)[0]
        assert process.returncode == 1


def test_port_in_use_is_one_paragraph(capsys: pytest.CaptureFixture[str], redis_server: Any) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    try:
        assert main(["redis", "--port", str(redis_server.port), "--no-share"]) == 2
    finally:
        signal.signal(signal.SIGTERM, handler)
    err = capsys.readouterr().err
    assert f"port {redis_server.port} on 127.0.0.1 is in use" in err and err.count("\n") == 1


@pytest.fixture
def check(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """``redis --scheduler-host 127.0.0.1 ...``: exit code and everything said."""
    monkeypatch.setattr(signal, "signal", lambda *args: None)

    def run(port: int, *args: str) -> tuple[int, str]:
        code = main(["redis", "--scheduler-host", "127.0.0.1", "--scheduler-port", str(port), *args])
        out, err = capsys.readouterr()
        return code, out + err

    return run


def test_a_good_server_gets_its_verdict(check: Any, every_redis_server: Any, topic: str) -> None:
    code, said = check(every_redis_server.port, "--scheduler-topic", topic)
    assert code == 0
    assert f"127.0.0.1:{every_redis_server.port} can carry topic {topic!r}" in said


def test_an_evicting_server_is_unsuitable(check: Any, private_redis_server: Any) -> None:
    with private_redis_server.client() as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
    code, said = check(private_redis_server.port)
    assert code == 2 and "allkeys-lru" in said and "set maxmemory-policy noeviction" in said


def test_a_wrong_password_is_named_as_such(check: Any, private_redis_server: Any) -> None:
    with private_redis_server.client() as client:
        client.config_set("requirepass", "right")
        assert check(private_redis_server.port, "--scheduler-password", "right")[0] == 0
        for args in (["--scheduler-password", "wrong"], []):
            code, said = check(private_redis_server.port, *args)
            assert code == 2 and "--scheduler-password" in said and "wrong" not in said


def test_nobody_there_is_said_with_the_address(check: Any) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        code, said = check(port)
    assert code == 1 and f"127.0.0.1:{port}" in said and said.count("\n") == 1
