"""A server that cannot carry the queue is refused at start, in a paragraph that names value and remedy."""

from __future__ import annotations

import socket

import pytest

from splitwise_sched.connection import check_server
from splitwise_sched.errors import ConfigError, StoreUnavailable, StoreUnsuitable
from splitwise_sched.frontend import FrontEnd
from splitwise_sched.settings import SchedulerSettings
from tests.integration.toy import settings_for


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
        check_server({"redis_version": version}, "noeviction", "h:1")


@pytest.mark.parametrize(
    ("info", "name"),
    [
        ({"redis_version": "6.2.0"}, "redis 6.2.0"),
        ({"redis_version": "7.2.4", "valkey_version": "9.1.2"}, "valkey 9.1.2"),
        ({"redis_version": "8.0.0"}, "redis 8.0.0"),
    ],
)
def test_server_that_will_do(info, name):
    assert check_server(info, "noeviction", "h:1") == name


async def test_library_does_not_guess_a_host(topic):
    with pytest.raises(ConfigError, match="scheduler_host is not set"):
        FrontEnd(SchedulerSettings(scheduler_topic=topic))
