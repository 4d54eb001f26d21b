"""What the state machines of transfers want done. They decide; whoever runs them carries it out, in order."""

from __future__ import annotations

from dataclasses import dataclass

from kv_transfer.checksums import Sums
from kv_transfer.events import TransferEvent
from kv_transfer.plan import IntArray
from kv_transfer.protocol import Message

PeerKey = bytes
Token = bytes


@dataclass(frozen=True, slots=True)
class Tell:
    """Send a message to a peer, after all those before it."""

    peer: PeerKey
    message: Message


@dataclass(frozen=True, slots=True)
class Allow:
    """Source: let the receiver ``token`` fetch these blocks from now on."""

    token: Token
    block_ids: IntArray


@dataclass(frozen=True, slots=True)
class Sign:
    """Source: hash these blocks as they are; ``signed`` is to be called with what came of it."""

    token: Token
    first_index: int
    block_ids: IntArray


@dataclass(frozen=True, slots=True)
class Revoke:
    """Source: let ``token`` fetch nothing more; ``revoked`` is to be called when no transport of ours reads for it."""

    token: Token


@dataclass(frozen=True, slots=True)
class Forget:
    """Source: the receiver ``token`` has all it will ever get."""

    token: Token


@dataclass(frozen=True, slots=True)
class Fetch:
    """Destination: copy units from a source rank; ``fetched`` is to be called as they arrive, and are checked.

    Attributes:
        sums: what they must hash to, [num_units, layers of the plan]; None for anything.
    """

    peer: PeerKey
    token: Token
    src_ids: IntArray
    dst_ids: IntArray
    sums: Sums | None


@dataclass(frozen=True, slots=True)
class Cancel:
    """Destination: stop fetching for ``token``; ``cancelled`` is to be called when nothing writes for it any more."""

    peer: PeerKey
    token: Token


@dataclass(frozen=True, slots=True)
class Report:
    """The transfer's one and last event; the machine is done."""

    event: TransferEvent


Effect = Tell | Allow | Sign | Revoke | Forget | Fetch | Cancel | Report
