"""Completion queues and reliable connections: how they are made, used and ended. In the loop's thread."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from kv_transfer.transports.rdma.device import (
    MIN_RNR_TIMER,
    RETRY_COUNT,
    Device,
    close_descriptor,
    new_psn,
    opened_descriptor,
)
from kv_transfer.transports.rdma.operations import Operation
from kv_transfer.transports.rdma.requests import LocalRegion, immediate_of
from kv_transfer.transports.rdma.wire import PairAddress, PortAddress, RemoteRegion

_PKEY_INDEX = 0
_RNR_RETRY_FOREVER = 7
_POLLED_AT_A_TIME = 64


class Access(Enum):
    """What one end of a queue pair allows the other to do to its memory."""

    NONE = "none"
    READ = "read"
    WRITE = "write"


@dataclass(frozen=True, slots=True)
class Completion:
    """The end of what was posted up to and including an operation that was signalled, or a receive.

    Attributes:
        status: 0 is success; anything else ends the queue pair.
        immediate: what came with a receive.
    """

    wr_id: int
    status: int
    vendor_error: int
    pair_number: int
    immediate: int | None


class CompletionQueue:
    """With a descriptor that becomes readable when there is something to be taken."""

    def __init__(self, device: Device, capacity: int) -> None:
        verbs = device.verbs
        self._error, self._with_immediate = verbs.Error, verbs.enums.IBV_WC_WITH_IMM
        self._channel, self.fd = opened_descriptor(lambda: verbs.CompChannel(device.context))
        try:
            os.set_blocking(self.fd, False)
            self.verbs_queue = verbs.CQ(device.context, capacity, None, self._channel, 0)
            self.verbs_queue.req_notify()
        except (verbs.Error, OSError):
            close_descriptor(self._channel)
            raise

    def take(self) -> list[Completion]:
        """All that has completed; armed for what comes later."""
        queue = self.verbs_queue
        try:
            self._channel.get_cq_event(queue)
            queue.ack_events(1)
        except self._error:
            # Nothing there any more: it was taken with an earlier event.
            pass
        # Armed first: what completes during the polling then brings an event of its own.
        queue.req_notify()
        found: list[Completion] = []
        while True:
            count, polled = queue.poll(_POLLED_AT_A_TIME)
            found += [self._completion(wc) for wc in polled]
            if count < _POLLED_AT_A_TIME:
                return found

    def _completion(self, wc: Any) -> Completion:
        # After a failure the flags mean nothing.
        has_immediate = not wc.status and wc.wc_flags & self._with_immediate
        return Completion(wc.wr_id, wc.status, wc.vendor_err, wc.qp_num, immediate_of(wc) if has_immediate else None)

    def close(self) -> None:
        """After all queue pairs on it."""
        self.verbs_queue.close()
        close_descriptor(self._channel)


class QueuePair:
    """One reliable connection. Whoever made it closes it; from then on nothing is read or written through it."""

    def __init__(self, device: Device, queue: Any, *, depth: int, max_pieces: int, num_receives: int = 1) -> None:
        """
        Args:
            queue: the verbs completion queue.
            depth: operations that may be posted at a time.
            max_pieces: of one operation.
            num_receives: that may be posted at a time.
        Raises:
            the verbs' error: the device has no room.
        """
        self._device, self.psn = device, new_psn()
        verbs = device.verbs
        attributes = verbs.QPInitAttr(
            qp_type=verbs.enums.IBV_QPT_RC,
            scq=queue,
            rcq=queue,
            cap=verbs.QPCap(max_send_wr=depth, max_recv_wr=num_receives, max_send_sge=max_pieces, max_recv_sge=1),
            sq_sig_all=0,
        )
        self._pair = verbs.QP(device.pd, attributes)

    @property
    def number(self) -> int:
        return int(self._pair.qp_num)

    @property
    def address(self) -> PairAddress:
        return PairAddress(self._pair.qp_num, self.psn)

    def connect(self, port: PortAddress, pair: PairAddress, read_depth: int, allowed: Access) -> None:
        """Ready to be used, by us and by the other one.

        Args:
            read_depth: reads under way, both ways.
            allowed: to the other one.
        """
        device, enums = self._device, self._device.verbs.enums
        attributes = device.verbs.QPAttr(port_num=device.port.port)
        attributes.pkey_index = _PKEY_INDEX
        flags = {
            Access.NONE: 0,
            Access.READ: enums.IBV_ACCESS_REMOTE_READ,
            Access.WRITE: enums.IBV_ACCESS_REMOTE_WRITE,
        }
        attributes.qp_access_flags = flags[allowed]
        self._pair.to_init(attributes)
        attributes.dest_qp_num, attributes.path_mtu = pair.number, min(port.mtu, device.address.mtu)
        attributes.max_rd_atomic = attributes.max_dest_rd_atomic = read_depth
        attributes.min_rnr_timer = MIN_RNR_TIMER
        attributes.rq_psn, attributes.sq_psn = pair.psn, self.psn
        attributes.ah_attr = device.route(port)
        attributes.timeout, attributes.retry_cnt = device.options.timeout_exponent, RETRY_COUNT
        attributes.rnr_retry = _RNR_RETRY_FOREVER
        self._pair.to_rtr(attributes)
        self._pair.to_rts(attributes)

    def read(self, operations: Sequence[Operation], source: RemoteRegion, target: LocalRegion, wr_id: int) -> None:
        """Post reads in one go; one completion with ``wr_id`` follows when the last of them is done.

        Args:
            target: what the operations' pieces are in.
        Raises:
            the verbs' error: nothing was posted, or the pair is of no more use.
        """
        self._device.reads.post(self._pair, operations, remote=source, local=target, wr_id=wr_id)

    def write(
        self,
        operations: Sequence[Operation],
        target: RemoteRegion,
        source: LocalRegion,
        wr_id: int,
        immediate: int | None,
    ) -> None:
        """Post writes; as ``read``.

        Args:
            source: what the operations' pieces are in.
            immediate: for the peer to receive when all has been written, also by earlier calls.
        """
        self._device.writes.post(self._pair, operations, remote=target, local=source, wr_id=wr_id, immediate=immediate)

    def say(self, immediate: int, wr_id: int) -> None:
        """Post an immediate by itself; else as ``write``."""
        self._device.words.send(self._pair, immediate, wr_id)

    def expect(self) -> None:
        """Post a receive for one immediate. Raises the same."""
        self._device.words.receive(self._pair)

    def close(self) -> None:
        """Destroy it: when this returns, the device touches no memory for it any more. Idempotent."""
        self._pair.close()


def explain(status: int) -> str:
    """What a failed completion means, for people."""
    return _STATUS_NAMES.get(status, f"status {status}")


# enum ibv_wc_status; and what a source says besides.
LOCAL_ERROR, BAD_ORDER, GAVE_UP = 2, 254, 255
_STATUS_NAMES = {
    1: "local length error",
    LOCAL_ERROR: "local queue pair error",
    4: "local protection error: the region is not registered for this",
    5: "flushed, as the queue pair is in error",
    10: "remote access error: the peer has deregistered its memory, or does not allow this",
    11: "remote operation error",
    12: "the peer's NIC does not answer (transport retries exceeded)",
    13: "the peer is not ready (receiver retries exceeded)",
    21: "the device does not respond",
    BAD_ORDER: "it was asked for what makes no sense",
    GAVE_UP: "its writes did not complete in time",
}
