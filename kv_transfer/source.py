"""The source's half of a messenger: the transfers that it sends. In the messenger's thread."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from kv_transfer.checker import Signed
from kv_transfer.checksums import NONE, SUM_BYTES
from kv_transfer.effects import Allow, Effect, Forget, Report, Revoke, Sign, Tell, Token
from kv_transfer.errors import InvalidOptions
from kv_transfer.events import Sent, TransferEvent, TransferFailed
from kv_transfer.parts import MessengerParts
from kv_transfer.plan import IntArray, PairPlan
from kv_transfer.protocol import (
    MAX_IDS_PER_MESSAGE,
    MAX_SUMS_BYTES,
    Abort,
    Applied,
    Drained,
    Message,
    Reserve,
)
from kv_transfer.sending import Receiver, SendTransfer
from kv_transfer.sessions import Session, Sessions
from kv_transfer.transports.base import Transport

# Transfers that ended on one side before the other had come to it, remembered so that it is told so at once.
MAX_REMEMBERED = 16384
# Hashed at a time: fetched and checked while the next ones are being hashed.
SIGN_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class EarlyReservation:
    """One that came before ``open_send``."""

    session: Session
    reserve: Reserve
    until: float


class SourceSide:
    def __init__(self, parts: MessengerParts) -> None:
        self._own, self._pool, self._options, self._leases = parts.own, parts.pool, parts.options, parts.leases
        self._transports, self._checker = parts.transports, parts.checker
        self._counters, self._report = parts.counters, parts.report
        self.sessions = Sessions(parts, on_message=self._handle, on_lost=self._lost)
        self._sends: dict[str, SendTransfer] = {}
        self._by_token: dict[Token, str] = {}
        self._early: dict[Token, EarlyReservation] = {}
        self._ended: OrderedDict[str, str] = OrderedDict()
        self._given_up: OrderedDict[str, tuple[str, str]] = OrderedDict()
        self._revoking: dict[Token, set[Transport]] = {}

    @property
    def num_open(self) -> int:
        return len(self._sends)

    @property
    def is_waiting(self) -> bool:
        """Whether the clock matters."""
        return bool(self._sends or self._early or self.sessions.has_strangers)

    def open(self, transfer_id: str, num_blocks: int, deadline_s: float, now: float) -> None:
        self._ended.pop(transfer_id, None)
        self._sends[transfer_id] = SendTransfer(
            transfer_id,
            num_blocks,
            block_size=self._own.layout.block_size,
            now=now,
            deadline_s=deadline_s,
            drain_s=self._options.drain_s,
        )
        for token, early in list(self._early.items()):
            if early.reserve.transfer_id == transfer_id:
                del self._early[token]
                self._reserve(early.session, early.reserve, now)
        if transfer_id in self._given_up:
            self.abort(transfer_id, *self._given_up.pop(transfer_id), now)

    def offer(self, transfer_id: str, first_index: int, block_ids: IntArray) -> None:
        if transfer_id in self._sends:
            self._run(transfer_id, self._sends[transfer_id].offer(first_index, block_ids))

    def finish(self, transfer_id: str, aux: bytes) -> None:
        if transfer_id in self._sends:
            self._run(transfer_id, self._sends[transfer_id].finish(aux))

    def abort(self, transfer_id: str, reason: str, peer: str, now: float) -> None:
        if transfer_id in self._sends:
            self._run(transfer_id, self._sends[transfer_id].abort(reason, peer, now))

    def abort_all(self, reason: str, now: float) -> None:
        for transfer_id in list(self._sends):
            self.abort(transfer_id, reason, "", now)

    def revoked(self, transport: Transport, token: Token, now: float) -> None:
        """A transport reads no more for a token."""
        waiting = self._revoking.get(token, set())
        waiting.discard(transport)
        transfer_id = self._by_token.get(token)
        if not waiting and self._revoking.pop(token, None) is not None and transfer_id is not None:
            self._run(transfer_id, self._sends[transfer_id].revoked(token, now))

    def signed(self, event: Signed, now: float) -> None:
        """Blocks are hashed for a receiver."""
        transfer_id = self._by_token.get(event.token)
        if transfer_id is not None:
            sums = None if event.sums is None else event.sums.astype(np.dtype("<u8")).tobytes()
            transfer = self._sends[transfer_id]
            self._run(transfer_id, transfer.signed(event.token, event.first_index, event.block_ids, sums, now))

    def tick(self, now: float) -> None:
        """Look at the clock."""
        for transfer_id, transfer in list(self._sends.items()):
            self._run(transfer_id, transfer.tick(now))
        for token, early in list(self._early.items()):
            if now >= early.until:
                self._drop_early(token)
        self.sessions.tick(now)

    def _lost(self, session: Session, reason: str, now: float) -> None:
        for token in session.tokens:
            self._early.pop(token, None)
        for transfer_id in {self._by_token[t] for t in session.tokens if t in self._by_token}:
            self._run(transfer_id, self._sends[transfer_id].lose(session.key, reason, now))

    def _handle(self, session: Session, message: Message, now: float) -> bool:
        """Whether the message makes sense from a session that was let in."""
        if isinstance(message, Reserve):
            self._take_reservation(session, message, now)
        elif isinstance(message, Applied | Abort | Drained):
            self._handle_token(session, message, now)
        else:
            return False
        return True

    def _take_reservation(self, session: Session, reserve: Reserve, now: float) -> None:
        if reserve.token in self._by_token or reserve.token in self._early:
            return
        if reserve.transfer_id in self._sends:
            self._reserve(session, reserve, now)
        elif reserve.transfer_id in self._ended:
            self.sessions.tell(session.key, Abort(reserve.token, self._ended[reserve.transfer_id]))
        elif len(self._early) >= self._options.max_inflight:
            self.sessions.tell(
                session.key, Abort(reserve.token, "too many reservations wait for transfers at the source")
            )
        else:
            self._early[reserve.token] = EarlyReservation(session, reserve, now + reserve.deadline_ms / 1000)
            session.tokens.add(reserve.token)

    def _reserve(self, session: Session, reserve: Reserve, now: float) -> None:
        assert session.data_token is not None
        if reserve.checksum != NONE:
            try:
                session.prepare_sums(self._pool, reserve.checksum)
            except InvalidOptions as exc:
                self.sessions.tell(session.key, Abort(reserve.token, f"{self._own.describe()}: {exc}"))
                return
            if _sum_bytes(session.plan) > MAX_SUMS_BYTES:
                reason = "a block has too many layers and units for checksums: use equal block sizes"
                self.sessions.tell(session.key, Abort(reserve.token, reason))
                return
        receiver = Receiver(
            peer=session.key,
            token=reserve.token,
            rank=session.layout.rank,
            name=session.name,
            lane=reserve.lane,
            block_size=session.layout.block_size,
        )
        if reserve.checksum != NONE and not session.plan.is_empty:
            receiver.is_signed = True
            receiver.blocks_per_message = _signed_at_a_time(session.plan)
        transfer = self._sends[reserve.transfer_id]
        self._leases.grant(reserve.token, session.data_token, session.plan, session.view)
        self._by_token[reserve.token] = reserve.transfer_id
        session.tokens.add(reserve.token)
        effects = transfer.reserve(receiver, session.expected, reserve.num_blocks, now)
        if reserve.token not in transfer.receivers:
            self._release(reserve.token)
        self._run(reserve.transfer_id, effects)

    def _handle_token(self, session: Session, message: Applied | Abort | Drained, now: float) -> None:
        token, transfer_id = message.token, self._by_token.get(message.token)
        if transfer_id is None or token not in session.tokens:
            # Its transfer has ended here, or waits for its source; a stranger's token looks the same.
            early = self._early.get(token) if token in session.tokens else None
            if early is not None:
                self._drop_early(token)
                reason = message.reason if isinstance(message, Abort) else "it broke the protocol"
                self._given_up[early.reserve.transfer_id] = f"the destination gave up: {reason}", session.name
                _forget_oldest(self._given_up)
            if isinstance(message, Applied):
                self.sessions.tell(session.key, Abort(token, "the source has given this transfer up"))
            elif isinstance(message, Abort):
                self.sessions.tell(session.key, Drained(token))
            return
        transfer = self._sends[transfer_id]
        if isinstance(message, Applied):
            self._run(transfer_id, transfer.applied(token, message.num_bytes, now))
        elif isinstance(message, Drained):
            self._run(transfer_id, transfer.drained(token, now))
        else:
            self._run(transfer_id, transfer.abort(f"the destination gave up: {message.reason}", session.name, now))

    def _run(self, transfer_id: str, effects: Iterable[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Tell):
                self.sessions.tell(effect.peer, effect.message)
            elif isinstance(effect, Allow):
                self._leases.allow(effect.token, effect.block_ids)
            elif isinstance(effect, Sign):
                self._sign(transfer_id, effect)
            elif isinstance(effect, Forget):
                self._leases.end(effect.token)
            elif isinstance(effect, Revoke):
                self._leases.end(effect.token)
                self._revoking[effect.token] = set(self._transports)
                for transport in self._transports:
                    transport.revoke(effect.token)
            elif isinstance(effect, Report):
                self._end(transfer_id, effect.event)

    def _sign(self, transfer_id: str, sign: Sign) -> None:
        session = self.sessions.get(self._sends[transfer_id].receivers[sign.token].peer)
        if session is not None and session.sums is not None:
            units = session.plan.src_units
            self._checker.sign(session.sums, units, sign.token, sign.first_index, sign.block_ids)

    def _end(self, transfer_id: str, event: TransferEvent) -> None:
        transfer = self._sends.pop(transfer_id)
        if isinstance(event, Sent):
            self._counters.add("sent_total")
            for receiver in transfer.receivers.values():
                self._counters.add(f"bytes_sent_{receiver.lane}", receiver.num_bytes)
        else:
            self._counters.add("send_failed_total")
        self._ended[transfer_id] = event.reason if isinstance(event, TransferFailed) else "it was sent to another peer"
        _forget_oldest(self._ended)
        for token in transfer.receivers:
            self._release(token)
        self._report(event)

    def _release(self, token: Token) -> None:
        self._leases.end(token)
        self._by_token.pop(token, None)
        self._revoking.pop(token, None)
        self.sessions.forget_token(token)

    def _drop_early(self, token: Token) -> None:
        early = self._early.pop(token, None)
        if early is not None:
            early.session.tokens.discard(token)


def _signed_at_a_time(plan: PairPlan) -> int:
    """Blocks: few enough for one message, and for others to get their turn."""
    by_message = MAX_SUMS_BYTES // _sum_bytes(plan)
    by_size = SIGN_BYTES // (plan.unit_bytes * plan.src_units)
    return max(1, min(MAX_IDS_PER_MESSAGE, by_message, by_size))


def _sum_bytes(plan: PairPlan) -> int:
    """Of one block."""
    return SUM_BYTES * plan.src_units * len(plan.layers)


def _forget_oldest(remembered: OrderedDict[str, Any]) -> None:
    while len(remembered) > MAX_REMEMBERED:
        remembered.popitem(last=False)
