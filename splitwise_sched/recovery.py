"""Requests that were lost go on: from the tokens that their users have, under a higher epoch.

An instance may be gone, or Redis with all that it knew, or the words that came from them. What Redis says about each
request that has not ended is compared, now and then and after every broken connection, with what its front end knows.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace

from splitwise_sched.codec import encode_request
from splitwise_sched.errors import RequestFailed, SplitwiseError, StoreUnavailable, UnknownModel
from splitwise_sched.output_stream import OutputStream
from splitwise_sched.settings import SchedulerSettings
from splitwise_sched.shards import Shard, Shards
from splitwise_sched.store import ORPHANED
from splitwise_sched.tasks import Chores, end
from splitwise_sched.terms import Terms
from splitwise_sched.types import FinishReason, Output

logger = logging.getLogger(__name__)

VERIFY_PERIOD_S = 3.0
VERIFY_AFTER_S = 1.0
VERIFY_BATCH = 500
LATE_PERIOD_S = 0.5
LATE_AFTER_S = 1.0  # Redis says it at the deadline, with what it knows about the request
DOUBTS = 2
# More than a request has runs: epochs in the shard that it leaves do not reach those in the one that it goes to.
EPOCHS_PER_SHARD = 1000


class Recovery:
    """That of one front end.

    Args:
        streams: its requests that have not ended, by id; those that end here are taken out.
        chores: for what Redis is told on the side.
        renew: renews the front end's place in a shard, so that outputs reach it.

    ``verify`` (one a shard) and ``end_late`` run until cancelled.
    """

    def __init__(
        self,
        frontend_id: str,
        settings: SchedulerSettings,
        shards: Shards,
        streams: dict[str, OutputStream],
        *,
        chores: Chores,
        renew: Callable[[Shard], Awaitable[None]],
    ) -> None:
        self._frontend_id = frontend_id
        self._shards = shards
        self._streams = streams
        self._chores = chores
        self._renew = renew
        self._terms = Terms(settings)
        self._retain_ms = int(settings.scheduler_ttl * 1000)

    async def close(self) -> None:
        """Put nothing back any more."""
        await end(*(s.recovery for s in self._streams.values() if s.recovery is not None))

    def recover(self, stream: OutputStream, reason: str, *, done_too: bool = False, recall: bool = False) -> None:
        if stream.recovery is None or stream.recovery.done():
            stream.recovery = asyncio.create_task(self._put_back(stream, reason, done_too, recall))

    async def _put_back(self, stream: OutputStream, reason: str, done_too: bool, recall: bool) -> None:
        """Queue a lost request again, with what its user already has as part of its input."""
        told_at = time.monotonic()
        emitted = tuple(stream.assembly.token_ids)
        request = replace(stream.request, emitted_token_ids=emitted)
        left_s = stream.deadline - time.monotonic()
        logger.info("putting %s back after %d output tokens: %s", request.request_id, len(emitted), reason)
        if len(emitted) >= request.sampling.max_tokens:
            # Only the word that it is finished was lost.
            self._end(stream, FinishReason.LENGTH, None)
            return
        if left_s <= 0:
            self._end(stream, FinishReason.EXPIRED, f"its time was over; before that: {reason}")
            return
        try:
            shard = await self._shard_to_go_on_in(stream, told_at)
            if len(self._shards) > 1 and shard.model not in (None, request.model):
                self._end(stream, FinishReason.ERROR, str(UnknownModel(request.model, self._shards.served)))
                return
            await self._renew(shard)
            if stream.assembly.ended:
                return
            verdict, *detail = await shard.store.resubmit(
                request.request_id,
                encode_request(request),
                frontend_id=self._frontend_id,
                nonce=stream.nonce,
                epoch_seen=stream.assembly.epoch,
                timeout_ms=max(1, int(left_s * 1000)),
                retain_ms=self._retain_ms,
                input_tokens=request.num_input_tokens,
                kv_tokens=self._terms.kv_tokens(request),
                model=request.model,
                attempts=stream.attempts,
                done_too=done_too,
                recall=recall,
                flow=self._terms.flow(request),
            )
        except StoreUnavailable as exc:
            logger.warning("%s is put back when Redis answers again: %s", request.request_id, exc)
            return
        if verdict == "QUEUED":
            stream.attempts += 1
            stream.assembly.raise_epoch(int(detail[0]))
            if stream.assembly.ended:
                # Its user cancelled it meanwhile, when Redis did not know it.
                with contextlib.suppress(StoreUnavailable):
                    await shard.store.cancel(stream.request_id, "it was cancelled before", self._retain_ms)
        elif verdict == "FAILED":
            self._end(stream, FinishReason.ERROR, str(detail[0]))
        elif verdict == "ENDED":
            self._doubt(stream, *map(str, detail))

    async def _shard_to_go_on_in(self, stream: OutputStream, told_at: float) -> Shard:
        """Its own, or another when that has had nobody to serve it for some time, or has another model by now."""
        shard = self._shards[stream.shard]
        if len(self._shards) > 1:
            # Whoever is there now may be why it was lost: what was known before that does not count.
            await shard.look(time.monotonic() - told_at)
        refuge = self._shards.refuge(shard, stream.request.model)
        if refuge is None:
            return shard
        logger.warning(
            "moving %s from shard %d, which does not serve it, to %d", stream.request_id, shard.index, refuge.index
        )
        # Whatever is still said of it in the old shard is stale from here.
        stream.assembly.raise_epoch(stream.assembly.epoch + EPOCHS_PER_SHARD)
        stream.shard = refuge.index
        with contextlib.suppress(SplitwiseError):
            await shard.store.cancel(stream.request_id, f"it goes on in shard {refuge.index}", self._retain_ms)
        return refuge

    def _end(self, stream: OutputStream, reason: FinishReason, detail: str | None) -> None:
        """End a request from here; its record in Redis is closed if it is still open."""
        if stream.assembly.ended:
            return
        stream.assembly.ended = True
        self._streams.pop(stream.request_id, None)
        index = len(stream.assembly.token_ids)
        stream.put(Output(stream.request_id, stream.assembly.epoch, index, finish_reason=reason, detail=detail))
        store = self._shards[stream.shard].store
        self._chores.do(store.cancel(stream.request_id, detail or reason.value, self._retain_ms))

    async def end_late(self) -> None:
        """Nobody waits for much longer than the deadline, be Redis there or not."""
        while True:
            await asyncio.sleep(LATE_PERIOD_S)
            now = time.monotonic()
            for stream in [s for s in self._streams.values() if now > s.deadline + LATE_AFTER_S]:
                self._end(stream, FinishReason.EXPIRED, "it did not end before its deadline")

    async def verify(self, shard: Shard) -> None:
        """Now and then, and after every broken connection: does Redis know each request that has not ended?"""
        while True:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(shard.verify_now.wait(), VERIFY_PERIOD_S)
            shard.verify_now.clear()
            now = time.monotonic()
            open_streams = [
                stream
                for stream in self._streams.values()
                if stream.shard == shard.index and now - stream.submitted_at > VERIFY_AFTER_S
            ]
            try:
                for i in range(0, len(open_streams), VERIFY_BATCH):
                    await self._verify_some(shard, open_streams[i : i + VERIFY_BATCH])
            except SplitwiseError as exc:
                logger.warning("%s", exc)

    async def _verify_some(self, shard: Shard, streams: list[OutputStream]) -> None:
        try:
            states = await shard.store.request_states([s.request_id for s in streams])
        except SplitwiseError:
            for stream in streams:
                if self._shards.refuge(shard, stream.request.model) is not None:
                    self.recover(stream, f"shard {shard.index} does not answer")
            raise
        for stream, known in zip(streams, states, strict=True):
            if stream.assembly.ended or stream.shard != shard.index:
                continue
            if known is None:
                self.recover(stream, "Redis did not know it any more")
            elif known[0] == "lost":
                stream.assembly.raise_epoch(known[1])
                self.recover(stream, "an instance was lost")
            elif known[0] == ORPHANED:
                stream.assembly.raise_epoch(known[1])
                self.recover(stream, "this front end had been taken for dead")
            elif known[0] == "queued" and self._shards.refuge(shard, stream.request.model) is not None:
                self.recover(stream, f"nobody serves shard {shard.index}")
            elif known[0] not in ("queued", "prefill", "decode"):
                self._doubt(stream, known[0], "")
            else:
                self._look_for_gap(stream)

    def _look_for_gap(self, stream: OutputStream) -> None:
        """Outputs were trimmed away before this front end read them, when the same ones are missing for a while."""
        position = len(stream.assembly.token_ids)
        is_old = stream.assembly.has_gap and stream.gap_at == position
        stream.gap_at = position if stream.assembly.has_gap else None
        if is_old:
            self.recover(stream, f"its outputs from position {position} on never came", recall=True)

    def _doubt(self, stream: OutputStream, state: str, reason: str) -> None:
        """Redis says that it ended, but its last output has not come: it may be under way, or trimmed away."""
        stream.doubts += 1
        if stream.doubts == 1:
            stream.doubted_at = time.monotonic()
        is_behind = self._shards[stream.shard].caught_up_at <= stream.doubted_at
        if stream.doubts < DOUBTS or is_behind or stream.assembly.ended:
            return
        if state == "done":
            stream.doubts = 0
            self.recover(stream, "its last outputs never came", done_too=True)
        else:
            stream.assembly.ended = True
            self._streams.pop(stream.request_id, None)
            stream.put(RequestFailed(stream.request_id, state, reason or "the word why was lost on its way"))
