"""One rank for transfer tests: a pool whose every byte is known, and a messenger; in this process or in one of its own.

A rank of its own is forked from a server that has imported everything: an import takes seconds in an emulated machine.
"""

from __future__ import annotations

import json
import mmap
import multiprocessing
import multiprocessing.context
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from kv_transfer import (
    BlockPool,
    CudaOptions,
    KVLayout,
    KVPool,
    Messenger,
    RankEndpoint,
    RdmaOptions,
    Received,
    Sent,
    TransferEvent,
    TransferFailed,
    TransferOptions,
    TransferStats,
)
from kv_transfer.transports.cuda_ipc.pool import CudaPool
from tests.integration.kv_memory import DEVICE, TWIN, Fetched, environment, make_pool, regions_of, spare_time, view_of

# In the VM with RDMA devices, where all may take 30 times as long.
IN_VM = "RDMA_VM_NICS" in os.environ
WAIT_S = 180.0 if IN_VM else 60.0
ROOT = Path(__file__).resolve().parents[2]
LAYOUT = KVLayout("transformers", "tiny", "float32", 3, 2, 8, 4, 257)


def pattern(layout: KVLayout, seed: int) -> np.ndarray:
    """What a pool filled with ``seed`` holds: uint8 [num_blocks, block_bytes]."""
    shape = (layout.num_blocks, layout.block_bytes)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def differing(layout: KVLayout, got: np.ndarray, wanted: np.ndarray) -> list[tuple[int, int]]:
    """Every (layer, block) of which some byte differs; both arrays are [blocks, block_bytes]."""
    by_layer = (np.asarray(got) != wanted).reshape(len(got), layout.num_layers, layout.layer_block_bytes).any(axis=2)
    return [(int(layer), int(block)) for block, layer in zip(*np.nonzero(by_layer), strict=True)]


def wait_for(condition: Callable[[], bool]) -> None:
    """For what nothing announces, as bytes that show up in a pool before their transfer's end."""
    until = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < until, "it does not happen"
        time.sleep(0.002)


def on_its_nic(options: TransferOptions, name: str, tp_rank: int) -> TransferOptions:
    """Where there are several RDMA devices, prefill ranks are on those of even number, the others on the odd ones."""
    count = int(os.environ.get("RDMA_VM_NICS", "0"))
    if "rdma" not in options.protocols or options.rdma.nics or count < 2:
        return options
    first = 0 if "prefill" in name else 1
    nics = tuple(f"rxe{i}" for i in range(first, count, 2))
    return replace(options, rdma=replace(options.rdma, nics=nics))


class LocalRank:
    """A rank in this process; closes what it owns."""

    def __init__(
        self,
        layout: KVLayout,
        options: TransferOptions,
        name: str,
        seed: int = 0,
        *,
        pool: BlockPool | None = None,
    ) -> None:
        """A pool that is given is owned from here on."""
        self.layout = layout
        self.pool = make_pool(layout, options) if pool is None else pool
        if pool is None or isinstance(pool, KVPool):
            self.regions = regions_of(self.pool)
            self.view = view_of(self.pool, layout)
        if getattr(self, "view", None) is not None:
            self.fill(seed)
        self._news = threading.Event()
        self._ended: dict[str, TransferEvent] = {}
        placed = on_its_nic(spare_time(options), name, layout.tp_rank)
        self.messenger = Messenger(self.pool, placed, name=name, on_event=self._news.set)
        self.messenger.start()
        self.endpoint = self.messenger.endpoint

    def fill(self, seed: int) -> None:
        self.view[:] = pattern(self.layout, seed)

    def open_send(self, transfer_id: str, num_blocks: int, deadline_s: float = WAIT_S) -> None:
        self.messenger.open_send(transfer_id, num_blocks=num_blocks, deadline_s=deadline_s)

    def send_blocks(self, transfer_id: str, first_index: int, block_ids: Sequence[int]) -> None:
        self.messenger.send_blocks(transfer_id, first_index, block_ids)

    def finish_send(self, transfer_id: str, aux: bytes = b"") -> None:
        self.messenger.finish_send(transfer_id, aux)

    def send(self, transfer_id: str, block_ids: Sequence[int], aux: bytes = b"", deadline_s: float = WAIT_S) -> None:
        """A whole send, in one chunk."""
        self.open_send(transfer_id, len(block_ids), deadline_s)
        self.send_blocks(transfer_id, 0, block_ids)
        self.finish_send(transfer_id, aux)

    def receive(
        self, transfer_id: str, source: Sequence[RankEndpoint], block_ids: Sequence[int], deadline_s: float = WAIT_S
    ) -> None:
        self.messenger.open_receive(transfer_id, source, block_ids, deadline_s=deadline_s)

    def abort(self, transfer_id: str, reason: str) -> None:
        self.messenger.abort(transfer_id, reason)

    def wait(self, transfer_id: str, timeout_s: float = WAIT_S) -> TransferEvent:
        """The transfer's one event; a second one for the same id fails the test."""
        until = time.monotonic() + timeout_s
        while transfer_id not in self._ended:
            self._news.clear()
            for event in self.messenger.poll():
                assert event.transfer_id not in self._ended, f"a second event: {event}"
                self._ended[event.transfer_id] = event
            if transfer_id in self._ended:
                break
            left = until - time.monotonic()
            assert left > 0, f"no event for {transfer_id} within {timeout_s} s"
            self._news.wait(min(left, 1.0))
        return self._ended.pop(transfer_id)

    def counters(self) -> dict[str, float]:
        return dict(self.messenger.counters())

    def close(self) -> None:
        self.messenger.close()
        if isinstance(self.pool, KVPool | CudaPool):
            self.pool.close()


class RemoteRank:
    """The same in a process of its own, which can be stopped and killed; ``view`` is its pool, read-only."""

    def __init__(self, layout: KVLayout, options: TransferOptions, name: str, seed: int = 0) -> None:
        self.layout = layout
        self._pipe, far_pipe = _forks().Pipe()
        self._process = _forks().Process(target=_serve, args=(far_pipe,))
        self._process.start()
        far_pipe.close()
        started = self._call(layout=layout.to_dict(), options=asdict(options), name=name, seed=seed, env=environment())
        self.endpoint = RankEndpoint.from_dict(started["endpoint"])
        shape = (layout.num_blocks, layout.block_bytes)
        if started["fd"] is None:
            self.view: Any = Fetched(self._dump, shape)
            return
        fd = os.open(f"/proc/{self._process.pid}/fd/{started['fd']}", os.O_RDONLY)
        mapping = mmap.mmap(fd, layout.pool_bytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        os.close(fd)
        self.view = np.frombuffer(mapping, np.uint8).reshape(shape)

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def fill(self, seed: int) -> None:
        self._call(do="fill", seed=seed)

    def open_send(self, transfer_id: str, num_blocks: int, deadline_s: float = WAIT_S) -> None:
        self._call(do="open_send", args=[transfer_id, num_blocks, deadline_s])

    def send_blocks(self, transfer_id: str, first_index: int, block_ids: Sequence[int]) -> None:
        self._call(do="send_blocks", args=[transfer_id, first_index, [int(b) for b in block_ids]])

    def finish_send(self, transfer_id: str, aux: bytes = b"") -> None:
        self._call(do="finish_send", args=[transfer_id], aux=aux.hex())

    def send(self, transfer_id: str, block_ids: Sequence[int], aux: bytes = b"", deadline_s: float = WAIT_S) -> None:
        self.open_send(transfer_id, len(block_ids), deadline_s)
        self.send_blocks(transfer_id, 0, block_ids)
        self.finish_send(transfer_id, aux)

    def receive(
        self, transfer_id: str, source: Sequence[RankEndpoint], block_ids: Sequence[int], deadline_s: float = WAIT_S
    ) -> None:
        endpoints = [e.to_dict() for e in source]
        self._call(do="receive", args=[transfer_id, [int(b) for b in block_ids], deadline_s], source=endpoints)

    def abort(self, transfer_id: str, reason: str) -> None:
        self._call(do="abort", args=[transfer_id, reason])

    def wait(self, transfer_id: str, timeout_s: float = WAIT_S) -> TransferEvent:
        answer = self._call(do="wait", args=[transfer_id, timeout_s])
        kind, data = answer["kind"], answer["data"]
        if kind == "TransferFailed":
            return TransferFailed(**data)
        data["stats"] = TransferStats(**data["stats"])
        if kind == "Sent":
            return Sent(**data)
        return Received(data["transfer_id"], bytes.fromhex(data["aux"]), data["stats"])

    def counters(self) -> dict[str, float]:
        return dict(self._call(do="counters")["counters"])

    def stop(self) -> None:
        """SIGSTOP; returns when every thread stands still."""
        os.kill(self.pid, signal.SIGSTOP)
        wait_for(lambda: all(state == "T" for state in self._thread_states()))

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        self._process.kill()
        self._process.join(WAIT_S)

    def close(self) -> None:
        """Ask it to end, and see that it does so cleanly; after ``kill`` nothing is asked."""
        was_alive = self._process.is_alive()
        if was_alive:
            self.resume()
        self._pipe.close()
        self._process.join(WAIT_S)
        if self._process.is_alive():
            self._process.kill()
            raise AssertionError("the rank's process does not end")
        assert not was_alive or self._process.exitcode == 0, f"the rank's process ended with {self._process.exitcode}"

    def _dump(self, first: int, end: int) -> np.ndarray:
        """Some blocks of its pool, where it cannot be mapped."""
        with tempfile.NamedTemporaryFile(prefix="kv-dump-") as file:
            self._call(do="dump", path=file.name, rows=[first, end])
            return np.fromfile(file.name, np.uint8)

    def _call(self, **command: Any) -> dict[str, Any]:
        try:
            self._pipe.send_bytes(json.dumps(command).encode())
            answer: dict[str, Any] = json.loads(self._pipe.recv_bytes())
        except (EOFError, OSError) as exc:
            raise AssertionError("the rank's process has ended") from exc
        assert "error" not in answer, answer["error"]
        return answer

    def _thread_states(self) -> list[str]:
        states = []
        for task in os.listdir(f"/proc/{self.pid}/task"):
            with open(f"/proc/{self.pid}/task/{task}/stat", encoding="utf-8") as file:
                states.append(file.read().rpartition(")")[2].split()[0])
        return states


@lru_cache(maxsize=1)
def _forks() -> multiprocessing.context.ForkServerContext:
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(variable, "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "tests.integration.kv_rank", "kv_transfer.transports.rdma"])
    return context


def _serve(pipe: Connection) -> None:
    """One rank, as its commands come; ends with the pipe."""

    def read() -> dict[str, Any] | None:
        try:
            return dict(json.loads(pipe.recv_bytes()))
        except EOFError:
            return None

    def answer(**data: Any) -> None:
        pipe.send_bytes(json.dumps(data).encode())

    first = read()
    if first is None:
        return
    for variable in (TWIN, DEVICE):
        os.environ.pop(variable, None)
    os.environ.update(first["env"])
    given = first["options"]
    lists = {name: tuple(given[name]) for name in ("protocols", "optional")}
    rdma = RdmaOptions(**{**given["rdma"], **{name: tuple(given["rdma"][name]) for name in ("nics", "ports")}})
    options = TransferOptions(**{**given, **lists, "rdma": rdma, "cuda": CudaOptions(**given["cuda"])})
    rank = LocalRank(KVLayout.from_dict(first["layout"]), options, first["name"], first["seed"])
    answer(endpoint=rank.endpoint.to_dict(), fd=rank.pool.fd if isinstance(rank.pool, KVPool) else None)
    while (command := read()) is not None:
        try:
            answer(**_do(rank, command))
        except Exception as exc:
            answer(error=f"{type(exc).__name__}: {exc}")
    rank.close()
    left = [t.name for t in threading.enumerate() if t is not threading.main_thread()]
    assert not left, f"threads left behind: {left}"


def _do(rank: LocalRank, command: dict[str, Any]) -> dict[str, Any]:
    what, args = command["do"], command.get("args", [])
    if what == "dump":
        rank.view[slice(*command["rows"])].tofile(command["path"])
    elif what == "fill":
        rank.fill(command["seed"])
    elif what == "receive":
        transfer_id, block_ids, deadline_s = args
        rank.receive(transfer_id, [RankEndpoint.from_dict(e) for e in command["source"]], block_ids, deadline_s)
    elif what == "finish_send":
        rank.finish_send(args[0], bytes.fromhex(command["aux"]))
    elif what == "wait":
        event = rank.wait(*args)
        data = asdict(event)
        if isinstance(event, Received):
            data["aux"] = event.aux.hex()
        return {"kind": type(event).__name__, "data": data}
    elif what == "counters":
        return {"counters": rank.counters()}
    else:
        getattr(rank, what)(*args)
    return {}
