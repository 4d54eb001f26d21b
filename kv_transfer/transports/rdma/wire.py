"""What is said when queue pairs are connected: the destination connects by TCP, asks once, and is answered once.

    request   magic, data token of the session, the destination's port, number of queue pairs, then each one's numbers
    answer    status, the source's port, number of regions, where each is, then its queue pairs, in the same order

The data token comes from the control channel, so only who has proved to know the secret is answered. The connection
then stays open without a word: its end tells either side that the other is gone, and the queue pairs with it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from kv_transfer.protocol import TOKEN_BYTES

MAGIC = b"KVRDMA\x00\x01"
MAX_QUEUE_PAIRS = 64
MAX_REGIONS = 2 * 4096
GID_BYTES = 16
STATUS_OK, STATUS_REFUSED, STATUS_NO_RESOURCES, STATUS_OTHER_LINK, STATUS_NO_ROUTE = range(5)
STATUS_REASONS = {
    STATUS_REFUSED: "the peer does not know this session",
    STATUS_NO_RESOURCES: "the peer's device has no room for more queue pairs",
    STATUS_NO_ROUTE: "the peer's device finds no way to ours: check GID index, VLAN and route",
    STATUS_OTHER_LINK: "one port is RoCE, the other InfiniBand: name devices of one fabric",
}
_REQUEST = struct.Struct(f"<{len(MAGIC)}s{TOKEN_BYTES}s")
_PORT = struct.Struct(f"<{GID_BYTES}sHBBB")
_REGION = struct.Struct("<QIQ")
_PAIR = struct.Struct("<II")
_COUNT = struct.Struct("<H")
_STATUS = struct.Struct("<B")
REQUEST_HEAD_BYTES = _REQUEST.size + _PORT.size + _COUNT.size
ANSWER_HEAD_BYTES = _PORT.size + _COUNT.size


class BadHandshake(Exception):
    """Bytes that no peer of this version sends."""


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
    """Where a region of a source's pool is to its device."""

    address: int
    rkey: int
    num_bytes: int


def pack_request(token: bytes, port: PortAddress, pairs: list[PairAddress]) -> bytes:
    return _REQUEST.pack(MAGIC, token) + _pack_port(port) + _COUNT.pack(len(pairs)) + _pack_pairs(pairs)


def unpack_request_head(data: bytes) -> tuple[bytes, PortAddress, int]:
    """Data token, port, number of queue pairs. Raises BadHandshake."""
    magic, token = _REQUEST.unpack_from(data)
    (count,) = _COUNT.unpack_from(data, _REQUEST.size + _PORT.size)
    if magic != MAGIC or not 1 <= count <= MAX_QUEUE_PAIRS:
        raise BadHandshake("not a request for queue pairs of this version")
    return token, _unpack_port(data, _REQUEST.size), count


def pack_answer(port: PortAddress, regions: list[RemoteRegion], pairs: list[PairAddress]) -> bytes:
    return (
        _STATUS.pack(STATUS_OK)
        + _pack_port(port)
        + _COUNT.pack(len(regions))
        + b"".join(_REGION.pack(region.address, region.rkey, region.num_bytes) for region in regions)
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


def _pack_port(port: PortAddress) -> bytes:
    return _PORT.pack(port.gid, port.lid, port.mtu, port.read_depth, port.is_roce)


def _unpack_port(data: bytes, offset: int) -> PortAddress:
    gid, lid, mtu, read_depth, is_roce = _PORT.unpack_from(data, offset)
    if not 1 <= mtu <= 5 or read_depth < 1 or is_roce > 1:
        raise BadHandshake("a port that cannot be")
    return PortAddress(gid, lid, mtu, read_depth, bool(is_roce))
