"""Every error that the data plane raises. ``str(exc)`` says what was wrong, with which value, and what to do.

What happens to a transfer after it was opened is not raised but reported: see ``kv_transfer.events.TransferFailed``.
"""

from __future__ import annotations

from collections.abc import Iterable


class KVTransferError(Exception):
    """Base of all.

    Attributes:
        exit_code: of a command that ends with this error; a command line prints such errors without a traceback.
    """

    exit_code = 1


class InvalidLayout(KVTransferError):
    """A KV layout that no pool can have, or text that is no layout; ``field`` names the offender."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"KV layout: {field} {message}")
        self.field = field


class LayoutMismatch(KVTransferError):
    """Two pools whose blocks do not mean the same bytes."""

    def __init__(self, field: str, mine: str, theirs: str) -> None:
        super().__init__(
            f"the KV caches cannot be exchanged: {field} is {mine!r} here and {theirs!r} at the peer; "
            f"start both with the same {field}"
        )
        self.field, self.mine, self.theirs = field, mine, theirs


class PoolUnavailable(KVTransferError):
    """The host cannot give the memory for a KV pool."""

    def __init__(self, num_bytes: int, why: str) -> None:
        super().__init__(
            f"cannot allocate a KV pool of {num_bytes} bytes: {why}; ask for fewer blocks, or free memory on this host"
        )
        self.num_bytes = num_bytes


class InvalidOptions(KVTransferError):
    """A transfer option that cannot work; ``option`` names it."""

    def __init__(self, option: str, message: str) -> None:
        super().__init__(f"transfer option {option}: {message}")
        self.option = option


class UnknownTransport(KVTransferError):
    """A protocol name that no installed transport answers to."""

    def __init__(self, name: str, installed: Iterable[str], remedy: str = "") -> None:
        self.name, self.installed = name, tuple(sorted(installed))
        super().__init__(
            f"KV transfer protocol {name!r} is not installed; installed are: {', '.join(self.installed) or 'none'}. "
            + (remedy or "Name one of those, or install a package that registers it under kv_transfer.transports")
        )


class InvalidEndpoint(KVTransferError):
    """Text that should describe a peer's rank, and does not."""


class ProtocolError(KVTransferError):
    """A message that no well-behaved peer of this wire version sends; it is dropped and counted."""


class MessengerClosed(KVTransferError):
    """The messenger was not started, or is closed."""

    def __init__(self, name: str) -> None:
        super().__init__(f"messenger {name!r} is not running: call start() first, and nothing after close()")


class InvalidTransfer(KVTransferError):
    """A call about a transfer that cannot be carried out as asked; a bug of the caller. Nothing was changed."""

    def __init__(self, transfer_id: str, message: str) -> None:
        super().__init__(f"transfer {transfer_id[:200]!r}: {message}")
        self.transfer_id = transfer_id


class TransportFailed(KVTransferError):
    """A transport could not reach a peer, or lost it; the messenger turns it into a fallback or a failed transfer."""


class NicUnavailable(KVTransferError):
    """An RDMA device that is named, or should be found, and cannot be used.

    Attributes:
        nic: its name; empty when it is about all of them.
        why: what is wrong, and what to do.
    """

    exit_code = 2

    def __init__(self, nic: str, why: str) -> None:
        super().__init__(f"RDMA device {nic!r}: {why}" if nic else why)
        self.nic, self.why = nic, why


class PoolNotServed(TransportFailed):
    """A transport cannot serve blocks out of this kind of pool; peers fetch by another one that both have."""


class RdmaUnavailable(TransportFailed):
    """RDMA cannot be used on this host; the text is one paragraph that names the remedy."""
