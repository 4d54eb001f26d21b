"""What a messenger reports about its transfers. Each transfer ends with exactly one of these on either side."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TransferStats:
    """What one rank's part of a transfer took.

    Attributes:
        num_bytes: KV bytes that moved from or to this rank.
        seconds: from opening to the end, waiting for the peer and its prefill included.
        lane: the transport that carried it; several are joined by ``+``.
        num_blocks: blocks of this rank's pool.
    """

    num_bytes: int
    seconds: float
    lane: str
    num_blocks: int


@dataclass(frozen=True, slots=True)
class Sent:
    """Every receiver holds everything, and has said so: the source's blocks may be freed."""

    transfer_id: str
    stats: TransferStats


@dataclass(frozen=True, slots=True)
class Received:
    """All bytes, from all source ranks, are in the local pool.

    Attributes:
        aux: what the source gave to ``finish_send``; with several source ranks, the lowest one's that is not empty.
    """

    transfer_id: str
    aux: bytes
    stats: TransferStats


@dataclass(frozen=True, slots=True)
class TransferFailed:
    """The transfer ended without its bytes; nothing writes (destination) or reads (source) its blocks any more.

    Attributes:
        peer: who was at the other end, as far as it is known; else empty.
    """

    transfer_id: str
    reason: str
    peer: str


TransferEvent = Sent | Received | TransferFailed
