"""Who sweeps finds front ends that are gone, ends what they wanted, and puts accounts right that do not add up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from splitwise_sched.connection import as_dict
from splitwise_sched.frontend import FrontEnd
from splitwise_sched.records import DecodeAssigned, Dropped, PrefillAssigned
from splitwise_sched.store import Flow, Preference, Store
from splitwise_sched.sweeper import Sweeper
from splitwise_sched.types import Request, Role, SamplingParams
from tests.integration.toy import ToyInstance, settings_for, toy_answer
from tests.scripts_topic import HOUR_MS, claim, register, reply_of, snapshot

GIVEN = {
    "timeout_ms": HOUR_MS, "retain_ms": HOUR_MS, "input_tokens": 8, "kv_tokens": 16, "model": "toy",
    "flow": Flow("default", 4, "-"),
}  # fmt: skip


@pytest.fixture
async def store(redis_server, topic) -> AsyncIterator[Store]:
    opened = Store(settings_for(redis_server, topic, scheduler_max_size=-1))
    await opened.connect()
    yield opened
    await opened.close()


def sweeper_of(store: Store) -> Sweeper:
    return Sweeper(store, retain_ms=HOUR_MS, period_s=3600)


async def submit(store: Store, request_id: str, frontend: str, **more: object) -> None:
    given = {**GIVEN, "frontend_id": frontend, "nonce": f"n-{request_id}", **more}
    assert (await store.submit(request_id, b"body", **given))[0] == "QUEUED"


async def serve(store: Store, name: str, count: int) -> list[tuple[str, int, str]]:
    claims = await claim(store, name, count)
    bound = await store.bind(name, claims, HOUR_MS)
    return [(c.request_id, c.epoch, b.decode_instance) for c, b in zip(claims, bound, strict=True)]


async def records(store: Store, ids: list[str]) -> list[dict[str, str]]:
    return list(await asyncio.gather(*map(store.request_record, ids)))


async def spread(store: Store, count: int) -> list[str]:
    """Requests of front end f0 everywhere that a request can be: ``count`` each, the queue full; and one of f1's."""
    for frontend in ("f0", "f1"):
        await store.open_out(frontend, HOUR_MS)
    await register(store, "p", "prefill", 1024, 8)
    await register(store, "d", "decode", 1_000_000, 10_000)
    ids = [f"r{i:03d}" for i in range(3 * count + 80)]
    for request_id in ids[: 3 * count]:
        await submit(store, request_id, "f0")
    runs = []
    while len(runs) < 3 * count:
        runs += await serve(store, "p", 64)
    for run in runs[:count]:
        assert await reply_of(store.step, *run, {}) == 1
    for run in runs[count : 2 * count]:
        assert await reply_of(store.give_back, *run, "it broke", retry=True, retain_ms=HOUR_MS) == 1
    for request_id in ids[3 * count :]:
        await submit(store, request_id, "f0", preference=Preference("p", HOUR_MS))
    await submit(store, "other", "f1")
    return ids


async def test_requests_of_a_dead_front_end_are_cancelled_wherever_they_are(store):
    ids = await spread(store, 4)
    states = {state for state, _ in await store.request_states(ids)}
    assert states == {"queued", "prefill", "decode", "lost"}
    assert await store.call("ZCARD", f"{store.keys.prefix}preferred")
    assert await store.call("EXISTS", store.keys.waiting)
    before = await records(store, ids)
    await store.call("UNLINK", store.keys.frontend("f0"))
    await store.call("ZADD", store.keys.frontends, 1, "f0")

    sweeper = sweeper_of(store)
    assert await sweeper.sweep() == 0, "one look is not enough: it may be on its way back"
    assert await sweeper.sweep() == len(ids)

    after = await records(store, ids)
    assert {(r["state"], r["reason"]) for r in after} == {("cancelled", "the lease of its front end f0 has lapsed")}
    assert all(int(a["epoch"]) == int(b["epoch"]) + 1 for a, b in zip(after, before, strict=True))
    dropped = {name: await told_to_drop(store, name) for name in ("p", "d")}
    by_state = {state: {i for i, r in zip(ids, before, strict=True) if r["state"] == state} for state in states}
    assert dropped["d"] >= by_state["decode"] | by_state["prefill"] and dropped["p"] >= by_state["prefill"]
    now = await snapshot(store, ["p", "d"], ["f0", "f1"], ids)
    assert (
        now["leases"]["d"] == (0, 0) and not now["inboxes"]["d"] and not now["preferred"] and not now["room"]["waiting"]
    )
    assert now["deadlines"] == {"other"} and "f0" not in now["out"] and now["frontends"] == {"f1"}
    assert not any(r["body"] for r in now["requests"].values()) and now["counters"]["waiting"] == 0
    ((run, *_),) = [await serve(store, "p", 64)]
    assert run[0] == "other"
    assert await sweeper.sweep() == 0


async def told_to_drop(store: Store, name: str) -> set[str]:
    entries = await store.call("XRANGE", store.keys.control(name), "-", "+")
    return {fields["drop"] for _, flat in entries if "drop" in (fields := as_dict(flat))}


async def test_sweeper_that_dies_in_the_middle_leaves_the_rest_to_the_next_ones(store):
    ids = await spread(store, 100)
    await store.close_out("f0")
    cancelled, look_on = await store.cancel_orphans("f0", 50, HOUR_MS)
    assert 0 < cancelled < len(ids) and look_on != "0"
    sweepers = [sweeper_of(store) for _ in range(3)]
    moved = 0
    for _ in range(2):
        moved += sum(await asyncio.gather(*(s.sweep() for s in sweepers)))
    assert cancelled + moved == len(ids)
    assert {r["state"] for r in await records(store, ids)} == {"cancelled"}
    assert await store.lapsed() == ([], [], False) and (await store.request_record("other"))["state"] == "queued"


async def test_dead_front_end_is_forgotten_after_a_whole_look_that_found_nothing(store):
    """A server that takes over in the middle of a look has an order of its own, so that its end may miss some."""
    ids = await spread(store, 20)
    await store.close_out("f0")
    assert await store.cancel_orphans("f0", 10_000, HOUR_MS, "0", 1) == (len(ids), "0")
    assert await store.cancel_orphans("f0", 10_000, HOUR_MS, "0", 1) == (0, "0")
    assert (await store.lapsed()).frontends == ["f0"]
    await submit(store, "missed", "f0")
    sweeper = sweeper_of(store)
    assert [await sweeper.sweep() for _ in range(2)] == [0, 1]
    assert await store.lapsed() == ([], [], False)


async def test_front_end_that_has_its_lease_again_keeps_the_rest_of_its_requests(store):
    ids = await spread(store, 100)
    await store.close_out("f0")
    cancelled, look_on = await store.cancel_orphans("f0", 50, HOUR_MS)
    await store.open_out("f0", HOUR_MS)
    assert await store.cancel_orphans("f0", 50, HOUR_MS, look_on) == (0, "0")
    states = [state for state, _ in await store.request_states(ids)]
    assert states.count("orphaned") == cancelled < len(ids) - 100
    await store.call("UNLINK", store.keys.frontend("f0"))
    await store.call("ZADD", store.keys.frontends, 1, "f0")
    assert (await store.lapsed()).frontends == ["f0"], "it is looked at again when it lapses again"


async def test_nothing_wrong_costs_a_sweep_two_commands_however_many_requests_there_are(store):
    await spread(store, 100)
    sweeper = sweeper_of(store)
    await sweeper.sweep()
    sent = []
    store._coalescer.call, original = lambda c: sent.append(c) or original(c), store._coalescer.call
    assert await sweeper.sweep() == 0
    assert len(sent) == 2


def request(request_id: str = "r0", num_tokens: int = 40) -> Request:
    return Request(request_id, "toy", (5, 6, 7), SamplingParams(max_tokens=num_tokens, temperature=0))


async def test_both_legs_stop_when_the_last_front_end_is_gone(redis_server, topic):
    """Nobody is left to sweep but the instances."""
    settings = settings_for(redis_server, topic, frontend_lease_s=1.0)
    frontend = FrontEnd(settings)
    async with (
        ToyInstance(settings, Role.PREFILL, "p") as prefill,
        ToyInstance(settings, Role.DECODE, "d") as decode,
    ):
        decode.gate.clear()
        prefill.keep_after_prefill = True
        await frontend.start()
        await frontend.submit(request())
        await prefill.wait_for(PrefillAssigned)
        await decode.wait_for(DecodeAssigned)
        vanish(frontend)
        for instance in (prefill, decode):
            (dropped,) = await instance.wait_for(Dropped)
            assert isinstance(dropped, Dropped) and dropped.request_id == "r0"
            assert f"front end {frontend.frontend_id} has lapsed" in dropped.reason
        record = await frontend.request_record("r0")
        assert record["state"] == "cancelled" and frontend.frontend_id in record["reason"]
        assert (await frontend.store.instance_fields(decode.session.instance_id))["reserved_tokens"] == "0"
        assert not await frontend.store.call("EXISTS", frontend.store.keys.out(frontend.frontend_id))
        await frontend.store.close()


def vanish(frontend: FrontEnd) -> None:
    for task in frontend._tasks:
        task.cancel()


async def test_front_end_that_was_taken_for_dead_puts_its_requests_back_and_its_users_notice_nothing(
    redis_server, topic
):
    settings = settings_for(redis_server, topic, frontend_lease_s=1.0)
    async with (
        ToyInstance(settings, Role.MIXED, "m", pause_s=0.02) as mixed,
        FrontEnd(settings) as frontend,
    ):
        wanted = request(num_tokens=60)
        stream = await frontend.submit(wanted)
        got = list((await anext(stream)).token_ids)
        mixed.gate.clear()
        await frontend.store.close_out(frontend.frontend_id)
        assert await frontend.store.cancel_orphans(frontend.frontend_id, 100, HOUR_MS) == (1, "0")
        await mixed.wait_for(Dropped)
        mixed.gate.set()
        got += [token async for output in stream for token in output.token_ids]
        assert got == toy_answer(wanted)
        record = await frontend.request_record("r0")
        assert (record["state"], record["epoch"], record["attempts"]) == ("done", "2", "2")
        assert "orphaned" not in record


# ---- accounts that do not add up -----------------------------------------------------------------------------------


async def test_reservation_that_no_request_backs_is_found_and_released(store, caplog):
    await store.open_out("f0", HOUR_MS)
    await register(store, "p", "prefill", 1024, 8)
    await register(store, "d", "decode", 1024, 8)
    for request_id in ("r0", "r1", "r2"):
        await submit(store, request_id, "f0")
    runs = await serve(store, "p", 8)
    # A record that somebody deleted takes its reservation and its inbox entry with it.
    await store.call("DEL", store.keys.request("r1"))
    await store.call("HINCRBY", store.keys.instance("d"), "reserved_tokens", 100)
    sweeper = sweeper_of(store)
    await sweeper.sweep()
    fields = await store.instance_fields("d")
    assert (fields["reserved_tokens"], fields["reserved_requests"]) == ("32", "2")
    assert "d had 116 KV tokens of 1 requests reserved for nobody, and 1 inbox entries of nobody" in caplog.text
    assert await told_to_drop(store, "d") == {"r1"}
    assert float(await store.call("ZSCORE", store.keys.decode_load, "d")) == 32 / 1024
    assert (await store.counters())["reservations_repaired"] == "1"
    caplog.clear()
    for run in (runs[0], runs[2]):
        output = f'{run[1]}:0:7:{{"finish":"stop"}}'
        assert await reply_of(store.finish, *run, output, retain_ms=HOUR_MS, reason="stop", notes={}) == 1
    await sweeper.sweep()
    fields = await store.instance_fields("d")
    assert (fields["reserved_tokens"], fields["reserved_requests"]) == ("0", "0") and not caplog.records


async def test_reservation_of_each_of_many_decode_instances_is_looked_at_in_its_turn(store):
    for i in range(20):
        await register(store, f"d{i}", "decode", 1024, 8)
        await store.call("HSET", store.keys.instance(f"d{i}"), "reserved_requests", 1)
    found = {(await store.audit(which, 100)).instance_id for which in range(20)}
    assert found == {f"d{i}" for i in range(20)}
    assert await store.audit(7, 100) is None


async def test_instance_that_holds_more_than_is_looked_at_is_left_alone(store):
    await store.open_out("f0", HOUR_MS)
    await register(store, "m", "mixed", 1024, 8)
    for request_id in ("r0", "r1", "r2"):
        await submit(store, request_id, "f0")
    await serve(store, "m", 8)
    await store.call("HINCRBY", store.keys.instance("m"), "reserved_tokens", 100)
    assert await store.audit(0, 2) is None
    assert (await store.audit(0, 3)) == ("m", 100, 0, 0)
