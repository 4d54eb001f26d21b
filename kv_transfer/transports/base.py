"""What a transport is: one way for a destination to fetch blocks out of a source's pool.

One object a messenger serves both directions. The messenger decides what is fetched and when; a transport moves
bytes, in threads of its own or none, and says what has become of them by posting events. Fetching is the same for
shared memory, for a stream (the source serves requests), for one-sided reads and for writes that the destination has
asked for, so a transport has no say in the life of a transfer.

A transport is a class under the entry point group ``kv_transfer.transports``. The suite in
``tests/integration/test_kv_conformance.py`` runs on every one that is registered.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from kv_transfer.endpoint import Offer, RankEndpoint
from kv_transfer.leases import LeaseTable
from kv_transfer.options import TransferOptions
from kv_transfer.plan import IntArray, PairPlan
from kv_transfer.pool import BlockPool
from kv_transfer.reactor import Reactor


class Link(ABC):
    """A destination's way to fetch from one source rank. Methods never wait, and are called one at a time.

    Attributes:
        num_descriptors: contiguous stretches that were moved one by one so far, where a transport counts them.
    """

    num_descriptors = 0

    @abstractmethod
    def fetch(self, chunk_id: int, token: bytes, src_ids: IntArray, dst_ids: IntArray) -> None:
        """Start copying units ``src_ids`` of the source's pool into ``dst_ids`` of ours.

        ``Fetched`` follows when every byte is in the pool, unless ``token`` is cancelled or the link goes down first.

        Args:
            chunk_id: given back in ``Fetched``.
            token: of the transfer; the source allows it the blocks that these are units of.
            src_ids, dst_ids: [num_units], at most the transport's ``chunk_bytes`` or one unit.
        """

    @abstractmethod
    def cancel(self, token: bytes) -> None:
        """Stop writing for ``token``. ``Cancelled`` follows, also when nothing was under way, and within moments:
        it must not wait for the peer. No ``Fetched`` for the token comes after it."""

    @abstractmethod
    def close(self) -> None:
        """Stop and let go of everything; idempotent. ``LinkDown`` follows, unless it was posted before."""


@dataclass(frozen=True, slots=True)
class LinkUp:
    """The link reaches its peer: fetches will be carried out."""

    link: Link


@dataclass(frozen=True, slots=True)
class LinkDown:
    """The link is of no more use, and nothing of it writes to our pool. The last event of a link."""

    link: Link
    reason: str


@dataclass(frozen=True, slots=True)
class Fetched:
    link: Link
    chunk_id: int


@dataclass(frozen=True, slots=True)
class Refusal:
    """The source does not allow a chunk that was asked for; nothing was written for it."""

    link: Link
    token: bytes
    reason: str


@dataclass(frozen=True, slots=True)
class Cancelled:
    """Nothing of this link writes for ``token`` any more."""

    link: Link
    token: bytes


@dataclass(frozen=True, slots=True)
class Revoked:
    """No transport of ours reads our pool for ``token`` any more."""

    transport: Transport
    token: bytes


LaneEvent = LinkUp | LinkDown | Fetched | Refusal | Cancelled | Revoked
Post = Callable[[LaneEvent], None]


class Transport(ABC):
    """Both directions of one way to move blocks, for one messenger. Its methods are called one at a time.

    Attributes:
        name: as in TransferOptions.protocols and in the entry point.
        crosses_hosts: whether it is expected to reach peers on other hosts.
    """

    name: ClassVar[str]
    crosses_hosts: ClassVar[bool] = True

    def __init__(self, pool: BlockPool, options: TransferOptions, leases: LeaseTable, post: Post) -> None:
        """Takes hold of nothing yet.

        Args:
            leases: what peers may fetch from ``pool``.
            post: takes an event, from any thread.
        """
        self.pool = pool
        self.options = options
        self.leases = leases
        self.post = post

    def attach(self, reactor: Reactor) -> None:
        """Get to know the messenger's own loop, for transports that have sockets. Called once, before ``offer``."""

    @classmethod
    def preflight(cls, options: TransferOptions) -> None:
        """Whether this host can have it at all, as far as can be told before there is a pool. Leaves nothing behind.

        Raises:
            TransportFailed: it cannot; says what to do.
        """

    @property
    def chunk_bytes(self) -> int:
        """What one ``fetch`` is asked for at most, but for a unit that is larger."""
        return self.options.chunk_bytes

    @abstractmethod
    def offer(self) -> Offer:
        """Begin to serve; what a destination must know, for the rank's endpoint. Called once.

        Raises:
            PoolNotServed: this pool cannot be fetched from this way; into it can, and the transport stays in use.
            TransportFailed: this host cannot serve it.
        """

    @abstractmethod
    def obstacle(self, peer: RankEndpoint) -> str | None:
        """Why this transport cannot reach a peer that offers it, as far as can be told without trying; or None."""

    @abstractmethod
    def open_link(self, peer: RankEndpoint, data_token: bytes, plan: PairPlan) -> Link:
        """Begin to reach a peer; LinkUp or LinkDown follows.

        Args:
            data_token: what the peer's side of this transport knows our messenger by.
        """

    def revoke(self, token: bytes) -> None:
        """Stop serving fetches for a token whose lease has ended; ``Revoked`` follows, without waiting for a peer."""
        self.post(Revoked(self, token))

    def hang_up(self, data_token: bytes) -> None:
        """A peer is gone or unwelcome: close what it has opened here."""

    def counters(self) -> Mapping[str, int]:
        """Plain counts since the start; from any thread."""
        return {}

    @abstractmethod
    def close(self) -> None:
        """Stop serving, close all links, end threads in bounded time. Idempotent; nothing is posted after it."""
