"""A master that dies, a replica that takes its place, a slot that moves: requests go on to their exact end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from splitwise_sched.discovery import servers_of
from splitwise_sched.errors import SplitwiseError, StoreUnavailable, StoreUnsuitable
from splitwise_sched.frontend import FrontEnd
from splitwise_sched.keys import Keys
from splitwise_sched.records import DecodeAssigned
from splitwise_sched.settings import SchedulerSettings
from splitwise_sched.store import Store
from splitwise_sched.types import FinishReason, Role
from tests.conftest import missing
from tests.integration.toy import ToyInstance, request_of, tokens_of, toy_answer, until
from tests.redis_rigs import Cluster, SentinelTrio, any_program, slot_of, wait_until
from tests.sharing import Shared

TOPIC = "ha"


@pytest.fixture(scope="module")
def program() -> str:
    try:
        return any_program()
    except LookupError as exc:
        missing(str(exc))


@pytest.fixture(scope="module")
def trios(program: str) -> Iterator[Shared[SentinelTrio]]:
    with Shared(lambda: SentinelTrio(program)) as shared:
        yield shared


@pytest.fixture(scope="module")
def clusters(program: str) -> Iterator[Shared[Cluster]]:
    with Shared(lambda: Cluster(program, topic=TOPIC)) as shared:
        yield shared


@pytest.fixture
def trio(trios: Shared[SentinelTrio], request: pytest.FixtureRequest) -> Iterator[SentinelTrio]:
    yield from trios.lend(request)


@pytest.fixture
def cluster(clusters: Shared[Cluster], request: pytest.FixtureRequest) -> Iterator[Cluster]:
    yield from clusters.lend(request)


@pytest.fixture(params=["sentinel", "cluster"])
def rig(request: pytest.FixtureRequest) -> SentinelTrio | Cluster:
    fixture = {"sentinel": "trio", "cluster": "cluster"}[request.param]
    found: SentinelTrio | Cluster = request.getfixturevalue(fixture)
    return found


def settings_of(rig: SentinelTrio | Cluster, **more: Any) -> SchedulerSettings:
    # What waits for a new master to be found does so within the timeout.
    fields = {"scheduler_topic": TOPIC, "redis_timeout_s": 60, **rig.settings_fields(), **more}
    return SchedulerSettings(**fields)


class Load:
    """Requests one after another, each compared with its right answer, until ``stop``."""

    def __init__(self, frontend: FrontEnd, tag: str) -> None:
        self._frontend = frontend
        self._tag = tag
        self._stopped = asyncio.Event()
        self._tasks: list[asyncio.Task[bool]] = []
        self._num_done = 0

    async def run(self) -> None:
        while not self._stopped.is_set():
            self._tasks.append(asyncio.create_task(self._one(len(self._tasks))))
            await asyncio.sleep(0.02)

    async def _one(self, number: int) -> bool:
        request = request_of(f"{self._tag}-{number}", max_tokens=4)
        is_right = await tokens_of(await self._frontend.submit(request)) == toy_answer(request)
        self._num_done += 1
        return is_right

    async def more(self, count: int) -> None:
        """Until so many more have come to their end."""
        wanted = self._num_done + count
        await until(lambda: self._num_done >= wanted, 90)

    async def results(self) -> list[Any]:
        self._stopped.set()
        return list(await asyncio.wait_for(asyncio.gather(*self._tasks, return_exceptions=True), 90))


@asynccontextmanager
async def load_on(settings: SchedulerSettings, tag: str) -> AsyncIterator[Load]:
    """Load on a front end and a pair of instances; when it ends, every answer was right, and nothing is left over."""
    async with (
        ToyInstance(settings, Role.PREFILL, "p0"),
        ToyInstance(settings, Role.DECODE, "d0"),
        FrontEnd(settings) as frontend,
    ):
        load = Load(frontend, tag)
        running = asyncio.create_task(load.run())
        await load.more(5)
        yield load
        await load.more(20)
        results = await load.results()
        await running
        assert results == [True] * len(results)

        async def empty() -> bool:
            reserved = {r.reserved_tokens for r in await frontend.store.live_instances()}
            return reserved == {0} and await frontend.store.queue_depth() == 0

        await until(empty)


async def test_requests_survive_the_death_of_the_master_and_its_coming_back(rig):
    async with load_on(settings_of(rig), "killed") as load:
        if isinstance(rig, SentinelTrio):
            old = await asyncio.to_thread(rig.kill_master)
            await asyncio.to_thread(rig.wait_for_new_master, old)
        else:
            old = await asyncio.to_thread(rig.kill_master_of, slot_of(TOPIC))
            await asyncio.to_thread(rig.wait_for_new_master, slot_of(TOPIC), old)
        await load.more(20)
        await asyncio.to_thread(rig.bring_back, old)


async def test_requests_survive_an_ordered_failover(rig):
    async with load_on(settings_of(rig), "ordered"):
        if isinstance(rig, SentinelTrio):
            await asyncio.to_thread(lambda: rig.failover(in_sync=False))
        else:
            await asyncio.to_thread(rig.failover, slot_of(TOPIC))


async def test_requests_survive_the_slots_going_to_another_node_key_by_key(cluster):
    async with load_on(settings_of(cluster), "moved") as load:
        migration = cluster.migration(slot_of(TOPIC))
        await asyncio.to_thread(migration.begin)
        # Half of them, then the rest, while all sides go on asking.
        await asyncio.to_thread(migration.move, 5)
        await asyncio.sleep(0.3)
        while await asyncio.to_thread(migration.move, 20):
            pass
        await asyncio.to_thread(migration.finish)
        await load.more(20)
    # Its first node has the replica that the other tests are about.
    cluster.migrate(slot_of(TOPIC), migration.source)


async def test_a_script_does_nothing_at_all_while_its_slot_is_in_two_places(cluster):
    settings = settings_of(cluster)
    # Commands go in order, so that what is asked meanwhile needs a connection of its own.
    onlooker = Store(settings)
    async with FrontEnd(settings) as frontend:
        done = await frontend.submit(request_of("whole"))
        counters = await onlooker.counters()
        migration = cluster.migration(slot_of(TOPIC))
        await asyncio.to_thread(migration.begin)
        await asyncio.to_thread(migration.move, 3)
        cancelling = asyncio.create_task(frontend.cancel("whole", "for a test"))
        submitting = asyncio.create_task(frontend.submit(request_of("halved")))
        # Commands on single keys are answered from where each key is.
        for _ in range(20):
            assert await onlooker.request_states(["whole", "halved"]) == [("queued", 1), None]
            assert await onlooker.counters() == counters
        assert not cancelling.done() and not submitting.done()
        while await asyncio.to_thread(migration.move, 20):
            pass
        await asyncio.to_thread(migration.finish)
        assert await asyncio.wait_for(cancelling, 20)
        await asyncio.wait_for(submitting, 20)
        assert [o.finish_reason for o in [o async for o in done]][-1] is FinishReason.CANCELLED
        after = await onlooker.counters()
        await onlooker.close()
        assert int(after["submitted"]) == int(counters["submitted"]) + 1
        assert int(after["cancelled"]) == int(counters.get("cancelled", 0)) + 1
    cluster.migrate(slot_of(TOPIC), migration.source)


async def test_a_script_does_not_stop_halfway_at_a_key_that_has_left(cluster):
    settings = settings_of(cluster)
    onlooker = Store(settings)
    async with (
        ToyInstance(settings, Role.PREFILL, "p0"),
        ToyInstance(settings, Role.DECODE, "d0") as decode,
        FrontEnd(settings) as frontend,
    ):
        decode.gate.clear()
        stream = await frontend.submit(request_of("held"))
        await decode.wait_for(DecodeAssigned)
        keys, instance_id = onlooker.keys, decode.session.instance_id
        migration = cluster.migration(slot_of(TOPIC))
        await asyncio.to_thread(migration.begin)
        # All that the script declares is where it was; what it comes to by what the record says is not.
        await asyncio.to_thread(migration.move_keys, [keys.inbox(instance_id)])
        held = await onlooker.request_record("held")
        cancelling = asyncio.create_task(frontend.cancel("held", "for a test"))
        for _ in range(20):
            record = await onlooker.request_record("held")
            assert {record[name] for name in ("state", "inbox_entry", "epoch")} == {
                held[name] for name in ("state", "inbox_entry", "epoch")
            }
            assert await onlooker.inbox_depth(instance_id) == 1
        while await asyncio.to_thread(migration.move, 20):
            pass
        await asyncio.to_thread(migration.finish)
        assert await asyncio.wait_for(cancelling, 20)
        assert [o async for o in stream][-1].finish_reason is FinishReason.CANCELLED
        assert await onlooker.inbox_depth(instance_id) == 0
        await onlooker.close()
    cluster.migrate(slot_of(TOPIC), migration.source)


async def test_a_process_that_starts_while_a_master_is_being_made_waits_for_it(rig):
    async with FrontEnd(settings_of(rig)):
        if isinstance(rig, SentinelTrio):
            old = await asyncio.to_thread(rig.kill_master)
        else:
            old = await asyncio.to_thread(rig.kill_master_of, slot_of(TOPIC))
        async with FrontEnd(settings_of(rig)) as frontend:
            assert frontend.healthy
        if isinstance(rig, SentinelTrio):
            await asyncio.to_thread(rig.wait_for_new_master, old)
        else:
            await asyncio.to_thread(rig.wait_for_new_master, slot_of(TOPIC), old)
        await asyncio.to_thread(rig.bring_back, old)


async def test_a_request_that_only_the_dead_master_had_is_put_back_by_its_front_end(trio):
    settings = settings_of(trio, durability="wait", durability_timeout_ms=50)
    async with FrontEnd(settings) as frontend:
        replica = trio.replica
        # The master has no password, and says so to who gives one: the replica follows no more.
        replica.ask("CONFIG", "SET", "masterauth", "wrong")
        replica.ask("CLIENT", "KILL", "TYPE", "master")
        wait_until(lambda: "master_link_status:down" in replica.ask("INFO", "replication"), "the link is cut")
        streams = [await frontend.submit(request_of(f"alone-{i}")) for i in range(3)]
        assert [stream.num_replicas for stream in streams] == [0, 0, 0]
        old = trio.kill_master()
        replica.ask("CONFIG", "SET", "masterauth", "")
        await asyncio.to_thread(trio.wait_for_new_master, old)
        async with ToyInstance(settings, Role.MIXED, "m0"):
            assert [await tokens_of(s) for s in streams] == [toy_answer(s.request) for s in streams]
        assert (await frontend.store.counters())["resubmitted"] == "3"
    await asyncio.to_thread(trio.bring_back, old)


async def test_a_master_that_was_replaced_without_knowing_it_is_left_at_its_first_refusal(program, topic):
    with SentinelTrio(program) as trio:
        old = trio.master
        # Nobody can tell it: the Sentinels' order to follow the new master is refused.
        old.ask("ACL", "SETUSER", "default", "-slaveof", "-replicaof")
        old.ask("CONFIG", "SET", "min-replicas-to-write", "1")
        async with FrontEnd(settings_of(trio, scheduler_topic=topic)) as frontend:
            streams = [await frontend.submit(request_of("before"))]
            with old.stalled():
                new = await asyncio.to_thread(trio.wait_for_new_master, old)
            async with ToyInstance(frontend.settings, Role.MIXED, "m0") as instance:
                streams.append(await frontend.submit(request_of("after")))
                assert [await tokens_of(s) for s in streams] == [toy_answer(s.request) for s in streams]
                assert new.ask("EXISTS", Keys(topic).instance(instance.session.instance_id))
            assert "role:master" in old.ask("INFO", "replication"), "it still takes itself for the master"


async def test_a_service_that_no_sentinel_watches_is_said_with_those_that_they_do(trio):
    settings = settings_of(trio, scheduler_sentinel_service="other")
    with pytest.raises(StoreUnavailable, match=r"'other' .*does not watch it.*what they watch: splitwise"):
        await FrontEnd(settings).start()


async def test_one_sentinel_that_answers_is_enough(trio):
    nobody = ("127.0.0.1:1", "127.0.0.1:2")
    async with FrontEnd(settings_of(trio, scheduler_sentinels=(*nobody, trio.sentinel_addresses[0]))) as frontend:
        assert frontend.healthy
    with pytest.raises(StoreUnavailable, match=r"127\.0\.0\.1:1: .*correct --scheduler-sentinels"):
        await FrontEnd(settings_of(trio, scheduler_sentinels=nobody)).start()


async def test_sentinels_with_a_password_are_told_it_and_it_is_in_no_error(program):
    lines = {"requirepass": "hunter2", "sentinel sentinel-pass": "hunter2"}
    # The rig's own client has to know it too, and the servers have none.
    with SentinelTrio(program, sentinel_options=lines, sentinel_client_options={"password": "hunter2"}) as trio:
        settings = settings_of(trio, scheduler_sentinel_password="hunter2")
        async with FrontEnd(settings) as frontend:
            assert frontend.healthy
        for wrong in (None, "hunter3"):
            with pytest.raises(StoreUnsuitable, match=r"Sentinels refuse access .*--scheduler-sentinel-password") as no:
                await FrontEnd(settings_of(trio, scheduler_sentinel_password=wrong)).start()
            assert "hunter" not in f"{no.value!r} {no.value.__cause__!r} {settings!r}"


async def test_password_of_a_cluster_and_of_a_master_behind_sentinels_is_asked_for(program, topic):
    options = {"requirepass": "right", "masterauth": "right"}
    with Cluster(program, topic=topic, options=options, client_options={"password": "right"}) as cluster:
        right = settings_of(cluster, scheduler_topic=topic, scheduler_password="right")
        async with FrontEnd(right) as frontend:
            assert frontend.healthy
        with pytest.raises(StoreUnsuitable, match=r"refuses access .*check --scheduler-password") as refused:
            await FrontEnd(settings_of(cluster, scheduler_topic=topic, scheduler_password="hunter2")).start()
        assert "hunter2" not in str(refused.value)


async def error_of(settings: SchedulerSettings) -> str:
    with pytest.raises(SplitwiseError) as refused:
        await FrontEnd(settings).start()
    return str(refused.value)


async def test_who_names_the_wrong_kind_of_server_is_told_which_flag_it_wants(trio, cluster, redis_server):
    sentinel = SchedulerSettings(scheduler_host="127.0.0.1", scheduler_port=trio.sentinels[0].port)
    assert "give it with --scheduler-sentinels" in await error_of(sentinel)
    node = cluster.nodes[0]
    as_host = SchedulerSettings(scheduler_host="127.0.0.1", scheduler_port=node.port)
    assert f"--scheduler-cluster-nodes 127.0.0.1:{node.port}" in await error_of(as_host)
    one = f"127.0.0.1:{redis_server.port}"
    assert "no node of a Cluster" in await error_of(SchedulerSettings(scheduler_cluster_nodes=(one,)))
    as_sentinel = SchedulerSettings(scheduler_sentinels=(one,), scheduler_sentinel_service="splitwise")
    assert "is no Sentinel" in await error_of(as_sentinel)


async def test_a_cluster_that_nobody_answers_for_is_said_with_its_nodes(topic):
    nodes = ("127.0.0.1:1", "127.0.0.1:2")
    said = await error_of(SchedulerSettings(scheduler_cluster_nodes=nodes, scheduler_topic=topic))
    assert all(node in said for node in nodes) and "correct --scheduler-cluster-nodes" in said


async def test_all_connections_that_break_together_find_the_master(trio):
    servers = servers_of(settings_of(trio), Keys(TOPIC))
    for _ in range(5):
        found = await asyncio.gather(*(servers.locate() for _ in range(10)))
        assert set(found) == {(trio.master.host, trio.master.port)}
