"""What the halves of a messenger, and their peers, work with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kv_transfer.checker import Checker
from kv_transfer.control import ControlChannel
from kv_transfer.counters import Counters
from kv_transfer.endpoint import RankEndpoint
from kv_transfer.events import TransferEvent
from kv_transfer.leases import LeaseTable
from kv_transfer.options import TransferOptions
from kv_transfer.pool import BlockPool
from kv_transfer.transports.base import Transport


@dataclass(frozen=True, slots=True)
class MessengerParts:
    """Owned by the messenger, but for the pool, which is its user's; used in its thread.

    Attributes:
        own: this rank, as its peers see it.
        transports: in order of preference.
        report: takes each transfer's one final event.
    """

    own: RankEndpoint
    pool: BlockPool
    options: TransferOptions
    control: ControlChannel
    leases: LeaseTable
    transports: tuple[Transport, ...]
    checker: Checker
    counters: Counters
    report: Callable[[TransferEvent], None]
