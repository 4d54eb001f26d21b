"""The destinations that talk to a source: who is let in, who is heard from, who is gone. In the messenger's thread."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field

from kv_transfer.checksums import LayerSums, load_digest
from kv_transfer.effects import PeerKey, Token
from kv_transfer.errors import ProtocolError
from kv_transfer.handshake import examine, is_proof, new_challenge, process_of, proof, refuse_version
from kv_transfer.layout import KVLayout
from kv_transfer.pairing import destination_ranks
from kv_transfer.parts import MessengerParts
from kv_transfer.plan import PairPlan, plan_pair
from kv_transfer.pool import BlockPool
from kv_transfer.protocol import (
    TOKEN_BYTES,
    Hello,
    Message,
    OtherVersion,
    Ping,
    Pong,
    Prove,
    Ready,
    Refused,
    Welcome,
    decode,
    encode,
)
from kv_transfer.views import BlockView

log = logging.getLogger("kv_transfer")

# Destinations that have said Hello and have not proved anything yet, and the time they have for it.
MAX_STRANGERS = 1024
STRANGER_TIMEOUT_S = 5.0
# A destination hangs up after less than this without a transfer.
SESSION_IDLE_S = 900.0


@dataclass(slots=True)
class Session:
    """A destination's connection.

    Attributes:
        data_token: None until it has proved itself.
        plan, view: what it takes out of our blocks; from then on.
        expected: all the ranks of its instance that have to do with this one; from then on.
        tokens: of its transfers, the ones that wait for ``open_send`` included.
        sums: hashes what it takes, once it has asked for that.
    """

    key: PeerKey
    hello: Hello
    layout: KVLayout
    challenge: bytes
    last_heard: float
    data_token: bytes | None = None
    plan: PairPlan = field(init=False)
    view: BlockView = field(init=False)
    expected: frozenset[int] = field(init=False)
    tokens: set[Token] = field(default_factory=set)
    sums: LayerSums | None = None
    _checksum: str = ""

    def prepare_sums(self, pool: BlockPool, checksum: str) -> None:
        """Have ``sums`` hash by this name. Raises InvalidOptions when it cannot be had here."""
        if checksum != self._checksum:
            self.sums = LayerSums(self.plan, pool, "src", load_digest(checksum))
            self._checksum = checksum

    @property
    def name(self) -> str:
        return self.hello.name


class Sessions:
    def __init__(
        self,
        parts: MessengerParts,
        *,
        on_message: Callable[[Session, Message, float], bool],
        on_lost: Callable[[Session, str, float], None],
    ) -> None:
        """
        Args:
            on_message: takes what a session that was let in says about transfers; False when it makes no sense.
            on_lost: is told of a session that is over, after it was forgotten.
        """
        self._own, self._pool, self._options, self._control = parts.own, parts.pool, parts.options, parts.control
        self._leases, self._transports, self._counters = parts.leases, parts.transports, parts.counters
        self._on_message, self._on_lost = on_message, on_lost
        self._sessions: dict[PeerKey, Session] = {}
        self._unreachable: list[PeerKey] = []

    @property
    def has_strangers(self) -> bool:
        return any(session.data_token is None for session in self._sessions.values())

    def get(self, key: PeerKey) -> Session | None:
        return self._sessions.get(key)

    def forget_token(self, token: Token) -> None:
        """A transfer has ended."""
        for session in self._sessions.values():
            session.tokens.discard(token)

    def tell(self, key: PeerKey, message: Message) -> None:
        """Send to a session; one that cannot be sent to is lost, at the next tick."""
        if key in self._sessions and not self._control.tell(key, encode(message)):
            # Not at once: a machine is in the middle of saying what it wants.
            self._unreachable.append(key)

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
        elif isinstance(message, Ping):
            self.tell(key, Pong())
        elif not self._on_message(session, message, now):
            self._drop_garbage(key, f"{type(message).__name__} out of place", now)

    def lose(self, key: PeerKey, reason: str, now: float, parting: Refused | None = None) -> None:
        """A session is over. Idempotent.

        Args:
            parting: what it is told.
        """
        session = self._sessions.pop(key, None)
        if session is None:
            return
        if parting is not None:
            self._refuse(key, parting)
        self._control.hang_up(key)
        if session.data_token is not None:
            self._leases.dismiss(session.data_token)
            for transport in self._transports:
                transport.hang_up(session.data_token)
        if session.tokens:
            self._counters.add("peers_lost_total")
            log.warning("lost %s: %s", session.name, reason)
        self._on_lost(session, reason, now)

    def forgive(self, seconds: float) -> None:
        """Do not count this time as silence."""
        for session in self._sessions.values():
            session.last_heard += seconds

    def tick(self, now: float) -> None:
        """Look at the clock."""
        for key, session in list(self._sessions.items()):
            silent_s = now - session.last_heard
            if session.data_token is None and silent_s > STRANGER_TIMEOUT_S:
                self.lose(key, "it did not prove itself in time", now)
            elif session.tokens and silent_s > self._options.silence_s:
                self.lose(key, f"nothing was heard from it for {silent_s:.1f} s", now)
            elif silent_s > SESSION_IDLE_S:
                self.lose(key, "idle", now)
        while self._unreachable:
            self.lose(self._unreachable.pop(), "it does not read what it is told", now)

    def _greet(self, key: PeerKey, hello: Hello, now: float) -> None:
        examined = examine(hello, self._own)
        if isinstance(examined, Refused):
            self._refuse(key, examined)
            return
        if sum(s.data_token is None for s in self._sessions.values()) >= MAX_STRANGERS:
            self._refuse(key, Refused("busy", "too many connections that have not proved themselves"))
            return
        challenge = new_challenge()
        self._sessions[key] = Session(
            key=key,
            hello=hello,
            layout=examined,
            challenge=challenge,
            last_heard=now,
        )
        self.tell(key, Welcome(challenge, proof(self._options.secret, "source", hello, challenge)))

    def _admit(self, session: Session, message: Message, now: float) -> None:
        if not isinstance(message, Prove) or not is_proof(
            message.proof, self._options.secret, "destination", session.hello, session.challenge
        ):
            parting = Refused("secret", "the peers do not share the same transfer secret")
            self.lose(session.key, "it did not prove itself", now, parting)
            return
        # Not before: strangers are to cost no more than their Hello.
        session.plan = plan_pair(self._own.layout, session.layout)
        session.view = self._pool.view(session.plan, "src")
        session.expected = destination_ranks(self._own.layout, session.layout)
        session.data_token = secrets.token_bytes(TOKEN_BYTES)
        self._leases.admit(session.data_token)
        self._control.let_in(session.key)
        self._control.watch(session.key, process_of(session.hello))
        self.tell(session.key, Ready(session.data_token))

    def _drop_garbage(self, key: PeerKey, why: str, now: float) -> None:
        self._counters.add("garbage_total")
        log.debug("dropped a message on the control channel: %s", why)
        if key in self._sessions:
            self.lose(key, f"it does not keep to the protocol ({why})", now, Refused("protocol", why))
        else:
            self._control.hang_up(key)

    def _refuse(self, key: PeerKey, refused: Refused) -> None:
        self._counters.add("refused_total")
        self._control.tell(key, encode(refused))
        self._control.hang_up(key)
