"""How a destination is connected to its sources, for people and for metrics."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LaneReport:
    """One source rank that is connected to. Counts are of this connection.

    Attributes:
        peer: for people.
        state: ``up``, or how far the connection is.
        lane: the transport in use; empty until one is.
        instead_of: the transport that should have been used and does not work; empty where there is none.
        num_transfers: under way.
        num_bytes, num_chunks: fetched.
        num_descriptors: contiguous stretches that the chunks were made of, as far as the transport tells.
        busy_s: time during which chunks were under way.
        waiting_chunks: that no room is left for, at least one a transfer.
    """

    peer: str
    state: str
    lane: str
    instead_of: str
    num_transfers: int
    num_bytes: int
    num_chunks: int
    num_descriptors: int
    busy_s: float
    under_way_chunks: int
    waiting_chunks: int
