"""NIXL: the destination's agent reads the source's registered pool into staging.

Which wire it takes, UCX decides (``UCX_TLS``, ``UCX_NET_DEVICES`` narrow it). Without UCX's error handling it may use
shared memory on one host, at the price that a peer's death goes unreported; messengers notice that by themselves.
Whoever has an endpoint record can read the pool over NIXL, secret or not: for networks where that is no matter.
"""

from __future__ import annotations

import base64
import binascii
import secrets
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from kv_transfer.endpoint import Offer, RankEndpoint
from kv_transfer.errors import TransportFailed
from kv_transfer.leases import LeaseTable
from kv_transfer.options import TransferOptions
from kv_transfer.pool import BlockPool
from kv_transfer.transports.base import Post
from kv_transfer.transports.pulling import PullTransport, Reader, joined_text, region_bases, region_offer, split_text
from kv_transfer.views import ByteArray, Iovecs

try:
    from nixl._api import nixl_agent, nixl_agent_config, nixl_thread_sync_t
except ImportError as _exc:
    raise ImportError(f"{_exc}: pip install 'splitwise-sched[nixl]'") from _exc

_BACKEND = "UCX"
_BACKEND_OPTIONS = {"ucx_error_handling_mode": "none"}
# Asked without a pause so often, then with one: small reads are over at once.
_EAGER_CHECKS = 200
_PAUSE_S = 50e-6


class NixlTransport(PullTransport):
    name = "nixl"

    def __init__(self, pool: BlockPool, options: TransferOptions, leases: LeaseTable, post: Post) -> None:
        super().__init__(pool, options, leases, post)
        self._agent: Any = None
        self._registered: Any = None

    def offer(self) -> Offer:
        self._agent = agent = _start_agent()
        places = region_offer(self.pool)
        regions = [(r.address, r.num_bytes, 0, "") for r in self.pool.memory]
        try:
            self._registered = agent.register_memory(regions, "DRAM", backends=[_BACKEND])
            record = base64.b64encode(agent.get_agent_metadata()).decode()
        except Exception as exc:  # the library has no error class of its own that covers all
            raise TransportFailed(f"NIXL cannot serve this pool: {exc}") from exc
        return {**places, **split_text("agent", record)}

    def obstacle(self, peer: RankEndpoint) -> str | None:
        try:
            region_bases(peer.transports[self.name], peer)
            base64.b64decode(joined_text("agent", peer.transports[self.name]), validate=True)
        except (TransportFailed, binascii.Error) as exc:
            return str(exc)
        return None

    def reader(self, peer: RankEndpoint) -> Reader:
        return _NixlReader(self._agent, base64.b64decode(joined_text("agent", peer.transports[self.name])))

    def close(self) -> None:
        super().close()
        if self._agent is None:
            return
        if self._registered is not None:
            self._agent.deregister_memory(self._registered, backends=[_BACKEND])
        self._agent = self._registered = None


def _start_agent() -> Any:
    try:
        config = nixl_agent_config(backends=[], sync_mode=nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT)
        agent = nixl_agent(f"kv-{secrets.token_hex(8)}", config)
        agent.create_backend(_BACKEND, _BACKEND_OPTIONS)
    except Exception as exc:
        raise TransportFailed(f"NIXL does not work on this host: {exc}") from exc
    return agent


class _NixlReader(Reader):
    def __init__(self, agent: Any, record: bytes) -> None:
        self._agent, self._record = agent, record
        self._peer = ""
        self._registered: Any = None

    def connect(self, staging: ByteArray) -> None:
        self._staging = staging
        try:
            memory = [(staging.ctypes.data, staging.nbytes, 0, "")]
            self._registered = self._agent.register_memory(memory, "DRAM", backends=[_BACKEND])
            name = self._agent.add_remote_agent(self._record)
            self._peer = name.decode() if isinstance(name, bytes) else name
            self._agent.make_connection(self._peer, backends=[_BACKEND])
        except Exception as exc:
            raise TransportFailed(f"NIXL cannot reach it: {exc}") from exc

    def read(self, local: Iovecs, remote: Iovecs, is_given_up: Callable[[], bool]) -> bool:
        agent = self._agent
        try:
            sides = [agent.get_xfer_descs(_with_device(side), "DRAM") for side in (local, remote)]
            handle = agent.initialize_xfer("READ", *sides, self._peer, backends=[_BACKEND])
            state, checks = agent.transfer(handle), 0
            while state == "PROC":
                if is_given_up():
                    # Its handle is not released: that would wait for, or leave to itself, what is under way.
                    return False
                checks += 1
                if checks > _EAGER_CHECKS:
                    time.sleep(_PAUSE_S)
                state = agent.check_xfer_state(handle)
            agent.release_xfer_handle(handle)
        except Exception as exc:
            raise TransportFailed(f"NIXL cannot read it: {exc}") from exc
        if state != "DONE":
            raise TransportFailed(f"a NIXL read ended as {state}")
        return True

    def close(self, *, is_clean: bool) -> None:
        if not is_clean:
            _ABANDONED.append(self)
            return
        try:
            if self._peer:
                self._agent.remove_remote_agent(self._peer)
            if self._registered is not None:
                self._agent.deregister_memory(self._registered, backends=[_BACKEND])
        except Exception:
            _ABANDONED.append(self)


# Readers of peers that stood still in the middle of a read: their staging must outlive whatever NIXL still does.
_ABANDONED: list[_NixlReader] = []


def _with_device(side: Iovecs) -> np.ndarray[tuple[int, ...], np.dtype[np.uint64]]:
    return np.concatenate([side, np.zeros((len(side), 1), np.uint64)], axis=1)
