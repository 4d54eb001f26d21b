"""One transfer as its destination rank sees it: a leg for each source rank, all of which must end well. Pure.

A leg: waiting (the peer is being reached) -> moving (reserved) -> applied (every byte is here) -> confirmed. Only the
last one counts: a source confirms only while its blocks are still this transfer's, so bytes that were read from blocks
already given to somebody else are never reported as received.

Only this process writes to its pool. TransferFailed is reported when its own transports have said for every leg that
they write no more, which does not depend on any peer.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from kv_transfer.effects import Cancel, Effect, Fetch, PeerKey, Report, Tell, Token
from kv_transfer.events import Received, TransferFailed, TransferStats
from kv_transfer.plan import IntArray, PairPlan
from kv_transfer.protocol import TOKEN_BYTES, Abort, Applied, Drained, Reserve, printable


@dataclass(slots=True)
class Leg:
    """One source rank's part.

    Attributes:
        src_num_blocks: of the source's pool.
        reserved: the source has been told of the transfer.
    """

    peer: PeerKey
    name: str
    plan: PairPlan
    src_num_blocks: int
    token: Token = field(default_factory=lambda: secrets.token_bytes(TOKEN_BYTES))
    lane: str = ""
    reserved: bool = False
    num_announced: int = 0
    num_fetched: int = 0
    aux: bytes | None = None
    applied: bool = False
    confirmed: bool = False
    cancelled: bool = False


class ReceiveTransfer:
    """Every method returns what is to be done, in order; after a Report the machine is to be dropped."""

    def __init__(
        self, transfer_id: str, block_ids: IntArray, legs: Sequence[Leg], *, now: float, deadline_s: float
    ) -> None:
        """``now`` is of the monotonic clock, here and in every method.

        Args:
            block_ids: of the destination's pool, [num_blocks].
        """
        self.transfer_id = transfer_id
        self.legs = {leg.token: leg for leg in legs}
        self._block_ids = block_ids
        self._seen = {leg.token: np.zeros(len(block_ids), dtype=np.bool_) for leg in legs}
        self._opened = now
        self._deadline_s = deadline_s
        self._deadline = now + deadline_s
        self._failure: TransferFailed | None = None

    @property
    def is_open(self) -> bool:
        return self._failure is None

    def ready(self, token: Token, lane: str, now: float) -> list[Effect]:
        """A source rank can be talked to, and reached by ``lane``."""
        leg = self.legs[token]
        if not self.is_open or leg.reserved:
            return []
        leg.reserved, leg.lane = True, lane
        left_ms = max(0, int((self._deadline - now) * 1000))
        return [Tell(leg.peer, self._reservation(leg, left_ms))]

    def blocks(self, token: Token, first_index: int, src_ids: IntArray) -> list[Effect]:
        """A source rank has completed blocks."""
        leg, seen = self.legs[token], self._seen[token]
        if not self.is_open:
            return []
        last = first_index + len(src_ids)
        if last > len(self._block_ids) or seen[first_index:last].any() or leg.aux is not None:
            return self.abort(f"the peer announced blocks {first_index} to {last} out of turn", leg.name)
        if src_ids.size and int(src_ids.max()) >= leg.src_num_blocks:
            return self.abort(f"the peer announced block {int(src_ids.max())}, outside its pool", leg.name)
        seen[first_index:last] = True
        leg.num_announced += len(src_ids)
        if leg.plan.width == 0:
            return self.fetched(token, len(src_ids))
        return [Fetch(leg.peer, token, src_ids, self._block_ids[first_index:last])]

    def end(self, token: Token, aux: bytes) -> list[Effect]:
        """A source rank has announced all it will."""
        leg = self.legs[token]
        if not self.is_open:
            return []
        if leg.aux is not None or leg.num_announced != len(self._block_ids):
            missing = len(self._block_ids) - leg.num_announced
            return self.abort(f"the peer ended the transfer with {missing} blocks missing", leg.name)
        leg.aux = aux
        return self._check_applied(leg)

    def fetched(self, token: Token, num_blocks: int) -> list[Effect]:
        """Blocks of a leg are in the pool."""
        leg = self.legs[token]
        leg.num_fetched += num_blocks
        return self._check_applied(leg) if self.is_open else []

    def confirmed(self, token: Token, now: float) -> list[Effect]:
        """A source rank says that what we applied was true."""
        leg = self.legs[token]
        if not self.is_open:
            return []
        if not leg.applied:
            return self.abort("the peer confirmed what was not applied", leg.name)
        leg.confirmed = True
        legs = sorted(self.legs.values(), key=lambda x: x.plan.src_rank)
        if not all(x.confirmed for x in legs):
            return []
        stats = TransferStats(
            num_bytes=len(self._block_ids) * sum(x.plan.bytes_per_block for x in legs),
            seconds=now - self._opened,
            lane="+".join(sorted({x.lane for x in legs})),
            num_blocks=len(self._block_ids),
        )
        aux = next((x.aux for x in legs if x.aux), b"")
        return [Report(Received(self.transfer_id, aux, stats))]

    def abort(self, reason: str, peer: str) -> list[Effect]:
        """Give up. Idempotent: the first reason stands."""
        if not self.is_open:
            return []
        reason = printable(reason)
        self._failure = TransferFailed(self.transfer_id, reason, peer)
        effects: list[Effect] = []
        for leg in self.legs.values():
            if not leg.reserved:
                # The source knows nothing of us yet, and would wait for us until its deadline.
                leg.reserved = True
                effects.append(Tell(leg.peer, self._reservation(leg, int(self._deadline_s * 1000))))
            effects += [Tell(leg.peer, Abort(leg.token, reason)), Cancel(leg.peer, leg.token)]
        return effects

    def cancelled(self, token: Token) -> list[Effect]:
        """Nothing writes for a leg any more."""
        leg = self.legs[token]
        if self._failure is None or leg.cancelled:
            return []
        leg.cancelled = True
        effects: list[Effect] = [Tell(leg.peer, Drained(token))]
        if all(x.cancelled for x in self.legs.values()):
            effects.append(Report(self._failure))
        return effects

    def tick(self, now: float) -> list[Effect]:
        """Look at the clock."""
        if not self.is_open or now < self._deadline:
            return []
        waiting = sorted(leg.name for leg in self.legs.values() if not leg.confirmed)
        return self.abort(f"the deadline of {self._deadline_s:g} s has passed", ", ".join(waiting))

    def _reservation(self, leg: Leg, left_ms: int) -> Reserve:
        return Reserve(leg.token, self.transfer_id, len(self._block_ids), leg.lane, left_ms)

    def _check_applied(self, leg: Leg) -> list[Effect]:
        if leg.aux is None or leg.applied or leg.num_fetched != len(self._block_ids):
            return []
        leg.applied = True
        return [Tell(leg.peer, Applied(leg.token))]
