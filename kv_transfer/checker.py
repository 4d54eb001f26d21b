"""The thread of a messenger that hashes blocks: those that it offers, and those that it has fetched."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from kv_transfer.checksums import LayerSums, Mismatch, Sums
from kv_transfer.fetch_queue import Chunk
from kv_transfer.plan import IntArray, units_of

_CLOSE_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Signed:
    """Blocks of ours are hashed as they are now, for one receiver.

    Attributes:
        sums: [num_units, layers of the plan]; None when there was no memory for it.
    """

    token: bytes
    first_index: int
    block_ids: IntArray
    sums: Sums | None


@dataclass(frozen=True, slots=True)
class Checked:
    """A chunk that was fetched is compared.

    Attributes:
        problem: what is wrong with it; None for nothing.
    """

    chunk: Chunk
    problem: Mismatch | str | None


CheckEvent = Signed | Checked


class Checker:
    """Does what it is given, in order. Its thread begins with the first of it."""

    def __init__(self, post: Callable[[CheckEvent], None]) -> None:
        """``post`` takes an event, in the checker's thread."""
        self._post = post
        self._work: deque[Callable[[], CheckEvent]] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread: threading.Thread | None = None

    def sign(self, sums: LayerSums, units_per_block: int, token: bytes, first_index: int, block_ids: IntArray) -> None:
        """``Signed`` follows."""

        def work() -> CheckEvent:
            try:
                found = sums.of(units_of(block_ids, units_per_block))
            except MemoryError:
                return Signed(token, first_index, block_ids, None)
            return Signed(token, first_index, block_ids, found)

        self._submit(work)

    def check(self, sums: LayerSums, chunk: Chunk, wanted: Sums) -> None:
        """``Checked`` follows."""

        def work() -> CheckEvent:
            try:
                return Checked(chunk, sums.compare(chunk.src_ids, chunk.dst_ids, wanted))
            except MemoryError:
                return Checked(chunk, "out of memory")

        self._submit(work)

    def close(self) -> None:
        """Finish what is being hashed, drop the rest; nothing is posted after it. Idempotent."""
        with self._changed:
            self._closing = True
            self._work.clear()
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(_CLOSE_TIMEOUT_S)

    def _submit(self, work: Callable[[], CheckEvent]) -> None:
        with self._changed:
            self._work.append(work)
            self._changed.notify()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="kv-checksum", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._work:
                    if self._closing:
                        return
                    self._changed.wait()
                work = self._work.popleft()
            event = work()
            with self._changed:
                if self._closing:
                    return
            self._post(event)
