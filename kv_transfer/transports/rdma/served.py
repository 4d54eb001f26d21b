"""The source's queue pairs to one destination, for as long as their connection lasts. In the loop's thread."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from kv_transfer.transports.rdma.device import Device
from kv_transfer.transports.rdma.queue_pair import Access, QueuePair


class PairsFailed(Exception):
    """Queue pairs are closed, and the destination is to be told why: a byte, as ``queue_pair.explain`` knows it."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Served(ABC):
    """Owns its queue pairs.

    Attributes:
        allowed: to the destination.
        pairs: in the order in which the destination has asked for them.
    """

    allowed = Access.NONE

    def __init__(self, device: Device, count: Callable[[str, int], None]) -> None:
        """``count`` takes the name of a counter and what to add."""
        self.device, self._count = device, count
        self.pairs: list[QueuePair] = []

    def make_pairs(self, number: int, queue: Any, *, depth: int, max_pieces: int) -> None:
        """Raises the verbs' error; ``close`` is still to be called."""
        for _ in range(number):
            self.pairs.append(QueuePair(self.device, queue, depth=depth, max_pieces=max_pieces))
            self._count("queue_pairs_made", 1)

    @abstractmethod
    async def serve(self, reader: asyncio.StreamReader) -> None:
        """Until the destination hangs up. Raises PairsFailed."""

    def revoke(self, token: bytes) -> None:
        """Begin nothing more for a transfer."""

    def is_reading(self, token: bytes) -> bool:
        """Whether our device reads the pool for a transfer."""
        return False

    def give_up(self) -> None:
        """Destroy the queue pairs, as something on them does not end."""
        self.close()

    def close(self) -> None:
        """From the return on our device does nothing for the destination. Idempotent."""
        for pair in self.pairs:
            self.closed(pair.close)
            self._count("queue_pairs_closed", 1)
        self.pairs.clear()

    def closed(self, close: Callable[[], None]) -> None:
        try:
            close()
        except self.device.verbs.Error:
            # The device is gone, and has taken it along.
            pass


class Readable(Served):
    """Read mode: the destination's device reads, and nothing is done here."""

    allowed = Access.READ

    async def serve(self, reader: asyncio.StreamReader) -> None:
        # Nothing more is said; this is the peer's end, or its process's.
        await reader.read(1)
