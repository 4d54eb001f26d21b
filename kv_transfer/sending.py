"""One transfer as its source rank sees it: open -> (receivers move, then apply) -> sent, or aborting -> failed. Pure.

Why a source may say Sent: a receiver says Applied only after its last byte was read, and the source takes it only
while the transfer is open, that is, while the blocks have been leased without a break. So what was read was true.

Why a source may say TransferFailed although a stopped peer might still read: from the moment it leaves ``open`` it
answers no Applied with Confirmed, and a receiver reports nothing as received before Confirmed. A peer that sleeps
through the abort and wakes reads blocks that belong to somebody else, into memory of its own that it will not use.
Live peers are waited for all the same, for ``drain_s`` at most, so that in the usual case nobody reads at all.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kv_transfer.effects import Allow, Effect, Forget, PeerKey, Report, Revoke, Sign, Tell, Token
from kv_transfer.events import Sent, TransferFailed, TransferStats
from kv_transfer.plan import IntArray, hold_the_same
from kv_transfer.protocol import MAX_IDS_PER_MESSAGE, Abort, Blocks, Confirmed, Drained, End, printable


@dataclass(slots=True)
class Receiver:
    """One destination rank's part.

    Attributes:
        rank: the destination's TP rank.
        name: for people.
        lane: the transport that it fetches with.
        block_size: of its pool.
        num_bytes: that it has fetched, once applied.
        blocks_per_message: at most.
        is_signed: it gets checksums with its blocks.
        num_unsigned: blocks that are being hashed for it.
    """

    peer: PeerKey
    token: Token
    rank: int
    name: str
    lane: str
    block_size: int
    num_bytes: int = 0
    blocks_per_message: int = MAX_IDS_PER_MESSAGE
    is_signed: bool = False
    num_unsigned: int = 0
    applied: bool = False
    peer_drained: bool = False
    revoked: bool = False


class SendTransfer:
    """Every method returns what is to be done, in order; after a Report the machine is to be dropped."""

    def __init__(
        self, transfer_id: str, num_blocks: int, *, block_size: int, now: float, deadline_s: float, drain_s: float
    ) -> None:
        """``now`` is of the monotonic clock, here and in every method."""
        self.transfer_id = transfer_id
        self.num_blocks = num_blocks
        self._block_size = block_size
        self.receivers: dict[Token, Receiver] = {}
        self._opened = now
        self._deadline_s = deadline_s
        self._deadline = now + deadline_s
        self._drain_s = drain_s
        self._announced: list[tuple[int, IntArray]] = []
        self._aux: bytes | None = None
        self._expected: frozenset[int] | None = None
        self._failure: TransferFailed | None = None
        self._drain_until = 0.0

    @property
    def is_open(self) -> bool:
        return self._failure is None

    def offer(self, first_index: int, block_ids: IntArray) -> list[Effect]:
        """Blocks ``first_index`` onward are complete in the pool."""
        if not self.is_open:
            return []
        self._announced.append((first_index, block_ids))
        return [e for r in self.receivers.values() for e in _announce(r, first_index, block_ids)]

    def finish(self, aux: bytes) -> list[Effect]:
        """All blocks were offered."""
        if not self.is_open:
            return []
        self._aux = aux
        return [e for r in self.receivers.values() for e in self._end(r)]

    def signed(
        self, token: Token, first_index: int, block_ids: IntArray, sums: bytes | None, now: float
    ) -> list[Effect]:
        """Blocks that a Sign named are hashed; ``sums`` is None when they could not be."""
        receiver = self.receivers[token]
        receiver.num_unsigned -= len(block_ids)
        if not self.is_open:
            return []
        if sums is None:
            return self.abort("there was no memory to hash the blocks", "", now)
        packed = block_ids.astype(np.dtype("<u4")).tobytes()
        tell = Tell(receiver.peer, Blocks(token, first_index, packed, sums))
        return [Allow(token, block_ids), tell, *self._end(receiver)]

    def reserve(self, receiver: Receiver, expected: frozenset[int], num_blocks: int, now: float) -> list[Effect]:
        """A destination rank has room.

        Args:
            expected: all the ranks that have to do with this one.
            num_blocks: that it has reserved, of its own size.
        """
        refusal = None
        if not self.is_open:
            refusal = "the source has given this transfer up"
        elif self._expected not in (None, expected) or receiver.rank not in expected:
            refusal = f"rank {receiver.rank} is not one of those that this transfer goes to"
        elif any(r.rank == receiver.rank for r in self.receivers.values()):
            refusal = f"rank {receiver.rank} has already reserved for this transfer"
        if refusal is not None:
            return [Tell(receiver.peer, Abort(receiver.token, refusal))]
        self._expected = expected
        self.receivers[receiver.token] = receiver
        if not hold_the_same(self.num_blocks, self._block_size, num_blocks, receiver.block_size):
            return self.abort(
                f"the source sends {self.num_blocks} blocks of {self._block_size} tokens, the destination has "
                f"reserved {num_blocks} of {receiver.block_size}",
                receiver.name,
                now,
            )
        effects = [e for first, ids in self._announced for e in _announce(receiver, first, ids)]
        return effects + self._end(receiver)

    def applied(self, token: Token, num_bytes: int, now: float) -> list[Effect]:
        """A receiver holds every byte, of which ``num_bytes`` came from here."""
        receiver = self.receivers[token]
        if not self.is_open:
            return []
        if self._aux is None or receiver.num_unsigned:
            return self.abort("the peer claims to have everything before everything was sent", receiver.name, now)
        receiver.applied, receiver.num_bytes = True, num_bytes
        effects: list[Effect] = [Forget(token), Tell(receiver.peer, Confirmed(token))]
        if frozenset(r.rank for r in self.receivers.values() if r.applied) == self._expected:
            stats = TransferStats(
                num_bytes=sum(r.num_bytes for r in self.receivers.values()),
                seconds=now - self._opened,
                lane="+".join(sorted({r.lane for r in self.receivers.values()})),
                num_blocks=self.num_blocks,
            )
            effects.append(Report(Sent(self.transfer_id, stats)))
        return effects

    def abort(self, reason: str, peer: str, now: float) -> list[Effect]:
        """Give up. Idempotent: the first reason stands."""
        if not self.is_open:
            return []
        reason = printable(reason)
        self._failure = TransferFailed(self.transfer_id, reason, peer)
        self._drain_until = now + self._drain_s
        effects: list[Effect] = []
        for receiver in self.receivers.values():
            effects += [Tell(receiver.peer, Abort(receiver.token, reason)), Revoke(receiver.token)]
        return effects + self._check_drained(now)

    def drained(self, token: Token, now: float) -> list[Effect]:
        """A receiver reads no more."""
        self.receivers[token].peer_drained = True
        return self._check_drained(now)

    def revoked(self, token: Token, now: float) -> list[Effect]:
        """Our own transports read no more for a receiver."""
        receiver = self.receivers[token]
        receiver.revoked = True
        return [Tell(receiver.peer, Drained(token)), *self._check_drained(now)]

    def lose(self, peer: PeerKey, reason: str, now: float) -> list[Effect]:
        """A peer is gone; nobody there will answer any more."""
        lost = [r for r in self.receivers.values() if r.peer == peer]
        for receiver in lost:
            receiver.peer_drained = True
        if any(not r.applied for r in lost) and self.is_open:
            return self.abort(reason, lost[0].name, now)
        return self._check_drained(now)

    def tick(self, now: float) -> list[Effect]:
        """Look at the clock."""
        if self.is_open and now >= self._deadline:
            waiting = sorted({r.name for r in self.receivers.values() if not r.applied})
            reason = f"the deadline of {self._deadline_s:g} s has passed"
            if not self.receivers:
                reason += ", and no destination has reserved"
            return self.abort(reason, ", ".join(waiting), now)
        return self._check_drained(now)

    def _end(self, receiver: Receiver) -> list[Effect]:
        """Say that it has all, if it has."""
        if self._aux is None or receiver.num_unsigned:
            return []
        return [Tell(receiver.peer, End(receiver.token, self._aux))]

    def _check_drained(self, now: float) -> list[Effect]:
        if self._failure is None:
            return []
        receivers = self.receivers.values()
        if not all(r.revoked for r in receivers):
            return []
        if now < self._drain_until and not all(r.peer_drained for r in receivers):
            return []
        return [Report(self._failure)]


def _announce(receiver: Receiver, first_index: int, block_ids: IntArray) -> list[Effect]:
    most = receiver.blocks_per_message
    pieces = [(first_index + start, block_ids[start : start + most]) for start in range(0, len(block_ids), most)]
    if receiver.is_signed:
        receiver.num_unsigned += len(block_ids)
        return [Sign(receiver.token, first, ids) for first, ids in pieces]
    effects: list[Effect] = [Allow(receiver.token, block_ids)]
    for first, ids in pieces:
        effects.append(Tell(receiver.peer, Blocks(receiver.token, first, ids.astype(np.dtype("<u4")).tobytes(), b"")))
    return effects
