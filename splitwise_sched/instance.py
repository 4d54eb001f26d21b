"""An instance's side of the scheduler, on asyncio: lease, claims, inbox, outputs.

``sync.Instance`` wraps it for engine loops that are no coroutines; both have the same behaviour. Five tasks: one renews
the lease as long as the serving loop shows that it is alive, one claims and binds, one reads inbox and control stream,
one starts anew under a new id when the lease was lost, and one sweeps now and then (sweeper.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any

from splitwise_sched.errors import (
    IncompatibleInstance,
    SplitwiseError,
    StoreUnavailable,
)
from splitwise_sched.intake import Intake, Room
from splitwise_sched.lease import Lease
from splitwise_sched.outputs import encode_output
from splitwise_sched.placement import choose_shard, has_company, no_shard_left, one_at_a_time, open_to, take_census
from splitwise_sched.records import (
    InstanceEvent,
    LeaseLost,
    Registration,
)
from splitwise_sched.runs import Runs
from splitwise_sched.settings import SchedulerSettings
from splitwise_sched.store import Store
from splitwise_sched.sweeper import Sweeper
from splitwise_sched.tasks import end, keep_going
from splitwise_sched.types import Output, Role, check_id

logger = logging.getLogger(__name__)

HELD_POLL_S = 0.02
REREGISTER_PAUSE_S = 1.0


class InstanceSession:
    """One instance of a topic.

    Args:
        on_event: called in the event loop's thread with everything that the serving loop must act on.

    ``start`` registers; ``close`` gives back what is held and leaves. All other methods return at once and must be
    called in the event loop's thread.
    """

    def __init__(
        self, settings: SchedulerSettings, registration: Registration, on_event: Callable[[InstanceEvent], None]
    ) -> None:
        check_id("instance", registration.name)
        self.instance_id = ""
        self.shard = settings.scheduler_shard or 0
        self.store = Store(settings, self.shard)
        self._settings = settings
        self._registration = registration
        self._emit = on_event
        self._retain_ms = int(settings.scheduler_ttl * 1000)
        self._room = Room()
        self._lease = Lease(settings.instance_lease_s)
        self._runs = Runs(self._emit)
        self._intake: Intake | None = None
        self._avoided_until: dict[tuple[str, str], float] = {}
        self.num_pairs_avoided = 0
        self._is_draining = False
        self._claiming: asyncio.Task[None] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._supervisor: asyncio.Task[None] | None = None
        self._sweeping: asyncio.Task[None] | None = None
        self._lost: asyncio.Future[str] | None = None
        self._has_moved = asyncio.Event()
        self._wants_company = False

    # ---- life ----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Connect, check the server, register. When it raises, nothing runs on.

        Raises:
            StoreUnavailable, StoreUnsuitable: see Store.connect.
            IncompatibleInstance: a live instance of the topic has another model or KV layout.
        """
        try:
            await self.store.connect()
            self.alive()
            await self._take_place()
        except SplitwiseError:
            await self.store.close()
            raise
        self._supervisor = asyncio.create_task(keep_going(self._supervise))
        self._sweeping = asyncio.create_task(keep_going(self._sweep))

    async def close(self) -> None:
        """Stop claiming, hand what is held back to the queue, give up the lease. Idempotent."""
        if self._supervisor is not None:
            assert self._sweeping is not None
            await end(self._supervisor, self._sweeping)
            self._supervisor = None
            await self._stop_tasks()
            try:
                await asyncio.wait_for(self._leave(), timeout=5)
            except (StoreUnavailable, asyncio.TimeoutError) as exc:
                logger.warning("%s could not take its leave; its lease will lapse: %s", self.instance_id, exc)
        await self.store.close()

    async def _sweep(self) -> None:
        """Front ends sweep more often; when the last of them dies, somebody has to end what it wanted."""
        period_s = self._settings.frontend_lease_s / 2
        while True:
            store = self.store
            sweeper = Sweeper(store, retain_ms=self._retain_ms, period_s=period_s)
            sweeping = asyncio.create_task(keep_going(sweeper.run))
            try:
                await self._has_moved.wait()
                self._has_moved.clear()
            finally:
                await end(sweeping)

    async def _take_place(self, *, wants_company: bool = False) -> None:
        """Register, in a shard that has need of this instance when it is free to choose."""
        if not self._is_free_to_choose:
            await self._register()
            return
        async with one_at_a_time(self._settings):
            census = await take_census(self._settings)
            registration = self._registration
            mine = open_to(registration, census)
            if not any(records is not None for records in mine):
                if any(records is None for records in census):
                    raise StoreUnavailable("the shards that answer are of another model or KV layout")
                raise no_shard_left(registration, self._settings.scheduler_topic, census)
            chosen = choose_shard(registration.name, registration.role, mine, wants_company=wants_company)
            if chosen is not None and chosen != self.shard:
                await self._move(chosen)
            await self._register()

    @property
    def _is_free_to_choose(self) -> bool:
        return self._settings.scheduler_shards > 1 and self._settings.scheduler_shard is None

    async def _move(self, shard: int) -> None:
        store = Store(self._settings, shard)
        try:
            await store.connect()
        except SplitwiseError:
            await store.close()
            raise
        self.store, old = store, self.store
        self.shard = shard
        self._has_moved.set()
        await old.close()

    async def _look_for_company(self) -> None:
        """An instance that nobody can form a pair with goes where it is of use, when it holds nothing."""
        patience_s = 2 + 2 * self._settings.instance_lease_s
        loop = asyncio.get_running_loop()
        alone_since = loop.time()
        while True:
            await asyncio.sleep(patience_s / 4)
            with contextlib.suppress(StoreUnavailable):
                if has_company(self._registration.role, await self.store.live_instances()):
                    alone_since = loop.time()
                elif loop.time() - alone_since > patience_s and not self._runs and not self._is_draining:
                    census = open_to(self._registration, await take_census(self._settings))
                    name, role = self._registration.name, self._registration.role
                    if choose_shard(name, role, census, wants_company=True) not in (None, self.shard):
                        self._wants_company = True
                        self._lose(f"nobody in shard {self.shard} can form a pair with it")
                        return

    async def _leave(self) -> None:
        await self.store.settle()
        while not (await self.store.reap(self.instance_id, leave=True))[1]:
            pass

    async def _register(self) -> None:
        instance_id = f"{self._registration.name}-{secrets.token_hex(4)}"
        reply = await self.store.register(instance_id, self._registration, self._lease.lease_ms)
        if reply[0] != "OK":
            _, other, field, theirs = reply
            mine = self._registration.kind[field]
            raise IncompatibleInstance(field, mine, theirs, other, self._settings.scheduler_topic)
        if self._is_draining:
            await self.store.drain(instance_id)
        # Nothing is awaited from here on: what the tasks emit comes after LeaseLost of the registration before.
        self.instance_id = instance_id
        self._lost = asyncio.get_running_loop().create_future()
        self._runs = Runs(self._emit)
        self._intake = Intake(
            self.store, instance_id, self._runs, self._room,
            model=self._registration.model, has_shards=self._settings.scheduler_shards > 1, retain_ms=self._retain_ms,
            emit=self._emit, give_back=self.give_back, lose=self._lose,
        )  # fmt: skip
        self._tasks = [
            self._start(self._lease.keep(self.store, instance_id, self._lose)),
            self._start(self._intake.read_inbox()),
        ]
        if self._is_free_to_choose:
            self._tasks.append(self._start(self._look_for_company()))
        if not self._is_draining and self._registration.role is not Role.DECODE:
            self._claiming = self._start(self._intake.claim())
            self._tasks.append(self._claiming)

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task of this registration: should a bug end it, the instance begins anew rather than go on without it."""

        def ended(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and (exc := task.exception()) is not None:
                logger.error("%s failed", task.get_coro(), exc_info=exc)
                self._lose(f"it has a bug: {exc!r}")

        task = asyncio.create_task(work)
        task.add_done_callback(ended)
        return task

    async def _supervise(self) -> None:
        """Start anew under another id whenever the lease was lost."""
        while True:
            assert self._lost is not None
            reason = await self._lost
            logger.warning("%s leaves its place: %s", self.instance_id, reason)
            await self._stop_tasks()
            with contextlib.suppress(StoreUnavailable):
                # What it still held goes on elsewhere without waiting for a sweeper.
                await self._leave()
            await self._lease.until_alive(self._registration.name)
            while True:
                try:
                    await self._take_place(wants_company=self._wants_company)
                    self._wants_company = False
                    break
                except IncompatibleInstance as exc:
                    self._emit(LeaseLost(str(exc), None))
                    return
                except SplitwiseError as exc:
                    logger.warning("cannot register again yet: %s", exc)
                    await asyncio.sleep(REREGISTER_PAUSE_S)
            self._emit(LeaseLost(reason, self.instance_id))

    async def _stop_tasks(self) -> None:
        await end(*self._tasks)
        self._tasks = []

    def _lose(self, reason: str) -> None:
        if self._lost is not None and not self._lost.done():
            self._lost.set_result(reason)

    async def drain(self) -> None:
        """Take nothing more; what is held goes on to its end. Claims without a decode instance go back. Idempotent."""
        self._is_draining = True
        if self._claiming is not None and not self._claiming.done():
            assert self._intake is not None
            async with self._intake.binding:
                await end(self._claiming)
            await self._intake.return_claims()
        await self.store.drain(self.instance_id)

    async def until_empty(self) -> None:
        """Wait until nothing that was given to this instance is left, neither here nor on its way from Redis."""
        while True:
            if not self._runs and not await self.store.inbox_depth(self.instance_id):
                return
            await asyncio.sleep(HELD_POLL_S)

    async def change_role(self, role: Role, timeout_s: float) -> None:
        """Finish what is held, for ``timeout_s`` at most, and come back in another role: LeaseLost tells the new id."""
        await self.drain()
        deadline = asyncio.get_running_loop().time() + timeout_s
        while self._runs and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(HELD_POLL_S)
        self._registration = replace(self._registration, role=role)
        self._is_draining = False
        self._lose(f"its role changes to {role.value}")

    @property
    def num_held(self) -> int:
        """Runs that were assigned here and have not ended."""
        return len(self._runs)

    # ---- what the serving loop says ------------------------------------------------------------------------------

    def alive(self, load: Mapping[str, int | float | str] | None = None) -> None:
        """The serving loop is going round. Without this the lease lapses after ``instance_lease_s``."""
        self._lease.alive(load)

    def set_room(self, num_requests: int) -> None:
        """How many more prompts the engine would take now; nothing is claimed beyond that."""
        self._room.set(num_requests)

    def publish(self, outputs: Sequence[Output]) -> None:
        """Send outputs: one entry a front end, and the end of those that end. Outputs of dropped runs are left out."""
        entries: dict[str, dict[str, str]] = defaultdict(dict)
        ended, frontends = [], self._runs.frontends
        for output in outputs:
            frontend_id = frontends.get((output.request_id, output.epoch))
            if frontend_id is None:
                continue
            if output.finish_reason is not None:
                ended.append(output)
            else:
                entry = entries[frontend_id]
                if output.request_id in entry:
                    # An entry has one field a request.
                    self._send(frontend_id, entry)
                    entry = entries[frontend_id] = {}
                entry[output.request_id] = encode_output(output)
        for frontend_id, entry in entries.items():
            self._send(frontend_id, entry)
        for output in ended:
            self._runs.forget((output.request_id, output.epoch))
            assert output.finish_reason is not None
            self.store.finish(
                output.request_id,
                output.epoch,
                self.instance_id,
                encode_output(output),
                retain_ms=self._retain_ms,
                reason=output.finish_reason.value,
                notes=output.stats or {},
                on_reply=self._answered,
            )

    def _send(self, frontend_id: str, entry: Mapping[str, str]) -> None:
        values = [text for field in entry.items() for text in field]
        self.store.publish(frontend_id, values, on_reply=self._answered)

    def step(self, request_id: str, epoch: int, notes: Mapping[str, float | int | str]) -> None:
        """The request's KV is here and decode begins; ``Dropped`` follows when the run was over already."""

        def answered(reply: Any) -> None:
            self._answered(reply)
            if reply == 0:
                self._runs.drop(request_id, epoch, "it was taken back")

        self.store.step(request_id, epoch, self.instance_id, notes, on_reply=answered)

    def release(self, request_id: str, epoch: int) -> None:
        """This instance's part of a run is over without an end of the request: decode has taken it over."""
        self._runs.forget((request_id, epoch))

    def give_back(self, request_id: str, epoch: int, why: str, *, retry: bool, pair_failed: bool = False) -> None:
        """This instance cannot go on with the run.

        Args:
            retry: another try may succeed.
            pair_failed: because its KV did not get from prefill to decode: they are not put together again for a while
                when that happens often.
        """
        self._runs.forget((request_id, epoch))

        def answered(reply: Any) -> None:
            self._answered(reply)
            if isinstance(reply, list):
                prefill, decode, cool_down_ms = reply
                self._avoid(prefill, decode, cool_down_ms, why)

        self.store.give_back(
            request_id, epoch, self.instance_id, why, retry=retry, pair_failed=pair_failed, retain_ms=self._retain_ms,
            on_reply=answered,
        )  # fmt: skip

    def _avoid(self, prefill: str, decode: str, cool_down_ms: int, why: str) -> None:
        self.num_pairs_avoided += 1
        still = set(self.avoided_pairs)
        self._avoided_until = {pair: until for pair, until in self._avoided_until.items() if pair in still}
        self._avoided_until[(prefill, decode)] = time.monotonic() + cool_down_ms / 1000
        logger.warning(
            "KV transfers from %s to %s keep failing: they get no requests together for %g s; the last failed with: %s",
            prefill, decode, cool_down_ms / 1000, why,
        )  # fmt: skip

    @property
    def avoided_pairs(self) -> list[tuple[str, str]]:
        """(prefill, decode) avoided at this moment, of those that this instance told of; any thread may ask."""
        now = time.monotonic()
        return [pair for pair, until in list(self._avoided_until.items()) if until > now]

    def _answered(self, reply: Any) -> None:
        if isinstance(reply, Exception):
            # What was to be told is lost with it, so others must take the work over.
            self._lose(f"Redis did not take its outputs: {reply}")
