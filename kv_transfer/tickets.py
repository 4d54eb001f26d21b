"""What the caller may ask of a messenger: checked where the caller is, so that a bug of his shows in his own stack."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from kv_transfer.errors import InvalidTransfer
from kv_transfer.plan import IntArray
from kv_transfer.protocol import MAX_BLOCKS_PER_TRANSFER, MAX_DEADLINE_MS, MAX_TRANSFER_ID_CHARS

# Stands for a block that the destination has already, in its list of block ids.
NOT_WANTED = -1


class SendTicket:
    """What a source has said about one transfer so far."""

    def __init__(self, transfer_id: str, num_blocks: int) -> None:
        if not 1 <= num_blocks <= MAX_BLOCKS_PER_TRANSFER:
            raise InvalidTransfer(transfer_id, f"{num_blocks} blocks; it must be 1 to {MAX_BLOCKS_PER_TRANSFER}")
        self.transfer_id = transfer_id
        self._given = np.zeros(num_blocks, np.bool_)
        self._finished = False

    def take(self, first_index: int, block_ids: Sequence[int], num_pool_blocks: int) -> IntArray:
        """Note that blocks are given; their ids, checked."""
        ids = _checked_ids(self.transfer_id, block_ids, num_pool_blocks)
        last = first_index + len(ids)
        if not 0 <= first_index < last <= len(self._given):
            raise InvalidTransfer(
                self.transfer_id, f"blocks {first_index} to {last} of a transfer of {len(self._given)} blocks"
            )
        if self._finished or self._given[first_index:last].any():
            raise InvalidTransfer(self.transfer_id, f"blocks {first_index} to {last} were given before")
        self._given[first_index:last] = True
        return ids

    def finish(self) -> None:
        missing = int(len(self._given) - self._given.sum())
        if missing or self._finished:
            raise InvalidTransfer(
                self.transfer_id, f"finished with {missing} blocks missing" if missing else "finished twice"
            )
        self._finished = True


class ReceiveTicket:
    """Where a destination wants one transfer's blocks."""

    def __init__(self, transfer_id: str, block_ids: Sequence[int], num_pool_blocks: int) -> None:
        self.transfer_id = transfer_id
        self.block_ids = _checked_ids(transfer_id, block_ids, num_pool_blocks, least=NOT_WANTED)
        wanted = self.block_ids[self.block_ids != NOT_WANTED]
        if len(self.block_ids) > MAX_BLOCKS_PER_TRANSFER or _has_repeats(wanted):
            raise InvalidTransfer(transfer_id, "a block is named twice, or there are too many")


class TicketBook:
    """Transfers from their opening until their event was polled. Thread-safe."""

    def __init__(self, limit: int) -> None:
        """``limit`` is of open transfers, each way."""
        self._limit = limit
        self._lock = threading.Lock()
        self._sends: dict[str, SendTicket] = {}
        self._receives: dict[str, ReceiveTicket] = {}

    def __len__(self) -> int:
        with self._lock:
            return len(self._sends) + len(self._receives)

    def open_send(self, ticket: SendTicket, deadline_s: float) -> None:
        with self._lock:
            self._check_new(ticket.transfer_id, self._sends, deadline_s)
            self._sends[ticket.transfer_id] = ticket

    def open_receive(self, ticket: ReceiveTicket, deadline_s: float) -> None:
        with self._lock:
            self._check_new(ticket.transfer_id, self._receives, deadline_s)
            self._receives[ticket.transfer_id] = ticket

    def send(self, transfer_id: str) -> SendTicket:
        with self._lock:
            ticket = self._sends.get(transfer_id)
        if ticket is None:
            raise InvalidTransfer(transfer_id, "not open for sending: open_send comes first, and nothing after its end")
        return ticket

    def close(self, transfer_id: str) -> None:
        """The caller learns of a transfer's end."""
        with self._lock:
            self._sends.pop(transfer_id, None)
            self._receives.pop(transfer_id, None)

    def open_ids(self) -> list[str]:
        with self._lock:
            return [*self._sends, *self._receives]

    def _check_new(
        self, transfer_id: str, book: dict[str, SendTicket] | dict[str, ReceiveTicket], deadline_s: float
    ) -> None:
        if not 1 <= len(transfer_id) <= MAX_TRANSFER_ID_CHARS or not transfer_id.isprintable():
            raise InvalidTransfer(transfer_id, f"an id has 1 to {MAX_TRANSFER_ID_CHARS} printable characters")
        if not 0 < deadline_s <= MAX_DEADLINE_MS / 1000:
            raise InvalidTransfer(transfer_id, f"a deadline of {deadline_s:g} s; it must be above 0, and a day at most")
        if transfer_id in self._sends or transfer_id in self._receives:
            raise InvalidTransfer(transfer_id, "opened before, and its end was not polled yet")
        if len(book) >= self._limit:
            raise InvalidTransfer(transfer_id, f"{self._limit} transfers are open already (max_inflight)")


def _checked_ids(transfer_id: str, block_ids: Sequence[int], num_pool_blocks: int, *, least: int = 0) -> IntArray:
    ids = np.array(block_ids, dtype=np.int64)
    if ids.ndim != 1 or not ids.size:
        raise InvalidTransfer(transfer_id, "no blocks")
    if int(ids.min()) < least or int(ids.max()) >= num_pool_blocks:
        raise InvalidTransfer(
            transfer_id, f"block ids from {ids.min()} to {ids.max()} in a pool of {num_pool_blocks} blocks"
        )
    return ids


def _has_repeats(ids: IntArray) -> bool:
    if len(ids) < 2:
        return False
    ordered = np.sort(ids)
    return bool((ordered[1:] == ordered[:-1]).any())
