"""The prefill side of requests that decode elsewhere: compute, move blocks as chunks finish, hand over."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Protocol

from engine.handover import Handover
from engine.port import BlocksReady, EngineDriver, Mode, TokensOut
from engine.ranks import RankGroup
from kv_transfer.events import Sent, TransferEvent, TransferFailed
from splitwise_sched.errors import InvalidRequest
from splitwise_sched.records import PrefillAssigned
from splitwise_sched.types import Output, Request


class Returns(Protocol):
    """Where a leg says that it cannot go on with a run, or has done its part; sync.Instance is one."""

    def give_back(self, request_id: str, epoch: int, why: str, *, retry: bool, pair_failed: bool = False) -> None: ...

    def release(self, request_id: str, epoch: int) -> None: ...


@dataclass(slots=True)
class PrefillRun:
    """
    Attributes:
        over: why nobody waits for this run any more; its blocks are still held until the transfer has ended.
    """

    request: Request
    epoch: int
    started_at: float = field(default_factory=time.monotonic)
    has_first_token: bool = False
    over: str | None = None


class PrefillLeg:
    """Runs by key, from assignment until their blocks are free again."""

    def __init__(self, engine: EngineDriver, ranks: RankGroup, returns: Returns, default_timeout_s: float) -> None:
        self.runs: dict[str, PrefillRun] = {}
        self.waiting_tokens = 0
        self._engine = engine
        self._ranks = ranks
        self._returns = returns
        self._default_timeout_s = default_timeout_s

    def assign(self, key: str, event: PrefillAssigned) -> None:
        request = event.request
        try:
            self._engine.check(request)
        except InvalidRequest as exc:
            self._returns.give_back(request.request_id, event.epoch, str(exc), retry=False)
            return
        num_blocks = -(-request.num_input_tokens // self._engine.spec.block_size)
        deadline_s = request.timeout_s or self._default_timeout_s
        self.runs[key] = PrefillRun(request, event.epoch)
        self.waiting_tokens += request.num_input_tokens
        self._ranks.open_send(key, num_blocks=num_blocks, deadline_s=deadline_s)
        self._engine.submit(key, request, Mode.PREFILL)

    def on_blocks(self, event: BlocksReady) -> None:
        if self.runs[event.key].over is None:
            self._ranks.send_blocks(event.key, event.first_index, event.block_ids)

    def on_tokens(self, event: TokensOut) -> Output | None:
        """The first token; None when nobody waits for it any more."""
        run = self.runs[event.key]
        self._has_first_token(run)
        if run.over is not None:
            return None
        request, prefill_s = run.request, time.monotonic() - run.started_at
        if event.finish_reason is None:
            handover = Handover(event, request.num_input_tokens, prefill_s)
            self._ranks.finish_send(event.key, handover.encode(request.request_id, run.epoch))
        else:
            self._end(event.key, run, "it ended with its first token")
        return Output(
            request.request_id,
            run.epoch,
            event.index,
            event.token_ids,
            event.logprobs,
            event.finish_reason,
            event.stop_reason,
            event.detail,
            stats=None if event.finish_reason is None else {"prefill_ms": round(1000 * prefill_s, 3)},
        )

    def on_transfer(self, event: TransferEvent) -> None:
        """The transfer has ended, well or not: nobody reads the blocks any more."""
        run = self.runs.pop(event.transfer_id)
        if isinstance(event, Sent):
            self._engine.release(event.transfer_id)
            self._returns.release(run.request.request_id, run.epoch)
            return
        self._has_first_token(run)
        self._engine.abort(event.transfer_id)
        if run.over is None and isinstance(event, TransferFailed):
            why = f"KV transfer to {event.peer or 'decode'} failed: {event.reason}"
            self._returns.give_back(run.request.request_id, run.epoch, why, retry=True, pair_failed=True)

    def drop(self, key: str, reason: str) -> None:
        """Nobody waits for this run any more; its blocks are free after the transfer's end."""
        if (run := self.runs.get(key)) is not None:
            self._end(key, run, reason)

    def _end(self, key: str, run: PrefillRun, reason: str) -> None:
        if run.over is None:
            run.over = reason
            self._ranks.abort(key, reason)

    def _has_first_token(self, run: PrefillRun) -> None:
        if not run.has_first_token:
            run.has_first_token = True
            self.waiting_tokens -= run.request.num_input_tokens
