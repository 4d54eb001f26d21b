"""What a destination asks to have written, once queue pairs are connected in write mode; by TCP, one after the other.

    order     number, queue pair, kind, part of the plan, number of units, token of the transfer, place in staging
              memory, then the units' ids at the source and, unless they are staged, at the destination (32 bits each)

Each order is answered once, on its queue pair and after all that was written for it: by an immediate, which is its
number, with the highest bit set if it was refused. The destination has a receive posted for it before it asks.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from kv_transfer.plan import IntArray
from kv_transfer.protocol import TOKEN_BYTES

MAX_UNITS = 4096
# Numbers are counted modulo this.
NUMBERS = 1 << 31
DIRECT, STAGED = 0, 1
_HEAD = struct.Struct(f"<IHBHH{TOKEN_BYTES}sQ")
HEAD_BYTES = _HEAD.size


class BadOrder(Exception):
    """An order that no peer of this version gives."""


@dataclass(frozen=True, slots=True)
class Order:
    """Units that are to be written; at most MAX_UNITS.

    Attributes:
        src_ids: [num_units]
        dst_ids: of the same units, for all parts that go right into the pool; None for one part that is staged.
        part: the one that is staged.
        slot: where in staging memory it goes, in the order of the units.
    """

    token: bytes
    src_ids: IntArray
    dst_ids: IntArray | None
    part: int = 0
    slot: int = 0


def pack_order(number: int, lane: int, order: Order) -> bytes:
    kind = STAGED if order.dst_ids is None else DIRECT
    head = _HEAD.pack(number, lane, kind, order.part, len(order.src_ids), order.token, order.slot)
    ids = order.src_ids if order.dst_ids is None else np.concatenate((order.src_ids, order.dst_ids))
    return head + ids.astype("<u4").tobytes()


def ids_bytes(head: bytes) -> int:
    """What follows an order's head. Raises BadOrder."""
    count: int
    _, _, kind, _, count, _, _ = _HEAD.unpack(head)
    if kind not in (DIRECT, STAGED) or not 1 <= count <= MAX_UNITS:
        raise BadOrder(f"an order of kind {kind} for {count} units")
    return 4 * count * (2 if kind == DIRECT else 1)


def unpack_order(head: bytes, ids: bytes) -> tuple[int, int, Order]:
    """Its number, the queue pair's, and the order. Raises BadOrder."""
    number, lane, kind, part, count, token, slot = _HEAD.unpack(head)
    if number >= NUMBERS:
        raise BadOrder(f"an order of number {number}")
    found = np.frombuffer(ids, "<u4").astype(np.int64)
    dst_ids = found[count:] if kind == DIRECT else None
    return number, lane, Order(token, found[:count], dst_ids, part, slot)


def pack_answer(number: int, *, is_refused: bool) -> int:
    """The immediate that answers an order."""
    return number | (NUMBERS if is_refused else 0)


def unpack_answer(immediate: int) -> tuple[int, bool]:
    """An order's number, and whether it was refused."""
    return immediate % NUMBERS, immediate >= NUMBERS
