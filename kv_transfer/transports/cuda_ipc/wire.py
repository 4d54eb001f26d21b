"""What is said on the lane's own socket between two processes of one host: who asks, and where the pool is.

    preface      magic, data token of the session      once, destination -> source
    description  its length, then JSON; with it comes the descriptor of the order page (see ``order``)

The socket is a local one with a name but no file. It then stays open, and says no more: its end tells the destination
to unmap, and the source that it has been unmapped.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from kv_transfer.errors import TransportFailed
from kv_transfer.transports.cuda_ipc.regions import SharedRegion
from kv_transfer.transports.cuda_ipc.runtime import HANDLE_BYTES, UUID_BYTES

MAGIC = b"KVCUDA\x00\x01"
PREFACE = struct.Struct("<8s16s")
LENGTH = struct.Struct("<I")
MAX_DESCRIPTION_BYTES = 8 << 20
MAX_STRANGERS = 64
PREFACE_TIMEOUT_S = 5.0
NONCE_BYTES = 16


def socket_name(nonce: str) -> str:
    """Of the source's listening socket, in Linux's abstract namespace."""
    return f"\0kv-cuda-{nonce}"


@dataclass(frozen=True, slots=True)
class Description:
    """Where a pool is, for another process.

    Attributes:
        nonce: of the source's transport; by it a destination in the same process finds the pool itself.
        uuid: of the device.
        events: handles; [NUM_SETS * num_groups], see ``order``.
    """

    nonce: str
    pid: int
    uuid: bytes
    regions: tuple[SharedRegion, ...]
    events: tuple[bytes, ...]
    num_groups: int

    def encode(self) -> bytes:
        handles = list(dict.fromkeys(region.handle for region in self.regions))
        text = json.dumps(
            {
                "nonce": self.nonce,
                "pid": self.pid,
                "uuid": self.uuid.hex(),
                "handles": [handle.hex() for handle in handles],
                "regions": [[handles.index(r.handle), r.offset, r.num_bytes] for r in self.regions],
                "events": [event.hex() for event in self.events],
                "num_groups": self.num_groups,
            }
        ).encode()
        return LENGTH.pack(len(text)) + text

    @classmethod
    def decode(cls, text: bytes, region_bytes: Sequence[int]) -> Description:
        """
        Args:
            region_bytes: that the peer's layout has.
        Raises:
            TransportFailed: it is not what a peer of this release sends.
        """
        try:
            data = json.loads(text)
            handles = [_handle(item, HANDLE_BYTES) for item in data["handles"]]
            regions = tuple(
                SharedRegion(handles[_count(index)], _count(offset), _count(num_bytes))
                for index, offset, num_bytes in data["regions"]
            )
            found = cls(
                nonce=_handle(data["nonce"], NONCE_BYTES).hex(),
                pid=_count(data["pid"]),
                uuid=_handle(data["uuid"], UUID_BYTES),
                regions=regions,
                events=tuple(_handle(item, HANDLE_BYTES) for item in data["events"]),
                num_groups=_count(data["num_groups"]),
            )
        except (ValueError, KeyError, TypeError, IndexError, RecursionError) as exc:
            raise TransportFailed(f"its pool's description cannot be read: {exc!r}") from exc
        if tuple(region.num_bytes for region in found.regions) != tuple(region_bytes):
            raise TransportFailed("its pool has other regions than its layout says")
        return found


def _handle(item: object, num_bytes: int) -> bytes:
    if not isinstance(item, str) or len(item) != 2 * num_bytes:
        raise ValueError(f"{str(item)[:80]!r} is not {num_bytes} bytes in hexadecimal digits")
    return bytes.fromhex(item)


def _count(item: object) -> int:
    if type(item) is not int or not 0 <= item < 1 << 63:
        raise ValueError(f"{str(item)[:80]!r} is not a whole number")
    return item
