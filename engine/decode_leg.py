"""The decode side: take the KV in and go on from the first token. Requests that are wholly ours run here too."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from engine.errors import KVRejected, MalformedHandover
from engine.handover import Handover
from engine.port import EngineDriver, Mode, TokensOut
from engine.prefill_leg import Returns
from engine.ranks import RankGroup
from kv_transfer.endpoint import RankEndpoint, endpoints_from_text
from kv_transfer.errors import KVTransferError
from kv_transfer.events import Received, TransferEvent, TransferFailed
from splitwise_sched.errors import InvalidRequest
from splitwise_sched.records import DecodeAssigned, PrefillAssigned
from splitwise_sched.types import Output, Request

logger = logging.getLogger(__name__)


class Steps(Returns, Protocol):
    """Where a leg says that it owns a request now; sync.Instance is one."""

    def step(self, request_id: str, epoch: int, notes: Mapping[str, float | int | str]) -> None: ...


@dataclass(slots=True)
class DecodeRun:
    """
    Attributes:
        receiving: KV is on its way into reserved blocks.
        decoding_at: when it owned the request (monotonic), None before.
        over: why nobody waits for this run any more.
    """

    request: Request
    epoch: int
    receiving: bool = False
    whole: bool = False
    started_at: float = field(default_factory=time.monotonic)
    decoding_at: float | None = None
    over: str | None = None
    stats: dict[str, float | int | str] = field(default_factory=dict)


class DecodeLeg:
    """Runs by key, from assignment to the last token."""

    def __init__(self, engine: EngineDriver, ranks: RankGroup, steps: Steps, default_timeout_s: float) -> None:
        self.runs: dict[str, DecodeRun] = {}
        self.waiting_tokens = 0
        self._engine = engine
        self._ranks = ranks
        self._steps = steps
        self._default_timeout_s = default_timeout_s
        self._unreserved: deque[tuple[str, list[RankEndpoint]]] = deque()

    def run_whole(self, key: str, event: PrefillAssigned) -> None:
        """A request that is prefilled and decoded here: no transfer."""
        request = event.request
        try:
            self._engine.check(request)
        except InvalidRequest as exc:
            self._steps.give_back(request.request_id, event.epoch, str(exc), retry=False)
            return
        self.runs[key] = DecodeRun(request, event.epoch, whole=True)
        self.waiting_tokens += request.num_input_tokens
        self._engine.submit(key, request, Mode.FULL)

    def assign(self, key: str, event: DecodeAssigned) -> None:
        request = event.request
        try:
            self._engine.check(request)
            source = endpoints_from_text(event.prefill_fields.get("kv_endpoints", ""))
        except (InvalidRequest, KVTransferError) as exc:
            retry = not isinstance(exc, InvalidRequest)
            self._steps.give_back(request.request_id, event.epoch, str(exc), retry=retry, pair_failed=retry)
            return
        self.runs[key] = DecodeRun(request, event.epoch)
        if self._unreserved:
            # It has to wait for blocks: its source is connected to meanwhile.
            self._ranks.connect(source)
        self._unreserved.append((key, source))

    @property
    def has_waiting(self) -> bool:
        """Whether there are any for ``reserve_waiting``."""
        return bool(self._unreserved)

    def reserve_waiting(self) -> None:
        """Allocate blocks for those that wait for them, in order, as far as there is room."""
        while self._unreserved:
            key, source = self._unreserved[0]
            run = self.runs.get(key)
            if run is not None:
                block_ids = self._engine.reserve(key, run.request)
                if block_ids is None:
                    return
                self._receive(key, run, source, block_ids)
            self._unreserved.popleft()

    def _receive(self, key: str, run: DecodeRun, source: list[RankEndpoint], block_ids: tuple[int, ...]) -> None:
        try:
            deadline_s = run.request.timeout_s or self._default_timeout_s
            self._ranks.open_receive(key, source, block_ids, deadline_s=deadline_s)
            run.receiving = True
        except KVTransferError as exc:
            self._engine.abort(key)
            del self.runs[key]
            self._steps.give_back(run.request.request_id, run.epoch, str(exc), retry=True, pair_failed=True)

    def on_transfer(self, event: TransferEvent) -> Output | None:
        """The KV is here, or will not come. The first token is published again, in case prefill's got lost."""
        key = event.transfer_id
        run = self.runs[key]
        run.receiving = False
        if run.over is None and isinstance(event, Received):
            try:
                return self._take_over(key, run, event)
            except (MalformedHandover, KVRejected) as exc:
                self._steps.give_back(run.request.request_id, run.epoch, str(exc), retry=True, pair_failed=True)
        elif run.over is None and isinstance(event, TransferFailed):
            why = f"KV transfer from {event.peer or 'prefill'} failed: {event.reason}"
            self._steps.give_back(run.request.request_id, run.epoch, why, retry=True, pair_failed=True)
        self._engine.abort(key)
        del self.runs[key]
        return None

    def _take_over(self, key: str, run: DecodeRun, event: Received) -> Output:
        request = run.request
        handover = Handover.decode(event.aux, key, request.request_id, request.num_input_tokens)
        run.stats = {
            "lane": event.stats.lane,
            "kv_bytes": event.stats.num_bytes,
            # Both sides were assigned at the same time: what is left beside prefill is waiting for blocks and bytes.
            "transfer_ms": max(0.0, round(_ms_since(run.started_at) - 1000 * handover.prefill_s, 3)),
            "prefill_ms": round(1000 * handover.prefill_s, 3),
        }
        self._engine.commit(key, handover.first)
        self._own(run)
        first = handover.first
        return Output(request.request_id, run.epoch, first.index, first.token_ids, first.logprobs)

    def on_tokens(self, run: DecodeRun, event: TokensOut) -> Output:
        """
        Args:
            run: that of ``event.key``.
        """
        if run.decoding_at is None:
            self.waiting_tokens -= run.request.num_input_tokens
            run.stats = {"lane": "local", "kv_bytes": 0, "prefill_ms": _ms_since(run.started_at)}
            self._own(run)
        if event.finish_reason is None:
            return Output(run.request.request_id, run.epoch, event.index, event.token_ids, event.logprobs)
        del self.runs[event.key]
        assert run.decoding_at is not None
        return Output(
            run.request.request_id,
            run.epoch,
            event.index,
            event.token_ids,
            event.logprobs,
            event.finish_reason,
            event.stop_reason,
            event.detail,
            {**run.stats, "decode_ms": _ms_since(run.decoding_at)},
        )

    def drop(self, key: str, reason: str) -> None:
        """Nobody waits for this run any more; its blocks are free once nothing writes into them."""
        run = self.runs.get(key)
        if run is None or run.over is not None:
            return
        run.over = reason
        if run.whole and run.decoding_at is None:
            self.waiting_tokens -= run.request.num_input_tokens
        if run.receiving:
            self._ranks.abort(key, reason)
        else:
            self._engine.abort(key)
            del self.runs[key]

    def _own(self, run: DecodeRun) -> None:
        run.decoding_at = time.monotonic()
        self._steps.step(run.request.request_id, run.epoch, run.stats)


def _ms_since(moment: float) -> float:
    return round(1000 * (time.monotonic() - moment), 3)
