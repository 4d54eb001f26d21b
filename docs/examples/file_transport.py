"""A toy transport, whole: the destination reads the source's pool through its file, block by block.

For one host. Registered by one line of an entry point group, it is chosen by its name, and the conformance suite runs
on it unasked; see docs/transport-guide.md.
"""

from __future__ import annotations

import numpy as np

from kv_transfer.endpoint import Offer, RankEndpoint
from kv_transfer.errors import PoolNotServed
from kv_transfer.identity import host_id
from kv_transfer.layout import placement_of
from kv_transfer.leases import LeaseTable
from kv_transfer.memory import region_offsets
from kv_transfer.options import TransferOptions
from kv_transfer.plan import IntArray, PairPlan
from kv_transfer.pool import BlockPool
from kv_transfer.transports.base import Cancelled, Fetched, Link, LinkDown, LinkUp, Post, Transport
from kv_transfer.views import BlockView, HostView


class FileTransport(Transport):
    name = "file"

    def __init__(self, pool: BlockPool, options: TransferOptions, leases: LeaseTable, post: Post) -> None:
        super().__init__(pool, options, leases, post)
        self._links: list[FileLink] = []

    def offer(self) -> Offer:
        """What a peer must know; travels in the lease record."""
        if self.pool.shared_file is None:
            raise PoolNotServed("the pool has no file")
        return {"fd": self.pool.shared_file[0]}

    def obstacle(self, peer: RankEndpoint) -> str | None:
        """Asked before anything is tried, and for every peer that offers this transport."""
        return None if peer.process.host == host_id() else "it is on another host"

    def open_link(self, peer: RankEndpoint, data_token: bytes, plan: PairPlan) -> Link:
        link = FileLink(peer, plan, self.pool.view(plan, "dst"), self.post)
        self._links.append(link)
        return link

    def close(self) -> None:
        for link in self._links:
            link.close()


class FileLink(Link):
    """Everything is done in the call that asks for it, so nothing is ever under way when another call comes."""

    def __init__(self, peer: RankEndpoint, plan: PairPlan, target: BlockView, post: Post) -> None:
        self._post, self._target = post, target
        self._source: BlockView | None = None
        self._is_down = False
        try:
            path = f"/proc/{peer.process.pid}/fd/{peer.transports['file']['fd']}"
            file = np.memmap(path, np.uint8, "r")
            placement = placement_of(peer.layout)
            places = zip(region_offsets(placement), placement.region_bytes, strict=False)
            self._source = HostView(plan, "src", peer.layout.num_blocks, [file[at : at + size] for at, size in places])
        except (OSError, ValueError) as exc:
            self._down(str(exc))
        else:
            post(LinkUp(self))

    def fetch(self, chunk_id: int, token: bytes, src_ids: IntArray, dst_ids: IntArray) -> None:
        if self._source is not None:
            self._target.scatter(dst_ids, self._source.gather(src_ids))
            self._post(Fetched(self, chunk_id))

    def cancel(self, token: bytes) -> None:
        self._post(Cancelled(self, token))

    def close(self) -> None:
        self._down("closed")

    def _down(self, reason: str) -> None:
        self._source = None
        if not self._is_down:
            self._is_down = True
            self._post(LinkDown(self, reason))
