"""What the connector does in vLLM's scheduler: which blocks of which request are ready, wanted, or free again.

Bookkeeping only; nothing here waits, and no byte moves. ``take_plan`` hands what is to be done to the workers, once a
step. A transfer's blocks stay allocated until the workers report its end: of a prefill request because
``request_finished`` says so, of a decode request because vLLM waits for it before it computes or frees.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.vllm.params import (
    LOAD_FAILED,
    InvalidTransferParams,
    ReceiveParams,
    SendParams,
    decode_params,
    parse_params,
)
from kv_transfer.endpoint import RankEndpoint
from kv_transfer.tickets import NOT_WANTED

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class OpenSend:
    request_id: str
    transfer_id: str
    num_blocks: int


@dataclass(frozen=True, slots=True)
class SendBlocks:
    """Blocks ``first_index`` onward are complete when this step's forward pass is."""

    request_id: str
    transfer_id: str
    first_index: int
    block_ids: tuple[int, ...]
    is_last: bool


@dataclass(frozen=True, slots=True)
class OpenReceive:
    """
    Attributes:
        block_ids: [num_blocks of the transfer]; NOT_WANTED for those that are here already.
        is_awaited: vLLM waits for its end; else all is here, and only prefill waits for the word.
    """

    request_id: str
    transfer_id: str
    source: tuple[RankEndpoint, ...]
    block_ids: tuple[int, ...]
    is_awaited: bool


@dataclass(slots=True)
class StepPlan:
    """What the workers are to do around one forward pass, in this order; ``send_blocks`` after it.

    Attributes:
        abort: ids of requests whose transfers are over; their blocks may be free after the workers' word.
        revoke: ids of requests whose blocks vLLM has taken away already: nobody may read them from here on.
    """

    revoke: list[str] = field(default_factory=list)
    abort: list[str] = field(default_factory=list)
    open_sends: list[OpenSend] = field(default_factory=list)
    receives: list[OpenReceive] = field(default_factory=list)
    send_blocks: list[SendBlocks] = field(default_factory=list)


@dataclass(slots=True)
class LoadCounts:
    """Loads that ended since the last look."""

    num_ended: int = 0
    num_failed: int = 0


@dataclass(slots=True)
class _Send:
    transfer_id: str
    num_tokens: int
    block_ids: list[int] = field(default_factory=list)
    num_sent: int = 0
    is_opened: bool = False


class SchedulerSide:
    """
    Args:
        endpoints: of this instance's ranks; set once, before the first request ends.
    """

    def __init__(self, block_size: int, engine_id: str | None = None) -> None:
        self.endpoints: str = ""
        self._block_size = block_size
        self._engine_id = engine_id
        self._sends: dict[str, _Send] = {}
        self._receiving: set[str] = set()
        self._failed: set[str] = set()
        self._refused: set[str] = set()
        self._preempted: set[str] = set()
        self._plan = StepPlan()
        self._counts = LoadCounts()

    # ---- a decode request ----------------------------------------------------------------------------------------

    def num_external_tokens(
        self, request_id: str, raw: Mapping[str, Any] | None, num_prompt: int, num_here: int
    ) -> int:
        """Tokens beyond ``num_here`` whose KV comes from elsewhere. May be asked any number of times."""
        params = self._parsed(request_id, raw)
        if not isinstance(params, ReceiveParams):
            return 0
        return max(0, min(params.num_tokens, num_prompt) - num_here)

    def allocated(
        self, request_id: str, raw: dict[str, Any] | None, block_ids: Sequence[int], num_external: int, num_prompt: int
    ) -> None:
        """Blocks were allocated: for the KV that comes from elsewhere, or for a prompt that is to be sent."""
        params = self._parsed(request_id, raw)
        if isinstance(params, SendParams):
            # Whoever had that name before the request was preempted, or asks for it now, is told that it has failed.
            is_over = request_id in self._preempted and params.transfer_id is not None
            if request_id not in self._sends and not is_over:
                transfer_id = params.transfer_id or f"{request_id[:120]}@{secrets.token_hex(8)}"
                self._sends[request_id] = _Send(transfer_id, num_prompt)
            return
        if not isinstance(params, ReceiveParams) or raw is None:
            return
        # Once: what does not come is computed here.
        raw["do_remote_prefill"] = False
        num_blocks = self._num_blocks(params.num_tokens)
        ids = [NOT_WANTED] * num_blocks
        if num_external:
            num_tokens = min(params.num_tokens, num_prompt)
            first, end = (num_tokens - num_external) // self._block_size, self._num_blocks(num_tokens)
            ids[first:end] = block_ids[first:end]
            self._receiving.add(request_id)
        receive = OpenReceive(request_id, params.transfer_id, params.source, tuple(ids), num_external > 0)
        self._plan.receives.append(receive)

    def received(self, request_ids: Iterable[str], failed: Iterable[str] = ()) -> None:
        """The workers have reported the end of these receives; of some, that their KV did not come."""
        num_before, without_kv = len(self._receiving), self._receiving.intersection(failed)
        self._failed.update(without_kv)
        self._receiving.difference_update(request_ids)
        self._counts.num_ended += num_before - len(self._receiving)
        self._counts.num_failed += len(without_kv)

    # ---- a prefill request ---------------------------------------------------------------------------------------

    def scheduled(self, request_id: str, new_block_ids: Sequence[int], num_computed: int, num_scheduled: int) -> None:
        """A step computes ``num_scheduled`` tokens of a request; with its blocks that are new since the last one."""
        send = self._sends.get(request_id)
        if send is None:
            return
        send.block_ids += new_block_ids
        total = self._num_blocks(send.num_tokens)
        if not send.is_opened:
            send.is_opened = True
            self._plan.open_sends.append(OpenSend(request_id, send.transfer_id, total))
        end = min(num_computed + num_scheduled, send.num_tokens)
        is_last = end == send.num_tokens
        num_ready = total if is_last else end // self._block_size
        if num_ready > send.num_sent:
            ids = tuple(send.block_ids[send.num_sent : num_ready])
            self._plan.send_blocks.append(SendBlocks(request_id, send.transfer_id, send.num_sent, ids, is_last))
            send.num_sent = num_ready

    def preempted(self, request_ids: Iterable[str]) -> None:
        """vLLM took the blocks of these away; whoever was to get their KV computes it."""
        for request_id in request_ids:
            send = self._sends.pop(request_id, None)
            if send is not None and send.is_opened:
                self._plan.revoke.append(request_id)
                self._preempted.add(request_id)

    def finished(self, request_id: str, *, is_complete: bool) -> tuple[bool, dict[str, Any] | None]:
        """A request has ended here.

        Args:
            is_complete: it ran to its end, and was not aborted.
        Returns:
            Whether its blocks are still in use until the workers report it, and parameters for decode, or what is to
            be said of decode's load.
        """
        self._refused.discard(request_id)
        self._preempted.discard(request_id)
        if request_id in self._receiving:
            # vLLM keeps the blocks itself until the receive is reported.
            self._receiving.discard(request_id)
            self._plan.abort.append(request_id)
            return False, None
        if request_id in self._failed:
            self._failed.discard(request_id)
            return False, dict(LOAD_FAILED)
        send = self._sends.pop(request_id, None)
        if send is None or not send.is_opened:
            return False, None
        if is_complete and send.num_sent == self._num_blocks(send.num_tokens):
            return True, decode_params(send.transfer_id, self.endpoints, send.num_tokens, self._engine_id)
        self._plan.abort.append(request_id)
        return True, None

    # ---- once a step ---------------------------------------------------------------------------------------------

    def take_plan(self) -> StepPlan:
        plan, self._plan = self._plan, StepPlan()
        return plan

    def take_counts(self) -> LoadCounts | None:
        """None: nothing has ended."""
        if not self._counts.num_ended:
            return None
        counts, self._counts = self._counts, LoadCounts()
        return counts

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    def _parsed(self, request_id: str, raw: Mapping[str, Any] | None) -> SendParams | ReceiveParams | None:
        try:
            return parse_params(raw)
        except InvalidTransferParams as exc:
            if request_id not in self._refused:
                self._refused.add(request_id)
                logger.warning("request %s is computed here whole: %s", request_id, exc)
            return None
