"""A server that cannot carry the queue is refused at start, in a paragraph that names value and remedy."""

from __future__ import annotations

import socket

import msgpack
import pytest

from splitwise_sched.embedded import EmbeddedServer
from splitwise_sched.errors import ConfigError, RequestFailed, StoreUnavailable, StoreUnsuitable
from splitwise_sched.frontend import FrontEnd
from splitwise_sched.settings import SchedulerSettings
from splitwise_sched.suitability import check_server
from splitwise_sched.types import Request, Role
from tests.integration.toy import ToyInstance, settings_for, tokens_of, toy_answer, until


async def test_nobody_answers(topic):
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
        settings = SchedulerSettings(scheduler_host="127.0.0.1", scheduler_port=port, scheduler_topic=topic)
        with pytest.raises(
            StoreUnavailable, match=rf"no Redis or Valkey answers at 127.0.0.1:{port} .*--scheduler-port"
        ):
            await FrontEnd(settings).start()


async def test_wrong_password_and_missing_password(private_redis_server, topic):
    with private_redis_server.client() as client:
        client.config_set("requirepass", "right")
    for more in ({}, {"scheduler_password": "wrong"}):
        with pytest.raises(StoreUnsuitable, match=r"refuses access .*check --scheduler-password"):
            await FrontEnd(settings_for(private_redis_server, topic, **more)).start()
    async with FrontEnd(settings_for(private_redis_server, topic, scheduler_password="right")) as frontend:
        assert frontend.healthy


async def test_password_is_in_no_error_and_no_repr(private_redis_server, topic):
    with private_redis_server.client() as client:
        client.config_set("requirepass", "right")
    settings = settings_for(private_redis_server, topic, scheduler_password="hunter2")
    with pytest.raises(StoreUnsuitable) as refused:
        await FrontEnd(settings).start()
    assert "hunter2" not in f"{refused.value} {settings!r}"


async def test_server_that_may_evict(private_redis_server, topic):
    with private_redis_server.client() as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
    with pytest.raises(StoreUnsuitable, match=r"maxmemory-policy 'allkeys-lru'.*noeviction"):
        await FrontEnd(settings_for(private_redis_server, topic)).start()


@pytest.mark.parametrize("version", ["5.0.14", "6.0.16", "6.1.240", "0"])
def test_server_that_is_too_old(version):
    with pytest.raises(StoreUnsuitable, match=rf"is Redis {version}, but 6\.2\.0 or newer is needed"):
        check_server({"redis_version": version}, "h:1")


@pytest.mark.parametrize(
    ("info", "name"),
    [
        ({"redis_version": "6.2.0"}, "redis 6.2.0"),
        ({"redis_version": "7.2.4", "valkey_version": "9.1.2"}, "valkey 9.1.2"),
        ({"redis_version": "8.0.0"}, "redis 8.0.0"),
    ],
)
def test_server_that_will_do(info, name):
    assert check_server(info, "h:1") == name


async def test_library_does_not_guess_a_host(topic):
    with pytest.raises(ConfigError, match="scheduler_host is not set"):
        FrontEnd(SchedulerSettings(scheduler_topic=topic))


async def test_unix_socket_serves_as_a_host_does(tmp_path, topic):
    with EmbeddedServer(unix_socket=tmp_path / "redis.sock") as server:
        settings = SchedulerSettings(
            scheduler_host=str(tmp_path / "redis.sock"), scheduler_port=1, scheduler_topic=topic
        )
        async with FrontEnd(settings) as frontend, ToyInstance(settings, Role.MIXED, "m0"):
            request = Request("r0", "toy", (1, 2))
            assert await tokens_of(await frontend.submit(request)) == toy_answer(request)
        assert server.port
        missing = settings.model_copy(update={"scheduler_host": str(tmp_path / "nothing.sock")})
        with pytest.raises(StoreUnavailable, match=r"no Redis or Valkey answers at .*nothing.sock"):
            await FrontEnd(missing).start()


async def test_entries_of_the_queue_that_are_not_ours_are_removed_and_hurt_nobody(redis_server, topic):
    settings = settings_for(redis_server, topic)
    async with FrontEnd(settings) as frontend:
        queue = frontend.store.keys.queue
        for fields in (("x", "y"), ("id", "r0"), ("id", "r0", "epoch", "soon"), ("id", "ghost", "epoch", "1")):
            await frontend.store.call("XADD", queue, "*", *fields)
        async with ToyInstance(settings, Role.MIXED, "m0"):
            request = Request("r0", "toy", (1, 2))
            assert await tokens_of(await frontend.submit(request)) == toy_answer(request)

            async def empty() -> bool:
                return await frontend.store.queue_depth() == 0

            await until(empty)


async def test_body_of_another_version_ends_its_request_with_the_reason_and_hurts_nobody(redis_server, topic):
    settings = settings_for(redis_server, topic)
    async with FrontEnd(settings) as frontend:
        streams = [await frontend.submit(Request(f"r{i}", "toy", (1, 2))) for i in range(3)]
        for i, body in ((0, msgpack.packb({"v": 99})), (1, b"\xc1 no msgpack")):
            await frontend.store.call("SET", frontend.store.keys.body(f"r{i}"), body)
        async with ToyInstance(settings, Role.MIXED, "m0"):
            for i, reason in ((0, "version 99, this process reads"), (1, "not readable msgpack")):
                with pytest.raises(RequestFailed, match=reason):
                    [output async for output in streams[i]]
            assert await tokens_of(streams[2]) == toy_answer(streams[2].request)
        dead = await frontend.store.call("XRANGE", frontend.store.keys.dead_letter, "-", "+")
        assert len(dead) == 2 and "version 99" in str(dead)
