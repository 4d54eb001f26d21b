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

from kv_transfer.checksums import NONE, SUM_BYTES, Mismatch, Sums
from kv_transfer.effects import Cancel, Effect, Fetch, PeerKey, Report, Tell, Token
from kv_transfer.events import Received, TransferFailed, TransferStats
from kv_transfer.plan import IntArray, PairPlan, hold_the_same, units_of
from kv_transfer.protocol import TOKEN_BYTES, Abort, Applied, Drained, Reserve, printable


@dataclass(slots=True)
class Leg:
    """One source rank's part.

    Attributes:
        src_num_blocks, src_block_size: of the source's pool.
        reserved: the source has been told of the transfer.
        num_announced: blocks of the source.
        num_wanted: units that were announced and are not left out.
    """

    peer: PeerKey
    name: str
    plan: PairPlan
    src_num_blocks: int
    src_block_size: int
    token: Token = field(default_factory=lambda: secrets.token_bytes(TOKEN_BYTES))
    lane: str = ""
    reserved: bool = False
    num_announced: int = 0
    num_wanted: int = 0
    num_fetched: int = 0
    aux: bytes | None = None
    applied: bool = False
    confirmed: bool = False
    cancelled: bool = False

    @property
    def num_bytes(self) -> int:
        """That were fetched."""
        return self.num_fetched * self.plan.unit_bytes


class ReceiveTransfer:
    """Every method returns what is to be done, in order; after a Report the machine is to be dropped."""

    def __init__(
        self,
        transfer_id: str,
        block_ids: IntArray,
        legs: Sequence[Leg],
        *,
        block_size: int,
        checksum: str = NONE,
        now: float,
        deadline_s: float,
    ) -> None:
        """``now`` is of the monotonic clock, here and in every method.

        Args:
            block_ids: of the destination's pool, [num_blocks]; negative ones are left out.
            block_size: of the destination's pool.
            checksum: that all bytes are to be checked by.
        """
        self.transfer_id = transfer_id
        self.legs = {leg.token: leg for leg in legs}
        self._block_ids, self._block_size, self._checksum = block_ids, block_size, checksum
        self._units = {leg.token: units_of(block_ids, leg.plan.dst_units) for leg in legs}
        self._has_gaps = bool((block_ids < 0).any())
        self._seen = {leg.token: np.zeros(self._most_blocks(leg), dtype=np.bool_) for leg in legs}
        self._opened = now
        self._deadline_s = deadline_s
        self._deadline = now + deadline_s
        self._failure: TransferFailed | None = None

    @property
    def is_open(self) -> bool:
        return self._failure is None

    @property
    def failure_reason(self) -> str:
        """Empty while it is open."""
        return "" if self._failure is None else self._failure.reason

    def ready(self, token: Token, lane: str, now: float) -> list[Effect]:
        """A source rank can be talked to, and reached by ``lane``."""
        leg = self.legs[token]
        if not self.is_open or leg.reserved:
            return []
        leg.reserved, leg.lane = True, lane
        left_ms = max(0, int((self._deadline - now) * 1000))
        return [Tell(leg.peer, self._reservation(leg, left_ms))]

    def blocks(self, token: Token, first_index: int, src_ids: IntArray, sums: bytes = b"") -> list[Effect]:
        """A source rank has completed blocks; ``sums`` as in ``Blocks``."""
        leg, seen = self.legs[token], self._seen[token]
        if not self.is_open:
            return []
        last = first_index + len(src_ids)
        if last > len(seen) or seen[first_index:last].any() or leg.aux is not None:
            return self.abort(f"the peer announced blocks {first_index} to {last} out of turn", leg.name)
        if src_ids.size and int(src_ids.max()) >= leg.src_num_blocks:
            return self.abort(f"the peer announced block {int(src_ids.max())}, outside its pool", leg.name)
        wanted_sums = self._read_sums(leg, len(src_ids), sums)
        if isinstance(wanted_sums, str):
            return self.abort(wanted_sums, leg.name)
        seen[first_index:last] = True
        leg.num_announced += len(src_ids)
        if leg.plan.is_empty:
            return []
        src_units = units_of(src_ids, leg.plan.src_units)
        first_unit = first_index * leg.plan.src_units
        dst_units = self._units[token][first_unit : first_unit + len(src_units)]
        # The last block of either side may reach further than the other's.
        src_units = src_units[: len(dst_units)]
        if self._has_gaps:
            wanted = dst_units >= 0
            src_units, dst_units = src_units[wanted], dst_units[wanted]
            wanted_sums = None if wanted_sums is None else wanted_sums[: len(wanted)][wanted]
        leg.num_wanted += len(dst_units)
        if not len(dst_units):
            return []
        if wanted_sums is not None:
            wanted_sums = wanted_sums[: len(dst_units)]
        return [Fetch(leg.peer, token, src_units, dst_units, wanted_sums)]

    def end(self, token: Token, aux: bytes) -> list[Effect]:
        """A source rank has announced all it will."""
        leg = self.legs[token]
        if not self.is_open:
            return []
        if (
            leg.aux is not None
            or not self._seen[token][: leg.num_announced].all()
            or not hold_the_same(leg.num_announced, leg.src_block_size, len(self._block_ids), self._block_size)
        ):
            return self.abort(
                f"the peer ended the transfer after {leg.num_announced} blocks, with some missing", leg.name
            )
        leg.aux = aux
        return self._check_applied(leg)

    def fetched(self, token: Token, num_units: int) -> list[Effect]:
        """Units of a leg are in the pool."""
        leg = self.legs[token]
        leg.num_fetched += num_units
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
            num_bytes=sum(x.num_bytes for x in legs),
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

    def mismatched(self, token: Token, mismatch: Mismatch, own_name: str) -> list[Effect]:
        """Bytes of a leg are in the pool, and are not those that the source has hashed."""
        leg = self.legs[token]
        return self.abort(
            f"checksum mismatch in layer {mismatch.layer}: block {mismatch.src_block} of {leg.name} did not arrive "
            f"as it was in block {mismatch.dst_block} of {own_name}",
            leg.name,
        )

    def _read_sums(self, leg: Leg, num_blocks: int, sums: bytes) -> Sums | str | None:
        """By unit and layer, or what is wrong with them."""
        num_layers = len(leg.plan.layers)
        num_units = num_blocks * leg.plan.src_units if self._checksum != NONE else 0
        if len(sums) != num_units * num_layers * SUM_BYTES:
            return f"the peer sent {len(sums)} bytes of checksums for {num_blocks} blocks"
        return np.frombuffer(sums, "<u8").reshape(num_units, num_layers) if sums else None

    def _reservation(self, leg: Leg, left_ms: int) -> Reserve:
        return Reserve(leg.token, self.transfer_id, len(self._block_ids), leg.lane, left_ms, self._checksum)

    def _check_applied(self, leg: Leg) -> list[Effect]:
        if leg.aux is None or leg.applied or leg.num_fetched != leg.num_wanted:
            return []
        leg.applied = True
        return [Tell(leg.peer, Applied(leg.token, leg.num_bytes))]

    def _most_blocks(self, leg: Leg) -> int:
        """Of the source, that all of the destination's blocks can come from."""
        return -(-len(self._block_ids) * self._block_size // leg.src_block_size)
