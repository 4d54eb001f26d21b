"""A source rank as a destination sees it: greeting -> proving -> linking -> up, or failed. In the messenger's thread.

Failed is for good: whoever wants to talk to the same source again makes a new Peer, with a new connection.
"""

from __future__ import annotations

import logging
from enum import Enum

from kv_transfer.checksums import LayerSums
from kv_transfer.effects import Token
from kv_transfer.endpoint import RankEndpoint
from kv_transfer.errors import TransportFailed
from kv_transfer.fetch_queue import Chunk, FetchQueue
from kv_transfer.handshake import greet, is_proof, proof
from kv_transfer.lanes import LaneReport
from kv_transfer.parts import MessengerParts
from kv_transfer.plan import PairPlan
from kv_transfer.protocol import Message, Ping, Prove, Ready, Welcome, encode
from kv_transfer.transports.base import Link, Transport

log = logging.getLogger("kv_transfer")


class PeerState(Enum):
    GREETING = "greeting"
    PROVING = "proving"
    LINKING = "linking"
    UP = "up"
    FAILED = "failed"


class Peer:
    """One connection to one source rank, with the one link that blocks are fetched over.

    Attributes:
        tokens: legs that have to do with this peer, and have not ended.
        lane: name of the transport in use, once up.
    """

    def __init__(
        self, parts: MessengerParts, endpoint: RankEndpoint, plan: PairPlan, sums: LayerSums | None, now: float
    ) -> None:
        """Begin to reach the source.

        Args:
            endpoint: the source rank's.
            sums: hashes what is fetched; None where nothing is to be checked.
        Raises:
            TransportFailed: no transport can reach it; says why for each.
        """
        options, control, transports = parts.options, parts.control, parts.transports
        self.endpoint, self.plan, self.sums = endpoint, plan, sums
        self.state = PeerState.GREETING
        self.tokens: set[Token] = set()
        self.link: Link | None = None
        self.lane = ""
        self.queue = FetchQueue(options.chunk_bytes // max(1, plan.unit_bytes), options.window_chunks)
        self.last_heard = now
        self.idle_since = now
        self._last_ping = now
        self._options, self._control, self._counters = options, control, parts.counters
        self._reasons: list[str] = []
        self._num_bytes = self._num_chunks = 0
        self._busy_s = 0.0
        self._busy_since: float | None = None
        self._outbox: list[Message] = []
        self._candidates = [t for t in transports if self._can_reach(t)]
        if not self._candidates:
            raise TransportFailed(self._no_lane())
        # A lane within one host that does not reach another is no news; any other that is passed over is.
        self._first_choice = next(t.name for t in transports if t.crosses_hosts or t in self._candidates)
        self._data_token = b""
        self._hello = greet(parts.own, endpoint)
        self.key = control.connect(endpoint.host, endpoint.control_port)
        control.watch(self.key, endpoint.process)
        self._send(self._hello)

    @property
    def name(self) -> str:
        return self.endpoint.describe()

    def tell(self, message: Message) -> None:
        """Say something about a transfer, as soon as the source lets us; what cannot be sent is lost."""
        if self.state in (PeerState.GREETING, PeerState.PROVING):
            self._outbox.append(message)
        else:
            self._send(message)

    def welcome(self, message: Welcome) -> str | None:
        """The source has answered; why that is not good, or None."""
        secret, challenge = self._options.secret, message.challenge
        if self.state is not PeerState.GREETING:
            return "it greets twice"
        if not is_proof(message.proof, secret, "source", self._hello, challenge):
            return "the peers do not share the same transfer secret"
        self._send(Prove(proof(secret, "destination", self._hello, challenge)))
        self.state = PeerState.PROVING
        return None

    def ready(self, message: Ready) -> str | None:
        """The source lets us in; why we cannot go on, or None."""
        if self.state is not PeerState.PROVING:
            return "it lets us in unasked"
        self._data_token = message.data_token
        self.state = PeerState.LINKING
        for said in self._outbox:
            self._send(said)
        self._outbox.clear()
        return self._open_next_link()

    def link_up(self) -> None:
        """The link that is being opened works."""
        self.state = PeerState.UP
        if self.lane != self._first_choice:
            self._counters.add("downgrades_total")
            log.warning(
                "KV transfer with %s goes over %s instead of %s: %s",
                self.name,
                self.lane,
                self._first_choice,
                "; ".join(self._reasons),
            )

    def link_failed(self, reason: str) -> str | None:
        """The link that is being opened does not; why there is no other one, or None when the next is under way."""
        self._reasons.append(f"{self.lane}: {reason}")
        self.link = None
        return self._open_next_link()

    def keep_alive(self, now: float) -> None:
        """Show the source that we live, if it is time."""
        if now - self._last_ping >= self._options.heartbeat_s and self.state is PeerState.UP:
            self._last_ping = now
            self._send(Ping())

    def pump(self, now: float) -> None:
        """Fetch what may be fetched now."""
        if self.state is not PeerState.UP or self.link is None:
            return
        while (chunk := self.queue.next()) is not None:
            if self._busy_since is None:
                self._busy_since = now
            self.link.fetch(chunk.chunk_id, chunk.token, chunk.src_ids, chunk.dst_ids)

    def fetched(self, chunk_id: int, now: float) -> Chunk | None:
        """A chunk is here; None when nobody waits for it any more."""
        chunk = self.queue.done(chunk_id)
        if chunk is not None:
            self._num_chunks += 1
            self._num_bytes += len(chunk.dst_ids) * self.plan.unit_bytes
        if not self.queue.num_under_way and self._busy_since is not None:
            self._busy_s += now - self._busy_since
            self._busy_since = None
        return chunk

    def report(self, now: float) -> LaneReport:
        is_downgraded = self.state is PeerState.UP and self.lane != self._first_choice
        return LaneReport(
            peer=self.name,
            state=self.state.value,
            lane=self.lane,
            instead_of=self._first_choice if is_downgraded else "",
            num_transfers=len(self.tokens),
            num_bytes=self._num_bytes,
            num_chunks=self._num_chunks,
            num_descriptors=self.link.num_descriptors if self.link is not None else 0,
            busy_s=self._busy_s + (0.0 if self._busy_since is None else now - self._busy_since),
            under_way_chunks=self.queue.num_under_way,
            waiting_chunks=self.queue.num_waiting,
        )

    def hang_up(self) -> None:
        """Let go of the control connection; the link is its owner's to close."""
        self._control.hang_up(self.key)

    def _send(self, message: Message) -> None:
        # What gets lost here ends with the peer's silence.
        self._control.tell(self.key, encode(message))

    def _can_reach(self, transport: Transport) -> bool:
        if transport.name not in self.endpoint.transports:
            self._reasons.append(f"{transport.name}: the peer does not offer it")
            return False
        obstacle = transport.obstacle(self.endpoint)
        if obstacle is not None:
            self._reasons.append(f"{transport.name}: {obstacle}")
        return obstacle is None

    def _open_next_link(self) -> str | None:
        if not self._candidates:
            return self._no_lane()
        transport = self._candidates.pop(0)
        self.lane = transport.name
        self.queue.resize(transport.chunk_bytes // max(1, self.plan.unit_bytes))
        self.link = transport.open_link(self.endpoint, self._data_token, self.plan)
        return None

    def _no_lane(self) -> str:
        return f"no transport reaches {self.name} ({'; '.join(self._reasons)})"
