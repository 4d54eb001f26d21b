"""The front end's side of the scheduler, on asyncio: it owns each request from submit until its last token.

Redis carries a request; the front end keeps it. Whatever happens to instances or to Redis, a request that has not ended
is still known here, with the tokens that its user already has, and is put back from here under a higher epoch.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections import deque
from collections.abc import Coroutine, Mapping
from dataclasses import replace
from typing import Any

from splitwise_sched.codec import encode_request
from splitwise_sched.errors import (
    DeadlineUnreachable,
    DuplicateRequest,
    QueueFull,
    RequestFailed,
    SplitwiseError,
    StoreUnavailable,
)
from splitwise_sched.output_stream import OutputStream
from splitwise_sched.outputs import Lost, decode_outputs
from splitwise_sched.records import InstanceRecord
from splitwise_sched.recovery import Recovery
from splitwise_sched.replication import ReplicationWatch
from splitwise_sched.settings import SchedulerSettings
from splitwise_sched.shards import INSTANCES_CACHE_S, Shard, Shards
from splitwise_sched.store import NO_PREFERENCE, Preference, Store
from splitwise_sched.sweeper import Sweeper
from splitwise_sched.tasks import Chores, end, keep_going
from splitwise_sched.terms import Terms
from splitwise_sched.types import FinishReason, Output, Request, check_id

logger = logging.getLogger(__name__)

BLOCK_MS = 1000
READ_COUNT = 512
SPILL_BATCH = 100
PAUSE_AFTER_FAILURE_S = 0.2


class FrontEnd:
    """Submits requests to a topic and streams their outputs.

    ``start`` (or ``async with``) before anything else; ``close`` cancels what has not ended. One is enough for a
    process; any number may serve a topic.
    """

    def __init__(self, settings: SchedulerSettings, *, name: str | None = None) -> None:
        self.settings = settings
        self.frontend_id = f"{check_id('front end', name or 'frontend')}-{secrets.token_hex(4)}"
        self.shards = Shards(settings)
        self.store = self.shards[0].store
        self._streams: dict[str, OutputStream] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._chores = Chores()
        self._lease_ms = int(settings.frontend_lease_s * 1000)
        self._retain_ms = int(settings.scheduler_ttl * 1000)
        self._terms = Terms(settings)
        self._ends: deque[float] = deque(maxlen=200)
        self._replication = ReplicationWatch(settings.durability_timeout_ms)
        self._recovery = Recovery(
            self.frontend_id, settings, self.shards, self._streams, chores=self._chores, renew=self._renew
        )

    async def __aenter__(self) -> FrontEnd:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Raises StoreUnavailable or StoreUnsuitable, see Store.connect; nothing runs on after that."""
        try:
            for shard in self.shards:
                await shard.store.connect()
                await shard.store.open_out(self.frontend_id, self._lease_ms)
                shard.seen_at = time.monotonic()
            if len(self.shards) > 1:
                await self.shards.look()
        except SplitwiseError:
            await self._close_stores()
            raise
        loops = [keep_going(self._recovery.end_late), *(loop for shard in self.shards for loop in self._loops(shard))]
        if len(self.shards) > 1:
            loops.append(keep_going(self.shards.keep_looking))
        self._tasks = [asyncio.create_task(loop) for loop in loops]

    def _loops(self, shard: Shard) -> list[Coroutine[Any, Any, None]]:
        sweeper = Sweeper(shard.store, retain_ms=self._retain_ms, period_s=self.settings.instance_lease_s / 4)
        of_shard = (self._read, self._keep_lease, self._recovery.verify, self._spill)
        return [*(keep_going(loop, shard) for loop in of_shard), keep_going(sweeper.run)]

    async def close(self) -> None:
        """Cancel what has not ended, and leave. Idempotent."""
        tasks, self._tasks = self._tasks, []
        if not tasks:
            return
        with contextlib.suppress(SplitwiseError, asyncio.TimeoutError):
            await asyncio.wait_for(self._leave(), timeout=5)
        await end(*tasks)
        await self._recovery.close()
        await self._chores.close()
        for stream in self._streams.values():
            stream.put(RequestFailed(stream.request_id, "cancelled", "its front end was shut down"))
        self._streams.clear()
        await self._close_stores()

    async def _close_stores(self) -> None:
        for shard in self.shards:
            await shard.store.close()

    async def _leave(self) -> None:
        cancels = (
            self._store_of(stream).cancel(request_id, "its front end was shut down", self._retain_ms)
            for request_id, stream in list(self._streams.items())
        )
        await asyncio.gather(*cancels)
        await asyncio.gather(*(shard.store.close_out(self.frontend_id) for shard in self.shards))

    def _store_of(self, stream: OutputStream) -> Store:
        return self.shards[stream.shard].store

    @property
    def num_unconfirmed(self) -> int:
        """Requests that were queued without a replica's having them in time (``durability="wait"``)."""
        return self._replication.num_unconfirmed

    @property
    def healthy(self) -> bool:
        """Redis answered within the front end's lease, on one shard at least."""
        seen_at = max(shard.seen_at for shard in self.shards)
        return time.monotonic() - seen_at < self.settings.frontend_lease_s

    # ---- requests ------------------------------------------------------------------------------------------------

    async def submit(self, request: Request) -> OutputStream:
        """Put a request into the queue.

        Raises:
            InvalidRequest: it could not be served anywhere.
            DuplicateRequest: the topic has seen this id.
            UnknownModel: the topic has shards, and none serves this model.
            QueueFull: with depth, limit and when to try again.
            DeadlineUnreachable: the same, because it would expire before its end.
            StoreUnavailable: Redis does not answer; the request may be queued nevertheless, and expires there.

        With ``durability="wait"``, a request that no replica had in time is queued all the same: its stream's
        ``num_replicas`` is 0, and should the master die with it, it is put back from here like any that was lost.
        """
        if request.sampling.seed is None and request.sampling.temperature > 0:
            request = replace(request, sampling=replace(request.sampling, seed=secrets.randbits(62)))
        timeout_s = self.settings.scheduler_ttl if request.timeout_s is None else request.timeout_s
        deadline = time.monotonic() + timeout_s
        flow, shard = self._terms.flow(request), await self.shards.choose(request.model, request.prefer)
        preference = await self._preference(request, shard)
        body = encode_request(request)
        nonce = secrets.token_hex(8)
        if request.request_id in self._streams:
            raise DuplicateRequest(request.request_id, "in flight")
        stream = OutputStream(request, nonce, deadline, self.cancel)
        stream.shard = shard.index
        # Known before Redis knows it: an output may overtake the reply.
        self._streams[request.request_id] = stream
        try:
            verdict, detail = await shard.store.submit(
                request.request_id,
                body,
                frontend_id=self.frontend_id,
                nonce=nonce,
                timeout_ms=max(1, int((deadline - time.monotonic()) * 1000)),
                retain_ms=self._retain_ms,
                input_tokens=request.num_input_tokens,
                kv_tokens=self._terms.kv_tokens(request),
                model=request.model,
                flow=flow,
                preference=preference,
            )
        except BaseException:
            self._streams.pop(request.request_id, None)
            raise
        if verdict == "QUEUED":
            if preference.instance_ids:
                asyncio.get_running_loop().call_later(preference.wait_ms / 1000, shard.spill_now.set)
            if len(detail) > 1:
                stream.num_replicas = int(detail[1])
                self._replication.note(request.request_id, stream.num_replicas)
            return stream
        self._streams.pop(request.request_id, None)
        limit = shard.store.max_size
        if verdict == "FULL":
            raise QueueFull(int(detail[0]), limit, self._retry_after_s(int(detail[0])))
        if verdict == "LATE":
            raise DeadlineUnreachable(int(detail[0]), limit, int(detail[1]) / 1000, timeout_s)
        raise DuplicateRequest(request.request_id, str(detail[0]))

    async def cancel(self, request_id: str, reason: str = "cancelled by its user") -> bool:
        """End the request with exactly this id, wherever it is; both its instances are told.

        Returns:
            False when it was unknown or had ended.
        """
        stream = self._streams.get(request_id)
        stores = [shard.store for shard in self.shards] if stream is None else [self._store_of(stream)]
        answers = await asyncio.gather(*(store.cancel(request_id, reason, self._retain_ms) for store in stores))
        ended = any(answer[0] for answer in answers)
        stream = self._streams.pop(request_id, None)
        if stream is not None and not stream.assembly.ended:
            stream.assembly.ended = True
            stream.put(
                Output(request_id, stream.assembly.epoch, len(stream.assembly.token_ids),
                       finish_reason=FinishReason.CANCELLED, detail=reason)
            )  # fmt: skip
        return ended

    async def instances(self) -> list[InstanceRecord]:
        """Live instances of all shards, as of at most half a second ago."""
        return [record for records in await self.instances_by_shard() for record in records]

    async def instances_by_shard(self, max_age_s: float = INSTANCES_CACHE_S) -> list[list[InstanceRecord]]:
        """[num_shards] the same, apart: pairs form within a shard; 0: as they are from this call on."""
        return [await shard.instances(max_age_s) for shard in self.shards]

    async def request_record(self, request_id: str) -> Mapping[str, str]:
        """The request's readable record, {} when there is none (any more)."""
        stream = self._streams.get(request_id)
        for store in [shard.store for shard in self.shards] if stream is None else [self._store_of(stream)]:
            if record := await store.request_record(request_id):
                return record
        return {}

    async def _preference(self, request: Request, shard: Shard) -> Preference:
        """Ids of those that are preferred and live; names stand for whoever has them now."""
        if not request.prefer:
            return NO_PREFERENCE
        live = await shard.instances()
        ids = [r.instance_id for wanted in request.prefer for r in live if wanted in (r.name, r.instance_id)]
        return Preference(" ".join(ids), self.settings.preferred_wait_ms)

    def _retry_after_s(self, depth: int) -> float:
        """When the queue will be shorter, going by how fast this front end's requests end."""
        if len(self._ends) < 2 or self._ends[-1] == self._ends[0]:
            return 5.0
        rate = (len(self._ends) - 1) / (self._ends[-1] - self._ends[0])
        return min(60.0, max(1.0, 0.1 * depth / rate))

    # ---- outputs -------------------------------------------------------------------------------------------------

    async def _read(self, shard: Shard) -> None:
        out = shard.store.keys.out(self.frontend_id)
        async with shard.store.reader() as reader:
            while True:
                asked_at = time.monotonic()
                try:
                    entries = await reader.read({out: shard.read_up_to}, BLOCK_MS, READ_COUNT)
                except StoreUnavailable as exc:
                    reader.outage.failed(exc)
                    shard.verify_now.set()
                    await asyncio.sleep(PAUSE_AFTER_FAILURE_S)
                    continue
                shard.seen_at = time.monotonic()
                if len(entries) < READ_COUNT:
                    shard.caught_up_at = asked_at
                by_request: dict[str, list[str]] = {}
                for _, entry_id, fields in entries:
                    for request_id, value in zip(fields[::2], fields[1::2], strict=True):
                        if request_id in by_request:
                            by_request[request_id].append(value)
                        else:
                            by_request[request_id] = [value]
                    shard.read_up_to = entry_id
                for request_id, values in by_request.items():
                    if request_id in self._streams:
                        self._take(request_id, values)
                    else:
                        self._take_of_nobody(shard, request_id, values)

    def _take(self, request_id: str, values: list[str]) -> None:
        stream = self._streams[request_id]
        for output in decode_outputs(request_id, values):
            if isinstance(output, Lost):
                if stream.assembly.raise_epoch(output.epoch):
                    self._recovery.recover(stream, output.reason)
                continue
            for fresh in stream.assembly.feed(output):
                stream.put(fresh)
        if stream.assembly.ended:
            self._streams.pop(request_id, None)
            self._ends.append(time.monotonic())

    def _take_of_nobody(self, shard: Shard, request_id: str, values: list[str]) -> None:
        """Outputs of a request that has ended here. One that was lost ended before Redis knew it, or Redis has an old
        state of its own back: nobody else would end it before its deadline."""
        # Nearly all are tokens that were under way; whether they have anything else is seen without looking into them.
        told = decode_outputs(request_id, (value for value in values if '"lost"' in value))
        if any(isinstance(output, Lost) for output in told):
            self._chores.do(shard.store.cancel(request_id, "its user has its end already", self._retain_ms))

    # ---- presence ------------------------------------------------------------------------------------------------

    async def _spill(self, shard: Shard) -> None:
        """A request that waits for an instance in particular has waited long enough."""
        while True:
            await shard.spill_now.wait()
            shard.spill_now.clear()
            with contextlib.suppress(StoreUnavailable):
                await shard.store.expire(SPILL_BATCH, self._retain_ms)

    async def _renew(self, shard: Shard) -> None:
        """Renew lease and stream; they are made anew when Redis has lost them."""
        if not await shard.store.renew_frontend(self.frontend_id, self._lease_ms, shard.read_up_to):
            # What comes now may have lower ids than what was read: another server's clock gives them.
            shard.read_up_to = "0-0"
            shard.verify_now.set()
        shard.seen_at = time.monotonic()

    async def _keep_lease(self, shard: Shard) -> None:
        while True:
            await asyncio.sleep(self.settings.frontend_lease_s / 3)
            try:
                await self._renew(shard)
            except SplitwiseError as exc:
                logger.warning("%s", exc)
