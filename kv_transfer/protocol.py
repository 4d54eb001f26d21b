"""The messages between messengers, and their form on the wire.

The destination connects to the source's control port and speaks first; the source answers on the same connection.

    destination                      source
    Hello            ->
                     <-              Welcome | Refused      each side proves that it knows the secret
    Prove            ->
                     <-              Ready | Refused        from here on both believe each other
    Reserve          ->                                     a transfer: where, how many blocks
                     <-              Blocks ... End         what may be fetched; fetching is the transport's matter
    Applied          ->                                     every byte is in the destination's pool ...
                     <-              Confirmed              ... and was still the transfer's when it was read
    Abort            <->             Abort                  by either side; the other one answers with its own
    Drained          <->             Drained                by each, when its memory is no longer touched
    Ping             ->              Pong                   while a transfer is under way

One message is one frame of the control channel (see ``kv_transfer.control``): a msgpack array ``[kind, fields ...]``.
``Hello`` begins with the wire version in every version, and ``Refused`` is the same in all, so that two versions can
tell each other what is wrong.

History of WIRE_VERSION:
    1  the first one, over zmq
    2  over plain TCP; layouts with strides, stages and unequal block sizes; Applied says how many bytes;
       checksums
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import msgpack

from kv_transfer.errors import ProtocolError

WIRE_VERSION = 2
TOKEN_BYTES = 16
DIGEST_BYTES = 32
MAX_TRANSFER_ID_CHARS = 200
MAX_AUX_BYTES = 1 << 20
MAX_IDS_PER_MESSAGE = 16384
MAX_SUMS_BYTES = 1 << 19
MAX_BLOCKS_PER_TRANSFER = 1 << 24
MAX_REASON_CHARS = 2000
MAX_DEADLINE_MS = 24 * 3600 * 1000
# What either side takes off the socket at all; the largest message is an End with its aux.
MAX_MESSAGE_BYTES = MAX_AUX_BYTES + 4096

Check = Callable[[object], bool]


def _number(low: int, high: int) -> Any:
    return field(metadata={"check": lambda v: type(v) is int and low <= v <= high})


def _text(limit: int) -> Any:
    # Texts end in logs and terminals: nothing that moves a cursor gets in.
    return field(metadata={"check": lambda v: isinstance(v, str) and len(v) <= limit and (v == "" or v.isprintable())})


def _blob(limit: int, *, least: int = 0, multiple: int = 1) -> Any:
    return field(
        metadata={"check": lambda v: isinstance(v, bytes) and least <= len(v) <= limit and len(v) % multiple == 0}
    )


def _token() -> Any:
    return _blob(TOKEN_BYTES, least=TOKEN_BYTES)


def _digest() -> Any:
    return _blob(DIGEST_BYTES, least=DIGEST_BYTES)


def _table() -> Any:
    return field(metadata={"check": lambda v: isinstance(v, dict) and len(v) <= 64})


@dataclass(frozen=True, slots=True)
class Hello:
    """Destination → source, first of a connection.

    Attributes:
        target: nonce of the messenger that the destination means to talk to.
        challenge: random; the source's proof is over it.
    """

    version: int = _number(1, 2**31 - 1)
    target: str = _text(64)
    name: str = _text(512)
    host_id: str = _text(512)
    pid: int = _number(1, 2**31 - 1)
    pid_start: int = _number(0, 2**63 - 1)
    layout: Mapping[str, object] = _table()
    challenge: bytes = _digest()


@dataclass(frozen=True, slots=True)
class Welcome:
    """Source → destination. ``proof`` is over both challenges; see ``kv_transfer.handshake``."""

    challenge: bytes = _digest()
    proof: bytes = _digest()


@dataclass(frozen=True, slots=True)
class Prove:
    proof: bytes = _digest()


@dataclass(frozen=True, slots=True)
class Ready:
    """``data_token`` opens data connections to the source, for transports that have them."""

    data_token: bytes = _token()


@dataclass(frozen=True, slots=True)
class Refused:
    """The other side will not talk, or knows nothing of a connection that it is told on. Ends the connection."""

    code: str = _text(32)
    reason: str = _text(MAX_REASON_CHARS)


@dataclass(frozen=True, slots=True)
class Reserve:
    """The destination has room for a transfer.

    Attributes:
        token: names this rank's part of the transfer in every later message; random, never used twice.
        num_blocks: of the destination, those that it does not want included.
        lane: the transport that the destination fetches with; for the source's statistics.
        checksum: hash that each ``Blocks`` is to bring, see ``kv_transfer.checksums``; "none" for none.
    """

    token: bytes = _token()
    transfer_id: str = _text(MAX_TRANSFER_ID_CHARS)
    num_blocks: int = _number(1, MAX_BLOCKS_PER_TRANSFER)
    lane: str = _text(32)
    deadline_ms: int = _number(0, MAX_DEADLINE_MS)
    checksum: str = _text(32)


@dataclass(frozen=True, slots=True)
class Blocks:
    """These blocks of the source's pool are complete: numbers ``first_index`` onward of the transfer.

    Attributes:
        block_ids: unsigned 32-bit little-endian, packed.
        sums: unsigned 64-bit little-endian, packed: of each unit, of each layer; empty without checksums.
    """

    token: bytes = _token()
    first_index: int = _number(0, MAX_BLOCKS_PER_TRANSFER)
    block_ids: bytes = _blob(4 * MAX_IDS_PER_MESSAGE, least=4, multiple=4)
    sums: bytes = _blob(MAX_SUMS_BYTES, multiple=8)


@dataclass(frozen=True, slots=True)
class End:
    """All blocks were announced."""

    token: bytes = _token()
    aux: bytes = _blob(MAX_AUX_BYTES)


@dataclass(frozen=True, slots=True)
class Applied:
    """Every byte is in the destination's pool; ``num_bytes`` of them came from this source, for its statistics."""

    token: bytes = _token()
    num_bytes: int = _number(0, 2**63 - 1)


@dataclass(frozen=True, slots=True)
class Confirmed:
    token: bytes = _token()


@dataclass(frozen=True, slots=True)
class Abort:
    token: bytes = _token()
    reason: str = _text(MAX_REASON_CHARS)


@dataclass(frozen=True, slots=True)
class Drained:
    token: bytes = _token()


@dataclass(frozen=True, slots=True)
class Ping:
    pass


@dataclass(frozen=True, slots=True)
class Pong:
    pass


Message = (
    Hello
    | Welcome
    | Prove
    | Ready
    | Refused
    | Reserve
    | Blocks
    | End
    | Applied
    | Confirmed
    | Abort
    | Drained
    | Ping
    | Pong
)

_KINDS: Mapping[int, type[Any]] = {
    1: Hello,
    2: Refused,
    3: Welcome,
    4: Prove,
    5: Ready,
    6: Reserve,
    7: Blocks,
    8: End,
    9: Applied,
    10: Confirmed,
    11: Abort,
    12: Drained,
    13: Ping,
    14: Pong,
}
_NUMBERS = {cls: number for number, cls in _KINDS.items()}
_NAMES = {cls: tuple(f.name for f in fields(cls)) for cls in _NUMBERS}
_CHECKS: Mapping[int, list[tuple[str, Check]]] = {
    number: [(f.name, f.metadata["check"]) for f in fields(cls)] for number, cls in _KINDS.items()
}


def printable(reason: str) -> str:
    """A reason that any caller or library may have worded, fit for a message."""
    return "".join(c if c.isprintable() else " " for c in reason[: MAX_REASON_CHARS // 2])


class OtherVersion(ProtocolError):
    """A Hello of another wire version; the rest of it means nothing here."""

    def __init__(self, version: int) -> None:
        super().__init__(f"wire version {version}, not {WIRE_VERSION}")
        self.version = version


def encode(message: Message) -> bytes:
    """One frame."""
    cls = type(message)
    return bytes(msgpack.packb([_NUMBERS[cls], *(getattr(message, name) for name in _NAMES[cls])], use_bin_type=True))


def decode(frame: bytes) -> Message:
    """Read a frame that anybody may have sent.

    Raises:
        OtherVersion: a Hello of another version.
        ProtocolError: anything else that ``encode`` of this version does not make.
    """
    if len(frame) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"a message of {len(frame)} bytes; the limit is {MAX_MESSAGE_BYTES}")
    try:
        parts = msgpack.unpackb(frame, raw=False, use_list=True, strict_map_key=True)
    except (ValueError, TypeError, RecursionError, msgpack.exceptions.UnpackException) as exc:
        raise ProtocolError(f"not a message: {type(exc).__name__}") from exc
    if not isinstance(parts, list) or not parts or type(parts[0]) is not int or parts[0] not in _KINDS:
        raise ProtocolError("not a message: no known kind")
    kind, values = parts[0], parts[1:]
    cls, checks = _KINDS[kind], _CHECKS[kind]
    if cls is Hello and values and type(values[0]) is int and values[0] != WIRE_VERSION:
        raise OtherVersion(values[0])
    if len(values) != len(checks):
        raise ProtocolError(f"{cls.__name__} with {len(values)} fields, not {len(checks)}")
    for (name, check), value in zip(checks, values, strict=True):
        if not check(value):
            raise ProtocolError(f"{cls.__name__} with an unusable {name}")
    message: Message = cls(*values)
    return message
