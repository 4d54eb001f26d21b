"""Work requests that are made once and posted again and again; a device copies them when they are posted.

A work request and a scatter element cost microseconds to make, a fraction of one to change. pyverbs frees neither by
itself, and lets a request's list be replaced only by a single element: so reads into one stretch use a chain that is
made once, and reads into several get requests of their own, which are closed as soon as they are posted. Extended work
requests would do both, but the Soft-RoCE provider of rdma-core 44 miscounts their lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kv_transfer.transports.rdma.reads import Read
from kv_transfer.transports.rdma.verbs import Verbs
from kv_transfer.transports.rdma.wire import RemoteRegion


@dataclass(frozen=True, slots=True)
class LocalRegion:
    """Registered memory of ours."""

    address: int
    lkey: int


class WorkRequests:
    """For one thread, which may post them on any queue pair."""

    def __init__(self, verbs: Verbs, max_reads: int, max_pieces: int) -> None:
        """
        Args:
            max_reads: in one chain.
            max_pieces: of one read.
        """
        self._verbs = verbs
        self._pieces = [verbs.SGE(0, 0, 0) for _ in range(max_pieces)]
        self._elements = [verbs.SGE(0, 0, 0) for _ in range(max_reads)]
        self._chain: list[Any] = []
        following = None
        for element in reversed(self._elements):
            flags = 0 if following is not None else verbs.enums.IBV_SEND_SIGNALED
            request = verbs.SendWR(0, verbs.enums.IBV_WR_RDMA_READ, 1, 0, [element], flags, following)
            request.sg_list = element
            self._chain.append(request)
            following = request
        self._chain.reverse()

    def post(self, pair: Any, reads: Sequence[Read], source: RemoteRegion, target: LocalRegion, wr_id: int) -> None:
        """Post reads on a verbs queue pair; the last is signalled, under ``wr_id``.

        Args:
            target: what the reads' pieces are in.
        Raises:
            the verbs' error: nothing was posted, or the queue pair is of no more use.
        """
        if any(len(read.pieces) > 1 for read in reads):
            self._post_lists(pair, reads, source, target, wr_id)
            return
        assert len(reads) <= len(self._chain), "more reads than a chain has"
        # The chain cannot be cut short, so few reads use its end.
        first = len(self._chain) - len(reads)
        for number, read in enumerate(reads, first):
            ((offset, size),) = read.pieces
            element = self._elements[number]
            element.addr, element.length, element.lkey = target.address + offset, size, target.lkey
            self._chain[number].set_wr_rdma(source.rkey, source.address + read.source)
        self._chain[-1].wr_id = wr_id
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
        self, pair: Any, reads: Sequence[Read], source: RemoteRegion, target: LocalRegion, wr_id: int
    ) -> None:
        verbs, enums = self._verbs, self._verbs.enums
        requests: list[Any] = []
        try:
            for read in reversed(reads):
                pieces = self._pieces[: len(read.pieces)]
                for piece, (offset, size) in zip(pieces, read.pieces, strict=True):
                    piece.addr, piece.length, piece.lkey = target.address + offset, size, target.lkey
                following = requests[-1] if requests else None
                flags = 0 if requests else enums.IBV_SEND_SIGNALED
                request = verbs.SendWR(wr_id, enums.IBV_WR_RDMA_READ, len(pieces), 0, pieces, flags, following)
                requests.append(request)
                request.set_wr_rdma(source.rkey, source.address + read.source)
            pair.post_send(requests[-1])
        finally:
            for request in requests:
                request.close()
