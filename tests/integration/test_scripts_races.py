"""One request, the participants that hold it, and what may come between them: every order in which it can happen.

A script is atomic, so whatever is concurrent happens in some order of scripts. Participants go on with what they know,
also after they were disturbed: that is what a zombie does.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pytest

from splitwise_sched.assembly import Assembly
from splitwise_sched.connection import as_dict
from splitwise_sched.errors import Fenced
from splitwise_sched.outputs import Lost, decode_output
from splitwise_sched.records import Claim
from splitwise_sched.store import HELLO, Flow, Store
from splitwise_sched.types import Output
from tests.integration.toy import settings_for
from tests.scripts_topic import HOUR_MS, claim, register, reply_of, snapshot

ID = "r0"
GIVEN = {
    "frontend_id": "f0", "nonce": "n0", "timeout_ms": HOUR_MS, "retain_ms": HOUR_MS, "input_tokens": 8, "kv_tokens": 18,
    "model": "toy", "flow": Flow("default", 4, "-"),
}  # fmt: skip
ENDS = ("done", "cancelled", "expired", "failed")


class Race:
    """Instances p (prefill) and d (decode), or x (mixed) alone, and m (mixed). Who comes to the rescue is m, or the
    same again, who may then take one run for the other.

    Each step is what one participant does next, or nothing when it does not know of anything to do.
    """

    def __init__(self, store: Store, *, is_mixed: bool, is_rescued_by_same: bool) -> None:
        self.store = store
        self.prefill, self.decode = ("x", "x") if is_mixed else ("p", "d")
        self.rescuers = (self.prefill, self.decode) if is_rescued_by_same else ("m", "m")
        self.claims: dict[str, list[Claim]] = {}
        self.bound: dict[str, list[tuple[str, int, str]]] = {}
        self.taken: list[tuple[str, int, str]] = []
        self.num_ends = 0
        self.has_slept = False
        self.heard: list[tuple[str, str]] = []

    async def open(self) -> None:
        await self.store.open_out("f0", HOUR_MS)
        for name, role in (("p", "prefill"), ("d", "decode"), ("m", "mixed"), ("x", "mixed")):
            if name in (self.prefill, self.decode, "m"):
                assert await register(self.store, name, role, 1024, 8) == ("OK",)
        assert await self.store.submit(ID, b"body", **GIVEN) == ("QUEUED", [1])

    # ---- the participants ----------------------------------------------------------------------------------------

    async def claim(self) -> None:
        await self._claim(self.prefill)

    async def _claim(self, name: str) -> None:
        try:
            self.claims[name] = self.claims.get(name, []) + await claim(self.store, name, 4)
        except Fenced:
            pass

    async def bind(self) -> None:
        await self._bind(self.prefill)

    async def bind_again(self) -> None:
        await self._bind(self.prefill)

    async def _bind(self, name: str) -> None:
        """Claims stay known, so that the next call repeats this one."""
        if not self.claims.get(name):
            return
        try:
            bound = await self.store.bind(name, self.claims[name], HOUR_MS)
        except Fenced:
            return
        pairs = zip(self.claims[name], bound, strict=True)
        self.bound[name] = [(c.request_id, c.epoch, name) for c, b in pairs if b.verdict == "BOUND"]

    async def take(self) -> None:
        self.taken += await self._inbox_of(self.decode)

    async def _inbox_of(self, name: str) -> list[tuple[str, int, str]]:
        rows = [as_dict(fields) for _, fields in await self.store.call("XRANGE", self.store.keys.inbox(name), "-", "+")]
        return [(f["id"], int(f["epoch"]), name) for f in rows]

    async def step(self) -> None:
        for run in self.taken:
            await reply_of(self.store.step, *run, {})

    async def finish(self) -> None:
        for run in self.taken:
            await self._finish(run)
        self.taken.clear()

    async def _finish(self, run: tuple[str, int, str]) -> None:
        output = f'{run[1]}:0:7 8:{{"finish":"stop"}}'
        before = await self._state()
        ended = await reply_of(self.store.finish, *run, output, retain_ms=HOUR_MS, reason="stop", notes={})
        self.num_ends += ended == 1 and before not in ENDS

    async def _state(self) -> str:
        (state,) = await self.store.request_states([ID])
        assert state is not None
        return state[0]

    # ---- what comes between them ---------------------------------------------------------------------------------

    async def cancel(self) -> None:
        await self.store.cancel(ID, "enough", HOUR_MS)

    async def expire(self) -> None:
        await self.store.call("ZADD", self.store.keys.deadlines, "XX", 1, ID)
        await self.store.expire(10, HOUR_MS)

    async def reap_prefill(self) -> None:
        await self._reap(self.prefill)

    async def reap_decode(self) -> None:
        await self._reap(self.decode)

    async def _reap(self, name: str) -> None:
        await self.store.call("UNLINK", self.store.keys.instance(name))
        while not (await self.store.reap(name, 1))[1]:
            pass

    async def give_back_prefill(self) -> None:
        for run in self.bound.get(self.prefill, []):
            await reply_of(self.store.give_back, *run, "it broke", retry=True, retain_ms=HOUR_MS)

    async def give_back_decode(self) -> None:
        for run in self.taken:
            await reply_of(self.store.give_back, *run, "it broke", retry=True, retain_ms=HOUR_MS)

    async def frontend_sleeps(self) -> None:
        """It has read all that it was told so far."""
        self.heard, self.has_slept = await self._told(), True
        await self.store.close_out("f0")

    async def cancel_orphans(self) -> None:
        assert (await self.store.cancel_orphans("f0", 10, HOUR_MS))[1] == "0"

    async def frontend_wakes(self) -> None:
        await self.store.open_out("f0", HOUR_MS)

    # ---- the rescue ----------------------------------------------------------------------------------------------

    async def resubmit(self) -> None:
        await self.store.resubmit(ID, b"body", **GIVEN, epoch_seen=1, attempts=0, done_too=False)

    async def rescue_claim(self) -> None:
        await self._claim(self.rescuers[0])

    async def rescue_bind(self) -> None:
        await self._bind(self.rescuers[0])

    async def rescue_finish(self) -> None:
        """What it bound, and what others gave it to decode."""
        for run in {*self.bound.get(self.rescuers[1], []), *await self._inbox_of(self.rescuers[1])}:
            await self._finish(run)

    # ---- afterwards ----------------------------------------------------------------------------------------------

    async def run(self, order: Sequence[str]) -> None:
        await self.open()
        for step in order:
            await getattr(self, step)()
        assert self.num_ends <= 1
        self.rescuers = ("m", "m")
        await self._bring_to_its_end()
        await self._check()

    async def _bring_to_its_end(self) -> None:
        for _ in range(3):
            for instance_id in (await self.store.lapsed()).instances:
                await self._reap(instance_id)
            for step in ("bind", "take", "step", "finish", "resubmit", "rescue_claim", "rescue_bind", "rescue_finish"):
                if await self._state() in ENDS:
                    return
                await getattr(self, step)()
        raise AssertionError("it never ends")

    async def _check(self) -> None:
        for instance_id in (await self.store.lapsed()).instances:
            await self._reap(instance_id)
        names = sorted({self.prefill, self.decode, "m"})
        now = await snapshot(self.store, names, ["f0"], [ID])
        request = now["requests"][ID]
        assert self.num_ends == (request["state"] == "done")
        assert request["state"] in ENDS and request["body"] is None
        assert not any(now["queues"].values()) and not any(now["inboxes"].values()) and not now["deadlines"]
        assert set(now["leases"].values()) == {(0, 0)}
        told = [*self.heard, *await self._told()]
        words = [decode_output(request_id, value) for request_id, value in told]
        num_lost = sum(isinstance(word, Lost) for word in words)
        num_ended = len(words) - num_lost
        counted = now["counters"].get("lost", 0)
        assert now["counters"][request["state"]] == 1 and counted <= 2
        if self.has_slept:
            # What it was told meanwhile is lost; that a request is done it learns when it asks.
            assert num_lost <= counted and num_ended <= 1
        else:
            assert num_lost == counted and num_ended == 1
        if num_ended:
            assert self._tokens(words) == ([7, 8] if request["state"] == "done" else [])

    async def _told(self) -> list[tuple[str, str]]:
        """(request, value) in the front end's stream"""
        entries = await self.store.call("XRANGE", self.store.keys.out("f0"), "-", "+")
        return [pair for _, fields in entries for pair in as_dict(fields).items() if pair[0] != HELLO]

    def _tokens(self, words: Iterable[Output | Lost]) -> list[int]:
        """What the front end makes of what it was told."""
        assembly = Assembly()
        for word in words:
            if isinstance(word, Lost):
                assembly.raise_epoch(word.epoch)
            else:
                assembly.feed(word)
        assert assembly.ended
        return assembly.token_ids


SERVING = ("claim", "bind", "take", "step", "finish")
RESCUE = ("resubmit", "rescue_claim", "rescue_bind", "rescue_finish")
DISTURBANCES = ("cancel", "expire", "reap_prefill", "reap_decode", "give_back_prefill", "give_back_decode")


def merges(one: Sequence[str], other: Sequence[str]) -> Iterator[list[str]]:
    """All orders of both that keep the order of each."""
    for places in itertools.combinations(range(len(one) + len(other)), len(other)):
        first, second = iter(one), iter(other)
        yield [next(second) if i in places else next(first) for i in range(len(one) + len(other))]


def orders_with(disturbance: str) -> Iterator[list[str]]:
    """The disturbance at each place of the service; what is left of that, mixed with the rescue in every way."""
    ends_it = disturbance in ("cancel", "expire")
    first = {"give_back_prefill": 2, "give_back_decode": 3}.get(disturbance, 0)
    for place in range(first, len(SERVING) + 1):
        for rest in merges(SERVING[place:], RESCUE[:1] if ends_it else RESCUE):
            yield [*SERVING[:place], disturbance, *rest]


async def run_all(server: Any, topic: str, orders: Iterable[list[str]], **kind: bool) -> int:
    store = Store(settings_for(server, topic))
    await store.connect()
    count = 0
    try:
        for order in orders:
            try:
                await Race(store, **{"is_mixed": False, "is_rescued_by_same": False, **kind}).run(order)
            except AssertionError as exc:
                raise AssertionError(f"{exc} in the order {order}") from exc
            await store.call("UNLINK", *await store.call("KEYS", f"{store.keys.prefix}*"))
            count += 1
    finally:
        await store.close()
    return count


@pytest.mark.parametrize("same", [False, True], ids=["rescued by another", "rescued by the same"])
@pytest.mark.parametrize("disturbance", DISTURBANCES)
async def test_request_ends_once_and_holds_nothing_whenever_it_is_disturbed(
    every_redis_server, topic, disturbance, same
):
    orders = orders_with(disturbance)
    assert await run_all(every_redis_server, topic, orders, is_rescued_by_same=same) >= 21


@pytest.mark.parametrize("disturbance", ["cancel", "expire", "reap_decode", "give_back_decode"])
async def test_mixed_instance_is_disturbed_at_any_time(redis_server, topic, disturbance):
    orders = orders_with(disturbance)
    assert await run_all(redis_server, topic, orders, is_mixed=True, is_rescued_by_same=True) >= 21


async def test_two_disturbances_at_any_times(redis_server, topic):
    serving = [*SERVING[:2], "bind_again", *SERVING[2:]]

    def orders() -> Iterator[list[str]]:
        for pair in itertools.permutations(DISTURBANCES, 2):
            for order in merges(serving, pair):
                last = max(order.index(disturbance) for disturbance in pair)
                yield [*order[: last + 1], "resubmit", *order[last + 1 :]]

    assert await run_all(redis_server, topic, orders()) == 30 * 28


async def test_second_instance_that_claims_while_the_first_is_reaped(redis_server, topic):
    """Rescue comes before the reaper: the two instances never hold the same run."""
    orders = merges([*SERVING[:2], "reap_prefill"], ["rescue_claim", "rescue_bind", "rescue_finish"])
    assert await run_all(redis_server, topic, orders) == 20


async def test_front_end_that_sleeps_past_its_lease_and_wakes_again_at_any_time(redis_server, topic):
    """Whatever an instance does meanwhile, and whether a sweeper came round: nothing is held, and it ends."""
    for sweeps in (("cancel_orphans",), ()):
        orders = merges(SERVING, ("frontend_sleeps", *sweeps, "frontend_wakes", "resubmit"))
        assert await run_all(redis_server, topic, orders) == (126 if sweeps else 56)


async def test_orphan_is_swept_while_it_is_disturbed_otherwise(redis_server, topic):
    def orders() -> Iterator[list[str]]:
        for disturbance in DISTURBANCES:
            for place in range(3, len(SERVING) + 1):
                for sleep in merges(("frontend_sleeps", "cancel_orphans", "frontend_wakes"), (disturbance,)):
                    yield [*SERVING[:place], *sleep, "resubmit", *SERVING[place:]]

    assert await run_all(redis_server, topic, orders()) == 6 * 3 * 4
