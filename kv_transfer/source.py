"""The source's half of a messenger: who may talk to it, and the transfers that it sends. In the messenger's thread."""

from __future__ import annotations

import logging
import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from kv_transfer.control import ControlChannel
from kv_transfer.counters import Counters
from kv_transfer.effects import Allow, Effect, Forget, PeerKey, Report, Revoke, Tell, Token
from kv_transfer.endpoint import RankEndpoint
from kv_transfer.errors import ProtocolError
from kv_transfer.events import Sent, TransferEvent, TransferFailed
from kv_transfer.handshake import examine, is_proof, new_challenge, process_of, proof, refuse_version
from kv_transfer.layout import KVLayout
from kv_transfer.leases import LeaseTable
from kv_transfer.options import TransferOptions
from kv_transfer.plan import IntArray, destination_ranks, plan_pair
from kv_transfer.protocol import (
    TOKEN_BYTES,
    Abort,
    Applied,
    Drained,
    Hello,
    Message,
    OtherVersion,
    Ping,
    Pong,
    Prove,
    Ready,
    Refused,
    Reserve,
    Welcome,
    decode,
    encode,
)
from kv_transfer.sending import Receiver, SendTransfer
from kv_transfer.transports.base import Transport

log = logging.getLogger("kv_transfer")

# Destinations that have said Hello and have not proved anything yet, and the time they have for it.
MAX_STRANGERS = 1024
STRANGER_TIMEOUT_S = 5.0
# Transfers that ended on one side before the other had come to it, remembered so that it is told so at once.
MAX_REMEMBERED = 16384
# A destination hangs up after less than this without a transfer; zmq does not tell us.
SESSION_IDLE_S = 900.0


@dataclass(slots=True)
class Session:
    """A destination's connection.

    Attributes:
        data_token: None until it has proved itself.
        tokens: of its transfers, the ones that wait for ``open_send`` included.
    """

    key: PeerKey
    hello: Hello
    layout: KVLayout
    challenge: bytes
    last_heard: float
    data_token: bytes | None = None
    tokens: set[Token] = field(default_factory=set)

    @property
    def name(self) -> str:
        return self.hello.name


@dataclass(frozen=True, slots=True)
class EarlyReservation:
    """One that came before ``open_send``."""

    session: PeerKey
    reserve: Reserve
    until: float


class SourceSide:
    def __init__(
        self,
        *,
        own: RankEndpoint,
        options: TransferOptions,
        control: ControlChannel,
        leases: LeaseTable,
        transports: Iterable[Transport],
        counters: Counters,
        report: Callable[[TransferEvent], None],
    ) -> None:
        self._own, self._options, self._control, self._leases = own, options, control, leases
        self._transports, self._counters, self._report = tuple(transports), counters, report
        self._sessions: dict[PeerKey, Session] = {}
        self._sends: dict[str, SendTransfer] = {}
        self._by_token: dict[Token, str] = {}
        self._early: dict[Token, EarlyReservation] = {}
        self._ended: OrderedDict[str, str] = OrderedDict()
        self._given_up: OrderedDict[str, tuple[str, str]] = OrderedDict()
        self._revoking: dict[Token, set[Transport]] = {}
        self._unreachable: list[PeerKey] = []

    @property
    def num_open(self) -> int:
        return len(self._sends)

    @property
    def is_waiting(self) -> bool:
        """Whether the clock matters."""
        return bool(self._sends or self._early or any(s.data_token is None for s in self._sessions.values()))

    def open(self, transfer_id: str, num_blocks: int, deadline_s: float, now: float) -> None:
        self._ended.pop(transfer_id, None)
        self._sends[transfer_id] = SendTransfer(
            transfer_id, num_blocks, now=now, deadline_s=deadline_s, drain_s=self._options.drain_s
        )
        for token, early in list(self._early.items()):
            if early.reserve.transfer_id == transfer_id:
                del self._early[token]
                self._reserve(self._sessions[early.session], early.reserve, now)
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

    def receive(self, key: PeerKey, frame: bytes, now: float) -> None:
        """A frame from a destination, or from anybody."""
        try:
            message = decode(frame)
        except OtherVersion as exc:
            self._refuse(key, refuse_version(exc.version))
            return
        except ProtocolError as exc:
            self._drop_garbage(key, str(exc), now)
            return
        session = self._sessions.get(key)
        if isinstance(message, Hello):
            if session is None:
                self._greet(key, message, now)
            else:
                self._drop_garbage(key, "a second Hello", now)
            return
        if session is None:
            self._refuse(key, Refused("session", f"{self._own.describe()} knows nothing of this connection"))
            return
        session.last_heard = now
        if session.data_token is None:
            self._admit(session, message, now)
        elif not self._handle(session, message, now):
            self._drop_garbage(key, f"{type(message).__name__} out of place", now)

    def lose(self, key: PeerKey, reason: str, now: float) -> None:
        """A session is over. Idempotent."""
        session = self._sessions.pop(key, None)
        if session is None:
            return
        self._control.unwatch(key)
        if session.data_token is not None:
            self._leases.dismiss(session.data_token)
            for transport in self._transports:
                transport.hang_up(session.data_token)
        if session.tokens:
            self._counters.add("peers_lost_total")
            log.warning("lost %s: %s", session.name, reason)
        for token in session.tokens:
            self._early.pop(token, None)
        for transfer_id in {self._by_token[t] for t in session.tokens if t in self._by_token}:
            self._run(transfer_id, self._sends[transfer_id].lose(key, reason, now))

    def forgive(self, seconds: float) -> None:
        """Do not count this time as silence of the peers."""
        for session in self._sessions.values():
            session.last_heard += seconds

    def tick(self, now: float) -> None:
        """Look at the clock."""
        for transfer_id, transfer in list(self._sends.items()):
            self._run(transfer_id, transfer.tick(now))
        for token, early in list(self._early.items()):
            if now >= early.until:
                self._drop_early(token)
        for key, session in list(self._sessions.items()):
            silent_s = now - session.last_heard
            if session.data_token is None and silent_s > STRANGER_TIMEOUT_S:
                self.lose(key, "it did not prove itself in time", now)
            elif session.tokens and silent_s > self._options.silence_s:
                self.lose(key, f"nothing was heard from it for {silent_s:.1f} s", now)
            elif silent_s > SESSION_IDLE_S:
                self.lose(key, "idle", now)
        while self._unreachable:
            self.lose(self._unreachable.pop(), "its control connection is closed", now)

    def _greet(self, key: PeerKey, hello: Hello, now: float) -> None:
        examined = examine(hello, self._own)
        if isinstance(examined, Refused):
            self._refuse(key, examined)
            return
        if sum(s.data_token is None for s in self._sessions.values()) >= MAX_STRANGERS:
            self._refuse(key, Refused("busy", "too many connections that have not proved themselves"))
            return
        challenge = new_challenge()
        self._sessions[key] = Session(key, hello, examined, challenge, last_heard=now)
        self._tell(key, Welcome(challenge, proof(self._options.secret, "source", hello, challenge)))

    def _admit(self, session: Session, message: Message, now: float) -> None:
        if not isinstance(message, Prove) or not is_proof(
            message.proof, self._options.secret, "destination", session.hello, session.challenge
        ):
            self.lose(session.key, "it did not prove itself", now)
            self._refuse(session.key, Refused("secret", "the peers do not share the same transfer secret"))
            return
        session.data_token = secrets.token_bytes(TOKEN_BYTES)
        self._leases.admit(session.data_token)
        self._control.watch(session.key, process_of(session.hello))
        self._tell(session.key, Ready(session.data_token))

    def _handle(self, session: Session, message: Message, now: float) -> bool:
        """Whether the message makes sense from a session that was admitted."""
        if isinstance(message, Ping):
            self._tell(session.key, Pong())
        elif isinstance(message, Reserve):
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
            self._tell(session.key, Abort(reserve.token, self._ended[reserve.transfer_id]))
        elif len(self._early) >= self._options.max_inflight:
            self._tell(session.key, Abort(reserve.token, "too many reservations wait for transfers at the source"))
        else:
            self._early[reserve.token] = EarlyReservation(session.key, reserve, now + reserve.deadline_ms / 1000)
            session.tokens.add(reserve.token)

    def _reserve(self, session: Session, reserve: Reserve, now: float) -> None:
        assert session.data_token is not None
        plan = plan_pair(self._own.layout, session.layout)
        expected = destination_ranks(
            session.layout.num_kv_heads, self._own.tp_size, session.layout.tp_size, self._own.tp_rank
        )
        receiver = Receiver(
            peer=session.key,
            token=reserve.token,
            rank=session.layout.tp_rank,
            name=session.name,
            lane=reserve.lane,
            bytes_per_block=plan.bytes_per_block,
        )
        transfer = self._sends[reserve.transfer_id]
        self._leases.grant(reserve.token, session.data_token, plan)
        self._by_token[reserve.token] = reserve.transfer_id
        session.tokens.add(reserve.token)
        effects = transfer.reserve(receiver, frozenset(expected), reserve.num_blocks, now)
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
                self._tell(session.key, Abort(token, "the source has given this transfer up"))
            elif isinstance(message, Abort):
                self._tell(session.key, Drained(token))
            return
        transfer = self._sends[transfer_id]
        if isinstance(message, Applied):
            self._run(transfer_id, transfer.applied(token, now))
        elif isinstance(message, Drained):
            self._run(transfer_id, transfer.drained(token, now))
        else:
            self._run(transfer_id, transfer.abort(f"the destination gave up: {message.reason}", session.name, now))

    def _run(self, transfer_id: str, effects: Iterable[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Tell):
                self._tell(effect.peer, effect.message)
            elif isinstance(effect, Allow):
                self._leases.allow(effect.token, effect.block_ids)
            elif isinstance(effect, Forget):
                self._leases.end(effect.token)
            elif isinstance(effect, Revoke):
                self._leases.end(effect.token)
                self._revoking[effect.token] = set(self._transports)
                for transport in self._transports:
                    transport.revoke(effect.token)
            elif isinstance(effect, Report):
                self._end(transfer_id, effect.event)

    def _end(self, transfer_id: str, event: TransferEvent) -> None:
        transfer = self._sends.pop(transfer_id)
        if isinstance(event, Sent):
            self._counters.add("sent_total")
            for receiver in transfer.receivers.values():
                self._counters.add(f"bytes_sent_{receiver.lane}", receiver.bytes_per_block * transfer.num_blocks)
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
        for session in self._sessions.values():
            session.tokens.discard(token)

    def _drop_early(self, token: Token) -> None:
        early = self._early.pop(token, None)
        if early is not None:
            self._sessions[early.session].tokens.discard(token)

    def _drop_garbage(self, key: PeerKey, why: str, now: float) -> None:
        self._counters.add("garbage_total")
        log.debug("dropped a message on the control channel: %s", why)
        session = self._sessions.get(key)
        if session is not None:
            self.lose(key, f"it does not keep to the protocol ({why})", now)
            self._refuse(key, Refused("protocol", why))

    def _refuse(self, key: PeerKey, refused: Refused) -> None:
        self._counters.add("refused_total")
        self._control.tell_session(key, encode(refused))

    def _tell(self, key: PeerKey, message: Message) -> None:
        if key in self._sessions and not self._control.tell_session(key, encode(message)):
            # Not at once: a machine is in the middle of saying what it wants.
            self._unreachable.append(key)


def _forget_oldest(remembered: OrderedDict[str, Any]) -> None:
    while len(remembered) > MAX_REMEMBERED:
        remembered.popitem(last=False)
