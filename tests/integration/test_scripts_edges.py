"""Single scripts where it is easy to be wrong: zombies, repetitions, limits, who is gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from splitwise_sched.assembly import Assembly
from splitwise_sched.connection import as_dict
from splitwise_sched.errors import Fenced
from splitwise_sched.keys import PREFILL_GROUP
from splitwise_sched.outputs import decode_output
from splitwise_sched.records import Claim
from splitwise_sched.store import HELLO, Flow, Preference, Store
from splitwise_sched.sweeper import Sweeper
from tests.integration.toy import settings_for
from tests.scripts_topic import HOUR_MS, claim, register, reply_of, snapshot

FLOW = Flow("default", 4, "-")


class Topic:
    """A store on a topic with one front end, f0."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.sweeper = Sweeper(store, retain_ms=HOUR_MS, period_s=3600)

    async def submit(self, request_id: str, body: bytes = b"body", nonce: str = "n", **more: Any) -> tuple[str, Any]:
        given = {"frontend_id": "f0", "timeout_ms": HOUR_MS, "retain_ms": HOUR_MS, "input_tokens": 8, "kv_tokens": 16}
        return await self.store.submit(
            request_id, body, **{**given, "nonce": f"{nonce}-{request_id}", "model": "toy", "flow": FLOW, **more}
        )

    async def resubmit(self, request_id: str, body: bytes = b"again", **more: Any) -> list[Any]:
        given = {
            "frontend_id": "f0", "nonce": f"n-{request_id}", "epoch_seen": 1, "timeout_ms": HOUR_MS,
            "retain_ms": HOUR_MS, "input_tokens": 8, "kv_tokens": 16, "model": "toy", "attempts": 0, "done_too": False,
            "flow": FLOW,
        }  # fmt: skip
        return await self.store.resubmit(request_id, body, **{**given, **more})

    async def serve(self, name: str, count: int = 1) -> list[tuple[str, int, str]]:
        """Claim and bind, until there are no more; the runs that were bound."""
        runs: list[tuple[str, int, str]] = []
        while len(runs) < count and (claims := await claim(self.store, name, count - len(runs))):
            bound = await self.store.bind(name, claims, HOUR_MS)
            pairs = zip(claims, bound, strict=True)
            runs += [(c.request_id, c.epoch, b.decode_instance) for c, b in pairs if b.verdict == "BOUND"]
        return runs

    async def step(self, run: tuple[str, int, str]) -> int:
        return await reply_of(self.store.step, *run, {})

    async def finish(self, run: tuple[str, int, str], tokens: str = "7") -> int:
        output = f'{run[1]}:0:{tokens}:{{"finish":"stop"}}'
        return await reply_of(self.store.finish, *run, output, retain_ms=HOUR_MS, reason="stop", notes={})

    async def give_back(self, run: tuple[str, int, str], why: str = "it broke", *, retry: bool = True) -> int:
        return await reply_of(self.store.give_back, *run, why, retry=retry, retain_ms=HOUR_MS)

    async def lapse(self, name: str) -> None:
        await self.store.call("UNLINK", self.store.keys.instance(name))

    async def state(self, request_id: str) -> str:
        return (await self.store.request_record(request_id))["state"]

    async def out(self) -> list[tuple[str, str]]:
        """(request, value) that the front end was told."""
        entries = await self.store.call("XRANGE", self.store.keys.out("f0"), "-", "+")
        return [pair for _, fields in entries for pair in as_dict(fields).items() if pair[0] != HELLO]

    async def is_empty(self, names: list[str], request_ids: list[str]) -> bool:
        now = await snapshot(self.store, names, ["f0"], request_ids)
        held = [now["queues"]["queue"], *now["inboxes"].values(), now["deadlines"], now["preferred"]]
        bodies = [r["body"] for r in now["requests"].values()]
        return not any(held) and not any(bodies) and set(now["leases"].values()) <= {(0, 0)}


async def _open(server: Any, name: str) -> AsyncIterator[Topic]:
    store = Store(settings_for(server, name, scheduler_max_size=-1))
    await store.connect()
    try:
        await store.open_out("f0", HOUR_MS)
        yield Topic(store)
    finally:
        await store.close()


@pytest.fixture
async def on(redis_server, topic) -> AsyncIterator[Topic]:
    async for opened in _open(redis_server, topic):
        yield opened


@pytest.fixture
async def on_every(every_redis_server, topic) -> AsyncIterator[Topic]:
    async for opened in _open(every_redis_server, topic):
        yield opened


# ---- zombies -----------------------------------------------------------------------------------------------------


async def test_zombie_that_claims_again_has_no_effect_and_what_it_swallowed_comes_back(on_every):
    t, store = on_every, on_every.store
    await register(store, "z", "mixed", 1024, 8)
    await t.submit("r0")
    (run,) = await t.serve("z")
    await t.lapse("z")
    await t.sweeper.sweep()
    assert await t.state("r0") == "lost" and (await store.lapsed()).instances == []

    await register(store, "m", "mixed", 1024, 8)
    await t.resubmit("r0")
    await t.submit("r1")
    swallowed = await store.call(
        "XREADGROUP", "GROUP", PREFILL_GROUP, "z", "COUNT", 9, "STREAMS", store.keys.queue, ">"
    )  # fmt: skip
    assert len(next(iter(swallowed.values() if isinstance(swallowed, dict) else [swallowed[0][1]]))) == 2
    assert (await store.lapsed()).instances == ["z"]

    assert not await store.renew("z", HOUR_MS, {})
    assert await t.step(run) == await t.finish(run) == await t.give_back(run) == 0
    await reply_of(store.publish, "f0", ["r0", "1:0:5 5"])
    with pytest.raises(Fenced, match="lease of z has lapsed"):
        await store.bind("z", [Claim("queue", "1-1", "r1", 1)], HOUR_MS)
    with pytest.raises(Fenced, match="NOGROUP"):
        await claim(store, "z", 9)

    await t.sweeper.sweep()
    assert (await store.lapsed()).instances == []
    runs = await t.serve("m", 9)
    # Nobody had them, so they come back without their front end's help, and no attempt is counted.
    assert [(request_id, epoch) for request_id, epoch, _ in runs] == [("r0", 3), ("r1", 2)]
    assert [await t.finish(run) for run in runs] == [1, 1]
    assembly = Assembly()
    for value in [value for request_id, value in await t.out() if request_id == "r0"]:
        if (output := decode_output("r0", value)) and hasattr(output, "token_ids"):
            assembly.feed(output)
        else:
            assembly.raise_epoch(output.epoch)
    assert assembly.token_ids == [7] and assembly.ended
    assert await t.is_empty(["z", "m"], ["r0", "r1"])


async def test_sweep_takes_back_more_than_it_looks_at_in_one_call(on_every):
    t, store = on_every, on_every.store
    await register(store, "z", "mixed", 100_000, 1000)
    ids = [f"r{i:03d}" for i in range(650)]
    await asyncio.gather(*(t.submit(i) for i in ids))
    runs = await t.serve("z", 650)
    assert len(runs) == 650
    # In decode, in prefill, and claimed: more of each than one call looks at.
    await asyncio.gather(*map(t.step, runs[:220]))
    await asyncio.gather(*map(t.give_back, runs[440:]))
    await asyncio.gather(*(t.resubmit(i) for i in ids[440:]))
    assert len(await claim(store, "z", 300)) == 210
    await t.lapse("z")
    assert await t.sweeper.sweep() == 650
    states = await store.request_states(ids)
    assert states == [("lost", 2)] * 440 + [("queued", 3)] * 210
    assert len(await t.out()) == 650
    assert await store.queue_depth() == 210 and (await store.lapsed()).instances == []
    pending = await store.call("XPENDING", store.keys.queue, PREFILL_GROUP, "-", "+", 1)
    assert pending == [] and not await store.call("EXISTS", store.keys.inbox("z"), store.keys.control("z"))


async def test_two_sweepers_take_each_request_back_once(on):
    t, store = on, on.store
    await register(store, "z", "mixed", 100_000, 1000)
    await asyncio.gather(*(t.submit(f"r{i}") for i in range(300)))
    await t.serve("z", 300)
    await t.lapse("z")
    moved = await asyncio.gather(t.sweeper.sweep(), Sweeper(store, retain_ms=HOUR_MS, period_s=3600).sweep())
    assert sum(moved) == 300 == len(await t.out())


async def test_reaper_leaves_an_instance_alone_that_has_its_lease(on):
    t, store = on, on.store
    await register(store, "m", "mixed", 1024, 8)
    await t.submit("r0")
    (run,) = await t.serve("m")
    assert await store.reap("m") == (0, False)
    await t.sweeper.sweep()
    assert await t.finish(run) == 1


async def test_entry_of_a_record_that_is_gone_does_not_keep_the_reaper_busy(on):
    t, store = on, on.store
    await register(store, "p", "prefill", 1024, 8)
    await t.submit("r0", preference=Preference("p", HOUR_MS))
    await t.submit("r1")
    await claim(store, "p", 1)
    await t.submit("r2", preference=Preference("p", HOUR_MS))
    for request_id in ("r0", "r1", "r2"):
        await store.call("UNLINK", store.keys.request(request_id), store.keys.body(request_id))
    await t.lapse("p")
    await asyncio.wait_for(t.sweeper.sweep(), 5)
    assert (await store.lapsed()).instances == []
    assert not await store.call("EXISTS", store.keys.preferred("p")) and await store.queue_depth() == 0


# ---- repetitions -------------------------------------------------------------------------------------------------


async def test_instance_that_registers_twice_keeps_what_was_reserved_on_it(on):
    t, store = on, on.store
    await register(store, "p", "prefill", 1024, 8)
    await register(store, "d", "decode", 1024, 8)
    await t.submit("r0")
    (run,) = await t.serve("p")
    before = await store.instance_fields("d")
    assert await register(store, "d", "decode", 1024, 8) == ("OK",)
    assert (await store.instance_fields("d"))["reserved_tokens"] == before["reserved_tokens"] == "16"
    assert await t.finish(run) == 1
    assert (await store.instance_fields("d"))["reserved_tokens"] == "0"


async def test_id_whose_lease_lapsed_is_not_registered_again_while_it_holds_something(on):
    t, store = on, on.store
    await register(store, "m", "mixed", 1024, 8)
    await t.submit("r0")
    await t.serve("m")
    await t.lapse("m")
    with pytest.raises(Fenced, match="lease of m has lapsed"):
        await register(store, "m", "mixed", 1024, 8)
    await t.sweeper.sweep()
    assert await register(store, "m", "mixed", 1024, 8) == ("OK",)


async def test_request_keeps_its_body_whatever_another_submits_under_its_id(on):
    t, store = on, on.store
    await t.submit("r0", b"first")
    assert await t.submit("r0", b"second", nonce="other") == ("DUPLICATE", ["queued"])
    assert await store.bodies(["r0"]) == [b"first"]
    # The other's body is on its way in while the first is submitted: as their pipelines may mix.
    await store.call("SET", store.keys.incoming("other-r1"), b"second", "PX", HOUR_MS)
    await t.submit("r1", b"first")
    assert await t.submit("r1", b"second", nonce="other") == ("DUPLICATE", ["queued"])
    assert await store.bodies(["r1"]) == [b"first"]
    assert await store.call("KEYS", f"{store.keys.prefix}incoming:*") == []


async def test_refused_request_leaves_no_body_however_often_it_is_repeated(on):
    t, store = on, on.store
    limited = Store(settings_for_same_topic(store, scheduler_max_size=1))
    try:
        await t.submit("r0")
        t.store = limited
        for _ in range(2):
            assert await t.submit("r1") == ("FULL", [1])
        assert await store.bodies(["r1"]) == [None]
        assert await store.call("KEYS", f"{store.keys.prefix}incoming:*") == []
    finally:
        await limited.close()


def settings_for_same_topic(store: Store, **more: Any) -> Any:
    return store._settings.model_copy(update=more)


async def test_submit_that_is_repeated_after_the_end_does_not_begin_again(on):
    t, store = on, on.store
    await register(store, "m", "mixed", 1024, 8)
    await t.submit("r0")
    (run,) = await t.serve("m")
    assert await t.finish(run) == await t.finish(run) == 1
    assert await t.submit("r0") == ("QUEUED", [1])
    assert await t.state("r0") == "done" and len(await t.out()) == 1
    assert await t.is_empty(["m"], ["r0"])


async def test_request_that_is_put_back_twice_is_queued_once_with_the_first_body(on):
    t, store = on, on.store
    await register(store, "m", "mixed", 1024, 8)
    await t.submit("r0")
    (run,) = await t.serve("m")
    await t.give_back(run)
    assert await t.resubmit("r0", b"one") == ["QUEUED", 2]
    assert await t.resubmit("r0", b"two") == ["HELD", "queued"]
    assert await store.bodies(["r0"]) == [b"one"] and await store.queue_depth() == 1


# ---- who may say what --------------------------------------------------------------------------------------------


async def test_prefill_can_neither_give_back_nor_finish_what_decode_owns(on):
    t, store = on, on.store
    await register(store, "p", "prefill", 1024, 8)
    await register(store, "d", "decode", 1024, 8)
    await t.submit("r0")
    (run,) = await t.serve("p")
    assert await t.step(run) == 1
    of_prefill = (*run[:2], "p")
    assert await t.give_back(of_prefill) == await t.finish(of_prefill) == await t.step(of_prefill) == 0
    assert await t.state("r0") == "decode" and await t.finish(run) == 1


async def test_lost_request_is_cancelled_or_expires_and_its_front_end_hears_it_once(on):
    t, store = on, on.store
    await register(store, "m", "mixed", 1024, 8)
    for request_id, end in (("r0", "cancelled"), ("r1", "expired")):
        await t.submit(request_id)
        (run,) = await t.serve("m")
        await t.give_back(run)
        if end == "cancelled":
            assert await store.cancel(request_id, "enough", HOUR_MS) == (True, "lost")
        else:
            await store.call("ZADD", store.keys.deadlines, "XX", 1, request_id)
            assert await store.expire(10, HOUR_MS) == 1
        assert await t.resubmit(request_id) == ["ENDED", end, (await store.request_record(request_id))["reason"]]
        told = [decode_output(i, v) for i, v in await t.out() if i == request_id]
        assert [type(o).__name__ for o in told] == ["Lost", "Output"] and told[-1].epoch == 3
    assert await t.is_empty(["m"], ["r0", "r1"])


# ---- who is gone -------------------------------------------------------------------------------------------------


async def test_request_of_a_front_end_that_is_gone_is_not_begun_and_waits_for_it_until_its_deadline(on):
    t, store = on, on.store
    await register(store, "m", "mixed", 1024, 8)
    await t.submit("r0")
    await t.submit("r1")
    await store.close_out("f0")
    assert await t.serve("m", 2) == []
    assert [await t.state(i) for i in ("r0", "r1")] == ["lost", "lost"] and await store.queue_depth() == 0
    assert (await store.instance_fields("m"))["reserved_tokens"] == "0"
    # It only slept.
    await store.open_out("f0", HOUR_MS)
    assert await t.resubmit("r0") == ["QUEUED", 2]
    (run,) = await t.serve("m")
    assert await t.finish(run) == 1
    await store.call("ZADD", store.keys.deadlines, "XX", 1, "r1")
    await t.sweeper.sweep()
    assert await t.state("r1") == "expired" and await t.is_empty(["m"], ["r0", "r1"])


async def test_outputs_for_a_front_end_that_is_gone_do_not_make_its_stream_again(on):
    t, store = on, on.store
    await register(store, "m", "mixed", 1024, 8)
    await t.submit("r0")
    (run,) = await t.serve("m")
    await store.close_out("f0")
    assert await reply_of(store.publish, "f0", ["r0", "1:0:7"]) is None
    assert await t.finish(run) == 1
    assert not await store.call("EXISTS", store.keys.out("f0"))
    assert await t.is_empty(["m"], ["r0"])


async def test_instances_that_are_gone_do_not_hide_the_one_that_has_room(on_every):
    """More candidates than are looked at in one go, some without a lease, most of them full."""
    t, store = on_every, on_every.store
    await register(store, "p", "prefill", 1024, 8)
    names = [f"d{i:02d}" for i in range(45)]
    for name in names:
        await register(store, name, "decode", 16, 1 if name == "d41" else 0)
    gone = [name for i, name in enumerate(names) if i % 3 == 0]
    await asyncio.gather(*map(t.lapse, gone))
    await t.submit("r0")
    ((_, _, chosen),) = await t.serve("p")
    assert chosen == "d41"
    left = await store.call("ZRANGE", store.keys.decode_load, 0, -1)
    assert not set(left) & set(gone[:14])


# ---- limits ------------------------------------------------------------------------------------------------------


async def test_history_is_bounded_and_stays_readable_text(on):
    t, store = on, on.store
    await register(store, "m", "mixed", 1024, 8)
    await t.submit("r0")
    for attempt in range(12):
        (run,) = await t.serve("m")
        await t.give_back(run, f"attempt {attempt} " + "ü€😀" * 60 + "x" * (attempt % 5))
        await t.resubmit("r0") if attempt < 4 else await _force(t, attempt)
    raw = await store.call("HGET", store.keys.request("r0"), "history", binary=True)
    assert 1900 < len(raw) <= 2000
    assert "attempt 11" in raw.decode() and "attempt 0 " not in raw.decode()


async def _force(t: Topic, attempt: int) -> None:
    """Put back although the attempts are used up."""
    await t.store.call("HSET", t.store.keys.request("r0"), "attempts", 1)
    assert (await t.resubmit("r0"))[0] == "QUEUED", attempt


async def test_long_reason_is_cut(on):
    t, store = on, on.store
    await register(store, "m", "mixed", 1024, 8)
    await t.submit("r0")
    (run,) = await t.serve("m")
    await t.give_back(run, "é" * 100_000, retry=False)
    record = await store.request_record("r0")
    assert len(record["reason"]) <= 2000 and record["reason"].startswith("éé") and "\ufffd" not in record["reason"]
    ((_, value),) = await t.out()
    assert len(value) < 10_000
