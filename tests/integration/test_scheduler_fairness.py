"""Who is served when prefill is short: shares by weight and tenant, deadlines, and nobody starves. The real scripts."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from splitwise_sched.errors import DeadlineUnreachable, InvalidRequest
from splitwise_sched.frontend import FrontEnd
from splitwise_sched.records import Claim, PrefillAssigned, Registration
from splitwise_sched.settings import SchedulerSettings
from splitwise_sched.store import Flow, Store
from splitwise_sched.types import Request, Role, SamplingParams
from tests.integration.toy import ToyInstance, settings_for, until

WEIGHTS = SchedulerSettings().class_weights
SHORT_QUEUE = 64


class Service:
    """One mixed instance that takes one request after the other, straight through the scripts."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.served: list[str] = []
        self._count = 0

    async def submit(
        self, priority: str = "default", tenant: str = "-", *, cost: int = 100, timeout_s: float = 900
    ) -> str:
        self._count += 1
        request_id = f"{priority}.{tenant}.{self._count:05d}"
        verdict, _ = await self.store.submit(
            request_id, b"body", frontend_id="nobody", nonce=request_id, timeout_ms=int(timeout_s * 1000),
            retain_ms=60_000, input_tokens=cost // 2, kv_tokens=cost, model="toy",
            flow=Flow(priority, WEIGHTS[priority], tenant),
        )  # fmt: skip
        assert verdict == "QUEUED"
        return request_id

    async def serve(self, count: int) -> list[str]:
        """The next ``count`` requests, in the order in which they are served."""
        served = []
        async with self.store.reader() as reader:
            for _ in range(count):
                claims: list[Claim] = await reader.claim("m0", 1, 1)
                if not claims:
                    break
                (bound,) = await self.store.bind("m0", claims, 60_000)
                assert bound.verdict == "BOUND"
                served.append(bound.request_id)
                done: asyncio.Future[object] = asyncio.get_running_loop().create_future()
                self.store.finish(
                    bound.request_id, claims[0].epoch, "m0", "1:0:7", retain_ms=60_000, reason="stop", notes={},
                    on_reply=done.set_result,
                )  # fmt: skip
                assert await done == 1
        return served


@asynccontextmanager
async def service_on(server, topic: str) -> AsyncIterator[Service]:
    store = Store(settings_for(server, topic))
    await store.connect()
    try:
        registration = Registration("m0", Role.MIXED, "toy", {}, 10**9, 10**6, 16, 4096)
        assert (await store.register("m0", registration, 600_000))[0] == "OK"
        await store.open_out("nobody", 600_000)
        yield Service(store)
    finally:
        await store.close()


def shares(served: list[str], part: int) -> dict[str, float]:
    counts = Counter(request_id.split(".")[part] for request_id in served)
    return {name: count / len(served) for name, count in counts.items()}


async def test_classes_share_by_weight_while_all_have_work(every_redis_server, topic):
    async with service_on(every_redis_server, topic) as service:
        await asyncio.gather(*(service.submit(c) for _ in range(400) for c in WEIGHTS))
        await service.serve(SHORT_QUEUE)
        got = shares(await service.serve(390), 0)
    total = sum(WEIGHTS.values())
    for name, weight in WEIGHTS.items():
        assert got[name] == pytest.approx(weight / total, rel=0.05)


async def test_tenants_of_a_class_share_tokens_equally_however_much_each_sends(redis_server, topic):
    async with service_on(redis_server, topic) as service:
        for _ in range(300):
            await service.submit(tenant="greedy", cost=50)
            await service.submit(tenant="greedy", cost=50)
            await service.submit(tenant="modest", cost=200)
        await service.serve(SHORT_QUEUE)
        served = await service.serve(300)
    tokens = Counter()
    for request_id in served:
        tokens[request_id.split(".")[1]] += 50 if "greedy" in request_id else 200
    assert tokens["greedy"] == pytest.approx(tokens["modest"], rel=0.05)


async def test_nobody_starves_under_a_stream_of_higher_classes(redis_server, topic):
    async with service_on(redis_server, topic) as service:
        for _ in range(SHORT_QUEUE + 20):
            await service.submit("interactive")
        lonely = await service.submit("batch")
        served: list[str] = []
        while lonely not in served:
            served += await service.serve(4)
            await asyncio.gather(*(service.submit("interactive") for _ in range(4)))
            assert len(served) < 2 * SHORT_QUEUE + WEIGHTS["interactive"] * 2


async def test_flow_that_was_idle_has_saved_nothing_up(redis_server, topic):
    async with service_on(redis_server, topic) as service:
        for _ in range(SHORT_QUEUE + 300):
            await service.submit(tenant="busy")
        await service.serve(SHORT_QUEUE + 150)
        for _ in range(100):
            await service.submit(tenant="late")
        await service.serve(SHORT_QUEUE)
        got = shares(await service.serve(60), 1)
    assert got["late"] == pytest.approx(0.5, abs=0.05)


async def test_earliest_deadline_goes_first_inside_a_tenants_class(redis_server, topic):
    async with service_on(redis_server, topic) as service:
        for _ in range(SHORT_QUEUE):
            await service.submit()
        late = [await service.submit(timeout_s=900 - i) for i in range(20)]
        await service.serve(SHORT_QUEUE)
        assert await service.serve(20) == late[::-1]


async def test_cancelled_and_expired_requests_leave_the_waiting_room_empty(redis_server, topic):
    async with service_on(redis_server, topic) as service:
        ids = [await service.submit(("interactive", "batch")[i % 2], f"t{i % 3}") for i in range(SHORT_QUEUE + 40)]
        for request_id in ids[SHORT_QUEUE:]:
            assert (await service.store.cancel(request_id, "test", 60_000))[0]
        for request_id in ids[:10]:
            await service.store.cancel(request_id, "test", 60_000, "expired")
        assert await service.serve(1000) == ids[10:SHORT_QUEUE]
        counters = await service.store.counters()
        keys = await service.store.call("KEYS", service.store.keys.prefix + "waiting*")
        assert counters["waiting"] == "0" and keys == []
        assert await service.store.call("EXISTS", service.store.keys.prefix + "backlog") == 0


async def test_depth_counts_those_in_the_waiting_room(redis_server, topic):
    settings = settings_for(redis_server, topic, scheduler_max_size=SHORT_QUEUE + 5)
    async with FrontEnd(settings) as frontend:
        refused = 0
        for i in range(SHORT_QUEUE + 8):
            try:
                await frontend.submit(Request(f"r{i}", "toy", (1, 2)))
            except Exception as exc:
                refused += 1
                assert f"holds {SHORT_QUEUE + 5} requests" in str(exc)
        assert refused == 3


async def test_class_that_is_not_there_is_refused_with_those_that_are(redis_server, topic):
    async with FrontEnd(settings_for(redis_server, topic)) as frontend:
        with pytest.raises(InvalidRequest, match="priority is 'vip': the classes here are interactive, default, batch"):
            await frontend.submit(Request("r0", "toy", (1, 2), priority="vip"))


async def test_request_that_would_expire_in_the_queue_is_refused_at_once(redis_server, topic):
    settings = settings_for(redis_server, topic)
    async with (
        FrontEnd(settings) as frontend,
        ToyInstance(settings, Role.MIXED, "m0", capacity_tokens=64, pause_s=0.05, room=1) as mixed,
    ):

        def request(i: int, timeout_s: float) -> Request:
            return Request(f"r{i}", "toy", tuple(range(1, 33)), SamplingParams(max_tokens=4), timeout_s=timeout_s)

        for i in range(200):
            await frontend.submit(request(i, 900))
        await until(lambda: frontend.store.call("GET", frontend.store.keys.prefix + "prefill-rate"))
        await mixed.wait_for(PrefillAssigned, 2)
        with pytest.raises(DeadlineUnreachable, match=r"would take \d+ s, which is more than its 1 s"):
            await frontend.submit(request(1000, 1))
        await frontend.submit(request(1001, 900))


async def test_memory_of_who_was_served_goes_when_nobody_waits_any_more(redis_server, topic):
    async with service_on(redis_server, topic) as service:
        store = service.store
        memories = [store.keys.prefix + name for name in ("virtual-time", "served:classes", "served:class:default")]

        async def times_to_live_ms() -> set[int]:
            return {await store.call("PTTL", name) for name in memories}

        requests = [await service.submit(tenant=f"tenant{i % 3}") for i in range(SHORT_QUEUE + 10)]
        await service.serve(7)
        # Tenants that have left the room, and some that are in it still.
        assert await store.call("PTTL", memories[0]) == -1
        await service.serve(3)
        assert min(await times_to_live_ms()) > 0
        # Somebody waits again: what is remembered holds for as long as that takes.
        requests += [await service.submit() for _ in range(20)]
        assert await times_to_live_ms() == {-1}
        for request_id in requests:
            await store.cancel(request_id, "enough", 1000)
        assert min(await times_to_live_ms()) > 0
