"""Mooncake over tcp between two processes: synchronous writes of at most 1,000 blocks, as more wedges its engine."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.connection import Connection

import numpy as np

from benchmarks.kv.nixl_peer import FarMemory
from benchmarks.kv.peer_rounds import MIB, Numbers, measure, pattern

BATCH = 1000


def start(memory: np.ndarray):  # type: ignore[no-untyped-def]
    from mooncake.engine import TransferEngine

    engine = TransferEngine()
    if engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") or engine.register_memory(
        memory.ctypes.data, memory.nbytes
    ):
        raise RuntimeError("Mooncake does not start")
    return engine


def serve(pipe: Connection, size: int) -> None:
    memory = np.zeros(size, np.uint8)
    engine = start(memory)
    pipe.send((f"127.0.0.1:{engine.get_rpc_port()}", memory.ctypes.data))
    while (command := pipe.recv()) is not None:
        pipe.send([bytes(memory[a : a + n]) for a, n in command])
    os._exit(0)


def main() -> None:
    numbers = Numbers()
    size = numbers.pool_mib * MIB
    context = multiprocessing.get_context("spawn")
    pipe, far = context.Pipe()
    process = context.Process(target=serve, args=(far, size), daemon=True)
    process.start()
    memory = pattern(size).copy()
    engine = start(memory)
    if not pipe.poll(60):
        raise TimeoutError("the far engine does not start")
    session, far_address = pipe.recv()

    def move(src_at: np.ndarray, dst_at: np.ndarray, block: int) -> None:
        ours, theirs = (src_at + memory.ctypes.data).tolist(), (dst_at + far_address).tolist()
        sizes = [block] * len(ours)
        for first in range(0, len(ours), BATCH):
            piece = slice(first, first + BATCH)
            code = engine.batch_transfer_sync_write(session, ours[piece], theirs[piece], sizes[piece])
            if code:
                raise RuntimeError(f"a batch ended with {code}")

    measure("mooncake tcp write", numbers, move, memory, FarMemory(pipe, size))
    pipe.send(None)
    process.join(10)


if __name__ == "__main__":
    main()
    os._exit(0)
