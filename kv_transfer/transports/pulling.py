"""For transports over libraries that read a peer's memory: a thread a link, and staging that the library writes into.

What such a library has begun it may finish at any later time, as long as its peer lives. So it never writes into the
pool: it reads into staging memory of the link, and this process copies from there, unless the transfer was cancelled in
the meantime. A read that hangs on a peer that stands still costs its link, and nothing else.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kv_transfer.endpoint import Offer, RankEndpoint
from kv_transfer.errors import PoolNotServed, TransportFailed
from kv_transfer.leases import LeaseTable
from kv_transfer.options import TransferOptions
from kv_transfer.plan import IntArray, PairPlan
from kv_transfer.pool import BlockPool
from kv_transfer.transports.base import Cancelled, Fetched, Link, LinkDown, LinkUp, Post, Transport
from kv_transfer.views import BlockView, ByteArray, Iovecs, stretches

_JOIN_TIMEOUT_S = 2.0
# An offer is made of short texts.
_OFFER_PIECE_CHARS = 500
_MAX_OFFER_PIECES = 28


class Reader(ABC):
    """A way to read the memory of one peer. Belongs to one thread but for ``is_given_up``."""

    @abstractmethod
    def connect(self, staging: ByteArray) -> None:
        """Reach the peer, and make ``staging`` memory that can be read into. Raises TransportFailed."""

    @abstractmethod
    def read(self, local: Iovecs, remote: Iovecs, is_given_up: Callable[[], bool]) -> bool:
        """Read stretches of the peer's memory into staging; false when it was given up in the middle.

        Raises:
            TransportFailed: the peer cannot be read any more.
        """

    @abstractmethod
    def close(self, *, is_clean: bool) -> None:
        """Let go of the peer. When it is not clean, a read may be under way, and staging must stay."""


@dataclass(frozen=True, slots=True)
class _Chunk:
    chunk_id: int
    token: bytes
    src_ids: IntArray
    dst_ids: IntArray


class PullLink(Link):
    def __init__(
        self,
        reader: Reader,
        post: Post,
        *,
        target: BlockView,
        plan: PairPlan,
        peer: RankEndpoint,
        bases: Sequence[int],
        chunk_bytes: int,
    ) -> None:
        """
        Args:
            bases: where the regions of the peer's pool begin, there.
        """
        self._reader, self._post, self._target, self._plan = reader, post, target, plan
        self._bases = bases
        self._staging = np.zeros(max(chunk_bytes, target.unit_bytes, 1), np.uint8)
        self._chunks: deque[_Chunk] = deque()
        self._changed = threading.Condition()
        # Of the chunk that is being moved: its transfer, whether that still wants it, whether it is being written.
        self._current, self._is_wanted, self._is_writing = b"", False, False
        self._is_closed = False
        self.is_down = False
        self._thread = threading.Thread(target=self._run, name=f"kv-pull-{peer.name}", daemon=True)
        self._thread.start()

    def fetch(self, chunk_id: int, token: bytes, src_ids: IntArray, dst_ids: IntArray) -> None:
        with self._changed:
            self._chunks.append(_Chunk(chunk_id, token, src_ids, dst_ids))
            self._changed.notify()

    def cancel(self, token: bytes) -> None:
        with self._changed:
            self._chunks = deque(chunk for chunk in self._chunks if chunk.token != token)
            if self._current == token:
                self._is_wanted = False
                if self._is_writing:
                    # Whoever writes says so in a moment.
                    return
            if self.is_down:
                return
        self._post(Cancelled(self, token))

    def close(self) -> None:
        with self._changed:
            if self._is_closed:
                return
            self._is_closed = True
            self._chunks.clear()
            self._changed.notify()
            if self._is_writing:
                return
        self._down("closed")

    def join(self) -> None:
        """Wait a little for its thread; one that hangs in a library stays behind, and writes nothing of ours."""
        self._thread.join(_JOIN_TIMEOUT_S)

    def _down(self, reason: str) -> None:
        with self._changed:
            if self.is_down:
                return
            self.is_down = self._is_closed = True
        self._post(LinkDown(self, reason))

    def _run(self) -> None:
        reason, is_clean = "closed", True
        try:
            self._reader.connect(self._staging)
            self._post(LinkUp(self))
            while (chunk := self._next()) is not None:
                is_clean = False
                local, remote = self._addresses(chunk)
                self.num_descriptors += len(remote)
                is_clean = self._reader.read(local, remote, lambda: self._is_closed)
                if not is_clean:
                    break
                self._write(chunk)
        except TransportFailed as exc:
            reason = str(exc)
        finally:
            self._down(reason)
            self._reader.close(is_clean=is_clean)

    def _next(self) -> _Chunk | None:
        with self._changed:
            while not self._chunks and not self._is_closed:
                self._changed.wait()
            if self._is_closed:
                return None
            chunk = self._chunks.popleft()
            self._current, self._is_wanted = chunk.token, True
            return chunk

    def _addresses(self, chunk: _Chunk) -> tuple[Iovecs, Iovecs]:
        """Where the chunk goes in staging, and where it lies at the peer; stretch by stretch."""
        found = []
        for part in self._plan.parts:
            side, units = part.src, self._plan.src_units
            blocks, within = np.divmod(chunk.src_ids, units)
            starts = self._bases[side.region] + side.offset + blocks * side.block_stride + within * side.unit_stride
            found.append(stretches(starts, part.shape, side.strides))
        remote = np.concatenate(found)
        local = remote.copy()
        local[:, 0] = self._staging.ctypes.data + np.cumsum(remote[:, 1], dtype=np.uint64) - remote[:, 1]
        return local, remote

    def _write(self, chunk: _Chunk) -> None:
        """Copy a chunk out of staging, unless nobody wants it any more."""
        with self._changed:
            if self._is_closed or not self._is_wanted:
                return
            self._is_writing = True
        self._target.scatter(chunk.dst_ids, self._staging[: len(chunk.dst_ids) * self._target.unit_bytes])
        with self._changed:
            self._is_writing, self._current = False, b""
            if self._is_closed:
                return
            is_wanted = self._is_wanted
        self._post(Fetched(self, chunk.chunk_id) if is_wanted else Cancelled(self, chunk.token))


class PullTransport(Transport):
    """Keeps its links; whoever fetches has a reader a link."""

    def __init__(self, pool: BlockPool, options: TransferOptions, leases: LeaseTable, post: Post) -> None:
        super().__init__(pool, options, leases, post)
        self._links: list[PullLink] = []

    @abstractmethod
    def reader(self, peer: RankEndpoint) -> Reader:
        """A way to read the memory of a peer that has no obstacle; begins nothing yet."""

    def open_link(self, peer: RankEndpoint, data_token: bytes, plan: PairPlan) -> Link:
        link = PullLink(
            self.reader(peer),
            self.post,
            target=self.pool.view(plan, "dst"),
            plan=plan,
            peer=peer,
            bases=region_bases(peer.transports[self.name], peer),
            chunk_bytes=self.options.chunk_bytes,
        )
        self._links = [x for x in self._links if not x.is_down] + [link]
        return link

    def close(self) -> None:
        for link in self._links:
            link.close()
        for link in self._links:
            link.join()
        self._links.clear()


def region_offer(pool: BlockPool) -> Offer:
    """Where the pool's regions begin in this process.

    Raises:
        PoolNotServed: it is not in host memory.
    """
    if not pool.memory or any(region.device != "cpu" for region in pool.memory):
        raise PoolNotServed("the pool is not in host memory")
    return split_text("at", ",".join(f"{region.address:x}" for region in pool.memory))


def region_bases(offer: Mapping[str, str | int], peer: RankEndpoint) -> list[int]:
    """Read ``region_offer``; raises TransportFailed."""
    try:
        return [int(base, 16) for base in joined_text("at", offer).split(",")]
    except ValueError as exc:
        raise TransportFailed(f"the offer of {peer.describe()} does not say where its pool is") from exc


def split_text(name: str, text: str) -> dict[str, str | int]:
    """A text as fields of an offer, which are short."""
    pieces = [text[i : i + _OFFER_PIECE_CHARS] for i in range(0, len(text), _OFFER_PIECE_CHARS)]
    if len(pieces) > _MAX_OFFER_PIECES:
        raise TransportFailed(f"{len(text)} characters are too many for an offer ({name})")
    return {f"{name}{index}": piece for index, piece in enumerate(pieces)}


def joined_text(name: str, offer: Mapping[str, str | int]) -> str:
    """Undo ``split_text``."""
    text, index = "", 0
    while isinstance(piece := offer.get(f"{name}{index}"), str):
        text, index = text + piece, index + 1
    return text
