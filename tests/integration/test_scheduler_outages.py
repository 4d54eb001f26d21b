"""What the chaos harness found once, each by itself: Redis away at a deadline, back with other data, tasks that die."""

from __future__ import annotations

import asyncio

import pytest

from splitwise_sched import recovery, tasks
from splitwise_sched.codec import encode_request
from splitwise_sched.connection import BlockingReader
from splitwise_sched.errors import RequestFailed, StoreUnavailable
from splitwise_sched.frontend import FrontEnd
from splitwise_sched.intake import Intake
from splitwise_sched.records import LeaseLost, PrefillAssigned
from splitwise_sched.shards import Shard
from splitwise_sched.store import HELLO, Flow, Preference
from splitwise_sched.types import FinishReason, Request, Role
from tests.integration.toy import ToyInstance, request_of, settings_for, tokens_of, toy_answer, until, until_state


async def test_user_is_told_at_the_deadline_although_redis_is_away(private_redis_server, topic):
    server = private_redis_server
    async with FrontEnd(settings_for(server, topic)) as frontend:
        stream = await frontend.submit(request_of("r0", timeout_s=0.3))
        with server.stalled():
            with pytest.raises(RequestFailed, match="deadline") as caught:
                await asyncio.wait_for(anext(stream), 15)
            assert caught.value.reason == "expired"


async def read_ahead(frontend: FrontEnd, client) -> str:
    """The key of the front end's stream, from which it has read an id that no clock will give."""
    out = frontend.store.keys.out(frontend.frontend_id)
    client.xadd(out, {HELLO: "ahead"}, id="99999999999999-0")
    await until(lambda: frontend.shards[0].read_up_to.startswith("99999999999999"))
    return out


async def test_outputs_are_read_when_their_ids_are_lower_than_before(redis_server, topic):
    # As after a failover to a server whose clock is behind, with the front end's stream lost.
    settings = settings_for(redis_server, topic, frontend_lease_s=1.0)
    async with FrontEnd(settings) as frontend, ToyInstance(settings, Role.MIXED, "m0"):
        with redis_server.client() as client:
            client.delete(await read_ahead(frontend, client))
        request = request_of("r0", max_tokens=5)
        assert await tokens_of(await frontend.submit(request)) == toy_answer(request)


async def test_outputs_are_read_from_an_older_state_of_the_stream(redis_server, topic):
    # The same, when the stream is there, as it was a while ago.
    settings = settings_for(redis_server, topic, frontend_lease_s=1.0)
    async with FrontEnd(settings) as frontend, ToyInstance(settings, Role.MIXED, "m0"):
        with redis_server.client() as client:
            out = await read_ahead(frontend, client)
            with client.pipeline() as pipe:
                pipe.delete(out)
                pipe.xadd(out, {HELLO: "old"}, id="5-0")
                pipe.execute()
        request = request_of("r0", max_tokens=5)
        assert await tokens_of(await frontend.submit(request)) == toy_answer(request)


async def test_request_that_is_lost_after_its_user_had_its_end_is_cancelled(redis_server, topic):
    # As after a failover to an older state, in which a request is live that has ended since.
    settings = settings_for(redis_server, topic)
    async with FrontEnd(settings) as frontend, ToyInstance(settings, Role.MIXED, "m0") as instance:
        instance.hold_prefill = True
        request = request_of("r0")
        verdict, _ = await frontend.store.submit(
            "r0", encode_request(request), frontend_id=frontend.frontend_id, nonce="n0",
            timeout_ms=600_000, retain_ms=60_000, input_tokens=request.num_input_tokens, kv_tokens=64, model="toy",
            flow=Flow("default", 4, "-"),
        )  # fmt: skip
        assert verdict == "QUEUED"
        await instance.wait_for(PrefillAssigned)
        await frontend.store.reap(instance.session.instance_id, leave=True)
        await until_state(frontend, "r0", "cancelled")


async def test_loop_that_fails_begins_again(monkeypatch, caplog):
    monkeypatch.setattr(tasks, "BEGIN_AGAIN_S", 0.0)
    begun = asyncio.Queue()

    async def loop() -> None:
        begun.put_nowait(None)
        await asyncio.sleep(0)
        raise RuntimeError("a bug")

    task = asyncio.create_task(tasks.keep_going(loop))
    for _ in range(3):
        await asyncio.wait_for(begun.get(), 10)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert "a bug" in caplog.text


async def test_instance_with_a_bug_in_a_task_begins_anew_under_another_id(redis_server, topic, monkeypatch, caplog):
    reads = Intake._read_inbox_with
    failed = []

    async def fails_once(self, reader) -> None:
        if not failed:
            failed.append(self._instance_id)
            raise RuntimeError("a bug")
        await reads(self, reader)

    monkeypatch.setattr(Intake, "_read_inbox_with", fails_once)
    settings = settings_for(redis_server, topic)
    async with FrontEnd(settings) as frontend, ToyInstance(settings, Role.MIXED, "m0") as instance:
        (lost,) = await instance.wait_for(LeaseLost)
        assert lost.new_instance_id not in (None, failed[0])
        assert "a bug" in caplog.text
        request = request_of("r0")
        assert await tokens_of(await frontend.submit(request)) == toy_answer(request)


async def test_request_whose_last_outputs_are_yet_to_be_read_is_not_made_again(redis_server, topic, monkeypatch):
    monkeypatch.setattr(recovery, "VERIFY_PERIOD_S", 0.05)
    monkeypatch.setattr(recovery, "VERIFY_AFTER_S", 0.0)
    settings = settings_for(redis_server, topic)
    async with FrontEnd(settings) as frontend, ToyInstance(settings, Role.MIXED, "m0") as instance:
        reads, may_read = BlockingReader.read, asyncio.Event()
        outs = frontend.store.keys.out(frontend.frontend_id)

        async def read(self, positions, *args):
            if outs in positions:
                await may_read.wait()
            return await reads(self, positions, *args)

        monkeypatch.setattr(BlockingReader, "read", read)
        with redis_server.client() as client:
            client.xadd(outs, {HELLO: "the read that is under way ends"})
        request = request_of("r0", max_tokens=5)
        stream = await frontend.submit(request)
        # Redis says that it is done, again and again, before the front end reads on.
        await until(lambda: stream.doubts > 5)
        may_read.set()
        assert await tokens_of(stream) == toy_answer(request)
        assert len(await instance.wait_for(PrefillAssigned)) == 1
        assert stream.attempts == 0


async def test_server_without_memory_is_named_as_the_reason_and_the_next_request_is_fine(private_redis_server, topic):
    settings = settings_for(private_redis_server, topic)
    async with FrontEnd(settings) as frontend:
        with private_redis_server.client() as client:
            client.config_set("maxmemory", 1)
            with pytest.raises(StoreUnavailable, match=r"did not take the request's body: .*maxmemory"):
                await frontend.submit(request_of("r0"))
            client.config_set("maxmemory", 0)
        await frontend.submit(request_of("r0"))


async def test_all_who_ask_for_instances_in_an_outage_fail_together(private_redis_server, topic):
    # One after another, each would wait for the timeout in its turn.
    settings = settings_for(private_redis_server, topic, redis_timeout_s=1.0)
    async with FrontEnd(settings) as frontend:
        private_redis_server.kill()
        submits = [frontend.submit(request_of(f"r{i}", prefer=("p0",))) for i in range(40)]
        failures = await asyncio.wait_for(asyncio.gather(*submits, return_exceptions=True), 20)
        assert {type(failure) for failure in failures} == {StoreUnavailable}
        private_redis_server.start()
        await frontend.submit(request_of("r0", prefer=("p0",)))


async def test_time_that_a_submit_waits_for_redis_is_the_requests_own(redis_server, topic, monkeypatch):
    async with FrontEnd(settings_for(redis_server, topic)) as frontend:
        preferred = FrontEnd._preference

        async def slow(self: FrontEnd, request: Request, shard: Shard) -> Preference:
            await asyncio.sleep(0.5)
            return await preferred(self, request, shard)

        monkeypatch.setattr(FrontEnd, "_preference", slow)
        stream = await frontend.submit(request_of("r0", timeout_s=20))
        record = await frontend.request_record("r0")
        assert int(record["deadline_ms"]) - int(record["created_ms"]) <= 19_500
        # An id may come again meanwhile.
        twice = await asyncio.gather(*(frontend.submit(request_of("r1")) for _ in range(2)), return_exceptions=True)
        assert sorted(type(outcome).__name__ for outcome in twice) == ["DuplicateRequest", "OutputStream"]
        assert await frontend.cancel("r1") and await frontend.cancel("r0")
        assert [o.finish_reason for o in [o async for o in stream]] == [FinishReason.CANCELLED]


@pytest.mark.parametrize("durability", ["master", "wait"])
async def test_body_that_a_server_took_with_it_is_sent_to_its_successor(redis_server, topic, durability, monkeypatch):
    settings = settings_for(redis_server, topic, durability=durability, durability_timeout_ms=1)
    async with FrontEnd(settings) as frontend, ToyInstance(settings, Role.MIXED, "m0"):
        name = "tell_and_wait" if durability == "wait" else "tell"
        send, lost = getattr(frontend.store, name), []

        def lose_the_first(*args: object, **more: object) -> None:
            if args[0] == "SET" and not lost:
                lost.append(args)
            else:
                send(*args, **more)

        monkeypatch.setattr(frontend.store, name, lose_the_first)
        request = request_of("r0")
        assert await tokens_of(await frontend.submit(request)) == toy_answer(request)
        assert len(lost) == 1
