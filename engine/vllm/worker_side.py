"""What the connector does in a vLLM worker: one messenger for the rank's KV tensors.

The forward thread only hands work over and picks results up; the messenger's own threads move the bytes.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

from engine.vllm.scheduler_side import OpenReceive, OpenSend, SendBlocks, StepPlan
from kv_transfer.endpoint import RankEndpoint
from kv_transfer.errors import KVTransferError
from kv_transfer.events import Received, Sent, TransferEvent, TransferFailed
from kv_transfer.messenger import Messenger
from kv_transfer.options import TransferOptions
from kv_transfer.pool import BlockPool

logger = logging.getLogger(__name__)

REVOKE_POLL_S = 0.001


@dataclass(slots=True)
class Ended:
    """Transfers that ended since the last look, by request id.

    Attributes:
        failed: of ``received``, those whose KV did not come.
    """

    sent: set[str] = field(default_factory=set)
    received: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)


@dataclass(slots=True)
class WorkerStats:
    """Plain counters since start."""

    num_sent: int = 0
    num_received: int = 0
    num_failed: int = 0
    num_bytes: int = 0
    receive_s: float = 0.0
    hooks_s: float = 0.0


class WorkerSide:
    """
    Args:
        timeout_s: from the opening of a transfer to its end, on either side.
    """

    def __init__(self, pool: BlockPool, options: TransferOptions, *, name: str, timeout_s: float) -> None:
        self.stats = WorkerStats()
        self._messenger = Messenger(pool, options, name=name)
        self._timeout_s = timeout_s
        self._revoke_s = options.drain_s + 1.0
        # Transfers under way, by request.
        self._sends: dict[str, str] = {}
        self._receives: dict[str, str] = {}
        self._requests: dict[str, str] = {}
        # Requests whose send has ended while vLLM had not yet finished them, and the other way round.
        self._sent_early: set[str] = set()
        self._finished: set[str] = set()
        self._ended = Ended()

    def start(self) -> RankEndpoint:
        """Raises KVTransferError."""
        self._messenger.start()
        return self._messenger.endpoint

    def close(self) -> None:
        self._messenger.close()

    def before_forward(self, plan: StepPlan) -> None:
        for request_id in plan.abort:
            for transfers in (self._sends, self._receives):
                if request_id in transfers:
                    self._messenger.abort(transfers[request_id], "its request has ended")
        for send in plan.open_sends:
            self._open_send(send)
        for receive in plan.receives:
            self._open_receive(receive)

    def revoke(self, request_ids: list[str]) -> None:
        """Before vLLM gives these requests' blocks to others: wait until nobody reads them any more.

        The end of such a send is reported to nobody: vLLM waits for none, and a later one of the same request has one
        of its own.
        """
        waited = [i for i in request_ids if i in self._sends]
        for request_id in waited:
            self._messenger.abort(self._sends[request_id], "its blocks were needed for others")
        deadline = time.monotonic() + self._revoke_s
        while late := [i for i in waited if i in self._sends]:
            self._collect()
            if time.monotonic() > deadline:
                # The messenger keeps the lease; a reader that is this late finds its data refused at the end.
                logger.error("blocks of %d preempted requests may still be read", len(late))
                for request_id in late:
                    del self._requests[self._sends.pop(request_id)]
                break
            time.sleep(REVOKE_POLL_S)
        self._sent_early.difference_update(request_ids)

    def after_forward(self, plan: StepPlan) -> None:
        """The KV of this step is in the pool."""
        for blocks in plan.send_blocks:
            self._send(blocks)

    def take_ended(self, finished: set[str]) -> Ended:
        """
        Args:
            finished: requests that vLLM finished since the last call; it takes the end of a send only after that.
        """
        self._collect()
        for request_id in finished:
            if request_id in self._sent_early:
                self._sent_early.discard(request_id)
                self._ended.sent.add(request_id)
            elif request_id in self._sends:
                self._finished.add(request_id)
        ended, self._ended = self._ended, Ended()
        return ended

    # ---- transfers -----------------------------------------------------------------------------------------------

    def _open_send(self, send: OpenSend) -> None:
        self._sends[send.request_id] = send.transfer_id
        self._requests[send.transfer_id] = send.request_id
        try:
            self._messenger.open_send(send.transfer_id, num_blocks=send.num_blocks, deadline_s=self._timeout_s)
        except KVTransferError as exc:
            self._fail(send.transfer_id, str(exc))

    def _send(self, blocks: SendBlocks) -> None:
        if self._sends.get(blocks.request_id) != blocks.transfer_id:
            return
        try:
            self._messenger.send_blocks(blocks.transfer_id, blocks.first_index, blocks.block_ids)
            if blocks.is_last:
                self._messenger.finish_send(blocks.transfer_id, b"")
        except KVTransferError as exc:
            # It has failed meanwhile, and says so itself.
            logger.debug("blocks of %s are not sent: %s", blocks.request_id, exc)

    def _open_receive(self, receive: OpenReceive) -> None:
        request_id = receive.request_id
        if receive.is_awaited:
            self._receives[request_id] = receive.transfer_id
            self._requests[receive.transfer_id] = request_id
        try:
            self._messenger.open_receive(
                receive.transfer_id, receive.source, receive.block_ids, deadline_s=self._timeout_s
            )
        except KVTransferError as exc:
            self._fail(receive.transfer_id, str(exc))

    def _collect(self) -> None:
        for event in self._messenger.poll():
            if isinstance(event, TransferFailed):
                self._fail(event.transfer_id, f"{event.peer or 'the other side'}: {event.reason}")
            else:
                self._succeed(event)

    def _succeed(self, event: TransferEvent) -> None:
        request_id = self._requests.pop(event.transfer_id, None)
        if isinstance(event, Received):
            self.stats.num_received += 1
            self.stats.num_bytes += event.stats.num_bytes
            self.stats.receive_s += event.stats.seconds
            if request_id is not None:
                del self._receives[request_id]
                self._ended.received.add(request_id)
        elif isinstance(event, Sent) and request_id is not None:
            self.stats.num_sent += 1
            self._end_send(request_id)

    def _fail(self, transfer_id: str, reason: str) -> None:
        request_id = self._requests.pop(transfer_id, None)
        if request_id is None:
            return
        self.stats.num_failed += 1
        logger.warning("KV transfer of request %s failed: %s", request_id, reason)
        if self._receives.get(request_id) == transfer_id:
            del self._receives[request_id]
            self._ended.received.add(request_id)
            self._ended.failed.add(request_id)
        else:
            self._end_send(request_id)

    def _end_send(self, request_id: str) -> None:
        del self._sends[request_id]
        if request_id in self._finished:
            self._finished.discard(request_id)
            self._ended.sent.add(request_id)
        else:
            self._sent_early.add(request_id)
