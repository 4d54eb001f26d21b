"""What ``splitwise-sched acl`` prints: the library does all that it does under these rules, and nobody more."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import redis
from click.testing import CliRunner

from splitwise_sched.acl import COMMANDS, LOOKING, acl_command, acl_file
from splitwise_sched.cli.acl import command as acl_verb
from splitwise_sched.errors import RequestFailed
from splitwise_sched.frontend import FrontEnd
from splitwise_sched.keys import Keys
from splitwise_sched.settings import SchedulerSettings
from splitwise_sched.types import FinishReason, Role
from tests.conftest import missing
from tests.integration.test_conf_files import used_commands
from tests.integration.test_shards import kill
from tests.integration.toy import ToyInstance, request_of, settings_for, tokens_of, toy_answer, until_state
from tests.redis_rigs import Cluster, RedisServer, SentinelTrio, any_program, pairs

ROOT = Path(__file__).resolve().parents[2]
PASSWORD = "of the topic"
REFUSED = r"(?i)NOPERM|no permissions|can't (run|access)|not allowed|unknown (redis )?command"


def grant(server: RedisServer, topic: str, kind: Any = "redis") -> str:
    """Make a user for ``topic``; returns its name."""
    user = f"user-{topic}"
    server.ask(*acl_command(topic, user, kind, PASSWORD).split())
    return user


@pytest.fixture
def user(every_redis_server: RedisServer, topic: str) -> str:
    return grant(every_redis_server, topic)


@pytest.fixture
def client(every_redis_server: RedisServer, user: str) -> Iterator[redis.Redis]:
    with every_redis_server.client(username=user, password=PASSWORD, decode_responses=True) as client:
        yield client


def denials(server: RedisServer, user: str) -> list[Any]:
    rows = [pairs(row) for row in server.ask("ACL", "LOG", "128")]
    return [row for row in rows if row["username"] == user]


async def test_everything_that_can_happen_to_a_request_happens_under_the_rules(every_redis_server, topic, user):
    server = every_redis_server
    settings = settings_for(
        server, topic, scheduler_username=user, scheduler_password=PASSWORD, instance_lease_s=0.5, frontend_lease_s=1,
        scheduler_shards=2, scheduler_max_attempts=2, durability="wait", durability_timeout_ms=10,
    )  # fmt: skip
    async with FrontEnd(settings) as frontend, ToyInstance(settings, Role.PREFILL, "p0") as prefill:
        async with ToyInstance(settings, Role.DECODE, "d0", pause_s=0.01):
            orphan = await FrontEnd(settings).__aenter__()
            requests = [request_of(f"r{i}", prefer=("p0",) if i % 2 else ()) for i in range(10)]
            streams = [await frontend.submit(request) for request in requests]
            assert [await tokens_of(s) for s in streams] == [toy_answer(r) for r in requests]
            cancelled = await frontend.submit(request_of("cancelled", max_tokens=500))
            await anext(cancelled)
            assert await frontend.cancel("cancelled")
            assert [o async for o in cancelled][-1].finish_reason is FinishReason.CANCELLED
            with pytest.raises(RequestFailed):
                await tokens_of(await frontend.submit(request_of("late", max_tokens=500, timeout_s=0.3)))
            # A front end that dies: what it wanted is cancelled.
            await orphan.submit(request_of("orphaned", max_tokens=500))
            for task in orphan._tasks:
                task.cancel()
            await until_state(frontend, "orphaned", "cancelled")
            with suppress(Exception):
                await orphan.close()
            await prefill.session.drain()
        # Instances that die take a request with them until it is given up.
        doomed = await frontend.submit(request_of("doomed", max_tokens=500))
        for i in range(2):
            dying = await ToyInstance(settings, Role.MIXED, f"m{i}", pause_s=0.01).__aenter__()
            await asyncio.wait_for(anext(doomed), 20)
            kill(dying)
        with pytest.raises(RequestFailed, match="given up after 2 attempts"):
            await tokens_of_rest(doomed)
    assert denials(server, user) == []


async def tokens_of_rest(stream: Any) -> None:
    async def read() -> None:
        async for _ in stream:
            pass

    await asyncio.wait_for(read(), 30)


@pytest.mark.parametrize(
    "command",
    [
        "FLUSHALL", "FLUSHDB", "CONFIG GET *", "CONFIG SET dir /tmp", "KEYS *", "SCAN 0", "RANDOMKEY", "DBSIZE",
        "MONITOR", "ACL LIST", "ACL WHOAMI", "ACL SETUSER me on nopass", "SHUTDOWN", "DEBUG SLEEP 0",
        "REPLICAOF NO ONE", "MODULE LIST", "CLIENT LIST", "CLIENT KILL TYPE normal", "SAVE", "BGREWRITEAOF",
        "SUBSCRIBE x", "PUBLISH x y", "SWAPDB 0 1", "SCRIPT FLUSH", "SCRIPT KILL", "FUNCTION LIST", "FUNCTION FLUSH",
        "FCALL f 0", "MULTI", "LATENCY RESET", "SLOWLOG GET", "CLUSTER NODES", "WAITAOF 1 0 1", "RESTORE {k} 0 x",
        "EVAL return(1) 0", "DUMP {k}", "MIGRATE h 1 {k} 0 1", "SORT {k}", "OBJECT ENCODING {k}", "MOVE {k} 1",
    ],
)  # fmt: skip
def test_commands_that_the_topic_has_no_use_for_are_refused(client, topic, command):
    with pytest.raises(redis.RedisError, match=REFUSED):
        client.execute_command(*command.replace("{k}", Keys(topic).counters).split())


@pytest.mark.parametrize(
    "call",
    [
        "'FLUSHALL'", "'FLUSHDB'", "'CONFIG','GET','*'", "'KEYS','*'", "'SCAN','0'", "'ACL','WHOAMI'",
        "'PUBLISH','x','y'",
        "'EVAL','return 1','0'", "'SCRIPT','FLUSH'", "'FUNCTION','LIST'", "'FCALL','f','0'", "'DEBUG','SLEEP','0'",
        "'GET','other'", "'SET','pd:{other:0}:body:x','1'", "'XADD','pd:{other:0}:queue','*','id','x'",
        "'RENAME',KEYS[1],'pd:{other:0}:x'", "'SWAPDB','0','1'", "'REPLICAOF','NO','ONE'", "'MODULE','LIST'",
    ],
)  # fmt: skip
@pytest.mark.parametrize("how", ["call", "pcall"])
def test_scripts_can_do_no_more_than_who_loads_them(client, topic, call, how):
    client.set(Keys(topic).body("x"), "1")
    loaded = client.execute_command("SCRIPT LOAD", f"return redis.{how}({call})")
    with pytest.raises(redis.RedisError, match=REFUSED):
        client.execute_command("EVALSHA", loaded, "1", Keys(topic).body("x"))


@pytest.mark.parametrize(
    "lua",
    [
        "return os.execute('true')", "return io.open('/etc/passwd')", "return loadstring('return 1')().x.y",
        "return require('os')", "return package.loadlib('libc.so.6','system')", "return dofile('/etc/passwd')",
        "redis.setresp = nil; return 1", "_G.leak = 1; return 1", "leak = 1; return 1",
    ],
)  # fmt: skip
def test_scripts_do_not_get_out_of_their_box(client, lua):
    loaded = client.execute_command("SCRIPT LOAD", lua)
    with pytest.raises(redis.ResponseError, match=r"(?i)nil value|global|readonly|attempt to|script"):
        client.execute_command("EVALSHA", loaded, "0")


def test_keys_of_other_topics_are_out_of_reach_also_of_those_whose_name_begins_alike(client, topic):
    for key in (
        f"pd:{{{topic}2:0}}:queue", f"pd:{{{topic}:a:0}}:queue", f"pd:{{{topic}:0000}}:queue", f"pd:{{{topic}:0}}",
        f"pd:{{{topic}}}:queue", "queue",
    ):  # fmt: skip
        with pytest.raises(redis.exceptions.NoPermissionError):
            client.hset(key, "a", "1")
    for shard in (0, 9, 10, 255):
        assert client.hset(Keys(topic, shard).counters, "a", "1") == 1
        client.unlink(Keys(topic, shard).counters)


def test_wrong_password_and_switched_off_default_user_stay_outside(every_redis_server, user):
    for name, password in ((user, "another"), (user, ""), ("nobody", PASSWORD)):
        with (
            every_redis_server.client(username=name, password=password) as client,
            pytest.raises(redis.AuthenticationError),
        ):
            client.ping()


def test_rules_hold_no_more_than_what_is_used_or_shows_things():
    used = {"|".join(words).lower() for words in used_commands()}
    # What clients send by themselves, and what is asked with another function than the pattern of the search sees.
    used |= {"ping", "select", "info", "wait", "script|load"}
    assert set(COMMANDS) - used == set()
    assert used - {*COMMANDS, *LOOKING} == set()


@pytest.mark.parametrize(
    ("name", "kind"), [("users.acl", "redis"), ("users-cluster.acl", "cluster"), ("users-sentinel.acl", "sentinel")]
)
def test_files_in_conf_are_what_the_verb_prints(name, kind):
    run = CliRunner().invoke(acl_verb, ["default", "--server-kind", kind])
    assert run.exit_code == 0
    assert run.stdout == (ROOT / "conf" / name).read_text()
    assert "change-me: change it" in run.stderr


def test_password_is_printed_as_a_hash_alone():
    run = CliRunner().invoke(acl_verb, ["chat", "--user", "me", "--user-password", "hunter2", "--format", "setuser"])
    assert run.exit_code == 0 and run.output.startswith("ACL SETUSER me reset on #f52fbd32b2b3b86ff88ef6c490628285f48")
    assert "hunter2" not in run.output and "change-me" not in run.output


async def test_on_a_cluster_and_behind_sentinels_the_rules_suffice_too(topic):
    try:
        program = any_program()
    except LookupError as exc:
        missing(str(exc))
    own = {"scheduler_topic": topic, "scheduler_password": PASSWORD, "scheduler_username": f"user-{topic}"}
    with Cluster(program, topic=topic) as cluster:
        users = [grant(node, topic, "cluster") for node in cluster.nodes]
        await serve(cluster, own)
        assert [denials(node, user) for node, user in zip(cluster.nodes, users, strict=True)] == [[]] * 4
    with SentinelTrio(program) as trio:
        user = grant(trio.master, topic)
        for sentinel in trio.sentinels:
            grant(sentinel, topic, "sentinel")
        sentinels = {"scheduler_sentinel_username": user, "scheduler_sentinel_password": PASSWORD}
        await serve(trio, {**own, **sentinels})
        assert denials(trio.master, user) == []


async def serve(rig: Cluster | SentinelTrio, fields: dict[str, Any]) -> None:
    settings = SchedulerSettings(**{**rig.settings_fields(), **fields}, scheduler_shards=2)
    async with ToyInstance(settings, Role.MIXED, "m0"), FrontEnd(settings) as frontend:
        request = request_of("r0")
        assert await tokens_of(await frontend.submit(request)) == toy_answer(request)


@pytest.mark.parametrize("kind", ["redis", "cluster", "sentinel"])
def test_file_and_command_say_the_same(kind):
    file, line = acl_file("t", "u", kind, "p"), acl_command("t", "u", kind, "p")
    assert file.splitlines()[1].removeprefix("user u ") == line.strip().removeprefix("ACL SETUSER u reset ")
