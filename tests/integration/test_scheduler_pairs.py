"""A prefill and a decode instance between which KV keeps failing to arrive are kept apart for a while."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from typing import Any

import pytest

from splitwise_sched.frontend import FrontEnd
from splitwise_sched.records import DecodeAssigned, PrefillAssigned
from splitwise_sched.store import Flow, Store
from splitwise_sched.types import Request, Role, SamplingParams
from tests.integration.toy import ToyInstance, settings_for, until
from tests.scripts_topic import HOUR_MS, claim, register, reply_of

GIVEN = {
    "frontend_id": "f0", "timeout_ms": HOUR_MS, "retain_ms": HOUR_MS, "input_tokens": 8, "kv_tokens": 16,
    "model": "toy", "flow": Flow("default", 4, "-"),
}  # fmt: skip


class Topic:
    """Prefill p, and decode instances that tests register."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._numbers = itertools.count()

    async def place(self, prefill: str = "p") -> tuple[str, int, str]:
        """Where a new request gets; "" when it has to wait."""
        request_id = f"r{next(self._numbers)}"
        await self.store.submit(request_id, b"body", nonce=request_id, **GIVEN)
        (claimed,) = await claim(self.store, prefill, 1)
        (bound,) = await self.store.bind(prefill, [claimed], HOUR_MS)
        return request_id, claimed.epoch, bound.decode_instance

    async def fail(self, run: tuple[str, int, str], *, of: str | None = None, pair_failed: bool = True) -> Any:
        request_id, epoch, decode = run
        return await reply_of(
            self.store.give_back, request_id, epoch, of or decode, "the link broke", retry=True, retain_ms=HOUR_MS,
            pair_failed=pair_failed,
        )  # fmt: skip

    async def fail_on(self, decode: str, times: int) -> Any:
        """The answer to the last of so many failures between p and ``decode``."""
        answer = None
        while times > 0:
            run = await self.place()
            assert run[2] == decode
            answer = await self.fail(run)
            times -= 1
        return answer

    async def pass_cool_down(self, decode: str) -> None:
        await self.store.call("HSET", f"{self.store.keys.prefix}pair:p|{decode}", "avoided_until_ms", 1)

    async def pair(self, decode: str) -> dict[str, str]:
        reply = await self.store.call("HGETALL", f"{self.store.keys.prefix}pair:p|{decode}")
        return reply if isinstance(reply, dict) else dict(zip(reply[::2], reply[1::2], strict=True))


@pytest.fixture
async def on(every_redis_server, topic) -> AsyncIterator[Topic]:
    store = Store(settings_for(every_redis_server, topic))
    await store.connect()
    await store.open_out("f0", HOUR_MS)
    await register(store, "p", "prefill", 1024, 8)
    yield Topic(store)
    await store.close()


async def test_pair_that_failed_three_times_gets_nothing_until_its_time_is_over(on):
    await register(on.store, "d0", "decode", 1024, 8)
    assert await on.fail_on("d0", 2) == 1
    assert await on.fail_on("d0", 1) == ["p", "d0", 5000]
    await register(on.store, "d1", "decode", 64, 8)
    chosen = [(await on.place())[2] for _ in range(3)]
    assert chosen == ["d1"] * 3, "although d0 is emptier"
    # With others, d0 serves as before.
    await register(on.store, "p2", "prefill", 1024, 8)
    assert (await on.place("p2"))[2] == "d0"
    shown = await on.pair("d0")
    assert shown["why"] == "the link broke" and shown["failures"] == "3" and shown["cool_down_ms"] == "5000"
    assert 0 < await on.store.call("PTTL", f"{on.store.keys.prefix}pair:p|d0") <= 15_000
    assert (await on.store.counters())["pairs_avoided"] == "1"
    await on.pass_cool_down("d0")
    assert (await on.place())[2] == "d0"


async def test_pair_that_fails_again_is_avoided_for_longer_each_time_up_to_a_bound(on):
    await register(on.store, "d0", "decode", 1024, 8)
    assert (await on.fail_on("d0", 3))[2] == 5000
    spans = []
    for _ in range(6):
        await on.pass_cool_down("d0")
        spans.append((await on.fail_on("d0", 1))[2])
    assert spans == [10_000, 20_000, 40_000, 80_000, 120_000, 120_000]


async def test_pair_is_used_all_the_same_when_there_is_no_other(on):
    await register(on.store, "d0", "decode", 1024, 8)
    await on.fail_on("d0", 3)
    assert (await on.place())[2] == "d0"
    # One that could not hold it is no other, one that is full at the moment is.
    await register(on.store, "small", "decode", 8, 8)
    assert (await on.place())[2] == "d0"
    await register(on.store, "full", "decode", 1024, 0)
    assert (await on.place())[2] == ""


async def test_failures_far_apart_and_of_other_kinds_do_not_count(on):
    await register(on.store, "d0", "decode", 1024, 8)
    await on.fail_on("d0", 2)
    await on.store.call("HINCRBY", f"{on.store.keys.prefix}pair:p|d0", "since_ms", -31_000)
    assert await on.fail_on("d0", 2) == 1
    for _ in range(5):
        assert await on.fail(await on.place(), pair_failed=False) == 1


async def test_failure_that_both_ends_tell_of_counts_once(on):
    await register(on.store, "d0", "decode", 1024, 8)
    for _ in range(2):
        run = await on.place()
        assert await on.fail(run, of="p") == 1
        assert await on.fail(run) == 0
    assert (await on.pair("d0"))["failures"] == "2"


async def test_transfers_that_were_under_way_do_not_make_it_longer(on):
    await register(on.store, "d0", "decode", 1024, 8)
    runs = [await on.place() for _ in range(6)]
    answers = [await on.fail(run) for run in runs]
    assert answers == [1, 1, ["p", "d0", 5000], 1, 1, 1]


async def test_dead_prefill_instance_gets_no_record_again(on):
    await register(on.store, "d0", "decode", 1024, 8)
    runs = [await on.place() for _ in range(3)]
    await on.store.call("UNLINK", on.store.keys.instance("p"))
    for run in runs:
        await on.fail(run)
    assert not await on.store.call("EXISTS", on.store.keys.instance("p"))


async def test_it_is_logged_once_and_shown_by_the_instance_that_tells(redis_server, topic, caplog):
    settings = settings_for(redis_server, topic)
    async with (
        ToyInstance(settings, Role.PREFILL, "p") as prefill,
        ToyInstance(settings, Role.DECODE, "d") as decode,
        FrontEnd(settings) as frontend,
    ):
        decode.gate.clear()
        prefill.keep_after_prefill = True
        for i in range(4):
            await frontend.submit(Request(f"r{i}", "toy", (1, 2), SamplingParams(max_tokens=4, temperature=0)))
        for run in await decode.wait_for(DecodeAssigned, 4):
            assert isinstance(run, DecodeAssigned)
            decode.session.give_back(run.request.request_id, run.epoch, "the cable", retry=True, pair_failed=True)
        await until(lambda: decode.session.num_pairs_avoided == 1)
        # There is no other: they come again.
        await prefill.wait_for(PrefillAssigned, 8)
        assert decode.session.avoided_pairs == [(prefill.session.instance_id, decode.session.instance_id)]
        told = [r.message for r in caplog.records if "keep failing" in r.message]
        assert len(told) == 1 and "for 5 s" in told[0] and told[0].endswith("the cable")
