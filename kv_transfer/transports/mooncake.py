"""Mooncake's transfer engine over tcp: the destination's engine reads the source's registered pool into staging.

An engine that has met an error is not used again: every link has one of its own. A read cannot be taken back; one that
hangs on a peer that stands still keeps its thread, its engine and its staging until the engine gives up.
Whoever has an endpoint record can read the pool over Mooncake, secret or not: for networks where that is no matter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kv_transfer.endpoint import Offer, RankEndpoint
from kv_transfer.errors import TransportFailed
from kv_transfer.leases import LeaseTable
from kv_transfer.options import TransferOptions
from kv_transfer.pool import BlockPool
from kv_transfer.transports.base import Post
from kv_transfer.transports.pulling import PullTransport, Reader, region_bases, region_offer
from kv_transfer.views import ByteArray, Iovecs

try:
    from mooncake.engine import TransferEngine
except ImportError as _exc:
    raise ImportError(
        f"{_exc}: pip install 'splitwise-sched[mooncake]', and the system's libibverbs1 (apt install libibverbs1)"
    ) from _exc

# More in one call has been seen to stop an engine for good.
_BATCH = 1000


class MooncakeTransport(PullTransport):
    name = "mooncake"

    def __init__(self, pool: BlockPool, options: TransferOptions, leases: LeaseTable, post: Post) -> None:
        super().__init__(pool, options, leases, post)
        self._engine: Any = None

    def offer(self) -> Offer:
        places = region_offer(self.pool)
        host = self.options.public_host
        self._engine = _start_engine(self.options.bind_host)
        for region in self.pool.memory:
            if self._engine.register_memory(region.address, region.num_bytes):
                raise TransportFailed("Mooncake cannot register the pool")
        return {**places, "session": f"{host}:{self._engine.get_rpc_port()}"}

    def obstacle(self, peer: RankEndpoint) -> str | None:
        offer = peer.transports[self.name]
        try:
            region_bases(offer, peer)
        except TransportFailed as exc:
            return str(exc)
        return None if isinstance(offer.get("session"), str) else "its offer names no session"

    def reader(self, peer: RankEndpoint) -> Reader:
        return _MooncakeReader(str(peer.transports[self.name]["session"]), self.options.bind_host)

    def close(self) -> None:
        super().close()
        if self._engine is None:
            return
        for region in self.pool.memory:
            self._engine.unregister_memory(region.address)
        self._engine = None


class _MooncakeReader(Reader):
    def __init__(self, session: str, host: str) -> None:
        self._session, self._host = session, host
        self._engine: Any = None

    def connect(self, staging: ByteArray) -> None:
        self._staging = staging
        self._engine = _start_engine(self._host)
        if self._engine.register_memory(staging.ctypes.data, staging.nbytes):
            raise TransportFailed("Mooncake cannot register memory")

    def read(self, local: Iovecs, remote: Iovecs, is_given_up: Callable[[], bool]) -> bool:
        for start in range(0, len(local), _BATCH):
            if is_given_up():
                return True
            piece = slice(start, start + _BATCH)
            ours, sizes = local[piece, 0].tolist(), local[piece, 1].tolist()
            code = self._engine.batch_transfer_sync_read(self._session, ours, remote[piece, 0].tolist(), sizes)
            if code:
                raise TransportFailed(f"a Mooncake read ended with {code}")
        return True

    def close(self, *, is_clean: bool) -> None:
        if self._engine is not None:
            self._engine.unregister_memory(self._staging.ctypes.data)
            self._engine = None


def _start_engine(host: str) -> Any:
    engine = TransferEngine()
    if engine.initialize(host, "P2PHANDSHAKE", "tcp", ""):
        raise TransportFailed("Mooncake does not work on this host: see what it has written to the error output")
    return engine
