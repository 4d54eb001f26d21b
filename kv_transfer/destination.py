"""The destination's half of a messenger: the sources it talks to, and the transfers it receives. In its thread."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from kv_transfer.checker import Checked
from kv_transfer.checksums import NONE, LayerSums, load_digest
from kv_transfer.effects import Cancel, Effect, Fetch, PeerKey, Report, Tell, Token
from kv_transfer.endpoint import RankEndpoint
from kv_transfer.errors import LayoutMismatch, ProtocolError, TransportFailed
from kv_transfer.events import Received, TransferEvent, TransferFailed
from kv_transfer.lanes import LaneReport
from kv_transfer.parts import MessengerParts
from kv_transfer.peer import Peer, PeerState
from kv_transfer.plan import IntArray, PairPlan
from kv_transfer.protocol import (
    Abort,
    Blocks,
    Confirmed,
    Drained,
    End,
    Message,
    Pong,
    Ready,
    Refused,
    Welcome,
    decode,
)
from kv_transfer.receiving import Leg, ReceiveTransfer
from kv_transfer.routes import Routes
from kv_transfer.transports.base import Cancelled, Fetched, LaneEvent, Link, LinkDown, LinkUp, Refusal

log = logging.getLogger("kv_transfer")

# A source is kept connected this long without a transfer.
PEER_IDLE_S = 300.0
# A source that allows no more blocks has given the transfer up, and its Abort, which says why, is on its way.
REFUSAL_GRACE_S = 1.0


class DestinationSide:
    def __init__(self, parts: MessengerParts) -> None:
        self._parts, self._own, self._pool, self._options = parts, parts.own, parts.pool, parts.options
        self._checker, self._counters, self._report = parts.checker, parts.counters, parts.report
        self._routes = Routes(parts.own.layout)
        self._receives: dict[str, ReceiveTransfer] = {}
        self._by_token: dict[Token, str] = {}
        self._peers: dict[PeerKey, Peer] = {}
        self._current: dict[str, Peer] = {}
        self._links: dict[Link, Peer] = {}
        self._refused: dict[Token, tuple[float, str]] = {}

    @property
    def num_open(self) -> int:
        return len(self._receives)

    @property
    def is_waiting(self) -> bool:
        """Whether the clock matters."""
        return bool(self._receives)

    def open(
        self, transfer_id: str, source: Sequence[RankEndpoint], block_ids: IntArray, deadline_s: float, now: float
    ) -> None:
        try:
            legs = self._plan_legs(source, now)
        except (LayoutMismatch, ProtocolError, TransportFailed) as exc:
            self._counters.add("receive_failed_total")
            self._report(TransferFailed(transfer_id, str(exc), ", ".join(e.describe() for e in source[:4])))
            return
        transfer = ReceiveTransfer(
            transfer_id,
            block_ids,
            legs,
            block_size=self._own.layout.block_size,
            checksum=self._options.checksum,
            now=now,
            deadline_s=deadline_s,
        )
        self._receives[transfer_id] = transfer
        for leg in legs:
            peer = self._peers[leg.peer]
            if not peer.tokens:
                peer.last_heard = now
            peer.tokens.add(leg.token)
            self._by_token[leg.token] = transfer_id
        for leg in legs:
            peer = self._peers[leg.peer]
            if peer.state is PeerState.UP:
                self._make_ready(leg.token, peer.lane, now)

    def connect(self, source: Sequence[RankEndpoint], now: float) -> None:
        """Begin to reach a source's ranks before there is a transfer."""
        try:
            self._plan_legs(source, now)
        except (LayoutMismatch, ProtocolError, TransportFailed) as exc:
            log.warning("cannot fetch from %s: %s", source[0].describe(), exc)

    def lanes(self, now: float) -> list[LaneReport]:
        return [peer.report(now) for peer in self._peers.values()]

    def abort(self, transfer_id: str, reason: str, peer: str) -> None:
        if transfer_id in self._receives:
            self._run(transfer_id, self._receives[transfer_id].abort(reason, peer))

    def abort_all(self, reason: str) -> None:
        for transfer_id in list(self._receives):
            self.abort(transfer_id, reason, "")

    def receive(self, key: PeerKey, frame: bytes, now: float) -> None:
        """A frame from a source, or from whoever is at its address."""
        peer = self._peers.get(key)
        if peer is None:
            return
        peer.last_heard = now
        try:
            message = decode(frame)
            problem = self._handle(peer, message, now)
        except ProtocolError as exc:
            problem = str(exc)
        if problem is not None:
            self._counters.add("garbage_total")
            self.lose(key, problem)

    def take(self, event: LaneEvent, now: float) -> None:
        """An event of a link."""
        if isinstance(event, LinkUp):
            self._link_up(event.link, now)
        elif isinstance(event, LinkDown):
            self._link_down(event.link, event.reason)
        elif isinstance(event, Fetched):
            peer = self._links.get(event.link)
            chunk = peer.fetched(event.chunk_id, now) if peer is not None else None
            if peer is not None and chunk is not None:
                if peer.sums is not None and chunk.sums is not None:
                    self._checker.check(peer.sums, chunk, chunk.sums)
                else:
                    self._run_token(chunk.token, lambda t: t.fetched(chunk.token, len(chunk.dst_ids)))
                peer.pump(now)
        elif isinstance(event, Refusal):
            self._refused.setdefault(event.token, (now + REFUSAL_GRACE_S, event.reason))
        elif isinstance(event, Cancelled):
            self._make_cancelled(event.token)

    def checked(self, event: Checked) -> None:
        """A chunk that was fetched is compared with what the source says of it."""
        token, problem = event.chunk.token, event.problem
        transfer_id = self._by_token.get(token)
        if transfer_id is None:
            return
        transfer = self._receives[transfer_id]
        if problem is None:
            self._run(transfer_id, transfer.fetched(token, len(event.chunk.dst_ids)))
        elif isinstance(problem, str):
            self._run(transfer_id, transfer.abort(problem, ""))
        elif transfer.is_open:
            self._counters.add("checksum_mismatch_total")
            effects = transfer.mismatched(token, problem, self._own.describe())
            log.error("transfer %s: %s", transfer_id, transfer.failure_reason)
            self._run(transfer_id, effects)

    def lose(self, key: PeerKey, reason: str) -> None:
        """A source is gone, or no good. Idempotent."""
        peer = self._peers.get(key)
        if peer is None or peer.state is PeerState.FAILED:
            return
        peer.state = PeerState.FAILED
        if self._current.get(peer.endpoint.nonce) is peer:
            del self._current[peer.endpoint.nonce]
        tokens = set(peer.tokens)
        if tokens:
            self._counters.add("peers_lost_total")
            log.warning("lost %s: %s", peer.name, reason)
        for token in tokens:
            self._run_token(token, lambda t: t.abort(reason, peer.name))
        del self._peers[key]
        peer.hang_up()
        if peer.link is not None:
            peer.link.close()
        else:
            self._settle(tokens)

    def forgive(self, seconds: float) -> None:
        """Do not count this time as silence of the peers."""
        for peer in self._peers.values():
            peer.last_heard += seconds

    def tick(self, now: float) -> None:
        """Look at the clock."""
        for transfer_id, transfer in list(self._receives.items()):
            self._run(transfer_id, transfer.tick(now))
        for token, (until, reason) in list(self._refused.items()):
            if now >= until:
                del self._refused[token]
                self._give_up(token, reason)
        for key, peer in list(self._peers.items()):
            if not peer.tokens:
                if now - max(peer.idle_since, peer.last_heard) > PEER_IDLE_S:
                    self.lose(key, "idle")
                continue
            peer.idle_since = now
            if now - peer.last_heard > self._options.silence_s:
                self.lose(key, f"nothing was heard from it for {now - peer.last_heard:.1f} s")
            else:
                peer.keep_alive(now)

    def _plan_legs(self, source: Sequence[RankEndpoint], now: float) -> list[Leg]:
        legs = []
        for endpoint, plan in self._routes.of(source):
            peer = self._current.get(endpoint.nonce)
            if peer is None or peer.endpoint != endpoint:
                peer = Peer(self._parts, endpoint, plan, self._sums(plan), now)
                self._current[endpoint.nonce] = self._peers[peer.key] = peer
            legs.append(Leg(peer.key, peer.name, plan, endpoint.layout.num_blocks, endpoint.layout.block_size))
        return legs

    def _sums(self, plan: PairPlan) -> LayerSums | None:
        if self._options.checksum == NONE or plan.is_empty:
            return None
        return LayerSums(plan, self._pool, "dst", load_digest(self._options.checksum))

    def _handle(self, peer: Peer, message: Message, now: float) -> str | None:
        """What is wrong with the message, or None."""
        if isinstance(message, Blocks):
            ids = np.frombuffer(message.block_ids, "<u4").astype(np.int64)
            self._run_own(
                peer, message.token, lambda t: t.blocks(message.token, message.first_index, ids, message.sums)
            )
            peer.pump(now)
        elif isinstance(message, End):
            self._run_own(peer, message.token, lambda t: t.end(message.token, message.aux))
        elif isinstance(message, Confirmed):
            self._run_own(peer, message.token, lambda t: t.confirmed(message.token, now))
        elif isinstance(message, Abort):
            self._run_own(peer, message.token, lambda t: t.abort(f"the source gave up: {message.reason}", peer.name))
        elif isinstance(message, Welcome):
            return peer.welcome(message)
        elif isinstance(message, Ready):
            return self._watch_link(peer, peer.ready(message))
        elif isinstance(message, Refused):
            return message.reason
        elif not isinstance(message, Pong | Drained):
            return f"{type(message).__name__} out of place"
        return None

    def _watch_link(self, peer: Peer, problem: str | None) -> str | None:
        if problem is None and peer.link is not None:
            self._links[peer.link] = peer
        return problem

    def _link_up(self, link: Link, now: float) -> None:
        peer = self._links.get(link)
        if peer is None or peer.state is not PeerState.LINKING:
            return
        peer.link_up()
        for token in list(peer.tokens):
            self._make_ready(token, peer.lane, now)

    def _link_down(self, link: Link, reason: str) -> None:
        peer = self._links.pop(link, None)
        if peer is None:
            return
        if peer.state is PeerState.LINKING:
            problem = self._watch_link(peer, peer.link_failed(reason))
            if problem is None:
                return
            reason = problem
        else:
            reason = f"its {peer.lane} link is down: {reason}"
        peer.link = None
        self.lose(peer.key, reason)
        # Also when it was lost before, and this is the end of closing its link.
        self._settle(set(peer.tokens))

    def _settle(self, tokens: Iterable[Token]) -> None:
        """Nothing writes for these legs any more."""
        for token in tokens:
            self._make_cancelled(token)

    def _give_up(self, token: Token, reason: str) -> None:
        self._run_token(token, lambda t: t.abort(reason, t.legs[token].name))

    def _make_ready(self, token: Token, lane: str, now: float) -> None:
        self._run_token(token, lambda t: t.ready(token, lane, now))

    def _make_cancelled(self, token: Token) -> None:
        self._run_token(token, lambda t: t.cancelled(token))

    def _run_own(self, peer: Peer, token: Token, step: Callable[[ReceiveTransfer], list[Effect]]) -> None:
        """Messages about a transfer count only from its own peer; those about one that has ended mean nothing."""
        if token in peer.tokens:
            self._run_token(token, step)

    def _run_token(self, token: Token, step: Callable[[ReceiveTransfer], list[Effect]]) -> None:
        transfer_id = self._by_token.get(token)
        if transfer_id is not None:
            self._run(transfer_id, step(self._receives[transfer_id]))

    def _run(self, transfer_id: str, effects: Iterable[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Tell):
                if effect.peer in self._peers:
                    self._peers[effect.peer].tell(effect.message)
            elif isinstance(effect, Fetch):
                peer = self._peers[effect.peer]
                peer.queue.add(effect.token, effect.src_ids, effect.dst_ids, effect.sums)
            elif isinstance(effect, Cancel):
                self._cancel(effect.peer, effect.token)
            elif isinstance(effect, Report):
                self._end(transfer_id, effect.event)

    def _cancel(self, key: PeerKey, token: Token) -> None:
        peer = self._peers.get(key)
        if peer is not None:
            peer.queue.drop(token)
        if peer is not None and peer.link is not None:
            peer.link.cancel(token)
            # What it had under way made others wait.
            peer.pump(time.monotonic())
        elif not any(token in p.tokens for p in self._links.values()):
            self._settle([token])

    def _end(self, transfer_id: str, event: TransferEvent) -> None:
        transfer = self._receives.pop(transfer_id)
        if isinstance(event, Received):
            self._counters.add("received_total")
            for leg in transfer.legs.values():
                self._counters.add(f"bytes_received_{leg.lane}", leg.num_bytes)
        else:
            self._counters.add("receive_failed_total")
        for leg in transfer.legs.values():
            self._by_token.pop(leg.token, None)
            self._refused.pop(leg.token, None)
            for peer in (*self._peers.values(), *self._links.values()):
                peer.tokens.discard(leg.token)
        self._report(event)
