"""Ranks to measure: pools and messengers of one side, all in one process."""

from __future__ import annotations

import multiprocessing
import os
import resource
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from benchmarks.kv.paged import NUM_LAYERS, Paged
from kv_transfer import KVLayout, KVPool, Messenger, RankEndpoint, Received, Sent, TransferOptions

TIMEOUT_S = 120.0
_TOKENS, _HEAD_DIM, _ITEM_BYTES = 16, 16, 4


def paged_layout(paged: Paged, tp_size: int = 1) -> KVLayout:
    """Of rank 0; with TP, each rank's blocks have ``block_bytes``."""
    return KVLayout(
        engine="benchmark",
        model="none",
        dtype="float32",
        num_layers=NUM_LAYERS,
        num_kv_heads=tp_size * paged.block_bytes // (_TOKENS * _HEAD_DIM * _ITEM_BYTES),
        head_dim=_HEAD_DIM,
        block_size=_TOKENS,
        num_blocks=paged.num_blocks,
        tp_size=tp_size,
        packing=paged.packing,
    )


def flat_layout(block_kib: int, num_blocks: int) -> KVLayout:
    """Blocks that lie together as a whole."""
    return KVLayout("benchmark", "none", "float32", 1, block_kib, _HEAD_DIM, _TOKENS, num_blocks, kv_planes=1)


def all_ranks(layout: KVLayout) -> list[KVLayout]:
    return [replace(layout, tp_rank=rank) for rank in range(layout.tp_size)]


class Side:
    """The ranks of one side."""

    def __init__(self, layouts: Sequence[KVLayout], lane: str, name: str, checksum: str = "none") -> None:
        # Pages that numpy and the interpreter take for their own later on are not the messengers'.
        anonymous = memory_kib("RssAnon")
        self.pools = [KVPool.allocate(layout) for layout in layouts]
        for pool in self.pools:
            pool.regions[0].view(np.uint64)[:] = np.arange(pool.regions[0].size // 8, dtype=np.uint64)
        self._base_kib = min(anonymous, memory_kib("RssAnon"))
        self._news = threading.Event()
        options = TransferOptions(protocols=(lane,), checksum=checksum)
        self.messengers = [Messenger(pool, options, name=name, on_event=self._news.set) for pool in self.pools]
        for messenger in self.messengers:
            messenger.start()

    @property
    def endpoints(self) -> list[RankEndpoint]:
        return [messenger.endpoint for messenger in self.messengers]

    def send(self, jobs: Sequence[tuple[str, np.ndarray]]) -> None:
        """Offer the same blocks of every rank."""
        for messenger in self.messengers:
            for transfer_id, ids in jobs:
                messenger.open_send(transfer_id, num_blocks=len(ids), deadline_s=TIMEOUT_S)
                messenger.send_blocks(transfer_id, 0, ids)
                messenger.finish_send(transfer_id, b"")

    def send_each(self, name: str) -> None:
        """Offer a block of every rank, in a transfer of its own."""
        for index, messenger in enumerate(self.messengers):
            messenger.open_send(f"{name}.{index}", num_blocks=1, deadline_s=TIMEOUT_S)
            messenger.send_blocks(f"{name}.{index}", 0, [0])
            messenger.finish_send(f"{name}.{index}", b"")

    def receive(self, jobs: Sequence[tuple[str, np.ndarray]], source: Sequence[RankEndpoint]) -> None:
        for transfer_id, ids in jobs:
            for messenger in self.messengers:
                messenger.open_receive(transfer_id, source, ids, deadline_s=TIMEOUT_S)

    def wait(self, count: int) -> list[Sent | Received]:
        """The events of ``count`` transfers of every rank; each must end well."""
        found: list[Sent | Received] = []
        until = time.monotonic() + TIMEOUT_S
        while len(found) < count * len(self.messengers):
            self._news.clear()
            for messenger in self.messengers:
                for event in messenger.poll():
                    if not isinstance(event, Sent | Received):
                        raise RuntimeError(f"a transfer failed: {event.reason}")
                    found.append(event)
            if len(found) < count * len(self.messengers) and not self._news.wait(until - time.monotonic()):
                raise TimeoutError("a transfer does not end")
        return found

    def usage(self) -> dict[str, float]:
        """CPU seconds of this process so far, its threads, and memory beside the pools."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        return {
            "cpu_s": used.ru_utime + used.ru_stime,
            "threads": len(os.listdir("/proc/self/task")),
            "beside_mib": (memory_kib("RssAnon") - self._base_kib) / 1024,
        }

    def close(self) -> None:
        for messenger in self.messengers:
            messenger.close()
        for pool in self.pools:
            pool.close()


class FarSide:
    """A ``Side`` in a process of its own that sends what it is told to."""

    def __init__(self, layouts: Sequence[KVLayout], lane: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, far = context.Pipe()
        self._process = context.Process(target=_serve, args=(far, list(layouts), lane), daemon=True)
        self._process.start()
        self.endpoints = [RankEndpoint.from_dict(record) for record in self._pipe.recv()]
        self.fds: list[int] = self._pipe.recv()

    def pool(self, rank: int = 0) -> np.ndarray:
        """A rank's bytes, read-only."""
        layout = self.endpoints[rank].layout
        return np.memmap(f"/proc/{self._process.pid}/fd/{self.fds[rank]}", np.uint8, "r", shape=(layout.pool_bytes,))

    def offer(self, jobs: Sequence[tuple[str, np.ndarray]]) -> None:
        """Returns when all of it is on offer."""
        self.ask(("send", jobs))

    def wait_sent(self) -> float:
        """When all that was offered is sent and acknowledged; by the clock that all processes share."""
        return float(self.ask(("wait", None)))

    def ask(self, command: tuple[str, Any]) -> Any:
        self._pipe.send(command)
        if not self._pipe.poll(TIMEOUT_S):
            raise TimeoutError("the other side does not answer")
        return self._pipe.recv()

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join(20)
        if self._process.is_alive():
            self._process.kill()


def memory_kib(what: str) -> int:
    with open("/proc/self/status", encoding="ascii", errors="replace") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(what + ":"))


def _serve(pipe: Connection, layouts: list[KVLayout], lane: str) -> None:
    side = Side(layouts, lane, "prefill")
    pipe.send([endpoint.to_dict() for endpoint in side.endpoints])
    pipe.send([pool.fd for pool in side.pools])
    sent_at = 0.0
    while (command := pipe.recv()) is not None:
        what, argument = command
        if what in ("send", "each"):
            if what == "send":
                side.send(argument)
            else:
                side.send_each(argument)
            pipe.send(None)
            side.wait(len(argument) if what == "send" else 1)
            sent_at = time.monotonic()
        elif what == "wait":
            pipe.send(sent_at)
        elif what == "bare":
            with socket.create_server(("127.0.0.1", 0)) as listener:
                pipe.send(listener.getsockname()[1])
                with listener.accept()[0] as sock:
                    sock.sendall(memoryview(side.pools[0].regions[0])[:argument])
        elif what == "echo":
            with socket.create_server(("127.0.0.1", 0)) as listener:
                pipe.send(listener.getsockname()[1])
                with listener.accept()[0] as sock:
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    while data := sock.recv(16):
                        sock.sendall(data)
        else:
            pipe.send(side.usage())
    side.close()
