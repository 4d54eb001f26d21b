"""Work requests that are made once and posted again and again; a device copies them when they are posted.

A work request and a scatter element cost microseconds to make, a fraction of one to change. pyverbs frees neither by
itself, and lets a request's list be replaced only by a single element: so operations on one local stretch use a chain
that is made once, and those on several get requests of their own, which are closed as soon as they are posted. Extended
work requests would do both, but the Soft-RoCE provider of rdma-core 44 miscounts their lists.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kv_transfer.transports.rdma.operations import Operation
from kv_transfer.transports.rdma.verbs import Verbs
from kv_transfer.transports.rdma.wire import RemoteRegion


@dataclass(frozen=True, slots=True)
class LocalRegion:
    """Registered memory of ours."""

    address: int
    lkey: int
    rkey: int
    num_bytes: int

    @property
    def for_peer(self) -> RemoteRegion:
        return RemoteRegion(self.address, self.rkey, self.num_bytes)


class WorkRequests:
    """Reads, or writes. For one thread, which may post them on any queue pair."""

    def __init__(self, verbs: Verbs, opcode: int, max_operations: int, max_pieces: int) -> None:
        """
        Args:
            opcode: IBV_WR_RDMA_READ or IBV_WR_RDMA_WRITE.
            max_operations: in one chain.
            max_pieces: of one operation.
        """
        self._verbs, self._opcode = verbs, opcode
        self._pieces = [verbs.SGE(0, 0, 0) for _ in range(max_pieces)]
        self._elements = [verbs.SGE(0, 0, 0) for _ in range(max_operations)]
        self._chain: list[Any] = []
        following = None
        for element in reversed(self._elements):
            flags = 0 if following is not None else verbs.enums.IBV_SEND_SIGNALED
            request = verbs.SendWR(0, opcode, 1, 0, [element], flags, following)
            request.sg_list = element
            self._chain.append(request)
            following = request
        self._chain.reverse()

    def post(
        self,
        pair: Any,
        operations: Sequence[Operation],
        *,
        remote: RemoteRegion,
        local: LocalRegion,
        wr_id: int,
        immediate: int | None = None,
    ) -> None:
        """Post operations on a verbs queue pair; the last is signalled, under ``wr_id``.

        Args:
            local: what the operations' pieces are in.
            immediate: comes to the peer with the last write, and takes one of its receives.
        Raises:
            the verbs' error: nothing was posted, or the queue pair is of no more use.
        """
        if any(len(operation.pieces) > 1 for operation in operations):
            self._post_lists(pair, operations, remote=remote, local=local, wr_id=wr_id, immediate=immediate)
            return
        assert len(operations) <= len(self._chain), "more operations than a chain has"
        # The chain cannot be cut short, so few operations use its end.
        first = len(self._chain) - len(operations)
        for number, operation in enumerate(operations, first):
            ((offset, size),) = operation.pieces
            element = self._elements[number]
            element.addr, element.length, element.lkey = local.address + offset, size, local.lkey
            self._chain[number].set_wr_rdma(remote.rkey, remote.address + operation.remote)
        last = self._chain[-1]
        last.wr_id, last.opcode = wr_id, self._last_opcode(immediate)
        last.imm_data = _to_wire(immediate)
        pair.post_send(self._chain[first])

    def close(self) -> None:
        """Idempotent."""
        for request in self._chain:
            # This frees the element that it has taken over, too.
            request.close()
        for piece in self._pieces:
            piece.close()
        self._chain, self._elements, self._pieces = [], [], []

    def _post_lists(
        self,
        pair: Any,
        operations: Sequence[Operation],
        *,
        remote: RemoteRegion,
        local: LocalRegion,
        wr_id: int,
        immediate: int | None,
    ) -> None:
        verbs, enums = self._verbs, self._verbs.enums
        requests: list[Any] = []
        try:
            for operation in reversed(operations):
                pieces = self._pieces[: len(operation.pieces)]
                for piece, (offset, size) in zip(pieces, operation.pieces, strict=True):
                    piece.addr, piece.length, piece.lkey = local.address + offset, size, local.lkey
                if requests:
                    request = verbs.SendWR(wr_id, self._opcode, len(pieces), 0, pieces, 0, requests[-1])
                else:
                    opcode, word = self._last_opcode(immediate), _to_wire(immediate)
                    request = verbs.SendWR(wr_id, opcode, len(pieces), word, pieces, enums.IBV_SEND_SIGNALED, None)
                requests.append(request)
                request.set_wr_rdma(remote.rkey, remote.address + operation.remote)
            pair.post_send(requests[-1])
        finally:
            for request in requests:
                request.close()

    def _last_opcode(self, immediate: int | None) -> int:
        return self._opcode if immediate is None else int(self._verbs.enums.IBV_WR_RDMA_WRITE_WITH_IMM)


class Words:
    """Messages of nothing but an immediate, and the receives that immediates take. For one thread."""

    def __init__(self, verbs: Verbs) -> None:
        # A request cannot be made without an element; this one has no bytes, so neither sends nor receives any.
        element = verbs.SGE(0, 0, 0)
        try:
            flags = verbs.enums.IBV_SEND_SIGNALED
            self._send = verbs.SendWR(0, verbs.enums.IBV_WR_SEND_WITH_IMM, 1, 0, [element], flags, None)
            self._send.num_sge = 0
            self._receive = verbs.RecvWR(0, 1, [element])
            self._receive.num_sge = 0
        finally:
            element.close()
        self._is_closed = False

    def send(self, pair: Any, immediate: int, wr_id: int) -> None:
        """Post a message of no bytes, signalled. Raises the verbs' error."""
        self._send.wr_id, self._send.imm_data = wr_id, _to_wire(immediate)
        pair.post_send(self._send)

    def receive(self, pair: Any) -> None:
        """Post a receive for one immediate; a peer that sends bytes with it ends the queue pair. Raises the same."""
        pair.post_recv(self._receive)

    def close(self) -> None:
        """Idempotent."""
        if not self._is_closed:
            self._is_closed = True
            self._send.close()
            self._receive.close()


def immediate_of(completion: Any) -> int:
    """Of a verbs completion that has one."""
    return socket.ntohl(completion.imm_data)


def _to_wire(immediate: int | None) -> int:
    """pyverbs hands immediates on as they lie in memory, and that is in network order."""
    return 0 if immediate is None else socket.htonl(immediate)
