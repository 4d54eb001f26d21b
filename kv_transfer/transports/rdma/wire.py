"""What is said when queue pairs are connected: the destination connects by TCP, asks once, and is answered once.

    request   magic, version, data token of the session, then: the destination's port, mode, orders that it has under
              way on a queue pair, numbers of queue pairs and of regions, each queue pair, each region
    answer    status, the source's port, number of regions, where each is, then its queue pairs, in the same order

The data token comes from the control channel, so only who has proved to know the secret is answered. The destination
alone chooses the mode; a source serves both. Regions of the destination are told, and may be written to, in write mode
only: those of its pool, then its staging memory if the plan needs any.

On a connection in read mode nothing more is said: its end tells either side that the other is gone, and the queue
pairs with it. In write mode ``orders`` follow, and a byte from the source says that its queue pairs have failed, and
why.

Versions: 1 had neither mode nor regions of the destination. Which parts of a plan go by way of staging memory, and how
they lie there (``operations``), is part of a version.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from kv_transfer.protocol import TOKEN_BYTES

MAGIC = b"KVRDMA\x00"
VERSION = 2
MODE_READ, MODE_WRITE = 0, 1
MODES = {"read": MODE_READ, "write": MODE_WRITE}
MAX_QUEUE_PAIRS = 64
# That a destination may have under way on one queue pair.
MAX_ORDERS = 64
MAX_REGIONS = 2 * 4096
MAX_REGION_BYTES = 1 << 48
GID_BYTES = 16
STATUS_OK, STATUS_REFUSED, STATUS_NO_RESOURCES, STATUS_OTHER_LINK, STATUS_NO_ROUTE, STATUS_OTHER_VERSION = range(6)
STATUS_REASONS = {
    STATUS_REFUSED: "the peer does not know this session",
    STATUS_NO_RESOURCES: "the peer's device has no room for more queue pairs",
    STATUS_NO_ROUTE: "the peer's device finds no way to ours: check GID index, VLAN and route",
    STATUS_OTHER_LINK: "one port is RoCE, the other InfiniBand: name devices of one fabric",
    STATUS_OTHER_VERSION: f"the peer connects queue pairs by another version than {VERSION}: run one release on both",
}
_PREFACE = struct.Struct(f"<{len(MAGIC)}sB{TOKEN_BYTES}s")
_WISH = struct.Struct("<BHHH")
_PORT = struct.Struct(f"<{GID_BYTES}sHBBB")
_REGION = struct.Struct("<QIQ")
_PAIR = struct.Struct("<II")
_COUNT = struct.Struct("<H")
_STATUS = struct.Struct("<B")
PREFACE_BYTES = _PREFACE.size
REQUEST_HEAD_BYTES = _PORT.size + _WISH.size
ANSWER_HEAD_BYTES = _PORT.size + _COUNT.size


class BadHandshake(Exception):
    """Bytes that no peer of this version sends."""


class OtherVersion(Exception):
    """A peer of another version."""


@dataclass(frozen=True, slots=True)
class PortAddress:
    """How a port is reached, and what it bears.

    Attributes:
        lid: 0 on RoCE.
        mtu: as verbs number them: 1 is 256 bytes, 5 is 4096.
        read_depth: reads that one queue pair of it answers (source) or has under way (destination) at a time.
    """

    gid: bytes
    lid: int
    mtu: int
    read_depth: int
    is_roce: bool


@dataclass(frozen=True, slots=True)
class PairAddress:
    """One queue pair: its number and the packet number that it begins with."""

    number: int
    psn: int


@dataclass(frozen=True, slots=True)
class RemoteRegion:
    """Where a region of a peer's memory is to its device."""

    address: int
    rkey: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Request:
    """A destination's wish for queue pairs.

    Attributes:
        mode: MODE_READ or MODE_WRITE.
        num_orders: that it may have under way on a queue pair; 0 in read mode.
        regions: of its memory, that may be written to; none in read mode.
    """

    port: PortAddress
    mode: int
    num_orders: int
    pairs: list[PairAddress]
    regions: list[RemoteRegion]


def pack_request(token: bytes, request: Request) -> bytes:
    return (
        _PREFACE.pack(MAGIC, VERSION, token)
        + _pack_port(request.port)
        + _WISH.pack(request.mode, request.num_orders, len(request.pairs), len(request.regions))
        + _pack_pairs(request.pairs)
        + _pack_regions(request.regions)
    )


def unpack_preface(data: bytes) -> bytes:
    """The data token. Raises BadHandshake, OtherVersion."""
    magic, version, token = _PREFACE.unpack(data)
    if magic != MAGIC:
        raise BadHandshake("not a request for queue pairs")
    if version != VERSION:
        raise OtherVersion(f"version {version}, ours is {VERSION}")
    return bytes(token)


def request_rest_bytes(head: bytes) -> int:
    """What follows a request's head. Raises BadHandshake."""
    mode, num_orders, num_pairs, num_regions = _WISH.unpack_from(head, _PORT.size)
    if not 1 <= num_pairs <= MAX_QUEUE_PAIRS:
        raise BadHandshake(f"a request for {num_pairs} queue pairs")
    is_write = mode == MODE_WRITE
    if mode not in MODES.values() or is_write != (1 <= num_orders <= MAX_ORDERS) or is_write != bool(num_regions):
        raise BadHandshake(f"mode {mode} with {num_orders} orders at a time and {num_regions} regions")
    if num_regions > MAX_REGIONS + 1:
        raise BadHandshake(f"a pool of {num_regions} regions")
    return pairs_bytes(num_pairs) + regions_bytes(num_regions)


def unpack_request(head: bytes, rest: bytes) -> Request:
    """Raises BadHandshake."""
    mode, num_orders, num_pairs, _ = _WISH.unpack_from(head, _PORT.size)
    cut = pairs_bytes(num_pairs)
    regions = unpack_regions(rest[cut:])
    if any(region.num_bytes > MAX_REGION_BYTES or region.address + region.num_bytes > 1 << 64 for region in regions):
        raise BadHandshake("a region that cannot be")
    return Request(_unpack_port(head, 0), mode, num_orders, unpack_pairs(rest[:cut]), regions)


def pack_answer(port: PortAddress, regions: list[RemoteRegion], pairs: list[PairAddress]) -> bytes:
    return (
        _STATUS.pack(STATUS_OK)
        + _pack_port(port)
        + _COUNT.pack(len(regions))
        + _pack_regions(regions)
        + _pack_pairs(pairs)
    )


def pack_refusal(status: int) -> bytes:
    return _STATUS.pack(status)


def unpack_answer_head(data: bytes) -> tuple[PortAddress, int]:
    """Port, number of regions. Raises BadHandshake."""
    (count,) = _COUNT.unpack_from(data, _PORT.size)
    if not 1 <= count <= MAX_REGIONS:
        raise BadHandshake(f"a pool of {count} regions")
    return _unpack_port(data, 0), count


def regions_bytes(count: int) -> int:
    return _REGION.size * count


def unpack_regions(data: bytes) -> list[RemoteRegion]:
    return [RemoteRegion(*region) for region in _REGION.iter_unpack(data)]


def pairs_bytes(count: int) -> int:
    return _PAIR.size * count


def unpack_pairs(data: bytes) -> list[PairAddress]:
    return [PairAddress(number & 0xFFFFFF, psn & 0xFFFFFF) for number, psn in _PAIR.iter_unpack(data)]


def _pack_pairs(pairs: list[PairAddress]) -> bytes:
    return b"".join(_PAIR.pack(pair.number, pair.psn) for pair in pairs)


def _pack_regions(regions: list[RemoteRegion]) -> bytes:
    return b"".join(_REGION.pack(region.address, region.rkey, region.num_bytes) for region in regions)


def _pack_port(port: PortAddress) -> bytes:
    return _PORT.pack(port.gid, port.lid, port.mtu, port.read_depth, port.is_roce)


def _unpack_port(data: bytes, offset: int) -> PortAddress:
    gid, lid, mtu, read_depth, is_roce = _PORT.unpack_from(data, offset)
    if not 1 <= mtu <= 5 or read_depth < 1 or is_roce > 1:
        raise BadHandshake("a port that cannot be")
    return PortAddress(gid, lid, mtu, read_depth, bool(is_roce))
