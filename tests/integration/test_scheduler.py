"""Front end, Redis and instances together, with a toy model."""

from __future__ import annotations

import asyncio
import re

import pytest

from splitwise_sched.connection import as_dict
from splitwise_sched.errors import DuplicateRequest, IncompatibleInstance, QueueFull, RequestFailed
from splitwise_sched.frontend import FrontEnd
from splitwise_sched.records import DecodeAssigned, Dropped, LeaseLost, PrefillAssigned
from splitwise_sched.types import FinishReason, Role
from tests.integration.toy import ToyInstance, request_of, settings_for, tokens_of, toy_answer, until, until_state


async def test_requests_go_through_prefill_and_decode_and_come_back_in_order(every_redis_server, topic):
    settings = settings_for(every_redis_server, topic)
    async with (
        ToyInstance(settings, Role.PREFILL, "p0"),
        ToyInstance(settings, Role.PREFILL, "p1"),
        ToyInstance(settings, Role.DECODE, "d0"),
        ToyInstance(settings, Role.DECODE, "d1"),
        FrontEnd(settings) as frontend,
    ):
        requests = [request_of(f"r{i}", max_tokens=1 + i % 9) for i in range(60)]
        streams = [await frontend.submit(r) for r in requests]
        answers = await asyncio.gather(*map(tokens_of, streams))
        assert answers == [toy_answer(r) for r in requests]
        record = await frontend.request_record("r7")
        assert record["state"] == "done" and record["prefill"].startswith("p") and record["decode"].startswith("d")
        assert {r.fields["reserved_tokens"] for r in await frontend.store.live_instances()} == {"0"}
        assert await frontend.store.queue_depth() == 0


async def test_mixed_instance_keeps_what_it_claims(redis_server, topic):
    settings = settings_for(redis_server, topic)
    async with ToyInstance(settings, Role.MIXED, "m0") as mixed, FrontEnd(settings) as frontend:
        request = request_of("only")
        assert await tokens_of(await frontend.submit(request)) == toy_answer(request)
        assigned = await mixed.wait_for(PrefillAssigned)
        assert assigned[0].decode_instance == mixed.session.instance_id


async def test_same_request_id_twice_is_refused_and_the_first_is_not_harmed(redis_server, topic):
    settings = settings_for(redis_server, topic)
    async with FrontEnd(settings) as one, FrontEnd(settings) as other:
        first = await one.submit(request_of("same"))
        with pytest.raises(DuplicateRequest, match="'same' was used before"):
            await one.submit(request_of("same", prompt=3))
        with pytest.raises(DuplicateRequest, match="queued"):
            await other.submit(request_of("same", prompt=3))
        async with ToyInstance(settings, Role.MIXED, "m0"):
            assert await tokens_of(first) == toy_answer(first.request)
            with pytest.raises(DuplicateRequest, match="done"):
                await other.submit(request_of("same"))
            assert await one.store.bodies(["same"]) == [None]


async def test_full_queue_is_refused_with_depth_limit_and_retry_after(redis_server, topic):
    settings = settings_for(redis_server, topic, scheduler_max_size=3)
    async with FrontEnd(settings) as frontend:
        for i in range(3):
            await frontend.submit(request_of(f"r{i}"))
        with pytest.raises(QueueFull) as refused:
            await frontend.submit(request_of("r3"))
        assert (refused.value.depth, refused.value.limit) == (3, 3)
        assert refused.value.retry_after_s >= 1
        assert await frontend.store.bodies(["r3"]) == [None]


async def test_cancel_reaches_both_instances_and_frees_the_reservation(redis_server, topic):
    settings = settings_for(redis_server, topic)
    async with (
        ToyInstance(settings, Role.PREFILL, "p0") as prefill,
        ToyInstance(settings, Role.DECODE, "d0") as decode,
        FrontEnd(settings) as frontend,
    ):
        decode.gate.clear()
        prefill.keep_after_prefill = True
        stream = await frontend.submit(request_of("req-1"))
        other = await frontend.submit(request_of("req-10"))
        await decode.wait_for(DecodeAssigned, 2)
        assert await frontend.cancel("req-1")
        assert isinstance((await decode.wait_for(Dropped))[0], Dropped)
        assert isinstance((await prefill.wait_for(Dropped))[0], Dropped)
        assert [e.request_id for e in decode.events if isinstance(e, Dropped)] == ["req-1"]
        outputs = [o async for o in stream]
        assert outputs[-1].finish_reason is FinishReason.CANCELLED
        decode.gate.set()
        assert await tokens_of(other) == toy_answer(other.request)
        assert (await frontend.store.live_instances())[0].reserved_tokens == 0
        assert not await frontend.cancel("req-1")


async def test_claims_wait_in_order_for_a_decode_instance_with_room(redis_server, topic):
    settings = settings_for(redis_server, topic)
    async with (
        ToyInstance(settings, Role.PREFILL, "p0") as prefill,
        ToyInstance(settings, Role.DECODE, "d0", capacity_tokens=64) as decode,
        FrontEnd(settings) as frontend,
    ):
        decode.gate.clear()
        requests = [request_of(f"r{i}", max_tokens=4, prompt=44) for i in range(4)]
        streams = [await frontend.submit(r) for r in requests]
        await prefill.wait_for(PrefillAssigned, 1)
        await until_state(frontend, "r0", "prefill")
        assert (await frontend.request_record("r1"))["state"] == "queued"
        decode.gate.set()
        assert await asyncio.gather(*map(tokens_of, streams)) == [toy_answer(r) for r in requests]
        assigned = [e.request.request_id for e in prefill.events if isinstance(e, PrefillAssigned)]
        assert assigned == ["r0", "r1", "r2", "r3"]


async def test_prompt_that_no_decode_pool_can_hold_fails_with_the_reason_and_blocks_nobody(redis_server, topic):
    settings = settings_for(redis_server, topic)
    async with (
        ToyInstance(settings, Role.PREFILL, "p0"),
        ToyInstance(settings, Role.DECODE, "d0", capacity_tokens=64),
        FrontEnd(settings) as frontend,
    ):
        big = await frontend.submit(request_of("big", prompt=64))
        small = await frontend.submit(request_of("small", prompt=30))
        with pytest.raises(RequestFailed, match="no decode instance has a KV pool that holds its 64 input tokens"):
            await tokens_of(big)
        assert await tokens_of(small) == toy_answer(small.request)
        assert await frontend.store.call("XLEN", frontend.store.keys.dead_letter) == 1


@pytest.mark.parametrize("victim", ["prefill", "decode"])
async def test_request_of_an_instance_that_vanishes_goes_on_elsewhere(redis_server, topic, victim):
    settings = settings_for(redis_server, topic)
    async with FrontEnd(settings) as frontend:
        prefill = ToyInstance(settings, Role.PREFILL, "p0")
        decode = ToyInstance(settings, Role.DECODE, "d0", pause_s=0.02)
        async with prefill, decode:
            if victim == "prefill":
                prefill.hold_prefill = True
                decode.gate.clear()
            # Where decode vanishes, none may be over before the last is well under way.
            requests = [request_of(f"r{i}", max_tokens=12 if victim == "prefill" else 200) for i in range(6)]
            streams = [await frontend.submit(r) for r in requests]
            readers = [asyncio.create_task(tokens_of(s)) for s in streams]
            await decode.wait_for(DecodeAssigned, 6)
            if victim == "decode":
                await until(lambda: all(len(s.assembly.token_ids) > 3 for s in streams))
            lost = prefill if victim == "prefill" else decode
            old_id = lost.session.instance_id
            lost.vanish_now()
            async with ToyInstance(settings, Role.MIXED, "m0"):
                assert await asyncio.gather(*readers) == [toy_answer(r) for r in requests]
            record = await frontend.request_record("r0")
            assert int(record["epoch"]) > 1 and int(record["attempts"]) >= 2 and old_id in record["history"]


async def test_instance_that_outlived_its_lease_drops_its_work_and_comes_back_under_a_new_id(redis_server, topic):
    settings = settings_for(redis_server, topic)
    async with FrontEnd(settings) as frontend, ToyInstance(settings, Role.MIXED, "m0") as mixed:
        mixed.gate.clear()
        stream = await frontend.submit(request_of("r0"))
        await mixed.wait_for(PrefillAssigned)
        old_id = mixed.session.instance_id
        await frontend.store.call("UNLINK", frontend.store.keys.instance(old_id))
        lost = (await mixed.wait_for(LeaseLost))[0]
        assert lost.new_instance_id == mixed.session.instance_id != old_id
        mixed.gate.set()
        assert await tokens_of(stream) == toy_answer(stream.request)


async def test_request_that_keeps_losing_its_instance_ends_in_the_dead_letter_with_its_history(redis_server, topic):
    settings = settings_for(redis_server, topic, scheduler_max_attempts=2)
    async with FrontEnd(settings) as frontend, ToyInstance(settings, Role.MIXED, "m0") as mixed:
        mixed.gate.clear()
        stream = await frontend.submit(request_of("poison"))
        for attempt in (1, 2):
            assigned = (await mixed.wait_for(PrefillAssigned, attempt))[-1]
            mixed.session.give_back("poison", assigned.epoch, "its engine broke", retry=True)
        with pytest.raises(RequestFailed, match=r"given up after 2 attempts, the last: its engine broke"):
            await tokens_of(stream)
        entries = await frontend.store.call("XRANGE", frontend.store.keys.dead_letter, "-", "+")
        ((_, flat),) = entries
        entry = as_dict(flat)
        runs = [
            rf"epoch {n}, after [0-9.]+ s, in (prefill|decode) on (\S+ -> )?m0-\w+: its engine broke; " for n in (1, 2)
        ]
        assert re.fullmatch("".join(runs), entry["history"]), "which instances, when, why"
        assert entry.items() >= {"id": "poison", "attempts": "2", "frontend": frontend.frontend_id}.items()


async def test_request_expires_at_its_deadline_wherever_it_is(redis_server, topic):
    settings = settings_for(redis_server, topic)
    async with FrontEnd(settings) as frontend:
        # Redis knows more, and is later on a busy machine.
        with pytest.raises(RequestFailed, match=r"did not end before its deadline(; it was queued)?$"):
            await tokens_of(await frontend.submit(request_of("late", timeout_s=0.3)))
        await until_state(frontend, "late", "expired", "cancelled")


async def test_incompatible_instance_is_refused_with_field_and_both_values(redis_server, topic):
    settings = settings_for(redis_server, topic)
    async with ToyInstance(settings, Role.PREFILL, "p0"):
        with pytest.raises(IncompatibleInstance, match=r"kv.dtype 'bfloat16', but p0-\w+ on topic .* has 'float32'"):
            async with ToyInstance(settings, Role.DECODE, "d0", must_match={"kv.dtype": "bfloat16"}):
                pass
        with pytest.raises(IncompatibleInstance, match="model 'other'"):
            async with ToyInstance(settings, Role.DECODE, "d0", model="other"):
                pass


async def test_requests_survive_a_redis_that_forgets_everything(private_redis_server, topic):
    settings = settings_for(private_redis_server, topic)
    async with FrontEnd(settings) as frontend, ToyInstance(settings, Role.MIXED, "m0", pause_s=0.05) as mixed:
        streams = [await frontend.submit(request_of(f"r{i}", max_tokens=40)) for i in range(5)]
        readers = [asyncio.create_task(tokens_of(s)) for s in streams]
        await mixed.wait_for(PrefillAssigned, 5)
        await frontend.store.call("FLUSHALL")
        await frontend.store.call("SCRIPT", "FLUSH")
        assert await asyncio.gather(*readers) == [toy_answer(s.request) for s in streams]


async def test_two_front_ends_share_a_topic_and_get_only_their_own_outputs(redis_server, topic):
    settings = settings_for(redis_server, topic)
    async with (
        ToyInstance(settings, Role.PREFILL, "p0"),
        ToyInstance(settings, Role.DECODE, "d0"),
        FrontEnd(settings) as one,
        FrontEnd(settings) as two,
    ):
        streams = [await (one, two)[i % 2].submit(request_of(f"r{i}")) for i in range(20)]
        assert await asyncio.gather(*map(tokens_of, streams)) == [toy_answer(s.request) for s in streams]


async def test_draining_instance_finishes_what_it_holds_and_takes_nothing_more(redis_server, topic):
    settings = settings_for(redis_server, topic)
    async with (
        ToyInstance(settings, Role.PREFILL, "p0") as leaving,
        ToyInstance(settings, Role.DECODE, "d0") as decode,
        FrontEnd(settings) as frontend,
    ):
        decode.gate.clear()
        held = [await frontend.submit(request_of(f"held{i}")) for i in range(3)]
        await decode.wait_for(DecodeAssigned, 3)
        await asyncio.gather(leaving.session.drain(), decode.session.drain())
        later = [await frontend.submit(request_of(f"later{i}")) for i in range(3)]
        decode.gate.set()
        assert await asyncio.gather(*map(tokens_of, held)) == [toy_answer(s.request) for s in held]
        assert decode.session.num_held == 0
        async with ToyInstance(settings, Role.MIXED, "m0") as mixed:
            assert await asyncio.gather(*map(tokens_of, later)) == [toy_answer(s.request) for s in later]
            assert {e.decode_instance for e in await mixed.wait_for(PrefillAssigned, 3)} == {mixed.session.instance_id}
        assert [e.request.request_id for e in leaving.events if isinstance(e, PrefillAssigned)] == [
            "held0", "held1", "held2",
        ]  # fmt: skip


async def test_draining_instance_gives_back_claims_that_found_no_decode_instance(redis_server, topic):
    settings = settings_for(redis_server, topic)
    async with ToyInstance(settings, Role.PREFILL, "p0") as leaving, FrontEnd(settings) as frontend:
        stream = await frontend.submit(request_of("r0"))
        pending = ("XPENDING", frontend.store.keys.queue, "prefill", "-", "+", 10)
        await until(lambda: frontend.store.call(*pending))
        await leaving.session.drain()
        async with ToyInstance(settings, Role.MIXED, "m0"):
            assert await tokens_of(stream) == toy_answer(stream.request)
        assert (await frontend.request_record("r0"))["attempts"] == "1"


async def test_instance_changes_its_role_after_it_has_finished_what_it_holds(redis_server, topic):
    settings = settings_for(redis_server, topic)
    async with (
        ToyInstance(settings, Role.MIXED, "i0") as changing,
        ToyInstance(settings, Role.MIXED, "i1") as other,
        FrontEnd(settings) as frontend,
    ):
        changing.gate.clear()
        other.hold_prefill = True
        other.session.set_room(0)
        held = await frontend.submit(request_of("held"))
        await changing.wait_for(PrefillAssigned)
        old_id = changing.session.instance_id
        change = asyncio.create_task(changing.session.change_role(Role.DECODE, 10))
        changing.gate.set()
        assert await tokens_of(held) == toy_answer(held.request)
        await change
        lost = (await changing.wait_for(LeaseLost))[0]
        assert lost.new_instance_id != old_id and "its role changes to decode" in lost.reason
        records = {r.name: r for r in await frontend.store.live_instances()}
        assert records["i0"].role is Role.DECODE and (await frontend.request_record("held"))["attempts"] == "1"
        assert await frontend.store.lacks_lease(old_id)
        other.hold_prefill = False
        later = await frontend.submit(request_of("later"))
        assert await tokens_of(later) == toy_answer(later.request)
        assert (await frontend.request_record("later"))["prefill"] == other.session.instance_id


async def test_what_an_instance_notes_cannot_touch_what_the_scripts_go_by(redis_server, topic):
    settings = settings_for(redis_server, topic)
    async with ToyInstance(settings, Role.MIXED, "m0") as mixed, FrontEnd(settings) as frontend:
        mixed.hold_prefill = True
        stream = await frontend.submit(request_of("r0"))
        assigned = (await mixed.wait_for(PrefillAssigned))[0]
        mixed.session.step("r0", assigned.epoch, {"epoch": 99, "state": "done", "lane": "shm"})
        await mixed.session.store.settle()
        record = await frontend.request_record("r0")
        assert (record["epoch"], record["state"], record["lane"]) == ("1", "decode", "shm")
        mixed.hold_prefill = False
        mixed.session.give_back("r0", assigned.epoch, "another try", retry=True)
        assert await tokens_of(stream) == toy_answer(stream.request)
