"""Which blocks of this rank's pool a peer may fetch just now: the one table that messenger and transports share."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kv_transfer.plan import IntArray, PairPlan
from kv_transfer.views import BlockView


@dataclass(frozen=True, slots=True)
class Lease:
    """What one receiver of one transfer may fetch.

    Attributes:
        session: data token of the connection that the receiver was introduced on.
        view: of our pool by the plan; for the one thread of a transport that serves this session.
        allowed: [num_blocks] of the source's pool.
    """

    session: bytes
    plan: PairPlan
    view: BlockView
    allowed: npt.NDArray[np.bool_]


class LeaseTable:
    """Thread-safe. The messenger grants, allows and ends; transports that serve fetches ask."""

    def __init__(self, num_blocks: int) -> None:
        """``num_blocks`` of the source's pool."""
        self._num_blocks = num_blocks
        self._lock = threading.Lock()
        self._leases: dict[bytes, Lease] = {}
        self._sessions: set[bytes] = set()

    def admit(self, session: bytes) -> None:
        """Data connections may present this token from now on."""
        with self._lock:
            self._sessions.add(session)

    def dismiss(self, session: bytes) -> None:
        """They may not any more."""
        with self._lock:
            self._sessions.discard(session)

    def knows(self, session: bytes) -> bool:
        with self._lock:
            return session in self._sessions

    def grant(self, token: bytes, session: bytes, plan: PairPlan, view: BlockView) -> None:
        """A receiver has reserved; it may fetch nothing yet."""
        with self._lock:
            self._leases[token] = Lease(session, plan, view, np.zeros(self._num_blocks, np.bool_))

    def allow(self, token: bytes, block_ids: IntArray) -> None:
        """Add blocks to what ``token`` may fetch; ids are of this pool."""
        with self._lock:
            lease = self._leases.get(token)
            if lease is not None:
                lease.allowed[block_ids] = True

    def end(self, token: bytes) -> None:
        """``token`` may fetch nothing any more; idempotent. A fetch that was let through before may still run."""
        with self._lock:
            self._leases.pop(token, None)

    def find(self, token: bytes, session: bytes, unit_ids: IntArray) -> Lease | None:
        """The lease by which a connection of ``session`` may fetch these units now; None when it may not."""
        with self._lock:
            lease = self._leases.get(token)
            if lease is None or lease.session != session:
                return None
            block_ids = unit_ids if lease.plan.src_units == 1 else unit_ids // lease.plan.src_units
            if block_ids.size and int(block_ids.max()) >= self._num_blocks:
                return None
            return lease if bool(lease.allowed[block_ids].all()) else None
