"""Passwords are told to servers and to nobody else: not in a log at any level, an error, a traceback or a repr."""

from __future__ import annotations

import logging
import traceback
from typing import Any

import pytest

from splitwise_sched.connection import Connection
from splitwise_sched.errors import SplitwiseError
from splitwise_sched.frontend import FrontEnd
from splitwise_sched.settings import SchedulerSettings
from splitwise_sched.types import Role
from tests.integration.toy import ToyInstance, request_of, settings_for, tokens_of, toy_answer

SECRET = "hunter2hunter2"


def shown_of(settings: SchedulerSettings) -> str:
    """What people and programs see of settings, and of what is made with them."""
    connection = Connection(settings)
    objects = (settings, connection, connection._servers, connection._lane, connection._lane.link)
    texts = [repr(o) + str(o) for o in objects]
    return "".join([*texts, str(settings.model_dump()), settings.model_dump_json(), connection.address])


async def told_by(settings: SchedulerSettings) -> str:
    """The error of a start, with everything that led to it."""
    with pytest.raises(SplitwiseError) as failed:
        await FrontEnd(settings).start()
    return "".join(traceback.format_exception(failed.value)) + repr(failed.value.__cause__)


@pytest.mark.parametrize(
    "named",
    [
        {"scheduler_host": "127.0.0.1", "scheduler_port": 1},
        {"scheduler_sentinels": ("127.0.0.1:1",), "scheduler_sentinel_service": "x"},
        {"scheduler_cluster_nodes": ("127.0.0.1:1",)},
    ],
)
async def test_nobody_there_and_no_secret_told(named: dict[str, Any], caplog):
    caplog.set_level(logging.DEBUG)
    secrets = {"scheduler_password": SECRET, "scheduler_sentinel_password": SECRET, "scheduler_username": "somebody"}
    settings = SchedulerSettings(**named, **secrets)
    assert SECRET not in await told_by(settings) + shown_of(settings) + caplog.text


async def test_wrong_and_right_password_and_a_server_that_dies_and_no_secret_told(private_redis_server, topic, caplog):
    caplog.set_level(logging.DEBUG)
    private_redis_server.ask("ACL", "SETUSER", "somebody", "on", f">{SECRET}", "~*", "&*", "+@all")
    own = {"scheduler_username": "somebody", "redis_timeout_s": 1}
    wrong = settings_for(private_redis_server, topic, **own, scheduler_password=f"not {SECRET}")
    assert SECRET not in await told_by(wrong) + shown_of(wrong)
    settings = settings_for(private_redis_server, topic, **own, scheduler_password=SECRET)
    async with ToyInstance(settings, Role.MIXED, "m0"), FrontEnd(settings) as frontend:
        request = request_of("r0")
        assert await tokens_of(await frontend.submit(request)) == toy_answer(request)
        private_redis_server.kill()
        with pytest.raises(SplitwiseError) as failed:
            await frontend.submit(request_of("r1"))
        assert SECRET not in "".join(traceback.format_exception(failed.value))
    assert caplog.text
    assert SECRET not in caplog.text
