"""The files in conf/ do what they say: servers start with them, settings load from them, rights are what is needed."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import redis

from splitwise_sched.cli.options import SettingsCommand
from splitwise_sched.configuration import load, read_env_file
from splitwise_sched.connection import Connection
from splitwise_sched.embedded import ServerBinary, find_servers
from splitwise_sched.errors import StoreUnsuitable
from splitwise_sched.keys import Keys
from splitwise_sched.setting_fields import setting_fields
from splitwise_sched.settings import SchedulerSettings

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"
USER, PASSWORD, TOPIC = "splitwise", "change-me", "default"
# The verb that reads each file, after conf/scheduler.env.
VERBS = {
    "scheduler.env": "redis", "tls.env": "redis", "sentinel.env": "redis", "cluster.env": "redis",
    "gateway.env": "gateway", "prefill.env": "serve", "decode.env": "serve",
    "attach.env": "attach",
}  # fmt: skip
# They show the scheduler's settings; a file of its own for what not everybody has.
SCHEDULER_FILES = ("scheduler.env", "tls.env", "sentinel.env", "cluster.env")


@pytest.fixture(scope="module", params=list(find_servers()), ids=lambda b: f"{b.name}-{b.version}")
def configured_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Port of a server that runs with conf/redis.conf and conf/users.acl."""
    binary: ServerBinary = request.param
    directory = tmp_path_factory.mktemp("conf")
    shutil.copy(CONF / "users.acl", directory)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    changes = {"port": port, "dir": directory, "aclfile": directory / "users.acl", "logfile": directory / "log"}
    flags = [word for name, value in changes.items() for word in (f"--{name}", str(value))]
    process = subprocess.Popen([str(binary.path), str(CONF / "redis.conf"), *flags], stdout=subprocess.DEVNULL)
    try:
        retry = redis.retry.Retry(redis.backoff.ConstantBackoff(0.01), 1000)
        with redis.Redis(port=port, username=USER, password=PASSWORD, retry=retry) as client:
            client.ping()
        yield port
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def client(configured_server: int) -> Iterator[redis.Redis]:
    with redis.Redis(port=configured_server, username=USER, password=PASSWORD, decode_responses=True) as client:
        yield client


def settings(port: int, **changes: Any) -> SchedulerSettings:
    return SchedulerSettings(
        scheduler_host="127.0.0.1", scheduler_port=port, scheduler_username=USER, scheduler_password=PASSWORD, **changes
    )


def test_server_with_the_example_configuration_is_durable_and_does_not_evict(client: redis.Redis) -> None:
    info = client.info()
    assert info["aof_enabled"] == 1
    assert info["maxmemory_policy"] == "noeviction"


async def test_scheduler_connects_with_the_example_user(configured_server: int) -> None:
    connection = Connection(settings(configured_server))
    try:
        await connection.connect()
    finally:
        await connection.close()


async def test_another_topic_or_password_or_no_user_is_refused(configured_server: int) -> None:
    for wrong in (
        settings(configured_server, scheduler_topic="other"),
        settings(configured_server).model_copy(update={"scheduler_password": None, "scheduler_username": None}),
    ):
        connection = Connection(wrong)
        try:
            with pytest.raises(StoreUnsuitable, match=r"users\.acl"):
                await connection.connect()
        finally:
            await connection.close()


def used_commands() -> list[tuple[str, ...]]:
    """Every command that the scripts and the modules above the connection send, with its subcommand if it has one."""
    package = ROOT / "splitwise_sched"
    word = r"\s*['\"]([A-Z]+)['\"](?:,\s*['\"]([A-Z]+)['\"])?"
    patterns = {"lua/*.lua": r"redis\.p?call\(" + word, "*.py": r"(?:call\(|tell\(|args = \(|pack\(\()" + word}
    found: set[tuple[str, ...]] = set()
    for files, pattern in patterns.items():
        for path in package.glob(files):
            for name, following in re.findall(pattern, path.read_text()):
                is_container = name in ("XINFO", "XGROUP", "SCRIPT")
                found.add((name, following) if is_container and following else (name,))
    assert {("HSET",), ("XADD",), ("TIME",), ("XREADGROUP",), ("UNLINK",)} <= found
    # What only a Cluster's node is told.
    return sorted(found - {("ASKING",)})


@pytest.mark.parametrize("command", used_commands(), ids=" ".join)
def test_every_command_in_use_is_allowed_on_the_topic(client: redis.Redis, command: tuple[str, ...]) -> None:
    key = Keys(TOPIC).request("none")
    if command[0] in ("XREAD", "XREADGROUP"):
        group = ["GROUP", "g", "c"] if command[0] == "XREADGROUP" else []
        arguments = [*group, "COUNT", "1", "STREAMS", key, "0"]
    elif command == ("TIME",):
        arguments = []
    elif command == ("EVALSHA",):
        arguments = ["0" * 40, "1", key]
    elif command[0] in ("EXISTS", "UNLINK", "DEL", "MGET"):
        arguments = [key]
    else:
        arguments = [key, "1", "1", "1"]
    try:
        client.execute_command(*command, *arguments)
    except redis.exceptions.NoPermissionError as exc:
        pytest.fail(f"{' '.join(command)} is not allowed: {exc}")
    except redis.ResponseError as exc:
        # What the command thinks of these arguments is not the question, as long as it was let through to think.
        assert "permission" not in str(exc).lower()
    finally:
        client.unlink(key)


@pytest.mark.parametrize(
    "command",
    [
        "FLUSHALL", "FLUSHDB", "CONFIG GET *", "CONFIG SET maxmemory-policy allkeys-lru", "KEYS *", "SCAN 0", "MONITOR",
        "ACL LIST", "ACL WHOAMI", "SHUTDOWN", "DEBUG SLEEP 0", "REPLICAOF NO ONE", "MODULE LIST", "CLIENT LIST", "SAVE",
        "SORT pd:{default:0}:instances", "SUBSCRIBE x", "PUBLISH x y", "SWAPDB 0 1", "SCRIPT FLUSH", "SCRIPT KILL",
        "SET other 1", "GET other", "SET pd:{other:0}:body:x 1", "HGETALL pd:{other:0}:counters",
        "EVAL return(redis.call('FLUSHALL')) 0", "EVAL return(redis.call('GET','other')) 0",
        "EVAL return(redis.call('KEYS','*')) 1 pd:{default:0}:x",
    ],
)  # fmt: skip
def test_the_example_user_can_do_nothing_else(client: redis.Redis, command: str) -> None:
    with pytest.raises(redis.ResponseError, match=r"(?i)permission|can't|not allowed|NOPERM"):
        client.execute_command(*command.split())


@pytest.mark.parametrize(("name", "verb"), VERBS.items())
def test_env_file_loads_into_the_settings_of_its_verb(name: str, verb: str) -> None:
    (entry,) = entry_points(group="splitwise_sched.commands", name=verb)
    command = entry.load()
    assert isinstance(command, SettingsCommand)
    files = [CONF / "scheduler.env"] + ([CONF / name] if name != "scheduler.env" else [])
    given = {entry.key for path in files for entry in read_env_file(path)}
    loaded = load(command.settings_classes, flags={}, environ={}, files=files, program=verb)
    assert [type(one) for one in loaded] == list(command.settings_classes)
    fields = {field.variable: field for one in command.settings_classes for field in setting_fields(one)}
    assert given <= set(fields)


def test_every_env_file_has_a_verb() -> None:
    assert {path.name for path in CONF.glob("*.env")} == set(VERBS)


@pytest.mark.parametrize("name", sorted(path.name for path in CONF.glob("*.env")))
def test_settings_that_are_commented_out_in_an_env_file_are_real_too(name: str, tmp_path: Path) -> None:
    text = re.sub(r"(?m)^# (SPLITWISE_\w+=)", r"\1", (CONF / name).read_text())
    (tmp_path / name).write_text(text)
    (entry,) = entry_points(group="splitwise_sched.commands", name=VERBS[name])
    files = [CONF / "scheduler.env"] if name != "scheduler.env" else []
    load(entry.load().settings_classes, flags={}, environ={}, files=[*files, tmp_path / name], program=name)


def test_every_setting_of_the_scheduler_is_shown_and_with_its_default_in_scheduler_env() -> None:
    shown = "".join((CONF / name).read_text() for name in SCHEDULER_FILES)
    text = (CONF / "scheduler.env").read_text()
    for field in setting_fields(SchedulerSettings):
        pattern = rf"(?m)^(# )?{field.variable}=(.*)$"
        assert re.search(pattern, shown), f"{field.variable} is in none of {SCHEDULER_FILES}"
        if field.default is not None and (line := re.search(pattern, text)):
            (mine,) = load([SchedulerSettings], flags={field.name: line[2]}, environ={})
            assert getattr(mine, field.name) == getattr(SchedulerSettings(), field.name)
