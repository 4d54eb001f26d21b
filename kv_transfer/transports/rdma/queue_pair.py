"""Completion queues and reliable connections: how they are made, used and ended. In the loop's thread."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kv_transfer.errors import TransportFailed
from kv_transfer.transports.rdma.device import MIN_RNR_TIMER, RETRY_COUNT, Device, new_psn, opened_descriptor
from kv_transfer.transports.rdma.reads import Read
from kv_transfer.transports.rdma.requests import LocalRegion
from kv_transfer.transports.rdma.wire import PairAddress, PortAddress, RemoteRegion

_PKEY_INDEX = 0
_RNR_RETRY_FOREVER = 7
_POLLED_AT_A_TIME = 64


@dataclass(frozen=True, slots=True)
class Completion:
    """The end of the reads up to and including one that was signalled.

    Attributes:
        status: 0 is success; anything else ends the queue pair.
        opcode: IBV_WC_*; meaningless after a failure.
    """

    wr_id: int
    status: int
    vendor_error: int
    pair_number: int


class CompletionQueue:
    """With a descriptor that becomes readable when there is something to be taken."""

    def __init__(self, device: Device, capacity: int) -> None:
        verbs = device.verbs
        self._error = verbs.Error
        self._channel, self.fd = opened_descriptor(lambda: verbs.CompChannel(device.context))
        try:
            os.set_blocking(self.fd, False)
            self.verbs_queue = verbs.CQ(device.context, capacity, None, self._channel, 0)
            self.verbs_queue.req_notify()
        except (verbs.Error, OSError):
            self._channel.close()
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
            found += [Completion(wc.wr_id, wc.status, wc.vendor_err, wc.qp_num) for wc in polled]
            if count < _POLLED_AT_A_TIME:
                return found

    def close(self) -> None:
        """After all queue pairs on it."""
        self.verbs_queue.close()
        self._channel.close()


class QueuePair:
    """One reliable connection. Whoever made it closes it; from then on nothing is read or written through it."""

    def __init__(self, device: Device, queue: Any, *, depth: int, max_pieces: int) -> None:
        """
        Args:
            queue: the verbs completion queue.
            depth: reads that may be posted at a time.
            max_pieces: of one read.
        Raises:
            the verbs' error: the device has no room.
        """
        self._device, self.psn = device, new_psn()
        verbs = device.verbs
        attributes = verbs.QPInitAttr(
            qp_type=verbs.enums.IBV_QPT_RC,
            scq=queue,
            rcq=queue,
            cap=verbs.QPCap(max_send_wr=depth, max_recv_wr=1, max_send_sge=max_pieces, max_recv_sge=1),
            sq_sig_all=0,
        )
        self._pair = verbs.QP(device.pd, attributes)

    @property
    def address(self) -> PairAddress:
        return PairAddress(self._pair.qp_num, self.psn)

    def connect(self, port: PortAddress, pair: PairAddress, read_depth: int) -> None:
        """Ready to read from and to be read by the other one.

        Args:
            read_depth: reads under way, both ways.
        """
        device, enums = self._device, self._device.verbs.enums
        attributes = device.verbs.QPAttr(port_num=device.port.port)
        attributes.pkey_index = _PKEY_INDEX
        attributes.qp_access_flags = enums.IBV_ACCESS_REMOTE_READ
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

    def post(self, reads: Sequence[Read], source: RemoteRegion, target: LocalRegion, wr_id: int) -> None:
        """Post reads in one go; one completion with ``wr_id`` follows when the last of them is done.

        Args:
            target: what the reads' pieces are in.
        Raises:
            the verbs' error: nothing was posted, or the pair is of no more use.
        """
        self._device.requests.post(self._pair, reads, source, target, wr_id)

    def close(self) -> None:
        """Destroy it: when this returns, the device touches no memory for it any more. Idempotent."""
        self._pair.close()


def explain(completion: Completion) -> TransportFailed:
    """What a failed completion means, for people."""
    name = _STATUS_NAMES.get(completion.status, f"status {completion.status}")
    return TransportFailed(f"a read failed: {name} (vendor error {completion.vendor_error:#x})")


# enum ibv_wc_status
_STATUS_NAMES = {
    1: "local length error",
    2: "local queue pair error",
    4: "local protection error: the region is not registered for this",
    5: "flushed, as the queue pair is in error",
    10: "remote access error: the peer has deregistered its pool",
    11: "remote operation error",
    12: "the peer's NIC does not answer (transport retries exceeded)",
    13: "the peer is not ready (receiver retries exceeded)",
    21: "the device does not respond",
}
