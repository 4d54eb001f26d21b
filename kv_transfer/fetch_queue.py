"""Which chunk is fetched next from one peer: transfers take turns, and only so many chunks are under way. Pure."""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass

from kv_transfer.checksums import Sums
from kv_transfer.effects import Token
from kv_transfer.plan import IntArray

Piece = tuple[IntArray, IntArray, "Sums | None"]


# A chunk is cut in so many when transfers take turns.
_HELPINGS = 4


@dataclass(frozen=True, slots=True)
class Chunk:
    """Units that one call of a transport fetches.

    Attributes:
        src_ids, dst_ids: of units, [num_units]
        sums: what they must hash to, [num_units, layers of the plan], or None.
    """

    chunk_id: int
    token: Token
    src_ids: IntArray
    dst_ids: IntArray
    sums: Sums | None = None


class FetchQueue:
    """What is waiting and what is under way, of all transfers with one peer."""

    def __init__(self, units_per_chunk: int, window_chunks: int) -> None:
        self._units_per_chunk = max(1, units_per_chunk)
        self._window = window_chunks
        self._waiting: OrderedDict[Token, deque[Piece]] = OrderedDict()
        self._under_way: dict[int, Chunk] = {}
        self._next_id = 0

    def resize(self, units_per_chunk: int) -> None:
        """From the next chunk on."""
        self._units_per_chunk = max(1, units_per_chunk)

    def add(self, token: Token, src_ids: IntArray, dst_ids: IntArray, sums: Sums | None = None) -> None:
        """Ask for units, after those that the transfer has asked for before."""
        self._waiting.setdefault(token, deque()).append((src_ids, dst_ids, sums))

    def next(self) -> Chunk | None:
        """A chunk to be fetched now, counted as under way from here on; None when there is none, or no room for it."""
        if len(self._under_way) >= self._window or not self._waiting:
            return None
        token, pieces = next(iter(self._waiting.items()))
        src_ids, dst_ids, sums = pieces.popleft()
        most = self._units_per_chunk
        if len(self._waiting) > 1:
            # In turn with others: smaller helpings, so that equal transfers that began together end together.
            most = max(1, most // _HELPINGS)
        if len(src_ids) > most:
            pieces.appendleft((src_ids[most:], dst_ids[most:], None if sums is None else sums[most:]))
            src_ids, dst_ids, sums = src_ids[:most], dst_ids[:most], None if sums is None else sums[:most]
        if pieces:
            self._waiting.move_to_end(token)
        else:
            del self._waiting[token]
        chunk = Chunk(self._next_id, token, src_ids, dst_ids, sums)
        self._under_way[chunk.chunk_id] = chunk
        self._next_id += 1
        return chunk

    def done(self, chunk_id: int) -> Chunk | None:
        """A chunk is here, and no longer under way; None when it was dropped."""
        return self._under_way.pop(chunk_id, None)

    @property
    def num_under_way(self) -> int:
        return len(self._under_way)

    @property
    def num_waiting(self) -> int:
        """Pieces that were asked for and are not under way; each is a chunk or more."""
        return sum(len(pieces) for pieces in self._waiting.values())

    def drop(self, token: Token) -> None:
        """Forget a transfer's chunks, whether waiting or under way."""
        self._waiting.pop(token, None)
        self._under_way = {k: v for k, v in self._under_way.items() if v.token != token}
