"""The two sides on which an engine meets this package.

``EngineDriver`` is for engines that compute when they are told to: the runner calls them. ``KVPort`` is for engines
whose own loop decides what runs when: that loop calls us, and only KV moves through it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from kv_transfer.endpoint import RankEndpoint
from kv_transfer.layout import KVLayout
from kv_transfer.pool import BlockPool
from splitwise_sched.types import FinishReason, Request, TokenLogprob


class Mode(Enum):
    """How far a submitted request runs here."""

    PREFILL = "prefill"
    FULL = "full"


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """Constants of a running engine.

    Attributes:
        model: the name that requests ask for.
        max_model_len: prompt and output tokens together, at most.
        num_blocks: blocks of the pool that requests may use.
        max_num_seqs: sequences in one forward pass, at most.
    """

    model: str
    max_model_len: int
    num_blocks: int
    block_size: int
    max_num_seqs: int
    vocab_size: int


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What an engine holds at this moment; goes into its lease record."""

    num_running: int
    num_waiting: int
    num_free_blocks: int
    num_preempted_total: int


@dataclass(frozen=True, slots=True)
class BlocksReady:
    """KV of these blocks is complete in the pool: blocks ``first_index`` onward of the request's block table.

    A partly filled block is reported once, with ``is_last``, when the whole prompt is computed.
    """

    key: str
    first_index: int
    block_ids: tuple[int, ...]
    is_last: bool


@dataclass(frozen=True, slots=True)
class TokensOut:
    """Output tokens of one request. After ``finish_reason`` is set, the engine has forgotten the request, except that
    a PREFILL run holds its blocks until ``release``.

    Attributes:
        index: output position of ``token_ids[0]``; counts the request's ``emitted_token_ids``.
        finish_reason: in a PREFILL run None means: go on elsewhere.
    """

    key: str
    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    detail: str | None = None


EngineEvent = BlocksReady | TokensOut


class EngineDriver(ABC):
    """A self-contained engine that computes when, and only when, ``step`` is called.

    Life of a request on a prefill instance: ``submit(PREFILL)`` → steps yield ``BlocksReady`` as chunks finish, then
    ``TokensOut`` with the first token → the blocks stay until ``release``. On a decode instance: ``reserve`` → KV is
    written into the blocks from outside → ``commit`` with the first token → steps yield ``TokensOut`` to the end. On
    a mixed instance that keeps a request: ``submit(FULL)``.

    Every method is called from one thread, does no I/O and waits for nothing. ``key`` names one run of one request
    (the runner puts request id and epoch into it); engines treat it as opaque.
    """

    @property
    @abstractmethod
    def spec(self) -> EngineSpec: ...

    @property
    @abstractmethod
    def kv_layout(self) -> KVLayout: ...

    @property
    @abstractmethod
    def kv_pools(self) -> Sequence[BlockPool]:
        """One pool a TP rank, in rank order, registered with that rank's messenger; they live until ``close``."""

    @abstractmethod
    def check(self, request: Request) -> None:
        """Raises InvalidRequest when this engine can never run ``request`` (too long for model or pool)."""

    @abstractmethod
    def submit(self, key: str, request: Request, mode: Mode) -> None:
        """Queue a request; blocks are allocated as its chunks are scheduled."""

    @abstractmethod
    def reserve(self, key: str, request: Request) -> tuple[int, ...] | None:
        """Allocate blocks for the KV of the request's ``num_input_tokens``, and room for one more token.

        Returns:
            Ids of the ``ceil(num_input_tokens / block_size)`` blocks that KV is to be written into, in block-table
            order, with ``NOT_WANTED`` in the place of those that are cached here; or None when there is no room now
            (nothing is allocated; ask again after a later step).
        """

    @abstractmethod
    def commit(self, key: str, first: TokensOut) -> None:
        """The reserved blocks hold the KV: decode on from ``first``, whose token is not yet in the KV.

        Raises:
            KVRejected: what came is not KV of this request. The run is as it was; ``abort`` follows.
        """

    @abstractmethod
    def release(self, key: str) -> None:
        """Free the blocks of a PREFILL run. Idempotent."""

    @abstractmethod
    def abort(self, key: str) -> None:
        """Forget the request, whatever its state, and free its blocks. Idempotent.

        The caller makes sure that no transfer reads or writes the blocks any more.
        """

    @abstractmethod
    def has_work(self) -> bool:
        """Whether ``step`` would compute anything."""

    @abstractmethod
    def step(self) -> list[EngineEvent]:
        """Run one forward pass over what is scheduled; returns what came of it."""

    @abstractmethod
    def load(self) -> EngineLoad: ...

    @abstractmethod
    def close(self) -> None:
        """Free the pools; nothing may be using them."""


@dataclass(frozen=True, slots=True)
class Released:
    """Nobody reads the blocks of a prefill run any more.

    Attributes:
        failure: why decode does not have them; None when it does.
    """

    key: str
    failure: str | None = None


@dataclass(frozen=True, slots=True)
class Loaded:
    """All KV of a decode run is in its blocks.

    Attributes:
        aux: what prefill gave to ``on_prefill_done``.
    """

    key: str
    aux: bytes


@dataclass(frozen=True, slots=True)
class Rejected:
    """The KV of a decode run will not come, and nothing writes its blocks any more: compute it here, or fail."""

    key: str
    reason: str


PortEvent = Released | Loaded | Rejected


class KVPort(ABC):
    """One TP rank's way to move KV, for an engine that drives itself.

    Prefill: ``hold`` before its first chunk → ``on_blocks`` as chunks finish → ``on_prefill_done`` → ``Released``.
    Decode: ``reserve`` once blocks are allocated, which may be before or after the ``hold`` → ``Loaded`` or
    ``Rejected``. A run has exactly one event on either side; until the engine has polled it, the blocks are not to be
    reused. ``abort`` brings that event about.

    Every method only enqueues, and is called from one thread, which may be that of the forward pass. What a peer does,
    or fails to do, comes as an event and never as an exception; calls for runs that have ended do nothing.
    """

    @property
    @abstractmethod
    def endpoint(self) -> RankEndpoint:
        """For the lease record, from which peers get their ``source``."""

    @abstractmethod
    def hold(self, key: str, *, num_blocks: int, deadline_s: float) -> None:
        """A prefill run of so many blocks begins, to be fetched within ``deadline_s`` from now."""

    @abstractmethod
    def on_blocks(self, key: str, first_index: int, block_ids: Sequence[int]) -> None:
        """Blocks ``first_index`` onward of its block table are complete in the pool."""

    @abstractmethod
    def on_prefill_done(self, key: str, aux: bytes) -> None:
        """All its blocks were given; ``aux`` (first token, logprobs) travels with the last."""

    @abstractmethod
    def reserve(self, key: str, source: Sequence[RankEndpoint], block_ids: Sequence[int], *, deadline_s: float) -> None:
        """Fetch a run's KV into ``block_ids`` as it gets ready on ``source``, all ranks of the prefill instance."""

    @abstractmethod
    def abort(self, key: str, reason: str) -> None:
        """Give a run up, whichever side of it is here."""

    @abstractmethod
    def poll(self) -> list[PortEvent]:
        """Events since the last call."""

    @abstractmethod
    def close(self) -> None:
        """Stop moving; the pool may be freed after it. Idempotent."""
