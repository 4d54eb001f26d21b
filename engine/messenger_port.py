"""``KVPort`` over a messenger: for engines whose own loop calls us."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from engine.port import KVPort, Loaded, PortEvent, Rejected, Released
from kv_transfer.endpoint import RankEndpoint
from kv_transfer.errors import InvalidTransfer
from kv_transfer.events import Received, Sent, TransferEvent
from kv_transfer.messenger import Messenger
from kv_transfer.options import TransferOptions
from kv_transfer.pool import BlockPool


class MessengerPort(KVPort):
    """Listens from construction until ``close``; the pool stays its engine's.

    Whether a transfer is open is kept here and not asked of the messenger, so that what an engine says of a run that
    has just failed is dropped without a trace.
    """

    def __init__(
        self, pool: BlockPool, options: TransferOptions, *, name: str, on_event: Callable[[], None] | None = None
    ) -> None:
        """
        Args:
            on_event: called from a thread of the messenger when ``poll`` has something new; must not wait, nor raise.
        Raises:
            KVTransferError: an address or a transport cannot be had.
        """
        self._messenger = Messenger(pool, options, name=name, on_event=on_event)
        self._sending: set[str] = set()
        self._receiving: set[str] = set()
        self._refused: list[PortEvent] = []
        self._on_event = on_event
        self._messenger.start()

    @property
    def endpoint(self) -> RankEndpoint:
        return self._messenger.endpoint

    def hold(self, key: str, *, num_blocks: int, deadline_s: float) -> None:
        try:
            self._messenger.open_send(key, num_blocks=num_blocks, deadline_s=deadline_s)
            self._sending.add(key)
        except InvalidTransfer as exc:
            self._refuse(Released(key, str(exc)))

    def on_blocks(self, key: str, first_index: int, block_ids: Sequence[int]) -> None:
        if key in self._sending:
            self._messenger.send_blocks(key, first_index, block_ids)

    def on_prefill_done(self, key: str, aux: bytes) -> None:
        if key in self._sending:
            self._messenger.finish_send(key, aux)

    def reserve(self, key: str, source: Sequence[RankEndpoint], block_ids: Sequence[int], *, deadline_s: float) -> None:
        try:
            self._messenger.open_receive(key, source, block_ids, deadline_s=deadline_s)
            self._receiving.add(key)
        except InvalidTransfer as exc:
            self._refuse(Rejected(key, str(exc)))

    def abort(self, key: str, reason: str) -> None:
        if key in self._sending or key in self._receiving:
            self._messenger.abort(key, reason)

    def poll(self) -> list[PortEvent]:
        events, self._refused = self._refused, []
        return events + [self._event(ended) for ended in self._messenger.poll()]

    def close(self) -> None:
        self._messenger.close()

    def _event(self, ended: TransferEvent) -> PortEvent:
        key = ended.transfer_id
        is_sending = key in self._sending
        self._sending.discard(key)
        self._receiving.discard(key)
        if isinstance(ended, Sent):
            return Released(key)
        if isinstance(ended, Received):
            return Loaded(key, ended.aux)
        reason = f"{ended.peer}: {ended.reason}" if ended.peer else ended.reason
        return Released(key, reason) if is_sending else Rejected(key, reason)

    def _refuse(self, event: PortEvent) -> None:
        self._refused.append(event)
        if self._on_event is not None:
            self._on_event()
