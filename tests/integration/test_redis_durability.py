"""``durability="wait"``: a submit counts when a replica has it; without one it is queued and said to be unconfirmed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator

import pytest

from splitwise_sched.frontend import FrontEnd
from splitwise_sched.settings import SchedulerSettings
from splitwise_sched.suitability import advice
from splitwise_sched.types import Role
from tests.conftest import missing
from tests.integration.toy import ToyInstance, request_of, settings_for, tokens_of, toy_answer
from tests.redis_rigs import HOST, RedisServer, any_program, wait_until


@pytest.fixture
def replicated() -> Iterator[tuple[RedisServer, RedisServer]]:
    """A master and its replica."""
    try:
        program = any_program()
    except LookupError as exc:
        missing(str(exc))
    with RedisServer(program) as master, RedisServer(program, {"replicaof": f"{HOST} {master.port}"}) as replica:
        wait_until(lambda: "master_link_status:up" in replica.ask("INFO", "replication"), "the replica is in sync")
        yield master, replica


async def test_submit_returns_when_a_replica_has_the_request(replicated, topic):
    master, replica = replicated
    async with FrontEnd(settings_for(master, topic, durability="wait", durability_timeout_ms=10_000)) as frontend:
        stream = await frontend.submit(request_of("r0"))
        keys = frontend.store.keys
        assert stream.num_replicas == 1
        assert frontend.num_unconfirmed == 0
        assert replica.ask("HGET", keys.request("r0"), "state") == "queued"
        with replica.client() as client:
            assert client.get(keys.body("r0")) == (await frontend.store.bodies(["r0"]))[0]


async def test_submit_that_no_replica_has_in_time_is_said_to_be_unconfirmed_and_is_served(replicated, topic, caplog):
    master, replica = replicated
    settings = settings_for(master, topic, durability="wait", durability_timeout_ms=50)
    async with FrontEnd(settings) as frontend, ToyInstance(settings, Role.MIXED, "m0"):
        with replica.stalled(), caplog.at_level(logging.WARNING):
            streams = [await frontend.submit(request_of(f"r{i}")) for i in range(3)]
            assert [s.num_replicas for s in streams] == [0, 0, 0]
            assert frontend.num_unconfirmed == 3
            assert [await tokens_of(s) for s in streams] == [toy_answer(s.request) for s in streams]
        # Said once, not for each of them.
        (said,) = [r.getMessage() for r in caplog.records if "queued on the master alone" in r.getMessage()]
        assert "r0" in said and "--durability-timeout-ms" in said


async def test_waiting_for_a_replica_does_not_hold_up_what_need_not_wait(replicated, topic):
    master, replica = replicated
    settings = settings_for(master, topic, durability="wait", durability_timeout_ms=60_000)
    async with FrontEnd(settings) as frontend:
        with replica.stalled():
            submitting = asyncio.create_task(frontend.submit(request_of("r0")))
            while not (await frontend.request_record("r0")):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            assert not submitting.done()
        assert (await submitting).num_replicas == 1


async def test_server_without_replica_is_pointed_out_at_start(redis_server, topic, caplog):
    settings = settings_for(redis_server, topic, durability="wait", durability_timeout_ms=20)
    with caplog.at_level(logging.WARNING):
        async with FrontEnd(settings):
            pass
    assert "--durability is 'wait', but the server" in caplog.text


@pytest.mark.parametrize(
    ("info", "said"),
    [
        ({"aof_enabled": "0"}, "appendonly yes"),
        ({"aof_enabled": "1", "aof_last_write_status": "err"}, "cannot write its append-only file"),
        ({"aof_enabled": "1", "connected_slaves": "1"}, "min-replicas-to-write 1"),
    ],
)
def test_advice_names_the_setting_to_change(info, said):
    (sentence,) = advice(info, "redis-1:6379", SchedulerSettings())
    assert said in sentence and "redis-1:6379" in sentence


@pytest.mark.parametrize(
    "info",
    [
        {"aof_enabled": "1", "aof_last_write_status": "ok", "connected_slaves": "0"},
        {"aof_enabled": "1", "connected_slaves": "2", "min_slaves_good_slaves": "2"},
        {"aof_enabled": "0", "config_file": ""},
    ],
)
def test_nothing_is_said_of_a_server_that_is_set_up_well_nor_of_one_that_nobody_set_up(info):
    assert advice(info, "127.0.0.1:6379", SchedulerSettings()) == []
