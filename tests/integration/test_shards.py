"""A topic of several shards: on one server and on a Cluster's nodes, with instances that find their places."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from splitwise_sched.errors import DuplicateRequest, IncompatibleInstance, NoShardLeft, RequestFailed, UnknownModel
from splitwise_sched.frontend import FrontEnd
from splitwise_sched.placement import take_census
from splitwise_sched.records import LeaseLost
from splitwise_sched.settings import SchedulerSettings
from splitwise_sched.types import FinishReason, Role
from tests.conftest import missing
from tests.integration.toy import ToyInstance, request_of, settings_for, tokens_of, toy_answer, until
from tests.redis_rigs import Cluster, any_program, slot_of


def sharded(server, topic: str, shards: int = 2, **more: object) -> SchedulerSettings:
    return settings_for(server, topic, scheduler_shards=shards, **more)


def roles_of(*instances: ToyInstance) -> list[list[str]]:
    """[num_shards that are used] roles of the instances in each, sorted."""
    by_shard: dict[int, list[str]] = {}
    for instance in instances:
        by_shard.setdefault(instance.session.shard, []).append(instance._role.value)
    return [sorted(roles) for _, roles in sorted(by_shard.items())]


def kill(instance: ToyInstance) -> None:
    """As SIGKILL would: nothing of it runs on, and its lease lapses."""
    instance.vanish_now()
    session = instance.session
    for task in (*session._tasks, session._supervisor, session._sweeping):
        if task is not None:
            task.cancel()


async def looked(frontend: FrontEnd, *serving: int) -> None:
    """Until the front end knows which shards serve."""
    await until(lambda: [s.index for s in frontend.shards if s.unserved_since is None] == list(serving))


async def test_instances_that_start_together_leave_no_shard_with_half_a_pair(redis_server, topic):
    settings = sharded(redis_server, topic, shards=3)
    instances = [
        ToyInstance(settings, role, f"{role.value}{i}") for i in range(3) for role in (Role.PREFILL, Role.DECODE)
    ]
    async with AsyncExitStack() as stack:
        await asyncio.gather(*(stack.enter_async_context(instance) for instance in instances))
        assert roles_of(*instances) == [["decode", "prefill"]] * 3
        # A restart brings an instance back to where it is missed.
        gone = instances[2]
        await gone.stop()
        async with ToyInstance(settings, gone._role, "another-name") as successor:
            assert successor.session.shard == gone.session.shard


async def test_requests_are_spread_over_the_shards_and_each_is_found_again(redis_server, topic):
    settings = sharded(redis_server, topic)
    async with (
        ToyInstance(settings, Role.MIXED, "m0") as one,
        ToyInstance(settings, Role.MIXED, "m1") as other,
        FrontEnd(settings) as frontend,
        FrontEnd(settings) as stranger,
    ):
        assert {one.session.shard, other.session.shard} == {0, 1}
        await looked(frontend, 0, 1)
        requests = [request_of(f"r{i}", max_tokens=1 + i % 9) for i in range(80)]
        streams = [await frontend.submit(request) for request in requests]
        sizes = [[s.shard for s in streams].count(shard) for shard in (0, 1)]
        assert min(sizes) >= 20, sizes
        assert [await tokens_of(s) for s in streams] == [toy_answer(r) for r in requests]
        assert {r.name for r in await frontend.instances()} == {"m0", "m1"}
        for instance in (one, other):
            mine = next(s for s in streams if s.shard == instance.session.shard)
            for asking in (frontend, stranger):
                record = await asking.request_record(mine.request_id)
                assert record["decode"] == instance.session.instance_id
        assert await stranger.request_record("nobody") == {}


async def test_cancel_reaches_the_shard_that_has_the_request_from_whichever_front_end(redis_server, topic):
    settings = sharded(redis_server, topic)
    async with FrontEnd(settings) as frontend, FrontEnd(settings) as stranger:
        streams = [await frontend.submit(request_of(f"r{i}")) for i in range(4)]
        with pytest.raises(DuplicateRequest):
            await frontend.submit(request_of("r1"))
        assert await frontend.cancel("r0") and await stranger.cancel("r1")
        assert not await stranger.cancel("nobody")
        for stream in streams[:2]:
            assert [o async for o in stream][-1].finish_reason is FinishReason.CANCELLED
        states = [(await frontend.request_record(f"r{i}"))["state"] for i in range(4)]
        assert states == ["cancelled", "cancelled", "queued", "queued"]


async def test_a_preferred_instance_is_found_in_its_shard(redis_server, topic):
    settings = sharded(redis_server, topic, shards=3, preferred_wait_ms=60_000)
    async with AsyncExitStack() as stack:
        for i in range(3):
            await stack.enter_async_context(ToyInstance(settings, Role.MIXED, f"m{i}"))
        frontend = await stack.enter_async_context(FrontEnd(settings))
        await looked(frontend, 0, 1, 2)
        for i in range(12):
            request = request_of(f"r{i}", prefer=(f"m{i % 3}",))
            assert await tokens_of(await frontend.submit(request)) == toy_answer(request)
            record = await frontend.request_record(request.request_id)
            assert record["prefill"].startswith(f"m{i % 3}-")


async def test_an_instance_serves_the_shard_that_it_was_told_to(redis_server, topic):
    settings = sharded(redis_server, topic, shards=4)
    told = settings.model_copy(update={"scheduler_shard": 2})
    async with ToyInstance(told, Role.MIXED, "m0") as one, ToyInstance(told, Role.MIXED, "m1") as other:
        assert one.session.shard == other.session.shard == 2
        async with FrontEnd(settings) as frontend:
            await looked(frontend, 2)
            request = request_of("r0")
            stream = await frontend.submit(request)
            assert stream.shard == 2
            assert await tokens_of(stream) == toy_answer(request)


async def test_models_of_a_topic_have_shards_of_their_own_and_requests_go_by_model(redis_server, topic):
    settings = sharded(redis_server, topic, shards=3)
    async with (
        ToyInstance(settings, Role.PREFILL, "p0") as one,
        ToyInstance(settings, Role.PREFILL, "p1", model="other") as other,
        ToyInstance(settings, Role.DECODE, "d1", model="other") as other_decode,
        ToyInstance(settings, Role.DECODE, "d0") as one_decode,
        FrontEnd(settings) as frontend,
    ):
        assert one.session.shard == one_decode.session.shard != other.session.shard == other_decode.session.shard
        await looked(frontend, *sorted({one.session.shard, other.session.shard}))
        requests = [request_of(f"r{i}", model=("toy", "other")[i % 2]) for i in range(20)]
        streams = [await frontend.submit(request) for request in requests]
        assert [await tokens_of(s) for s in streams] == [toy_answer(r) for r in requests]
        for request in requests:
            record = await frontend.request_record(request.request_id)
            number = "0" if request.model == "toy" else "1"
            assert (record["prefill"][:2], record["decode"][:2]) == (f"p{number}", f"d{number}")
        with pytest.raises(UnknownModel, match="no model 'third' here; served are: other, toy"):
            await frontend.submit(request_of("unknown", model="third"))
        assert await frontend.request_record("unknown") == {}


async def test_engines_of_one_model_share_its_requests_and_never_form_a_pair(redis_server, topic):
    settings = sharded(redis_server, topic)
    async with AsyncExitStack() as stack:
        for role in (Role.PREFILL, Role.DECODE):
            for engine in ("b", "a") if role is Role.DECODE else ("a", "b"):
                name, layout = f"{engine}-{role.value}", {"kv.engine": engine}
                await stack.enter_async_context(ToyInstance(settings, role, name, must_match=layout))
        frontend = await stack.enter_async_context(FrontEnd(settings))
        await looked(frontend, 0, 1)
        requests = [request_of(f"r{i}") for i in range(40)]
        streams = [await frontend.submit(request) for request in requests]
        assert [await tokens_of(s) for s in streams] == [toy_answer(r) for r in requests]
        records = [await frontend.request_record(r.request_id) for r in requests]
        assert {(r["prefill"][0], r["decode"][0]) for r in records} == {("a", "a"), ("b", "b")}


async def test_instance_for_which_no_shard_is_left_is_refused_with_what_they_have(redis_server, topic):
    settings = sharded(redis_server, topic)
    async with ToyInstance(settings, Role.MIXED, "m0"), ToyInstance(settings, Role.MIXED, "m1", model="other"):
        with pytest.raises(NoShardLeft, match=r"serves 'third'.*'toy', model 'toy'.*--scheduler-shards") as refused:
            await ToyInstance(settings, Role.MIXED, "m2", model="third").session.start()
        assert len(refused.value.kinds) == 2
        with pytest.raises(NoShardLeft, match=r"kv\.dtype 'float32'"):
            await ToyInstance(settings, Role.MIXED, "m2", must_match={"kv.dtype": "int8"}).session.start()
        told = settings.model_copy(update={"scheduler_shard": 0})
        with pytest.raises(IncompatibleInstance, match="model 'third'"):
            await ToyInstance(told, Role.MIXED, "m2", model="third").session.start()


async def test_requests_in_a_shard_that_another_model_has_taken_go_on_where_theirs_is_served(redis_server, topic):
    settings = sharded(redis_server, topic, instance_lease_s=10)
    mine = [settings.model_copy(update={"scheduler_shard": shard}) for shard in (0, 1)]
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(ToyInstance(mine[0], Role.MIXED, "m0"))
        leaving = await stack.enter_async_context(ToyInstance(mine[1], Role.MIXED, "m1", room=0))
        frontend = await stack.enter_async_context(FrontEnd(settings))
        await looked(frontend, 0, 1)
        requests = [request_of(f"r{i}") for i in range(12)]
        streams = [await frontend.submit(request) for request in requests]
        stranded = [s.request_id for s in streams if s.shard == 1]
        assert stranded
        await leaving.stop()
        await stack.enter_async_context(ToyInstance(mine[1], Role.MIXED, "m2", model="other"))
        assert [await tokens_of(s) for s in streams] == [toy_answer(r) for r in requests]
        assert {s.shard for s in streams} == {0}
        for request_id in stranded:
            assert (await frontend.request_record(request_id))["decode"].startswith("m0-")


async def test_request_whose_model_is_gone_ends_with_what_is_served_when_another_takes_its_shard(redis_server, topic):
    settings = sharded(redis_server, topic, instance_lease_s=10)
    told = settings.model_copy(update={"scheduler_shard": 1})
    async with FrontEnd(settings) as frontend:
        async with ToyInstance(told, Role.MIXED, "m1", room=0):
            await looked(frontend, 1)
            stream = await frontend.submit(request_of("r0"))
        async with ToyInstance(told, Role.MIXED, "m2", model="other"):
            with pytest.raises(RequestFailed, match="no model 'toy' here; served are: other"):
                await tokens_of(stream)


async def test_request_for_another_model_is_refused_by_the_instance_that_gets_it(redis_server, topic):
    settings = settings_for(redis_server, topic)
    async with (
        ToyInstance(settings, Role.PREFILL, "p0") as prefill,
        ToyInstance(settings, Role.DECODE, "d0"),
        FrontEnd(settings) as frontend,
    ):
        with pytest.raises(RequestFailed, match="no model 'other' here; served are: toy"):
            await tokens_of(await frontend.submit(request_of("r0", model="other")))
        assert not prefill.events
        assert (await frontend.request_record("r0"))["state"] == "failed"


async def test_an_instance_that_is_left_alone_goes_where_it_is_of_use(redis_server, topic):
    settings = sharded(redis_server, topic, instance_lease_s=1.0)
    async with (
        ToyInstance(settings, Role.PREFILL, "p0") as kept,
        ToyInstance(settings, Role.DECODE, "d0") as pair,
        ToyInstance(settings, Role.PREFILL, "p1") as lonely,
    ):
        assert kept.session.shard == pair.session.shard != lonely.session.shard
        await lonely.wait_for(LeaseLost)
        assert lonely.session.shard == kept.session.shard
        assert not [e for e in kept.events if isinstance(e, LeaseLost)]
        census = await take_census(settings)
        assert sorted(len(records) for records in census) == [0, 3]


async def test_requests_of_a_shard_that_nobody_serves_any_more_go_on_in_another(redis_server, topic):
    settings = sharded(redis_server, topic, instance_lease_s=0.3)
    mine = [settings.model_copy(update={"scheduler_shard": shard}) for shard in (0, 1)]
    async with ToyInstance(mine[0], Role.MIXED, "m0", pause_s=0.02), FrontEnd(settings) as frontend:
        async with ToyInstance(mine[1], Role.MIXED, "m1", pause_s=0.02) as dying:
            await looked(frontend, 0, 1)
            requests = [request_of(f"r{i}", max_tokens=30) for i in range(12)]
            streams = [await frontend.submit(request) for request in requests]
            stranded = [s for s in streams if s.shard == 1]
            assert stranded
            first = await anext(stranded[0])
            # Some are running there, some wait.
            kill(dying)
            answers = await asyncio.gather(*(tokens_of(s) for s in streams if s is not stranded[0]))
            assert answers == [toy_answer(s.request) for s in streams if s is not stranded[0]]
            rest = [token async for output in stranded[0] for token in output.token_ids]
            assert [*first.token_ids, *rest] == toy_answer(stranded[0].request)
            assert all(s.shard == 0 for s in stranded)
        # The shard that they left has ended them too.
        store = frontend.shards[1].store
        states = {state for state, _ in filter(None, await store.request_states([s.request_id for s in stranded]))}
        assert states == {"cancelled"}


async def test_shards_lie_on_the_nodes_of_a_cluster_and_one_that_fails_does_not_stop_the_others(topic):
    try:
        program = any_program()
    except LookupError as exc:
        missing(str(exc))
    with Cluster(program, topic=topic) as cluster:
        # As many shards as it takes for every node to have one.
        owners = [cluster.master_of(slot_of(topic, i)).port for i in range(32)]
        shards = next(n for n in range(3, 32) if len(set(owners[:n])) == 3)
        settings = SchedulerSettings(
            scheduler_topic=topic, scheduler_shards=shards, redis_timeout_s=30, **cluster.settings_fields()
        )
        async with AsyncExitStack() as stack:
            for i in range(shards):
                fixed = settings.model_copy(update={"scheduler_shard": i})
                await stack.enter_async_context(ToyInstance(fixed, Role.MIXED, f"m{i}"))
            frontend = await stack.enter_async_context(FrontEnd(settings))
            await looked(frontend, *range(shards))
            before = [await frontend.submit(request_of(f"before{i}")) for i in range(8 * shards)]
            assert {s.shard for s in before} == set(range(shards))
            assert [await tokens_of(s) for s in before] == [toy_answer(s.request) for s in before]
            failing = slot_of(topic)
            old = await asyncio.to_thread(cluster.kill_master_of, failing)
            others = [i for i in range(shards) if owners[i] != owners[0]]
            during = [await asyncio.wait_for(frontend.shards[i].store.depth(), 20) for i in others]
            assert len(during) == len(others)
            await asyncio.to_thread(cluster.wait_for_new_master, failing, old)
            after = [await frontend.submit(request_of(f"after{i}")) for i in range(8 * shards)]
            assert [await tokens_of(s) for s in after] == [toy_answer(s.request) for s in after]
